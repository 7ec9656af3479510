"""`recbole-gr2 runs`: a table of all runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from recbole_gr2.commands.output import AsJson, CheckpointDir, print_json, print_table
from recbole_gr2.errors import ConfigurationError, GR2Error, nearest
from recbole_gr2.runs import RESULT, read_result, run_folders, seed_runs, stage_folders
from recbole_gr2.store import MANIFEST

METRIC = "ndcg@10"  # the metric of the table, if a run has it


def runs(
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Only the runs on this data set.")] = None,
    checkpoint_dir: CheckpointDir = "saved",
    as_json: AsJson = False,
) -> None:
    """List all runs, the newest first.

    The best method is the one with the highest NDCG@10 over all users, or the first metric of the run. Diagnostic
    methods, such as the oracle, are left out. The column `stages` tells whether the files of all stages still exist.

    \b
    Examples:
      recbole-gr2 runs
      recbole-gr2 runs --dataset amazon-beauty --checkpoint_dir results
      recbole-gr2 runs --json
    """
    folders = run_folders(checkpoint_dir)
    known = list(dict.fromkeys(folder.parents[1].name for folder in folders))
    if dataset is not None and dataset not in known:
        near = nearest(dataset, known)
        raise ConfigurationError(
            f"there is no run on the data set {dataset!r:.200}",
            where=str((Path(checkpoint_dir) / "gr2").absolute()),
            why="the folder has runs on these data sets: " + (", ".join(known) or "none"),
            do=(f"did you mean {' or '.join(near)}? " if near else "") + "name another data set or --checkpoint_dir",
        )
    described = []
    for folder in folders:
        if dataset in (None, folder.parents[1].name):
            try:
                described.append(_describe(folder))
            except GR2Error as error:
                print(f"warning: {error}", file=sys.stderr)
    if as_json:
        print_json(described)
    elif not described:
        print(f"no run is finished in {Path(checkpoint_dir) / 'gr2'}")
    else:
        header = ["name", "data set", "date", "base model", "llm", "preset", "seeds", "best method", "stages"]
        print_table(header, [_row(run) for run in described])


def _describe(folder: Path) -> dict[str, Any]:
    """What the table tells of a run. Paths and numbers have their own fields."""
    result = read_result(folder)
    stages = [path for run in seed_runs(folder) for path in stage_folders(run).values()]
    missing = [path for path in stages if not (path / MANIFEST).is_file()]
    method, metric, value = _best(result)
    return {
        "name": folder.name,
        "folder": str(folder),
        "dataset": result["dataset"],
        "date": time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / RESULT).stat().st_mtime)),
        "base_model": result["base_model"],
        "llm": result["llm"],
        "preset": result["preset"],
        "seeds": result["seeds"],
        "best_method": method,
        "metric": metric,
        "value": value,
        "stages": len(stages),
        "missing_stages": [str(path) for path in missing],
    }


def _best(result: Mapping[str, Any]) -> tuple[str, str, float]:
    """The best method that is not diagnostic, the metric, and its mean over the seeds."""
    entries = [e for e in result["methods"] if e["scope"] == "all_users" and not e["diagnostic"]]
    metric = METRIC if all(METRIC in entry["metrics"] for entry in entries) else next(iter(entries[0]["metrics"]))
    best = max((e for e in entries if metric in e["metrics"]), key=lambda entry: entry["metrics"][metric]["mean"])
    return best["method"], metric, best["metrics"][metric]["mean"]


def _row(run: Mapping[str, Any]) -> list[str]:
    missing = len(run["missing_stages"])
    return [
        run["name"],
        run["dataset"],
        run["date"],
        run["base_model"],
        run["llm"],
        run["preset"],
        ", ".join(map(str, run["seeds"])),
        f"{run['best_method']}, {run['metric']} {run['value']:.4f}",
        f"{missing} of {run['stages']} removed" if missing else "complete",
    ]
