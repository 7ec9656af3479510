"""The prior: a small listwise model of the evidence, whose log-probabilities the policy starts from.

The language model then learns what the evidence does not say: P(label) is proportional to
P_LLM(label | prompt) * P_prior(label), in SFT, in RL and in use alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from recbole_gr2.seeding import derive_seed

Gains = Sequence[Sequence[int]]
CHECK_EVERY = 10  # steps between looks at the validation lists


class Prior(nn.Module):
    """Scores candidates by their F facts: (B, K, F) -> log-probabilities (B, K) over each list."""

    def __init__(self, facts: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(facts))
        self.register_buffer("scale", torch.ones(facts))
        self.score = nn.Sequential(nn.Linear(facts, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 1))

    def forward(self, facts: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """`real` (B, K) bool: False where a shorter list is padded; such places get -inf."""
        scores = self.score((facts - self.mean) / self.scale).squeeze(-1)
        return scores.masked_fill(~real, -torch.inf).log_softmax(-1)


def fit_prior(
    facts: Sequence[np.ndarray], gains: Gains, *, valid: tuple[Sequence[np.ndarray], Gains] | None,
    steps: int, hidden: int, dropout: float, learning_rate: float, weight_decay: float, seed: int,
) -> tuple[Prior, int, float | None]:  # fmt: skip
    """Fit by cross-entropy over each list, all lists a step.

    Args:
        facts: (K, F) of each list; `gains`: what each of its candidates is worth (K,), not all 0. It asks for them in
            proportion: for its one target, or for each of several.
        valid: lists that choose the number of steps; None takes all of them.

    Returns:
        (prior in eval mode, steps taken, cross-entropy of the validation lists in nats).
    """
    table, real = pad(facts)
    goal = shares(gains)
    checked = None if valid is None else (*pad(valid[0]), shares(valid[1]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = Prior(table.size(-1), hidden, dropout)
        prior.mean.copy_(table[real].mean(0))
        prior.scale.copy_(table[real].std(0).clamp(min=1e-6))
        optimizer = torch.optim.AdamW(prior.parameters(), lr=learning_rate, weight_decay=weight_decay)
        best = (steps, float("inf"), None)
        for step in range(1, steps + 1):
            prior.train()
            loss = cross_entropy(prior(table, real), goal)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if checked and (step % CHECK_EVERY == 0 or step == steps):
                prior.eval()
                with torch.no_grad():
                    error = cross_entropy(prior(*checked[:2]), checked[2]).item()
                if error < best[1]:
                    best = (step, error, {name: value.clone() for name, value in prior.state_dict().items()})
    if best[2] is not None:
        prior.load_state_dict(best[2])
    return prior.eval(), best[0], best[1] if checked else None


def shares(gains: Gains) -> torch.Tensor:
    """Gains of B lists as shares of each list's sum, (B, K), 0 where a shorter list is padded.

    >>> shares([(0, 1), (2, 0, 2)])
    tensor([[0.0000, 1.0000, 0.0000],
            [0.5000, 0.0000, 0.5000]])
    """
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float32) for row in gains], batch_first=True)
    return padded / padded.sum(-1, keepdim=True)


def cross_entropy(log_probs: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Mean over lists in nats, from log-probabilities (B, K) and shares (B, K)."""
    return -(goal * log_probs.masked_fill(goal == 0, 0.0)).sum(-1).mean()


def cross_fit(facts: Sequence[np.ndarray], gains: Gains, *, folds: int, seed: int, **options
              ) -> list[list[float]]:  # fmt: skip
    """Log-probabilities of each list from a prior that has not seen its target.

    A prior looks better on the lists that it was fitted to than on new ones; a policy trained on top of that would
    trust it too much.
    """
    of = np.random.default_rng(seed).permutation(len(facts)) % folds
    rows: list[list[float]] = [[]] * len(facts)
    for fold in range(folds):
        inside, outside = np.flatnonzero(of == fold), np.flatnonzero(of != fold)
        prior, _, _ = fit_prior([facts[i] for i in outside], [gains[i] for i in outside], valid=None,
                                seed=derive_seed(seed, fold), **options)  # fmt: skip
        for i, row in zip(inside, log_prior(prior, [facts[i] for i in inside]), strict=True):
            rows[i] = row
    return rows


def log_prior(prior: Prior, facts: Sequence[np.ndarray]) -> list[list[float]]:
    """Log-probabilities (K,) of each list."""
    if not facts:
        return []
    with torch.no_grad():
        rows = prior(*pad(facts))
    return [row[: len(table)].tolist() for row, table in zip(rows, facts, strict=True)]


def pad(facts: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists (K, F) as one tensor (B, K, F), and which places are real, (B, K)."""
    longest = max(len(table) for table in facts)
    padded = torch.zeros(len(facts), longest, facts[0].shape[1])
    real = torch.zeros(len(facts), longest, dtype=torch.bool)
    for row, table in enumerate(facts):
        padded[row, : len(table)], real[row, : len(table)] = torch.from_numpy(table), True
    return padded, real
