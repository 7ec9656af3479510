"""Several seeds in one table: means, paired differences by user, and the command on a small run."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recbole_gr2.quick_start import main
from recbole_gr2.ranking import paired_comparison
from recbole_gr2.report import slices_table
from recbole_gr2.seeds import combine, compare, render_seeds, run_seeds, seeds_table


def frame(users: str, base: list[int], sft: list[int]) -> pd.DataFrame:
    return pd.DataFrame(
        {"user": list(users), "history": [5] * len(users), "popularity": [2] * len(users), "base": base, "sft": sft}
    )


def test_differences_are_added_up_by_user():
    one, two = frame("abc", [2, 1, 3], [1, 1, 1]), frame("bcd", [1, 4, 5], [2, 1, 5])
    found = compare([one, two], "sft", "base", seed=3, draws=10_000)["recall@1"]
    # a: +1; b: 0 and -1; c: +1 and +1; d: 0; over six lists
    assert found["diff"] == pytest.approx(2 / 6)
    own = paired_comparison(np.array([1.0, -1.0, 2.0, 0.0]), np.zeros(4), seed=3)
    assert found["p"] == own["p"] and found["low"] == pytest.approx(own["low"] * 4 / 6)
    same = compare([one, one], "sft", "base", seed=3, draws=10_000)["ndcg@5"]  # the same lists twice are no more users
    once = compare([one], "sft", "base", seed=3, draws=10_000)["ndcg@5"]
    assert same == pytest.approx(once)


def test_slices_by_hand():
    lists = frame("abcdef", [1, 2, 3, 4, 6, 9], [1, 1, 4, 6, 2, 5])
    lists["history"], lists["popularity"] = [2, 2, 3, 9, 9, 9], [1, 1, 1, 1, 1, 1]
    lines = [line.split() for line in slices_table([lists]).splitlines()[2:]]
    table = {" ".join(line[:-3]): line[-3:] for line in lines}
    assert table["base rank 1"] == ["1", "1.0000", "1.0000"]
    assert table["base rank 2 to 3"] == ["2", f"{(1 / np.log2(3) + 0.5) / 2:.4f}", f"{(1 + 1 / np.log2(5)) / 2:.4f}"]
    assert table["base rank 4"] == ["1", f"{1 / np.log2(5):.4f}", "0.0000"]
    assert table["base rank 6 to 9"][:2] == ["2", "0.0000"]
    assert table["items of history 2"][0] == "2" and "target taken" not in str(table)  # all alike: nothing to slice


def written(folder: Path, seed: int, recall: float, per_user: pd.DataFrame) -> Path:
    (folder / "evaluate").mkdir(parents=True)
    per_user.to_csv(folder / "evaluate" / "per_user.csv", index=False)
    rows = [
        {"row": row, "scope": scope, "n": 3, "metrics": {"recall@1": recall, "ndcg@5": ndcg}, "unchanged": recall}
        for scope in ("all", "in_list")
        for row, ndcg in [("base", 0.5), ("oracle", 1), ("sft", 0.6)]
    ]
    stages = [{"stage": stage, "seconds": seed, "peak_memory_mb": 100, "code": "1 ab"} for stage in ("sft", "rl")]
    result = {
        "dataset": "x",
        "base_model": "b",
        "llm": "l",
        "preset": "p",
        "seeds": [seed],
        "rows": rows,
        "settings": {"sft_steps": {"value": 5, "from": "command line"}},
        "stages": stages,
        "truth": {"sft": dict.fromkeys(("habit", "kind", "why", "all"), recall)},
        "curves": {"sft": {"loss": [2.0, recall]}},
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "run.json").write_text(json.dumps({"stages": {"evaluate": str(folder / "evaluate")}}))
    return folder / "result.json"


def test_means_and_standard_deviations(tmp_path):
    paths = [
        written(tmp_path / "one", 1, 0.2, frame("abc", [2, 1, 3], [1, 1, 1])),
        written(tmp_path / "two", 2, 0.4, frame("bcd", [1, 4, 5], [2, 1, 5])),
    ]
    result, frames = combine(paths, "the command", 2000)
    assert result["seeds"] == [1, 2] and len(frames) == 2
    assert result["stages"][1] == {"stage": "rl", "seconds": [1, 2], "peak_memory_mb": [100] * 2, "code": ["1 ab"] * 2}
    assert result["curves"] == {"sft": {"loss": [2.0, pytest.approx(0.3)]}}
    sft = next(row for row in result["rows"] if (row["row"], row["scope"]) == ("sft", "in_list"))
    assert sft["metrics"]["recall@1"] == pytest.approx({"mean": 0.3, "sd": np.std([0.2, 0.4], ddof=1)})
    assert [(pair["row"], pair["versus"]) for pair in result["pairs"]] == [("sft", "base")]
    assert all(c["p_holm"] >= c["p"] for c in result["pairs"][0]["metrics"].values())
    base, oracle, sft = seeds_table(result, "in_list").splitlines()[2:]
    assert "0.3000 ± 0.1414" in sft and sft.split()[-2:] == ["+20.0%", "30.0%"]
    assert oracle.split()[-2] == "+100.0%" and base.split()[-2:] == ["0.0000", "30.0%"]
    report = [line.split() for line in render_seeds(result, frames).splitlines()]
    for line in (
        "sft loss 2.0000 0.3000",
        "sft_steps 5 command line",
        "rl 1 s 2 s 100 MiB 1 ab",
        "all 2 s 4 s",
        "sft 30.0% 30.0% 30.0% 30.0%",
    ):
        assert line.split() in report


@pytest.mark.parametrize("seeds", [(1,), (1, 1), (2, 3, 2)])
def test_seeds_have_to_differ(seeds):
    from recbole_gr2.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match="two or more different"):
        run_seeds(seeds, lambda seed: None, draws=10, command="", console=None)


def test_the_command(tmp_path, capsys):
    """Two seeds of a table without a language model; the same command again finds both."""
    argv = [
        "--preset",
        "smoke",
        "--checkpoint_dir",
        str(tmp_path),
        "--eval_rows=[lambdamart]",
        "--stages",
        "evaluate",
        "--seeds",
        "2020,7",
    ]
    assert main([*argv, "--dry_run"]) == 0 and capsys.readouterr().out == ""
    for _ in range(2):
        assert main(argv) == 0
        captured = capsys.readouterr()
    assert captured.err.count(" cached  ") > 10 and ": run (" not in captured.err
    path = Path(captured.out.strip())
    result = json.loads(path.read_text())
    assert result["seeds"] == [2020, 7] and result["dataset"] == "ml-100k"
    lone = [json.loads(Path(run).read_text()) for run in result["runs"]]
    assert [one["seeds"] for one in lone] == [[2020], [7]] and "--seed=7" in lone[1]["command"]
    assert "--seeds" not in lone[1]["command"]
    for number, row in enumerate(result["rows"]):
        values = [one["rows"][number]["metrics"]["ndcg@5"] for one in lone]
        assert row["metrics"]["ndcg@5"]["mean"] == pytest.approx(np.mean(values))
    report = (path.parent / "report.md").read_text()
    assert "2 seeds" in report and "evidence - lambdamart" in report and "base rank 1" in report
    assert main([*argv, "--seed=3"]) == 2 and "leave out --seed" in capsys.readouterr().err
    assert main([*argv[:-1], "2020"]) == 2
