"""The data summary: its figures by hand, and the data sets that it stops before anything is trained."""

from dataclasses import asdict
from pathlib import Path

import pytest

from recbole_gr2.bridge.data import Data
from recbole_gr2.config import load_settings
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.quick_start import main

# User -> items, oldest first. a repeats i1, which is its test target. The test target of c is in no training data.
SEQUENCES = {
    "a": ["i1", "i2", "i3", "i4", "i1"],
    "b": ["i2", "i3", "i1", "i4"],
    "c": ["i3", "i1", "i5"],
    "d": ["i1", "i2"],
    "e": ["i4"],
}
TITLES = {"i1": "One", "i2": "nan", "i3": "", "i4": "Four", "i9": "Never bought"}


def write(folder: Path, rows: list[tuple[str, str, int]], titles: dict[str, str]) -> None:
    (folder / "toy").mkdir(parents=True)
    inter = ["user_id:token\titem_id:token\ttimestamp:float", *("\t".join(map(str, row)) for row in rows)]
    item = ["item_id:token\ttitle:token_seq", *map("\t".join, titles.items())]
    (folder / "toy" / "toy.inter").write_text("\n".join(inter) + "\n")
    (folder / "toy" / "toy.item").write_text("\n".join(item) + "\n")


def chosen(folder: Path, **options):
    return load_settings(config_dict={"preset": "smoke", "dataset": "toy", "data_path": str(folder), **options})


def rows_of(sequences: dict[str, list[str]]) -> list[tuple[str, str, int]]:
    return [(user, item, n) for user, items in sequences.items() for n, item in enumerate(items)]


def test_figures_by_hand(tmp_path):
    rows = rows_of(SEQUENCES)
    rows[-2] = ("d", "i2", 0)  # The same time as the interaction before it: one of the four users with several.
    write(tmp_path, rows, TITLES)
    with open(tmp_path / "toy" / "toy.inter", "a") as file:
        file.write("\n")
    summary = Data(chosen(tmp_path)).summary()
    assert asdict(summary) == {
        "users": 5,
        "items": 5,
        "interactions": 15,
        "density": 14 / 25,
        "repeats": 1 / 15,
        "duplicates": 0,
        "times": 5,
        "tied_users": 1 / 4,
        "test_users": 3,
        "valid_users": 2,
        "train_lists": 2,
        "train_targets": 1,
        "split": "leave-one-out",
        "cuts": {},
        "reported": "test",
        "new_users": 0.0,
        "future": 0.0,
        "masked_targets": 1 / 3,
        "reachable_targets": 0,
        "masks_seen": True,
        "without_text": {"title": 3},
        "without_line": 1,
        "without_interactions": 1,
        "input_lines": 15,
        "dropped": {},
        "notes": {"toy.inter: empty lines skipped": 1},
    }
    summary.check()
    warnings = "\n".join(summary.warnings())
    assert (
        "33.3% of the test targets" in warnings and "1 items have no line" in warnings and "same time" not in warnings
    )


def test_training_interactions_that_are_later_than_a_test_interaction(tmp_path):
    """The training times are 0, 1 of a, and 5, 6, 7 of b; the test times are 3 and 9."""
    times = {"a": [0, 1, 2, 3], "b": [5, 6, 7, 8, 9]}
    write(tmp_path, [(user, f"i{n + 1}", time) for user in times for n, time in enumerate(times[user])], TITLES)
    summary = Data(chosen(tmp_path)).summary()
    assert summary.future == pytest.approx((3 / 5 + 0) / 2)
    assert "on average 30.0% of the training interactions are later than a test interaction" in summary.text()


def test_targets_that_can_be_hit(tmp_path):
    """Training items are i1, i2, i3 of a, i2, i3 of b and i3 of c. Only the target of a is among them."""
    write(tmp_path, rows_of(SEQUENCES), TITLES)
    summary = Data(chosen(tmp_path, cand_exclude_seen=False)).summary()
    assert (summary.reachable_targets, summary.masks_seen, summary.masked_targets) == (1, False, 1 / 3)
    assert "at most 1" in summary.text()


def test_figures_of_the_validation_split(tmp_path):
    """Training items are i1, i2 of a, i1, i2 of b. The targets are i1 of a, which is in its history, and i4 of b."""
    sequences = {"a": ["i1", "i2", "i1", "i5"], "b": ["i1", "i2", "i4", "i3"]}
    write(tmp_path, rows_of(sequences), TITLES)
    summary = Data(chosen(tmp_path, eval_split="valid", cand_exclude_seen=False)).summary()
    assert (summary.reachable_targets, summary.masked_targets, summary.reported) == (1, 1 / 2, "validation")
    assert "at most 1: so many validation targets occur in training" in summary.text()
    assert Data(chosen(tmp_path, cand_exclude_seen=False)).summary().reachable_targets == 0


