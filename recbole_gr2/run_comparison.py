"""Compare two finished runs on the same users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_gr2.errors import ConfigurationError, nearest
from recbole_gr2.ranking import METRICS, Comparison, adjust, paired_comparison
from recbole_gr2.runs import changed_settings, finished_stages, read_config, read_result, seed_runs
from recbole_gr2.seeding import derive_seed
from recbole_gr2.store import read_lines, read_manifest

if TYPE_CHECKING:
    import pandas as pd

SCOPE = "all_users"


def compare_runs(
    first: Path, second: Path, *, methods: Sequence[str] = (), metrics: Sequence[str] = ()
) -> dict[str, Any]:
    """Compare the methods that two runs share, with the user as the unit.

    A difference is the value of the second run minus that of the first one. The value of a user is the metric of the
    user's target, 0 if the candidate list does not contain it, and the mean over the seeds of a run of several seeds.

    Args:
        first, second: folders of the runs.
        methods: methods to compare; by default all that both runs have and that are not diagnostic.
        metrics: metrics to compare, such as `ndcg@5`; by default those of `ranking.METRICS` that both runs have.

    Returns:
        `runs`, the two folders; `dataset`; `users`, their number; `list_length`, the length of the lists; `settings`,
        the settings that differ, with both values; `methods`, one entry for each method and metric. An entry has
        `method`, `metric`, and `first` and `second`, the metrics over all users as RecBole computes them. If it can be
        tested, it has `diff`, its 95 % bootstrap interval `low` and `high`, `p`, and `p_holm`, adjusted over all
        entries. A test needs a metric of `ranking.METRICS` whose cut-off is not above the length of the lists, and a
        method that ranks the lists of the run.

    Raises:
        ConfigurationError: the runs have other data sets, users or targets, or a method or metric is not in both.
        GR2Error: a file of a run is missing or damaged.
    """
    folders = (first, second)
    results = [read_result(folder) for folder in folders]
    configs = [read_config(folder) for folder in folders]
    users = _check_comparable(folders, results, configs)
    stages = [[finished_stages(run) for run in seed_runs(folder)] for folder in folders]
    longest = _check_same_targets(folders, configs, stages)
    entries = [_methods(result) for result in results]
    shared = [name for name in entries[0] if name in entries[1]]
    chosen = _chosen(methods, shared, "method") or [n for n in shared if not entries[0][n]["diagnostic"]]
    common = [
        metric
        for metric in dict.fromkeys(metric for name in shared for metric in entries[0][name]["metrics"])
        if any(metric in entries[1][name]["metrics"] for name in shared)
    ]
    selected = _chosen(metrics, common, "metric") or [metric for metric in METRICS if metric in common]
    frames = [[_per_user(each) for each in runs] for runs in stages]
    seed, draws = derive_seed(results[0]["seeds"][0], "compare"), configs[0]["eval_draws"]
    compared, family = [], []
    for name in chosen:
        tested: dict[str, Comparison] = {}
        for metric in selected:
            values = [entry[name]["metrics"].get(metric) for entry in entries]
            if None in values:
                continue
            line = {"method": name, "metric": metric, "first": values[0]["mean"], "second": values[1]["mean"]}
            ranked = all(name in frame.columns for each in frames for frame in each)
            if ranked and metric in METRICS and int(metric.partition("@")[2]) <= longest:
                pairs = [_user_values(each, name, metric) for each in frames]
                tested[metric] = _compare(*pairs, users=users, seed=seed, draws=draws)
            compared.append((line, tested.get(metric, {})))
        family.append(tested)
    adjust(family)
    return {
        "runs": [str(folder) for folder in folders],
        "dataset": results[0]["dataset"],
        "users": users,
        "list_length": longest,
        "settings": {**changed_settings(*configs), **_changed_objects(stages)},
        "methods": [{**line, **test} for line, test in compared],
    }


def _changed_objects(stages: Sequence[Sequence[Mapping[str, Path]]]) -> dict[str, list[Any]]:
    """Hashes of the user's modules and files that differ between the first seeds of two runs, with both values."""
    hashes: list[dict[str, Any]] = [{}, {}]
    for found, runs in zip(hashes, stages, strict=True):
        for folder in runs[0].values():
            record = read_manifest(folder)
            values = record.settings if record else {}
            found |= {key: value for key, value in values.items() if key.endswith((".sha", ".sha256"))}
    first, second = hashes
    return {key: [first[key], second[key]] for key in first if key in second and first[key] != second[key]}


