"""LaTeX tables for one column of a paper: one or several runs, or an ablation.

They need the packages booktabs and graphicx. LaTeX measures a table and scales one that is wider than the column to the
width of the column.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recbole_gr2.errors import ConfigurationError, nearest
from recbole_gr2.report.result import BASE, SCOPES, in_scope
from recbole_gr2.report.tables import data_title, metrics_of
from recbole_gr2.report.verdict import LEVEL, banner

METRICS = ("recall@1", "recall@5", "ndcg@5", "ndcg@10")  # of a table, if the run has one of them
COLUMNS = 4  # number of metrics of a table of a run that has none of them
DISPLAY = {  # name of a method -> name in a paper; other methods keep their names
    "base": "Base order",
    "oracle": "Oracle",
    "prior": "Prior",
    "lambdamart": "LambdaMART",
    "midtrain": "Mid-trained LM",
    "sft": "GR2, SFT",
    "rl": "GR2, RL",
    "shuffled": "GR2, RL, shuffled",
    "distilled": "GR2, distilled",
    "internalised": "GR2, no reasoning",
    "score": "LLM, one pass",
    "onerec_think": "OneRec-Think",
    "onerec_think-no-think": "OneRec, no reasoning",
}
KINDS = {  # of metrics for which a larger value is better: abbreviation and name
    "recall": ("R", "Recall"),
    "ndcg": ("N", "NDCG"),
    "mrr": ("M", "MRR"),
    "hit": ("H", "Hit"),
    "precision": ("P", "Precision"),
    "map": ("MAP", "mean average precision"),
}
STAR, DAGGER = r"\ast", r"\dagger"
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
PLACE = re.compile(r"evaluate\.methods\.method=(?P<method>[^&]+)&scope=(?P<scope>\w+)\.metrics\.(?P<metric>.+)")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a table.

    Attributes:
        value: the number; None for an empty cell.
        sd: its standard deviation over seeds; None for one seed.
        marks: marks of significance.
        text: the text of a cell that is no number.
    """

    value: float | None
    sd: float | None = None
    marks: str = ""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a table: its name, its cells, and whether it takes part in the choice of the best values."""

    name: str
    cells: Sequence[Cell]
    competes: bool = True


@dataclass(frozen=True, kw_only=True)
class Block:
    """Lines of a table that belong together, and their title."""

    title: str
    lines: Sequence[Line]


def escape(text: str) -> str:
    r"""Return a text with the characters that mean something to LaTeX escaped.

    >>> print(escape("my_rank 50 %"))
    my\_rank 50 \%
    """
    return "".join(SPECIAL.get(character, character) for character in " ".join(text.split()))


def latex_tables(result: Mapping[str, Any]) -> str:
    """Return table.tex of a run: a table of each scope.

    Args:
        result: content of result.json.
    """
    return "\n".join(latex_table({"": result}, scope=scope) for scope in SCOPES if in_scope(result, scope))


def latex_table(
    results: Mapping[str, Mapping[str, Any]],
    *,
    methods: Sequence[str] = (),
    metrics: Sequence[str] = (),
    scope: str = "all_users",
    versus: str | None = None,
    caption: str | None = None,
    label: str | None = None,
) -> str:
    """Return a table of one or several runs, with a block for each run.

    In each block the best value of a column is bold and the second best is underlined. Diagnostic methods do not take
    part. A star marks a significant difference to the base order, a dagger one to another method.

    Args:
        results: content of result.json of each run, by its title in the table.
        methods: methods in the order of the lines; by default all of the scope but diagnostic ones.
        metrics: metrics in the order of the columns; by default those of `METRICS`.
        scope: all_users or hit_users.
        versus: the method that daggers refer to.
        caption: the caption, as LaTeX; by default it explains the table.
        label: the label; by default it has the data set and the scope.

    Raises:
        ConfigurationError: a run has no such method or metric, or no comparison of a method with `versus`.
    """
    chosen = {title: _methods(result, scope, methods) for title, result in results.items()}
    columns = _metrics(results, scope, metrics)
    blocks = []
    for title, result in results.items():
        tested = {} if versus is None else _versus(result, scope, versus, chosen[title], columns)
        entries = {entry["method"]: entry for entry in in_scope(result, scope)}
        blocks.append(
            Block(
                title=title,
                lines=[
                    Line(
                        name=DISPLAY.get(name, name),
                        competes=not entries[name]["diagnostic"],
                        cells=[_cell(entries[name], metric, tested.get((name, metric), 1.0)) for metric in columns],
                    )
                    for name in chosen[title]
                ],
            )
        )
    if caption is None:
        caption = _caption(results, scope, columns, versus, blocks)
    datasets = list(dict.fromkeys(result["dataset"] for result in results.values()))
    label = label or f"tab:{'-'.join(datasets)}-{scope}".replace("_", "-")
    header = [_short(metric) for metric in columns]
    ranked = [metric.partition("@")[0] in KINDS for metric in columns]
    warning = next((banner(result) for result in results.values() if banner(result)), "")
    return _table("Method", header, ranked, blocks, caption, label, warning)


def ablation_table(
    result: Mapping[str, Any],
    *,
    methods: Sequence[str] = (),
    metrics: Sequence[str] = (),
    scope: str | None = None,
    caption: str | None = None,
    label: str | None = None,
) -> str:
    """Return a table of an ablation, with a line for each variant. There are no tests between variants.

    Args:
        result: content of result.json of the ablation.
        methods: methods whose metrics are shown; by default the last one that the columns name.
        metrics: metrics, or headings of columns of the ablation, in their order; by default every metric of the methods
            in the order of the ablation.
        scope: only metrics of this scope; by default of every scope.
        caption, label: see `latex_table`.

    Raises:
        ConfigurationError: the ablation has no such column.
    """
    places = {heading: match for heading, path in result["columns"].items() if (match := PLACE.fullmatch(path))}
    known = list(dict.fromkeys(match["method"] for match in places.values()))
    check_names(methods, known, "--methods", "the ablation has no column of the method")
    wanted = methods or known[-1:]
    fitting = [
        heading
        for heading, match in places.items()
        if match["method"] in wanted and scope in (None, match["scope"]) and "@" in match["metric"]
    ]
    if metrics:
        of_metric = list(dict.fromkeys(places[heading]["metric"] for heading in fitting))
        check_names(metrics, [*of_metric, *result["columns"]], "--metrics", "the ablation has no column of the metric")
        shown = [
            heading
            for name in metrics
            for heading in (
                [name] if name in result["columns"] else [h for h in fitting if places[h]["metric"] == name]
            )
        ]
    else:
        shown = fitting or list(result["columns"])
    lines = [
        Line(name=each["name"], cells=[_figure(each["figures"][heading]) for heading in shown])
        for each in result["variants"]
    ]
    headings = []
    for heading in shown:
        first, _, last = heading.rpartition(" ")
        last = _short(last) if "@" in last else escape(last)
        headings.append(rf"\shortstack[r]{{{escape(first)}\\{last}}}" if first else last)
    if caption is None:
        caption = (
            f"Ablation {escape(result['ablation'])} on {escape(data_title(result))}. Best in bold, second best "
            f"underlined. {_abbreviations([h.rpartition(' ')[2] for h in shown])} There are no tests between variants."
        )
        caption = _warned(result) + caption
    ranked = [heading in places and places[heading]["metric"].partition("@")[0] in KINDS for heading in shown]
    label = label or f"tab:ablation-{result['ablation']}".replace("_", "-")
    return _table("Variant", headings, ranked, [Block(title="", lines=lines)], caption, label, banner(result))


def _table(
    first: str,
    header: Sequence[str],
    ranked: Sequence[bool],
    blocks: Sequence[Block],
    caption: str,
    label: str,
    warning: str,
) -> str:
    """Return the table.

    Args:
        first: heading of the first column.
        header: headings of the other columns, as LaTeX.
        ranked: whether a larger value of each column is better.
        blocks: the lines.
        caption, label: as LaTeX.
        warning: a comment at the top, or "".
    """
    lines = [line for block in blocks for line in block.lines]
    # The marks of a column have the same width in each line, so that its numbers are aligned.
    widest = [
        "".join(mark for mark in (STAR, DAGGER) if any(mark in line.cells[n].marks for line in lines))
        for n in range(len(header))
    ]
    body = []
    for block in blocks:
        if block.title:
            body += [r"\midrule", rf"\multicolumn{{{len(header) + 1}}}{{@{{}}l}}{{\emph{{{escape(block.title)}}}}} \\"]
        body.append(r"\midrule" if not block.title else r"\addlinespace[1pt]")
        rivals = [line for line in block.lines if line.competes]
        best = [_best(rivals, n) if ranked[n] else ("", "") for n in range(len(header))]
        for line in block.lines:
            cells = [_shown(cell, best[n] if line.competes else (), widest[n]) for n, cell in enumerate(line.cells)]
            body.append(" & ".join([escape(line.name), *cells]) + r" \\")
            if any(cell.sd is not None for cell in line.cells):
                small = [
                    "" if cell.sd is None else rf"{{\scriptsize $\pm${_number(cell.sd)}}}{_phantom(widest[n])}"
                    for n, cell in enumerate(line.cells)
                ]
                body += [r"\addlinespace[-2pt]", " & ".join(["", *small]) + r" \\", r"\addlinespace[2pt]"]
    return "\n".join(
        [
            *([f"% {warning}"] if warning else []),
            r"\begin{table}",
            r"\centering",
            r"\small",
            r"\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{caption}}}",
            r"\par\addvspace{4pt} % The standard classes put no space between a caption and the table below it.",
            rf"\label{{{label}}}",
            r"\sbox0{%",
            rf"\begin{{tabular}}{{@{{}}l{'r' * len(header)}@{{}}}}",
            r"\toprule",
            " & ".join([first, *(f"{each}{_phantom(widest[n])}" for n, each in enumerate(header))]) + r" \\",
            *body,
            r"\bottomrule",
            r"\end{tabular}}%",
            r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
            r"\end{table}",
            "",
        ]
    )


def _methods(result: Mapping[str, Any], scope: str, methods: Sequence[str]) -> list[str]:
    """The methods of the lines of a block."""
    entries = in_scope(result, scope)
    check_names(
        methods, [entry["method"] for entry in entries], "--methods", f"the run has no method over {SCOPES[scope]}"
    )
    return list(dict.fromkeys(methods)) or [entry["method"] for entry in entries if not entry["diagnostic"]]


def _metrics(results: Mapping[str, Mapping[str, Any]], scope: str, metrics: Sequence[str]) -> list[str]:
    """The metrics of the columns: those of the user, or those that every run has."""
    known = [
        list(dict.fromkeys(m for e in in_scope(result, scope) for m in e["metrics"])) for result in results.values()
    ]
    shared = [metric for metric in known[0] if all(metric in each for each in known)]
    check_names(metrics, shared, "--metrics", "a run has no metric")
    if metrics:
        return list(dict.fromkeys(metrics))
    first = next(iter(results.values()))
    return [m for m in METRICS if m in shared] or [m for m in metrics_of(first, scope)[0] if m in shared][:COLUMNS]


def check_names(names: Sequence[str], known: Collection[str], where: str, problem: str) -> None:
    """Check that each name is known.

    Args:
        names: the names that the user chose.
        known: the names in result.json.
        where: the option that has the names.
        problem: the beginning of the message.

    Raises:
        ConfigurationError: a name is not known.
    """
    for name in names:
        if name not in known:
            near = nearest(name, known)
            raise ConfigurationError(
                f"{problem} {name!r:.200}",
                where=where,
                why="the table shows what result.json contains",
                do=(f"did you mean {' or '.join(near)}? " if near else "") + f"Choose from {', '.join(known)}",
            )


def _versus(
    result: Mapping[str, Any], scope: str, versus: str, methods: Sequence[str], metrics: Sequence[str]
) -> dict[tuple[str, str], float]:
    """Return the adjusted p-value of each method and metric against another method.

    The run compares methods over hit users. A user without a hit has no difference, so that the test is the same over
    all users.
    """
    entries = {entry["method"]: entry for entry in in_scope(result, "hit_users")}
    check_names([versus], entries, "--versus", "the run has no method that ranks the candidates")
    found: dict[str, Mapping[str, Any]] = {BASE: entries[versus]["vs_base"]}
    for pair in result["comparisons"]:
        if versus in (pair["method"], pair["versus"]):
            found[pair["versus"] if pair["method"] == versus else pair["method"]] = pair["metrics"]
    missing = [name for name in methods if name != versus and name in entries and name not in found]
    missing = [name for name in missing if not entries[name]["diagnostic"]]
    if missing:
        raise ConfigurationError(
            f"the run does not compare {', '.join(missing)} with {versus}",
            where="--versus",
            why="a method without a mark would look as if its difference were not significant",
            do=f"leave these methods out with --methods, or repeat the run with --eval_comparisons=all: only its "
            f"evaluation runs again. Compared with {versus} are {', '.join(found)}",
        )
    return {
        (name, metric): found[name][metric].get("p_holm", 1.0)
        for name in methods
        if name in found and name != versus
        for metric in metrics
        if metric in found[name]
    }


def _cell(entry: Mapping[str, Any], metric: str, p_versus: float) -> Cell:
    """The cell of a method and a metric."""
    figure = entry["metrics"].get(metric)
    if figure is None:
        return Cell(value=None)
    p_base = entry["vs_base"].get(metric, {}).get("p_holm", 1.0)
    marks = (STAR if p_base < LEVEL else "") + (DAGGER if p_versus < LEVEL else "")
    return Cell(value=figure["mean"], sd=figure["sd"], marks=marks)


def _figure(value: Any) -> Cell:
    """The cell of a figure of an ablation."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(value=float(value)) if isinstance(value, float) else Cell(value=None, text=f"{value:,}")
    return Cell(value=None, text="" if value is None else escape(str(value)))


