"""The RQ-VAE: quantisation, losses, codebook updates, fit, random levels, quality checks, and text embeddings."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from recbole_gr2 import pipeline
from recbole_gr2.bridge.data import Data
from recbole_gr2.config import load_settings
from recbole_gr2.errors import ConfigurationError, MissingFileError, QualityCheckError
from recbole_gr2.sid import rqvae
from recbole_gr2.sid.embed import embed_texts, hash_embeddings
from recbole_gr2.sid.methods import tokenizer_config
from recbole_gr2.sid.quality import check, health, usage_line
from recbole_gr2.sid.quantizer import SidConfig, assign, fitting_codes, kmeans, kmeans_sample
from recbole_gr2.sid.rqkmeans import fit_rqkmeans
from recbole_gr2.sid.rqvae import RQVAE, Quantised, RQVAEConfig, epochs_for, fit_rqvae
from recbole_gr2.types import Health

SMALL = RQVAEConfig(
    levels=3, codes=8, latent=4, hidden=(16,), reset_after=0, random_last=0, epochs=3, batch_size=32, seed=7
)


@pytest.fixture
def short_fits(monkeypatch):
    """Train small catalogues for the chosen number of epochs, without the least number of steps."""
    monkeypatch.setattr(rqvae, "MIN_STEPS", 1)


def clustered(items_each: int = 40, clusters: int = 4, dim: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors in well-separated clusters, (N, D), and the cluster of each vector, (N,)."""
    generator = np.random.default_rng(seed)
    labels = np.tile(np.arange(clusters), items_each)
    points = np.eye(dim)[labels] + 0.1 * generator.normal(size=(len(labels), dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), labels


def bare(dim: int, **settings) -> RQVAE:
    """Return a model whose encoder and decoder are the identity, so that tests can set and read codebooks."""
    model = RQVAE(dim, replace(SMALL, latent=dim, hidden=(), **settings))
    with torch.no_grad():
        for layer in (model.encoder[0], model.decoder[0]):
            layer.weight.copy_(torch.eye(dim))
            layer.bias.zero_()
    return model


def set_codebooks(model: RQVAE, values: list, counts: list | None = None) -> None:
    with torch.no_grad():
        model.codebooks.copy_(torch.tensor(values))
        model.ema_count.copy_(torch.tensor(counts) if counts else torch.ones_like(model.ema_count))
        model.ema_sum.copy_(model.codebooks * model.ema_count.unsqueeze(-1))


# --- quantisation -----------------------------------------------------------------------------------------------------

small_integers = st.integers(-8, 8).map(float)


@settings(max_examples=60, deadline=None)
@given(
    latents=hnp.arrays(np.float32, (5, 3), elements=small_integers),
    codebooks=hnp.arrays(np.float32, (3, 4, 3), elements=small_integers),
)
def test_quantise_is_brute_force_nearest_code_of_each_residual(latents, codebooks):
    """Distances of integers are exact in float32, so ties must be equal too."""
    model = bare(3, codes=4)
    set_codebooks(model, codebooks.tolist())
    quantised = model.quantise(torch.from_numpy(latents))
    for row, latent in enumerate(latents):
        residual = latent.copy()
        for level in range(3):
            code = int(((residual - codebooks[level]) ** 2).sum(1).argmin())
            assert quantised.codes[row, level] == code
            np.testing.assert_array_equal(quantised.residuals[row, level].detach().numpy(), residual)
            np.testing.assert_array_equal(quantised.chosen[row, level].detach().numpy(), codebooks[level, code])
            residual = residual - codebooks[level, code]


def test_forward_decodes_the_sum_of_codes_and_passes_gradients_straight_through():
    model = bare(1, levels=2, codes=2)
    set_codebooks(model, [[[0.0], [4.0]], [[0.0], [1.0]]])
    embeddings = torch.tensor([[5.2]], requires_grad=True)
    decoded, _ = model(embeddings)
    assert decoded.item() == pytest.approx(5.0)
    decoded.backward()
    assert embeddings.grad.item() == pytest.approx(1.0)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_loss_terms_by_hand():
    """x = 5.2 and 0.5. Level 1 has 4 and 0 (residuals 5.2, 0.5), level 2 has 1 and 0 (residuals 1.2, 0.5)."""
    model = bare(1, levels=2, codes=2, ema=False, commitment=0.25, diversity=0.1)
    set_codebooks(model, [[[0.0], [4.0]], [[0.0], [1.0]]])
    embeddings = torch.tensor([[5.2], [0.5]])
    decoded, quantised = model(embeddings)
    terms = model.losses(embeddings, decoded, quantised)
    assert quantised.codes.tolist() == [[1, 1], [0, 0]]
    squares = (1.2**2 + 0.2**2 + 0.5**2 + 0.5**2) / 2
    assert terms["reconstruction"].item() == pytest.approx((0.2**2 + 0.5**2) / 2)
    assert terms["commitment"].item() == pytest.approx(0.25 * squares)
    assert terms["codebook"].item() == pytest.approx(squares)
    assert terms["diversity"].item() == pytest.approx(0.1 * (1 + 1))  # even use: C * 2 * (1/2)^2 = 1 a level
    assert set(replaced_terms(model, embeddings, ema=True, diversity=0.0)) == {"reconstruction", "commitment"}


def replaced_terms(model: RQVAE, embeddings: torch.Tensor, **settings) -> dict:
    model.config = replace(model.config, **settings)
    return model.losses(embeddings, *model(embeddings))


def test_the_encoder_learns_by_commitment_and_the_codebook_by_its_own_term():
    """The data of the previous test: beta * 2 (r - q) / B per item, summed over levels, and 2 (q - r) / B per code."""
    model = bare(1, levels=2, codes=2, ema=False, commitment=0.25)
    set_codebooks(model, [[[0.0], [4.0]], [[0.0], [1.0]]])
    embeddings = torch.tensor([[5.2], [0.5]], requires_grad=True)
    terms = model.losses(embeddings, *model(embeddings))
    commitment = torch.autograd.grad(
        terms["commitment"], (embeddings, model.codebooks), retain_graph=True, allow_unused=True
    )
    assert commitment[0].flatten().tolist() == pytest.approx([0.25 * (1.2 + 0.2), 0.25 * (0.5 + 0.5)])
    assert commitment[1] is None
    codebook = torch.autograd.grad(terms["codebook"], (embeddings, model.codebooks), allow_unused=True)
    assert codebook[0] is None
    assert codebook[1].flatten().tolist() == pytest.approx([-0.5, -1.2, -0.5, -0.2])


@pytest.mark.parametrize(
    "values, expected",
    [([0, 0, 0, 0], 4.0), ([0, 10, 20, 30], 1.0), ([0, 0, 0, 10], 4 * (9 / 16 + 1 / 16)), ([0, 0, 10, 10], 2.0)],
)
def test_diversity_value_by_hand(values, expected):
    model = bare(1, levels=1, codes=4, diversity=1.0)
    set_codebooks(model, [[[0.0], [10.0], [20.0], [30.0]]])
    embeddings = torch.tensor(values, dtype=torch.float32).unsqueeze(1) + 0.5
    assert model.losses(embeddings, *model(embeddings))["diversity"].item() == pytest.approx(expected)


def test_diversity_gradient_moves_items_towards_the_unused_code():
    """All three items have code 0 at 0, which is nearer than code 1 at 10. Descent must increase them."""
    model = bare(1, levels=1, codes=2, diversity=1.0)
    set_codebooks(model, [[[0.0], [10.0]]])
    embeddings = torch.tensor([[2.0], [3.0], [4.0]], requires_grad=True)
    model.losses(embeddings, *model(embeddings))["diversity"].backward()
    assert (embeddings.grad < 0).all()


def test_diversity_gradient_by_hand():
    """x = 4 between codes 0 and 10. In units of its squared distance 16 the logits are -1 and -36/16, p = (1, 0).

    C * 2 p_0 * d soft_0 / dx, with d soft_0 / dx = -s (1 - s) (12/16 + 8/16) and s the soft share of code 1.
    """
    model = bare(1, levels=1, codes=2, diversity=1.0)
    set_codebooks(model, [[[0.0], [10.0]]])
    embeddings = torch.tensor([[4.0]], requires_grad=True)
    model.losses(embeddings, *model(embeddings))["diversity"].backward()
    s = 1 / (1 + math.exp(36 / 16 - 1))
    assert embeddings.grad.item() == pytest.approx(-4 * s * (1 - s) * 20 / 16)


# --- codebook updates -------------------------------------------------------------------------------------------------


def batch_of(model: RQVAE, values: list[float]) -> Quantised:
    return model.quantise(torch.tensor(values).unsqueeze(1))


def test_ema_update_by_hand():
    """g = 0.9. Code 0 (at 0, count 2) gets 1, 2, 3. Code 1 (at 10, count 1) gets 9."""
    model = bare(1, levels=1, codes=2, ema_decay=0.9)
    set_codebooks(model, [[[0.0], [10.0]]], [[2.0, 1.0]])
    model.update_codebooks(batch_of(model, [1.0, 2.0, 3.0, 9.0]), torch.zeros(4))
    assert model.ema_count.tolist() == [pytest.approx([0.9 * 2 + 0.1 * 3, 0.9 * 1 + 0.1 * 1])]
    assert model.ema_sum.flatten().tolist() == pytest.approx([0.1 * 6, 0.9 * 10 + 0.1 * 9])
    assert model.codebooks.flatten().tolist() == pytest.approx([0.6 / 2.1, 9.9 / 1.0])


@pytest.mark.usefixtures("short_fits")
def test_ema_with_equal_use_is_the_form_of_the_paper_and_unused_codes_stay():
    """With the counts of the batch, e <- g * e + (1 - g) * mean. The unused code neither moves nor becomes nan."""
    model = bare(1, levels=1, codes=2, ema_decay=0.9)
    set_codebooks(model, [[[1.0], [50.0]]], [[2.0, 3.0]])
    model.update_codebooks(batch_of(model, [2.0, 4.0]), torch.zeros(2))
    assert model.codebooks.flatten().tolist() == pytest.approx([0.9 * 1 + 0.1 * 3, 50.0])
    for _ in range(3000):  # Then the sum and the count of the unused code are denormal.
        model.update_codebooks(batch_of(model, [3.0]), torch.zeros(1))
    assert model.ema_count[0, 1] < 1e-40
    assert model.codebooks.flatten().tolist() == pytest.approx([3.0, 50.0])


def test_without_ema_the_codebook_learns_by_gradient_only():
    model = bare(1, levels=1, codes=2, ema=False)
    set_codebooks(model, [[[0.0], [10.0]]])
    before = model.codebooks.detach().clone()
    model.update_codebooks(batch_of(model, [1.0, 9.0]), torch.zeros(2))
    assert model.codebooks.requires_grad and torch.equal(model.codebooks, before)
    assert not bare(1, ema=True).codebooks.requires_grad


def test_reset_replaces_only_the_unused_code_by_the_item_with_the_largest_error():
    """tau = 2: codes 1 and 3 are unused in the first batch. Code 3 is used in the second one, code 1 is replaced."""
    model = bare(1, levels=1, codes=4, reset_after=2, ema_decay=0.0)
    set_codebooks(model, [[[0.0], [10.0], [20.0], [30.0]]])
    model.update_codebooks(batch_of(model, [0.0, 20.0]), torch.tensor([9.0, 0.0]))
    assert model.age.tolist() == [[0, 1, 0, 1]]
    assert model.codebooks.flatten().tolist() == [0, 10, 20, 30]
    model.update_codebooks(batch_of(model, [0.0, 23.0, 30.0]), torch.tensor([0.0, 5.0, 1.0]))
    assert model.codebooks.flatten().tolist() == [0, 23, 23, 30]  # Code 2 by EMA with g = 0, code 1 by the reset.
    assert model.age.tolist() == [[0, 0, 0, 0]]
    assert model.ema_sum[0, 1].item() / model.ema_count[0, 1].item() == 23


def test_reset_uses_a_different_item_for_each_code_and_leaves_codes_without_an_item():
    model = bare(1, levels=1, codes=4, reset_after=1, ema_decay=0.0)
    set_codebooks(model, [[[0.0], [100.0], [200.0], [300.0]]])
    model.update_codebooks(batch_of(model, [1.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert model.codebooks.flatten().tolist() == [1.5, 2, 1, 300]  # The largest error comes first. Code 3 has no item.
    assert model.age.tolist() == [[0, 0, 0, 1]]


def test_a_reset_code_becomes_the_residual_of_its_own_level():
    """The item with the largest error, 7, has the residual 7 - 6 = 1 on level 2, where code 1 is unused."""
    model = bare(1, levels=2, codes=2, reset_after=1)
    set_codebooks(model, [[[0.0], [6.0]], [[0.0], [-50.0]]])
    model.update_codebooks(batch_of(model, [0.5, 7.0]), torch.tensor([0.0, 1.0]))
    assert model.codebooks[1, 1].item() == 1.0
    assert model.codebooks[0, 1].item() == pytest.approx(
        0.95 * 6 + 0.05 * 7
    )  # It is in use, so only the average changes it.


# --- initialisation, fit, files ---------------------------------------------------------------------------------------


def test_kmeans_init_finds_the_clusters_of_each_level():
    """Four clusters at +-10 +-1. Level 1 with 2 codes has +-10, level 2 has the residuals +-1."""
    model = bare(1, levels=2, codes=2, batch_size=6)
    data = torch.tensor([[11.0], [9.0], [-9.0], [-11.0]]).repeat(3, 1)
    model.initialise(data)
    assert sorted(model.codebooks[0].flatten().tolist()) == pytest.approx([-10, 10])
    assert sorted(model.codebooks[1].flatten().tolist()) == pytest.approx([-1, 1])
    assert model.ema_count.tolist() == [[3, 3], [3, 3]]  # 6 of 12 items per code. A batch has half of them.
    torch.testing.assert_close(model(data)[0], data)


def test_kmeans_starts_from_distant_points():
    """16 clusters, one code each. Uniform random points cover all 16 with probability 16! / 16^16 = 1e-6."""
    points = np.repeat(np.arange(16) * 1000.0, 20)[:, None] + np.tile([-0.5, 0.5], 160)[:, None]
    for seed in range(8):
        means = kmeans(points.astype(np.float32), 16, seed)
        assert sorted(means.cluster_centers_.ravel()) == pytest.approx((np.arange(16) * 1000.0).tolist())


def test_kmeans_uses_256_items_per_code():
    few, many = (kmeans_sample(items, replace(SMALL, codes=2)) for items in (300, 5000))
    assert sorted(few) == list(range(300))
    assert len(set(many)) == 512 and 2000 < many.mean() < 3000


@pytest.mark.usefixtures("short_fits")
def test_kmeans_init_happens_once_and_the_flag_survives_a_round_trip(tmp_path):
    vectors, _ = clustered()
    model = fit_rqvae(vectors, SMALL)
    assert model.initted.item() is True
    model.save(tmp_path)
    loaded = RQVAE.load(tmp_path)
    before = loaded.codebooks.detach().clone()
    assert loaded.initted.item() is True
    loaded.initialise(torch.from_numpy(vectors) + 1)
    loaded(torch.from_numpy(vectors) + 1)
    assert torch.equal(loaded.codebooks, before)
    fresh = RQVAE(vectors.shape[1], SMALL)
    start = fresh.codebooks.detach().clone()
    assert fresh.initted.item() is False
    fresh.initialise(torch.from_numpy(vectors))
    assert not torch.equal(fresh.codebooks, start)


@pytest.mark.usefixtures("short_fits")
@pytest.mark.parametrize("ema", [True, False])
def test_save_and_load_give_the_same_model(tmp_path, ema):
    vectors, _ = clustered()
    model = fit_rqvae(vectors, replace(SMALL, ema=ema, reset_after=2, diversity=0.01, random_last=1))
    model.save(tmp_path / "new" / "folder")
    loaded = RQVAE.load(tmp_path / "new" / "folder")
    assert loaded.config == model.config and loaded.dim == 12
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert {"codebooks", "ema_count", "ema_sum", "age", "initted"} <= loaded.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    np.testing.assert_array_equal(assign(loaded, vectors, seed=3), assign(model, vectors, seed=3))
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["rqvae.json", "rqvae.safetensors"]


def test_load_reports_the_missing_file(tmp_path):
    RQVAE(3, SMALL).save(tmp_path)
    (tmp_path / "rqvae.safetensors").unlink()
    with pytest.raises(MissingFileError, match="rqvae.safetensors"):
        RQVAE.load(tmp_path)


@pytest.mark.usefixtures("short_fits")
@pytest.mark.parametrize("kmeans_init", [True, False])
def test_fit_depends_on_the_seed_only_and_keeps_the_random_state_of_torch(kmeans_init):
    vectors, _ = clustered()
    config = replace(SMALL, kmeans_init=kmeans_init)
    torch.manual_seed(1)
    first = fit_rqvae(vectors, config).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = fit_rqvae(vectors, config).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = fit_rqvae(vectors, replace(config, seed=8)).state_dict()
    assert not torch.equal(first["codebooks"], other["codebooks"])


def test_fit_reduces_the_reconstruction_error():
    vectors, _ = clustered()
    data = torch.from_numpy(vectors)

    def reconstruction(model: RQVAE) -> float:
        return model.losses(data, *model(data))["reconstruction"].item()

    config = replace(SMALL, epochs=30, learning_rate=1e-2, diversity=0.01)
    assert reconstruction(fit_rqvae(vectors, config)) < 0.5 * reconstruction(RQVAE(vectors.shape[1], config))


def test_items_of_a_cluster_share_first_codes():
    vectors, labels = clustered()
    codes = assign(fit_rqvae(vectors, replace(SMALL, codes=4, epochs=20, learning_rate=1e-2)), vectors, seed=0)
    same_code = codes[:, None, 0] == codes[None, :, 0]
    same_cluster = labels[:, None] == labels[None, :]
    pairs = ~np.eye(len(labels), dtype=bool)
    assert same_code[pairs & same_cluster].mean() > 0.9
    assert same_code[pairs & ~same_cluster].mean() < 0.1


# --- random last levels -----------------------------------------------------------------------------------------------


def one_prefix(codes: int, **settings) -> RQVAE:
    """Return a model whose first code is the sign of a 1-d input."""
    model = bare(1, codes=codes, **settings)
    values = np.full((model.config.levels, codes, 1), 1e3, dtype=np.float32)
    values[0, :2, 0] = -1, 1
    values[1:, 0] = 0
    set_codebooks(model, values.tolist())
    return model


@settings(max_examples=30, deadline=None)
@given(
    negatives=st.integers(0, 16), positives=st.integers(1, 16), random_last=st.integers(1, 2), seed=st.integers(0, 99)
)
def test_unused_first_is_unique_while_a_prefix_has_free_codes(negatives, positives, random_last, seed):
    """At most C^M items per prefix: 16 = 4^2 for M = 2, and 4 for M = 1."""
    free = 4**random_last
    negatives, positives = min(negatives, free), min(positives, free)
    model = one_prefix(4, levels=1 + random_last, random_last=random_last)
    vectors = np.array([[-1.0]] * negatives + [[1.0]] * positives, dtype=np.float32)
    codes = assign(model, vectors, seed=seed)
    assert codes[:, 0].tolist() == [0] * negatives + [1] * positives
    assert len(np.unique(codes, axis=0)) == negatives + positives
    assert codes.min() >= 0 and codes.max() < 4
    np.testing.assert_array_equal(codes, assign(model, vectors, seed=seed))


def test_unused_first_spreads_over_all_codes_and_then_starts_a_new_round():
    model = one_prefix(4, levels=2, random_last=1)
    codes = assign(model, np.ones((10, 1), dtype=np.float32), seed=5)[:, 1]
    assert sorted(codes[:4]) == [0, 1, 2, 3] and sorted(codes[4:8]) == [0, 1, 2, 3] and len(set(codes[8:])) == 2
    firsts = [assign(model, np.ones((1, 1), dtype=np.float32), seed=seed)[0, 1] for seed in range(40)]
    assert set(firsts) == {0, 1, 2, 3}  # The code is random, not the lowest free one.


def test_unused_first_with_many_combinations_is_fast_and_unique():
    """256^4 combinations per prefix. They must not be enumerated."""
    model = one_prefix(256, levels=5, random_last=4)
    codes = assign(model, np.ones((2000, 1), dtype=np.float32), seed=0)
    assert len(np.unique(codes, axis=0)) == 2000
    assert all(200 < len(np.unique(codes[:, level])) <= 256 for level in range(1, 5))


def test_uniform_draws_each_code_equally_often_and_collides():
    model = one_prefix(4, levels=2, random_last=1, random_mode="uniform")
    codes = assign(model, np.ones((4000, 1), dtype=np.float32), seed=0)[:, 1]
    counts = np.bincount(codes, minlength=4)
    assert counts.sum() == 4000 and abs(counts - 1000).max() < 5 * math.sqrt(4000 * 0.25 * 0.75)
    four = [tuple(assign(model, np.ones((4, 1), dtype=np.float32), seed=seed)[:, 1]) for seed in range(50)]
    assert sum(len(set(draw)) < 4 for draw in four) > 30  # The probability of no collision is 4! / 4^4 = 9 %.


@pytest.mark.usefixtures("short_fits")
def test_only_the_last_levels_are_random():
    vectors, _ = clustered()
    model = fit_rqvae(vectors, SMALL)
    nearest = assign(model, vectors, seed=0)
    model.config = replace(SMALL, random_last=1)
    random = assign(model, vectors, seed=0)
    np.testing.assert_array_equal(nearest[:, :2], random[:, :2])
    assert (nearest[:, 2] != random[:, 2]).any()
    _, prefixes, counts = np.unique(random[:, :2], axis=0, return_inverse=True, return_counts=True)
    is_free = counts[prefixes.reshape(-1)] <= SMALL.codes
    assert is_free.sum() > 20 and len(np.unique(random[is_free], axis=0)) == is_free.sum()
    assert (random != assign(model, vectors, seed=1)).any()


# --- quality checks ---------------------------------------------------------------------------------------------------


def test_health_by_hand():
    """Four items, one pair collides. Level 1: 2 + 2, 1 bit. Level 2: 2 + 1 + 1, 1.5 bit. Level 3: one code, 0 bit."""
    model = bare(2, levels=1, codes=2)
    set_codebooks(model, [[[1.0, 0.0], [0.0, 1.0]]])
    vectors = np.array([[1, 0], [0, 1], [3, 4], [2, 0]], dtype=np.float32)  # (3, 4) is decoded as (0, 1), cosine 0.8
    codes = np.array([[0, 5, 1], [0, 5, 1], [1, 6, 1], [1, 7, 1]])
    quality = health(codes, model, vectors)
    assert (quality.items, quality.uniqueness, quality.largest_collision) == (4, 0.75, 2)
    assert quality.uniqueness_without_random_level == 0.5  # One level of two codes, both in use.
    assert quality.neighbourhood is None
    assert quality.used_codes == (2, 3, 1)
    assert quality.entropy == pytest.approx((1.0, 1.5, 0.0))
    assert quality.reconstruction == pytest.approx((1 + 1 + 0.8 + 1) / 4)


def test_check_passes_at_the_limit_and_reports_all_problems():
    good = Health(
        items=100,
        uniqueness=0.99,
        uniqueness_without_random_level=0.9,
        largest_collision=2,
        used_codes=(2, 9),
        entropy=(1.0, 3.0),
        reconstruction=0.9,
    )
    config = RQVAEConfig(levels=2, codes=16)
    check(good, 0.99, config)
    with pytest.raises(QualityCheckError, match="99.00% of semantic IDs are unique, below 99.90%"):
        check(good, 0.999, config)
    with pytest.raises(QualityCheckError, match="fewer than 2 codes in use on level 2") as caught:
        check(replace(good, uniqueness=0.5, used_codes=(2, 1)), 0.99, config)
    assert "50.00%" in caught.value.what and caught.value.do


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        (RQVAEConfig(kmeans_init=False), "set sid_kmeans_init to True"),
        (RQVAEConfig(kmeans_init=False, ema=False), "set sid_kmeans_init and sid_ema to True"),
        (RQVAEConfig(codes=16), "set sid_levels to 2 or raise sid_epochs or lower sid_batch_size"),
        (
            RQVAEConfig(codes=64),
            "set sid_codes to 32 or set sid_levels to 2 or raise sid_epochs or lower sid_batch_size",
        ),
        (SidConfig(codes=64), "set sid_codes to 32 or set sid_levels to 2"),
    ],
)
def test_the_advice_against_a_collapse_names_only_what_is_not_set_yet(config, advice):
    collapsed = Health(
        items=70,
        uniqueness=1.0,
        uniqueness_without_random_level=0.9,
        largest_collision=1,
        used_codes=(20, 10, 1, 30),
        entropy=(1.0, 1.0, 0.0, 1.0),
        reconstruction=0.9,
    )
    with pytest.raises(QualityCheckError) as caught:
        check(collapsed, 0.99, config)
    assert caught.value.do == advice


@pytest.mark.parametrize(
    ("random_last", "mode", "advice"),
    [
        (0, "unused_first", "set sid_random_last to 1"),
        (1, "uniform", "set sid_random_mode to unused_first"),
        (1, "unused_first", "raise sid_codes or sid_levels"),
    ],
)
def test_the_advice_against_equal_semantic_ids_names_only_what_is_not_set_yet(random_last, mode, advice):
    equal = Health(
        items=70,
        uniqueness=0.5,
        uniqueness_without_random_level=0.5,
        largest_collision=9,
        used_codes=(20, 10, 30, 30),
        entropy=(1.0, 1.0, 1.0, 1.0),
        reconstruction=0.9,
    )
    with pytest.raises(QualityCheckError) as caught:
        check(equal, 0.99, RQVAEConfig(random_last=random_last, random_mode=mode))
    assert caught.value.do == advice


def test_levels_that_use_few_codes_are_named_except_random_ones():
    uneven = Health(
        items=300,
        uniqueness=1.0,
        uniqueness_without_random_level=0.9,
        largest_collision=1,
        used_codes=(60, 128, 127, 40),
        entropy=(1.0, 1.0, 1.0, 1.0),
        reconstruction=0.9,
    )
    line = usage_line(uneven, RQVAEConfig(codes=256, random_last=1))
    assert line == (
        "note: of 256 possible codes the items use 60 on level 1, 127 on level 3; try sid_codes 128 or more sid_epochs"
    )
    assert usage_line(uneven, SidConfig(codes=64, random_last=1)) is None
    assert "40 on level 4" in usage_line(uneven, RQVAEConfig(codes=256, random_last=0))


@pytest.mark.parametrize("items", [70, 150])
def test_small_catalogues_get_enough_steps_that_no_level_collapses(items):
    """Twenty steps, which preset smoke had before, leave one code in use on the first level."""
    vectors = np.random.default_rng(items).normal(size=(items, 48)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    model = fit_rqvae(vectors, RQVAEConfig(codes=64, hidden=(64,), epochs=20, seed=1))
    assert min(len(set(codes)) for codes in model.encode(vectors).T) > 20


@pytest.mark.parametrize(("preset", "epochs"), [("smoke", 20), ("laptop", 30), ("gpu", 30), ("paper", 30)])
@pytest.mark.parametrize("items", [1682, 12_101, 18_357])
def test_the_packaged_data_sets_keep_their_number_of_epochs(preset, epochs, items):
    config = tokenizer_config(load_settings(config_dict={"preset": preset}))
    assert config.epochs == epochs_for(items, config) == epochs


def test_a_catalogue_with_fewer_items_than_codes_is_refused_before_any_stage_runs(tiny_settings, tmp_path):
    settings = tiny_settings(tmp_path, sid_codes=64)
    data = Data(settings)
    with pytest.raises(ConfigurationError, match="60 items are too few for 64 codes") as caught:
        pipeline.check_data(pipeline.plan(settings, data, stages=["tokenizer"]), settings, data)
    assert caught.value.do == "set sid_codes to 16"


@pytest.mark.parametrize("items", [5, 20, 40])
@pytest.mark.parametrize("method", ["rqvae", "rqkmeans"])
def test_the_advised_codebook_size_works_for_tiny_catalogues(items, method):
    vectors = np.random.default_rng(items).normal(size=(items, 48)).astype(np.float32)
    settings = {"codes": fitting_codes(items), "seed": 1}
    if method == "rqvae":
        model = fit_rqvae(vectors, RQVAEConfig(hidden=(64,), epochs=20, **settings))
    else:
        model = fit_rqkmeans(vectors, SidConfig(**settings))
    codes = assign(model, vectors, seed=1)
    check(health(codes, model, vectors), 0.99, model.config)


def test_fit_stops_if_the_loss_is_not_finite():
    vectors, _ = clustered()
    with pytest.raises(QualityCheckError, match="not finite in epoch 1"):
        fit_rqvae(vectors, replace(SMALL, kmeans_init=False, learning_rate=1e30))


def test_fit_refuses_invalid_embeddings():
    vectors, _ = clustered()
    with pytest.raises(ConfigurationError, match="5 items are too few for 8 codes"):
        fit_rqvae(vectors[:5], SMALL)
    for broken in (vectors * np.nan, vectors[0], vectors[:0]):
        with pytest.raises(ConfigurationError, match="finite"):
            fit_rqvae(broken, SMALL)


def test_config_reports_all_invalid_values():
    with pytest.raises(ConfigurationError) as caught:
        RQVAEConfig(levels=2, random_last=2, random_mode="nearest", ema_decay=1.0)
    for word in ("random_last", "random_mode", "ema_decay"):
        assert word in caught.value.what
    assert "levels must" not in caught.value.what


def test_config_is_plain_data():
    assert json.loads(json.dumps(RQVAEConfig().__dict__))["hidden"] == list(RQVAEConfig().hidden)


# --- embeddings -------------------------------------------------------------------------------------------------------

TEXTS = ["Red nail polish", "red nail polish, glossy", "moisturising shampoo for dry hair", "", "Red nail polish"]


def test_hash_embeddings_have_length_1_are_deterministic_and_similar_for_similar_texts():
    vectors = hash_embeddings(TEXTS, dim=64)
    assert vectors.shape == (5, 64) and vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, hash_embeddings(TEXTS, dim=64))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 0, 1], rtol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[4])
    assert vectors[0] @ vectors[1] > 0.5 > abs(vectors[0] @ vectors[2]) + 0.1


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """Return the folder of a two-layer BERT with a vocabulary of words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "nail", "polish", "shampoo", "hair", "dry"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    ).save_pretrained(folder)
    return folder


def test_embed_texts_is_the_mean_over_the_tokens_of_each_text(encoder_folder):
    """The lengths differ, so a wrong mask or order changes the result. The reference embeds one text at a time."""
    from transformers import AutoModel, AutoTokenizer

    texts = ["red", "dry hair shampoo", "nail polish red red red", "", "hair " * 400, "polish"]
    vectors = embed_texts(texts, encoder_folder, batch_size=3)
    assert vectors.dtype == np.float32 and vectors.shape == (6, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    tokenizer, model = AutoTokenizer.from_pretrained(encoder_folder), AutoModel.from_pretrained(encoder_folder).eval()
    for text, row in zip(texts, vectors, strict=True):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        with torch.no_grad():
            mean = model(**ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, (mean / mean.norm()).numpy(), atol=1e-5)
    assert embed_texts([], encoder_folder).shape == (0, 16)


def test_embed_texts_reports_a_missing_encoder(tmp_path):
    with pytest.raises(MissingFileError, match="no text encoder"):
        embed_texts(TEXTS, tmp_path / "nothing")
