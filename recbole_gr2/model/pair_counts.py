"""Pair counts: items that follow the items of the history in other users' sequences, relative to their popularity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse
import torch

from recbole_gr2.model.traditional import TraditionalRecommender, cosines, tfidf_vectors

if TYPE_CHECKING:
    from recbole.config import Config
    from recbole.data.dataset import Dataset
    from recbole.data.interaction import Interaction
    from torch import Tensor


class PairCounts(TraditionalRecommender):
    """Counts of item pairs with a decay in time, and optionally the similarity of item texts.

    The score of item j is `popularity_weight` log p_j plus a sum over the last `max_history` items h of the history.
    The term of an item of age a (0 for the last item) is `age_decay`^a [log(1 + C_hj / (`popularity_scale` p_j)) +
    `text_weight` cos(t_h, t_j)].

    C_hj counts how often j occurs at most `window` steps after h in a training sequence. A pair at distance d counts
    `distance_decay`^(d - 1). p_j = (n_j + `smoothing`) / sum_k (n_k + `smoothing`) is the popularity of j with n_j
    training interactions. t are TF-IDF vectors of the item texts.

    Items without training interactions have finite scores. They tie if `text_weight` is 0. Ties have the order that
    `recbole_gr2.bridge.evaluator.recommend` documents.

    Args:
        config: RecBole's configuration with the options in properties/model/PairCounts.yaml. In addition it has
            `item_texts`, the texts of the items 1..N.
        dataset: RecBole's training data.
    """

    log_popularity: Tensor

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.distance_decay, self.window = config["distance_decay"], config["window"]
        self.age_decay, self.max_history = config["age_decay"], config["max_history"]
        self.popularity_scale, self.smoothing = config["popularity_scale"], config["smoothing"]
        self.popularity_weight, self.text_weight = config["popularity_weight"], config["text_weight"]
        self.vectors = tfidf_vectors(config["item_texts"]) if self.text_weight else None
        self.register_buffer("log_popularity", torch.zeros(self.n_items))
        self.pairs: scipy.sparse.csr_matrix | None = None  # log(1 + C / (popularity_scale p)), (N + 1, N + 1)
        self.other_parameter_name = ["pairs"]

    def fit(self, dataset: Dataset) -> None:
        """Count items and pairs of the training sequences."""
        users, items = self.training_sequences(dataset)
        counts = np.bincount(items, minlength=self.n_items).astype(np.float64)
        popularity = (counts[1:] + self.smoothing) / (counts[1:] + self.smoothing).sum()
        popularity = np.r_[1.0, popularity]  # Padding.
        pairs = decayed_pairs(users, items, self.window, self.distance_decay, self.n_items)
        pairs.data = np.log1p(pairs.data / (self.popularity_scale * popularity[pairs.indices]))
        self.pairs = pairs.astype(np.float32)
        self.log_popularity.copy_(torch.from_numpy(np.log(popularity)))

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Return the scores of all items, (B, N + 1) float32."""
        weights = self.history_weights(interaction, max_history=self.max_history, age_decay=self.age_decay)
        scores = (weights @ self.pairs).toarray()
        if self.vectors is not None:
            scores += self.text_weight * cosines(weights, self.vectors)
        scores += self.popularity_weight * self.log_popularity.cpu().numpy()
        return self.as_scores(scores, interaction)


def decayed_pairs(
    users: np.ndarray, items: np.ndarray, window: int, decay: float, size: int
) -> scipy.sparse.csr_matrix:
    """Return the counts C of ordered pairs, (size, size) float64: C[h, j] counts j after h.

    Args:
        users: user of each interaction, (R,). The interactions of a user are adjacent and in time order.
        items: item of each interaction, (R,).
        window: largest distance of a pair, in interactions.
        decay: a pair at distance d counts `decay` to the power of d - 1.
        size: number of items with padding.

    >>> decayed_pairs(np.array([7, 7, 7, 8]), np.array([1, 2, 3, 1]), 5, 0.5, 4).toarray()[1]
    array([0. , 0. , 1. , 0.5])
    """
    before, after, weights = [], [], []
    for distance in range(1, min(window, len(items) - 1) + 1):
        same = users[distance:] == users[:-distance]
        before.append(items[:-distance][same])
        after.append(items[distance:][same])
        weights.append(np.full(same.sum(), decay ** (distance - 1)))
    if not before:
        return scipy.sparse.csr_matrix((size, size))
    entries = np.concatenate(weights), (np.concatenate(before), np.concatenate(after))
    return scipy.sparse.csr_matrix(entries, shape=(size, size))
