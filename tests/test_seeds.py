"""Several seeds in one report: means, paired differences by user, and the command on a small run."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from handmade import RANKS, finished, recommender

from recbole_gr2.console import Console
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.quick_start import main
from recbole_gr2.ranking import METRICS, holm, paired_comparison
from recbole_gr2.report import build_result, write_report
from recbole_gr2.seeds import combine, compare, run_seeds


def frame(users: str, base: list[int], sft: list[int]) -> pd.DataFrame:
    return pd.DataFrame({"user": list(users), "base": base, "sft": sft})


def test_differences_are_added_up_by_user():
    one, two = frame("abc", [2, 1, 3], [1, 1, 1]), frame("bcd", [1, 4, 5], [2, 1, 5])
    found = compare([one, two], "sft", "base", seed=3, draws=10_000)["recall@1"]
    # a: +1; b: 0 and -1; c: +1 and +1; d: 0; over six candidate lists
    assert found["diff"] == pytest.approx(2 / 6)
    by_hand = paired_comparison(np.array([1.0, -1.0, 2.0, 0.0]), np.zeros(4), seed=3)
    assert found["p"] == by_hand["p"] and found["low"] == pytest.approx(by_hand["low"] * 4 / 6)
    same = compare([one, one], "sft", "base", seed=3, draws=10_000)["ndcg@5"]  # equal lists are no further users
    once = compare([one], "sft", "base", seed=3, draws=10_000)["ndcg@5"]
    assert same == pytest.approx(once)


def test_differences_over_all_users():
    one, two = frame("abc", [2, 1, 3], [1, 1, 1]), frame("bcd", [1, 4, 5], [2, 1, 5])
    found = compare([one, two], "sft", "base", seed=3, draws=10_000, counts=[20, 20])["recall@1"]
    by_hand = paired_comparison(np.array([1.0, -1.0, 2.0, *[0.0] * 17]), np.zeros(20), seed=3)
    assert found["diff"] == pytest.approx(2 / 40) and found["p"] == by_hand["p"]
    assert found["high"] == pytest.approx(by_hand["high"] / 2)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs of two seeds with a recommender and a method that the second seed lacks, and their result."""
    folder = tmp_path_factory.mktemp("two")
    other = {**RANKS, "sft": [1, 1, 2, 2, 2, 9]}
    del other["prior"]
    runs = [
        finished(folder / "1", seed=1, entries=[recommender(-0.05, 60)]),
        finished(folder / "2", seed=2, ranks=other, users="bcdefg", everyone=30, entries=[recommender(-0.02, 30)]),
    ]
    return runs, combine(runs, "the command", 400)


def test_means_and_standard_deviations(two):
    runs, result = two
    assert result["seeds"] == [1, 2] and result["command"] == "the command"
    assert result["runs"] == [str(run.path) for run in runs]
    entries = {(entry["method"], entry["scope"]): entry for entry in result["methods"]}
    assert {method for method, _ in entries} == {"base", "oracle", "sft", "shuffled", "SASRec"}  # those of all seeds
    sft = entries["sft", "hit_users"]
    values = [round(float((run.per_user()["sft"] == 1).mean()), 4) for run in runs]
    assert sft["metrics"]["recall@1"] == {
        "mean": pytest.approx(np.mean(values)),
        "sd": pytest.approx(np.std(values, ddof=1)),
        "values": values,
    }
    assert sft["n"] == [6, 6] and entries["sft", "all_users"]["n"] == [60, 30]
    unchanged = [(run.per_user()["sft"] == run.per_user()["base"]).mean() for run in runs]
    assert sft["unchanged"] == pytest.approx(np.mean(unchanged))
    assert entries["SASRec", "all_users"]["unchanged"] is None
    (tokenizer,) = [stage for stage in result["stages"] if stage["stage"] == "tokenizer"]
    assert tokenizer["key"] == ["tokenizer-1", "tokenizer-2"] and tokenizer["seconds"] == [11.0, 12.0]
    assert tokenizer["cached"] == [False, False] and tokenizer["peak_memory_mb"] == [101, 101]
    assert result["tokenizer"] == {"uniqueness": [1.0, 1.0]}
    assert result["curves"]["sft"] == {"loss": [3.0, 1.0]} and result["truth"]["sft"]["kind"] == 0.75