def _best(lines: Sequence[Line], column: int) -> tuple[str, str]:
    """The best and the second best value of a column as they are printed. An absent one is ""."""
    values = {round(value, 4) for line in lines if (value := line.cells[column].value) is not None}
    ordered = [_number(value) for value in sorted(values, reverse=True)]
    return (ordered[0] if len(ordered) > 1 else "", ordered[1] if len(ordered) > 2 else "")


def _shown(cell: Cell, best: Sequence[str], widest: str) -> str:
    """A cell as LaTeX, with its marks and with empty space for the other marks of its column."""
    if cell.value is None:
        return cell.text
    text = _number(cell.value)
    if best and text == best[0]:
        shown = rf"\textbf{{{text}}}"
    elif best and text == best[1]:
        shown = rf"\underline{{{text}}}"
    else:
        shown = text
    return shown + (f"$^{{{cell.marks}}}$" if cell.marks else "") + _phantom(widest, cell.marks)


def _phantom(widest: str, marks: str = "") -> str:
    """Empty space as wide as the marks that a cell lacks."""
    lacking = "".join(mark for mark in (STAR, DAGGER) if mark in widest and mark not in marks)
    return rf"\phantom{{$^{{{lacking}}}$}}" if lacking else ""


def _number(value: float) -> str:
    """Four decimals, without the zero before the point, with a minus sign instead of a hyphen.

    >>> _number(0.12345), _number(1.0), _number(-0.5)
    ('.1235', '1.0000', '$-$.5000')
    """
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.4f}").replace("-", "$-$")


