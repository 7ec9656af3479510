"""The requests that stages train on and report over."""

from __future__ import annotations

import random
from collections.abc import Mapping
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
    return list(_shortlists(context.folders["prior"], split, context.data.catalog, *_selection(settings)))


def selected(request: Request, settings: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the candidates of a request that `cand_ranker` selects, in base order, and the other items, best first."""
    count, by_prior = _selection(settings)
    order = request.by_prior if by_prior else request.items
    chosen = set(order[:count])
    return tuple(item for item in request.items if item in chosen), order[count:]


def _selection(settings: Mapping[str, Any]) -> tuple[int, bool]:
    return settings["cand_num"], settings["cand_ranker"] == "prior"


@lru_cache(maxsize=6)
def _shortlists(folder: Path, split: str, catalog: Catalog, count: int, by_prior: bool) -> tuple[Request, ...]:
    settings = {"cand_num": count, "cand_ranker": "prior" if by_prior else "none"}
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
    """Return the test requests that the run reports over, and those of them that contain their target.

    The second list holds the requests of the hit users. For `pool` see `candidate_requests`.
    """
    requests, limit = candidate_requests(context, "test", pool=pool), context.settings["eval_max_lists"]
    if limit is not None and limit < len(requests):
        requests = random.Random(derive_seed(context.settings["seed"], "test lists")).sample(requests, limit)
    return requests, [request for request in requests if request.target_rank]
