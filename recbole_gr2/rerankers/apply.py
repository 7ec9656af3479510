"""How a re-ranker is applied to lists: it gets requests without labels, and what it returns is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from recbole_gr2.config import Settings
from recbole_gr2.lists import base_orders, candidate_requests, pool_size, rank_windows, selected, training_requests
from recbole_gr2.plugins import calling
from recbole_gr2.rerankers.base import Reranker, as_answers, user_name
from recbole_gr2.types import Answer, Context, Request


def fit(reranker: Reranker, context: Context) -> None:
    """Let a re-ranker learn from the train and validation requests of a run that contain their target.

    Args:
        reranker: the re-ranker.
        context: a context whose stage needs the prior stage.

    Raises:
        GR2Error: the re-ranker of a user raised an exception.
    """
    pool = reranker.whole_pool
    valid = [request for request in candidate_requests(context, "valid", pool=pool) if request.has_signal]
    train = training_requests(context, pool=pool)
    with calling(user_name(type(reranker)), where=f"method {reranker.name}, fit"):
        reranker.fit(train, valid)


def rank(reranker: Reranker, requests: Sequence[Request]) -> list[Answer]:
    """Return the answers of a re-ranker to requests, of which it does not see the labels.

    Raises:
        GR2Error: the answers are no permutations of the candidates, or the re-ranker of a user raised an exception.
    """
    with calling(user_name(type(reranker)), where=f"method {reranker.name}, rank"):
        rankings = reranker.rank([request.without_labels() for request in requests])
        return as_answers(requests, rankings, method=reranker.name)


def rank_by_windows(reranker: Reranker, pools: Sequence[Request]) -> list[Answer]:
    """Return rankings of whole pools, see `recbole_gr2.lists.rank_windows`. All else is that of the first window."""
    last: dict[str, Answer] = {}

    def rank_window(windows: Sequence[Request]) -> list[tuple[int, ...]]:
        answers = rank(reranker, windows)
        last.update({answer.request_id: answer for answer in answers})  # The first window comes last.
        return [answer.ranking for answer in answers]

    orders = rank_windows(pools, reranker.settings, rank_window)
    return [replace(last[pool.request_id], ranking=order) for pool, order in zip(pools, orders, strict=True)]


def rank_pools(reranker: Reranker, pools: Sequence[Request]) -> list[Answer]:
    """Return rankings of whole pools as in a run: items that the method does not rank follow in their input order.

    A pool may be larger or smaller than the lists of the run. `first_choice` is in the order of the ranking, for the
    items at its start that the method compared.
    """
    if reranker.whole_pool:
        read, answers = list(pools), rank(reranker, pools)
    elif reranker.slides(reranker.settings):
        answers = rank_by_windows(reranker, pools)
        size = reranker.settings["cand_num"]
        read = [pool.shortlist(answer.ranking[:size]) for pool, answer in zip(pools, answers, strict=True)]
    else:
        split = [selected(pool, reranker.settings) for pool in pools]
        read = [pool.shortlist(chosen) for pool, (chosen, _) in zip(pools, split, strict=True)]
        ranked = rank(reranker, read)
        answers = [
            replace(answer, ranking=answer.ranking + others) for answer, (_, others) in zip(ranked, split, strict=True)
        ]
    return [_by_rank(answer, request) for answer, request in zip(answers, read, strict=True)]


def _by_rank(answer: Answer, request: Request) -> Answer:
    """The answer with `first_choice` in the order of its ranking instead of the base order of the request."""
    chances = dict(zip(request.items, answer.first_choice, strict=True)) if answer.first_choice else {}
    return replace(answer, first_choice=tuple(chances[item] for item in answer.ranking if item in chances))


def input_orders(requests: Sequence[Request], settings: Settings, method: type[Reranker]) -> list[tuple[int, ...]]:
    """Return the order of each pool that a method changes.

    It is the base order, or the selected candidates in base order followed by the other items. Under `eval_windows` it
    is the order to which windows in base order lead.

    Args:
        requests: the requests with the whole pool.
        settings: settings of the run.
        method: the method.
    """
    if method.whole_pool or pool_size(settings) == settings["cand_num"]:
        return base_orders(requests)
    if method.slides(settings):
        return rank_windows(requests, settings, base_orders)
    return [candidates + others for candidates, others in (selected(request, settings) for request in requests)]
