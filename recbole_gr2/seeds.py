"""Several seeds of one run in one table: `--seeds 2020,2021,2022`.

Each seed is a run of its own, with its own folder, and is cached and continued as any run is. Figures are means over
the seeds with their standard deviation (n - 1). In the tests the unit is the user: a user's differences are added up
over the seeds, of whose lists some may hold the target and others not, and intervals and p-values are over users.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_gr2.console import Console, render_table
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.ranking import METRICS, paired_comparison
from recbole_gr2.report import (
    COST,
    ROWS,
    SCOPES,
    SHOWN,
    curves_table,
    latex_tables,
    new_folder,
    pairs_table,
    published,
    settings_table,
    slices_table,
    truth_section,
)
from recbole_gr2.seeding import derive_seed
from recbole_gr2.stages.evaluate import DIAGNOSTIC, PAIRS, adjust_pairs, read_per_user
from recbole_gr2.store import write_json

COLUMNS = ("seconds", "peak_memory_mb", "code")  # of each stage, one of each seed


def run_seeds(
    seeds: Sequence[int], one: Callable[[int], Path | None], *, draws: int, command: str, console: Console
) -> Path | None:
    """Run `one(seed)` for each, and put their results together; returns the path of result.json, None without results.

    Args:
        draws: of the bootstrap and of the randomisation test.

    Raises:
        ConfigurationError: fewer than two seeds, or one twice.
    """
    if len(set(seeds)) < max(2, len(seeds)):
        raise ConfigurationError(
            f"--seeds {seeds} are not two or more different numbers",
            where="--seeds",
            do="write --seeds 2020,2021,2022; --seed for a single one",
        )
    paths = []
    for number, seed in enumerate(seeds, start=1):
        console.say(f"seed {seed}, {number} of {len(seeds)}")
        paths.append(one(seed))
    if None in paths:
        return None
    result, frames = combine(paths, command, draws)
    folder = new_folder(paths[0].parent.parent)
    write_json(folder / "result.json", result)
    (folder / "report.md").write_text(render_seeds(result, frames), encoding="utf-8")
    (folder / "table.tex").write_text(latex_tables(result), encoding="utf-8")
    for scope in ("all", "in_list"):
        print(f"\n{scope}\n{seeds_table(result, scope)}", flush=True, file=console.stream)
    console.say(f"report: {folder / 'report.md'}")
    return folder / "result.json"


def combine(paths: Sequence[Path], command: str, draws: int) -> tuple[dict[str, Any], list[pd.DataFrame]]:
    """What the runs with these result.json say together, and each one's per-user ranks."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    folders = [json.loads((path.parent / "run.json").read_text(encoding="utf-8"))["stages"] for path in paths]
    frames = [read_per_user(Path(stages["evaluate"])) for stages in folders]
    rows = []
    for first in runs[0]["rows"]:
        place = first["row"], first["scope"]
        same = [next(r for r in run["rows"] if (r["row"], r["scope"]) == place) for run in runs]
        values = {metric: [row["metrics"][metric] for row in same] for metric in first["metrics"]}
        rows.append(
            {
                "row": first["row"],
                "scope": first["scope"],
                "n": [row["n"] for row in same],
                "metrics": {m: {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1))} for m, v in values.items()},
                "unchanged": None if first["unchanged"] is None else float(np.mean([row["unchanged"] for row in same])),
            }
        )
    there = [name for name in frames[0].columns if name in {row["row"] for row in rows}]
    wanted = [(row, "base") for row in there if row not in ("base", *DIAGNOSTIC)]
    wanted += [(row, other) for row, other in PAIRS if row in there and other in there]
    seed = derive_seed(runs[0]["seeds"][0], "seeds")
    pairs = [
        {"row": row, "versus": other, "metrics": compare(frames, row, other, seed, draws)} for row, other in wanted
    ]
    adjust_pairs(pairs)
    kept = ("dataset", "base_model", "llm", "preset")
    return {
        **{name: runs[0][name] for name in kept},
        "seeds": [run["seeds"][0] for run in runs],
        "command": command,
        "settings": runs[0]["settings"],
        "runs": [str(path) for path in paths],
        "rows": rows,
        "pairs": pairs,
        "truth": means([run["truth"] for run in runs]),
        "curves": means([run["curves"] for run in runs]),
        "stages": [
            {"stage": same[0]["stage"], **{name: [stage[name] for stage in same] for name in COLUMNS}}
            for same in zip(*(run["stages"] for run in runs), strict=True)
        ],
    }, frames


