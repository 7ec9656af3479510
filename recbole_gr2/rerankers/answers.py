"""Methods whose language model answers a prompt with reasoning and a ranking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from recbole_gr2.policy import Policy, citations
from recbole_gr2.prompts import shuffled_order
from recbole_gr2.rerankers.base import Reranker
from recbole_gr2.types import Answer, Request


class Sft(Reranker):
    """The language model after supervised fine-tuning. The other methods of this module differ in the model."""

    name = "sft"
    description = "the language model after supervised fine-tuning"
    needs: ClassVar[tuple[str, ...]] = ("sft",)
    trained = True
    distributed = True
    compare_with: ClassVar[tuple[str, ...]] = ("prior", "lambdamart", "onerec_think", "onerec_think-no-think")
    settings_prefixes = ("prompt_", "llm_bf16", "llm_engine")
    reasoning: ClassVar[bool] = True
    """Whether the answers contain reasoning."""

    @cached_property
    def policy(self) -> Policy:
        """The language model. It is loaded once."""
        return Policy.load(self.context, self.needs[0], reasoning=self.reasoning)

    def rank(self, requests: Sequence[Request]) -> list[Answer]:
        """Return greedy answers. `summary` has figures about them."""
        orders = {request.request_id: self.order(self.policy, request) for request in requests}
        answers, _ = self.policy.answer(requests, orders)
        statuses = Counter(answer.status for answer in answers)
        self.summary = {
            "readable": 1.0 - statuses["unreadable"] / len(answers),
            "statuses": dict(statuses),
            "output_tokens": round(float(np.mean([answer.output_tokens for answer in answers])), 1),
            **first_places(requests, answers, orders),
            **citations(answers, requests, self.catalog, self.settings["prompt_history"]),
        }
        return answers

    def order(self, policy: Policy, request: Request) -> tuple[int, ...]:
        """Return the base positions of the candidates in the order of the prompt."""
        return policy.maker.order(request)


class Rl(Sft):
    """The language model after reinforcement learning."""

    name = "rl"
    description = "the language model after reinforcement learning"
    needs = ("rl",)
    compare_with = ("sft", "prior", "lambdamart", "shuffled")


class Shuffled(Sft):
    """The rl model on prompts with shuffled candidates. The difference to rl shows how much it depends on positions."""

    name = "shuffled"
    description = "the rl model on prompts with shuffled candidates"
    needs = ("rl",)
    compare_with = ()
    diagnostic = True

    def order(self, policy: Policy, request: Request) -> tuple[int, ...]:
        """Return the base positions of the candidates in a random order of the request."""
        return shuffled_order(request, self.settings["seed"], "shuffled")


class Distilled(Sft):
    """The mid-trained model after on-policy distillation (GR2-TR)."""

    name = "distilled"
    description = "the mid-trained language model after on-policy distillation"
    needs = ("distilled",)
    compare_with = ("sft",)


class Internalised(Sft):
    """The rl model after training to answer without reasoning (GR2-TR)."""

    name = "internalised"
    description = "the rl model after training to rank without reasoning"
    needs = ("internalised",)
    compare_with = ("rl", "prior")
    reasoning = False


def first_places(
    requests: Sequence[Request], answers: Sequence[Answer], orders: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Count where the items that the answers rank first come from.

    A policy with a position bias promotes a fixed slot of the prompt (GR2, section 5). In prompts with shuffled
    candidates the base rank and the slot differ.

    Args:
        requests: the requests.
        answers: their answers.
        orders: for each request id the base positions in the order of the prompt.

    Returns:
        `promoted_from_rank` and `promoted_from_slot`, each a number of answers by base rank or slot, from 1.
    """
    ranks = [r.items.index(a.ranking[0]) for r, a in zip(requests, answers, strict=True)]
    slots = [list(orders[r.request_id]).index(rank) for r, rank in zip(requests, ranks, strict=True)]
    return {
        name: {str(place + 1): count for place, count in sorted(Counter(places).items())}
        for name, places in (("promoted_from_rank", ranks), ("promoted_from_slot", slots))
    }
