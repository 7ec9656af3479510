"""result.json: one schema for a run of one seed and of several seeds.

docs/result.schema.json describes the schema. Each figure that depends on the seed is a list with one value per seed, or
a mean with a standard deviation.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from recbole_gr2.artifacts import read_per_user
from recbole_gr2.llm.curves import FIGURES, curve
from recbole_gr2.runs import finished_stages, read_result, seed_runs
from recbole_gr2.store import explained_disk_errors, read_json, read_manifest
from recbole_gr2.types import StageRecord

if TYPE_CHECKING:
    from recbole_gr2.config import Settings
    from recbole_gr2.pipeline import Planned

SCHEMA = 2
BASE, ORACLE = "base", "oracle"  # The two reference methods: the base order, and the target first.
SPLITS = {"test": "test", "valid": "validation"}  # value of eval_split -> its name in headings
SCOPES = {"all_users": "all users", "hit_users": "hit users"}
STAGE_FIELDS = ("key", "seconds", "peak_memory_mb", "cached", "code")  # of a stage, one value per seed

VersusBase = Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]  # (method, scope) -> metric -> comparison


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run of one seed whose stages are finished.

    Attributes:
        path: path of its result.json. The folder exists.
        command: the command line of the run.
        dataset: name of the data set.
        base_model: name of the base model.
        llm: name of the language model.
        preset: name of the preset.
        seed: seed of the run.
        settings: the settings that differ from their defaults: key -> {"value", "from"}.
        config: all settings as a YAML text.
        records: manifests of the stages, in the order of the run.
        cached: whether each stage was finished before the run, in the same order.
        folders: folder of each stage, by name.
    """

    path: Path
    command: str
    dataset: str
    base_model: str
    llm: str
    preset: str
    seed: int
    settings: Mapping[str, Mapping[str, Any]]
    config: str
    records: tuple[StageRecord, ...]
    cached: tuple[bool, ...]
    folders: Mapping[str, Path]

    @property
    def split(self) -> str:
        """The split that the run reports: test or valid."""
        return self.settings.get("eval_split", {"value": "test"})["value"]

    @property
    def evaluation(self) -> StageRecord:
        """The record of the stage that evaluated the methods.

        Raises:
            KeyError: no stage of the run evaluates methods.
        """
        for record in self.records:
            if {"methods", "comparisons", "truth"} <= record.summary.keys():
                return record
        raise KeyError("no stage of the run evaluates methods")

    def per_user(self) -> pd.DataFrame:
        """Return the rank of the target of each hit user under each method, see `read_per_user`."""
        return read_per_user(self.folders[self.evaluation.stage])


def finished_run(
    planned: Sequence[Planned], done: Sequence[tuple[StageRecord, bool]], settings: Settings, command: str, path: Path
) -> FinishedRun:
    """Return the run that `pipeline.execute` finished.

    Args:
        planned: the plan of the run.
        done: what `pipeline.execute` returned for it: each stage's record and whether it was cached.
        settings: settings of the run.
        command: the command line of the run.
        path: path of its result.json.
    """
    return FinishedRun(
        path=path,
        command=command,
        dataset=settings["dataset"],
        base_model=" + ".join(settings["base_model"]),
        llm=settings["llm"],
        preset=settings["preset"],
        seed=settings["seed"],
        settings=settings.chosen(),
        config=settings.as_yaml(),
        records=tuple(record for record, _ in done),
        cached=tuple(cached for _, cached in done),
        folders={entry.stage.name: entry.folder for entry in planned},
    )