def test_lines_that_are_dropped_are_counted_by_their_cause(tmp_path):
    write(tmp_path, [*rows_of(SEQUENCES), ("b ", "i2", 9)], TITLES)
    options = {"rm_dup_inter": "first", "val_interval": {"timestamp": "[0,4]"}, "user_inter_num_interval": "[2,inf)"}
    summary = Data(chosen(tmp_path, **options)).summary()
    assert summary.input_lines == 16 and summary.interactions == 13
    assert summary.dropped == {"rm_dup_inter": 2, "user_inter_num_interval": 1}
    assert summary.notes == {"toy.inter: blanks at the ends of user_id removed": 1}
    assert "dropped by rm_dup_inter" in summary.text()


def test_lines_that_stand_twice_are_reported(tmp_path):
    rows = rows_of({f"u{n}": ["i1", "i2", "i3", "i4"] for n in range(4)})
    write(tmp_path, [*rows, *rows[:3]], TITLES)
    summary = Data(chosen(tmp_path)).summary()
    assert summary.duplicates == 3
    assert any("3 interactions equal another one" in line and "rm_dup_inter" in line for line in summary.warnings())


def test_ties_of_most_users_are_reported(tmp_path):
    rows = [(f"u{user}", f"i{1 + (user + n) % 4}", n // 2) for user in range(4) for n in range(4)]
    write(tmp_path, rows, TITLES)
    summary = Data(chosen(tmp_path)).summary()
    assert summary.tied_users == 1 and any("100.0% of the users" in line for line in summary.warnings())
    summary.check()


LONG = {f"u{n}": [f"i{1 + (n + step) % 4}" for step in range(4)] for n in range(4)}


@pytest.mark.parametrize(
    ("rows", "titles", "options", "words"),
    [
        pytest.param(
            rows_of({user: items[:3] for user, items in LONG.items()}),
            TITLES,
            {},
            ["no user has 4 or more interactions"],
            id="three interactions",
        ),
        pytest.param(rows_of(LONG), TITLES, {"train_targets": 2}, ["5 or more", "train_targets"], id="two targets"),
        pytest.param(
            rows_of({user: [*items, items[0]] for user, items in LONG.items()}),
            TITLES,
            {},
            ["100.0%", "cand_exclude_seen: False", "rm_dup_inter"],
            id="repeats",
        ),
        pytest.param(
            [row for row in rows_of(LONG) for _ in range(2)],
            TITLES,
            {},
            ["16 interactions equal another one", "cand_exclude_seen", "rm_dup_inter"],
            id="every line twice",
        ),
        pytest.param(
            [(user, item, 7) for user, item, _ in rows_of(LONG)], TITLES, {}, ["TIME_FIELD", "same time"], id="one time"
        ),
        pytest.param(
            rows_of(LONG), {f"{item}.0": "x" for item in TITLES}, {}, ["4 of 4 items", ".item"], id="other ids of items"
        ),
        pytest.param(rows_of(LONG), dict.fromkeys(TITLES, ""), {}, ["no item has a text", "text_title"], id="no texts"),
    ],
)
def test_data_that_cannot_give_a_result_stop_every_command(tmp_path, capsys, rows, titles, options, words):
    write(tmp_path, rows, titles)
    with pytest.raises(ConfigurationError) as error:
        Data(chosen(tmp_path, **options)).summary().check()
    assert all(word in str(error.value) for word in words), str(error.value)
    argv = ["--preset=smoke", "--dataset=toy", f"--data_path={tmp_path}", f"--checkpoint_dir={tmp_path / 'saved'}"]
    argv += [f"--{key}={value}" for key, value in options.items()]
    for command in (["--dry_run"], ["--show_prompt"], ["--stages=embeddings"]):
        assert main([*argv, *command]) == 2
        shown = capsys.readouterr().err
        assert str(error.value) in shown and "users, " in shown
    assert not (tmp_path / "saved").exists()


def test_repeats_are_no_error_if_seen_items_are_recommended(tmp_path):
    write(tmp_path, rows_of({user: [*items, items[0]] for user, items in LONG.items()}), TITLES)
    Data(chosen(tmp_path, cand_exclude_seen=False)).summary().check()


def test_a_run_prints_the_summary(tmp_path, capsys):
    write(tmp_path, rows_of(LONG), TITLES)
    argv = ["--preset=smoke", "--dataset=toy", f"--data_path={tmp_path}", f"--checkpoint_dir={tmp_path}", "--dry_run"]
    assert main([*argv, "--stages=embeddings"]) == 0
    shown = capsys.readouterr().err
    assert "4 users, 4 items, 16 interactions" in shown and "1.00" not in shown.splitlines()[0]
    for name in (
        "density",
        "repeats",
        "ties in time",
        "lists",
        "hit users",
        "missing texts",
        "item file",
        "input lines",
    ):
        assert f"        {name}" in shown
