"""The tokenizer stage: contrastive loss, residual k-means, neighbourhood quality, and the texts that it reads."""

import json
import math
from dataclasses import asdict, replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from recbole_gr2.bridge.data import Data, read_item_texts
from recbole_gr2.config import load_settings
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.sid.contrastive import co_engaged, draw_positives, info_nce, known_positives
from recbole_gr2.sid.embed import hash_embeddings, neighbour_means
from recbole_gr2.sid.quality import category_path, health, neighbourhood, neighbourhood_line
from recbole_gr2.sid.rqkmeans import RQKMeans, fit_rqkmeans
from recbole_gr2.sid.rqvae import RQVAEConfig, SidConfig, assign, fit_rqvae
from recbole_gr2.stages import Context, embeddings, tokenizer
from recbole_gr2.stages.embeddings import item_text
from recbole_gr2.stages.tokenizer import load_items, tokenizer_config
from recbole_gr2.types import Item

PLAIN = SidConfig(levels=2, codes=4, random_last=0, seed=3)


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around four axes of 8, (240, 8), and the axis of each, (240,)."""
    labels = np.arange(240) % 4
    points = np.eye(8)[labels] + 0.05 * np.random.default_rng(seed).normal(size=(240, 8))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), labels


# --- contrastive loss ------------------------------------------------------------------------------------------------


def test_info_nce_by_hand():
    """Three items in the plane, T = 1/2; the first positive is known to belong to the third item, too."""
    latents = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    positives = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    one, root = math.exp(2), math.exp(math.sqrt(2))  # exp(1 / T), exp(sqrt(1/2) / T); exp(0 / T) = 1
    every = [-math.log(one / (one + 1 + root)), -math.log(one / (one + 1 + root)), -math.log(root / (one + 1 + root))]
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    assert info_nce(latents, positives, nothing, 0.5).item() == pytest.approx(sum(every) / 3)
    known = torch.eye(3, dtype=torch.bool)  # of the diagonal nothing is left out: it is what is asked for
    known[2, 0] = True
    spared = [*every[:2], -math.log(root / (1 + root))]
    assert info_nce(latents, positives, known, 0.5).item() == pytest.approx(sum(spared) / 3)
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
    known = known_positives(pairs, np.array([0, 1, 2]), np.array([1, 0, 1]))
    assert known.tolist() == [[True, True, True], [True, True, True], [True, False, True]]


def test_positives_are_drawn_as_often_as_items_were_taken_together():
    """Item 1 was taken with 2 three times and with 3 once; 4 with nothing."""
    pairs = co_engaged([[1, 2]] * 3 + [[3, 1]], 4)
    rows = np.array([0, 3] * 4000)
    anchors, positives = draw_positives(pairs, rows, np.random.default_rng(5))
    assert anchors.tolist() == list(range(0, 8000, 2))  # 4 has none and is no anchor
    assert set(positives) == {1, 2}
    assert abs((positives == 1).mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 4000)
    again = draw_positives(pairs, rows, np.random.default_rng(5))[1]
    np.testing.assert_array_equal(positives, again)
    anchors, positives = draw_positives(pairs, np.array([3, 3]), np.random.default_rng(5))
    assert len(anchors) == len(positives) == 0


def test_a_fit_brings_co_engaged_items_together():
    """Users take an item of one cluster and then one of the next: their latents turn towards each other."""
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
    pairs = co_engaged([[n, n + 1] for n in range(1, 241, 2)], 240)  # clusters 0-1 and 2-3

    def together(config) -> float:
        terms = []
        model = fit_rqvae(vectors, config, pairs=pairs, on_epoch=lambda epoch, found: terms.append(found))
        assert ("contrastive" in terms[0]) == bool(config.contrastive)
        latents = torch.nn.functional.normalize(model.encoder(torch.from_numpy(vectors)), dim=-1)
        return (latents[0::2] * latents[1::2]).sum(1).mean().item()

    assert together(config) > 0.9 > 0.6 > together(replace(config, contrastive=0.0))
    first, second = (assign(fit_rqvae(vectors, config, pairs=pairs), vectors, seed=0) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_contrastive_term_of_a_fit_by_hand():
    """Items 1-2 and 3-4 belong together, and the model stands still: two negatives each, and never the item itself."""
    vectors = np.eye(4, 3, dtype=np.float32) + 0.1
    config = RQVAEConfig(
        levels=1,
        codes=2,
        latent=2,
        hidden=(),
        random_last=0,
        epochs=1,
        batch_size=4,
        learning_rate=1e-12,
        contrastive=0.5,
        contrastive_temperature=0.7,
    )
    terms = []
    model = fit_rqvae(
        vectors, config, pairs=co_engaged([[1, 2], [3, 4]], 4), on_epoch=lambda epoch, found: terms.append(found)
    )
    latents = model.encoder(torch.from_numpy(vectors)).detach().numpy()
    latents /= np.linalg.norm(latents, axis=1, keepdims=True)
    near = np.exp(latents @ latents.T / 0.7)
    each = [
        near[a, p] / (near[a, p] + near[a, n] + near[a, m])
        for a, p, n, m in ((0, 1, 2, 3), (1, 0, 2, 3), (2, 3, 0, 1), (3, 2, 0, 1))
    ]
    assert terms[0]["contrastive"] == pytest.approx(0.5 * -np.log(each).mean(), rel=1e-4)


def test_off_the_pairs_do_nothing_and_on_they_are_needed():
    vectors, _ = planted()
    config = RQVAEConfig(levels=2, codes=4, latent=4, hidden=(16,), epochs=1, batch_size=32)
    plain = fit_rqvae(vectors, config).state_dict()
    other = fit_rqvae(vectors, config, pairs=co_engaged([[1, 2]], 240)).state_dict()
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    for pairs in (None, co_engaged([], 240)):
        with pytest.raises(ConfigurationError, match="no pair of items"):
            fit_rqvae(vectors, replace(config, contrastive=0.1), pairs=pairs)
    with pytest.raises(ConfigurationError, match="contrastive_temperature must be positive"):
        RQVAEConfig(contrastive_temperature=0.0)


# --- items without text ----------------------------------------------------------------------------------------------


def test_neighbour_means_by_hand():
    """Items 1 and 2 have texts. 3 was taken twice with 1 and once with 2 and with 4; 4 with 3 alone, 5 with nothing."""
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [0.8, 0.6], [1, 0]], dtype=np.float32)
    pairs = co_engaged([[1, 3, 1], [2, 3, 4]], 5)
    found, means = neighbour_means(vectors, np.array([2, 3, 4]), pairs)
    assert found.tolist() == [True, False, False] and means.dtype == np.float32
    np.testing.assert_allclose(means, [[2 / math.sqrt(5), 1 / math.sqrt(5)]], rtol=1e-6)
    opposite = np.array([[1, 0], [-1, 0], [0, 1]], dtype=np.float32)
    found, means = neighbour_means(opposite, np.array([2]), co_engaged([[1, 3, 2]], 3))
    assert not found.any() and means.shape == (0, 2)  # they cancel out


class Gappy:
    """Six items, 4 to 6 without text; sequences end in train target, valid and test item, and only the rest counts."""

    item_count = 6
    items = (
        *(Item(item_id=n, token=f"t{n}", title=t) for n, t in ((1, "Nail polish"), (2, "Shampoo"), (3, "Razor"))),
        *(Item(item_id=n, token=f"t{n}", title="") for n in (4, 5, 6)),
    )
    train_targets, train_sequences, open_sequences = 1, Data.train_sequences, Data.open_sequences

    def __init__(self, *tails) -> None:
        heads = [[1, 4, 1], [2, 4, 5]]
        self.sequences = {n: np.array([*head, *tail]) for n, (head, tail) in enumerate(zip(heads, tails, strict=True))}


def embedded(folder, data, **changes) -> tuple[np.ndarray, dict, list[str]]:
    said: list[str] = []
    folder.mkdir()
    chosen = load_settings(config_dict={**SMALL, **changes})
    context = Context(stage="", settings=chosen, data=data, folder=folder, inputs={}, folders={}, say=said.append)
    facts = embeddings.run(context)
    return np.load(folder / "embeddings.npy"), facts, said


def test_items_without_text_are_embedded_by_what_they_were_taken_with(tmp_path):
    vectors, facts, said = embedded(tmp_path / "one", Gappy([5, 3, 6], [6, 3, 6]))
    words = hash_embeddings(["Nail polish", "Shampoo", "Razor", "t4", "t5", "t6"])
    np.testing.assert_array_equal(vectors[[0, 1, 2, 4, 5]], words[[0, 1, 2, 4, 5]])
    mean = 2 * words[0] + words[1]  # 5 is a neighbour without a text
    np.testing.assert_allclose(vectors[3], mean / np.linalg.norm(mean), rtol=1e-5)
    assert facts == {"items": 6, "dimensions": 256, "textless": 3, "collaborative": 1, "token": 2}
    assert said[-1] == "3 of 6 items have no text: 1 embedded by what they were taken with, 2 by their token"
    other, _, _ = embedded(tmp_path / "two", Gappy([6, 2, 3], [4, 1, 2]))  # other targets
    np.testing.assert_array_equal(vectors, other)


def test_items_without_text_can_be_their_tokens(tmp_path):
    vectors, facts, _ = embedded(tmp_path / "one", SimpleNamespace(items=Gappy.items), text_missing="token")
    np.testing.assert_array_equal(vectors, hash_embeddings(["Nail polish", "Shampoo", "Razor", "t4", "t5", "t6"]))
    assert (facts["textless"], facts["collaborative"], facts["token"]) == (3, 0, 3)
    with pytest.raises(ConfigurationError, match="no embedding 'mean'"):
        embedded(tmp_path / "two", Gappy([1, 2, 3], [1, 2, 3]), text_missing="mean")


# --- residual k-means ------------------------------------------------------------------------------------------------


def test_planted_clusters_share_their_first_code_alone():
    vectors, labels = planted()
    codes = assign(fit_rqkmeans(vectors, PLAIN), vectors, seed=0)
    same = codes[:, None, 0] == codes[None, :, 0]
    np.testing.assert_array_equal(same, labels[:, None] == labels[None, :])


def test_levels_by_hand():
    """Four points at +-10 +-1: the first level of 2 codes is +-10, the second +-1, and nothing is left."""
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
def test_encode_is_brute_force_nearest_centroid_of_each_residual(seed):
    """Small integers, so that every distance is exact and ties fall to the lowest code."""
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


def test_rqkmeans_is_a_function_of_the_seed_and_not_of_threads():
    vectors = np.random.default_rng(1).normal(size=(3000, 16)).astype(np.float32)
    config = replace(PLAIN, codes=32)

    def made(threads: int, seed: int = 3):
        with threadpool_limits(threads):
            model = fit_rqkmeans(vectors, replace(config, seed=seed))
            return model.codebooks, model.encode(vectors)

    one, two, other = made(1), made(2), made(1, seed=4)
    for left, right in zip(one, two, strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(one[0], other[0])


def test_rqkmeans_refuses_what_it_cannot_cluster():
    vectors, _ = planted()
    with pytest.raises(ConfigurationError, match="3 items cannot start 4 codes"):
        fit_rqkmeans(vectors[:3], PLAIN)
    with pytest.raises(ConfigurationError, match="finite"):
        fit_rqkmeans(vectors * np.nan, PLAIN)


def test_a_drawn_last_level_makes_a_crowded_table_unique():
    vectors, _ = planted()
    model = fit_rqkmeans(vectors, SidConfig(levels=3, codes=16, random_last=1, seed=0))
    codes = assign(model, vectors, seed=0)
    nearest = model.encode(vectors)
    decoded = model.decode(nearest)
    np.testing.assert_array_equal(codes[:, :2], nearest[:, :2])
    found = health(codes, model, vectors, ["A > b"] * 240)
    assert found.uniqueness == len(np.unique(codes, axis=0)) / 240
    assert found.uniqueness_without_random_level == len(np.unique(nearest, axis=0)) / 240
    lengths = np.linalg.norm(decoded, axis=1)  # those of the vectors are 1
    assert found.reconstruction == pytest.approx(float(((decoded * vectors).sum(1) / lengths).mean()), rel=1e-5)
    assert len(found.neighbourhood.pairs) == 2  # the drawn level says nothing about neighbours
    assert found.neighbourhood.same_path == (1.0, 1.0)


# --- neighbourhood quality -------------------------------------------------------------------------------------------


def test_neighbourhood_by_hand():
    """The last item has no category. Three of the four others share code 0, two of these both codes."""
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [0, 0]])
    found = neighbourhood(codes, ["A > x > p", "A > x > q", "A > x > p", "B > y", ""])
    assert (found.items, found.pairs) == (4, (3, 1))
    assert found.same_path == (1 / 3, 0.0)
    assert found.same_top == (1.0, 1.0)
    assert (found.random_path, found.random_top) == (1 / 6, 3 / 6)
    line = neighbourhood_line(asdict(found))
    assert "share 1, 2 codes: same category path 33.3 %, 0.0 % (all pairs 16.7 %)" in line
    assert "same first two parts 100.0 %, 100.0 % (50.0 %)" in line


def test_a_prefix_that_no_two_items_share_has_no_share():
    found = neighbourhood(np.array([[0, 0], [0, 1]]), ["A", "A"])
    assert (found.pairs, found.same_path, found.same_top) == ((1, 0), (1.0, None), (1.0, None))
    assert neighbourhood(np.array([[0], [0]]), ["A", ""]) is None and neighbourhood(np.array([[0]]), []) is None
    assert "not judged" in neighbourhood_line(None)


def test_same_category_for_paths_and_for_plain_words():
    assert category_path("Beauty > Hair Care > Shampoos") == ("Beauty", "Hair Care", "Shampoos")
    assert category_path("Drama Comedy Drama") == category_path("Comedy Drama") == ("Comedy", "Drama")
    found = neighbourhood(np.zeros((3, 1), dtype=int), ["Drama Comedy War", "Comedy Drama War", "Drama Comedy Western"])
    assert (found.same_path, found.same_top) == ((1 / 3,), (1.0,))


CATEGORIES = ["", "A > x", "A > x > p", "A > x > q", "A > y", "B", "Drama Comedy", "Comedy Drama", "Comedy Drama War"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3, st.sampled_from(CATEGORIES)), max_size=14))
def test_neighbourhood_is_brute_force_over_all_pairs(rows):
    codes = np.array([row[:3] for row in rows], dtype=np.int64).reshape(-1, 3)
    found = neighbourhood(codes, [row[3] for row in rows])
    pairs = list(combinations([row for row in rows if row[3]], 2))
    if not pairs:
        assert found is None
        return

    def share(chosen, parts):
        alike = [category_path(a[3])[:parts] == category_path(b[3])[:parts] for a, b in chosen]
        return sum(alike) / len(alike) if alike else None

    sharing = [[(a, b) for a, b in pairs if a[:length] == b[:length]] for length in (1, 2, 3)]
    assert found.items == sum(bool(row[3]) for row in rows)
    assert found.pairs == tuple(map(len, sharing))
    assert found.same_path == tuple(share(chosen, None) for chosen in sharing)
    assert found.same_top == tuple(share(chosen, 2) for chosen in sharing)
    assert (found.random_path, found.random_top) == (share(pairs, None), share(pairs, 2))


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


class Toy:
    """48 items and 40 users, with the bridge's own rule of what is training."""

    item_count = 48
    items = tuple(
        Item(item_id=n, token=f"t{n}", title=f"{KINDS[n % 3].split()[-1]} {n}", categories=f"Beauty > {KINDS[n % 3]}")
        for n in range(1, 49)
    )
    train_targets, train_sequences, open_sequences = 1, Data.train_sequences, Data.open_sequences

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.sequences = {user: generator.permutation(np.arange(1, 49))[:7] for user in range(1, 41)}


