"""Split examples into batches."""

from __future__ import annotations

from collections.abc import Sequence


def by_length(lengths: Sequence[int], batch_size: int, *, groups: Sequence[int] | None = None) -> list[list[int]]:
    """Split positions into batches of similar length, the longest first.

    Similar lengths need little padding. A batch that does not fit into memory fails at once, because the longest
    examples come first.

    Args:
        lengths: Length of each of N examples.
        batch_size: Size of every batch except the last, at least 1.
        groups: A number per example. Positions are sorted by this number first. None puts all into one group.

    Returns:
        Batches of positions 0..N-1. Examples of equal length keep their order.

    >>> by_length([3, 9, 9, 1], 2)
    [[1, 2], [0, 3]]
    """
    numbers = groups if groups is not None else [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda position: (numbers[position], -lengths[position], position))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def micro_batch_size(batch_size: int, at_most: int) -> int:
    """Return the largest divisor of `batch_size` that is not above `at_most`.

    Args:
        batch_size: Examples of an optimizer step, at least 1.
        at_most: Largest number of examples that pass through the model at once, at least 1.

    >>> micro_batch_size(12, 8), micro_batch_size(16, 64)
    (6, 16)
    """
    return max(size for size in range(1, min(at_most, batch_size) + 1) if batch_size % size == 0)
