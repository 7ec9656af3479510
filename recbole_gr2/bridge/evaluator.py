"""Recommendations from scores, and RecBole's metrics of recommendations and of re-ranked lists.

A model scores each user once (`recommend`). The result (`types.Recommendations`) contains the first items and the exact
rank of the target. `evaluate_methods` builds full score rows without ties from it and passes them to RecBole's
evaluator, for all methods and all groups of users in one pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.fusion import ranks_of, standardise
from recbole_gr2.bridge.models import UNREACHED, BaseModel, Batch, find_model, seen_items
from recbole_gr2.bridge.splits import LEAVE_ONE_OUT
from recbole_gr2.config import GENERATOR, ONEREC_THINK
from recbole_gr2.errors import ConfigurationError, GR2Error, QualityCheckError
from recbole_gr2.progress import progress
from recbole_gr2.types import Recommendations, Request

if TYPE_CHECKING:
    from torch import Tensor

DEPTH = 200  # D, items that are kept of each user's ranking of the catalogue
# The first items keep the order of `torch.topk(scores, HEAD)`, which RecBole's evaluator calls with the cut-off 10.
HEAD = 10
CHECKED_CUTOFFS = (1, 5, HEAD)  # at which the recommendations are compared with RecBole's evaluation of the scores
CHECKED_METRICS = ("Recall", "NDCG", "MRR")
# RecBole's metrics of the recommended items, whatever the target is.
ITEM_METRICS = ("itemcoverage", "averagepopularity", "shannonentropy", "giniindex", "tailpercentage")


class Source(NamedTuple):
    """What one of several base models contributes to a scored batch.

    Attributes:
        alone: the result of this model alone; None where it is not reported.
        ranks: rank of each item of the fused list among all items by this model, (B, D) int64.
        scores: standardised score of each item of the fused list, (B, D) float32, see `fusion.standardise`.
    """

    alone: Scored | None
    ranks: np.ndarray
    scores: np.ndarray


class Scored(NamedTuple):
    """The result of one scored batch.

    Attributes:
        users: internal user ids, (B,).
        items: the first D item ids, best first, (B, D) int64. 0 fills the places of items that are not proposed.
        scores: their scores in the precision of the model, (B, D). -inf for a place without an item.
        target_rank: rank of the target among all items that are not masked, from 1, (B,) int64; 0 if the target is not
            proposed.
        sources: the contribution of each model, if the scores are fused from several; else ().
    """

    users: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    target_rank: np.ndarray
    sources: tuple[Source, ...] = ()


def depth_of(data: Data) -> int:
    """Number D of items that the recommendations for this data set contain: DEPTH, at most the catalogue."""
    return min(DEPTH, data.item_count)


def recommend(
    model: BaseModel, split: str, depth: int, *, break_ties: bool, check: bool = False, alone: bool = False
) -> Iterator[Scored]:
    """Score each row of a split once, in batches.

    Equal scores have this order. The first HEAD = 10 items are those of `torch.topk(scores, 10)` in its order. This is
    the call of RecBole's evaluator for the cut-off 10, so both agree. The items behind them are in ascending order of
    their ids. The order does not depend on `depth`.

    Args:
        model: the model.
        split: train, valid or test.
        depth: number D of items to keep, at most the number of items N.
        break_ties: whether to apply the tie rule of the model first, see `models.break_ties`. The rule reads the
            targets. It must not be used to propose candidates.
        check: whether to compare the result with RecBole's evaluation of the scores, see `RecboleCheck`.
        alone: whether the result contains that of each of several base models alone, see `Source`.

    Raises:
        QualityCheckError: a score is not a number.
        GR2Error: the check failed.
    """
    import torch

    comparison = RecboleCheck(model) if check else None
    for scored_rows in model.batches(split):
        rows, scores = scored_rows.rows, scored_rows.scores
        targets = rows[model.data.iid].to(scores.device)
        if torch.isnan(scores).any():
            raise QualityCheckError(
                "a score is not a number (NaN)",
                where=f"model {model.name}, {split} rows",
                why="the items have no order",
                do="lower the learning rate (base_learning_rate, or models_options for a model of `models`)",
            )
        if break_ties:
            scores = model.break_ties(scores, targets)
        users = rows[model.data.uid].numpy()
        batch = _scored(users, scores, targets, depth)
        if scored_rows.parts:
            batch = batch._replace(sources=_sources(model, batch, scored_rows, targets if alone else None, depth))
        if comparison:
            comparison.add(batch, scores, targets)
        yield batch
    if comparison:
        comparison.finish()


def joined(batches: Iterable[Scored], count: int) -> Scored:
    """Return the batches of a split as one. They are copied to arrays that are allocated first.

    If each batch kept its own arrays, they would lie between the freed scores of the catalogue, and the process could
    not return this memory: several gigabytes for 35,598 rows of 18,357 items.

    Args:
        batches: result of `recommend`, at least one batch.
        count: number of rows of all batches.
    """
    whole, start = None, 0
    for batch in batches:
        if whole is None:
            whole = _each(batch, lambda part: np.empty((count, *part.shape[1:]), part.dtype))
        stop = start + len(batch.users)
        for target, part in zip(_arrays(whole), _arrays(batch), strict=True):
            target[start:stop] = part
        start = stop
    assert whole is not None and start == count
    return whole


def in_chunks(whole: Scored, size: int) -> Iterator[Scored]:
    """Yield consecutive rows of scored rows, at most `size` at a time, without copies."""
    for start in range(0, len(whole.users), size):
        yield _each(whole, itemgetter(slice(start, start + size)))


def _each(scored: Scored, change: Callable[[np.ndarray], np.ndarray]) -> Scored:
    """Return scored rows whose arrays are the results of a function of each array."""
    sources = tuple(
        Source(source.alone and _each(source.alone, change), change(source.ranks), change(source.scores))
        for source in scored.sources
    )
    items, scores = change(scored.items), change(scored.scores)
    return Scored(change(scored.users), items, scores, change(scored.target_rank), sources)


def _arrays(scored: Scored) -> Iterator[np.ndarray]:
    """Yield all arrays of scored rows, always in the same order."""
    yield from (scored.users, scored.items, scored.scores, scored.target_rank)
    for source in scored.sources:
        yield from _arrays(source.alone) if source.alone else ()
        yield from (source.ranks, source.scores)


def _scored(users: np.ndarray, scores: Tensor, targets: Tensor, depth: int) -> Scored:
    """The first items of a batch, see `rank_items`."""
    items, values, ranks = rank_items(scores, targets, depth)
    return Scored(users=users, items=items.cpu().numpy(), scores=values.cpu().numpy(), target_rank=ranks.cpu().numpy())


def _sources(
    model: BaseModel, batch: Scored, scored_rows: Batch, targets: Tensor | None, depth: int
) -> tuple[Source, ...]:
    """The contribution of each base model to a batch of a `FusedModel`. Each model breaks ties in its own list.

    Args:
        model: the fused model.
        batch: the fused list of each row.
        scored_rows: the scores of the rows.
        targets: target of each row, to report what each model recommends alone; or None.
        depth: number of items of a list.
    """
    import torch

    def of(position: int) -> Source:
        source, part = model.sources[position], scored_rows.parts[position]
        items = torch.from_numpy(batch.items).to(part.device)
        known = scored_rows.standardised
        scores = standardise(part) if known is None else known[position]
        return Source(
            alone=None if targets is None else _scored(batch.users, source.break_ties(part, targets), targets, depth),
            ranks=ranks_of(part, items),
            scores=scores.gather(1, items).cpu().numpy(),
        )

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy sorts outside of Python's lock
        return tuple(pool.map(of, range(len(model.sources))))


def rank_items(scores: Tensor, targets: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first items of each row, in the order that `recommend` documents, and the rank of the target.

    Args:
        scores: (B, N + 1), padding at -inf.
        targets: target item ids, (B,).
        depth: D, at most N.

    Returns:
        Item ids (B, D), 0 for a place without a proposed item; scores (B, D); ranks of the targets (B,), 0 for a target
        that is not proposed. The ranks do not depend on the depth.

    >>> import torch
    >>> rank_items(torch.tensor([[-torch.inf, 5.0, 4.0, 9.0]]), torch.tensor([2]), 2)
    (tensor([[3, 1]]), tensor([[9., 5.]]), tensor([3]))
    """
    items, values = _best_items(scores, max(depth, min(HEAD, scores.size(1) - 1)))
    ranks = _target_ranks(scores, items, targets)
    items = items.masked_fill(~(values > UNREACHED), 0)
    return items[:, :depth], values[:, :depth], ranks


