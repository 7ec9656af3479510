"""The figures of a report, drawn with matplotlib: SVG for report.html, PDF for papers.

Each figure is as wide as one column of a paper, and as a phone: 3.5 inches. A figure is a function of a `Page`. It
returns [] if the run has nothing to show.
"""

from __future__ import annotations

import io
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from recbole_gr2.ranking import ndcg_at, recall_at
from recbole_gr2.report.latex import DISPLAY, check_names
from recbole_gr2.report.page import Page, ranked_methods
from recbole_gr2.report.result import BASE, ORACLE, FinishedRun, in_scope, learning_curves, means
from recbole_gr2.report.tables import GAP, gap_closed, hit_slices
from recbole_gr2.report.verdict import LEVEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 3.5  # inches
POINTS = 200  # of a learning curve
INK, LINE = "#111111", "#d0d0d1"  # text and axes, grid
SERIES = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#b6559c", "#a67c00", "#4a90d9", "#7f3c8d")
THEMED = {INK: "--ink", LINE: "--line", **{color: f"--series-{n}" for n, color in enumerate(SERIES)}}  # in the page
STYLES = ("-", "--", ":")
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",  # Texts stay texts, which are small and can be searched.
    "pdf.fonttype": 42,
}
RANKS = (1, 2, 3, 5, 10, 20, 50)  # last rank of each group of the figures of ranks


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure.

    Attributes:
        name: name of its file, without ending.
        title: what it shows, as a heading.
        description: what can be read from it, in words.
        figure: the drawing.
    """

    name: str
    title: str
    description: str
    figure: Figure

    def save_pdf(self, folder: Path) -> Path:
        """Write `<name>.pdf` and return its path. The file does not depend on the time."""
        path = folder / f"{self.name}.pdf"
        with rc_context(STYLE):
            self.figure.savefig(path, metadata={"CreationDate": None, "Title": self.title})
        return path

    def svg(self) -> str:
        """Return an SVG element with title and description. Its colours are variables of the page's style sheet."""
        stream = io.StringIO()
        with rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        text = stream.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", text)
        text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
        for color, variable in THEMED.items():
            text = text.replace(color, f"var({variable})")
        text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
        text = re.sub(r'id="([^"]+)"', rf'id="{self.name}-\1"', text)
        text = re.sub(r'href="#([^"]+)"', rf'href="#{self.name}-\1"', text)
        text = text.replace("url(#", f"url(#{self.name}-")
        names = f'role="img" aria-labelledby="{self.name}-title {self.name}-desc"'
        inside = f'<title id="{self.name}-title">{_escaped(self.title)}</title>'
        inside += f'<desc id="{self.name}-desc">{_escaped(self.description)}</desc>'
        return re.sub(r"<svg([^>]*)>", lambda match: f"<svg {names}{match[1]}>{inside}", text, count=1)


def differences(page: Page) -> list[Drawing]:
    """Return the differences to the base order with intervals: of the hit users, and of all users with recommenders."""
    drawings = []
    for scope, users in (("hit_users", "hit users"), ("all_users", "all users")):
        found = {
            entry["method"]: entry["vs_base"][GAP]
            for entry in in_scope(page.result, scope)
            if GAP in entry["vs_base"] and not entry["diagnostic"]
        }
        if not found or (scope == "all_users" and found.keys() == set(ranked_methods(page.result))):
            continue
        title = f"Difference to the base order, {GAP.upper()}, {users}"
        with _axes(len(found)) as (figure, axes):
            axes.axvline(0, color=INK, linewidth=0.8)
            for place, (name, each) in enumerate(found.items()):
                sure = each.get("p_holm", 1.0) < LEVEL
                color = _color(page, name) if scope == "hit_users" else SERIES[1]
                low, high = each.get("low", each["diff"]), each.get("high", each["diff"])
                axes.plot([low, high], [place, place], color=color)
                axes.plot(
                    each["diff"], place, "o", color=color, markersize=5, markerfacecolor=color if sure else "none"
                )
            _names(axes, [_display(page, name) for name in found])
            axes.set_xlabel(f"difference in {GAP.upper()}\nline: 95 % interval; filled: adjusted p < .05")
        texts = [
            f"{name} {each['diff']:+.4f}" + (f" [{each['low']:+.4f}, {each['high']:+.4f}]" if "low" in each else "")
            for name, each in found.items()
        ]
        drawings.append(_drawn(f"differences-{scope}", title, "; ".join(texts), figure))
    return drawings


