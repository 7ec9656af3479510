"""Permutations, ranks and the statistics of paired comparisons. Pure numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np


def promote(items: Sequence[int], first: int) -> tuple[int, ...]:
    """`items` with `first` moved to the front, the others in their order.

    >>> promote((4, 7, 9), 9)
    (9, 4, 7)
    """
    if first not in items:
        raise ValueError(f"item {first} is not in the list {tuple(items)}")
    return (first, *(item for item in items if item != first))


def complete(partial: Sequence[int], items: Sequence[int]) -> tuple[int, ...]:
    """A full permutation of `items`: those of `partial` first (first mention counts, foreign ones dropped), then the
    unmentioned in their order.

    >>> complete((9, 9, 5, 4), (4, 7, 9))
    (9, 4, 7)
    """
    named = [item for item in dict.fromkeys(partial) if item in set(items)]
    return (*named, *(item for item in items if item not in set(named)))


def ndcg_at(rank: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k with one relevant item, from its 1-based rank (B,); 0 beyond k."""
    rank = np.asarray(rank, dtype=float)
    return np.where(rank <= k, 1.0 / np.log2(rank + 1.0), 0.0)


def recall_at(rank: np.ndarray, k: int) -> np.ndarray:
    """Recall@k (= hit@k) with one relevant item, from its 1-based rank (B,)."""
    return (np.asarray(rank) <= k).astype(float)


METRICS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {  # by which orders are compared, of ranks (B,)
    "recall@1": lambda rank: recall_at(rank, 1),
    "recall@5": lambda rank: recall_at(rank, 5),
    "ndcg@5": lambda rank: ndcg_at(rank, 5),
    "ndcg@10": lambda rank: ndcg_at(rank, 10),
}


def paired_comparison(ours: np.ndarray, base: np.ndarray, *, seed: int, draws: int = 10_000) -> dict[str, float]:
    """Mean difference of paired per-user values (B,), with 95 % bootstrap interval and randomisation p-value.

    The test flips the sign of each user's difference at random and counts how often the mean is at least as far from 0
    as the observed one (two-sided, with the +1 correction, so p is never 0).

    >>> paired_comparison(np.array([1.0, 1.0]), np.array([1.0, 1.0]), seed=0)["p"]
    1.0
    """
    difference = np.asarray(ours, dtype=float) - np.asarray(base, dtype=float)
    mean = float(difference.mean())
    moved = difference[difference != 0]
    if moved.size == 0:
        return {"diff": mean, "low": mean, "high": mean, "p": 1.0}
    rng = np.random.default_rng(seed)
    means, extreme = [], 0
    for _ in range(draws // 100):  # 100 draws at a time keep memory at 100 * B
        # Most users do not move: only how many of a resample's B users do, and which, has to be drawn.
        counts = rng.binomial(difference.size, moved.size / difference.size, size=(100, 1))
        drawn = moved[rng.integers(moved.size, size=(100, int(counts.max()) or 1))]
        means.append(np.where(np.arange(drawn.shape[1]) < counts, drawn, 0.0).sum(axis=1) / difference.size)
        signs = rng.choice((-1.0, 1.0), size=(100, moved.size))
        flipped = np.abs((signs * moved).sum(axis=1))
        extreme += int((flipped >= abs(moved.sum()) - 1e-9).sum())
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return {"diff": mean, "low": float(low), "high": float(high), "p": (extreme + 1) / (draws + 1)}


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm-adjusted p-values.

    >>> holm({"a": 0.01, "b": 0.04})
    {'a': 0.02, 'b': 0.04}
    """
    adjusted, running = {}, 0.0
    for position, (name, p) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        running = max(running, min(1.0, p * (len(p_values) - position)))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}