def rank_all(scores: Tensor) -> Tensor:
    """Return all columns of each row in the order that `recommend` documents, (B, N + 1) int64. Masked ones are last.

    Args:
        scores: (B, N + 1), padding and masked items at -inf.

    >>> import torch
    >>> rank_all(torch.tensor([[-torch.inf, 5.0, 4.0, 9.0]]))
    tensor([[3, 1, 2, 0]])
    """
    import torch

    values, head = torch.topk(scores, min(HEAD, scores.size(1)))
    masked = values == -torch.inf  # A masked item of a short row is not in the head.
    rest = scores.scatter(1, head, torch.where(masked, -torch.inf, torch.inf))
    order = torch.sort(rest, dim=1, descending=True, stable=True).indices
    count = head.size(1) - masked.sum(1, keepdim=True)
    place = torch.arange(head.size(1), device=scores.device)
    return order.scatter(1, place.expand_as(head), torch.where(place < count, head, order[:, : head.size(1)]))


def _best_items(scores: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Ids and scores of the first `depth` items of each row, (B, D). The id of a masked item has no meaning."""
    import torch

    width = scores.size(1)
    head_values, head = torch.topk(scores, min(HEAD, width))
    if depth <= head.size(1):
        return head[:, :depth], head_values[:, :depth]
    rest = scores.scatter(1, head, -torch.inf)
    count = depth - head.size(1)
    values, ids = torch.topk(rest, min(count + 1, width))
    if values.size(1) > count:  # Ties across the end of the list are resolved by a full stable sort of these rows.
        tied = (values[:, count - 1] == values[:, count]) & (values[:, count] > UNREACHED)
        if tied.any():
            sorted_values, sorted_ids = torch.sort(rest[tied], dim=1, descending=True, stable=True)
            values[tied], ids[tied] = sorted_values[:, : count + 1], sorted_ids[:, : count + 1]
        values, ids = values[:, :count], ids[:, :count]
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return torch.cat([head, ids.gather(1, order)], dim=1), torch.cat([head_values, values], dim=1)


def _target_ranks(scores: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """Rank of the target among all items of a row, from 1, (B,); 0 if it is not proposed.

    Args:
        scores: (B, N + 1).
        items: ids of the first items of each row, see `_best_items`.
        targets: target item ids, (B,).
    """
    import torch

    column = targets.unsqueeze(1)
    target_scores = scores.gather(1, column)
    hits = items == column
    rest = scores.scatter(1, items, -torch.inf)
    ids = torch.arange(scores.size(1), device=scores.device)
    before = (rest > target_scores) | ((rest == target_scores) & (ids < column))
    ranks = torch.where(hits.any(1), hits.int().argmax(1) + 1, items.size(1) + 1 + before.sum(1))
    return ranks.masked_fill(~(target_scores.squeeze(1) > UNREACHED), 0)


def collect(data: Data, scored: Scored, *, exclude_seen: bool) -> Recommendations:
    """The recommendations of all rows of a split, see `joined`."""
    return Recommendations(
        users=tuple(data.user_tokens[user] for user in scored.users),
        items=scored.items.astype(np.int32),
        target_rank=scored.target_rank.astype(np.int32),
        exclude_seen=exclude_seen,
    )


def from_lists(data: Data, requests: Sequence[Request]) -> Recommendations:
    """Recommendations that contain only the candidates of these requests, in base order.

    A target outside of its list has the rank 0. No item is masked, because an imported list may contain seen items.
    """
    depth = max([depth_of(data), *(len(request.items) for request in requests)])
    items = np.zeros((len(requests), depth), dtype=np.int32)
    for row, request in enumerate(requests):
        items[row, : len(request.items)] = request.items
    return Recommendations(
        users=tuple(request.user_token for request in requests),
        items=items,
        target_rank=np.array([request.target_rank or 0 for request in requests], dtype=np.int32),
        exclude_seen=False,
    )


def full_rows(items: Tensor, targets: Tensor, target_rank: Tensor, masked: Tensor, cutoff: int = 0) -> Tensor:
    """Full score rows without ties: the item at rank r has the score -r.

    The listed items come first. All other items that are not masked follow in the order of their ids, except the
    target, which gets its exact rank. A target that is not proposed is the last of them. Padding and masked items have
    -inf, because RecBole's GAUC counts the items of a row up to the first -inf (collector.py:183).

    Args:
        items: the first D items, (B, D); 0 for a place without an item.
        targets: target item ids, (B,).
        target_rank: (B,), see `Scored`.
        masked: whether an item is masked, (B, N + 1).
        cutoff: largest cut-off of the metrics. In a row with at most so many items, a target that is not proposed has
            the only -inf, so that it is no hit.

    Returns:
        Scores (B, N + 1) float32.

    >>> import torch
    >>> rows = torch.tensor([[4, 2, 0]]), torch.tensor([1]), torch.tensor([4]), torch.zeros(1, 6, dtype=torch.bool)
    >>> full_rows(*rows)
    tensor([[-inf, -4., -2., -3., -1., -5.]])
    """
    import torch

    masked = masked.clone()
    masked[:, 0] = True
    listed = torch.zeros_like(masked).scatter(1, items, True)
    listed[:, 0] = False
    column = targets.unsqueeze(1)
    others = ~masked & ~listed
    is_free = others.gather(1, column)  # the target is neither listed nor masked
    others.scatter_(1, column, False)
    count = listed.sum(1, keepdim=True)
    rank = others.cumsum(1, dtype=torch.float32).add_(count)  # Integers below 2 ** 24 are exact in float32.
    last = rank[:, -1].long() + 1
    place = torch.where(target_rank > 0, target_rank, last).unsqueeze(1)
    rank += (rank >= place) & is_free
    rows = rank.neg_().masked_fill_(~others, -torch.inf)
    order = torch.arange(1, items.size(1) + 1, device=items.device, dtype=rows.dtype)
    rows.scatter_(1, items, -order.expand_as(items))  # Places without an item write to the padding.
    rows[:, 0] = -torch.inf
    rows.scatter_(1, column, torch.where(is_free, -place.float(), rows.gather(1, column)))
    short = (target_rank == 0) & ((rows > -torch.inf).sum(1) <= cutoff)
    if cutoff and short.any():
        lowest = -float(rows.size(1) + 1)
        finite = rows[short].clamp(min=lowest)
        rows[short] = finite.scatter(1, column[short], -torch.inf)
    return rows


def evaluate_methods(
    data: Data,
    recommendations: Recommendations,
    rankings: Mapping[str, Mapping[str, Sequence[int]] | None],
    scopes: Mapping[str, Collection[str] | None],
    config: Any = None,
    *,
    general: bool = False,
    split: str = "test",
) -> dict[str, dict[str, dict[str, float]]]:
    """RecBole's metrics of several rankings of the same lists, in one pass over the users.

    Args:
        data: the data set.
        recommendations: recommendations of the base model.
        rankings: for each method, user token -> item ids (K,), a permutation of the first K recommended items. Users
            without a ranking, and a method that is None, keep the order of the recommendations.
        scopes: name -> user tokens of the group; None for all users of the recommendations.
        config: RecBole's Config with `metrics` and `topk`; the Config of the data set by default.
        general: whether the popularity of an item is its number of training interactions, as RecBole counts it for
            general models. For sequential models RecBole leaves out the first interaction of each user.
        split: the split of the recommendations, test or valid.

    Returns:
        Method -> scope -> metric, in RecBole's lower case such as `ndcg@5` -> value. Metrics of the recommended items,
        such as coverage and popularity, are left out at cut-offs above the length of the shortest list of a scope:
        RecBole would count items that nobody recommended.

    Raises:
        ConfigurationError: a cut-off is larger than the number of recommended items.
        GR2Error: a ranking is not a permutation of the first items, or a scope has no users.
    """
    import torch

    config = config or data.config
    cutoff = _check_cutoff(config, recommendations)
    device = torch.device(config["device"])
    user_ids = {token: user for user, token in enumerate(data.user_tokens)}
    users = np.array([user_ids[token] for token in recommendations.users])
    members = {name: _members(name, tokens, recommendations.users) for name, tokens in scopes.items()}
    counts = item_counts(data, general)
    collectors = {(method, scope): _collector(data, config, counts) for method in rankings for scope in scopes}
    size = int(config["eval_batch_size"])
    for start in progress(range(0, len(users), size), "evaluation, batch"):
        batch = slice(start, start + size)
        items = recommendations.items[batch].astype(np.int64)
        targets = torch.tensor([next(iter(data.targets(user, split))) for user in users[batch].tolist()])
        base = full_rows(
            torch.from_numpy(items).to(device),
            targets.to(device),
            torch.from_numpy(recommendations.target_rank[batch].astype(np.int64)).to(device),
            _masked(data, users[batch].tolist(), recommendations.exclude_seen, split).to(device),
            cutoff,
        )
        for method, ranking in rankings.items():
            rows = base if ranking is None else _reranked(base, method, ranking, recommendations.users[batch], items)
            for scope, member in members.items():
                chosen = torch.from_numpy(np.flatnonzero(member[batch]))
                if len(chosen):
                    collectors[method, scope].eval_batch_collect(
                        rows[chosen.to(device)], None, torch.arange(len(chosen)), targets[chosen]
                    )
    metrics: dict[str, dict[str, dict[str, float]]] = {method: {} for method in rankings}
    lengths = (recommendations.items > 0).sum(axis=1)
    for (method, scope), collector in collectors.items():
        shortest = int(lengths[members[scope]].min())
        metrics[method][scope] = {
            name: value
            for name, value in _evaluate(config, collector).items()
            if not name.startswith(ITEM_METRICS) or int(name.partition("@")[2]) <= shortest
        }
    return metrics


def is_general(model: str) -> bool:
    """Whether a recommender is a general model: RecBole trains it on single interactions instead of sequences.

    Args:
        model: name of a RecBole model, of a model of this package, or of a generative recommender.
    """
    if model == GENERATOR or model in ONEREC_THINK:
        return False
    model_class: Any = find_model(model)
    from recbole.utils import ModelType

    return model_class.type != ModelType.SEQUENTIAL


def item_counts(data: Data, general: bool) -> Counter[int]:
    """Number of training interactions of each item id, as RecBole counts them for the metrics of popularity.

    Args:
        data: the data set.
        general: whether to count all training interactions, as in RecBole's data set of a general model. In the one of
            a sequential model each row has one target, and the first interaction of a user is no target.
    """
    if not general:
        return data.built[0].item_counter
    known = data.split.known["train"]
    if data.split.name == LEAVE_ONE_OUT:  # RecBole keeps the first interaction of every user in training.
        known = np.maximum(known, 1)
    return Counter(np.concatenate([items[: known[user]] for user, items in data.sequences.items()]).tolist())


def _check_cutoff(config: Any, recommendations: Recommendations) -> int:
    """Largest cut-off of the metrics. Raises a ConfigurationError if the recommendations are shorter."""
    cutoff, depth = max(config["topk"]), recommendations.items.shape[1]
    if cutoff > depth:
        raise ConfigurationError(
            f"topk contains {cutoff}, but {depth} items per user are recommended",
            where="topk",
            why=f"the first {DEPTH} items per user are stored, at most the catalogue",
            do=f"choose cut-offs of at most {depth}",
        )
    return cutoff


def _members(scope: str, tokens: Collection[str] | None, users: Sequence[str]) -> np.ndarray:
    """Whether each user belongs to a scope, (U,)."""
    members = np.ones(len(users), dtype=bool) if tokens is None else np.isin(users, list(tokens))
    if not members.any():
        raise GR2Error(
            "a group of users to evaluate is empty",
            where=f"scope {scope}",
            why="a mean over no users is not defined",
            do="raise cand_num, or train the base model longer (base_epochs)",
        )
    return members


def _masked(data: Data, users: Sequence[int], exclude_seen: bool, split: str) -> Tensor:
    """Whether each item is masked for each user, (B, N + 1). Padding is always masked."""
    import torch

    masked = torch.zeros(len(users), data.item_count + 1, dtype=torch.bool)
    masked[:, 0] = True
    if exclude_seen:
        row, column = seen_items([data.history(user, split) for user in users])
        masked[torch.from_numpy(row), torch.from_numpy(column)] = True
    return masked


def _reranked(
    base: Tensor, method: str, ranking: Mapping[str, Sequence[int]], users: Sequence[str], items: np.ndarray
) -> Tensor:
    """Copy of the score rows (B, N + 1) with the first items of each user in the order of its ranking.

    Raises:
        GR2Error: a ranking is not a permutation of the first items.
    """
    import torch

    row_parts: list[int] = []
    columns: list[int] = []
    places: list[int] = []
    for row, user in enumerate(users):
        head = ranking.get(user)
        if head is None:
            continue
        # Sorting also detects repeated items, which a comparison of sets would accept.
        if sorted(items[row, : len(head)].tolist()) != sorted(head):
            raise GR2Error(
                "a ranking is no permutation of the base model's list",
                where=f"method {method}, user {user}",
                why="re-ranking K items must not change Recall@K",
                do="re-run from the candidates stage: --from_stage candidates",
            )
        row_parts += [row] * len(head)
        columns += head
        places += range(1, len(head) + 1)
    rows = base.clone()
    rows[torch.tensor(row_parts, dtype=torch.long), torch.tensor(columns, dtype=torch.long)] = -torch.tensor(
        places, dtype=rows.dtype, device=rows.device
    )
    return rows


def _collector(data: Data, config: Any, counts: Counter[int]) -> Any:
    """RecBole's collector, with the item counts of the training data for coverage and popularity."""
    from recbole.evaluator import Collector

    collector, train = Collector(config), data.built[0]
    dataset = SimpleNamespace(num=train.num, user_counter=data.user_counts, item_counter=counts)
    collector.data_collect(SimpleNamespace(dataset=dataset))
    return collector


def _evaluate(config: Any, collector: Any) -> dict[str, float]:
    """RecBole's metrics of what a collector has collected."""
    from recbole.evaluator import Evaluator

    return {name: float(value) for name, value in Evaluator(config).evaluate(collector.get_data_struct()).items()}


class _Options(dict[str, Any]):
    """Options in the form of RecBole's Config, which returns None for an unknown option."""

    def __missing__(self, key: str) -> None:
        return None


class RecboleCheck:
    """Compares recommendations with RecBole's own evaluation of the scores that they were made from.

    Recall, NDCG and MRR at 1, 5 and 10 must be equal to the last digit. The rank of each target must agree with the
    number of higher and equal scores. Users whose target is not proposed are left out of the comparison: among equal
    scores RecBole could count such a target as a hit by its position.

    Args:
        model: the model that computes the scores.
    """

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.config = _Options(
            metrics=list(CHECKED_METRICS),
            topk=[k for k in CHECKED_CUTOFFS if k <= model.data.item_count],
            metric_decimal_place=12,
            device=model.data.config["device"],
            eval_args=model.data.config["eval_args"],
        )
        counts = item_counts(model.data, general=False)  # no metric of the comparison reads them
        self.direct = _collector(model.data, self.config, counts)
        self.rebuilt = _collector(model.data, self.config, counts)
        self.compared = False

    def add(self, batch: Scored, scores: Tensor, targets: Tensor) -> None:
        """Collect a batch with its scores (B, N + 1) and its targets (B,).

        Raises:
            GR2Error: the rank of a target does not agree with the scores.
        """
        import torch

        target_scores = scores.gather(1, targets.unsqueeze(1))
        proposed = target_scores.squeeze(1) > UNREACHED
        if not proposed.any():
            return
        scores, target_scores, targets = scores[proposed], target_scores[proposed], targets[proposed]
        ranks = torch.from_numpy(batch.target_rank).to(scores.device)[proposed]
        if (((scores > target_scores).sum(1) >= ranks) | ((scores >= target_scores).sum(1) < ranks)).any():
            raise self._error("the rank of a target does not agree with its score")
        items = torch.from_numpy(batch.items).to(scores.device)[proposed]
        rows = full_rows(items, targets, ranks, scores == -torch.inf)
        for collector, each in ((self.direct, scores), (self.rebuilt, rows)):
            collector.eval_batch_collect(each, None, torch.arange(len(each)), targets)
        self.compared = True

    def finish(self) -> None:
        """Compare the metrics.

        Raises:
            GR2Error: they differ.
        """
        if not self.compared:
            return
        direct, rebuilt = _evaluate(self.config, self.direct), _evaluate(self.config, self.rebuilt)
        if direct != rebuilt:
            raise self._error(f"RecBole's metrics of the scores are {direct}, those of the recommendations {rebuilt}")

    def _error(self, what: str) -> GR2Error:
        return GR2Error(
            what,
            where=f"model {self.model.name}",
            why="the base order must equal RecBole's own evaluation of the base model",
            do="report this as a bug, with the command and the settings",
        )


def check_invariants(
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]],
    count: int,
    listed: Mapping[str, float] | None = None,
    *,
    decimals: int = 4,
) -> None:
    """Check two identities of re-ranked lists.

    No method changes Recall at cut-offs of at least K. Recall@K of the base order, and Recall, NDCG and MRR of the
    oracle at cut-offs up to K, are equal: the share of users whose candidate list contains their target.

    Args:
        metrics: the result of `evaluate_methods` with the methods `base` and, optionally, `oracle`.
        count: K, the largest length of a candidate list.
        listed: for each scope, the share of users whose candidate list contains their target; by default the Recall@K
            of the base order, if it is among the metrics.
        decimals: number of decimal places to which RecBole rounds the metrics (`metric_decimal_place`).

    Raises:
        GR2Error: an identity does not hold.
    """
    do = "report this as a bug, with the command and the settings"
    for method, scopes in metrics.items():
        for scope, values in scopes.items():
            base = metrics["base"][scope]
            share = base.get(f"recall@{count}") if listed is None else listed[scope]
            for metric, value in values.items():
                name, _, cutoff = metric.partition("@")
                if name == "recall" and int(cutoff) >= count and value != base[metric]:
                    raise GR2Error(
                        f"re-ranking {count} items changed {metric} from {base[metric]} to {value}",
                        where=f"method {method}, scope {scope}",
                        why="a permutation of the first K items cannot change the items among the first K",
                        do=do,
                    )
                equal = (method == "oracle" and name in ("recall", "ndcg", "mrr") and int(cutoff) <= count) or (
                    method == "base" and metric == f"recall@{count}"
                )
                if equal and share is not None and abs(value - share) > 10.0**-decimals:
                    raise GR2Error(
                        f"{metric} of {method} is {value}, but {share} of the lists contain their target",
                        where=f"scope {scope}",
                        why="the oracle ranks each target first that its list contains, and no other target is a hit",
                        do=do,
                    )
