"""The requests that stages train on and report over."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from recbole_gr2.artifacts import load_requests, read_prior
from recbole_gr2.catalog import Catalog
from recbole_gr2.seeding import derive_seed
from recbole_gr2.types import Context, Request


def pool_size(settings: Mapping[str, Any]) -> int:
    """Return the number of items that the base models propose for a request."""
    return settings["cand_pool"] or settings["cand_num"]


def ranks_by_trees(settings: Mapping[str, Any]) -> bool:
    """Return whether LambdaMART selects the candidates of the language model from a pool."""
    return settings["cand_ranker"] == "lambdamart" and pool_size(settings) > settings["cand_num"]


def candidate_requests(context: Context, split: str, *, pool: bool = False) -> list[Request]:
    """Return the requests of a split with their prior and features.

    Args:
        context: a context whose stage needs the prior stage.
        split: train, valid or test.
        pool: whether to return the whole pool that the base models proposed; else the `cand_num` candidates that
            `cand_ranker` selects from it, in base order.
    """
    settings = context.settings
    if pool or pool_size(settings) == settings["cand_num"]:
        return load_requests(context, split)
    selection = settings["cand_num"], settings["cand_ranker"]
    return list(_shortlists(context.folders["prior"], split, context.data.catalog, *selection))


def selected(request: Request, settings: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the candidates of a request that `cand_ranker` selects, in base order, and the other items, best first."""
    order, count = _ranked(request, settings["cand_ranker"]), settings["cand_num"]
    chosen = set(order[:count])
    return tuple(item for item in request.items if item in chosen), order[count:]


def _ranked(request: Request, ranker: str) -> tuple[int, ...]:
    """The pool of a request in the order of `cand_ranker`."""
    return {"prior": request.by_prior, "lambdamart": request.by_ranker, "none": request.items}[ranker]


def rank_windows(
    pools: Sequence[Request], settings: Mapping[str, Any], rank: Callable[[list[Request]], Sequence[Sequence[int]]]
) -> list[tuple[int, ...]]:
    """Rank more items than a re-ranker can read at once, by windows that slide from the end to the start of a list.

    The list begins in the order of `cand_ranker`. A window has `cand_num` items and moves by half of them. The
    re-ranker orders the items of each window, so that an item can move from the last window to the first place
    (RankGPT, arXiv 2304.09542). There are `eval_windows` windows, or as many as the pool has. Items after the last
    window keep their order.

    Args:
        pools: requests with the whole pool.
        settings: settings of the run: cand_num, cand_ranker and eval_windows.
        rank: returns the order of the items of each window, best first. It is called once for each window, with one
            request per pool whose candidates are the items of the window in base order.

    Returns:
        All items of each pool, best first.
    """
    size = settings["cand_num"]
    orders = [list(_ranked(pool, settings["cand_ranker"])) for pool in pools]
    for start in reversed(range(0, settings["eval_windows"] * (size // 2), size // 2)):
        # The first window always exists. A later one needs at least one item after the end of the window before it.
        places = [n for n, order in enumerate(orders) if not start or len(order) > start + size - size // 2]
        if places:
            windows = [pools[n].shortlist(orders[n][start : start + size]) for n in places]
            for n, ranking in zip(places, rank(windows), strict=True):
                orders[n][start : start + size] = ranking
    return [tuple(order) for order in orders]


def base_orders(requests: Sequence[Request]) -> list[tuple[int, ...]]:
    """Return the candidates of each request in base order: the answer of a method that changes nothing."""
    return [request.items for request in requests]


@lru_cache(maxsize=6)
def _shortlists(folder: Path, split: str, catalog: Catalog, count: int, ranker: str) -> tuple[Request, ...]:
    settings = {"cand_num": count, "cand_ranker": ranker}
    requests = read_prior(folder, split, catalog)
    return tuple(request.shortlist(selected(request, settings)[0]) for request in requests)


def training_requests(
    context: Context, limit: int | None = None, purpose: str = "", *, pool: bool = False
) -> list[Request]:
    """Return the train requests that contain their target and candidates of different relevance.

    Args:
        context: a context whose stage needs the prior stage.
        limit: return at most so many, sampled without replacement.
        purpose: name that the seed of the sample is derived from.
        pool: see `candidate_requests`.
    """
    requests = [request for request in candidate_requests(context, "train", pool=pool) if request.has_signal]
    if limit is not None and limit < len(requests):
        requests = random.Random(derive_seed(context.settings["seed"], purpose, "lists")).sample(requests, limit)
    return requests


def reported_requests(context: Context, *, pool: bool = False) -> tuple[list[Request], list[Request]]:
    """Return the requests of `eval_split` that the run reports over, and those of them that contain their target.

    The second list holds the requests of the hit users. For `pool` see `candidate_requests`.
    """
    split, limit = context.settings["eval_split"], context.settings["eval_max_lists"]
    requests = candidate_requests(context, split, pool=pool)
    if limit is not None and limit < len(requests):
        requests = random.Random(derive_seed(context.settings["seed"], f"{split} lists")).sample(requests, limit)
    return requests, [request for request in requests if request.target_rank]
