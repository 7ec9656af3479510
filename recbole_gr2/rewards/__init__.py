"""Rewards: plain functions of a request and an answer, and their weighted sum.

A reward returns a number, or None where it does not apply (there is no target to rank). What is paid is a weight, or a
weight and the rewards that have to be above 0 with it:

    {rank_gain: 1.0, format: 0.2}                                                 GR2, plain
    {rank_gain: 1.0, format: {weight: 0.2, only_if: promoted}}                    GR2, conditional
    {ndcg: {weight: 1.0, only_if: [format, moved]}, format: 0.2}                  GR2-TR, de-hacked

The plain form (arXiv 2602.07774, section 5) pays for copying the input order, and policies find that out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.extension import find
from recbole_gr2.types import Answer, Request

Reward = Callable[[Request, Answer], float | None]


def rank_gain(request: Request, answer: Answer) -> float | None:
    """(rank of the target in the base order - rank in the answer) / K, in (-1, 1). GR2's R_rank."""
    if request.target_rank is None:
        return None
    return (request.target_rank - _rank(request, answer)) / len(request.items)


def format(request: Request, answer: Answer) -> float:
    """1 if the answer was read without repair and its reasoning ended by itself, else 0. GR2's R_fmt."""
    return float(answer.status == "ok")


def promoted(request: Request, answer: Answer) -> float | None:
    """1 if the target moved up, or was first and stayed first, else 0. The condition of GR2's conditional reward."""
    if request.target_rank is None:
        return None
    return float(_rank(request, answer) < request.target_rank or request.target_rank == _rank(request, answer) == 1)


def moved(request: Request, answer: Answer) -> float | None:
    """0 if the answer is the base order although a better candidate stands below a worse one in it, else 1. GR2-TR's
    condition."""
    if not request.teaches:
        return None
    return float(answer.ranking != request.items or request.by_gain(request.items) == request.items)


def auc(request: Request, answer: Answer) -> float | None:
    """Share of the pairs of a better and a worse candidate that stand in the right order, in [0, 1]. GR2-TR; with one
    target the share of the others that stand below it."""
    if not request.teaches:
        return None
    gains = _gains(request, answer)
    pairs = [above > below for place, above in enumerate(gains) for below in gains[place + 1 :] if above != below]
    return sum(pairs) / len(pairs)


def ndcg(request: Request, answer: Answer) -> float | None:
    """Sum of (2^grade - 1) / log2(1 + rank) over the candidates by that of the best order, in (0, 1]. GR2-TR; with one
    target 1 / log2(1 + its rank)."""
    if not request.teaches:
        return None
    found, best = (
        math.fsum((2**gain - 1) / math.log2(2 + place) for place, gain in enumerate(gains))
        for gains in (_gains(request, answer), sorted(request.gains, reverse=True))
    )
    return found / best


def unchanged(request: Request, answer: Answer) -> float:
    """1 if the answer is the base order, else 0. A metric: a policy at 1 has learnt to copy."""
    return float(answer.ranking == request.items)


def overlong(max_reasoning: int, buffer: int) -> Reward:
    """The reward that takes off up to 1 as the reasoning fills the last `buffer` of `max_reasoning` tokens.

    0 up to max_reasoning - buffer, then linear to -1 at max_reasoning. DAPO (arXiv 2503.14476), eq. 13.

    Raises:
        ConfigurationError: not 0 < buffer <= max_reasoning.
    """
    if not 0 < buffer <= max_reasoning:
        raise ConfigurationError(
            f"an overlong buffer of {buffer} tokens does not fit into {max_reasoning} tokens of reasoning",
            why="the penalty grows over the last `buffer` tokens before the limit",
            do="choose 0 < buffer <= the longest reasoning",
        )

    def penalty(request: Request, answer: Answer) -> float:
        length = answer.output_tokens - len(request.items) - 2  # without mark, labels and eos
        return max(-1.0, min(0.0, (max_reasoning - buffer - length) / buffer))

    return penalty


