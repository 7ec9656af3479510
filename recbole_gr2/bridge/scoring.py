"""Scores of base models for histories and candidates that are no rows of the data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from recbole_gr2.bridge.evaluator import is_general
from recbole_gr2.bridge.fusion import ranks_of, standardise
from recbole_gr2.bridge.models import UNREACHED, BaseModel, Batch, Histories
from recbole_gr2.config import GENERATOR
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.types import SourceScores

if TYPE_CHECKING:
    from torch import Tensor


class CandidateScores(NamedTuple):
    """What the base models say about the candidates of a list.

    Attributes:
        scores: score of each candidate, of the base model or fused, (K,).
        sources: ranks and scores by each base model, if there are several; else ().
    """

    scores: tuple[float, ...]
    sources: tuple[SourceScores, ...]


def score_candidates(model: BaseModel, histories: Histories, candidates: Histories) -> list[CandidateScores]:
    """Score the candidates of B lists.

    A base model knows the items 1..N of the data set. An item beyond them, and one that the model masks because it is
    in the history, has the lowest score of the row and the rank after all items.

    Args:
        model: the base model, or several as a `FusedModel`.
        histories: item ids 1..N of each history, oldest first, at least one.
        candidates: item ids of the candidates of each list.

    Raises:
        ConfigurationError: a base model cannot score a history alone.
    """
    import torch

    data, found = model.data, []
    size = int(data.config["eval_batch_size"])
    for start in range(0, len(histories), size):
        part = histories[start : start + size]
        rows = rows_of(data, part)
        with torch.no_grad():
            try:
                batch: Batch = model.score(rows, part)
            except KeyError as error:
                raise ConfigurationError(
                    f"a base model needs the column {error} besides the items of a history",
                    where=f"base_model {model.name}",
                    why="a list of another system consists of a history and candidates",
                    do="give the scores of the candidates, or use base models that read the items of the history only",
                ) from error
        for row, items in enumerate(candidates[start : start + size]):
            found.append(scores_of_row(model, batch, row, items))
    return found


def check_histories(model: BaseModel) -> None:
    """Check that each base model scores histories, and not users of the training data.

    Raises:
        ConfigurationError: one is a general model.
    """
    for source in model.sources:
        if source.name != GENERATOR and is_general(source.name):
            raise ConfigurationError(
                f"the base model {source.name} has scores for users of the training data only",
                where="base_model",
                why="it is a general model: it reads the id of a user and no history",
                do="give the scores of the candidates, or train a run with sequential base models",
            )


def rows_of(data: Any, histories: Histories) -> Any:
    """RecBole's rows of histories, with the last items of each and without a user.

    Args:
        data: the data set.
        histories: item ids of each history, oldest first, at least one.
    """
    import torch
    from recbole.data.interaction import Interaction

    config = data.config
    longest = int(config["MAX_ITEM_LIST_LENGTH"])
    items = torch.zeros(len(histories), longest, dtype=torch.long)
    lengths = torch.zeros(len(histories), dtype=torch.long)
    for row, history in enumerate(histories):
        recent = list(history[-longest:])
        items[row, : len(recent)], lengths[row] = torch.tensor(recent), len(recent)
    return Interaction({data.iid + config["LIST_SUFFIX"]: items, config["ITEM_LIST_LENGTH_FIELD"]: lengths})


def scores_of_row(model: BaseModel, batch: Batch, row: int, items: Sequence[int]) -> CandidateScores:
    """Return the scores of the candidates of one row of a batch.

    Args:
        model: the base model, or several as a `FusedModel`.
        batch: rows that it has scored.
        row: number of the row, from 0.
        items: item ids of the candidates.
    """
    scores = _values(batch.scores[row], items)
    if not batch.parts:
        return CandidateScores(scores, ())
    import torch

    sources = []
    for position, (source, part) in enumerate(zip(model.sources, batch.parts, strict=True)):
        known = batch.standardised
        standardised = standardise(part[row : row + 1])[0] if known is None else known[position, row]
        listed = torch.tensor([item if item < part.size(1) else 0 for item in items])  # The rank of padding is last.
        ranks = ranks_of(part[row : row + 1], listed.unsqueeze(0))[0].tolist()
        sources.append(SourceScores(source.name, tuple(ranks), _values(standardised, items)))
    return CandidateScores(scores, tuple(sources))


def _values(scores: Tensor, items: Sequence[int]) -> tuple[float, ...]:
    """The scores of items; the lowest score of the row for items without one."""
    proposed = scores[scores > UNREACHED]
    lowest = float(proposed.min()) if len(proposed) else 0.0
    values = [float(scores[item]) if item < len(scores) else -float("inf") for item in items]
    return tuple(value if value > UNREACHED else lowest for value in values)
