"""The prior: a small listwise model of the features of candidates.

The policy multiplies its probabilities by those of the prior, in SFT, in RL and in inference:
P(label) is proportional to P_LLM(label | prompt) ** w * P_prior(label). The language model thus has to learn only what
the features do not contain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from recbole_gr2.errors import MissingFileError, QualityCheckError
from recbole_gr2.model.dropout import Dropout
from recbole_gr2.progress import progress
from recbole_gr2.seeding import derive_seed
from recbole_gr2.types import RECENT, CandidateFeatures

Relevance = Sequence[Sequence[int]]
Scorer = Callable[[Sequence[CandidateFeatures]], list[list[float]]]  # scores (K,) of the candidates of each list
# The constants below are our choice.
HIDDEN = 32  # Hidden units of the scoring network. The network of pairs has half as many.
DROPOUT = 0.2
LEARNING_RATE = 0.003  # Of AdamW.
WEIGHT_DECAY = 0.01  # Of AdamW.
FOLDS = 5  # Folds of `cross_fit`.
BATCH = 512  # Lists per optimizer step.
CHECK_EVERY = 25  # Steps between evaluations on the validation lists.
PATIENCE = 250  # Steps without a better validation loss after which the fit stops.
SCORE_BATCH = 512  # Lists per forward pass outside training.


class Batch(NamedTuple):
    """B lists of different lengths, padded to K candidates.

    Attributes:
        candidates: F features of each candidate, (B, K, F).
        pairs: P features of each candidate with each recent history item, newest first, (B, RECENT, K, P).
        is_candidate: False for padding, (B, K) bool.
        is_history: whether there is such a history item, (B, RECENT) bool.
    """

    candidates: torch.Tensor
    pairs: torch.Tensor
    is_candidate: torch.Tensor
    is_history: torch.Tensor

    def select(self, positions: torch.Tensor) -> Batch:
        """Return the lists at these positions."""
        return Batch(*(part[positions] for part in self))


class Prior(nn.Module):
    """Scores the candidates of a list by their features and their pair features.

    It reads the features as they are and standardised within the list, because a candidate competes with those of its
    list.

    It learns which history items matter for a candidate by target attention over the pair features. DIN (Zhou et al.
    2018, arXiv 1706.06978, section 4.3) has the same attention over embeddings.

    Args:
        candidates: F, number of features of a candidate.
        pairs: P, number of features of a candidate-history pair.
    """

    candidates_mean: torch.Tensor
    candidates_scale: torch.Tensor
    pairs_mean: torch.Tensor
    pairs_scale: torch.Tensor

    def __init__(self, candidates: int, pairs: int) -> None:
        super().__init__()
        for name, size in (("candidates", candidates), ("pairs", pairs)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        half = HIDDEN // 2
        self.pair_hidden = nn.Linear(pairs + RECENT, half)
        self.pair_dropout = Dropout(DROPOUT)
        self.pair_output = nn.Linear(half, half)
        self.attention = nn.Linear(half, 1, bias=False)
        self.score = nn.Sequential(
            nn.Linear(2 * candidates + 2 * half, HIDDEN), nn.GELU(), Dropout(DROPOUT), nn.Linear(HIDDEN, 1)
        )

    def normalise_by(self, batch: Batch) -> None:
        """Set the means and standard deviations that features are normalised by to those of a batch."""
        is_pair = batch.is_candidate.unsqueeze(1) & batch.is_history.unsqueeze(2)
        for values, mean, scale in (
            (batch.candidates[batch.is_candidate], self.candidates_mean, self.candidates_scale),
            (batch.pairs[is_pair].float(), self.pairs_mean, self.pairs_scale),
        ):
            if values.size(1):
                mean.copy_(values.mean(0))
                scale.copy_(values.std(0).clamp(min=1e-6))

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the log-probability of each candidate of each list, (B, K). Padding has -inf."""
        candidates = (batch.candidates - self.candidates_mean) / self.candidates_scale
        relative = standardise_within(candidates, batch.is_candidate)
        inputs = torch.cat([candidates, relative, *self._pair_summaries(batch)], dim=-1)
        return self.score(inputs).squeeze(-1).masked_fill(~batch.is_candidate, -torch.inf).log_softmax(-1)

    def _pair_summaries(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean under the attention and the sum of the pair network over the history, each (B, K, half).

        Only existing history items are computed. Each is one of the M rows below; a user of Amazon Beauty has about
        half of the `RECENT` items.
        """
        lists, slots = batch.is_history.nonzero(as_tuple=True)  # (M,), (M,)
        weight, features = self.pair_hidden.weight, batch.pairs.size(-1)
        # The input is the normalised features and a one-hot encoding of the position in the history.
        scaled = weight[:, :features] / self.pairs_scale
        bias = self.pair_hidden.bias - scaled @ self.pairs_mean + weight[:, features:].T[slots]  # (M, half)
        rows = batch.pairs.flatten(0, 1).index_select(0, lists * RECENT + slots)  # [lists, slots] is slower
        hidden = rows.float() @ scaled.T + bias.unsqueeze(1)
        hidden = self.pair_dropout(nn.functional.gelu(hidden))  # (M, K, half)
        # The output layer is linear: it is applied to sums over the history, and joined with the attention.
        logits = hidden @ (self.attention.weight @ self.pair_output.weight).squeeze(0)  # (M, K)
        attention = logits.new_full(batch.pairs.shape[:3], -torch.inf).index_put((lists, slots), logits).softmax(1)
        attention = attention[lists, slots].unsqueeze(-1)  # (M, K, 1)
        zeros = hidden.new_zeros(len(batch.pairs), *hidden.shape[1:])
        mean = self.pair_output(zeros.index_add(0, lists, attention * hidden))
        total = nn.functional.linear(zeros.index_add(0, lists, hidden), self.pair_output.weight)
        return mean, total + batch.is_history.sum(1).view(-1, 1, 1) * self.pair_output.bias


class Priors(nn.ModuleList):
    """An ensemble of priors: the normalised mean of their log-probabilities.

    Args:
        priors: the members.
    """

    def __init__(self, priors: Iterable[Prior]) -> None:
        super().__init__(priors)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the log-probability of each candidate of each list, (B, K). Padding has -inf."""
        return torch.stack([prior(batch) for prior in self]).mean(0).log_softmax(-1)

    def save(self, path: str | Path) -> None:
        """Write the weights of all members to a safetensors file."""
        from safetensors.torch import save_file

        save_file(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> Priors:
        """Read an ensemble that `save` wrote, in evaluation mode.

        Raises:
            MissingFileError: the file does not exist.
        """
        from safetensors.torch import load_file

        if not Path(path).is_file():
            raise MissingFileError(
                f"no file {str(path)!r}",
                where="features.prior.Priors.load",
                why="it contains the weights of the prior",
                do="run the prior stage with at least one provider in prior_features",
            )
        weights = load_file(path)
        members = sum(name.endswith(".candidates_mean") for name in weights)
        sizes = len(weights["0.candidates_mean"]), len(weights["0.pairs_mean"])
        priors = cls(Prior(*sizes) for _ in range(members))
        priors.load_state_dict(weights)
        return priors.eval()


def fit_prior(
    features: Sequence[CandidateFeatures],
    relevance: Relevance,
    *,
    valid: tuple[Sequence[CandidateFeatures], Relevance] | None,
    steps: int,
    seed: int,
) -> tuple[Prior, int, float | None]:
    """Fit a prior by cross-entropy over each list.

    Args:
        features: features of the train lists.
        relevance: relevance of each candidate of each list, (K,), at least one above 0. It is normalised to a
            distribution over the candidates of the list, which is the target of the cross-entropy.
        valid: features and relevance of validation lists. They choose the number of steps, at most `steps`. With None
            the fit makes all steps.
        steps: number of optimizer steps.
        seed: seed of the initial weights, the batches and dropout.

    Returns:
        (prior in evaluation mode, number of steps, cross-entropy of the validation lists in nats or None).
    """
    train, targets = pad(features), shares(relevance)
    check = None if valid is None else (pad(valid[0]), shares(valid[1]))
    best_step, best_error, best_weights = steps, float("inf"), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = Prior(train.candidates.size(-1), train.pairs.size(-1))
        prior.normalise_by(train)
        optimizer = torch.optim.AdamW(prior.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for step in progress(range(1, steps + 1), "prior, step"):
            prior.train()
            positions = torch.randperm(len(targets))[:BATCH]
            loss = cross_entropy(prior(train.select(positions)), targets[positions])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if check is not None and (step % CHECK_EVERY == 0 or step == steps):
                prior.eval()
                error = error_of(prior, *check)
                if error < best_error:
                    best_step, best_error = step, error
                    best_weights = {name: value.clone() for name, value in prior.state_dict().items()}
                if step - best_step >= PATIENCE:
                    break
    if best_weights is not None:
        prior.load_state_dict(best_weights)
    return prior.eval(), best_step, None if check is None else best_error


def fit_priors(
    features: Sequence[CandidateFeatures],
    relevance: Relevance,
    *,
    valid: tuple[Sequence[CandidateFeatures], Relevance] | None,
    steps: Sequence[int],
    seed: int,
) -> tuple[Priors, list[int], float | None]:
    """Fit an ensemble of priors from different initial weights.

    Args:
        features: features of the train lists, see `fit_prior`.
        relevance: relevance of their candidates.
        valid: features and relevance of validation lists, or None.
        steps: number of optimizer steps of each member.
        seed: seed of the ensemble. Each member has a seed derived from it.

    Returns:
        (ensemble in evaluation mode, number of steps of each member, cross-entropy of the validation lists under the
        ensemble in nats or None).
    """
    fits = [
        fit_prior(features, relevance, valid=valid, steps=most, seed=derive_seed(seed, number))
        for number, most in enumerate(progress(steps, "prior, fit"))
    ]
    priors = Priors(prior for prior, _, _ in fits).eval()
    steps_of_fits = [count for _, count, _ in fits]
    if valid is None:
        return priors, steps_of_fits, None
    return priors, steps_of_fits, error_of(priors, pad(valid[0]), shares(valid[1]))


def cross_fit(
    features: Sequence[CandidateFeatures],
    relevance: Relevance,
    *,
    users: Sequence[str],
    steps: int,
    seed: int,
) -> list[list[float]]:
    """Return the log-probabilities of each list under a prior that was not fitted to it, by `FOLDS`-fold fitting.

    A prior is better on the lists that it was fitted to than on new lists. A policy that is trained with such
    log-probabilities would rely on the prior too much.

    Args:
        features: features of the train lists, see `fit_prior`.
        relevance: relevance of their candidates.
        users: user of each list. The lists of a user are in the same fold.
        steps: number of optimizer steps.
        seed: seed of the folds and of the fits.

    Returns:
        Log-probabilities (K,) of the candidates of each list.

    Raises:
        QualityCheckError: the lists belong to fewer than two users.
    """

    def fit(part: Sequence[CandidateFeatures], labels: Relevance, seed: int) -> Scorer:
        prior, _, _ = fit_prior(part, labels, valid=None, steps=steps, seed=seed)
        return lambda others: log_prior(prior, others)

    return cross_fit_with(fit, features, relevance, users=users, seed=seed)


def cross_fit_with(
    fit: Callable[[Sequence[CandidateFeatures], Relevance, int], Scorer],
    features: Sequence[CandidateFeatures],
    relevance: Relevance,
    *,
    users: Sequence[str],
    seed: int,
) -> list[list[float]]:
    """Return the scores of each list by a model that was not fitted to lists of its user.

    Args:
        fit: fits a model to features and relevance of lists with a seed, and returns what scores other lists.
        features: features of the train lists.
        relevance: relevance of their candidates.
        users: user of each list.
        seed: seed of the folds. Those of the fits are derived from it.

    Returns:
        Scores (K,) of the candidates of each list.

    Raises:
        QualityCheckError: the lists belong to fewer than two users.
    """
    scores: list[list[float]] = [[]] * len(features)
    folds = list(_folds_of_users(users, seed))
    for fold, (inside, outside) in enumerate(progress(folds, "cross-fitting, fold")):
        score = fit([features[i] for i in outside], [relevance[i] for i in outside], derive_seed(seed, fold))
        for i, row in zip(inside, score([features[i] for i in inside]), strict=True):
            scores[i] = row
    return scores


def _folds_of_users(users: Sequence[str], seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Divide users at random into `FOLDS` folds, or one for each user if there are fewer.

    Args:
        users: user of each list.
        seed: seed of the folds.

    Yields:
        For each fold the positions of its lists, and those of the other lists.

    Raises:
        QualityCheckError: the lists belong to fewer than two users.
    """
    number_of = {user: number for number, user in enumerate(dict.fromkeys(users))}
    if len(number_of) < 2:
        raise QualityCheckError(
            f"the train lists with a training signal belong to {len(number_of)} users",
            where="the prior stage",
            why="the prior of the lists of a user is fitted to the lists of other users",
            do="raise cand_pool or cand_num, so that more lists contain their target, or set prior_features: []",
        )
    count = min(FOLDS, len(number_of))
    folds = np.random.default_rng(seed).permutation(len(number_of)) % count
    fold_of = folds[[number_of[user] for user in users]]
    for fold in range(count):
        yield np.flatnonzero(fold_of == fold).tolist(), np.flatnonzero(fold_of != fold).tolist()


def log_prior(prior: Prior | Priors, features: Sequence[CandidateFeatures]) -> list[list[float]]:
    """Return the log-probabilities (K,) of the candidates of each list.

    Args:
        prior: a prior or an ensemble, in evaluation mode.
        features: features of the lists.
    """
    log_probs: list[list[float]] = []
    for start in range(0, len(features), SCORE_BATCH):
        part = features[start : start + SCORE_BATCH]
        with torch.no_grad():
            padded = prior(pad(part))
        log_probs += [row[: len(each.candidates)].tolist() for row, each in zip(padded, part, strict=True)]
    return log_probs


@torch.no_grad()
def error_of(prior: Prior | Priors, batch: Batch, targets: torch.Tensor) -> float:
    """Return the mean cross-entropy of lists in nats. `SCORE_BATCH` lists pass through the model at once.

    Args:
        prior: a prior or an ensemble, in evaluation mode.
        batch: features of B lists.
        targets: target distribution over the candidates, (B, K). Padding has 0.
    """
    parts = torch.arange(len(targets)).split(SCORE_BATCH)
    return cross_entropy(torch.cat([prior(batch.select(part)) for part in parts]), targets).item()


def standardise_within(values: torch.Tensor, is_candidate: torch.Tensor) -> torch.Tensor:
    """Standardise each feature over the candidates of its list, (B, K, F). Padding has no meaning.

    Args:
        values: features, (B, K, F).
        is_candidate: False for padding, (B, K) bool.

    >>> standardise_within(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])).flatten()[:2]
    tensor([-1.,  1.])
    """
    mask = is_candidate.unsqueeze(-1)
    count = mask.sum(1, keepdim=True)
    centred = values - (values * mask).sum(1, keepdim=True) / count
    deviation = ((centred * mask).square().sum(1, keepdim=True) / count).sqrt()
    return centred / deviation.clamp(min=1e-6)


def shares(relevance: Relevance) -> torch.Tensor:
    """Divide the relevance of each candidate by the sum of its list, (B, K). Padding has 0.

    >>> shares([(0, 1), (2, 0, 2)])
    tensor([[0.0000, 1.0000, 0.0000],
            [0.5000, 0.0000, 0.5000]])
    """
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float32) for row in relevance], batch_first=True)
    return padded / padded.sum(-1, keepdim=True)


def cross_entropy(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of lists in nats.

    Args:
        log_probs: log-probability of each candidate, (B, K). Padding has -inf.
        targets: target distribution over the candidates, (B, K). Padding has 0.
    """
    return -(targets * log_probs.masked_fill(targets == 0, 0.0)).sum(-1).mean()


def pad(features: Sequence[CandidateFeatures]) -> Batch:
    """Combine the features of lists of different lengths, with histories of different lengths, into one batch."""
    longest = max(len(each.candidates) for each in features)
    candidates = np.zeros((len(features), longest, features[0].candidates.shape[1]), np.float32)
    pairs = np.zeros((len(features), RECENT, longest, features[0].pairs.shape[2]), np.float16)
    is_candidate = np.zeros((len(features), longest), bool)
    is_history = np.zeros((len(features), RECENT), bool)
    for row, each in enumerate(features):
        size, recent = each.pairs.shape[:2]
        candidates[row, :size], is_candidate[row, :size] = each.candidates, True
        pairs[row, :recent, :size] = each.pairs.transpose(1, 0, 2)
        is_history[row, :recent] = True
    return Batch(*map(torch.from_numpy, (candidates, pairs, is_candidate, is_history)))
