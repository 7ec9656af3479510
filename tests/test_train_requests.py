"""Several training requests of a user: their histories and targets, and that nothing knows these targets."""

import pytest
from changed_data import copy_tiny

from recbole_gr2.artifacts import read_requests
from recbole_gr2.bridge.data import Data
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.lists import training_requests

MODELS = ["PairCounts", "ItemKNN"]
REQUESTS = 3


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    root = tmp_path_factory.mktemp("requests")
    options = {"base_model": MODELS, "train_requests": REQUESTS, "cand_num": 8, "prior_fits": 1}
    return tiny_run(root, ["prior"], **options)


def train_lists(run):
    return read_requests(run.folders["candidates"] / "train.jsonl", run.data.catalog)


@pytest.mark.slow
def test_each_of_the_last_training_items_is_the_target_of_one_request(run):
    data = run.data
    ids = {token: user for user, token in enumerate(data.user_tokens)}
    seen = set()
    for request in train_lists(run):
        split = request.request_id.split("/")[0]
        number = int(split.partition("-")[2] or 1)
        items = data.sequences[ids[request.user_token]].tolist()
        assert request.split == "train" and request.history == tuple(items[: len(items) - 2 - number])
        assert request.target == items[len(items) - 2 - number] and not set(request.items) & set(request.history)
        seen.add((request.user_token, number))
    lengths = {data.user_tokens[user]: len(items) for user, items in data.sequences.items()}
    assert seen == {(user, n) for user, length in lengths.items() for n in range(1, REQUESTS + 1) if length >= 3 + n}
    assert len(training_requests(run.context())) > 150  # of 150 users


@pytest.mark.slow
def test_base_models_and_features_know_none_of_the_targets(run):
    data = run.data
    hold_out = data.known_items("hold_out")
    assert hold_out == [items[:-REQUESTS] for items in data.known_items("train")]
    for name in MODELS:
        summary = run.records[f"base_model_{name}"].summary
        lost = sum(map(len, data.known_items("train"))) - sum(map(len, hold_out))
        assert summary["base"]["training_rows"] - summary["hold_out"]["training_rows"] == lost


@pytest.mark.slow
def test_training_targets_change_no_training_list(tiny_run, tiny_data, tmp_path):
    """The targets of all training requests become other items. The oldest request of a user has none in its history."""
    lists = []
    for scrambled in (0, REQUESTS):
        copy = tmp_path / str(scrambled)
        copy_tiny(tiny_data, copy, scrambled=scrambled, from_end=3)
        options = {"base_model": MODELS, "train_requests": REQUESTS, "cand_num": 8, "data_path": str(copy)}
        weights = {"PairCounts": 1, "ItemKNN": 1}  # Validation would choose them with models that know the targets.
        run = tiny_run(copy / "run", ["candidates"], cand_weights=weights, **options)
        oldest = [request for request in train_lists(run) if request.request_id.startswith(f"train-{REQUESTS}/")]
        names = run.data.catalog.tokens
        lists.append({r.user_token: (names(r.history), names(r.items), r.sources, r.target) for r in oldest})
    plain, changed = lists
    assert plain.keys() == changed.keys() and len(plain) > 100
    assert all(plain[user][:3] == changed[user][:3] for user in plain)
    assert all(plain[user][3] != changed[user][3] for user in plain if not user.endswith(("first", "second")))


def test_one_request_is_the_default(tiny_settings, tmp_path):
    data = Data(tiny_settings(tmp_path))
    assert data.train_splits == ("train",) and set(data.split.held_out.tolist()) == {1}
    with pytest.raises(ConfigurationError, match="train_requests is 2, and train_targets is 2"):
        tiny_settings(tmp_path, train_requests=2, train_targets=2)


def test_requests_that_leave_nothing_to_learn_are_refused(tiny_settings, tiny_data, tmp_path):
    from recbole_gr2 import pipeline

    settings = tiny_settings(tmp_path, data_path=str(tiny_data), train_requests=50)
    data = Data(settings)
    with pytest.raises(ConfigurationError, match="(?s)no user has two training items.*train_requests 50"):
        pipeline.check_data(pipeline.plan(settings, data, stages=["candidates"]), settings, data)
