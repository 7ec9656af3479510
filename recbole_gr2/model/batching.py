"""Batches of sequences of similar length."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def by_length(lengths: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """Split a batch into slices of sequences of similar length, the shortest first.

    Most sequences are much shorter than the longest of a batch. Without the slices most of the work would be padding.

    Args:
        lengths: length of each sequence, (B,).
        size: number of sequences per slice.

    Yields:
        (positions in the batch, (S,); length of the longest sequence of the slice).
    """
    for positions in lengths.argsort().split(size):
        yield positions, int(lengths[positions].max())