def means(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Figures, or curves of them, of rows or stages: averaged over runs where all have them.

    >>> means([{"sft": {"loss": [3.0, 1.0]}}, {"sft": {"loss": [2.0, 2.0], "loss/ranking": [1.0, 0.5]}}])
    {'sft': {'loss': [2.5, 1.5]}}
    >>> means([{"sft": {"kind": 0.5}, "rl": {"kind": 1.0}}, {"sft": {"kind": 1.0}}])
    {'sft': {'kind': 0.75}}
    """
    return {
        row: {
            name: np.mean([run[row][name] for run in runs], axis=0).tolist()
            for name in figures
            if all(name in run[row] for run in runs)
        }
        for row, figures in runs[0].items()
        if all(row in run for run in runs)
    }


def compare(frames: Sequence[pd.DataFrame], row: str, other: str, seed: int, draws: int) -> dict[str, dict[str, float]]:
    """Paired differences between two rows per list that holds its target, users drawn with all their lists.

    Args:
        frames: of each seed, users and the target's rank under each row.
    """
    compared = {}
    for metric, value in METRICS.items():
        differences = [
            pd.Series(value(frame[row].to_numpy()) - value(frame[other].to_numpy()), frame["user"]) for frame in frames
        ]
        of_user = pd.concat(differences).groupby(level=0).sum().to_numpy()
        found = paired_comparison(of_user, np.zeros(len(of_user)), seed=seed, draws=draws)
        lists = sum(map(len, frames))
        compared[metric] = {name: v if name == "p" else v * len(of_user) / lists for name, v in found.items()}
    return compared


def seeds_table(result: Mapping[str, Any], scope: str) -> str:
    """One line a row: mean and standard deviation of each metric over the seeds, and how far its NDCG@5 goes from that
    of base to that of oracle."""
    rows = [row for row in result["rows"] if row["scope"] == scope]
    shown = [metric for metric in SHOWN if metric in rows[0]["metrics"]]
    ndcg = {row["row"]: row["metrics"]["ndcg@5"]["mean"] for row in rows} if "ndcg@5" in shown else {}
    gap = ndcg["oracle"] - ndcg["base"] if ndcg else 0.0
    lines = [
        [
            row["row"],
            *(f"{row['metrics'][m]['mean']:.4f} ± {row['metrics'][m]['sd']:.4f}" for m in shown),
            f"{(ndcg[row['row']] - ndcg['base']) / gap:+.1%}" if gap and row["row"] != "base" else "",
            "" if row["unchanged"] is None else f"{row['unchanged']:.1%}",
        ]
        for row in rows
    ]
    return render_table(["row", *shown, "gap closed", "unchanged"], lines)


def render_seeds(result: Mapping[str, Any], frames: Sequence[pd.DataFrame]) -> str:
    """report.md: what the seeds say together."""
    seeds = result["seeds"]
    parts = [
        f"# GR2 on {result['dataset']}, {len(seeds)} seeds",
        f"Base model {result['base_model']}, language model {result['llm']}, preset {result['preset']}, seeds "
        f"{', '.join(map(str, seeds))}.\n\n    {result['command']}",
    ]
    for scope, who in SCOPES.items():
        counts = next(row["n"] for row in result["rows"] if row["scope"] == scope)
        said = ", ".join(f"{count:,}" for count in dict.fromkeys(counts))
        parts.append(f"## {result['dataset']}, {who}, n = {said}\n\n```\n{seeds_table(result, scope)}\n```")
    parts += [
        f"Mean ± standard deviation over the seeds. {ROWS}",
        f"## Differences\n\n```\n{pairs_table(result)}\n```\n\nPer list that holds its target, over all seeds, with "
        "95 % bootstrap intervals and p-values of two-sided randomisation tests. The unit is the user, whose "
        "differences are added up over the seeds; p-values are Holm-adjusted over this table and its metrics.",
        f"## Slices\n\nNDCG@5 of all seeds' lists that hold their target.\n\n```\n{slices_table(frames)}\n```",
        *published(result["dataset"]),
        *truth_section(result),
    ]
    if result["curves"]:
        parts.append(
            "## Learning curves\n\nMeans over equal parts of the steps or rounds, of what was trained on, and "
            f"over the seeds.\n\n```\n{curves_table(result['curves'])}\n```"
        )
    cost = [
        [
            stage["stage"],
            *(f"{seconds:,.0f} s" for seconds in stage["seconds"]),
            f"{max(stage['peak_memory_mb']):,.0f} MiB",
            ", ".join(dict.fromkeys(stage["code"])),
        ]
        for stage in result["stages"]
    ]
    whole = ["all", *(f"{sum(stage['seconds'][n] for stage in result['stages']):,.0f} s" for n in range(len(seeds)))]
    header = ["stage", *(f"seed {seed}" for seed in seeds), "peak memory", "code"]
    parts += [
        "## Settings\n\nThose that differ from their defaults; all are in the config.yaml of each run.\n\n"
        f"```\n{settings_table(result['settings'])}\n```",
        f"## Cost\n\n{COST}\n\n```\n{render_table(header, [*cost, [*whole, '', '']])}\n```",
        "Runs: " + ", ".join(Path(run).parent.name for run in result["runs"]) + ".",
    ]
    return "\n\n".join(parts) + "\n"