def by_cutoff(page: Page) -> list[Drawing]:
    """Return Recall@K and NDCG@K of the hit users for every K up to the length of the lists, at most 50."""
    frame = pd.concat([run.per_user() for run in page.runs])
    methods = [BASE, *ranked_methods(page.result)]
    longest = int(min(frame[[*methods]].to_numpy().max(), 50))
    if longest < 2:
        return []
    drawings = []
    cutoffs = np.arange(1, longest + 1)
    for name, label, value in (("recall", "Recall@K", recall_at), ("ndcg", "NDCG@K", ndcg_at)):
        with _axes(8) as (figure, axes):
            texts = []
            for method in methods:
                values = [float(value(frame[method].to_numpy(), int(k)).mean()) for k in cutoffs]
                axes.plot(cutoffs, values, label=_display(page, method), **_line(page, method))
                shown = [k for k in RANKS if k <= longest]
                texts.append(f"{method}: " + ", ".join(f"K={k} {values[k - 1]:.4f}" for k in shown))
            axes.set_xlabel("K")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.set_ylim(bottom=0)
            axes.grid(axis="y")
            axes.legend(loc="best")
        drawings.append(_drawn(f"{name}-by-k", f"{label}, hit users", "; ".join(texts), figure))
    return drawings


def gap(page: Page) -> list[Drawing]:
    """Return the share of the difference between base order and oracle that each method reaches."""
    shares = {n: s for n, s in gap_closed(page.result, "hit_users").items() if n in ranked_methods(page.result)}
    if not shares:
        return []
    with _axes(len(shares)) as (figure, axes):
        axes.axvline(0, color=INK, linewidth=0.8)
        for place, (name, share) in enumerate(shares.items()):
            axes.barh(place, 100 * share, color=_color(page, name), height=0.6)
            axes.annotate(
                f"{share:+.1%}",
                (100 * share, place),
                xytext=(3 if share >= 0 else -3, 0),
                textcoords="offset points",
                va="center",
                ha="left" if share >= 0 else "right",
            )
        _names(axes, [_display(page, name) for name in shares])
        axes.margins(x=0.3)  # The numbers are beside the bars.
        axes.set_xlabel(f"share of the gap in {GAP.upper()} in %\nthe oracle has 100")
    text = "; ".join(f"{name} {share:+.1%}" for name, share in shares.items())
    return [_drawn("gap", f"Share of the gap to the oracle, {GAP.upper()}, hit users", text, figure)]


def slices(page: Page) -> list[Drawing]:
    """Return NDCG@10 over parts of the hit users, and over parts of all users."""
    methods = [BASE, *ranked_methods(page.result)]
    drawings = []
    hit = hit_slices([run.per_user() for run in page.runs], methods)
    if hit:
        names = [f"{name}\n(n = {count:,})" for name, count, _ in hit]
        title = "NDCG@10 over parts of the hit users"
        drawings.append(_dots(page, "slices-hit-users", title, names, [values for _, _, values in hit], "NDCG@10"))
    found: dict[str, list[Mapping[str, Any]]] = {}
    for _, _, summary in page.summaries(slices=list):
        for entry in summary["slices"]:
            found.setdefault(entry["slice"], []).append(entry)
    if found:
        names = [f"{name}\n(n = {each[0]['users']:,})" for name, each in found.items()]
        values = [
            {
                m: float(np.mean([e["ndcg@10"][m] for e in each]))
                for m in methods
                if all(m in e["ndcg@10"] for e in each)
            }
            for each in found.values()
        ]
        title = "NDCG@10 over parts of all users"
        drawings.append(_dots(page, "slices-all-users", title, names, values, "NDCG@10"))
    return drawings


