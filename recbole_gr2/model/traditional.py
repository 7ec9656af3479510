"""Sequential models without gradient training: one pass over the training sequences computes all that they need.

RecBole calls such models traditional (Pop, ItemKNN, EASE). RecBole's own ones score the training items of a user. The
models of this package score the history of a row, so that the same model serves training, validation and test requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse
import torch

from recbole_gr2 import compat

compat.apply()  # Before RecBole's models are imported: one of them slows down every backward pass of the process.

from recbole.model.abstract_recommender import SequentialRecommender  # noqa: E402
from recbole.utils import InputType  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from recbole_gr2.errors import ConfigurationError  # noqa: E402

if TYPE_CHECKING:
    from recbole.config import Config
    from recbole.data.dataset import Dataset
    from recbole.data.interaction import Interaction


class TraditionalRecommender(SequentialRecommender):
    """Base class of models that `fit` computes from the training sequences.

    The trainer calls `fit` once instead of an epoch, see `recbole_gr2.bridge.training`. The result is stored as RecBole
    stores it: buffers in the state dict, and matrices that `other_parameter_name` names in files of their own.

    Args:
        config: RecBole's configuration with the options of the model. `max_history` and `age_decay` are options of all
            models that weight the history by its age, see `history_weights`.
        dataset: RecBole's training data.
    """

    input_type = InputType.POINTWISE
    note = ""  # A sentence for the log, if the model is computed in another way than usual.

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.unused = nn.Parameter(torch.zeros(1))  # RecBole's trainer builds an optimizer, which needs a parameter.

    def fit(self, dataset: Dataset) -> None:
        """Compute the model from RecBole's training rows. A model that only reads item texts has nothing to do."""

    def training_sequences(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Return all training interactions in the order of the sequences: user ids (R,) and item ids (R,).

        RecBole has one row per prefix, sorted by user and length. The first item of a sequence is the history of its
        first row. The other items are the targets of the rows.
        """
        feat = dataset.inter_feat
        users, targets = feat[dataset.uid_field].numpy(), feat[self.ITEM_ID].numpy()
        starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]][: len(users)])
        first = feat[self.ITEM_SEQ][:, 0].numpy()[starts]
        return np.insert(users, starts, users[starts]), np.insert(targets, starts, first)

    def history_weights(
        self, interaction: Interaction, *, max_history: int | None = None, age_decay: float = 1.0
    ) -> scipy.sparse.csr_matrix:
        """Return the weight of each item in each history, (B, N + 1) float32. The weights of a repeated item are added.

        Args:
            interaction: RecBole's rows. Histories are padded at the end.
            max_history: number of most recent items with a weight; None for all items of the row.
            age_decay: the weight of an item is `age_decay` to the power of its age. The last item has the age 0.
        """
        items, lengths = interaction[self.ITEM_SEQ].cpu().numpy(), interaction[self.ITEM_SEQ_LEN].cpu().numpy()
        ages = lengths[:, None] - 1 - np.arange(items.shape[1])
        rows, places = np.nonzero((ages >= 0) & (ages < (max_history or items.shape[1])))
        weights = (float(age_decay) ** ages[rows, places]).astype(np.float32)
        return scipy.sparse.csr_matrix((weights, (rows, items[rows, places])), shape=(len(items), self.n_items))

    def as_scores(self, scores: np.ndarray, interaction: Interaction) -> Tensor:
        """Return scores (B, N + 1) as a float32 tensor on the device of the rows."""
        return torch.from_numpy(np.ascontiguousarray(scores, dtype=np.float32)).to(interaction[self.ITEM_SEQ].device)

    def predict(self, interaction: Interaction) -> Tensor:
        """Return the score of one item per row, (B,)."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID].unsqueeze(1)).squeeze(1)


def tfidf_vectors(texts: Sequence[str]) -> scipy.sparse.csr_matrix:
    """Return the TF-IDF vectors of the items 0..N, (N + 1, V) float32. Item 0 is padding, its vector is 0.

    The vectors are those of scikit-learn's TfidfVectorizer with its defaults: words of at least two characters in lower
    case, the logarithm of the inverse document frequency, and length 1. The vector of an item without words is 0.

    Args:
        texts: texts of the items 1..N.

    Raises:
        ConfigurationError: no text has a word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        vectors = TfidfVectorizer(dtype=np.float32).fit_transform(texts)
    except ValueError as error:  # an empty vocabulary
        raise ConfigurationError(
            f"the item texts have no words ({error})",
            where="text_title, text_brand, text_categories, text_description",
            why="the model compares items by the words of their texts",
            do="name columns of the .item file with texts, or choose a model that reads no texts",
        ) from error
    return scipy.sparse.vstack([scipy.sparse.csr_matrix((1, vectors.shape[1]), dtype=np.float32), vectors]).tocsr()


def unit_vectors(embeddings: np.ndarray) -> np.ndarray:
    """Return text embeddings of the items 0..N scaled to length 1, (N + 1, D) float32. Item 0 is padding and stays 0.

    Args:
        embeddings: text embeddings of the items 1..N, (N, D). An embedding of length 0 stays 0.
    """
    vectors = np.zeros((len(embeddings) + 1, embeddings.shape[1]), dtype=np.float32)
    vectors[1:] = embeddings
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.where(lengths > 0, lengths, 1)
    return vectors


def cosines(weights: scipy.sparse.csr_matrix, vectors: scipy.sparse.csr_matrix | np.ndarray) -> np.ndarray:
    """Return the weighted sums of the cosines between the items of histories and all items, (B, N + 1) float32.

    Args:
        weights: weights of the items of each history, (B, N + 1).
        vectors: vectors of length 1 or 0, (N + 1, V), sparse or dense.
    """
    profiles = weights @ vectors
    if scipy.sparse.issparse(profiles):  # A dense right-hand side is faster than a product of two sparse matrices.
        profiles = profiles.toarray()
    return (vectors @ np.ascontiguousarray(profiles.T)).T
