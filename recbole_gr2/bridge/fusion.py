"""Fusion: one ranking of the catalogue from the scores of several base models.

Every base model scores the whole catalogue for a row. The scores are made comparable within the row, and joined with a
weight for each model in one of three ways:

* `zscore`: each model's scores, standardised over the items that are not masked. The fused score is their weighted sum.
* `rank`: reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009). An item at rank r of a model counts
  1 / (60 + r).
* `quota`: each model fills a share of the places. The r-th item of a model has the r-th of its places, and an item that
  several models propose has the best of its places. So an item enters the list even if only one model can score it.

Validation chooses the weights: those with which the most lists of K candidates contain their target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from recbole_gr2.bridge.models import UNREACHED, BaseModel, Batch, Histories
from recbole_gr2.errors import QualityCheckError
from recbole_gr2.ranking import ndcg_at

if TYPE_CHECKING:
    from torch import Tensor

RANK_CONSTANT = 60  # of reciprocal rank fusion, the value of its paper
GRID = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # weights that are tried for a model. Our choice.
PASSES = 2  # times that the search changes each weight. Our choice.
POOL = 200  # items of each model among which the search ranks a target. Our choice.


def standardise(scores: Tensor) -> Tensor:
    """Standardise the scores of each row over its items that are not masked.

    Items that a generative model did not reach have the lowest standardised score of their row. A row whose items have
    equal scores becomes 0.

    Args:
        scores: (B, N + 1); masked items have -inf.

    Returns:
        (B, N + 1) float32; masked items have -inf.

    >>> import torch
    >>> standardise(torch.tensor([[-torch.inf, 1.0, 3.0]]))
    tensor([[-inf, -1.,  1.]])
    """
    import torch

    masked, reached = scores == -torch.inf, scores > UNREACHED
    count = reached.sum(1, keepdim=True).clamp(min=1)
    values = scores.float().masked_fill(~reached, 0)
    values -= (values.sum(1, keepdim=True, dtype=torch.double) / count).float()
    values.masked_fill_(~reached, 0)
    deviation = torch.linalg.vector_norm(values, dim=1, keepdim=True, dtype=torch.double) / count.sqrt()
    values /= deviation.float().masked_fill(deviation == 0, 1)
    if not torch.equal(masked, ~reached):  # A generative model did not reach some items.
        lowest = values.masked_fill(~reached, torch.inf).amin(1, keepdim=True)
        values = torch.where(reached, values, lowest.masked_fill(lowest == torch.inf, 0))
    return values.masked_fill_(masked, -torch.inf)


def item_ranks(scores: Tensor) -> Tensor:
    """Rank of each item in its row by descending score, from 1, (B, N + 1) int64. Ties are in the order of the ids.

    >>> import torch
    >>> item_ranks(torch.tensor([[-torch.inf, 5.0, 9.0, 5.0]]))
    tensor([[4, 2, 1, 3]])
    """
    import torch

    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    places = torch.arange(1, scores.size(1) + 1, device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def ranks_of(scores: Tensor, items: Tensor) -> np.ndarray:
    """Rank of some items in their row, (B, D) int64: those of `item_ranks`, without a sort of all positions.

    Args:
        scores: (B, N + 1).
        items: ids of the items, (B, D).

    >>> import torch
    >>> ranks_of(torch.tensor([[-torch.inf, 5.0, 9.0, 5.0]]), torch.tensor([[3, 2]]))
    array([[3, 1]])
    """
    values, chosen, columns = scores.float().cpu().numpy(), items.cpu().numpy(), scores.size(1)
    wanted = np.take_along_axis(values, chosen, axis=1)
    ordered = np.sort(values, axis=1)
    ranks = np.empty(chosen.shape, dtype=np.int64)
    for row, (ascending, own) in enumerate(zip(ordered, wanted, strict=True)):
        ranks[row] = columns + 1 - np.searchsorted(ascending, own, side="right")
        ties = np.flatnonzero(columns + 1 - ranks[row] - np.searchsorted(ascending, own, side="left") > 1)
        for place in ties:  # Equal scores are in the order of the ids.
            ranks[row, place] += np.count_nonzero(values[row, : chosen[row, place]] == own[place])
    return ranks


def places_of(weights: Sequence[float], count: int) -> np.ndarray:
    """Places of the first `count` items of each model in a list that they share in proportion to their weights.

    The r-th item of a model with weight w has the position (r - 1/2) / w. All positions are sorted; the model that
    comes first in the sequence has the earlier of two equal ones.

    Args:
        weights: weight of each model; with weight 0 a model has no place.
        count: number of items of each model.

    Returns:
        (S, count), from 1; infinite for a model without places.

    >>> places_of([2, 1], 3)
    array([[1., 3., 4.],
           [2., 5., 6.]])
    """
    positions = np.full((len(weights), count), np.inf)
    for model, weight in enumerate(weights):
        if weight > 0:
            positions[model] = (np.arange(1, count + 1) - 0.5) / weight
    order = np.argsort(positions, axis=None, kind="stable")
    places = np.empty(positions.size)
    places[order] = np.arange(1, positions.size + 1)
    return np.where(np.isfinite(positions), places.reshape(positions.shape), np.inf)


class Fusion(NamedTuple):
    """How the scores of one model are made comparable, and how those of all models are joined.

    Attributes:
        name: zscore, rank or quota.
    """

    name: str

    def comparable(self, scores: Tensor) -> Tensor:
        """Return standardised scores, or ranks as floats, (B, N + 1); masked items have -inf."""
        import torch

        if self.name == "zscore":
            return standardise(scores)
        # Items that a generative model did not reach come last.
        places = item_ranks(scores).masked_fill(scores <= UNREACHED, scores.size(1))
        return places.double().masked_fill(scores == -torch.inf, -torch.inf)

    def fuse(self, parts: Tensor, weights: Sequence[float]) -> Tensor:
        """Join what `comparable` returned for each model.

        Args:
            parts: (S, ...); masked items have -inf in every part.
            weights: weight of each model, (S,). At least one is above 0.

        Returns:
            Fused scores of the shape of one part; masked items have -inf.
        """
        import torch

        masked = parts[0] == -torch.inf
        if self.name == "quota":
            places = parts.masked_fill(masked, 1)
            table = torch.from_numpy(places_of(weights, int(places.max()))).to(parts.device)
            fused = -torch.stack([row[part.long() - 1] for row, part in zip(table, places, strict=True)]).amin(0)
        else:  # One part after the other needs the least memory. What it gives for masked items is replaced below.
            fused = torch.zeros_like(parts[0])
            for part, weight in zip(parts, torch.tensor(weights, dtype=parts.dtype, device=parts.device), strict=True):
                fused += part * weight if self.name == "zscore" else weight / (RANK_CONSTANT + part)
        return fused.masked_fill_(masked, -torch.inf)


@dataclass(frozen=True, kw_only=True)
class FusedModel(BaseModel):
    """Several base models as one. `model` is None.

    Attributes:
        members: the base models. They mask the same items.
        fusion: how their scores are joined.
        weights: weight of each base model.
    """

    members: tuple[BaseModel, ...]
    fusion: Fusion
    weights: tuple[float, ...]

    @property
    def sources(self) -> Sequence[BaseModel]:
        """The models whose scores are fused."""
        return self.members

    @classmethod
    def of(cls, sources: Sequence[BaseModel], fusion: Fusion, weights: Sequence[float]) -> FusedModel:
        """Fuse base models."""
        first = sources[0]
        return cls(
            name=" + ".join(source.name for source in sources),
            model=None,
            data=first.data,
            exclude_seen=first.exclude_seen,
            metadata={"hold_out": first.metadata["hold_out"]},
            members=tuple(sources),
            fusion=fusion,
            weights=tuple(weights),
        )

    def score(self, rows: Any, histories: Histories) -> Batch:
        """Scores of the catalogue for each row, fused and of each base model, see `Batch`."""
        import torch

        parts = tuple(source.score_rows(rows, histories) for source in self.members)
        comparable = torch.stack([self.fusion.comparable(part) for part in parts])
        fused = self.fusion.fuse(comparable, self.weights)
        return Batch(rows, fused, parts, comparable if self.fusion.name == "zscore" else None)


def choose_weights(sources: Sequence[BaseModel], fusion: Fusion, count: int) -> tuple[tuple[float, ...], float]:
    """Choose the weights of base models on validation rows.

    Starting from equal weights, the search changes one weight after the other to the best value of `GRID`, in
    `PASSES` passes. The best weights are those with the most targets among the first `count` items; of equal ones,
    those with the larger mean NDCG at `count`; of these, the ones tried first. A target is ranked among the first
    `POOL` items of each model, or the first `count` if that is more.

    Args:
        sources: the base models, trained without the targets of validation.
        fusion: how their scores are joined.
        count: number K of candidates of a list.

    Returns:
        The weights, and the share of validation targets among the first K items.

    Raises:
        QualityCheckError: with no weights a target is among the first K items.
    """
    pools = [_pool(batch, fusion, max(POOL, count)) for batch in _batches(sources)]

    def quality(weights: Sequence[float]) -> tuple[float, float]:
        if not any(weights):
            return -1.0, -1.0
        rank = np.concatenate([_target_rank(fusion.fuse(parts, weights)) for parts in pools])
        return float((rank <= count).mean()), float(ndcg_at(rank, count).mean())

    best = (1.0,) * len(sources)
    found = quality(best)
    for _ in range(PASSES):
        for position in range(len(sources)):
            for value in GRID:
                tried = (*best[:position], value, *best[position + 1 :])
                if (score := quality(tried)) > found:
                    best, found = tried, score
    if not found[0]:
        raise QualityCheckError(
            f"no validation target is among the first {count} items under any weights",
            where="base_model",
            why="the weights of the base models cannot be chosen",
            do="train the base models longer (base_epochs), raise cand_num, or set cand_weights",
        )
    return best, found[0]


def _batches(sources: Sequence[BaseModel]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Targets (B,) of the validation rows in batches, with the scores (B, N + 1) of each model."""
    for batches in zip(*(source.batches("valid") for source in sources), strict=True):
        rows = batches[0].rows
        yield rows[sources[0].data.iid].to(batches[0].scores.device), [batch.scores for batch in batches]


def _pool(batch: tuple[Tensor, list[Tensor]], fusion: Fusion, depth: int) -> Tensor:
    """Comparable scores of the target, and of the first items of each model, (S, B, 1 + S * depth).

    The target has the place 0. It, and an item that several models propose, is masked at its further places.
    """
    import torch

    targets, scores = batch
    depth = min(depth, scores[0].size(1) - 1)
    items = torch.cat([targets.unsqueeze(1), *(torch.topk(each, depth, dim=1).indices for each in scores)], dim=1)
    parts = torch.stack([fusion.comparable(each).gather(1, items) for each in scores])
    ordered, order = torch.sort(items, dim=1, stable=True)
    repeats = torch.zeros_like(items, dtype=torch.bool)
    repeats.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
    return parts.masked_fill(repeats, -torch.inf).cpu()


def _target_rank(fused: Tensor) -> np.ndarray:
    """Rank of the target, the item at place 0, from 1, (B,). A masked target comes after all items."""
    import torch

    target = fused[:, :1]
    above = (fused[:, 1:] > target).sum(1) + 1
    return above.masked_fill((target == -torch.inf).squeeze(1), np.iinfo(np.int32).max).numpy()
