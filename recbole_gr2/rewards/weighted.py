"""The weighted sum of rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.plugins import calling, check_call, find
from recbole_gr2.rewards.rewards import REWARDS, Reward
from recbole_gr2.types import Answer, Request


class WeightedRewards:
    """Computes all rewards of an answer, and the weighted sum of those that have a weight.

    Args:
        weights: the weight of each reward, or `{weight: w, only_if: name or list of names}`: the reward counts only if
            each named reward is above 0. A reward without a weight, or with weight 0, is only measured. A name is a
            key of `rewards`, or `module:attribute`, a function `reward(request, answer) -> float | None`.
        rewards: the rewards by name, e.g. `{**REWARDS, "overlong": overlong(64, 16)}`.

    Raises:
        ConfigurationError: a reward does not exist or does not take a request and an answer, an entry has another form,
            or no weight differs from 0.

    >>> weighted = WeightedRewards({"rank_gain": 1.0, "format": {"weight": 0.2, "only_if": "promoted"}})
    >>> weighted.total({"rank_gain": 0.5, "format": 1.0, "promoted": 1.0})
    0.7
    """

    def __init__(self, weights: Mapping[str, Any], rewards: Mapping[str, Reward] = REWARDS) -> None:
        self.weights: dict[str, float] = {}
        self.only_if: dict[str, list[str]] = {}
        self.rewards = {**rewards, **{name: find(name, rewards, where="rl_rewards") for name in reward_names(weights)}}
        for name, reward in self.rewards.items():
            if ":" in name:
                check_call(reward, "reward(request, answer)", None, None, name=name, where="rl_rewards")
        for name, value in weights.items():
            weight, conditions = _entry(name, value)
            if weight:
                self.weights[name], self.only_if[name] = weight, conditions
        if not self.weights:
            raise ConfigurationError(
                "no reward has a weight",
                where="rl_rewards",
                why="all answers would have the same reward, and there would be nothing to learn",
                do="GR2's reward is {rank_gain: 1, format: {weight: 0.2, only_if: promoted}}",
            )

    def terms(self, request: Request, answer: Answer) -> dict[str, float | None]:
        """Return all rewards of an answer by name; None for a reward that does not apply.

        Raises:
            GR2Error: a reward is not a finite number, or a reward of the user raises an exception.
        """
        terms: dict[str, float | None] = {}
        for name, reward in self.rewards.items():
            with calling(name, where=f"request {request.request_id}"):
                terms[name] = reward(request, answer)
        for name, value in terms.items():
            if value is not None and not _is_finite(value):
                raise GR2Error(
                    f"the reward {name!r} is {value!r:.200}",
                    where=f"request {request.request_id}",
                    why="one such value makes the advantages of all answers to the request invalid",
                    do="return a finite number, or None if the reward does not apply",
                )
        return terms

    def total(self, terms: Mapping[str, float | None]) -> float | None:
        """Return the weighted sum of the terms that apply; None if no weighted term applies.

        A term counts as 0 if one of its conditions is not above 0. A term does not apply if one of its conditions does
        not apply.
        """
        weighted = []
        for name, weight in self.weights.items():
            value, conditions = terms[name], [terms[condition] for condition in self.only_if[name]]
            if value is not None and None not in conditions:
                weighted.append(weight * value * all(each is not None and each > 0 for each in conditions))
        return math.fsum(weighted) if weighted else None


def reward_names(weights: Mapping[str, Any]) -> list[str]:
    """Return the names of the rewards in `weights` and of their conditions, without repetitions.

    >>> reward_names({"format": {"weight": 0.2, "only_if": "promoted"}})
    ['format', 'promoted']
    """
    return list(dict.fromkeys(n for name, value in weights.items() for n in (name, *_entry(name, value)[1])))


def _is_finite(value: Any) -> bool:
    """Whether a value is a finite number. Arrays without dimensions are numbers."""
    value = value.item() if getattr(value, "shape", None) == () else value
    return isinstance(value, Real) and math.isfinite(value)


def _entry(name: str, value: Any) -> tuple[float, list[str]]:
    """Return the weight and the conditions of one entry of `rl_rewards`."""
    entry = value if isinstance(value, Mapping) else {"weight": value}
    weight, conditions = entry.get("weight"), entry.get("only_if", [])
    conditions = [conditions] if isinstance(conditions, str) else conditions
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or set(entry) - {"weight", "only_if"}
        or not isinstance(conditions, list)
    ):
        raise ConfigurationError(
            f"the reward {name} has the entry {value!r}",
            where="rl_rewards",
            why="an entry is a number, or a mapping with `weight` and `only_if`",
            do=f"write {name}: 0.2, or {name}: {{weight: 0.2, only_if: promoted}}",
        )
    return float(weight), conditions
