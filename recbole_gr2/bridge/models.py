"""Base models: RecBole models that score the whole catalogue for each user.

`training` trains them and loads them from a folder. `evaluator` turns their scores into recommendations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from recbole_gr2 import compat
from recbole_gr2.bridge.data import Data
from recbole_gr2.config import recbole_properties
from recbole_gr2.errors import ConfigurationError, nearest
from recbole_gr2.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

# Score of an item that a generative model did not generate. It is finite because masked items have -inf, and it is
# exact in float32. Items at or below this score are not proposed.
UNREACHED = -(2.0**100)
Histories = Sequence[Sequence[int]]  # item ids of each of B users, oldest first


def find_model(name: str) -> type:
    """The model class of this name. The plugin's models have priority over RecBole's.

    Raises:
        ConfigurationError: there is no model of this name, or it is neither sequential nor general.
    """
    compat.apply()
    import recbole_gr2.model as plugin

    if name in plugin.MODELS:
        return plugin.load(name)
    from recbole.utils import ModelType, get_model

    try:
        model_class: Any = get_model(name)
    # ImportError: RecBole's last attempt is a package that imports xgboost. AttributeError: the case differs.
    except (ValueError, ImportError, AttributeError) as error:
        names = [file.stem for file in (recbole_properties() / "model").glob("*.yaml")]
        similar = [other for other in nearest(name, names) if other != name]
        raise ConfigurationError(
            f"{name} cannot be loaded: {error}" if name in names else f"there is no model named {name!r}",
            where="base_model, models",
            why="RecBole and the plugin have no usable class of this name",
            do=(f"did you mean {', '.join(similar)}? " if similar else "")
            + f"Name one of RecBole's models, or one of the plugin: {', '.join(plugin.MODELS)}, GR2Generator; "
            "`models` also accepts OneRecThink and OneRecThink-no-think",
        ) from error
    if model_class.type not in (ModelType.SEQUENTIAL, ModelType.GENERAL, ModelType.TRADITIONAL):
        raise ConfigurationError(
            f"{name} is a {model_class.type.name.lower()} model",
            where="base_model, models",
            why="candidates need scores for the whole catalogue from a user and a history alone",
            do="choose a sequential or a general model, e.g. SASRec, GRU4Rec, BPR, ItemKNN",
        )
    return model_class


class PairScores:
    """`full_sort_predict` for a model that only has `predict`: the score of each pair of a row and an item.

    RecBole's trainer evaluates such models in the same way (trainer.py:521). A model with a negative item for each item
    of the history (DIEN) reads them in `predict`, but its scores do not depend on them.

    Args:
        model: a RecBole model.
        items: number of items N + 1, with padding.
        size: number of pairs in one call of `predict`, RecBole's option `eval_batch_size`.
    """

    def __init__(self, model: Any, items: int, size: int) -> None:
        self.model, self.items, self.size = model, items, size

    @staticmethod
    def needed(model_class: Any) -> bool:
        """Whether a model class has no `full_sort_predict`."""
        from recbole.model.abstract_recommender import AbstractRecommender

        return model_class.full_sort_predict is AbstractRecommender.full_sort_predict

    def __call__(self, rows: Any) -> Tensor:
        """Scores of all items for each row, (B * (N + 1),)."""
        import torch

        model = self.model
        negatives = getattr(model, "NEG_ITEM_SEQ", None)
        if negatives and negatives not in rows:
            rows.update(type(rows)({negatives: rows[model.ITEM_SEQ]}))
        scores = []
        for pairs in torch.arange(len(rows) * self.items).split(self.size):
            batch = rows[pairs // self.items]
            batch.update(type(rows)({model.ITEM_ID: (pairs % self.items).to(model.device)}))
            scores.append(model.predict(batch).flatten())
        return torch.cat(scores)


class Batch(NamedTuple):
    """Scored rows.

    Attributes:
        rows: RecBole's Interaction of B rows.
        scores: masked scores of the catalogue for each row, (B, N + 1).
        parts: those of each base model, if the scores are fused from several; else ().
        standardised: standardised scores of each of them, (S, B, N + 1), if the fusion has computed them.
    """

    rows: Any
    scores: Tensor
    parts: tuple[Tensor, ...] = ()
    standardised: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A trained model in evaluation mode that scores the rows of a data set.

    Attributes:
        name: name of the model class.
        model: the RecBole model, or a language model in `generative.Generator`.
        data: the data set.
        exclude_seen: whether items of the user's history are masked.
        metadata: `model`, `hold_out`, `epochs` and other figures of the training.
    """

    name: str
    model: Any
    data: Data
    exclude_seen: bool
    metadata: dict[str, Any]

    @property
    def sources(self) -> Sequence[BaseModel]:
        """The models whose scores are fused: this model alone."""
        return (self,)

    def batches(self, split: str) -> Iterator[Batch]:
        """Rows of a split in batches, with their scores."""
        import torch

        feat, _ = self.data.rows(split)
        size = int(self.data.config["eval_batch_size"])
        for start in progress(range(0, len(feat), size), f"{split} rows, batch"):
            rows = feat[start : start + size]
            histories = [self.data.history(user, split) for user in rows[self.data.uid].tolist()]
            with torch.no_grad():
                batch = self.score(rows, histories)
            # The yield is outside of no_grad. Two interleaved iterators would otherwise restore each other's mode.
            yield batch

    def scores(self, split: str) -> Iterator[tuple[np.ndarray, Tensor]]:
        """User ids (B,) of a split in batches, with their masked scores (B, N + 1)."""
        for batch in self.batches(split):
            yield batch.rows[self.data.uid].numpy(), batch.scores

    def score(self, rows: Any, histories: Histories) -> Batch:
        """Rows with their scores, see `score_rows`."""
        return Batch(rows, self.score_rows(rows, histories))

    def score_rows(self, rows: Any, histories: Histories) -> Tensor:
        """Scores of the catalogue for each row, (B, N + 1) float32. Padding and masked items have -inf.

        Args:
            rows: RecBole's Interaction of B rows.
            histories: all items of each history, of which the rows contain the last ones. They are masked if
                `exclude_seen` is set.
        """
        import torch

        device = torch.device(self.data.config["device"])
        # Some models draw random numbers for their scores (Random, ADMMSLIM). The same rows get the same scores.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.data.settings["seed"])
            scores = self.model.full_sort_predict(rows.to(device))
        scores = scores.view(-1, self.data.item_count + 1).float()
        scores[:, 0] = -torch.inf
        if self.exclude_seen:
            mask_seen(scores, histories)
        return scores

    def break_ties(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Scores with the ties of the targets broken by the rule of the model, see `break_ties`."""
        return break_ties(self.model, scores, targets)


def break_ties(model: Any, scores: Tensor, targets: Tensor) -> Tensor:
    """Scores with the ties of the targets broken by the rule of the model.

    Generative models place the target behind the items that share its semantic ID, so that a tie is no hit. Models
    without a method `break_ties` keep their scores.

    Args:
        model: a RecBole model.
        scores: (B, N + 1).
        targets: target item ids, (B,).
    """
    return model.break_ties(scores, targets) if hasattr(model, "break_ties") else scores


def seen_items(histories: Histories) -> tuple[np.ndarray, np.ndarray]:
    """Row and item id of each item of B histories, as two index arrays for a matrix (B, N + 1).

    >>> seen_items([(4, 2), (), (3,)])
    (array([0, 0, 2]), array([4, 2, 3]))
    """
    row = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    columns = [np.asarray(history, dtype=np.int64) for history in histories]
    return row, np.concatenate(columns) if columns else np.zeros(0, dtype=np.int64)


def mask_seen(scores: Tensor, histories: Histories) -> None:
    """Set the items of each history to -inf in the scores (B, N + 1), in place."""
    import torch

    row, column = seen_items(histories)
    scores[torch.from_numpy(row), torch.from_numpy(column)] = -torch.inf
