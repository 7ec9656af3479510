"""The grammar of a completion, in one place: what may be generated, and what a token's probability is.

A completion is `reasoning ... <|ranking|> L1 .. LK eos`: the labels are a permutation of the first K. Generation masks
the next token by this grammar, and training renormalises log-probabilities by the same grammar, so the ratio of the
DAPO objective (arXiv 2503.14476, eq. 8) is a ratio of the distribution that was sampled. Where only one token is
allowed it is *forced*: probability 1, nothing to learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from recbole_gr2.errors import ConfigurationError

FREE = -1  # in `Phases.only`: more than one token is allowed here


class Phases(NamedTuple):
    """What the grammar allows at each position of B completions of O tokens.

    `reasoning` (B, O) bool: any token but labels, eos and pad. `labels` (B, O, K) bool: exactly these labels, two or
    more. `only` (B, O) long: the one allowed token, or FREE. Each position is in exactly one of the three.
    """

    reasoning: torch.Tensor
    labels: torch.Tensor
    only: torch.Tensor


@dataclass(frozen=True)
class Grammar:
    """Token ids of the grammar and the longest reasoning in tokens (0: no reasoning, the ranking comes at once)."""

    ranking_id: int
    label_ids: tuple[int, ...]
    eos_id: int
    pad_id: int
    max_reasoning: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, ranking: str, labels: list[str], max_reasoning: int) -> Grammar:
        """The grammar of a tokenizer that holds the ranking mark and the labels as single tokens.

        Raises:
            ConfigurationError: one of them is not in the vocabulary, or the tokenizer has no eos token.
        """
        vocabulary = tokenizer.get_vocab()
        absent = [token for token in (ranking, *labels) if token not in vocabulary]
        if absent or tokenizer.eos_token_id is None:
            raise ConfigurationError(
                f"the tokenizer has no token for {', '.join(absent) or 'the end of a turn (eos)'}",
                where=f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}",
                why="a ranking is written in single tokens, closed by eos",
                do="add the tokens of sid.tokens.added_tokens and set eos_token before building the grammar",
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        label_ids = tuple(vocabulary[label] for label in labels)
        return cls(vocabulary[ranking], label_ids, tokenizer.eos_token_id, pad, max_reasoning)

    @property
    def max_tokens(self) -> int:
        """Longest completion: reasoning, mark, all labels, eos."""
        return self.max_reasoning + 1 + len(self.label_ids) + 1

    def was_truncated(self, completion_ids: list[int]) -> bool:
        """Whether the reasoning filled all of `max_reasoning` (> 0) tokens, so that its end was not its own choice."""
        head = completion_ids[: self.max_reasoning]
        return 0 < self.max_reasoning == len(head) and self.ranking_id not in head and self.eos_id not in head

    def phases(self, completion_ids: torch.Tensor, label_counts: torch.Tensor) -> Phases:
        """What is allowed at each position, from the tokens before it: ids (B, O), counts (B,) with 1 <= K <= labels.

        The rule is total: it is defined behind tokens that it would not have allowed, too.
        """
        ids = completion_ids
        labels = torch.tensor(self.label_ids, device=ids.device)
        position = torch.arange(ids.size(1), device=ids.device)
        marked = _before(ids == self.ranking_id)
        ended = _before(ids == self.eos_id)
        used = _before((ids.unsqueeze(-1) == labels) & marked.unsqueeze(-1))
        exists = torch.arange(len(labels), device=ids.device) < label_counts.unsqueeze(-1)
        open_labels = exists.unsqueeze(1) & ~used
        left = open_labels.sum(-1)

        only = torch.full_like(ids, FREE)
        only[~marked & (position >= self.max_reasoning)] = self.ranking_id
        only = torch.where(marked & (left == 1), labels[open_labels.int().argmax(-1)], only)
        only[marked & (left == 0)] = self.eos_id
        only[ended] = self.pad_id
        free = only == FREE
        return Phases(free & ~marked, open_labels & (free & marked).unsqueeze(-1), only)

    def forbidden(self, device: torch.device) -> torch.Tensor:
        """Token ids that reasoning never holds."""
        return torch.tensor([*self.label_ids, self.eos_id, self.pad_id], device=device)

    def mask(self, phases: Phases, vocabulary: int) -> torch.Tensor:
        """Allowed tokens (B, O, V) bool."""
        allowed = phases.reasoning.unsqueeze(-1).repeat(1, 1, vocabulary)
        allowed[..., self.forbidden(allowed.device)] = False
        allowed[..., torch.tensor(self.label_ids, device=allowed.device)] |= phases.labels
        # FREE is no token id, so it matches nothing.
        return allowed | (torch.arange(vocabulary, device=allowed.device) == phases.only.unsqueeze(-1))

    def allowed(
        self, completion_ids: torch.Tensor, label_counts: torch.Tensor, vocabulary: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Allowed tokens (B, O, V) bool and forced positions (B, O) bool."""
        phases = self.phases(completion_ids, label_counts)
        return self.mask(phases, vocabulary), phases.only != FREE


