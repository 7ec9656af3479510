"""The tokenizer's contrastive loss: items that users take one after the other get like latents (GR2, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from torch.nn import functional as F


def co_engaged(sequences: Sequence[Sequence[int]], items: int) -> csr_array:
    """How often two items stand next to each other in a user's sequence, (N, N): symmetric, its diagonal empty.

    Neighbours only: items of one visit and of one need stand together, and a long history of n items gives n - 1 pairs,
    not the n * (n - 1) / 2 with which a few heavy users would make up most of the positives.

    Args:
        sequences: item ids (1-based) of each user, oldest first. Give training interactions only.
        items: N; row and column i stand for item id i + 1.
    """
    steps = (
        np.concatenate(
            [np.stack((s[:-1], s[1:])) for s in map(np.asarray, sequences) if len(s) > 1] or [np.empty((2, 0))], axis=1
        ).astype(np.int64)
        - 1
    )
    one, other = steps[:, steps[0] != steps[1]]
    ends = np.concatenate((one, other)), np.concatenate((other, one))
    return csr_array((np.ones(len(ends[0]), dtype=np.int64), ends), shape=(items, items))  # adds up what repeats


def draw_positives(pairs: csr_array, rows: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A co-engaged item for each item of a batch, drawn in proportion to how often the two were taken together.

    Args:
        pairs: what `co_engaged` gives.
        rows: item rows of the batch, (B,).

    Returns:
        Positions in `rows` of the items that have a positive, and their positives' item rows, (A,) each, A <= B.
    """
    ends = np.concatenate(([0], np.cumsum(pairs.data)))
    low, high = ends[pairs.indptr[rows]], ends[pairs.indptr[rows + 1]]
    anchors = np.flatnonzero(low < high)
    drawn = generator.integers(low[anchors], high[anchors])
    return anchors, pairs.indices[np.searchsorted(ends, drawn, side="right") - 1].astype(np.int64)


def known_positives(pairs: csr_array, rows: np.ndarray, positives: np.ndarray) -> torch.Tensor:
    """Which positives of others are no negatives of an item: those co-engaged with it, and the item itself.

    Args:
        pairs: what `co_engaged` gives.
        rows, positives: item rows, (A,) each.

    Returns:
        (A, A) bool, True at [a, b] where item a and positive b belong together, the diagonal included.
    """
    return torch.from_numpy((pairs[rows][:, positives].toarray() > 0) | (rows[:, None] == positives))


def info_nce(latents: torch.Tensor, positives: torch.Tensor, known: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over a of -log(exp(s_aa / T) / sum_b exp(s_ab / T)), s_ab the cosine of latent a and positive b.

    van den Oord et al., arXiv 1807.03748, equation 4. The negatives of a are the positives of the batch's other items,
    without those that are known to be positives of a. 0 for an empty batch.

    Args:
        latents, positives: (A, D).
        known: what `known_positives` gives, (A, A).
        temperature: T > 0.
    """
    if not len(latents):
        return latents.sum()
    cosines = F.normalize(latents, dim=-1) @ F.normalize(positives, dim=-1).T
    known = known & ~torch.eye(len(latents), dtype=torch.bool)
    return F.cross_entropy(cosines.masked_fill(known, -torch.inf) / temperature, torch.arange(len(latents)))