def _short(metric: str) -> str:
    """The abbreviation of a metric.

    >>> _short("recall@5"), _short("giniindex@10")
    ('R@5', 'giniindex@10')
    """
    kind, _, cutoff = metric.partition("@")
    return f"{KINDS[kind][0]}@{cutoff}" if kind in KINDS else escape(metric)


def _abbreviations(metrics: Sequence[str]) -> str:
    kinds = dict.fromkeys(metric.partition("@")[0] for metric in metrics)
    names = [f"{short}: {name}" for kind in kinds if kind in KINDS for short, name in [KINDS[kind]] if short != name]
    return f"{', '.join(names)}." if names else ""


def _warned(result: Mapping[str, Any]) -> str:
    return rf"\textbf{{{banner(result)}}} " if banner(result) else ""


def _caption(
    results: Mapping[str, Mapping[str, Any]],
    scope: str,
    metrics: Sequence[str],
    versus: str | None,
    blocks: Sequence[Block],
) -> str:
    """The caption: data set, users, seeds, what marks mean, and abbreviations."""
    every = list(results.values())
    counts = [in_scope(result, scope)[0]["n"] for result in every]
    datasets = list(dict.fromkeys(result["dataset"] for result in every))
    split = "validation split, " if any(result["split"] == "valid" for result in every) else ""
    same = len({count for each in counts for count in each}) == 1
    users = f" ($n = {counts[0][0]:,}$)".replace(",", "{,}") if same else ""
    sentences = [f"{escape(', '.join(datasets))}, {split}{SCOPES[scope]}{users}."]
    seeds = sorted({len(result["seeds"]) for result in every})
    if seeds[-1] > 1:
        sentences.append(f"Means and standard deviations over {' or '.join(map(str, seeds))} seeds.")
    sentences.append("Best in bold, second best underlined.")
    if any(not line.competes for block in blocks for line in block.lines):
        names = dict.fromkeys(escape(line.name) for block in blocks for line in block.lines if not line.competes)
        sentences.append(f"{'; '.join(names)}: for reference only.")
    against = rf"$^{{{STAR}}}$: differs significantly from the base order" + (
        rf"; $^{{{DAGGER}}}$: from {escape(DISPLAY.get(versus, versus))}" if versus else ""
    )
    sentences.append(f"{against} (paired randomization test over users, Holm-adjusted $p < .05$).")
    tests = {metric for result in every for entry in in_scope(result, scope) for metric in entry["vs_base"]}
    untested = [_short(metric) for metric in metrics if metric not in tests]
    if untested:
        sentences.append(f"There is no test for {', '.join(untested)}.")
    sentences.append(_abbreviations(metrics))
    warning = next((_warned(result) for result in every if banner(result)), "")
    return warning + " ".join(filter(None, sentences))
