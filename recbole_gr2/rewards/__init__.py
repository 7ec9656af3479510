"""Rewards: plain functions of a request and an answer, and their weighted sum.

A reward returns a number, or None where it does not apply (there is no target to rank). GR2 (arXiv 2602.07774) trains
on `rank_gain + alpha * conditional_format`; its plain form `rank_gain + alpha * format` pays for copying the input
order, and policies find that out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches

from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.types import Answer, Request

Reward = Callable[[Request, Answer], float | None]


def rank_gain(request: Request, answer: Answer) -> float | None:
    """(rank of the target in the base order - rank in the answer) / K, in (-1, 1). GR2's R_rank."""
    if request.target_rank is None:
        return None
    return (request.target_rank - _rank(request, answer)) / len(request.items)


def format(request: Request, answer: Answer) -> float:  # noqa: A001 (the paper's word, and the key in the weights)
    """1 if the answer was read without repair and its reasoning ended by itself, else 0. GR2's R_fmt."""
    return float(answer.status == "ok")


def conditional_format(request: Request, answer: Answer) -> float | None:
    """`format`, paid only if the target moved up or was first and stayed first. GR2's conditional reward."""
    if request.target_rank is None:
        return None
    earned = _rank(request, answer) < request.target_rank or request.target_rank == _rank(request, answer) == 1
    return format(request, answer) if earned else 0.0


def ndcg(request: Request, answer: Answer) -> float | None:
    """1 / log2(1 + rank of the target), in (0, 1]."""
    if request.target_rank is None:
        return None
    return 1.0 / math.log2(1 + _rank(request, answer))


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
    "format": format,
    "conditional_format": conditional_format,
    "ndcg": ndcg,
    "unchanged": unchanged,
}


class WeightedRewards:
    """Measures every reward and pays the weighted ones.

    Args:
        weights: weight of each paid reward; 0, like no weight at all, is measured only.
        rewards: rewards by name, e.g. `{**REWARDS, "overlong": overlong(64, 16)}`.

    Raises:
        ConfigurationError: a weight names no reward, or nothing is paid.
    """

    def __init__(self, weights: Mapping[str, float], rewards: Mapping[str, Reward] = REWARDS) -> None:
        for name in weights:
            if name not in rewards:
                near = get_close_matches(name, rewards, n=3, cutoff=0.4) or sorted(rewards)
                raise ConfigurationError(
                    f"no reward is called {name!r}", where="rl_rewards", do=f"did you mean {', '.join(near)}?"
                )
        self.weights = {name: float(weight) for name, weight in weights.items() if weight != 0}
        self.rewards = dict(rewards)
        if not self.weights:
            raise ConfigurationError(
                "no reward has a weight",
                where="rl_rewards",
                why="every answer would be worth the same, and nothing could be learnt",
                do="GR2's reward is {rank_gain: 1, conditional_format: 0.2}",
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
        """Weighted sum of the terms that apply; None if none of the weighted ones does."""
        paid = [weight * terms[name] for name, weight in self.weights.items() if terms[name] is not None]
        return math.fsum(paid) if paid else None


def _rank(request: Request, answer: Answer) -> int:
    """1-based rank of the target in the answer."""
    return answer.ranking.index(request.target) + 1
