"""Learning curves: what training logs, averaged over equal parts of its steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

FIGURES = (  # The logged figures of a round of reinforcement learning that progress lines and reports show.
    "reward",
    "unchanged",
    "reward/rank_gain",
    "reward/ndcg",
    "truncated",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "frac_groups_kept",
    "entropy",
    "teacher_kl",
)


def curve(log: Sequence[Mapping[str, float]], names: Iterable[str] = FIGURES, parts: int = 5) -> dict[str, list[float]]:
    """Return the mean of each figure over equal parts of the log.

    Args:
        log: logged lines, in the order of training.
        names: figures to average. A figure that some line lacks is left out.
        parts: number of parts. A shorter log has one part per line.

    >>> curve([{"reward": 1.0, "loss": 2.0}, {"reward": 3.0, "loss": 2.0}, {"reward": 5.0, "loss": 0.0}], parts=2)
    {'reward': [2.0, 5.0]}
    """
    places = np.array_split(np.arange(len(log)), min(parts, len(log)))
    return {
        name: [float(np.mean([log[place][name] for place in part])) for part in places]
        for name in names
        if all(name in line for line in log)
    }
