"""Rewards of reinforcement learning: functions of a request and an answer, and their weighted sum.

A reward returns a number, or None if it does not apply to the request. The setting `rl_rewards` gives each reward a
weight, or a weight and conditions:

    {rank_gain: 1.0, format: 0.2}                                                 GR2, plain
    {rank_gain: 1.0, format: {weight: 0.2, only_if: promoted}}                    GR2, conditional
    {ndcg: {weight: 1.0, only_if: [format, moved]}, format: 0.2}                  GR2-TR, de-hacked

The plain form (arXiv 2602.07774, section 5) also rewards an answer that copies the base order. The conditional form
does not.
"""

from recbole_gr2.rewards.rewards import (
    REWARDS,
    Reward,
    auc,
    format,
    moved,
    ndcg,
    overlong,
    promoted,
    rank_gain,
    unchanged,
)
from recbole_gr2.rewards.weighted import WeightedRewards, reward_names

__all__ = [
    "REWARDS",
    "Reward",
    "WeightedRewards",
    "auc",
    "format",
    "moved",
    "ndcg",
    "overlong",
    "promoted",
    "rank_gain",
    "reward_names",
    "unchanged",
]