def made(folder, data=None, **changes) -> tuple[list, dict, list[str]]:
    """Semantic IDs, facts and lines of the stage, after the embeddings stage."""
    said: list[str] = []
    before = folder.with_name(f"{folder.name}-embeddings")
    for path in (folder, before):
        path.mkdir(parents=True)
    data = data or Toy()
    context = Context(
        stage="",
        settings=load_settings(config_dict={**SMALL, **changes}),
        data=data,
        folder=folder,
        inputs={},
        folders={"embeddings": before},
        say=said.append,
    )
    embeddings.run(replace(context, folder=before))
    facts = tokenizer.run(context)
    return [item.sid for item in load_items(folder, data.items)], facts, said


def test_positives_come_from_training_without_its_targets(tmp_path):
    """Test, valid and last training item of every user may be anything; the item before them may not."""
    on = {"sid_contrastive": 0.5, "sid_min_unique": 0.0}
    data, weights = Toy(), [tmp_path / name / "rqvae.safetensors" for name in ("one", "two", "three")]
    made(tmp_path / "one", data, **on)
    for user, items in data.sequences.items():
        data.sequences[user] = np.array([*items[:-3], user, 48 - user, 7])
    made(tmp_path / "two", data, **on)
    for user, items in data.sequences.items():
        data.sequences[user] = np.array([*items[:-4], 1 + user % 48, *items[-3:]])
    made(tmp_path / "three", data, **on)
    assert weights[0].read_bytes() == weights[1].read_bytes() != weights[2].read_bytes()