REWARDS: dict[str, Reward] = {
    "rank_gain": rank_gain,
    "auc": auc,
    "ndcg": ndcg,
    "format": format,
    "promoted": promoted,
    "moved": moved,
    "unchanged": unchanged,
}


class WeightedRewards:
    """Measures every reward and pays the weighted ones.

    Args:
        paid: what is paid for each reward: a weight, or `{weight: w, only_if: name or names}` of rewards that have to
            be above 0; a weight of 0, like no weight at all, is measured only. A name is one of `rewards` or
            `module:attribute`, a function of the user's own.
        rewards: rewards by name, e.g. `{**REWARDS, "overlong": overlong(64, 16)}`.

    Raises:
        ConfigurationError: there is no such reward, one is paid in another form, or nothing is paid.
    """

    def __init__(self, paid: Mapping[str, Any], rewards: Mapping[str, Reward] = REWARDS) -> None:
        self.weights: dict[str, float] = {}
        self.only_if: dict[str, list[str]] = {}
        self.rewards = {**rewards, **{name: find(name, rewards, where="rl_rewards") for name in named(paid)}}
        for name, value in paid.items():
            weight, conditions = _form(name, value)
            if weight:
                self.weights[name], self.only_if[name] = weight, conditions
        if not self.weights:
            raise ConfigurationError(
                "no reward has a weight",
                where="rl_rewards",
                why="every answer would be worth the same, and nothing could be learnt",
                do="GR2's reward is {rank_gain: 1, format: {weight: 0.2, only_if: promoted}}",
            )

    def terms(self, request: Request, answer: Answer) -> dict[str, float | None]:
        """Every reward of one answer by name; None where it does not apply.

        Raises:
            GR2Error: a reward is not a finite number. What a reward itself raises passes through.
        """
        terms = {name: reward(request, answer) for name, reward in self.rewards.items()}
        for name, value in terms.items():
            if value is not None and not math.isfinite(value):
                raise GR2Error(
                    f"the reward {name!r} is {value}",
                    where=f"request {request.request_id}",
                    why="one such value makes every advantage of its group meaningless",
                    do="return a finite number, or None where the reward does not apply",
                )
        return terms

    def total(self, terms: Mapping[str, float | None]) -> float | None:
        """Weighted sum of the terms that apply; None if none of the weighted ones does.

        A term whose condition does not hold is worth 0; where a condition does not apply, nor does the term.
        """
        paid = []
        for name, weight in self.weights.items():
            needed = [terms[condition] for condition in self.only_if[name]]
            if terms[name] is not None and None not in needed:
                paid.append(weight * terms[name] * all(value > 0 for value in needed))
        return math.fsum(paid) if paid else None


def named(paid: Mapping[str, Any]) -> list[str]:
    """The rewards that are paid, and those they depend on."""
    return list(dict.fromkeys(n for name, value in paid.items() for n in (name, *_form(name, value)[1])))


def _form(name: str, value: Any) -> tuple[float, list[str]]:
    """Weight and conditions of one paid reward."""
    form = value if isinstance(value, Mapping) else {"weight": value}
    weight, conditions = form.get("weight"), form.get("only_if", [])
    conditions = [conditions] if isinstance(conditions, str) else conditions
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or set(form) - {"weight", "only_if"}
        or not isinstance(conditions, list)
    ):
        raise ConfigurationError(
            f"{name} is paid {value!r}",
            where="rl_rewards",
            do="write name: weight, or name: {weight: 0.2, only_if: promoted}",
        )
    return float(weight), conditions


def _gains(request: Request, answer: Answer) -> list[int]:
    """What the candidates are worth, in the order of the answer, (K,)."""
    gain = dict(zip(request.items, request.gains, strict=True))
    return [gain[item] for item in answer.ranking]


def _rank(request: Request, answer: Answer) -> int:
    """1-based rank of the target in the answer."""
    return answer.ranking.index(request.target) + 1
