"""Text neighbours: items whose texts are similar to those of the history. The model counts no interactions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from recbole_gr2.model.traditional import TraditionalRecommender, cosines, tfidf_vectors, unit_vectors

if TYPE_CHECKING:
    from recbole.config import Config
    from recbole.data.dataset import Dataset
    from recbole.data.interaction import Interaction
    from torch import Tensor


class TextNeighbours(TraditionalRecommender):
    """Similarity of item texts to the history.

    The score of item j is a sum over the last `max_history` items h of the history. The term of an item of age a (0 for
    the last item) is `age_decay`^a cos(t_h, t_j). The vectors t are TF-IDF vectors of the item texts, or their
    embeddings by the stage `embeddings`.

    The model counts no interactions, so items without training interactions are scored like all others. With TF-IDF, an
    item without words has the score 0. Ties have the order that `recbole_gr2.bridge.evaluator.recommend` documents.

    Args:
        config: RecBole's configuration with the options in properties/model/TextNeighbours.yaml. In addition it has
            `item_texts`, the texts of the items 1..N, or `text_embeddings`, their embeddings (N, D), as the option
            `representation` requires.
        dataset: RecBole's training data.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.age_decay, self.max_history = config["age_decay"], config["max_history"]
        if config["representation"] == "tfidf":
            self.vectors = tfidf_vectors(config["item_texts"])
        else:
            self.vectors = unit_vectors(np.asarray(config["text_embeddings"]))

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Return the scores of all items, (B, N + 1) float32."""
        weights = self.history_weights(interaction, max_history=self.max_history, age_decay=self.age_decay)
        return self.as_scores(cosines(weights, self.vectors), interaction)
