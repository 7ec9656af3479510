"""The built-in rewards.

K is the number of candidates. Ranks start at 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.types import Answer, Request

Reward = Callable[[Request, Answer], float | None]


def rank_gain(request: Request, answer: Answer) -> float | None:
    """Return (base rank of the target - rank in the answer) / K.

    Range: (-1, 1). None if the list does not contain its target. Source: R_rank of GR2, section 5.
    """
    if request.target_rank is None:
        return None
    return (request.target_rank - _rank(request, answer)) / len(request.items)


def format(request: Request, answer: Answer) -> float:
    """Return 1 if the answer has the required form, else 0.

    An answer has the required form if it was read without repair and its reasoning ended before the token limit.
    Range: {0, 1}. Source: R_fmt of GR2, section 5.
    """
    return float(answer.status == "ok")


def promoted(request: Request, answer: Answer) -> float | None:
    """Return 1 if the answer moves the target up, or keeps it in first place, else 0.

    Range: {0, 1}. None if the list does not contain its target. Source: condition of the conditional reward of GR2,
    section 5.
    """
    if request.target_rank is None:
        return None
    return float(_rank(request, answer) < request.target_rank or request.target_rank == _rank(request, answer) == 1)


def moved(request: Request, answer: Answer) -> float | None:
    """Return 0 if the answer copies a base order that is not optimal, else 1.

    A base order is optimal if no candidate precedes one of higher relevance. Range: {0, 1}. None if the list has no
    signal, see `Request.has_signal`. Source: condition of the de-hacked reward of GR2-TR.
    """
    if not request.has_signal:
        return None
    return float(answer.ranking != request.items or request.sorted_by_grade(request.items) == request.items)


def auc(request: Request, answer: Answer) -> float | None:
    """Return the share of pairs of candidates with different relevance that the answer ranks in the right order.

    With one target this is the share of the other candidates that follow the target. Range: [0, 1]. None if the list
    has no signal, see `Request.has_signal`. Source: GR2-TR.
    """
    if not request.has_signal:
        return None
    relevance = _relevance(request, answer)
    pairs = [
        above > below for place, above in enumerate(relevance) for below in relevance[place + 1 :] if above != below
    ]
    return sum(pairs) / len(pairs)


def ndcg(request: Request, answer: Answer) -> float | None:
    """Return DCG / DCG of the best order, with DCG = sum over candidates of (2^relevance - 1) / log2(1 + rank).

    With one target this is 1 / log2(1 + rank of the target). Range: (0, 1]. None if the list has no signal, see
    `Request.has_signal`. Source: GR2-TR.
    """
    if not request.has_signal:
        return None
    actual, best = (
        math.fsum((2**grade - 1) / math.log2(2 + place) for place, grade in enumerate(relevance))
        for relevance in (_relevance(request, answer), sorted(request.relevance, reverse=True))
    )
    return actual / best


def unchanged(request: Request, answer: Answer) -> float:
    """Return 1 if the answer is the base order, else 0.

    Range: {0, 1}. This is a measurement: a policy with a mean of 1 copies its input.
    """
    return float(answer.ranking == request.items)


def overlong(max_reasoning: int, buffer: int) -> Reward:
    """Return a reward that penalizes long reasoning.

    The reward is 0 up to max_reasoning - buffer tokens, and decreases linearly to -1 at max_reasoning tokens. Range:
    [-1, 0]. Source: DAPO (arXiv 2503.14476), equation 13.

    Args:
        max_reasoning: maximum number of reasoning tokens.
        buffer: number of tokens before the maximum over which the reward decreases.

    Raises:
        ConfigurationError: the condition 0 < buffer <= max_reasoning does not hold.
    """
    if not 0 < buffer <= max_reasoning:
        raise ConfigurationError(
            f"an overlong buffer of {buffer} tokens does not fit into {max_reasoning} tokens of reasoning",
            where="rl_overlong_buffer",
            why="the penalty grows over the last tokens before the limit",
            do=f"choose a value from 1 to prompt_max_reasoning = {max_reasoning}, or 0 for no penalty",
        )

    def penalty(request: Request, answer: Answer) -> float:
        length = answer.output_tokens - len(request.items) - 2  # without the ranking mark, the labels and eos
        return max(-1.0, min(0.0, (max_reasoning - buffer - length) / buffer))

    return penalty


REWARDS: Mapping[str, Reward] = {
    "rank_gain": rank_gain,
    "auc": auc,
    "ndcg": ndcg,
    "format": format,
    "promoted": promoted,
    "moved": moved,
    "unchanged": unchanged,
}


def _relevance(request: Request, answer: Answer) -> list[int]:
    """Return the relevance of the candidates in the order of the answer, (K,)."""
    relevance = dict(zip(request.items, request.relevance, strict=True))
    return [relevance[item] for item in answer.ranking]


def _rank(request: Request, answer: Answer) -> int:
    """Return the rank of the target in the answer."""
    return answer.ranking.index(request.target) + 1