def moves(page: Page) -> list[Drawing]:
    """Return, for each method, how many targets have each rank before and after."""
    frame = pd.concat([run.per_user() for run in page.runs])
    methods = ranked_methods(page.result)
    if frame.empty or not methods:
        return []
    most = int(frame[[BASE, *methods]].to_numpy().max())
    edges = [0, *(rank for rank in RANKS if rank < most), most]
    names = [f"{low + 1}" if high == low + 1 else f"{low + 1}-{high}" for low, high in pairwise(edges)]
    drawings = []
    for method in methods:
        counts, _, _ = np.histogram2d(frame[BASE], frame[method], bins=[np.array(edges) + 0.5] * 2)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        with _axes(len(names) + 2) as (figure, axes):
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            for (row, column), share in np.ndenumerate(shares):
                if counts[row, column]:
                    axes.barh(row, 0.94, left=column - 0.47, height=0.94, color=SERIES[1], alpha=0.08 + 0.62 * share)
                    axes.text(column, row, f"{counts[row, column]:,.0f}", ha="center", va="center", fontsize=7)
            axes.set_xticks(range(len(names)), names)
            _names(axes, names)
            axes.set_xlabel(f"rank of the target by {_display(page, method)}")
            axes.set_ylabel("rank in the base order")
        better, same = float((frame[method] < frame[BASE]).mean()), float((frame[method] == frame[BASE]).mean())
        text = (
            f"Number of hit users by rank before and after. The rank is better for {better:.1%}, the same for "
            f"{same:.1%} and worse for {1 - better - same:.1%}."
        )
        drawings.append(_drawn(f"ranks-{_file(method)}", f"Rank before and after, {method}", text, figure))
    return drawings


def depth(page: Page) -> list[Drawing]:
    """Return the recall of each base model by depth. With several seeds it is the mean."""
    found: dict[str, dict[int, list[float]]] = {}
    for _, _, summary in page.summaries(depth=Mapping):
        if summary.get("split", "test") != page.result["split"]:
            continue
        for name, figures in summary["depth"].items():
            for metric, value in figures.items() if isinstance(figures, Mapping) else ():
                if metric.startswith("recall@"):
                    label = "all together" if " + " in name else name
                    found.setdefault(label, {}).setdefault(int(metric.partition("@")[2]), []).append(value)
    if not found:
        return []
    with _axes(8) as (figure, axes):
        texts = []
        for place, (name, values) in enumerate(found.items()):
            cutoffs = sorted(values)
            recalls = [float(np.mean(values[k])) for k in cutoffs]
            axes.plot(cutoffs, recalls, marker="o", markersize=3, label=name, **_nth(place))
            texts.append(f"{name}: " + ", ".join(f"K={k} {r:.4f}" for k, r in zip(cutoffs, recalls, strict=True)))
        axes.set_xscale("log")
        axes.set_xticks(cutoffs, [str(k) for k in cutoffs])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("items per user")
        axes.set_ylabel("Recall")
        axes.grid(axis="y")
        axes.legend(loc="best")
    return [_drawn("recall-by-depth", "Recall of the base models by depth, all users", "; ".join(texts), figure)]