def test_off_the_stage_reads_no_interactions(tmp_path):
    plain = SimpleNamespace(items=Toy.items)
    off = {"sid_contrastive": 0.0}
    assert made(tmp_path / "one", plain, **off)[0] == made(tmp_path / "two", **off)[0]


@pytest.mark.parametrize("method", ["rqvae", "rqkmeans"])
def test_both_methods_give_the_same_interface(tmp_path, method):
    sids, facts, said = made(tmp_path / method, sid_method=method)
    assert len(sids) == 48 and {len(sid) for sid in sids} == {3}
    assert all(0 <= code < 16 for sid in sids for code in sid)
    assert facts["uniqueness"] == len(set(sids)) / 48 >= 0.99
    assert len(facts["used_codes"]) == len(facts["entropy"]) == 3
    files = {file.name for file in (tmp_path / method).iterdir()}
    assert files == {f"{method}.safetensors", f"{method}.json", "sids.jsonl", "health.json"}
    written = json.loads((tmp_path / method / "health.json").read_text())
    assert written == json.loads(json.dumps(facts))
    near = facts["neighbourhood"]
    assert near["items"] == 48 and len(near["pairs"]) == 2  # of three levels one is drawn
    assert near["random_path"] == pytest.approx(3 * math.comb(16, 2) / math.comb(48, 2))
    assert near["same_path"][0] > 2 * near["random_path"]  # the texts tell the categories
    assert said[-1] == neighbourhood_line(near)
    assert made(tmp_path / "again", sid_method=method)[0] == sids


def test_settings_that_no_tokenizer_can_use():
    def config(**changes):
        return tokenizer_config(load_settings(config_dict={**SMALL, **changes}))

    with pytest.raises(ConfigurationError, match="no tokenizer 'vq'") as error:
        config(sid_method="vq")
    assert "rqkmeans" in error.value.do
    with pytest.raises(ConfigurationError, match="not trained by a loss"):
        config(sid_method="rqkmeans", sid_diversity=0.1)
    assert type(config(sid_method="rqkmeans")) is SidConfig
    assert config(sid_contrastive=0.2, sid_contrastive_temperature=0.3).contrastive_temperature == 0.3


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    """What the encoder reads of the items of a file with every trap in it."""
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
    found = read_item_texts(file, columns)
    assert len(found) == len(lines)
    return {token: item_text(Item(item_id=1, token=token, **text)) for token, text in found.items()}


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


def test_every_text_has_an_embedding_of_its_own(texts):
    assert len(texts["long"]) > 10_000 and texts["long"].endswith("oil | OPI | Beauty > Hair Care")
    vectors = hash_embeddings([text for text in texts.values() if text])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    cosines = vectors @ vectors.T - np.eye(len(vectors))
    assert cosines.max() < 0.9
