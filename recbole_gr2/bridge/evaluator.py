"""RecBole's evaluator: rankings of the base model's lists go to it as full score rows without ties."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import numpy as np

from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.models import BaseModel, ListedBase
from recbole_gr2.console import progress
from recbole_gr2.errors import GR2Error


def evaluate_rows(
    data: Data,
    base: BaseModel | ListedBase,
    rows: Mapping[str, Mapping[int, Sequence[int]] | None],
    *,
    split: str,
    users: Sequence[int] | None = None,
    watch: Callable[[object, object], None] = lambda batch, scores: None,
) -> dict[str, dict[str, float]]:
    """RecBole's metrics of several rankings of the same lists, scored together.

    Args:
        rows: for each row of the table, user id -> item ids (K,), a permutation of the base model's first K; users
            without one keep their order; None hands RecBole the base model's own score rows: untouched beside
            such rankings, else as the model is judged by its own.
        users: evaluate these users alone (the in_list scope); None for all.
        watch: given each batch of rows and its scores (B, N + 1), so that nothing has to be scored a second time.

    Returns:
        For each row RecBole's metrics in its lower case, e.g. `ndcg@5`.
    """
    import torch
    from recbole.evaluator import Collector, Evaluator

    lists = any(rankings is not None for rankings in rows.values())  # they stand in the order they were proposed in
    collectors = {name: Collector(data.config) for name in rows}
    for collector in collectors.values():
        collector.data_collect(SimpleNamespace(dataset=data.built[0]))  # item counts, for coverage and popularity
    feat, row_users = data.rows(split)
    if users is not None:
        feat = feat[np.flatnonzero(np.isin(row_users, np.asarray(sorted(users))))]
    size, reach = int(data.config["eval_batch_size"]), data.reach(data.settings["cand_num"])
    for start in progress(range(0, len(feat), size), f"{split} rows"):
        batch = feat[start : start + size]
        with torch.no_grad():
            scores = base.score_rows(batch, split)
            if not lists:
                scores = base.judged(scores, batch[data.iid])
        watch(batch, scores)
        order = base_order(scores, reach)
        for name, rankings in rows.items():
            given = scores
            if rankings is not None:
                given = tie_free(order, [rankings.get(user) for user in batch[data.uid].tolist()])
                # RecBole's GAUC counts a row's items up to the first at -inf (collector.py:183), so they stay there.
                given.masked_fill_(scores == -torch.inf, -torch.inf)
            collectors[name].eval_batch_collect(given, batch, torch.arange(len(batch)), batch[data.iid])
    evaluator, metrics = Evaluator(data.config), {}
    for name, collector in collectors.items():
        collector.model_collect(base.model)
        metrics[name] = {m: float(v) for m, v in evaluator.evaluate(collector.get_data_struct()).items()}
    return metrics


def base_order(scores, reach: int):
    """Item ids by descending score, (B, N + 1).

    The first `reach` are those of `torch.topk`, as RecBole's evaluator takes them, so that ties break as they break
    there.

    >>> import torch
    >>> base_order(torch.tensor([[-torch.inf, 5.0, 4.0, 9.0]]), reach=2)
    tensor([[3, 1, 2, 0]])
    """
    import torch

    first = torch.topk(scores, reach, dim=-1).indices
    rest = scores.clone()
    rest.scatter_(1, first, torch.inf)  # +inf, then skipped: other items may be at -inf
    order = torch.sort(rest, dim=-1, descending=True, stable=True).indices[:, reach:]
    return torch.cat([first, order], dim=1)


def tie_free(order, heads: Sequence[Sequence[int] | None]):
    """Score rows (B, N + 1) that put each head first, in its order, and leave the rest in base order, without ties.

    Ties in a score row would let `torch.topk` pick the target by position.

    Raises:
        GR2Error: a head is not a permutation of the first items of its row.

    >>> import torch
    >>> tie_free(torch.tensor([[3, 1, 2, 0]]), [(1, 3)])
    tensor([[-4., -1., -3., -2.]])
    """
    import torch

    order = order.clone()
    for row, head in enumerate(heads):
        if head is not None:
            if set(order[row, : len(head)].tolist()) != set(head):
                raise GR2Error(
                    "a ranking is no permutation of the base model's list",
                    where=f"row {row}",
                    why="re-ranking K items must not change Recall@K",
                    do="re-run from the candidates stage: --from_stage candidates",
                )
            order[row, : len(head)] = torch.as_tensor(head, dtype=order.dtype)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(1, order.size(1) + 1, device=order.device).expand_as(order).contiguous())
    return -ranks.float()  # integers below 2 ** 24 are exact in float32
