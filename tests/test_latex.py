"""LaTeX tables for papers: marks, best values, several seeds, several runs, ablations, and their width."""

import re
import shutil
import subprocess
from functools import cache

import pytest
from handmade import finished, recommender
from matplotlib import font_manager, ft2font

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.report import build_result
from recbole_gr2.report.latex import DISPLAY, ablation_table, latex_table, latex_tables
from recbole_gr2.seeds import combine

COLUMN = 252  # pt


def comparison(diff: float, p: float) -> dict:
    return {"diff": diff, "low": diff - 0.1, "high": diff + 0.1, "p": p, "p_holm": p}


def made(figures, *, sd=None, pairs=(), p_base=1.0, dataset="x", preset="laptop", seeds=1) -> dict:
    """A result with these values of recall@5 and ndcg@10 of each method."""
    methods = [
        {
            "method": name,
            "diagnostic": name in ("oracle", "shuffled"),
            "scope": scope,
            "n": [1234] * seeds,
            "metrics": {
                metric: {"mean": value, "sd": sd, "values": [value] * seeds}
                for metric, value in zip(("recall@5", "ndcg@10"), values, strict=True)
            },
            "unchanged": 0.5,
            "vs_base": {} if name == "base" else {m: comparison(0.1, p_base) for m in ("recall@5", "ndcg@10")},
        }
        for scope in ("all_users", "hit_users")
        for name, values in figures.items()
    ]
    comparisons = [
        {
            "method": one,
            "versus": other,
            "scope": "hit_users",
            "metrics": {m: comparison(0.1, p) for m in ("recall@5", "ndcg@10")},
        }
        for one, other, p in pairs
    ]
    return {
        "dataset": dataset,
        "split": "test",
        "preset": preset,
        "seeds": list(range(seeds)),
        "methods": methods,
        "comparisons": comparisons,
    }


FIGURES = {
    "base": (0.5, 0.3),
    "oracle": (1.0, 1.0),
    "prior": (0.6, 0.41234),
    "sft": (0.7, 0.41233),
    "my_own:rank": (0.55, 0.4),
}


def body(table: str) -> dict[str, list[str]]:
    """Name of each line -> its cells, without empty space for marks."""
    text = re.sub(r"\\phantom\{\$\^\{(\\\w+)+\}\$\}", "", table)
    lines = [
        line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r"\\") and "&" in line
    ]
    return {line[0]: line[1:] for line in lines}


def test_best_and_second_best_as_printed():
    lines = body(latex_table({"": made(FIGURES)}))
    assert lines == {
        "Method": ["R@5", "N@10"],
        "Base order": [".5000", ".3000"],
        "Prior": [r"\underline{.6000}", r"\textbf{.4123}"],  # equal as printed: both are best
        "GR2, SFT": [r"\textbf{.7000}", r"\textbf{.4123}"],
        r"my\_own:rank": [".5500", r"\underline{.4000}"],
    }


def test_chosen_methods_and_metrics():
    table = latex_table({"": made(FIGURES)}, methods=["sft", "oracle", "base"], metrics=["ndcg@10"], label="tab:a")
    assert list(body(table)) == ["Method", "GR2, SFT", "Oracle", "Base order"]
    # A diagnostic method does not compete, and there are only two others: no second best.
    assert body(table)["Oracle"] == ["1.0000"] and body(table)["GR2, SFT"] == [r"\textbf{.4123}"]
    assert "Oracle: for reference only." in table and r"\label{tab:a}" in table
    assert table.count(r"\begin{table}") == table.count(r"\end{table}") == 1


def test_marks_of_significance():
    pairs = [("sft", "prior", 0.01), ("prior", "my_own:rank", 0.5)]
    result = made(FIGURES, pairs=pairs, p_base=0.049)
    lines = body(latex_table({"": result}, versus="prior"))
    assert lines["GR2, SFT"][0] == r"\textbf{.7000}$^{\ast\dagger}$"
    assert lines["Prior"][0] == r"\underline{.6000}$^{\ast}$"
    assert lines["Base order"][0] == r".5000$^{\dagger}$"  # the test of the prior against it
    assert lines[r"my\_own:rank"][0] == r".5500$^{\ast}$"
    table = latex_table({"": result}, versus="prior")
    assert r"$^{\dagger}$: from Prior (paired randomization test over users, Holm-adjusted $p < .05$)" in table
    # Each cell of a column is as wide as the widest one.
    widths = {line.count(r"\ast") + line.count(r"\dagger") for line in table.splitlines() if line.endswith(r"\\")}
    assert widths == {4}
    assert r"\ast" not in str(body(latex_table({"": made(FIGURES, p_base=0.05)})))


def test_a_missing_comparison_is_an_error():
    result = made(FIGURES, pairs=[("sft", "prior", 0.01)])
    with pytest.raises(ConfigurationError, match="does not compare my_own:rank with prior"):
        latex_table({"": result}, versus="prior")
    assert "dagger" in latex_table({"": result}, versus="prior", methods=["base", "prior", "sft"])


