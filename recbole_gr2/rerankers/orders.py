"""Methods that need no model of their own: the base order, the oracle, and the order of the prior."""

from __future__ import annotations

import math
from collections.abc import Sequence

from recbole_gr2.ranking import promote
from recbole_gr2.rerankers.base import Reranker
from recbole_gr2.types import Answer, Request


class BaseOrder(Reranker):
    """The base model's order."""

    name = "base"
    whole_pool = True
    description = "the order of the base model"

    def rank(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """Return the candidates as they are."""
        return [request.items for request in requests]


class Oracle(Reranker):
    """The target first: the best possible order. It is the only method that gets requests with their labels."""

    name = "oracle"
    whole_pool = True
    description = "the target first, an upper bound"
    diagnostic = True

    def rank(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """Move the target to the front if the list contains it."""
        return [promote(r.items, r.target) if r.target_rank else r.items for r in requests]


class PriorOrder(Reranker):
    """The order of the prior, from which sft and rl start."""

    name = "prior"
    whole_pool = True
    description = "the order of the prior, a small model of the candidate features, without a language model"
    trained = True
    compare_with = ("lambdamart",)
    needs_features = True

    def rank(self, requests: Sequence[Request]) -> list[Answer]:
        """Sort the candidates by descending prior."""
        return [
            Answer(
                request_id=request.request_id,
                ranking=request.by_prior,
                first_choice=tuple(math.exp(value) for value in request.prior),
            )
            for request in requests
        ]
