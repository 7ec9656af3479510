"""The method whose language model scores all candidates in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

from recbole_gr2.rerankers.answers import first_places
from recbole_gr2.rerankers.base import Reranker
from recbole_gr2.scorer import Scorer
from recbole_gr2.types import Answer, Request


class Score(Reranker):
    """The language model that was trained to score lists: candidates by the log-probabilities of their labels."""

    name = "score"
    description = "the language model that scores all candidates in one forward pass, without reasoning"
    needs: ClassVar[tuple[str, ...]] = ("score",)
    trained = True
    distributed = True
    compare_with: ClassVar[tuple[str, ...]] = ("sft", "prior", "lambdamart")
    settings_prefixes = ("prompt_", "llm_bf16", "score_invariant")

    @cached_property
    def scorer(self) -> Scorer:
        """The language model. It is loaded once."""
        return Scorer.load(self.context, "score")

    def rank(self, requests: Sequence[Request]) -> list[Answer]:
        """Sort the candidates by descending score. `summary` says where the first items come from."""
        orders = {request.request_id: self.scorer.layout(request) for request in requests}
        answers = self.scorer.answer(requests, orders)
        # Every answer is a whole ranking, and no token is generated. The report lists these figures of language models.
        self.summary = {"readable": 1.0, "statuses": {"ok": len(answers)}, "output_tokens": 0.0}
        self.summary |= first_places(requests, answers, orders)
        return answers