def test_mistakes_name_the_nearest_names():
    for options, text in (
        ({"methods": ["stf"]}, "did you mean sft"),
        ({"metrics": ["ndgc@10"]}, "did you mean ndcg@10"),
        ({"versus": "priro"}, "did you mean prior"),
    ):
        with pytest.raises(ConfigurationError, match=text):
            latex_table({"": made(FIGURES)}, **options)


def test_several_seeds_have_standard_deviations_below():
    table = latex_table({"": made(FIGURES, sd=0.00123, seeds=3)})
    lines = [line for line in table.splitlines() if "scriptsize" in line]
    assert len(lines) == 4
    assert re.sub(r"\\phantom\{.*?\}\$\}", "", lines[0]) == (
        r" & {\scriptsize $\pm$.0012} & {\scriptsize $\pm$.0012} \\"
    )
    assert "Means and standard deviations over 3 seeds." in table


def test_blocks_of_several_runs():
    """The best values are those of each run."""
    table = latex_table({"a_b": made(FIGURES, dataset="a_b"), "c": made({"base": (0.1, 0.1), "sft": (0.2, 0.2)})})
    first, second = table.split(r"\multicolumn{3}{@{}l}")[1:]
    assert first.startswith(r"{\emph{a\_b}} \\") and r"\textbf{.7000}" in first
    assert r"\textbf{.2000}" in second and table.count("Base order") == 2
    with pytest.raises(ConfigurationError, match="no method over all users 'prior'"):
        latex_table({"a": made(FIGURES), "c": made({"base": (0.1, 0.1)})}, methods=["prior"])


def test_a_smoke_run_is_marked():
    table = latex_tables(made(FIGURES, preset="smoke"))
    assert table.count(r"\caption{\textbf{This is a smoke run") == table.count("% This is a smoke run") == 2


def test_other_metrics_are_shown_without_rank_and_test():
    result = made(FIGURES)
    for entry in result["methods"]:
        values = entry["metrics"].pop("recall@5"), entry["metrics"].pop("ndcg@10")
        entry["metrics"] = {"giniindex@5": values[0], "hit@5": values[1]}
    table = latex_table({"": result})
    assert body(table)["Method"] == ["giniindex@5", "H@5"]
    assert body(table)["GR2, SFT"] == [".7000", r"\textbf{.4123}"]
    assert "There is no test for giniindex@5, H@5." in table


def test_the_table_of_a_validation_run_says_so():
    assert "x, validation split, all users" in latex_table({"": {**made(FIGURES), "split": "valid"}})


# --- ablations -------------------------------------------------------------------------------------------------------

ABLATION = {
    "ablation": "rerank",
    "dataset": "x",
    "split": "test",
    "preset": "laptop",
    "columns": {
        "base ndcg@10": "evaluate.methods.method=base&scope=hit_users.metrics.ndcg@10",
        "accepted": "traces.accepted_share",
        "sft recall@1": "evaluate.methods.method=sft&scope=hit_users.metrics.recall@1",
        "sft ndcg@10": "evaluate.methods.method=sft&scope=hit_users.metrics.ndcg@10",
        "sft - base, from": "evaluate.methods.method=sft&scope=hit_users.vs_base.ndcg@10.low",
    },
    "variants": [
        {
            "name": name,
            "figures": dict(
                zip(
                    ("base ndcg@10", "accepted", "sft recall@1", "sft ndcg@10", "sft - base, from"), values, strict=True
                )
            ),
        }
        for name, values in (
            ("targeted, KP", (0.3, 0.9, 0.4, 0.5, 0.01)),
            ("rejection & KP", (0.3, 0.8, 0.3, 0.6, 0.02)),
            ("failed", (0.3, None, None, None, None)),
        )
    ],
}


def test_variants_of_an_ablation_are_lines():
    lines = body(ablation_table(ABLATION))
    assert lines["Variant"] == [r"\shortstack[r]{sft\\R@1}", r"\shortstack[r]{sft\\N@10}"]
    assert lines["targeted, KP"] == [r"\textbf{.4000}", ".5000"]
    assert lines[r"rejection \& KP"] == [".3000", r"\textbf{.6000}"]
    assert lines["failed"] == ["", ""]
    table = ablation_table(ABLATION, methods=["base"], metrics=["ndcg@10", "accepted"], scope="hit_users")
    assert body(table)["targeted, KP"] == [".3000", ".9000"]
    assert "no tests between variants" in table and r"\label{tab:ablation-rerank}" in table
    for options, text in (({"methods": ["stf"]}, "did you mean sft"), ({"metrics": ["acepted"]}, "mean accepted")):
        with pytest.raises(ConfigurationError, match=text):
            ablation_table(ABLATION, **options)


# --- width -----------------------------------------------------------------------------------------------------------