def read_run(path: Path) -> FinishedRun:
    """Read a finished run of one seed from its folder and the folders of its stages.

    Args:
        path: path of its result.json.

    Raises:
        MissingFileError: a stage of the run is not finished any more.
    """
    result, run = read_result(path.parent), read_json(path.parent / "run.json")
    folders = finished_stages(path.parent)
    records = [record for folder in folders.values() if (record := read_manifest(folder)) is not None]
    return FinishedRun(
        path=path,
        command=run["command"],
        dataset=result["dataset"],
        base_model=result["base_model"],
        llm=result["llm"],
        preset=result["preset"],
        seed=result["seeds"][0],
        settings=result["settings"],
        config=(path.parent / "config.yaml").read_text(encoding="utf-8"),
        records=tuple(records),
        cached=tuple(stage["cached"][0] for stage in result["stages"]),
        folders=folders,
    )


def read_seeds(folder: Path) -> list[FinishedRun]:
    """Read the finished run of each seed of a run, see `read_run`.

    Args:
        folder: the folder of a run of one seed or of several seeds.
    """
    return [read_run(each / "result.json") for each in seed_runs(folder)]


def new_folder(parent: Path) -> Path:
    """Create an empty folder in `parent` whose name is the time. A number distinguishes folders of the same second."""
    with explained_disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        name = time.strftime("%Y%m%d-%H%M%S")
        for number in itertools.count(1):
            folder = parent / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):  # of another run
                folder.mkdir()
                break
    return folder


