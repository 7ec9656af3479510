"""A run with several seeds: `--seeds 2020,2021,2022`.

Each seed is a run with its own folder. It is cached and continued like any other run. The report of all seeds has means
and standard deviations (n - 1). Its tests use the user as the unit: the differences of a user are added over the seeds.
The candidate lists of a user contain the target for some seeds and not for others; the latter count as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_gr2.console import Console
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.ranking import METRICS, Comparison, adjust, paired_comparison
from recbole_gr2.report import FinishedRun, build_result, new_folder, read_run, write_report
from recbole_gr2.report.result import BASE
from recbole_gr2.seeding import derive_seed
from recbole_gr2.store import explained_disk_errors


def run_seeds(
    seeds: Sequence[int],
    one: Callable[[int], Path | None],
    *,
    draws: int,
    command: str,
    console: Console,
    folder: Path | None = None,
) -> Path | None:
    """Run each seed and write the report of all seeds.

    Args:
        seeds: two or more different seeds of at least 0.
        one: runs a seed and returns the path of its result.json, or None if the run has no result.
        draws: number of bootstrap resamples and of sign flips.
        command: the command line.
        console: where progress and tables are printed.
        folder: folder of the report; by default a new one beside those of the seeds, whose name is the time.

    Returns:
        The path of result.json, or None if a seed has no result.

    Raises:
        ConfigurationError: there are fewer than two seeds, a seed occurs twice, or one is negative.
    """
    if len(set(seeds)) < max(2, len(seeds)) or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ConfigurationError(
            f"--seeds {','.join(map(str, seeds))} does not name two or more different seeds",
            where="--seeds",
            why="A standard deviation needs several runs that differ.",
            do="write, for example, --seeds 2020,2021,2022; use --seed for a single seed",
        )
    paths = []
    for number, seed in enumerate(seeds, start=1):
        console.say(f"seed {seed}, {number} of {len(seeds)}")
        paths.append(one(seed))
    finished = [path for path in paths if path is not None]
    if len(finished) < len(paths):
        return None
    runs = [read_run(path) for path in finished]
    if folder is None:
        folder = new_folder(finished[0].parent.parent)
    else:
        with explained_disk_errors(folder):
            folder.mkdir(exist_ok=True)
    return write_report(folder, combine(runs, command, draws), runs, console)


def combine(runs: Sequence[FinishedRun], command: str, draws: int) -> dict[str, Any]:
    """Return the content of result.json for several seeds of one run.

    Args:
        runs: the finished run of each seed.
        command: the command line.
        draws: number of bootstrap resamples and of sign flips.
    """
    evaluations = [run.evaluation.summary for run in runs]
    frames = [run.per_user() for run in runs]
    seed = derive_seed(runs[0].seed, "seeds")
    diagnostic = {entry["method"] for entry in evaluations[0]["methods"] if entry["diagnostic"]}
    vs_base: dict[tuple[str, str], dict[str, Comparison]] = {}
    for entry in evaluations[0]["methods"]:
        method, scope = entry["method"], entry["scope"]
        if method == BASE:
            continue
        counts = [
            next((each["n"] for each in evaluation["methods"] if _same(each, entry)), 0) for evaluation in evaluations
        ]
        if not all(method in frame.columns for frame in frames):
            vs_base[method, scope] = _mean_differences([_versus_base(each, entry) for each in evaluations], counts)
        elif scope == "hit_users":
            vs_base[method, scope] = compare(frames, method, BASE, seed=seed, draws=draws)
        else:
            vs_base[method, scope] = compare(frames, method, BASE, seed=seed, draws=draws, counts=counts)
    comparisons = [
        {
            "method": pair["method"],
            "versus": pair["versus"],
            "scope": pair["scope"],
            "metrics": compare(frames, pair["method"], pair["versus"], seed=seed, draws=draws),
        }
        for pair in evaluations[0]["comparisons"]
        if all({pair["method"], pair["versus"]} <= set(frame.columns) for frame in frames)
    ]
    tested = {place: found for place, found in vs_base.items() if place[0] not in diagnostic}
    adjust(
        [
            *(found for (_, scope), found in tested.items() if scope == "hit_users"),
            *(pair["metrics"] for pair in comparisons if pair["versus"] not in diagnostic),
        ]
    )
    adjust([found for (_, scope), found in tested.items() if scope == "all_users"])
    return build_result(runs, command, vs_base=vs_base, comparisons=comparisons)


def compare(
    frames: Sequence[pd.DataFrame],
    method: str,
    versus: str,
    *,
    seed: int,
    draws: int,
    counts: Sequence[int] | None = None,
) -> dict[str, Comparison]:
    """Compare two methods over several seeds, with the user as the unit.

    Args:
        frames: per_user.csv of each seed: `user`, and the rank of the target under each method.
        method: the first method.
        versus: the second method.
        seed: seed of the random draws.
        draws: number of bootstrap resamples and of sign flips.
        counts: number of all users of each seed, for differences over all users. Users without a line count with a
            difference of 0. None means that only the users of the frames count.

    Returns:
        For each metric of `ranking.METRICS`, the comparison that `paired_comparison` returns. The difference and its
        interval are means over the candidate lists of all seeds.
    """
    compared = {}
    for metric, value in METRICS.items():
        differences = [
            pd.Series(value(frame[method].to_numpy()) - value(frame[versus].to_numpy()), frame["user"])
            for frame in frames
        ]
        of_user = pd.concat(differences).groupby(level=0).sum().to_numpy()
        lists = sum(map(len, frames))
        if counts is not None:
            of_user = np.concatenate([of_user, np.zeros(max(0, max(counts) - len(of_user)))])
            lists = sum(counts)
        found = paired_comparison(of_user, np.zeros(len(of_user)), seed=seed, draws=draws)
        compared[metric] = {name: v if name == "p" else v * len(of_user) / lists for name, v in found.items()}
    return compared


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (one["method"], one["scope"]) == (other["method"], other["scope"])


def _versus_base(evaluation: Mapping[str, Any], entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the comparisons with the base order that one seed has for a method and scope, {} without any."""
    return next((each["vs_base"] for each in evaluation["methods"] if _same(each, entry)), {})


def _mean_differences(found: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, Comparison]:
    """Return the mean difference of each metric over the users of all seeds, without interval and test.

    A recommender that does not re-rank the candidate lists has no ranks in per_user.csv. The differences of its users
    cannot be added over the seeds.
    """
    return {
        metric: {"diff": float(np.average([each[metric]["diff"] for each in found], weights=counts))}
        for metric in found[0]
        if all(metric in each for each in found)
    }
