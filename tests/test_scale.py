"""What large catalogues need: rows without loops, smaller batches, a sample of the requests, sparse weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from recbole_gr2.bridge import data as data_module
from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.splits import from_end, leave_one_out_rows
from recbole_gr2.bridge.training import train_or_load
from recbole_gr2.catalog import Catalog
from recbole_gr2.config import load_settings
from recbole_gr2.features import providers
from recbole_gr2.features.extraction import TrainingData
from recbole_gr2.model import linear
from recbole_gr2.model.linear import inverse_gram, largest_weights, neighbour_weights, similar_items
from recbole_gr2.model.traditional import unit_vectors
from recbole_gr2.slices import _two_steps
from recbole_gr2.stages.candidates import top_candidates
from recbole_gr2.types import Candidate, Item, Request

RNG = np.random.default_rng(3)
INTERACTIONS = csr_matrix((RNG.random((40, 25)) < 0.15).astype(np.float32))
VECTORS = unit_vectors(RNG.normal(size=(25, 6)))[1:]


def load(folder, **options) -> Data:
    words = {"preset": "smoke", "dataset": "ml-100k", "checkpoint_dir": str(folder), "base_model": "PairCounts"}
    return Data(load_settings(config_dict={**words, "base_text_weight": 0, "MAX_ITEM_LIST_LENGTH": 7, **options}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Data:
    return load(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def model(whole, tmp_path_factory):
    return train_or_load(whole, tmp_path_factory.mktemp("model"))


def test_rows_and_split_are_those_of_recbole(whole, tmp_path, monkeypatch):
    from recbole.data.dataset import Dataset, SequentialDataset

    def split(users):
        groups = Dataset._grouped_index(None, users)
        return [np.array(part) for part in Dataset._split_index_by_leave_one_out(None, groups, 2)]

    monkeypatch.setattr(data_module, "add_histories", SequentialDataset.data_augmentation)
    monkeypatch.setattr(data_module, "leave_one_out_rows", split)
    theirs = load(tmp_path)
    for own, other in zip([whole.dataset, *whole.built], [theirs.dataset, *theirs.built], strict=True):
        assert list(own.inter_feat.interaction) == list(other.inter_feat.interaction)
        for name, values in own.inter_feat.interaction.items():
            assert values.dtype == other.inter_feat[name].dtype and torch.equal(values, other.inter_feat[name])


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_positions_from_the_end_and_leave_one_out_rows(users):
    assert from_end(np.array(users)).tolist() == [users[row:].count(user) for row, user in enumerate(users)]
    train, valid, test = leave_one_out_rows(np.array(users))
    assert sorted([*train, *valid, *test]) == list(range(len(users)))
    assert [users[row] for row in test] == [user for user in dict.fromkeys(users) if users.count(user) > 1]


def test_lists_do_not_depend_on_the_size_of_the_batches(whole, model, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "MOST_SCORES", 5 * len(whole.item_tokens))
    small = load(tmp_path)
    assert (small.config["eval_batch_size"], whole.config["eval_batch_size"]) == (5, 1024)
    assert small.fingerprint == whole.fingerprint
    ours = train_or_load(small, tmp_path / "model")
    assert list(top_candidates(ours, "test", 20)) == list(top_candidates(model, "test", 20))


def test_a_sample_of_requests_has_the_lists_of_all_requests(whole, model, tmp_path):
    sample = load(tmp_path, max_requests=100, train_requests=2)
    assert sample.fingerprint != whole.fingerprint
    two = load(tmp_path, train_requests=2)
    assert all(torch.equal(sample.built[0].inter_feat[n], two.built[0].inter_feat[n]) for n in ("user_id", "item_id"))
    for split in ("train", "train-2", "valid", "test"):
        users, every = sample.rows(split)[1].tolist(), two.rows(split)[1].tolist()
        assert len(set(users)) == 100 and users == [user for user in every if user in set(users)]
    assert torch.equal(sample.validation().inter_feat["user_id"], sample.rows("valid")[0]["user_id"])
    ours = train_or_load(sample, tmp_path / "model")
    lists = {request.user_token: request for request in top_candidates(model, "test", 20)}
    assert all(request == lists[request.user_token] for request in top_candidates(ours, "test", 20))
    assert sample.summary().test_users == sample.summary().train_lists == 100


def test_two_steps_are_the_entries_of_the_square(monkeypatch):
    from recbole_gr2 import slices

    monkeypatch.setattr(slices, "BLOCK", 7)
    follows = csr_matrix((RNG.random((30, 30)) < 0.08).astype(np.float32))
    items, targets = RNG.integers(30, size=(2, 200)).tolist()
    expected = (follows @ follows).toarray()[items, targets] > 0
    assert np.array_equal(_two_steps(follows, items, targets), expected) and 0 < expected.sum() < 200


def test_similar_items_are_the_most_similar_ones_if_all_cells_are_searched(monkeypatch):
    monkeypatch.setattr(linear, "CELLS", 25)
    cosines = VECTORS @ VECTORS.T
    np.fill_diagonal(cosines, -np.inf)
    expected = np.sort(np.argsort(-cosines, axis=1)[:, :4], axis=1)
    assert np.array_equal(np.sort(similar_items(VECTORS, 4), axis=1), expected)
    monkeypatch.setattr(linear, "CELLS", 1)
    found = similar_items(VECTORS, 30)
    assert (found == -1).any() and not (found == np.arange(25)[:, None]).any()


def test_neighbour_weights_with_all_neighbours_are_those_of_ease(monkeypatch):
    for name, value in {"TOGETHER": 24, "SIMILAR": 24, "CELLS": 25, "BLOCK": 8}.items():
        monkeypatch.setattr(linear, name, value)
    exact = largest_weights(inverse_gram(INTERACTIONS, VECTORS, ridge=2.0, text_weight=3.0), 0).toarray()[1:, 1:]
    weights = neighbour_weights(INTERACTIONS, VECTORS, ridge=2.0, text_weight=3.0).toarray()
    assert np.allclose(weights, exact, atol=1e-5) and not weights.diagonal().any()


@pytest.mark.parametrize("text_weight", [0.0, 3.0])
def test_neighbour_weights_are_ridge_regressions_on_few_items(text_weight, monkeypatch):
    for name, value in {"TOGETHER": 3, "SIMILAR": 2, "CELLS": 25}.items():
        monkeypatch.setattr(linear, name, value)
    weights = neighbour_weights(INTERACTIONS, VECTORS, ridge=2.0, text_weight=text_weight).toarray()
    gram = (INTERACTIONS.T @ INTERACTIONS).toarray() + text_weight * VECTORS @ VECTORS.T
    for item in range(25):
        chosen = np.flatnonzero(weights[:, item])
        assert len(chosen) <= (5 if text_weight else 3)
        matrix = gram[np.ix_(chosen, chosen)] + 2 * np.eye(len(chosen))
        assert np.allclose(weights[chosen, item], np.linalg.solve(matrix, gram[chosen, item]), atol=1e-5)


def test_text_ease_says_that_its_weights_are_sparse(tmp_path, monkeypatch):
    messages: list[str] = []
    data = load(tmp_path, base_model="TextEASE")
    inputs = {"text_embeddings": RNG.normal(size=(data.item_count, 6)).astype(np.float32)}
    monkeypatch.setattr(linear, "EXACT_ITEMS", data.item_count - 1)
    base = train_or_load(data, tmp_path / "sparse", inputs=inputs, say=messages.append)
    assert messages[0].startswith("TextEASE has sparse weights, because there are more than 1,")
    weights = base.model.weights
    assert weights.shape == (data.item_count + 1,) * 2 and not weights[0].nnz and not weights[:, [0]].nnz
    assert 0 < weights.nnz <= (linear.TOGETHER + linear.SIMILAR) * data.item_count
    assert base.metadata["best_valid"]["NDCG@10"] > 0.01


def test_linear_features_of_many_items_have_weights_of_neighbours(monkeypatch):
    for name, value in {"TOGETHER": 24, "SIMILAR": 24, "CELLS": 26}.items():
        monkeypatch.setattr(linear, name, value)
    sequences = [(np.flatnonzero(row) + 1).tolist() for row in INTERACTIONS.toarray() if row.any()]

    def both(size: int, items: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
        data = TrainingData(
            catalog=Catalog(Item(item_id=number, token=str(number), title="") for number in range(1, size + 1)),
            sequences=sequences,
            times=sequences,
            embeddings=np.concatenate([VECTORS, VECTORS[:1]])[:size],
        )
        candidates = tuple(Candidate(item_id=item, score=0.0, rank=item) for item in items)
        request = Request(
            request_id="", user_token="", split="", history=(7, 9, 1), candidates=candidates, target=5, provider=""
        )
        found = []
        for limit in (100, 5):
            monkeypatch.setattr(providers, "EXACT_ITEMS", limit)
            found.append(providers.linear(data)(request))
        return found

    exact, sparse = both(25, (5, 9, 2))
    assert all(np.allclose(sparse[name], values, atol=1e-5) for name, values in exact.items())
    assert exact["linear"].all() and exact["linear of each"][1, 1] == sparse["linear of each"][1, 1] == 0
    for values in both(26, (5, 26)):  # Item 26 has no interactions.
        assert values["linear"][0] != 0 and not values["linear of each"][:, 1].any()
