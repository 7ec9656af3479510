"""Train lists with several targets, graded by ratings: the rows, the lists, and a run up to RL."""

import json

import numpy as np
import pytest
from conftest import MOVIE_USERS, MOVIES

from recbole_gr2.artifacts import read_requests, write_requests
from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.training import train_model
from recbole_gr2.config import load_settings
from recbole_gr2.errors import ConfigurationError

RATED = {
    "preset": "smoke",
    "train_targets": 3,
    "train_grades": {"rating": [3, 5]},
    "base_epochs": 1,
    "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
}


@pytest.fixture(scope="module")
def plain(movies_folder):
    return Data(load_settings(config_dict={"preset": "smoke", **MOVIES, "data_path": str(movies_folder)}))


@pytest.fixture(scope="module")
def options(movies_folder):
    return {**RATED, **MOVIES, "data_path": str(movies_folder)}


@pytest.fixture(scope="module")
def rated(options):
    return Data(load_settings(config_dict=options))


def test_the_last_three_train_items_are_targets(plain, rated):
    frame = rated.dataset.inter_feat
    rating = {
        (u, i): r
        for u, i, r in zip(frame["user_id"].tolist(), frame["item_id"].tolist(), frame["rating"].tolist(), strict=True)
    }
    seen = set()
    for user, items in rated.sequences.items():
        assert np.array_equal(items, plain.sequences[user])
        targets = items[-5:-2].tolist()
        assert rated.targets(user, "train") == {i: (rating[user, i] >= 3) + (rating[user, i] >= 5) for i in targets}
        assert rated.history(user, "train") == tuple(items[:-5].tolist())
        assert plain.targets(user, "train") == {int(items[-3]): 1}
        for split in ("valid", "test"):
            assert rated.targets(user, split) == plain.targets(user, split)
            assert rated.history(user, split) == plain.history(user, split)
        seen |= set(rated.targets(user, "train").values())
    assert seen == {0, 1, 2} and rated.fingerprint != plain.fingerprint
    assert rated.known_items("hold_out") == [items[:-5].tolist() for items in rated.sequences.values()]
    rows, users = rated.rows("train")
    assert len(set(users.tolist())) == len(users) == MOVIE_USERS
    assert rows["item_id"].tolist() == [next(iter(rated.targets(user, "train"))) for user in users.tolist()]
    ends = rows["item_length"].numpy() - 1
    last = rows["item_id_list"].numpy()[np.arange(len(users)), ends].tolist()
    assert last == [rated.history(user, "train")[-1] for user in users.tolist()]


def test_the_hold_out_base_sees_none_of_them(plain, rated, tmp_path):
    rows = [
        train_model(data, tmp_path / str(number), hold_out=True, epochs=1, model="Pop", base=False)["training_rows"]
        for number, data in enumerate((plain, rated))
    ]
    assert rows[0] - rows[1] == 2 * MOVIE_USERS


def test_invalid_targets_and_grades_are_errors(options):
    for change, message in (
        ({"train_targets": 0}, "train_targets"),
        ({"train_grades": {"stars": [1]}}, "names the column 'stars'"),
        ({"train_grades": {"rating": [5, 3]}}, "rising thresholds"),
        ({"train_grades": {}}, "rising thresholds"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Data(load_settings(config_dict={**options, **change}))


GRADED = {
    "train_targets": 3,
    "train_grades": {"rating": [3, 5]},
    "load_col": RATED["load_col"],
    "rl_rewards": {"ndcg": {"weight": 1.0, "only_if": ["format", "moved"]}, "format": 0.2},
    "sft_steps": 20,
    "cand_num": 8,
    "rl_max_resample": 20,
}


@pytest.fixture(scope="module")
def root(finished_copy):
    """A folder of results for the runs on graded lists."""
    return finished_copy()


@pytest.mark.slow
def test_lists_are_graded_and_traces_argue_for_a_best_target(tiny_run, root, tmp_path):
    run = tiny_run(root, ["traces"], **GRADED)
    data, folder = run.data, run.folders["candidates"]
    requests = {r.request_id: r for r in read_requests(folder / "train.jsonl", data.catalog)}
    usable = [r for r in requests.values() if r.target_rank and r.has_signal]
    several = [r for r in usable if sum(gain > 0 for gain in r.relevance) > 1]
    assert several and len(usable) > 50 and {gain for r in usable for gain in r.relevance} == {0, 1, 2}
    users = {token: user for user, token in enumerate(data.user_tokens)}
    for request in requests.values():
        wanted = data.targets(users[request.user_token], "train")
        assert request.grades == tuple(wanted.get(item, 0) for item in request.items)
        if request.target_rank and request.has_signal:
            assert request.relevance[request.target_rank - 1] == max(request.relevance)
    write_requests(tmp_path / "again.jsonl", requests.values(), data.catalog)
    assert (tmp_path / "again.jsonl").read_text() == (folder / "train.jsonl").read_text()
    ids = {item.token: item.item_id for item in data.catalog}
    for line in map(json.loads, (run.folders["traces"] / "accepted.jsonl").read_text().splitlines()):
        request = requests[line["request_id"]]
        assert request.relevance[request.items.index(ids[line["ranking"][0]])] == max(request.relevance)


@pytest.mark.slow
def test_graded_ndcg_is_the_reward_of_rl(tiny_run, root):
    run = tiny_run(root, ["rl"], **GRADED)
    file = run.folders["rl"] / "checkpoints" / "rollouts.jsonl"
    ndcg = {line["terms"]["ndcg"] for line in map(json.loads, file.read_text().splitlines())}
    assert len(ndcg) > 3 and all(0 < value <= 1 for value in ndcg)


@pytest.mark.parametrize("grades", [[1], [1, -1], [1, 0.5], "ab"])
def test_grades_of_an_imported_list(rated, tmp_path, grades):
    tokens = [item.token for item in rated.catalog[:3]]
    line = {
        "user_id": "1",
        "split": "train",
        "history": tokens[:1],
        "target": tokens[1],
        "candidates": tokens[1:],
        "grades": grades,
    }
    (tmp_path / "lists.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigurationError, match="grades have to be integers"):
        read_requests(tmp_path / "lists.jsonl", rated.catalog)
