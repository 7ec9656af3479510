"""The temporal and the ready-made split: rows of RecBole, and no knowledge of what comes after a cut."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from recbole_gr2.artifacts import read_requests
from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.splits import ready_made, temporal, timestamp
from recbole_gr2.bridge.training import train_model
from recbole_gr2.errors import ConfigurationError, MissingFileError

SHARES = {"split": {"RS": [0.7, 0.15, 0.15]}, "order": "TO", "group_by": "none"}
DATES = {"split": {"date": [60, 80]}, "order": "TO"}
MODELS = ["PairCounts", "ItemKNN"]


def copy_interleaved(folder: Path, copy: Path, *, change_from: float = np.inf, remove_from: float = np.inf) -> Path:
    """Copy the data set `tiny` with times at which the interactions of different users alternate.

    The interaction at position n of a user has a time from 10 n to 10 n + 9. Two further users have all items, in the
    first lines, so that the internal ids are equal in all copies.

    Args:
        folder: the folder that holds tiny/.
        copy: the folder for the copy.
        change_from: interactions from this time on get another item.
        remove_from: interactions from this time on are removed.
    """
    shutil.copytree(folder / "tiny", copy / "tiny")
    file = copy / "tiny" / "tiny.inter"
    header, *lines = file.read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    items, rng, position = sorted({row[1] for row in rows}), random.Random(1), {}
    seen = {user: {row[1] for row in rows if row[0] == user} for user in {row[0] for row in rows}}
    written = []
    for user, item, rating, _ in rows:
        position[user] = position.get(user, -1) + 1
        time = 10 * position[user] + int(user[1:]) % 10
        if time >= change_from:
            item = rng.choice([other for other in items if other not in seen[user]])
            seen[user].add(item)
        if time < remove_from:
            written.append(f"{user}\t{item}\t{rating}\t{time}")
    first = [f"{('first', 'second')[n % 2]}\t{item}\t3\t{n % 40}" for n, item in enumerate(items)]
    file.write_text("\n".join([header, *first, *written]) + "\n")
    return copy


@pytest.fixture(scope="module")
def interleaved(tiny_data, tmp_path_factory) -> Path:
    return copy_interleaved(tiny_data, tmp_path_factory.mktemp("interleaved") / "data")


@pytest.fixture
def data(tiny_settings, interleaved, tmp_path) -> Data:
    return Data(tiny_settings(tmp_path, data_path=str(interleaved), eval_args=DATES))


def test_cuts_and_positions_by_hand():
    users = np.array([1, 1, 1, 1, 1, 2, 2, 2, 3, 3])
    times = np.array([1, 2, 3, 6, 8, 2, 5, 7, 9, 10.0])
    numbers = {"size": 4, "targets": 2, "requests": 2}
    split = temporal(users, times, given={"date": [6, 8]}, **numbers)
    # Two interactions are in validation (6, 7), so the training periods are 3 to 5 and 2 to 2.
    assert split.cuts == {"train-2": 2.0, "train": 3.0, "valid": 6.0, "test": 8.0}
    assert {name: starts.tolist() for name, starts in split.starts.items()} == {
        "train": [0, 2, 1, 0],
        "train-2": [0, 1, 0, 0],
        "valid": [0, 3, 2, 0],
        "test": [0, 4, 0, 0],
    }
    assert split.stops["train"].tolist()[1:3] == [3, 2] and split.stops["test"][1] == 5
    assert {name: known.tolist() for name, known in split.known.items()} == {
        "train": [0, 3, 2, 0],
        "hold_out": [0, 1, 0, 0],
        "refit": [0, 4, 3, 0],
    }
    assert split.held_out.tolist() == [0, 2, 2, 0]
    shares = temporal(users, times, given={"RS": [6, 2, 2]}, **numbers)
    assert shares.cuts == {"train-2": 2.0, "train": 5.0, "valid": 7.0, "test": 9.0}


def test_equal_times_are_on_one_side_of_a_cut():
    split = temporal(
        np.repeat([1, 2], 5),
        np.array([1, 2, 3, 3, 5, 1, 2, 3, 3, 5.0]),
        size=3,
        given={"RS": [6, 2, 2]},
        targets=1,
        requests=1,
    )
    assert split.cuts == {"train": 2.0, "valid": 3.0, "test": 5.0}


@pytest.mark.parametrize("given", [{"date": [0, 5]}, {"date": [5, 5]}, {"date": [5, 99]}, {"RS": [1, 1, 8]}])
def test_a_period_without_interactions_is_refused(given):
    with pytest.raises(ConfigurationError, match="a period has no interaction"):
        temporal(np.repeat([1, 2], 5), np.tile(np.arange(5.0), 2), size=3, given=given, targets=1, requests=1)


def test_dates_are_seconds_in_utc():
    assert timestamp("2014-01-31") == 1391126400 and timestamp("2014-01-31 01:00") == 1391130000
    with pytest.raises(ConfigurationError, match="'soon' is no date"):
        timestamp("soon")


@pytest.mark.parametrize("protocol", [DATES, SHARES])
def test_the_target_is_the_first_interaction_of_the_period(tiny_settings, interleaved, tmp_path, protocol):
    data = Data(tiny_settings(tmp_path, data_path=str(interleaved), eval_args=protocol))
    cuts = [*data.split.cuts.values(), np.inf]
    assert len(cuts) == 4
    times = np.split(data.times, np.cumsum([len(items) for items in data.sequences.values()])[:-1])
    for split, start, end in zip(data.split.cuts, cuts[:-1], cuts[1:], strict=True):
        feat, users = data.rows(split)
        expected = {}
        for (user, items), when in zip(data.sequences.items(), times, strict=True):
            inside = items[(when >= start) & (when < end)].tolist()
            if inside and (when < start).any():
                expected[user] = inside[0]
                assert data.history(user, split) == tuple(items[when < start].tolist())
            assert data.targets(user, split) == ({expected[user]: 1} if user in expected else {})
        assert dict(zip(users.tolist(), feat[data.iid].tolist(), strict=True)) == expected
        assert len(expected) == len(users) > 30
        lengths = feat["item_length"].tolist()
        assert lengths == [len(data.history(user, split)) for user in users.tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CausalSASRec", "SASRec", "ItemKNN"])
def test_models_learn_from_what_happened_before_the_cut(data, tmp_path, name):
    rows = {
        kind: train_model(data, tmp_path / kind, model=name, epochs=1, **options)["training_rows"]
        for kind, options in {"base": {}, "hold_out": {"hold_out": True}, "refit": {"refit": True}}.items()
    }
    known = {
        kind: data.split.known[key] for kind, key in (("base", "train"), ("hold_out", "hold_out"), ("refit", "refit"))
    }
    per_user = {"CausalSASRec": lambda n: n > 1, "SASRec": lambda n: np.maximum(n - 1, 0), "ItemKNN": lambda n: n}[name]
    assert rows == {kind: int(per_user(counts).sum()) for kind, counts in known.items()}
    assert rows["hold_out"] <= rows["base"] <= rows["refit"]


def test_known_interactions_end_at_the_cut(data):
    for interactions, name in (("hold_out", "train"), ("train", "valid"), ("refit", "test")):
        frame = dict(
            zip(
                data.sequences,
                np.split(data.times, np.cumsum(list(map(len, data.sequences.values())))[:-1]),
                strict=True,
            )
        )
        expected = {u: items[frame[u] < data.split.cuts[name]].tolist() for u, items in data.sequences.items()}
        known = [items for items in data.known_items(interactions) if items]
        assert known == [items for items in expected.values() if items]


def lists_of(run, split):
    requests = read_requests(run.folders["candidates"] / f"{split}.jsonl", run.data.catalog)
    return {
        request.user_token: (run.data.catalog.tokens(request.items), [c.score for c in request.candidates])
        for request in requests
    }


@pytest.mark.slow
@pytest.mark.parametrize("refit", [False, True])
def test_what_happens_after_a_cut_changes_no_list_before_it(tiny_run, tiny_data, interleaved, tmp_path, refit):
    """Lists and scores are bitwise equal if later items change, or later interactions are removed."""
    cut = {"valid": 60, "test": 80}
    copies = {
        "plain": interleaved,
        "changed from validation on": copy_interleaved(tiny_data, tmp_path / "a", change_from=cut["valid"]),
        "changed from the test on": copy_interleaved(tiny_data, tmp_path / "b", change_from=cut["test"]),
        "removed from 90 on": copy_interleaved(tiny_data, tmp_path / "c", remove_from=90),
    }
    lists = {}
    for name, copy in copies.items():
        run = tiny_run(
            tmp_path / name,
            ["candidates"],
            data_path=str(copy),
            base_model=MODELS,
            cand_num=8,
            refit=refit,
            cand_weights={"PairCounts": 1, "ItemKNN": 1},
            eval_args=DATES,
        )
        lists[name] = {split: lists_of(run, split) for split in ("train", "valid", "test")}
    plain = lists["plain"]
    assert min(map(len, plain.values())) > 40
    for name, split in (
        ("changed from validation on", "train"),
        ("changed from validation on", "valid"),
        ("changed from the test on", "train"),
        ("changed from the test on", "valid"),
        ("changed from the test on", "test"),
        ("removed from 90 on", "train"),
        ("removed from 90 on", "valid"),
    ):
        assert lists[name][split] == plain[split], (name, split)
    remaining = lists["removed from 90 on"]["test"]
    assert len(remaining) > 20 and all(plain["test"][user] == entry for user, entry in remaining.items())
    assert lists["changed from validation on"]["test"] != plain["test"]


@pytest.mark.slow
def test_all_stages_run(tiny_run, interleaved, tmp_path):
    run = tiny_run(tmp_path, data_path=str(interleaved), eval_args=DATES)
    protocol = run.records["candidates"].summary["protocol"]
    assert protocol["split"] == "temporal, validation from 60 and test from 80"
    assert protocol["models of test lists learn from"] == "the training interactions"
    entries = json.loads((run.folders["evaluate"] / "methods.json").read_text())
    methods = {entry["method"]: entry for entry in entries if entry["scope"] == "all_users"}
    assert {"base", "prior", "lambdamart", "sft", "rl", "oracle"} <= methods.keys()
    assert {entry["n"] for entry in methods.values()} == {len(run.data.rows("test")[1])}
    assert len({entry["metrics"]["recall@5"] for entry in methods.values()}) == 1  # The lists have five candidates.
    oracle = methods["oracle"]["metrics"]
    assert oracle["recall@1"] == oracle["ndcg@5"] == oracle["recall@5"]


def test_the_summary_describes_the_split(data):
    summary = data.summary()
    assert summary.cuts == data.split.cuts and summary.future == 0
    assert "temporal: train from " in summary.text() and "0.0% of the test users have no training" in summary.text()
    assert (summary.valid_users, summary.test_users) == tuple(len(data.rows(split)[1]) for split in ("valid", "test"))


# --- ready-made splits -----------------------------------------------------------------------------------------------

FILES = ["train", "valid", "test"]


@pytest.fixture(scope="module")
def parts(tiny_data, tmp_path_factory) -> Path:
    """The data set `tiny` as three files: the leave-one-out split. Every tenth user has no validation target."""
    folder = tmp_path_factory.mktemp("parts") / "tiny"
    folder.mkdir()
    shutil.copy(tiny_data / "tiny" / "tiny.item", folder)
    header, *lines = (tiny_data / "tiny" / "tiny.inter").read_text().splitlines()
    users = {line.split("\t")[0]: [] for line in lines}
    for line in sorted(lines, key=lambda line: float(line.split("\t")[3])):
        users[line.split("\t")[0]].append(line)
    files = {name: [header] for name in FILES}
    for number, own in enumerate(users.values()):
        files["test"].append(own.pop())
        if number % 10:
            files["valid"].append(own.pop())
        files["train"] += own
    for name, rows in files.items():
        (folder / f"tiny.{name}.inter").write_text("\n".join(rows) + "\n")
    return folder.parent


def test_positions_of_a_ready_made_split_by_hand():
    users, files = np.array([1, 1, 1, 1, 1, 2, 2, 3, 4]), np.array([0, 0, 0, 1, 2, 0, 2, 2, 0])
    split = ready_made(users, files, tokens=list("-abcd"), targets=1, requests=2)
    assert {name: starts.tolist() for name, starts in split.starts.items()} == {
        "train": [0, 2, 0, 0, 0],
        "train-2": [0, 1, 0, 0, 0],
        "valid": [0, 3, 0, 0, 0],
        "test": [0, 4, 1, 0, 0],  # the third user has no history
    }
    assert {name: known.tolist() for name, known in split.known.items()} == {
        "train": [0, 3, 1, 0, 1],
        "hold_out": [0, 1, 0, 0, 0],
        "refit": [0, 4, 1, 0, 1],
    }
    assert split.stops["train"][1] == 3 and split.held_out.tolist() == [2] * 5 and not split.cuts


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([0, 1, 1, 0], "the user 'a' has 2 interactions in the file of validation"),
        ([0, 2, 2, 0], "the user 'a' has 2 interactions in the file of test"),
        ([2, 0, 0, 0], "the user 'a' has an interaction in the file of test that is older than one in the file of tr"),
        ([0, 2, 1, 0], "'a' has an interaction in the file of test that is older than one in the file of validation"),
    ],
)
def test_a_ready_made_split_with_another_order_is_refused(files, message):
    with pytest.raises(ConfigurationError, match=message):
        ready_made(np.array([1, 1, 1, 2]), np.array(files), tokens=list("-ab"), targets=1, requests=1)


def test_rows_of_a_ready_made_split(tiny_settings, parts, tiny_data, tmp_path):
    """Users with all targets have the rows and histories of leave-one-out."""
    data = Data(tiny_settings(tmp_path, data_path=str(parts), benchmark_filename=FILES))
    whole = Data(tiny_settings(tmp_path, data_path=str(tiny_data)))
    rows = {}
    for name, each in (("ready", data), ("whole", whole)):
        for split in FILES:
            feat, users = each.rows(split)
            rows[name, split] = {
                each.user_tokens[user]: (
                    each.item_tokens[item],
                    [each.item_tokens[i] for i in each.history(user, split)],
                )
                for user, item in zip(users.tolist(), feat[each.iid].tolist(), strict=True)
            }
    assert rows["ready", "test"] == rows["whole", "test"] and len(rows["ready", "test"]) == 150
    assert len(rows["ready", "valid"]) == 135
    for split in ("train", "valid"):
        kept = {user: row for user, row in rows["ready", split].items() if user in rows["ready", "valid"]}
        assert kept == {user: rows["whole", split][user] for user in kept} and len(kept) == 135
    assert data.summary().input_lines == whole.summary().input_lines
    assert data.split.name == "ready-made" and data.fingerprint != whole.fingerprint


def test_a_missing_file_of_a_ready_made_split_is_an_error(tiny_settings, parts, tmp_path):
    with pytest.raises(MissingFileError, match=r"no tiny\.dev\.inter"):
        Data(tiny_settings(tmp_path, data_path=str(parts), benchmark_filename=["train", "dev", "test"]))


@pytest.mark.slow
def test_a_run_on_a_ready_made_split(tiny_run, parts, tmp_path):
    options = {"base_model": MODELS, "models": ["Pop", "GRU4Rec"], "models_options": {"epochs": 1}, "refit": True}
    run = tiny_run(
        tmp_path, ["evaluate"], data_path=str(parts), benchmark_filename=FILES, eval_rows=["lambdamart"], **options
    )
    summary = run.records["evaluate"].summary
    assert summary["requests"] == 150 and summary["hit_users"] > 20
    assert run.records["candidates"].summary["protocol"]["split"] == "ready-made"