def test_tests_of_all_seeds(two):
    """The user is the unit; a family is adjusted together; diagnostic methods are in none."""
    runs, result = two
    frames = [run.per_user() for run in runs]
    family, everyone = {}, {}
    for entry in result["methods"]:
        method, scope, versus = entry["method"], entry["scope"], entry["vs_base"]
        if method == "base":
            assert versus == {}
        elif method == "SASRec":  # per_user.csv has no ranks of it
            assert versus == {"ndcg@10": {"diff": pytest.approx((-0.05 * 60 - 0.02 * 30) / 90)}}
        else:
            assert set(versus) == set(METRICS)
            ranks = [(f[method].to_numpy(), f["base"].to_numpy()) for f in frames]
            total = sum((METRICS["ndcg@5"](ours) - METRICS["ndcg@5"](base)).sum() for ours, base in ranks)
            assert versus["ndcg@5"]["diff"] == pytest.approx(total / (12 if scope == "hit_users" else 90))
        if method in ("oracle", "shuffled"):
            assert not any("p_holm" in comparison for comparison in versus.values())
        elif method == "sft":
            (family if scope == "hit_users" else everyone).update({("base", m): c for m, c in versus.items()})
    assert [(pair["method"], pair["versus"]) for pair in result["comparisons"]] == [("sft", "shuffled")]
    (pair,) = result["comparisons"]
    assert pair["scope"] == "hit_users" and not any("p_holm" in comparison for comparison in pair["metrics"].values())
    for tests in (family, everyone):
        assert {place: c["p_holm"] for place, c in tests.items()} == holm({place: c["p"] for place, c in tests.items()})


def test_comparisons_are_adjusted_with_the_differences_to_base(tmp_path):
    runs = [finished(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    result = combine(runs, "", 400)
    assert [(pair["method"], pair["versus"]) for pair in result["comparisons"]] == [
        ("sft", "prior"),
        ("sft", "shuffled"),
    ]
    tests = {
        (entry["method"], metric): comparison
        for entry in result["methods"]
        if entry["scope"] == "hit_users" and entry["method"] in ("prior", "sft")
        for metric, comparison in entry["vs_base"].items()
    }
    tests |= {("pair", metric): comparison for metric, comparison in result["comparisons"][0]["metrics"].items()}
    assert {place: c["p_holm"] for place, c in tests.items()} == holm({place: c["p"] for place, c in tests.items()})


@pytest.mark.parametrize("seeds", [(1,), (1, 1), (2, 3, 2)])
def test_seeds_have_to_differ(seeds):
    with pytest.raises(ConfigurationError, match="two or more different"):
        run_seeds(seeds, lambda seed: None, draws=10, command="", console=Console())


@pytest.mark.slow
def test_each_seed_is_run_and_reported(tmp_path, capsys):
    started = []

    def one(seed: int) -> Path:
        run = finished(tmp_path / str(seed), seed=seed)
        started.append(run)
        return write_report(run.path.parent, build_result([run], run.command), [run], Console())

    path = run_seeds((4, 2), one, draws=200, command="the command", console=Console())
    assert [run.seed for run in started] == [4, 2] and path.parent.parent == started[0].path.parent.parent
    assert json.loads(path.read_text()) == combine(started, "the command", 200)
    assert "seed 2, 2 of 2" in capsys.readouterr().err


def test_no_report_without_results(tmp_path):
    """A dry run, or a run without the evaluate stage, has no result."""
    assert run_seeds((1, 2), lambda seed: None, draws=10, command="", console=Console()) is None


@pytest.mark.slow
def test_the_command(finished_command, tmp_path, capsys):
    """Two seeds of a table without a language model; the same command again finds both."""
    argv = [
        *finished_command.argv[:2],
        *("--checkpoint_dir", str(tmp_path), "--eval_rows=[lambdamart]", "--stages", "evaluate", "--seeds", "2020,7"),
    ]
    assert main([*argv, "--dry_run"]) == 0 and capsys.readouterr().out == ""
    for _ in range(2):
        assert main(argv) == 0
        captured = capsys.readouterr()
    assert len(re.findall(r"stage \d+ of \d+: \S+ cached\n", captured.err)) > 10
    assert ", run (" not in captured.err
    path = Path(captured.out.strip())
    result = json.loads(path.read_text())
    assert result["seeds"] == [2020, 7] and result["dataset"] == "tiny"
    single = [json.loads(Path(run).read_text()) for run in result["runs"]]
    assert [one["seeds"] for one in single] == [[2020], [7]] and "--seed=7" in single[1]["command"]
    assert "--seeds" not in single[1]["command"]
    for number, entry in enumerate(result["methods"]):
        values = [one["methods"][number]["metrics"]["ndcg@5"]["mean"] for one in single]
        assert entry["metrics"]["ndcg@5"]["values"] == values
        assert entry["metrics"]["ndcg@5"]["mean"] == pytest.approx(np.mean(values))
    report = (path.parent / "report.md").read_text()
    assert "seeds 2020, 7" in report and "prior - lambdamart" in report and "base rank 1" in report
    assert main([*argv, "--seed=3"]) == 2 and "remove --seed" in capsys.readouterr().err
    assert main([*argv[:-1], "2020"]) == 2
