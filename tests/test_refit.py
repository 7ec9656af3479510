"""Refit: test lists from models and features that also know the validation items, and all other lists as before."""

import numpy as np
import pytest
from changed_data import copy_tiny

from recbole_gr2.artifacts import read_feature_names, read_recommendations, read_requests
from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.training import train_model
from recbole_gr2.lists import candidate_requests

MODELS = ["PairCounts", "ItemKNN"]


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    """A run with and one without refit."""
    root = tmp_path_factory.mktemp("refit")
    options = {"base_model": MODELS, "models": ["PairCounts"], "cand_num": 8, "prior_fits": 1}
    return {refit: tiny_run(root, ["prior", "PairCounts"], refit=refit, **options) for refit in (False, True)}


def requests_of(run, split):
    return {
        request.user_token: request
        for request in read_requests(run.folders["candidates"] / f"{split}.jsonl", run.data.catalog)
    }


@pytest.mark.slow
def test_validation_items_are_known_to_the_refitted_model_alone(runs):
    data = runs[True].data
    plain, refit = data.known_items("train"), data.known_items("refit")
    assert [items[:-1] for items in refit] == plain
    assert [items[-1] for items in refit] == [
        next(iter(data.targets(user, "valid"))) for user in data.train_sequences()
    ]
    for name in MODELS:
        summary = runs[True].records[f"base_model_{name}"].summary
        rows = {kind: summary[kind]["training_rows"] for kind in ("base", "hold_out", "refit")}
        assert rows["refit"] == rows["base"] + len(plain) and rows["hold_out"] == rows["base"] - len(plain)
        assert "refit" not in runs[False].records[f"base_model_{name}"].summary


@pytest.mark.slow
def test_train_and_validation_lists_do_not_change_and_test_lists_do(runs):
    for split in ("train", "valid"):
        assert requests_of(runs[False], split) == requests_of(runs[True], split)
    plain, refit = requests_of(runs[False], "test"), requests_of(runs[True], "test")
    changed = [plain[user].items != refit[user].items for user in plain]
    assert plain.keys() == refit.keys() and np.mean(changed) > 0.2
    one, other = (read_recommendations(run.folders["PairCounts"]) for run in runs.values())
    assert not np.array_equal(one.items, other.items)


@pytest.mark.slow
def test_features_of_test_lists_know_the_validation_items(runs):
    names = read_feature_names(runs[True].folders["prior"])
    column = names.index("popularity")
    for refit, run in runs.items():
        counts = np.bincount(np.concatenate(run.data.known_items("refit" if refit else "train")))
        known = np.bincount(np.concatenate(run.data.known_items("train")))
        for split, expected in (("test", counts), ("valid", known)):
            for request in candidate_requests(run.context(), split)[:20]:
                assert np.allclose(request.features.candidates[:, column], np.log1p(expected[list(request.items)]))


@pytest.mark.slow
def test_test_targets_change_no_list(tiny_run, tiny_data, tmp_path):
    lists = []
    for scramble in (False, True):
        copy = tmp_path / str(scramble)
        copy_tiny(tiny_data, copy, scrambled=1 if scramble else 0)
        options = {"base_model": MODELS, "cand_num": 8, "data_path": str(copy), "refit": True}
        run = tiny_run(copy / "run", ["candidates"], **options)
        requests = requests_of(run, "test").items()
        lists.append({user: run.data.catalog.tokens(request.items) for user, request in requests})
    assert lists[0] == lists[1] and len(lists[0]) > 100


def test_sequential_models_learn_from_the_validation_rows(tiny_settings, tmp_path):
    data = Data(tiny_settings(tmp_path, base_model="CausalSASRec"))
    rows = [train_model(data, tmp_path / str(refit), refit=refit, epochs=1)["training_rows"] for refit in (False, True)]
    assert rows[1] >= rows[0]  # CausalSASRec reads one row per sequence, which is one item longer
