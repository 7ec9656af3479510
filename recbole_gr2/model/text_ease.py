"""EASE with item texts: a linear model in closed form whose rows are users and the dimensions of text embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse
import torch

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.model import linear
from recbole_gr2.model.traditional import TraditionalRecommender, unit_vectors

if TYPE_CHECKING:
    from recbole.config import Config
    from recbole.data.dataset import Dataset
    from recbole.data.interaction import Interaction
    from torch import Tensor


class TextEASE(TraditionalRecommender):
    """EASE (Steck, WWW 2019, arXiv 1905.03375) with the text embeddings of the items as further rows.

    The weights are B = -P / diag(P) with a diagonal of 0 and P = (X^T X + `text_weight` T T^T + `reg_weight` I)^-1. X
    is the user-item matrix of the training sequences, and T are the text embeddings, scaled to length 1. The score of
    item j is the sum of B_hj over all items h of the row's history, of which the `max_weights` largest B_h* are kept.

    Beyond `linear.EXACT_ITEMS` items the matrix is too large. The weights are then sparse: a ridge regression of each
    item on a few neighbours, see `recbole_gr2.model.linear.neighbour_weights`. `max_weights` has no effect on them.

    An item without training interactions gets weights from items with similar texts. With `text_weight` 0 and all
    weights the model is EASE, and such items have the score 0. Items with equal scores have the order that
    `recbole_gr2.bridge.evaluator.recommend` documents.

    Args:
        config: RecBole's configuration with the options in properties/model/TextEASE.yaml. In addition it has
            `text_embeddings`, the embeddings (N, D) of the items 1..N.
        dataset: RecBole's training data.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.reg_weight, self.text_weight = config["reg_weight"], config["text_weight"]
        self.max_weights = config["max_weights"]
        self.embeddings = np.asarray(config["text_embeddings"])
        self.weights: scipy.sparse.csr_matrix | None = None  # B, (N + 1, N + 1)
        self.other_parameter_name = ["weights"]
        if self.n_items - 1 > linear.EXACT_ITEMS:
            self.note = (
                f"TextEASE has sparse weights, because there are more than {linear.EXACT_ITEMS:,} items: each item is "
                f"predicted by {linear.TOGETHER} items with common users and {linear.SIMILAR} with similar texts"
            )

    def fit(self, dataset: Dataset) -> None:
        """Compute the weights from the training sequences.

        Raises:
            ConfigurationError: the matrix cannot be inverted in float32.
        """
        users, items = self.training_sequences(dataset)
        ones = np.ones(len(items), dtype=np.float32)
        interactions = scipy.sparse.csr_matrix((ones, (users, items)), shape=(dataset.user_num, self.n_items))[:, 1:]
        vectors = unit_vectors(self.embeddings)[1:]
        options = {"ridge": self.reg_weight, "text_weight": self.text_weight}
        if self.n_items - 1 > linear.EXACT_ITEMS:
            weights = linear.neighbour_weights(interactions, vectors, **options)
            self.weights = scipy.sparse.csr_matrix(
                (weights.data, weights.indices + 1, np.r_[0, weights.indptr]), shape=(self.n_items, self.n_items)
            )
            return
        try:
            inverse = linear.inverse_gram(interactions, vectors, **options)
        except torch.linalg.LinAlgError as error:
            raise ConfigurationError(
                f"TextEASE cannot invert its matrix with reg_weight {self.reg_weight}",
                where="reg_weight",
                why="the matrix of interactions and texts has no full rank in float32",
                do="raise reg_weight",
            ) from error
        self.weights = linear.largest_weights(inverse, self.max_weights)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Return the scores of all items, (B, N + 1) float32."""
        return self.as_scores((self.history_weights(interaction) @ self.weights).toarray(), interaction)