@cache
def font(bold: bool) -> ft2font.FT2Font:
    """Computer Modern, which matplotlib contains, in 100 pt."""
    face = ft2font.FT2Font(font_manager.findfont("cmb10" if bold else "cmr10"))
    face.set_size(100, 72)
    return face


def width(text: str, size: float, *, bold: bool = False) -> float:
    """Width of a plain text in pt."""
    face = font(bold)
    face.set_text(text)
    return face.get_width_height()[0] / 64 / 100 * size


def cell_width(cell: str) -> float:
    """Width of a cell in the size \\small, which is 9 pt. A mark is 0.5 em of the size of superscripts, 6 pt."""
    marks = (cell.count(r"\ast") + cell.count(r"\dagger")) * 3.5
    cell = re.sub(r"\\phantom\{\$\^\{(\\\w+)+\}\$\}|\$\^\{(\\\w+)+\}\$", "", cell)
    if small := re.fullmatch(r"\{\\scriptsize \$\\pm\$(.*)\}", cell.strip()):
        return width(small[1], 7) + 7 * 0.78 + marks
    bold = r"\textbf" in cell
    plain = re.sub(r"\\(textbf|underline)\{(.*)\}", r"\2", cell).replace("\\_", "-").replace("\\", "").strip()
    return width(plain, 9, bold=bold) + marks


def table_width(table: str) -> float:
    rows = [
        line.removesuffix(r" \\").split(" & ") for line in table.splitlines() if line.endswith(r"\\") and "&" in line
    ]
    columns = list(zip(*rows, strict=True))
    return sum(max(map(cell_width, column)) for column in columns) + 8 * (len(columns) - 1)  # 4 pt on each side


def test_the_counted_width_is_that_of_computer_modern():
    """In cmr10, a digit is 5 pt wide and a full stop 2.78 pt."""
    assert width("0000000000", 10) == pytest.approx(50, abs=0.6)
    assert width("0.0", 10) == pytest.approx(12.78, abs=0.4)


def wide(names, sd=None) -> dict:
    """A result of these methods with four metrics and both marks, for a dagger against the prior."""
    result = made({name: (0.5, 0.3) for name in names}, sd=sd, seeds=3 if sd else 1, p_base=0.01)
    result["comparisons"] = [
        {"method": name, "versus": "prior", "scope": "hit_users", "metrics": {}} for name in names if name != "prior"
    ]
    four = ("recall@1", "recall@5", "ndcg@5", "ndcg@10")
    for entry in result["methods"]:
        entry["metrics"] = {metric: entry["metrics"]["recall@5"] for metric in four}
        entry["vs_base"] = {metric: comparison(0.1, 0.01) for metric in four}
    for pair in result["comparisons"]:
        pair["metrics"] = {metric: comparison(0.1, 0.01) for metric in four}
    return result


@pytest.mark.parametrize("sd", [None, 0.0123])
def test_tables_fit_one_column(sd, tmp_path):
    """With every method of the package, four metrics, and both marks."""
    table = latex_table({"": wide(DISPLAY, sd)}, versus="prior", methods=list(DISPLAY))
    assert 150 < table_width(table) <= COLUMN
    run = finished(tmp_path, entries=[recommender(0.1, 60)])
    assert table_width(latex_tables(build_result([run], ""))) <= COLUMN


def test_a_run_of_several_seeds(tmp_path):
    runs = [finished(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    table = latex_table({"": combine(runs, "the command", 200)}, scope="hit_users")
    assert r"{\scriptsize $\pm$.0000}" in table and table_width(table) <= COLUMN


@pytest.mark.slow
def test_latex_compiles_the_tables_within_a_column(tmp_path):
    """In the standard class, whose columns are 229.5 pt wide: long names, marks, deviations, and an ablation."""
    if shutil.which("pdflatex") is None:
        pytest.skip("LaTeX is not installed")
    names = ["base", "oracle", "prior", "shuffled", "my_module.rerankers:a_long_name_of_50%_<b|c>", "a & b ~ #1 ^2 {x}"]
    tables = {
        "every": latex_table({"": wide(DISPLAY)}, versus="prior", methods=list(DISPLAY)),
        "long": latex_table({"": wide(names, 0.0123)}, versus="prior", methods=names, label="tab:long"),
        "blocks": latex_table({"a_b": made(FIGURES, dataset="a_b"), "c": made(FIGURES)}),
        "variants": ablation_table(ABLATION, metrics=list(ABLATION["columns"])),
    }
    for name, table in tables.items():
        (tmp_path / f"{name}.tex").write_text(table)
    lines = [r"\documentclass[twocolumn]{article}", r"\usepackage{booktabs,graphicx}", r"\begin{document}"]
    lines += [*(rf"\input{{{name}}}" for name in tables), r"\end{document}"]
    (tmp_path / "paper.tex").write_text("\n".join(lines))
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "Overfull" not in done.stdout and (tmp_path / "paper.pdf").stat().st_size > 10_000
