"""The tables of the report. Each is a function of result.json, for one seed and for several.

The argument `render` of each function makes the table from its header and its lines: plain text by default, Markdown
with `console.pipe_table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from recbole_gr2.config import properties_folder, read_yaml
from recbole_gr2.console import render_table
from recbole_gr2.ranking import ndcg_at
from recbole_gr2.report.result import BASE, ORACLE, SCOPES, SPLITS, in_scope

GAP = "ndcg@10"  # The metric of the differences to the base order and of the share of the oracle gap.
Render = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
COMPARED = ("recall@1", "ndcg@10")  # The metrics of the comparisons table.


def metrics_of(result: Mapping[str, Any], scope: str) -> tuple[list[str], dict[str, str]]:
    """Return the metrics that a table of a scope shows.

    Returns:
        The metrics in the order in which the settings name them, and the metrics that are left out because each method
        has the same values on an earlier metric, with the name of that metric. With one target, Hit@K equals Recall@K.
    """
    entries, shown, equal = in_scope(result, scope), [], {}
    columns: dict[str, str] = {}
    for metric in dict.fromkeys(metric for entry in entries for metric in entry["metrics"]):
        values = str([entry["metrics"].get(metric) for entry in entries])
        if values in columns:
            equal[metric] = columns[values]
        else:
            columns[values] = metric
            shown.append(metric)
    return shown, equal


def equal_metrics(result: Mapping[str, Any], scope: str) -> str:
    """Return a sentence about the metrics that the table of a scope leaves out, or ""."""
    _, equal = metrics_of(result, scope)
    pairs = ", ".join(f"{metric} = {same}" for metric, same in equal.items())
    return f"Columns are left out if they equal another one for every method: {pairs}." if equal else ""


def scope_title(result: Mapping[str, Any], scope: str) -> str:
    """Return the data set, the split unless it is the test, the users of the scope and their number for each seed.

    >>> methods = [{"scope": "all_users", "n": [1200, 1200]}]
    >>> scope_title({"dataset": "ml-100k", "split": "valid", "methods": methods}, "all_users")
    'ml-100k, validation, all users, n = 1,200'
    """
    counts = dict.fromkeys(in_scope(result, scope)[0]["n"])
    return f"{data_title(result)}, {SCOPES[scope]}, n = {', '.join(f'{count:,}' for count in counts)}"


def data_title(result: Mapping[str, Any]) -> str:
    """Return the data set, and the split unless it is the test.

    >>> data_title({"dataset": "ml-100k", "split": "test"}), data_title({"dataset": "ml-100k", "split": "valid"})
    ('ml-100k', 'ml-100k, validation')
    """
    return result["dataset"] + ("" if result["split"] == "test" else f", {SPLITS[result['split']]}")


def metrics_table(result: Mapping[str, Any], scope: str, render: Render = render_table) -> str:
    """Return the table of a scope, with one line per method.

    Its columns are the metrics, the difference to the base order in NDCG@10 with interval and adjusted p-value, the
    share of the oracle gap, and the share of unchanged lists.
    """
    entries = in_scope(result, scope)
    shown, _ = metrics_of(result, scope)
    shares = gap_closed(result, scope)
    lines = []
    for entry in entries:
        versus = entry["vs_base"].get(GAP)
        lines.append(
            [
                entry["method"],
                *(_figure(entry["metrics"].get(metric)) for metric in shown),
                *(_comparison(versus) if versus else ["", ""]),
                f"{shares[entry['method']]:+.1%}" if entry["method"] in shares else "",
                _share(entry["unchanged"]),
            ]
        )
    return render(["method", *shown, f"{GAP} vs base [95 %]", "p (Holm)", "gap closed", "unchanged"], lines)


def gap_closed(result: Mapping[str, Any], scope: str) -> dict[str, float]:
    """Return the share of the difference between base and oracle that each method reaches, in NDCG@10.

    The shares come from the unrounded differences to the base order. RecBole rounds its metrics, and their differences
    have few correct digits. Without a difference between base and oracle there are no shares.
    """
    differences = {
        entry["method"]: entry["vs_base"][GAP]["diff"] for entry in in_scope(result, scope) if GAP in entry["vs_base"]
    }
    gap = differences.get(ORACLE, 0.0)
    return {method: difference / gap for method, difference in differences.items()} if gap else {}


def comparisons_table(result: Mapping[str, Any], render: Render = render_table) -> str:
    """Return the paired differences between methods over hit users, with one line per pair.

    The pairs of each method with the base order come first. The columns are the difference with its interval and the
    adjusted p-value, for each metric of `COMPARED`.
    """
    pairs = [
        (f"{entry['method']} - {BASE}", entry["vs_base"])
        for entry in in_scope(result, "hit_users")
        if entry["vs_base"] and not entry["diagnostic"]
    ]
    pairs += [(f"{entry['method']} - {entry['versus']}", entry["metrics"]) for entry in result["comparisons"]]
    lines = [
        [name, *(cell for metric in COMPARED for cell in (_comparison(found[metric]) if metric in found else ["", ""]))]
        for name, found in pairs
    ]
    header = ["methods", *(cell for metric in COMPARED for cell in (f"{metric} [95 %]", "p (Holm)"))]
    return render(header, lines)


def truth_table(result: Mapping[str, Any], render: Render = render_table) -> str:
    """Return the share of true statements in the answers of each method, by kind of statement."""
    kinds = list(dict.fromkeys(kind for shares in result["truth"].values() for kind in shares))
    lines = [[method, *(_share(shares.get(kind)) for kind in kinds)] for method, shares in result["truth"].items()]
    return render(["method", *kinds], lines)


def slices_table(frames: Sequence[pd.DataFrame], methods: Iterable[str], render: Render = render_table) -> str:
    """Return NDCG@10 over parts of the hit users, see `hit_slices`."""
    shown = [method for method in methods if any(method in frame for frame in frames)]
    lines = [
        [name, f"{count:,}", *(f"{value:.4f}" for value in values.values())]
        for name, count, values in hit_slices(frames, shown)
    ]
    return render(["candidate lists", "n", *shown], lines)


def hit_slices(frames: Sequence[pd.DataFrame], methods: Iterable[str]) -> list[tuple[str, int, dict[str, float]]]:
    """Return NDCG@10 over parts of the hit users.

    The parts are by base rank of the target, by length of the history and by popularity of the target. A property that
    is equal for all users has no parts.

    Args:
        frames: per_user.csv of each seed.
        methods: the methods to show, if the frames have them.

    Returns:
        For each part its name, its number of candidate lists, and NDCG@10 by method.
    """
    users = pd.concat(frames)
    shown = [method for method in methods if method in users.columns]
    names = {"base": "base rank", "history": "history items", "popularity": "target interactions"}
    parts = {
        "base": pd.cut(users["base"], [0, 1, 3, 5, np.inf], duplicates="drop"),
        "history": pd.qcut(users["history"], 3, duplicates="drop"),
        "popularity": pd.qcut(users["popularity"], 3, duplicates="drop"),
    }
    slices = []
    for column, cut in parts.items():
        for _, part in users.groupby(cut, observed=True):
            low, high = part[column].min(), part[column].max()
            name = f"{names[column]} {low}" + (f" to {high}" if high > low else "")
            values = {method: float(ndcg_at(part[method].to_numpy(), 10).mean()) for method in shown}
            slices.append((name, len(part), values))
    return slices


def curves_table(curves: Mapping[str, Mapping[str, Sequence[float]]], render: Render = render_table) -> str:
    """Return the means over equal parts of the steps, with one line per stage and figure."""
    lines = [
        [stage, name, *(f"{value:.4f}" for value in values)]
        for stage, figures in curves.items()
        for name, values in figures.items()
    ]
    parts = max(map(len, lines), default=2) - 2
    header = ["stage", "figure", *(f"{n} of {parts}" for n in range(1, parts + 1))]
    return render(header, [line + [""] * (len(header) - len(line)) for line in lines])


def settings_table(settings: Mapping[str, Mapping[str, Any]], render: Render = render_table) -> str:
    """Return the settings that differ from their defaults, with one line per setting."""
    lines = [[key, str(entry["value"]), str(entry["from"])] for key, entry in settings.items()]
    return render(["setting", "value", "from"], lines)


def cost_table(result: Mapping[str, Any], render: Render = render_table) -> str:
    """Return wall time of each seed, largest peak memory, use of the cache and code version of each stage.

    A number of cached seeds stands in the column `cached` if a stage was cached for some seeds only.
    """
    seeds, stages = result["seeds"], result["stages"]
    lines = []
    for stage in stages:
        cached = sum(stage["cached"])
        lines.append(
            [
                stage["stage"],
                *(f"{seconds:,.0f} s" for seconds in stage["seconds"]),
                f"{max(stage['peak_memory_mb']):,.0f} MiB",
                {0: "", len(seeds): "yes"}.get(cached, f"{cached} of {len(seeds)}"),
                ", ".join(dict.fromkeys(stage["code"])),
            ]
        )
    totals = [f"{sum(stage['seconds'][n] for stage in stages):,.0f} s" for n in range(len(seeds))]
    times = ["wall time"] if len(seeds) == 1 else [f"seed {seed}" for seed in seeds]
    return render(["stage", *times, "peak memory", "cached", "code"], [*lines, ["all", *totals, "", "", ""]])


PROTOCOL = ("method", "source", "mask", "fit")  # fields of a published figure that are no metrics


def published_tables(dataset: str, render: Render = render_table) -> tuple[dict[str, str], dict[str, str]]:
    """Return the published figures of papers for a data set: scope -> table, and the sources that the tables name.

    Both are empty if there are no figures. properties/published.yaml explains the columns.
    """
    published = read_yaml((properties_folder() / "published.yaml").read_text(encoding="utf-8"))
    tables: dict[str, str] = {}
    sources: dict[str, str] = {}
    for scope, entries in published.get(dataset, {}).items():
        names = _grouped(dict.fromkeys(name for entry in entries for name in entry if name not in PROTOCOL))
        lines = [
            [
                *(entry.get(name, "") for name in PROTOCOL),
                *(f"{entry[name]:.4f}" if name in entry else "" for name in names),
            ]
            for entry in entries
        ]
        tables[scope] = render([*PROTOCOL, *names], lines)
        sources |= {entry["source"]: published["sources"][entry["source"]] for entry in entries}
    return tables, sources


def _grouped(metrics: Iterable[str]) -> list[str]:
    """Sort metrics by kind, in the order in which the kinds occur, and by cut-off."""
    names = list(metrics)
    kinds = list(dict.fromkeys(name.partition("@")[0] for name in names))

    def key(name: str) -> tuple[int, int]:
        kind, _, cutoff = name.partition("@")
        return kinds.index(kind), int(cutoff or 0)

    return sorted(names, key=key)


def _figure(figure: Mapping[str, Any] | None, plus_minus: str = " ± ") -> str:
    """Return a metric as `0.1234`, or as `0.1234 ± 0.0012` with several seeds."""
    if figure is None:
        return ""
    return f"{figure['mean']:.4f}" + ("" if figure["sd"] is None else f"{plus_minus}{figure['sd']:.4f}")


def _comparison(found: Mapping[str, float]) -> list[str]:
    """Return the cells of a difference: difference with interval, and adjusted p-value."""
    interval = f" [{found['low']:+.4f}, {found['high']:+.4f}]" if "low" in found else ""
    return [f"{found['diff']:+.4f}{interval}", f"{found['p_holm']:.4f}" if "p_holm" in found else ""]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def figures_table(result: Mapping[str, Any], render: Render = render_table) -> str:
    """Return the figures of an ablation, with one line per variant.

    The columns of published figures follow those of the ablation. A failed variant is marked.

    Args:
        result: content of result.json of an ablation.
    """
    variants = result["variants"]
    published = [heading for heading in result["columns"] if any(heading in each["published"] for each in variants)]
    return render(
        ["variant", *result["columns"], *(f"published: {heading}" for heading in published)],
        [
            [
                variant["name"] + (" (failed)" if variant["failed"] else ""),
                *(_value(variant["figures"][heading]) for heading in result["columns"]),
                *(_value(variant["published"].get(heading)) for heading in published),
            ]
            for variant in variants
        ],
    )


def variant_settings_table(result: Mapping[str, Any], render: Render = render_table) -> str:
    """Return the settings that each variant of an ablation changes."""
    lines = [
        [variant["name"], ", ".join(f"{key}: {value}" for key, value in variant["settings"].items())]
        for variant in result["variants"]
    ]
    return render(["variant", "settings"], lines)


def variant_cost_table(result: Mapping[str, Any], render: Render = render_table) -> str:
    """Return the wall time of the finished stages of each variant of an ablation."""
    times = [{stage["stage"]: stage["seconds"][0] for stage in variant["stages"]} for variant in result["variants"]]
    stages = list(dict.fromkeys(stage for each in times for stage in each))
    lines = [
        [
            variant["name"],
            *(f"{each[stage]:,.0f} s" if stage in each else "" for stage in stages),
            f"{sum(each.values()):,.0f} s",
        ]
        for variant, each in zip(result["variants"], times, strict=True)
    ]
    return render(["variant", *stages, "all"], lines)


def _value(value: Any) -> str:
    """Return the cell of a figure of an ablation."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(f"{each:.2f}" if isinstance(each, float) else str(each) for each in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)
