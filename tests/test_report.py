"""What a person sees: reference figures stand apart, copies are named, and a log goes on."""

from recbole_gr2 import console
from recbole_gr2.config import properties_folder, read_yaml
from recbole_gr2.report import SHOWN, copies, latex_tables, metrics_table, pairs_table, published


def row(name: str, scope: str = "in_list", unchanged: float | None = 0.5, ndcg: float = 0.5) -> dict:
    versus = {"ndcg@5": {"diff": ndcg - 0.5, "low": ndcg - 0.6, "high": ndcg - 0.4, "p": 0.5, "p_holm": 1.0}}
    return {
        "row": name,
        "scope": scope,
        "n": 10,
        "metrics": {"recall@1": 0.25, "ndcg@5": ndcg},
        "unchanged": unchanged,
        "vs_base": {} if name == "base" else versus,
    }


def test_published_figures_have_known_metrics_and_ranges():
    figures = read_yaml((properties_folder() / "published.yaml").read_text(encoding="utf-8"))
    assert set(figures) == {"amazon-beauty", "amazon-sports"}
    values = [
        (metric, value)
        for scopes in figures.values()
        for rows in scopes.values()
        for row in rows.values()
        for metric, value in row.items()
    ]
    assert len(values) > 60 and {metric for metric, _ in values} <= set(SHOWN)
    assert all(0 < value < 1 for _, value in values)
    assert all(value > 0.2 for rows in figures.values() for r in rows["in_list"].values() for value in r.values())


def test_published_figures_are_shown_for_their_data_set_alone():
    text = "\n".join(published("amazon-beauty"))
    assert "RL, rejection, KP (GR2)" in text and "0.5234" in text and "for reference" in text
    assert published("ml-100k") == []


def test_pairs_table():
    found = {
        "recall@1": {"diff": 0.0125, "low": -0.001, "high": 0.0234, "p": 0.04, "p_holm": 0.08},
        "ndcg@5": {"diff": -0.5, "low": -0.6, "high": -0.4, "p": 0.0001, "p_holm": 0.0002},
    }
    table = pairs_table({"pairs": [{"row": "sft", "versus": "evidence", "metrics": found}]}).splitlines()
    assert table[0].split("  ")[0] == "rows"
    assert table[-1].split() == [
        "sft",
        "-",
        "evidence",
        "+0.0125",
        "[-0.0010,",
        "+0.0234]",
        "0.0800",
        "-0.5000",
        "[-0.6000,",
        "-0.4000]",
        "0.0002",
    ]


def test_copies_and_rows_without_lists():
    result = {
        "rows": [
            row("base", unchanged=1.0),
            row("oracle", unchanged=1.0, ndcg=1.0),
            row("sft", unchanged=1.0),
            row("rl"),
            row("SASRec", unchanged=None),
        ]
    }
    assert copies(result) == ["sft"]
    table = metrics_table(result, "in_list").splitlines()
    assert next(line for line in table if line.startswith("SASRec")).rstrip().endswith("%") is True
    assert next(line for line in table if line.startswith("sft")).rstrip().endswith("100.0%")


def test_latex_tables():
    """The best figure as printed is bold, ties as well; oracle and shuffled make no claim; constants are left out."""
    ndcg = {"base": 0.5, "oracle": 1.0, "one_row": 0.61234, "rl": 0.61233, "shuffled": 0.7}
    rows = [row(name, scope, ndcg=value) for scope in ("all", "in_list") for name, value in ndcg.items()]
    lines = latex_tables({"dataset": "x", "seeds": [1], "rows": rows}).splitlines()
    assert lines[0] == "% x, all users" and lines[3].split() == ["&", "ndcg@5", r"\\"] and len(lines) == 25
    told = [line.split()[0::2] for line in lines[5:10]]
    assert told == [
        ["base", "0.5000"],
        ["oracle", "1.0000"],
        [r"one\_row", r"\textbf{0.6123}"],
        ["rl", r"\textbf{0.6123}"],
        ["shuffled", "0.7000"],
    ]


def test_latex_tables_of_several_seeds():
    ndcg = {"base": (0.5, 0.01), "oracle": (1.0, 0.0), "sft": (0.6, 0.0234)}
    rows = [
        {"row": name, "scope": scope, "metrics": {"ndcg@5": {"mean": mean, "sd": sd}}}
        for scope in ("all", "in_list")
        for name, (mean, sd) in ndcg.items()
    ]
    text = latex_tables({"dataset": "x", "seeds": [1, 2], "rows": rows})
    assert text.count(r"sft & \textbf{0.6000 $\pm$ 0.0234} \\") == 2 and text.count("textbf") == 2


def test_progress_in_a_log(monkeypatch, capsys):
    """A line a minute, none where it goes fast, and every thing comes once."""
    now = iter(range(0, 1000, 32))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    assert list(console.progress("abcdefgh", "answers")) == list("abcdefgh")
    assert capsys.readouterr().err.splitlines() == [
        "        answers: 1 of 8 batches, 01:04 gone, 07:28 to go",
        "        answers: 3 of 8 batches, 02:08 gone, 03:33 to go",
        "        answers: 5 of 8 batches, 03:12 gone, 01:55 to go",
        "        answers: 7 of 8 batches, 04:16 gone, 00:36 to go",
    ]
    monkeypatch.setattr(console.time, "monotonic", lambda: 0.0)
    assert list(console.progress(range(3), "answers")) == [0, 1, 2] and not capsys.readouterr().err