class GrammarProcessor(LogitsProcessor):
    """Lets `generate` choose only what the grammar allows, with the log-prior of the labels added to their logits.

    `label_prior` (B, labels), one row per row of the batch; -inf behind a list's last label.
    """

    def __init__(self, grammar: Grammar, prompt_length: int, label_prior: torch.Tensor) -> None:
        self.grammar, self.prompt_length, self.label_prior = grammar, prompt_length, label_prior
        self.labels = torch.tensor(grammar.label_ids, device=label_prior.device)
        self.label_counts = label_prior.isfinite().sum(-1)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # `phases` looks at the tokens before a position: append one position, and ask about it.
        asked = torch.nn.functional.pad(input_ids[:, self.prompt_length :], (0, 1), value=self.grammar.pad_id)
        phases = Phases(*(part[:, -1:] for part in self.grammar.phases(asked, self.label_counts)))
        scores = scores.index_add(-1, self.labels, self.label_prior.to(scores.dtype))
        return scores.masked_fill(~self.grammar.mask(phases, scores.size(-1)).squeeze(1), -torch.inf)


def constrained_log_probs(
    logits: torch.Tensor,
    completion_ids: torch.Tensor,
    label_prior: torch.Tensor,
    grammar: Grammar,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities under the grammar, for logits (B, O, V) that predict completion_ids (B, O).

    Args:
        label_prior: (B, labels), added to the logits of the labels; -inf behind a list's last label.

    Returns:
        log-probabilities (B, O) in nats, 0 where the token is forced, -inf where the grammar forbids it; entropy
        (B, O) in nats over the allowed tokens, without gradient; forced (B, O) bool.

    Reasoning positions share one vocabulary mask and label positions read K logits, so no (B, O, V) mask is made.
    """
    phases = grammar.phases(completion_ids, label_prior.isfinite().sum(-1))
    forced = phases.only != FREE
    wrong = forced & (completion_ids != phases.only)
    log_probs = torch.zeros(completion_ids.shape, device=logits.device).masked_fill(wrong, -torch.inf)
    entropy = torch.zeros_like(log_probs)

    rows = phases.reasoning
    scores = logits[rows].float() / temperature
    scores = scores.index_fill(-1, grammar.forbidden(logits.device), -torch.inf)
    chosen, spread = _choose(scores, completion_ids[rows])
    log_probs, entropy = log_probs.masked_scatter(rows, chosen), entropy.masked_scatter(rows, spread)

    labels = torch.tensor(grammar.label_ids, device=logits.device)
    rows = phases.labels.any(-1)
    scores = (logits[rows][:, labels].float() + label_prior[rows.nonzero()[:, 0]]) / temperature
    scores = scores.masked_fill(~phases.labels[rows], -torch.inf)
    is_label = completion_ids[rows].unsqueeze(-1) == labels
    chosen, spread = _choose(scores, is_label.int().argmax(-1))
    chosen = chosen.masked_fill(~is_label.any(-1), -torch.inf)
    return log_probs.masked_scatter(rows, chosen), entropy.masked_scatter(rows, spread), forced


def _before(flags: torch.Tensor) -> torch.Tensor:
    """Whether a flag (B, O, ...) is set at any earlier position."""
    counts = flags.int()
    return counts.cumsum(1) - counts > 0


def _choose(scores: torch.Tensor, choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each row's choice, and each row's entropy, for scores (n, m) with -inf where forbidden."""
    log_probs = scores.log_softmax(-1)
    with torch.no_grad():  # a metric; keeping its graph would hold another (n, V)
        entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)
    return log_probs.gather(-1, choice.unsqueeze(-1)).squeeze(-1), entropy