def build_result(
    runs: Sequence[FinishedRun],
    command: str,
    *,
    vs_base: VersusBase | None = None,
    comparisons: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the content of result.json.

    Args:
        runs: the same run with one or several seeds.
        command: the command line.
        vs_base: comparisons of each method and scope with the base order. The default is those of the only run.
        comparisons: comparisons of methods with each other. The default is those of the only run.

    Raises:
        ValueError: there are several runs and no comparisons of all of them.
    """
    if len(runs) > 1 and (vs_base is None or comparisons is None):
        raise ValueError("the comparisons of several runs are not those of one of them")
    evaluations = [run.evaluation.summary for run in runs]
    first = runs[0]
    return {
        "schema": SCHEMA,
        "dataset": first.dataset,
        "split": first.split,
        "base_model": first.base_model,
        "llm": first.llm,
        "preset": first.preset,
        "seeds": [run.seed for run in runs],
        "command": command,
        "settings": {
            key: dict(entry)
            for key, entry in first.settings.items()
            if all(run.settings.get(key) == entry for run in runs)
        },
        "runs": [str(run.path) for run in runs],
        "methods": [
            _method(same, same[0]["vs_base"] if vs_base is None else vs_base.get(_place(same[0]), {}))
            for same in _same_methods(evaluations)
        ],
        "comparisons": list(evaluations[0]["comparisons"] if comparisons is None else comparisons),
        "truth": means([evaluation["truth"] for evaluation in evaluations]),
        "tokenizer": {
            "uniqueness": [
                record.summary["uniqueness"]
                for run in runs
                for record in run.records
                if isinstance(record.summary.get("uniqueness"), float)
            ]
        },
        "curves": means([learning_curves(run.folders) for run in runs]),
        "stages": stage_entries([list(zip(run.records, run.cached, strict=True)) for run in runs]),
    }


def stage_entries(runs: Sequence[Sequence[tuple[StageRecord, bool]]]) -> list[dict[str, Any]]:
    """Return the key, the cost and the code version of each stage, one value per run.

    Args:
        runs: for each run, the records of its stages and whether each was cached.
    """
    entries = []
    for record, _ in runs[0]:
        same = [
            {
                **{field: getattr(each, field) for field in ("key", "seconds", "peak_memory_mb", "code")},
                "cached": cached,
            }
            for run in runs
            for each, cached in run
            if each.stage == record.stage
        ]
        entries.append({"stage": record.stage, **{field: [each[field] for each in same] for field in STAGE_FIELDS}})
    return entries


def means(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Average figures, or lists of figures, over runs.

    Args:
        runs: for each run, name -> figure -> value. What some run lacks is left out.

    >>> means([{"sft": {"loss": [3.0, 1.0]}}, {"sft": {"loss": [2.0, 2.0], "loss/ranking": [1.0, 0.5]}}])
    {'sft': {'loss': [2.5, 1.5]}}
    >>> means([{"sft": {"kind": 0.5}, "rl": {"kind": 1.0}}, {"sft": {"kind": 1.0}}])
    {'sft': {'kind': 0.75}}
    """
    return {
        name: {
            figure: np.mean([run[name][figure] for run in runs], axis=0).tolist()
            for figure in figures
            if all(figure in run[name] for run in runs) and len({np.shape(run[name][figure]) for run in runs}) == 1
        }
        for name, figures in runs[0].items()
        if all(name in run for run in runs)
    }


def learning_curves(folders: Mapping[str, Path], parts: int = 5) -> dict[str, dict[str, list[float]]]:
    """Return the means of logged figures over equal parts of the training steps.

    Args:
        folders: folders of finished stages, by name. A stage that trains a language model has a log.json: a list of
            logged lines, or one such list for each part of the stage.
        parts: number of parts. A shorter log has one part per line.

    Returns:
        Stage, or stage and part -> figure -> means, from the first part of the steps to the last.
    """
    curves = {}
    for stage, folder in folders.items():
        if not (folder / "log.json").is_file():
            continue
        logged = json.loads((folder / "log.json").read_text(encoding="utf-8"))
        for part, log in (logged if isinstance(logged, dict) else {"": logged}).items():
            if not _is_training_log(log):
                continue
            # A stage may train several times. The curve is that of the last training, whose steps begin at 1 again.
            start = max(n for n, line in enumerate(log) if n == 0 or line["step"] <= log[n - 1]["step"])
            names = FIGURES if "reward" in log[-1] else [name for name in log[-1] if name.startswith("loss")]
            curves[f"{stage} {part}".strip()] = curve(log[start:], names, parts)
    return curves


def unchanged_methods(result: Mapping[str, Any]) -> list[str]:
    """Return the sorted names of the methods that returned every candidate list in the base order.

    The base order itself and diagnostic methods are left out.
    """
    return sorted(
        {
            entry["method"]
            for entry in result["methods"]
            if entry["unchanged"] == 1.0 and entry["method"] != BASE and not entry["diagnostic"]
        }
    )


def in_scope(result: Mapping[str, Any], scope: str) -> list[dict[str, Any]]:
    """Return the entries of the methods in a scope, in the order of the tables."""
    return [entry for entry in result["methods"] if entry["scope"] == scope]


def _place(entry: Mapping[str, Any]) -> tuple[str, str]:
    return entry["method"], entry["scope"]


def _same_methods(evaluations: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return, for each method and scope that all runs have, the entries of all runs."""
    by_place = [{_place(entry): entry for entry in evaluation["methods"]} for evaluation in evaluations]
    return [[entries[place] for entries in by_place] for place in by_place[0] if all(place in e for e in by_place)]


def _method(same: Sequence[Mapping[str, Any]], vs_base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a method in a scope, from those of all runs."""
    first = same[0]
    values = {
        metric: [float(entry["metrics"][metric]) for entry in same]
        for metric in first["metrics"]
        if all(metric in entry["metrics"] for entry in same)
    }
    return {
        "method": first["method"],
        "description": first["description"],
        "diagnostic": first["diagnostic"],
        "scope": first["scope"],
        "n": [entry["n"] for entry in same],
        "metrics": {
            metric: {
                "mean": float(np.mean(each)),
                "sd": float(np.std(each, ddof=1)) if len(each) > 1 else None,
                "values": each,
            }
            for metric, each in values.items()
        },
        "unchanged": None if first["unchanged"] is None else float(np.mean([entry["unchanged"] for entry in same])),
        "vs_base": {metric: dict(comparison) for metric, comparison in vs_base.items()},
    }


def _is_training_log(log: Any) -> bool:
    return isinstance(log, list) and bool(log) and all(isinstance(line, dict) and "step" in line for line in log)