def curves(page: Page) -> list[Drawing]:
    """Return the learning curves of each stage: every logged step, or means over parts of the steps if there are many.

    With several seeds a curve is the mean over the seeds. Figures whose names begin alike share a drawing.
    """
    drawings = []
    for stage, figures in means([learning_curves(run.folders, POINTS) for run in page.runs]).items():
        steps = _steps(page, stage)
        groups: dict[str, list[str]] = {}
        for name in figures:
            groups.setdefault(name.partition("/")[0], []).append(name)
        for group, names in groups.items():
            with _axes(7) as (figure, axes):
                texts = []
                for place, name in enumerate(names):
                    values = figures[name]
                    # The first and the last part of the steps are the ends of the axis.
                    places = np.linspace(1, steps or len(values), len(values))
                    axes.plot(places, values, label=name, **_nth(place + 1))
                    texts.append(f"{name} from {values[0]:.4f} to {values[-1]:.4f}")
                axes.set_xlabel("step")
                axes.set_ylabel(group)
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                axes.grid(axis="y")
                if len(names) > 1:
                    axes.legend(loc="best")
            drawings.append(
                _drawn(f"curve-{_file(stage)}-{_file(group)}", f"{stage}: {group}", "; ".join(texts), figure)
            )
    return drawings


def codes(page: Page) -> list[Drawing]:
    """Return how many codes of each level of the semantic IDs are in use, and their entropy, for the first seed."""
    for _, _, summary in page.summaries(used_codes=list, entropy=list, uniqueness=float):
        used, entropy = summary["used_codes"], summary["entropy"]
        names = [f"level {n}" for n in range(1, len(used) + 1)]
        with _axes(len(names)) as (figure, axes):
            axes.barh(range(len(names)), used, color=SERIES[1], height=0.6, alpha=0.35, label="codes in use")
            axes.barh(range(len(names)), 2.0 ** np.array(entropy), color=SERIES[1], height=0.3, label="2 ^ entropy")
            _names(axes, names)
            axes.set_xlabel("codes; thin bar: effective number, 2 ^ entropy")
        texts = [
            f"{name}: {count} codes, {bits:.2f} bits" for name, count, bits in zip(names, used, entropy, strict=True)
        ]
        return [_drawn("semantic-ids", "Codes of the semantic IDs in use, by level", "; ".join(texts), figure)]
    return []


def truth(page: Page) -> list[Drawing]:
    """Return the share of answers whose statements are true, by kind of statement."""
    found = page.result["truth"]
    kinds = list(dict.fromkeys(kind for shares in found.values() for kind in shares))
    if not kinds:
        return []
    values = [{name: shares[kind] for name, shares in found.items() if kind in shares} for kind in kinds]
    return [_dots(page, "truth", "Share of answers with true statements", kinds, values, "share", top=1.0)]


def cost(page: Page) -> list[Drawing]:
    """Return the wall time of each stage. With several seeds it is the mean."""
    times = {stage["stage"]: float(np.mean(stage["seconds"])) / 60 for stage in page.result["stages"]}
    with _axes(len(times)) as (figure, axes):
        for place, (_name, minutes) in enumerate(times.items()):
            axes.barh(place, minutes, color=SERIES[1], height=0.6)
            axes.annotate(f"{minutes:.1f}", (minutes, place), xytext=(3, 0), textcoords="offset points", va="center")
        _names(axes, list(times))
        axes.margins(x=0.15)
        axes.set_xlabel("minutes")
    text = "; ".join(f"{name} {minutes:.1f} minutes" for name, minutes in times.items())
    return [_drawn("cost", "Wall time of each stage", text, figure)]


FIGURES: tuple[Callable[[Page], list[Drawing]], ...] = (
    differences,
    gap,
    by_cutoff,
    slices,
    moves,
    depth,
    codes,
    truth,
    curves,
    cost,
)


