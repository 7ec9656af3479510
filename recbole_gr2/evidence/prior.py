"""The prior: a small listwise model of the evidence, whose log-probabilities the policy starts from.

The language model then learns what the evidence does not say: P(label) is proportional to
P_LLM(label | prompt) ** w * P_prior(label), in SFT, in RL and in use alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from recbole_gr2.evidence import RECENT, Described
from recbole_gr2.seeding import derive_seed

Gains = Sequence[Sequence[int]]
CHECK_EVERY, PATIENCE = 10, 250  # steps between looks at the validation lists, and without a better one; ours
BATCH = 512  # lists a step; ours
AT_ONCE = 4096  # lists scored side by side


class Prior(nn.Module):
    """Scores candidates by facts about them and about each of the last items of the history and them.

    Which items of the history count for a candidate is learnt: target attention, as in DIN (Zhou et al. 2018, arXiv
    1706.06978, section 4.3), here over facts about pairs in place of embeddings.
    """

    def __init__(self, facts: int, pairs: int, hidden: int, dropout: float) -> None:
        super().__init__()
        for name, size in (("facts", facts), ("pairs", pairs)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        self.pair = nn.Sequential(
            nn.Linear(pairs + RECENT, hidden // 2), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden // 2, hidden // 2)
        )
        self.attention = nn.Linear(hidden // 2, 1)
        self.score = nn.Sequential(
            nn.Linear(facts + 2 * (hidden // 2), hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 1)
        )

    def forward(self, lists: Padded) -> torch.Tensor:
        """Log-probabilities (B, K) over each list, -inf where it is padded."""
        known = lists.known[:, None, :, None]  # (B, 1, R, 1)
        pairs = (lists.pairs.float() - self.pairs_mean) / self.pairs_scale
        place = torch.eye(RECENT).expand(*pairs.shape[:2], RECENT, RECENT)
        each = self.pair(torch.cat([pairs, place], dim=-1)) * known
        weights = self.attention(each).masked_fill(~known, -torch.inf).softmax(dim=2)
        facts = (lists.facts - self.facts_mean) / self.facts_scale
        scores = self.score(torch.cat([facts, (weights * each).sum(dim=2), each.sum(dim=2)], dim=-1)).squeeze(-1)
        return scores.masked_fill(~lists.real, -torch.inf).log_softmax(-1)


class Priors(nn.ModuleList):
    """Priors that were fitted from different starts, as one: the mean of their log-probabilities, normalised."""

    def forward(self, lists: Padded) -> torch.Tensor:
        """Log-probabilities (B, K) over each list, -inf where it is padded."""
        return torch.stack([prior(lists) for prior in self]).mean(0).log_softmax(-1)


class Padded(NamedTuple):
    """B lists side by side: facts (B, K, F), pairs (B, K, RECENT, P), which candidates are real (B, K), and which items
    of the history there are (B, RECENT), newest first."""

    facts: torch.Tensor
    pairs: torch.Tensor
    real: torch.Tensor
    known: torch.Tensor

    def take(self, rows: torch.Tensor) -> Padded:
        """These rows."""
        return Padded(*(part[rows] for part in self))


def fit_prior(
    lists: Sequence[Described],
    gains: Gains,
    *,
    valid: tuple[Sequence[Described], Gains] | None,
    steps: int,
    hidden: int,
    dropout: float,
    learning_rate: float,
    weight_decay: float,
    seed: int,
) -> tuple[Prior, int, float | None]:
    """Fit by cross-entropy over each list.

    Args:
        gains: what each candidate of a list is worth (K,), not all 0. It asks for them in proportion: for its one
            target, or for each of several.
        valid: lists that choose the number of steps, up to `steps`; None takes all of them.

    Returns:
        (prior in eval mode, steps taken, cross-entropy of the validation lists in nats).
    """
    table, goal = pad(lists), shares(gains)
    checked = None if valid is None else (pad(valid[0]), shares(valid[1]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = Prior(table.facts.size(-1), table.pairs.size(-1), hidden, dropout)
        there = table.real.unsqueeze(-1) & table.known.unsqueeze(1)
        for name, seen in (("facts", table.facts[table.real]), ("pairs", table.pairs[there].float())):
            if seen.size(1):
                getattr(prior, f"{name}_mean").copy_(seen.mean(0))
                getattr(prior, f"{name}_scale").copy_(seen.std(0).clamp(min=1e-6))
        optimizer = torch.optim.AdamW(prior.parameters(), lr=learning_rate, weight_decay=weight_decay)
        best = (steps, float("inf"), None)
        for step in range(1, steps + 1):
            prior.train()
            drawn = torch.randperm(len(goal))[:BATCH]
            loss = cross_entropy(prior(table.take(drawn)), goal[drawn])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if checked and (step % CHECK_EVERY == 0 or step == steps):
                prior.eval()
                with torch.no_grad():
                    error = cross_entropy(prior(checked[0]), checked[1]).item()
                if error < best[1]:
                    best = (step, error, {name: value.clone() for name, value in prior.state_dict().items()})
                if step - best[0] >= PATIENCE:
                    break
    if best[2] is not None:
        prior.load_state_dict(best[2])
    return prior.eval(), best[0], best[1] if checked else None


def fit_priors(
    lists: Sequence[Described],
    gains: Gains,
    *,
    valid: tuple[Sequence[Described], Gains] | None,
    steps: Sequence[int],
    seed: int,
    **options,
) -> tuple[Priors, list[int], float | None]:
    """One fit for each of `steps`, see `fit_prior`.

    Returns:
        (priors in eval mode, steps that each took, cross-entropy of the validation lists under all together in nats).
    """
    fits = [
        fit_prior(lists, gains, valid=valid, steps=most, seed=derive_seed(seed, number), **options)
        for number, most in enumerate(steps)
    ]
    priors = Priors(prior for prior, _, _ in fits).eval()
    taken = [count for _, count, _ in fits]
    if valid is None:
        return priors, taken, None
    with torch.no_grad():
        return priors, taken, cross_entropy(priors(pad(valid[0])), shares(valid[1])).item()


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


def cross_fit(
    lists: Sequence[Described], gains: Gains, *, folds: int, steps: Sequence[int], seed: int, **options
) -> list[list[float]]:
    """Log-probabilities of each list from priors that have not seen its target.

    A prior looks better on the lists that it was fitted to than on new ones; a policy trained on top of that would
    trust it too much.
    """
    of = np.random.default_rng(seed).permutation(len(lists)) % folds
    rows: list[list[float]] = [[]] * len(lists)
    for fold in range(folds):
        inside, outside = np.flatnonzero(of == fold), np.flatnonzero(of != fold)
        priors, _, _ = fit_priors(
            [lists[i] for i in outside],
            [gains[i] for i in outside],
            valid=None,
            steps=steps,
            seed=derive_seed(seed, fold),
            **options,
        )
        for i, row in zip(inside, log_prior(priors, [lists[i] for i in inside]), strict=True):
            rows[i] = row
    return rows


def log_prior(prior: Prior | Priors, lists: Sequence[Described]) -> list[list[float]]:
    """Log-probabilities (K,) of each list."""
    found = []
    for start in range(0, len(lists), AT_ONCE):
        part = lists[start : start + AT_ONCE]
        with torch.no_grad():
            rows = prior(pad(part))
        found += [row[: len(each.facts)].tolist() for row, each in zip(rows, part, strict=True)]
    return found


def pad(lists: Sequence[Described]) -> Padded:
    """Lists of different lengths, and with histories of different lengths, side by side."""
    longest = max(len(each.facts) for each in lists)
    facts = torch.zeros(len(lists), longest, lists[0].facts.shape[1])
    pairs = torch.zeros(len(lists), longest, RECENT, lists[0].pairs.shape[2], dtype=torch.float16)
    real = torch.zeros(len(lists), longest, dtype=torch.bool)
    known = torch.zeros(len(lists), RECENT, dtype=torch.bool)
    for row, each in enumerate(lists):
        size, recent = each.pairs.shape[:2]
        facts[row, :size], real[row, :size] = torch.from_numpy(each.facts), True
        pairs[row, :size, :recent], known[row, :recent] = torch.from_numpy(each.pairs), True
    return Padded(facts, pairs, real, known)
