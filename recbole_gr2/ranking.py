"""Permutations, ranks and the statistics of paired comparisons. Pure numpy."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import numpy as np

from recbole_gr2.errors import GR2Error

K = TypeVar("K", bound=Hashable)
Comparison = dict[str, float]  # diff, low, high, p and, after `adjust`, p_holm
BLOCK = 100  # Resamples that are computed together. The order of the random draws depends on it.


def promote(items: Sequence[int], first: int) -> tuple[int, ...]:
    """Return `items` with `first` moved to the front. The other items keep their order.

    Raises:
        ValueError: `first` is not in `items`.

    >>> promote((4, 7, 9), 9)
    (9, 4, 7)
    """
    if first not in items:
        raise ValueError(f"item {first} is not in the list {tuple(items)}")
    return (first, *(item for item in items if item != first))


def complete(partial: Sequence[int], items: Sequence[int]) -> tuple[int, ...]:
    """Return a full permutation of `items` that starts with the items of `partial`.

    Args:
        partial: item ids. Of a repeated item the first position counts. Items that are not in `items` are ignored.
        items: all item ids. Those that `partial` does not contain follow in their order.

    >>> complete((9, 9, 5, 4), (4, 7, 9))
    (9, 4, 7)
    """
    allowed = set(items)
    start = [item for item in dict.fromkeys(partial) if item in allowed]
    used = set(start)
    return (*start, *(item for item in items if item not in used))


def ndcg_at(rank: np.ndarray, k: int) -> np.ndarray:
    """Return NDCG@k with one relevant item.

    Args:
        rank: rank of the relevant item, from 1, (B,).
        k: cut-off.

    Returns:
        (B,) float, 0 for ranks above k.
    """
    rank = np.asarray(rank, dtype=float)
    return np.where(rank <= k, 1.0 / np.log2(rank + 1.0), 0.0)


def recall_at(rank: np.ndarray, k: int) -> np.ndarray:
    """Return Recall@k, which is Hit@k, with one relevant item of this rank, from 1: (B,) float."""
    return (np.asarray(rank) <= k).astype(float)


METRICS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {  # of compared methods: ranks (B,) -> values (B,)
    "recall@1": lambda rank: recall_at(rank, 1),
    "recall@5": lambda rank: recall_at(rank, 5),
    "ndcg@5": lambda rank: ndcg_at(rank, 5),
    "ndcg@10": lambda rank: ndcg_at(rank, 10),
}


def paired_comparison(ours: np.ndarray, base: np.ndarray, *, seed: int, draws: int = 10_000) -> Comparison:
    """Compare paired per-user values of two methods.

    The test flips the sign of each user's difference at random. Its p-value is the share of flips whose mean is at
    least as far from 0 as the observed mean. It is two-sided. The observed mean counts as one more flip, so the
    p-value is never 0.

    Args:
        ours: values of the first method, (B,).
        base: values of the second method, (B,).
        seed: seed of the random draws.
        draws: number of bootstrap resamples and of sign flips, at least 1.

    Returns:
        `diff`, the mean of `ours - base`; `low` and `high`, its 95 % bootstrap interval over users; `p`.

    Raises:
        GR2Error: there is no difference, or one is not finite. Its p-value would be the smallest one.

    >>> paired_comparison(np.array([1.0, 1.0]), np.array([1.0, 1.0]), seed=0)["p"]
    1.0
    """
    difference = np.asarray(ours, dtype=float) - np.asarray(base, dtype=float)
    if not difference.size or not np.isfinite(difference).all():
        raise GR2Error(
            f"{np.sum(~np.isfinite(difference))} of {difference.size} differences between two methods are not finite",
            where="paired comparison",
            why="the mean and the p-value need a finite difference of each user",
            do="compute the evaluation again with --from_stage evaluate",
        )
    mean = float(difference.mean())
    moved = difference[difference != 0]
    if moved.size == 0:
        return {"diff": mean, "low": mean, "high": mean, "p": 1.0}
    rng = np.random.default_rng(seed)
    means, extreme = [], 0
    for start in range(0, draws, BLOCK):  # The memory of a block is proportional to BLOCK * B.
        size = min(BLOCK, draws - start)
        # Most differences are 0. It suffices to draw how many of a resample's B users have another one, and which.
        counts = rng.binomial(difference.size, moved.size / difference.size, size=(size, 1))
        resampled = moved[rng.integers(moved.size, size=(size, int(counts.max()) or 1))]
        means.append(np.where(np.arange(resampled.shape[1]) < counts, resampled, 0.0).sum(axis=1) / difference.size)
        signs = rng.choice((-1.0, 1.0), size=(size, moved.size))
        flipped = np.abs((signs * moved).sum(axis=1))
        extreme += int((flipped >= abs(moved.sum()) - 1e-9).sum())
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return {"diff": mean, "low": float(low), "high": float(high), "p": (extreme + 1) / (draws + 1)}


def compare_ranks(
    ours: np.ndarray, base: np.ndarray, *, seed: int, draws: int = 10_000, users: int | None = None
) -> dict[str, Comparison]:
    """Compare two methods on each metric of `METRICS`.

    Args:
        ours: rank of each user's target under the first method, from 1, (B,).
        base: the same under the second method, (B,).
        seed: seed of the random draws, see `paired_comparison`.
        draws: number of bootstrap resamples and of sign flips.
        users: number of all users, at least B. Users without ranks count with a difference of 0. None means B.

    Returns:
        A comparison of each metric, as `paired_comparison` returns it.

    >>> compare_ranks(np.array([1, 2]), np.array([2, 2]), seed=0, users=4)["recall@1"]["diff"]
    0.25
    """
    missing = np.zeros((len(ours) if users is None else users) - len(ours))
    return {
        metric: paired_comparison(
            np.concatenate([value(ours), missing]), np.concatenate([value(base), missing]), seed=seed, draws=draws
        )
        for metric, value in METRICS.items()
    }


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """Return Holm-adjusted p-values, in the order of `p_values`.

    >>> holm({"a": 0.01, "b": 0.04})
    {'a': 0.02, 'b': 0.04}
    """
    adjusted: dict[K, float] = {}
    running = 0.0
    for position, (name, p) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        running = max(running, min(1.0, p * (len(p_values) - position)))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def adjust(family: Sequence[Mapping[str, MutableMapping[str, Any]]]) -> None:
    """Add `p_holm` to each comparison of a family, in place.

    Args:
        family: the comparisons of one table, each by metric. All comparisons and metrics are one family of tests.
            Comparisons without `p` are left as they are.
    """
    p_values = {
        (position, metric): comparison["p"]
        for position, compared in enumerate(family)
        for metric, comparison in compared.items()
        if "p" in comparison
    }
    for (position, metric), p in holm(p_values).items():
        family[position][metric]["p_holm"] = p
