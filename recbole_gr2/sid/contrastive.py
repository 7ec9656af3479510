"""Contrastive loss of the tokenizer: items that users interact with consecutively get similar latents (GR2, section 3).

Two items are *co-engaged* if they are neighbours in the sequence of a user.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from torch.nn import functional as F


def co_engaged(sequences: Sequence[Sequence[int]], items: int) -> csr_array:
    """Count how often two items are neighbours in a sequence, (N, N) int64. The matrix is symmetric with a 0 diagonal.

    Only neighbours count. They belong to one visit and one need. A sequence of n items thus gives n - 1 pairs instead
    of n * (n - 1) / 2, so that a few users with long sequences do not dominate.

    Args:
        sequences: internal item ids of each user, oldest first. Pass training interactions only.
        items: N. Row and column n belong to the item with the id n + 1.
    """
    steps = (
        np.concatenate(
            [np.stack((s[:-1], s[1:])) for s in map(np.asarray, sequences) if len(s) > 1] or [np.empty((2, 0))], axis=1
        ).astype(np.int64)
        - 1
    )
    before, after = steps[:, steps[0] != steps[1]]
    rows_and_columns = np.concatenate((before, after)), np.concatenate((after, before))
    # The constructor adds up repeated entries.
    return csr_array((np.ones(len(rows_and_columns[0]), dtype=np.int64), rows_and_columns), shape=(items, items))


def sample_positives(
    pairs: csr_array, positions: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one co-engaged item for each item of a batch, with a probability proportional to the count of the pair.

    Args:
        pairs: counts of co-engaged items as `co_engaged` returns them.
        positions: positions of the items of the batch, from 0, (B,).
        generator: source of the draws.

    Returns:
        (anchors, positives), (A,) each, A <= B. `anchors` are the indices into `positions` of the items that have a
        co-engaged item. `positives` are the positions of the items drawn for them.
    """
    cumulative = np.concatenate(([0], np.cumsum(pairs.data)))
    low, high = cumulative[pairs.indptr[positions]], cumulative[pairs.indptr[positions + 1]]
    anchors = np.flatnonzero(low < high)
    draws = generator.integers(low[anchors], high[anchors])
    return anchors, pairs.indices[np.searchsorted(cumulative, draws, side="right") - 1].astype(np.int64)


def positive_mask(pairs: csr_array, anchors: np.ndarray, positives: np.ndarray) -> torch.Tensor:
    """Mark the positives that must not be negatives of an anchor, (A, A) bool.

    Args:
        pairs: counts of co-engaged items as `co_engaged` returns them.
        anchors: positions of items, from 0, (A,).
        positives: positions of the positives of these items, (A,).

    Returns:
        True at [a, b] if the positive b is co-engaged with the anchor a or is the anchor itself. The diagonal is True.
    """
    return torch.from_numpy((pairs[anchors][:, positives].toarray() > 0) | (anchors[:, None] == positives))


def info_nce(latents: torch.Tensor, positives: torch.Tensor, mask: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean over a of -log(exp(s_aa / T) / sum_b exp(s_ab / T)).

    s_ab is the cosine of latent a and positive b. The negatives of a are the positives of the other items of the
    batch, except those that the mask marks. Source: van den Oord et al., arXiv 1807.03748, equation 4.

    Args:
        latents: latents of the anchors, (A, D).
        positives: latents of their positives, (A, D).
        mask: pairs that are no negatives, (A, A) bool, see `positive_mask`.
        temperature: T > 0.

    Returns:
        A scalar. It is 0 for an empty batch.
    """
    if not len(latents):
        return latents.sum()
    cosines = F.normalize(latents, dim=-1) @ F.normalize(positives, dim=-1).T
    excluded = mask & ~torch.eye(len(latents), dtype=torch.bool)
    return F.cross_entropy(cosines.masked_fill(excluded, -torch.inf) / temperature, torch.arange(len(latents)))