def _methods(result: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the methods over all users, by name."""
    return {entry["method"]: entry for entry in result["methods"] if entry["scope"] == SCOPE}


def _chosen(names: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """The given names.

    Raises:
        ConfigurationError: both runs do not have one of them.
    """
    for name in names:
        if name not in known:
            near = nearest(name, known)
            raise ConfigurationError(
                f"the runs do not both have the {what} {name!r:.200}",
                where=f"--{what}s" if what == "method" else f"--{what}",
                why="only what both runs have can be compared",
                do=(f"did you mean {' or '.join(near)}? " if near else "") + f"Choose from {', '.join(known)}",
            )
    return list(dict.fromkeys(names))


def _check_comparable(
    folders: Sequence[Path], results: Sequence[Mapping[str, Any]], configs: Sequence[Mapping[str, Any]]
) -> int:
    """Check that two runs evaluated the same number of users of one data set, and return this number."""
    counts = [sorted({n for entry in _methods(result).values() for n in entry["n"]}) for result in results]
    samples = [config["eval_max_lists"] for config in configs]
    reasons = {
        "the runs have different data sets": [result["dataset"] for result in results],
        "the runs have different splits": [config["eval_args"] for config in configs],
        "the runs have different numbers of users": [", ".join(map(str, each)) for each in counts],
        "the runs sample different numbers of users (eval_max_lists)": samples,
        "the runs sample different users (eval_max_lists), because their seeds differ": [
            result["seeds"] if sample is not None else [] for result, sample in zip(results, samples, strict=True)
        ],
    }
    for reason, (one, other) in reasons.items():
        if one != other:
            raise ConfigurationError(
                f"{reason}: {one} and {other}",
                where=f"{folders[0]}, {folders[1]}",
                why="a paired test compares two values of the same user",
                do="compare runs with the same data set, filters, split and eval_max_lists",
            )
    if len(counts[0]) != 1 or (samples[0] is not None and len(results[0]["seeds"]) > 1):
        raise ConfigurationError(
            "the seeds of a run have different users",
            where=str(folders[0]),
            why="a paired test compares two values of the same user",
            do="compare the runs of single seeds",
        )
    return counts[0][0]


def _check_same_targets(
    folders: Sequence[Path], configs: Sequence[Mapping[str, Any]], stages: Sequence[Sequence[Mapping[str, Path]]]
) -> int:
    """Check that the users of two runs have the same test targets.

    Returns:
        The length of the lists of both runs: a target that a list does not contain has a higher rank.
    """
    targets: list[dict[str, str]] = []
    longest = []
    for config, runs in zip(configs, stages, strict=True):
        lines = list(read_lines(runs[0]["candidates"] / "test.jsonl"))
        targets.append({line["user_id"]: line["target"] for line in lines})
        # A list of the package is shorter only if there are no other items. An imported one may have any length.
        shortest = min((len(line["candidates"]) for line in lines), default=0)
        longest.append(shortest if config["cand_file"] else config["cand_pool"] or config["cand_num"])
    other = [user for user, target in targets[0].items() if targets[1].get(user, target) != target]
    if other:
        raise ConfigurationError(
            f"{len(other):,} users have different test targets, for example {other[0]}",
            where=f"{folders[0]}, {folders[1]}",
            why="the data, the filters or the split of the runs differ, and a paired test needs the same task",
            do="compare runs on the same data",
        )
    return min(longest)


def _per_user(stages: Mapping[str, Path]) -> pd.DataFrame:
    from recbole_gr2.artifacts import read_per_user

    return read_per_user(stages["evaluate"])


def _user_values(frames: Sequence[pd.DataFrame], method: str, metric: str) -> pd.Series:
    """The value of each hit user, the mean over the seeds; a seed whose list does not contain the target counts as 0.

    Args:
        frames: per_user.csv of each seed.
        method: the method.
        metric: a name of `METRICS`.
    """
    import pandas as pd

    values = [pd.Series(METRICS[metric](frame[method].to_numpy()), frame["user"]) for frame in frames]
    return pd.concat(values).groupby(level=0).sum() / len(frames)


def _compare(first: pd.Series, second: pd.Series, *, users: int, seed: int, draws: int) -> Comparison:
    """Compare the values of the hit users of two runs. Other users have the value 0 in both runs."""
    hits = first.index.union(second.index)
    others = np.zeros(users - len(hits))
    before, now = (np.concatenate([each.reindex(hits, fill_value=0.0), others]) for each in (first, second))
    return paired_comparison(now, before, seed=seed, draws=draws)