def save_figures(
    result: Mapping[str, Any], runs: Sequence[FinishedRun], folder: Path, *, methods: Sequence[str] = ()
) -> list[Path]:
    """Write every figure of a run as PDF, with the names that methods have in papers, and return the paths.

    Args:
        result: content of result.json.
        runs: the finished run of each seed.
        folder: where to write. It is made if it does not exist.
        methods: methods of the figures besides the base order; by default all that make a claim.

    Raises:
        ConfigurationError: the run has no such method.
    """
    check_names(methods, [entry["method"] for entry in result["methods"]], "--methods", "the run has no method")
    if methods:
        kept = {BASE, ORACLE, *methods}
        truth = {name: shares for name, shares in result["truth"].items() if name in kept}
        result = {**result, "methods": [e for e in result["methods"] if e["method"] in kept], "truth": truth}
    page = Page(result=result, runs=runs, names=DISPLAY)
    folder.mkdir(parents=True, exist_ok=True)
    return [drawing.save_pdf(folder) for figure in FIGURES for drawing in figure(page)]


@contextmanager
def _axes(lines: int) -> Iterator[tuple[Figure, Axes]]:
    """A figure for this number of lines, and its axes, in the style of the report."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.65 + 0.24 * max(lines, 2)), layout="constrained")
        axes = figure.add_subplot()
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        yield figure, axes


def _drawn(name: str, title: str, description: str, figure: Figure) -> Drawing:
    return Drawing(name=name, title=title, description=description, figure=figure)


def _names(axes: Axes, names: Sequence[str]) -> None:
    """Label the lines of the y axis, the first one at the top."""
    axes.set_yticks(range(len(names)), [_shown(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _dots(
    page: Page,
    name: str,
    title: str,
    lines: Sequence[str],
    values: Sequence[Mapping[str, float]],
    label: str,
    *,
    top: float | None = None,
) -> Drawing:
    """Draw a line for each part, with a dot for each method.

    Args:
        page: result and runs, for the colours of the methods.
        name, title: of the drawing.
        lines: name of each line.
        values: for each line, the value of each method.
        label: of the x axis.
        top: upper end of the x axis; by default that of the values.
    """
    methods = list(dict.fromkeys(method for each in values for method in each))
    two = any("\n" in line for line in lines)
    with _axes(round(len(lines) * (1.5 if two else 1.0)) + (len(methods) + 1) // 2) as (figure, axes):
        for method in methods:
            places = [place for place, each in enumerate(values) if method in each]
            marker = "osD^vP*X"[_place(page, method) % 8]
            axes.plot(
                [values[place][method] for place in places],
                places,
                marker,
                color=_color(page, method),
                markersize=4,
                alpha=0.85,
                clip_on=False,
                label=_display(page, method),
            )
        _names(axes, lines)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(axis="y")
        axes.set_xlim(left=0, right=top)
        axes.set_xlabel(label)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    texts = [
        f"{line.splitlines()[0]}: " + ", ".join(f"{method} {value:.4f}" for method, value in each.items())
        for line, each in zip(lines, values, strict=True)
    ]
    return _drawn(name, title, "; ".join(texts), figure)


def _steps(page: Page, stage: str) -> int:
    """The last step that a stage of the first run logged, 0 if this is unknown."""
    folder = page.runs[0].folders.get(stage)
    if folder is None:  # a part of a stage
        return 0
    log = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    return int(log[-1]["step"]) if isinstance(log, list) else 0


def _display(page: Page, method: str) -> str:
    return page.names.get(method, method)


def _place(page: Page, method: str) -> int:
    methods = [entry["method"] for entry in in_scope(page.result, "hit_users") if entry["method"] != ORACLE]
    return methods.index(method) if method in methods else 1


def _nth(place: int) -> dict[str, Any]:
    return {"color": SERIES[place % len(SERIES)], "linestyle": STYLES[place // len(SERIES) % len(STYLES)]}


def _line(page: Page, method: str) -> dict[str, Any]:
    return _nth(_place(page, method))


def _color(page: Page, method: str) -> str:
    return SERIES[_place(page, method) % len(SERIES)]


def _shown(name: str) -> str:
    """A name as a label: in short lines, and without the meaning of $ for matplotlib."""
    lines = [part for line in name.splitlines() for part in textwrap.wrap(line, 30)]
    return "\n".join(lines).replace("$", r"\$")


def _file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
