"""The tokenizer: contrastive loss, residual k-means, neighbourhood measure, its stages, and item texts."""

import json
import math
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from recbole_gr2.bridge.data import Data, read_item_texts
from recbole_gr2.bridge.splits import leave_one_out
from recbole_gr2.catalog import Catalog
from recbole_gr2.config import load_settings
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.sid import rqvae
from recbole_gr2.sid.contrastive import co_engaged, info_nce, positive_mask, sample_positives
from recbole_gr2.sid.embed import hash_embeddings, item_text, neighbour_means
from recbole_gr2.sid.methods import fit, load_codebooks, tokenizer_config
from recbole_gr2.sid.quality import category_path, health, neighbourhood, neighbourhood_line
from recbole_gr2.sid.quantizer import SidConfig, assign
from recbole_gr2.sid.rqkmeans import RQKMeans, fit_rqkmeans
from recbole_gr2.sid.rqvae import RQVAE, RQVAEConfig, fit_rqvae
from recbole_gr2.stages import embeddings, tokenizer
from recbole_gr2.store import read_lines
from recbole_gr2.types import Context, Item

PLAIN = SidConfig(levels=2, codes=4, random_last=0, seed=3)


@pytest.fixture
def short_fits(monkeypatch):
    """Train small catalogues for the chosen number of epochs, without the least number of steps."""
    monkeypatch.setattr(rqvae, "MIN_STEPS", 1)


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors around 4 of 8 axes, (240, 8), and the axis of each vector, (240,)."""
    labels = np.arange(240) % 4
    points = np.eye(8)[labels] + 0.05 * np.random.default_rng(seed).normal(size=(240, 8))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), labels


# --- contrastive loss ------------------------------------------------------------------------------------------------


def test_info_nce_by_hand():
    """Three items in two dimensions, T = 1/2. In the second case the first positive is also one of the third item."""
    latents = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    positives = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    one, root = math.exp(2), math.exp(math.sqrt(2))  # exp(1 / T), exp(sqrt(1/2) / T); exp(0 / T) = 1
    every = [-math.log(one / (one + 1 + root)), -math.log(one / (one + 1 + root)), -math.log(root / (one + 1 + root))]
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    assert info_nce(latents, positives, nothing, 0.5).item() == pytest.approx(sum(every) / 3)
    mask = torch.eye(3, dtype=torch.bool)  # The diagonal is the numerator, so it always counts.
    mask[2, 0] = True
    without_first = [*every[:2], -math.log(root / (1 + root))]
    assert info_nce(latents, positives, mask, 0.5).item() == pytest.approx(sum(without_first) / 3)
    assert info_nce(latents[:0], positives[:0], nothing[:0, :0], 0.5).item() == 0


def test_the_gradient_pulls_positives_together_and_others_apart():
    latents = torch.tensor([[1.0, 0.2], [0.2, 1.0], [-1.0, 0.3]], requires_grad=True)
    positives = torch.tensor([[0.6, 1.0], [-0.5, 1.0], [-1.0, -1.0]])
    info_nce(latents, positives, torch.eye(3, dtype=torch.bool), 0.5).backward()

    def cosines(of):
        return torch.nn.functional.normalize(of) @ torch.nn.functional.normalize(positives).T

    moved = cosines((latents - 0.01 * latents.grad).detach()) - cosines(latents.detach())
    assert (moved.diagonal() > 0).all()
    assert moved[0, 2] < 0 and moved[2, 0] < 0


def test_co_engaged_counts_neighbours():
    pairs = co_engaged([[1, 2, 3], [2, 1], [4], [], [3, 3]], 5)
    assert pairs.toarray().tolist() == [
        [0, 2, 0, 0, 0],
        [2, 0, 1, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert co_engaged([[1], []], 3).nnz == 0
    mask = positive_mask(pairs, np.array([0, 1, 2]), np.array([1, 0, 1]))
    assert mask.tolist() == [[True, True, True], [True, True, True], [True, False, True]]


def test_the_probability_of_a_positive_is_proportional_to_its_count():
    """Item 1 is co-engaged three times with item 2 and once with item 3. Item 4 has no co-engaged item."""
    pairs = co_engaged([[1, 2]] * 3 + [[3, 1]], 4)
    positions = np.array([0, 3] * 4000)
    anchors, positives = sample_positives(pairs, positions, np.random.default_rng(5))
    assert anchors.tolist() == list(range(0, 8000, 2))  # Item 4 is no anchor.
    assert set(positives) == {1, 2}
    assert abs((positives == 1).mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 4000)
    again = sample_positives(pairs, positions, np.random.default_rng(5))[1]
    np.testing.assert_array_equal(positives, again)
    anchors, positives = sample_positives(pairs, np.array([3, 3]), np.random.default_rng(5))
    assert len(anchors) == len(positives) == 0


@pytest.mark.slow
def test_a_fit_brings_co_engaged_items_together():
    """The items of a pair are from different clusters. The contrastive loss makes their latents similar."""
    vectors, _ = planted()
    config = RQVAEConfig(
        levels=2,
        codes=4,
        latent=4,
        hidden=(16,),
        random_last=0,
        epochs=12,
        batch_size=32,
        learning_rate=1e-2,
        contrastive=1.0,
    )
    pairs = co_engaged([[n, n + 1] for n in range(1, 241, 2)], 240)  # Clusters 0-1 and 2-3.

    def similarity(config: RQVAEConfig) -> float:
        model = fit_rqvae(vectors, config, pairs=pairs)
        latents = torch.nn.functional.normalize(model.encoder(torch.from_numpy(vectors)), dim=-1)
        return (latents[0::2] * latents[1::2]).sum(1).mean().item()

    assert similarity(config) > 0.9 > 0.6 > similarity(replace(config, contrastive=0.0))
    short = replace(config, epochs=2)
    first, second = (assign(fit_rqvae(vectors, short, pairs=pairs), vectors, seed=0) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_contrastive_loss_by_hand():
    """Items 1-2 and 3-4 are co-engaged. Each item has two negatives, and it is no negative of itself."""
    vectors = np.eye(4, 3, dtype=np.float32) + 0.1
    config = RQVAEConfig(
        levels=1,
        codes=2,
        latent=2,
        hidden=(),
        random_last=0,
        contrastive=0.5,
        contrastive_temperature=0.7,
    )
    torch.manual_seed(0)
    model, data = RQVAE(3, config), torch.from_numpy(vectors)
    _, quantised = model(data)
    pairs = co_engaged([[1, 2], [3, 4]], 4)
    loss = model.contrastive_loss(quantised, data, np.arange(4), pairs, np.random.default_rng(0))
    latents = model.encoder(torch.from_numpy(vectors)).detach().numpy()
    latents /= np.linalg.norm(latents, axis=1, keepdims=True)
    near = np.exp(latents @ latents.T / 0.7)
    each = [
        near[a, p] / (near[a, p] + near[a, n] + near[a, m])
        for a, p, n, m in ((0, 1, 2, 3), (1, 0, 2, 3), (2, 3, 0, 1), (3, 2, 0, 1))
    ]
    assert loss.item() == pytest.approx(0.5 * -np.log(each).mean(), rel=1e-4)


@pytest.mark.usefixtures("short_fits")
def test_only_the_contrastive_loss_reads_pairs_and_needs_them():
    vectors, _ = planted()
    config = RQVAEConfig(levels=2, codes=4, latent=4, hidden=(16,), epochs=1, batch_size=32)
    plain = fit_rqvae(vectors, config).state_dict()
    other = fit_rqvae(vectors, config, pairs=co_engaged([[1, 2]], 240)).state_dict()
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    for pairs in (None, co_engaged([], 240)):
        with pytest.raises(ConfigurationError, match="no pair of co-engaged items"):
            fit_rqvae(vectors, replace(config, contrastive=0.1), pairs=pairs)
    with pytest.raises(ConfigurationError, match="contrastive_temperature must be positive"):
        RQVAEConfig(contrastive_temperature=0.0)


# --- items without text ----------------------------------------------------------------------------------------------


def test_neighbour_means_by_hand():
    """Items 1 and 2 have texts. Item 3 is co-engaged twice with 1, once with 2 and 4. Item 4 is with 3, 5 with none."""
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [0.8, 0.6], [1, 0]], dtype=np.float32)
    pairs = co_engaged([[1, 3, 1], [2, 3, 4]], 5)
    mask, means = neighbour_means(vectors, np.array([2, 3, 4]), pairs)
    assert mask.tolist() == [True, False, False] and means.dtype == np.float32
    np.testing.assert_allclose(means, [[2 / math.sqrt(5), 1 / math.sqrt(5)]], rtol=1e-6)
    opposite = np.array([[1, 0], [-1, 0], [0, 1]], dtype=np.float32)
    mask, means = neighbour_means(opposite, np.array([2]), co_engaged([[1, 3, 2]], 3))
    assert not mask.any() and means.shape == (0, 2)  # The vectors cancel out.


class WithoutTexts:
    """Six items, 4 to 6 without text. Sequences end with the targets of the train, valid and test lists.

    Args:
        tails: the three targets of each of the two users.
    """

    item_count = 6
    catalog = Catalog(
        Item(item_id=n, token=f"t{n}", title=title)
        for n, title in enumerate(["Nail polish", "Shampoo", "Razor", "", "", ""], start=1)
    )
    train_sequences, known_items, _first = Data.train_sequences, Data.known_items, Data._first

    def __init__(self, *tails: list[int]) -> None:
        heads = [[1, 4, 1], [2, 4, 5]]
        self.sequences = {n: np.array([*head, *tail]) for n, (head, tail) in enumerate(zip(heads, tails, strict=True))}
        self.split = leave_one_out(np.array([len(items) for items in self.sequences.values()]), targets=1, requests=1)


def embedded(folder: Path, data: object, **changes: object) -> tuple[np.ndarray, dict]:
    """Run the embeddings stage. Return the embeddings and the summary."""
    folder.mkdir()
    options = load_settings(config_dict={**SMALL, **changes})
    context = Context(stage="", settings=options, data=data, folder=folder, inputs={}, folders={}, say=str)
    summary = embeddings.run(context)
    return np.load(folder / "embeddings.npy"), summary


def test_items_without_text_are_embedded_by_co_engaged_items(tmp_path):
    vectors, summary = embedded(tmp_path / "one", WithoutTexts([5, 3, 6], [6, 3, 6]))
    words = hash_embeddings(["Nail polish", "Shampoo", "Razor", "t4", "t5", "t6"])
    np.testing.assert_array_equal(vectors[[0, 1, 2, 4, 5]], words[[0, 1, 2, 4, 5]])
    mean = 2 * words[0] + words[1]  # Item 5 is a neighbour without text.
    np.testing.assert_allclose(vectors[3], mean / np.linalg.norm(mean), rtol=1e-5)
    assert summary == {"items": 6, "dimensions": 256, "textless": 3, "collaborative": 1, "token": 2}
    other, _ = embedded(tmp_path / "two", WithoutTexts([6, 2, 3], [4, 1, 2]))  # other targets
    np.testing.assert_array_equal(vectors, other)


def test_items_without_text_can_be_their_tokens(tmp_path):
    without_interactions = SimpleNamespace(catalog=WithoutTexts.catalog)
    vectors, summary = embedded(tmp_path / "one", without_interactions, text_missing="token")
    np.testing.assert_array_equal(vectors, hash_embeddings(["Nail polish", "Shampoo", "Razor", "t4", "t5", "t6"]))
    assert (summary["textless"], summary["collaborative"], summary["token"]) == (3, 0, 3)


# --- residual k-means ------------------------------------------------------------------------------------------------


def test_items_of_a_cluster_share_their_first_code():
    vectors, labels = planted()
    codes = assign(fit_rqkmeans(vectors, PLAIN), vectors, seed=0)
    same = codes[:, None, 0] == codes[None, :, 0]
    np.testing.assert_array_equal(same, labels[:, None] == labels[None, :])


def test_levels_by_hand():
    """Four points at +-10 +-1. The first level with 2 codes is +-10, the second +-1, and the residual is 0."""
    data = np.array([[11.0], [9.0], [-9.0], [-11.0]] * 3, dtype=np.float32)
    model = fit_rqkmeans(data, replace(PLAIN, codes=2))
    assert sorted(model.codebooks[0].ravel()) == pytest.approx([-10, 10])
    assert sorted(model.codebooks[1].ravel()) == pytest.approx([-1, 1])
    codes = model.encode(data)
    decoded = model.decode(codes)
    np.testing.assert_allclose(decoded, data, rtol=1e-6)
    assert len(np.unique(codes, axis=0)) == 4 and codes.dtype == np.int64


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_encode_returns_the_nearest_centroid_of_each_residual(seed):
    """Distances of small integers are exact. The lowest code wins a tie."""
    generator = np.random.default_rng(seed)
    books = generator.integers(-8, 9, size=(3, 4, 2)).astype(np.float32)
    points = generator.integers(-8, 9, size=(6, 2)).astype(np.float32)
    model = RQKMeans(replace(PLAIN, levels=3), books)
    codes = model.encode(points)
    decoded = model.decode(codes)
    for row, residual in enumerate(points.copy()):
        for level in range(3):
            assert codes[row, level] == ((residual - books[level]) ** 2).sum(1).argmin()
            residual = residual - books[level, codes[row, level]]
        np.testing.assert_array_equal(decoded[row], points[row] - residual)


def test_rqkmeans_round_trip(tmp_path):
    vectors, _ = planted()
    model = fit_rqkmeans(vectors, replace(PLAIN, random_last=1))
    model.save(tmp_path / "new")
    loaded = RQKMeans.load(tmp_path / "new")
    assert loaded.config == model.config
    np.testing.assert_array_equal(loaded.codebooks, model.codebooks)
    np.testing.assert_array_equal(assign(loaded, vectors, seed=3), assign(model, vectors, seed=3))
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["rqkmeans.json", "rqkmeans.safetensors"]
    (tmp_path / "new" / "rqkmeans.safetensors").unlink()
    with pytest.raises(MissingFileError, match="rqkmeans.safetensors"):
        RQKMeans.load(tmp_path / "new")


def test_rqkmeans_depends_on_the_seed_and_not_on_the_number_of_threads():
    vectors = np.random.default_rng(1).normal(size=(3000, 16)).astype(np.float32)
    config = replace(PLAIN, codes=32)

    def fitted(threads: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
        with threadpool_limits(threads):
            model = fit_rqkmeans(vectors, replace(config, seed=seed))
            return model.codebooks, model.encode(vectors)

    one, two, other = fitted(1), fitted(2), fitted(1, seed=4)
    for left, right in zip(one, two, strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(one[0], other[0])


def test_rqkmeans_refuses_invalid_embeddings():
    vectors, _ = planted()
    with pytest.raises(ConfigurationError, match="3 items are too few for 4 codes"):
        fit_rqkmeans(vectors[:3], PLAIN)
    with pytest.raises(ConfigurationError, match="finite"):
        fit_rqkmeans(vectors * np.nan, PLAIN)


def test_a_random_last_level_makes_semantic_ids_unique():
    vectors, _ = planted()
    model = fit_rqkmeans(vectors, SidConfig(levels=3, codes=16, random_last=1, seed=0))
    codes = assign(model, vectors, seed=0)
    nearest = model.encode(vectors)
    decoded = model.decode(nearest)
    np.testing.assert_array_equal(codes[:, :2], nearest[:, :2])
    quality = health(codes, model, vectors, ["A > b"] * 240)
    assert quality.uniqueness == len(np.unique(codes, axis=0)) / 240
    assert quality.uniqueness_without_random_level == len(np.unique(nearest, axis=0)) / 240
    lengths = np.linalg.norm(decoded, axis=1)  # The vectors have length 1.
    assert quality.reconstruction == pytest.approx(float(((decoded * vectors).sum(1) / lengths).mean()), rel=1e-5)
    assert len(quality.neighbourhood.pairs) == 2  # The random level is left out.
    assert quality.neighbourhood.same_path == (1.0, 1.0)


# --- neighbourhood measure -------------------------------------------------------------------------------------------


def test_neighbourhood_by_hand():
    """The last item has no category. Three of the other four share code 0, and two of them both codes."""
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [0, 0]])
    measure = neighbourhood(codes, ["A > x > p", "A > x > q", "A > x > p", "B > y", ""])
    assert (measure.items, measure.pairs) == (4, (3, 1))
    assert measure.same_path == (1 / 3, 0.0)
    assert measure.same_top == (1.0, 1.0)
    assert (measure.random_path, measure.random_top) == (1 / 6, 3 / 6)
    line = neighbourhood_line(asdict(measure))
    assert "share 1, 2 codes: same category path 33.3 %, 0.0 % (all pairs 16.7 %)" in line
    assert "same first two parts 100.0 %, 100.0 % (50.0 %)" in line


def test_a_prefix_that_no_two_items_share_has_no_share():
    measure = neighbourhood(np.array([[0, 0], [0, 1]]), ["A", "A"])
    assert (measure.pairs, measure.same_path, measure.same_top) == ((1, 0), (1.0, None), (1.0, None))
    assert neighbourhood(np.array([[0], [0]]), ["A", ""]) is None and neighbourhood(np.array([[0]]), []) is None
    assert "not measured" in neighbourhood_line(None)


def test_same_category_for_paths_and_for_plain_words():
    assert category_path("Beauty > Hair Care > Shampoos") == ("Beauty", "Hair Care", "Shampoos")
    assert category_path("Drama Comedy Drama") == category_path("Comedy Drama") == ("Comedy", "Drama")
    genres = ["Drama Comedy War", "Comedy Drama War", "Drama Comedy Western"]
    measure = neighbourhood(np.zeros((3, 1), dtype=int), genres)
    assert (measure.same_path, measure.same_top) == ((1 / 3,), (1.0,))


CATEGORIES = ["", "A > x", "A > x > p", "A > x > q", "A > y", "B", "Drama Comedy", "Comedy Drama", "Comedy Drama War"]


@pytest.mark.usefixtures("short_fits")
@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3, st.sampled_from(CATEGORIES)), max_size=14))
def test_neighbourhood_counts_all_pairs(rows):
    codes = np.array([row[:3] for row in rows], dtype=np.int64).reshape(-1, 3)
    measure = neighbourhood(codes, [row[3] for row in rows])
    pairs = list(combinations([row for row in rows if row[3]], 2))
    if not pairs:
        assert measure is None
        return

    def share(chosen: list, parts: int | None) -> float | None:
        same = [category_path(a[3])[:parts] == category_path(b[3])[:parts] for a, b in chosen]
        return sum(same) / len(same) if same else None

    sharing = [[(a, b) for a, b in pairs if a[:length] == b[:length]] for length in (1, 2, 3)]
    assert measure.items == sum(bool(row[3]) for row in rows)
    assert measure.pairs == tuple(map(len, sharing))
    assert measure.same_path == tuple(share(chosen, None) for chosen in sharing)
    assert measure.same_top == tuple(share(chosen, 2) for chosen in sharing)
    assert (measure.random_path, measure.random_top) == (share(pairs, None), share(pairs, 2))


# --- the stage -------------------------------------------------------------------------------------------------------

SMALL = {
    "preset": "smoke",
    "sid_codes": 16,
    "sid_levels": 3,
    "sid_epochs": 2,
    "sid_batch_size": 16,
    "sid_hidden": [16],
    "sid_latent": 8,
}
KINDS = ("Hair Care > Shampoos", "Makeup > Nails", "Skin Care > Face")


class SmallData:
    """48 items and 40 users. The training interactions are defined by the methods of `Data`."""

    item_count = 48
    catalog = Catalog(
        Item(item_id=n, token=f"t{n}", title=f"{KINDS[n % 3].split()[-1]} {n}", categories=f"Beauty > {KINDS[n % 3]}")
        for n in range(1, 49)
    )
    train_sequences, known_items, _first = Data.train_sequences, Data.known_items, Data._first

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.sequences = {user: generator.permutation(np.arange(1, 49))[:7] for user in range(1, 41)}
        self.split = leave_one_out(np.array([0] + [7] * 40), targets=1, requests=1)


def tokenized(folder: Path, data: object = None, **changes: object) -> tuple[list[tuple[int, ...]], dict]:
    """Run the embeddings stage and the tokenizer stage. Return the semantic IDs and the summary of the tokenizer."""
    before = folder.with_name(f"{folder.name}-embeddings")
    for path in (folder, before):
        path.mkdir(parents=True)
    data = data or SmallData()
    context = Context(
        stage="",
        settings=load_settings(config_dict={**SMALL, **changes}),
        data=data,
        folder=folder,
        inputs={},
        folders={"embeddings": before},
        say=str,
    )
    embeddings.run(replace(context, folder=before))
    summary = tokenizer.run(context)
    sids = {line["item_id"]: tuple(line["sid"]) for line in read_lines(folder / "sids.jsonl")}
    return [sids[item.token] for item in data.catalog], summary


@pytest.mark.usefixtures("short_fits")
def test_positives_are_training_interactions_without_targets(tmp_path):
    """The last three items of a user are targets and do not change the result. The item before them changes it."""
    on = {"sid_contrastive": 0.5, "sid_min_unique": 0.0}
    data, weights = SmallData(), [tmp_path / name / "rqvae.safetensors" for name in ("one", "two", "three")]
    tokenized(tmp_path / "one", data, **on)
    for user, items in data.sequences.items():
        data.sequences[user] = np.array([*items[:-3], user, 48 - user, 7])
    tokenized(tmp_path / "two", data, **on)
    for user, items in data.sequences.items():
        data.sequences[user] = np.array([*items[:-4], 1 + user % 48, *items[-3:]])
    tokenized(tmp_path / "three", data, **on)
    assert weights[0].read_bytes() == weights[1].read_bytes() != weights[2].read_bytes()


@pytest.mark.usefixtures("short_fits")
def test_without_the_contrastive_loss_no_interaction_is_read(tmp_path):
    without_interactions = SimpleNamespace(catalog=SmallData.catalog)
    off = {"sid_contrastive": 0.0}
    assert tokenized(tmp_path / "one", without_interactions, **off)[0] == tokenized(tmp_path / "two", **off)[0]


@pytest.mark.parametrize("method", ["rqvae", "rqkmeans"])
def test_both_methods_write_the_same_files(tmp_path, method):
    sids, summary = tokenized(tmp_path / method, sid_method=method)
    assert len(sids) == 48 and {len(sid) for sid in sids} == {3}
    assert all(0 <= code < 16 for sid in sids for code in sid)
    assert summary["uniqueness"] == len(set(sids)) / 48 >= 0.99
    assert len(summary["used_codes"]) == len(summary["entropy"]) == 3
    files = {file.name for file in (tmp_path / method).iterdir()}
    assert files == {f"{method}.safetensors", f"{method}.json", "sids.jsonl", "health.json"}
    assert json.loads((tmp_path / method / "health.json").read_text()) == json.loads(json.dumps(summary))
    measure = summary["neighbourhood"]
    assert measure["items"] == 48 and len(measure["pairs"]) == 2  # One of three levels is random.
    assert measure["random_path"] == pytest.approx(3 * math.comb(16, 2) / math.comb(48, 2))
    assert measure["same_path"][0] > 2 * measure["random_path"]  # The texts contain the categories.
    assert tokenized(tmp_path / "again", sid_method=method)[0] == sids


@pytest.mark.usefixtures("short_fits")
@pytest.mark.parametrize("method", ["rqvae", "rqkmeans"])
def test_codebooks_are_loaded_by_the_name_of_the_method(tmp_path, method):
    options = load_settings(config_dict={**SMALL, "sid_method": method, "sid_contrastive": 0.0})
    vectors, _ = planted()
    model = fit(vectors, tokenizer_config(options), SmallData())
    model.save(tmp_path)
    codebooks = load_codebooks(tmp_path, options)
    assert codebooks.shape[:2] == (3, 16) and not codebooks.requires_grad
    assert torch.equal(codebooks, torch.as_tensor(model.codebooks))


def test_settings_that_no_tokenizer_can_use():
    def config(**changes: object) -> SidConfig:
        return tokenizer_config(load_settings(config_dict={**SMALL, **changes}))

    with pytest.raises(ConfigurationError, match="sid_method is 'vq', expected one of rqvae, rqkmeans"):
        config(sid_method="vq")
    with pytest.raises(ConfigurationError, match="not trained by a loss"):
        config(sid_method="rqkmeans", sid_diversity=0.1)
    assert type(config(sid_method="rqkmeans")) is SidConfig
    assert config(sid_contrastive=0.2, sid_contrastive_temperature=0.3).contrastive_temperature == 0.3


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    """Return the texts that the encoder reads, by token, from an item file with many special cases."""
    file = tmp_path_factory.mktemp("texts") / "toy.item"
    lines = [
        "list\tClay &amp; Mud Mask\t[['Beauty', 'Skin Care', \"Men's\"]]\tL&#39;Or&eacute;al",
        'quoted\t"""Best"" soap"\t\'Beauty\', \'Bath &amp; Body\'\t',
        "untitled\t\tBeauty > Makeup\tOPI",
        "nothing\t\t\t",
        "blanks\t   \t[]\t\u00a0",
        "japanese\t資生堂 アネッサ 日焼け止め\tスキンケア\t資生堂",
        "russian\tШампунь для волос\tУход > Волосы\t",
        "arabic\tزيت الأرغان للشعر\tشعر\t",
        "emoji\tLip gloss 💄\tMakeup\t",
        f"long\t{'shampoo with argan oil ' * 435}\tBeauty > Hair Care\tOPI",
        f"described\tHair oil\t\t\t{'with argan ' * 910}",
        "description alone\t\t\t\t['Soft &amp; warm.', 'Of wool.']",
    ]
    header = "item_id:token\ttitle:token_seq\tcategories:token_seq\tbrand:token\tdescription:token_seq"
    lines = [line + "\t" * (4 - line.count("\t")) for line in lines]
    file.write_text("\n".join([header, *lines]) + "\n")
    columns = {
        "dataset": "toy",
        "text_title": "title",
        "text_categories": "categories",
        "text_brand": "brand",
        "text_description": "description",
    }
    fields = read_item_texts(file, columns)
    assert len(fields) == len(lines)
    return {token: item_text(Item(item_id=1, token=token, **text)) for token, text in fields.items()}


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("list", "Clay & Mud Mask | L'Oréal | Beauty > Skin Care > Men's"),
        ("quoted", '"Best" soap | Beauty > Bath & Body'),
        ("untitled", "OPI | Beauty > Makeup"),
        ("nothing", ""),
        ("described", "Hair oil | " + ("with argan " * 91)[:1000].rstrip()),
        ("description alone", "Soft & warm. Of wool."),
        ("blanks", ""),
        ("japanese", "資生堂 アネッサ 日焼け止め | 資生堂 | スキンケア"),
        ("russian", "Шампунь для волос | Уход > Волосы"),
        ("arabic", "زيت الأرغان للشعر | شعر"),
        ("emoji", "Lip gloss 💄 | Makeup"),
    ],
)
def test_item_text(texts, token, expected):
    assert texts[token] == expected


def test_different_texts_have_different_embeddings(texts):
    assert len(texts["long"]) > 10_000 and texts["long"].endswith("oil | OPI | Beauty > Hair Care")
    vectors = hash_embeddings([text for text in texts.values() if text])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    cosines = vectors @ vectors.T - np.eye(len(vectors))
    assert cosines.max() < 0.9
