"""The grammar of a completion, in one place: what may be generated, and what a token's probability is.

A completion is `reasoning ... <|ranking|> L1 .. LK eos`: the labels are a permutation of the first K. Generation masks
the next token by this grammar, and training renormalises log-probabilities by the same grammar, so the ratio of the
DAPO objective (arXiv 2503.14476, eq. 8) is a ratio of the distribution that was sampled. Where only one token is
allowed it is *forced*: probability 1, nothing to learn.

Reasoning may cite the semantic IDs that the prompt shows and no others: each token of one is a choice among those that
go on like one of them, and where the prompt has a label behind an ID, a citation has it too, so that the ranking can
copy it. Where a candidate is chosen, by its label or by its ID, its prior has a say:
P(choice) ~ P_LLM(choice) ** llm_weight * P_prior(candidate), an item of the history having the least prior of all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.sid.tokens import SID_BEGIN, SID_END, is_code

FREE = -1  # in place of a token: in `Phases.only`, more than one is allowed here


class Phases(NamedTuple):
    """What the grammar allows at each position of B completions of O tokens.

    `reasoning` (B, O) bool: any token but the `forbidden` ones. `labels` (B, O, K) bool: exactly these labels, two or
    more. `only` (B, O) long: the one allowed token, or FREE. `copies` (B, O, M) long: exactly these tokens, two or
    more, each once, FREE in other places. Each position is in exactly one of the four. `copy_prior` (B, O, M) is added
    to the logits of `copies`, and 0 in other places.
    """

    reasoning: torch.Tensor
    labels: torch.Tensor
    only: torch.Tensor
    copies: torch.Tensor
    copy_prior: torch.Tensor


class Cited(NamedTuple):
    """The semantic IDs that B prompts show: tokens from begin to end and the label behind, FREE where there is
    none (B, M, W), and their log-prior (B, M): that of this label, or the least of all labels."""

    tokens: torch.Tensor
    prior: torch.Tensor


@dataclass(frozen=True)
class Grammar:
    """Token ids of the grammar and the longest reasoning in tokens (0: no reasoning, the ranking comes at once).

    `sid_ids` are those that begin and end a semantic ID, and `code_ids` those inside: with them reasoning cites what
    the prompt shows, without them it is free. `llm_weight` (> 0) is the power of the model's probability where a
    candidate is chosen.
    """

    ranking_id: int
    label_ids: tuple[int, ...]
    eos_id: int
    pad_id: int
    max_reasoning: int
    sid_ids: tuple[int, int] | None = None
    code_ids: tuple[int, ...] = ()
    llm_weight: float = 1.0

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        ranking: str,
        labels: list[str],
        max_reasoning: int,
        *,
        grounded: bool = False,
        llm_weight: float = 1.0,
    ) -> Grammar:
        """The grammar of a tokenizer that holds the ranking mark and the labels as single tokens.

        Args:
            grounded: reasoning cites the semantic IDs of the prompt alone.

        Raises:
            ConfigurationError: one of them is not in the vocabulary, or the tokenizer has no eos token.
        """
        vocabulary = tokenizer.get_vocab()
        ends = (SID_BEGIN, SID_END) if grounded else ()
        absent = [token for token in (ranking, *labels, *ends) if token not in vocabulary]
        if absent or tokenizer.eos_token_id is None:
            raise ConfigurationError(
                f"the tokenizer has no token for {', '.join(absent) or 'the end of a turn (eos)'}",
                where=f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}",
                why="a ranking is written in single tokens, closed by eos",
                do="add the tokens of sid.tokens.added_tokens and set eos_token before building the grammar",
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        label_ids = tuple(vocabulary[label] for label in labels)
        grammar = cls(vocabulary[ranking], label_ids, tokenizer.eos_token_id, pad, max_reasoning, llm_weight=llm_weight)
        if not grounded:
            return grammar
        codes = tuple(sorted(number for token, number in vocabulary.items() if is_code(token)))
        return replace(grammar, sid_ids=(vocabulary[SID_BEGIN], vocabulary[SID_END]), code_ids=codes)

    @property
    def max_tokens(self) -> int:
        """Longest completion: reasoning, mark, all labels, eos."""
        return self.max_reasoning + 1 + len(self.label_ids) + 1

    def was_truncated(self, completion_ids: list[int]) -> bool:
        """Whether the reasoning filled all of `max_reasoning` (> 0) tokens, so that its end was not its own choice."""
        head = completion_ids[: self.max_reasoning]
        return 0 < self.max_reasoning == len(head) and self.ranking_id not in head and self.eos_id not in head

    def cited(self, prompt_ids: torch.Tensor, label_prior: torch.Tensor) -> Cited | None:
        """What prompts (B, P), whose labels have these log-priors (B, labels), show; None without `sid_ids`."""
        if self.sid_ids is None:
            return None
        begins, ends = (prompt_ids == number for number in self.sid_ids)
        shown = begins.any(-1) & ends.any(-1)
        width = int((ends.int().argmax(-1) - begins.int().argmax(-1))[shown].max()) + 1 if shown.any() else 2
        found = torch.full(
            (len(prompt_ids), max(int(begins.sum(-1).max()), 1), width + 1), FREE, device=prompt_ids.device
        )
        rows, starts = begins[:, : prompt_ids.size(1) - width + 1].nonzero(as_tuple=True)
        number = begins.cumsum(-1)[rows, starts] - 1
        places = starts.unsqueeze(-1) + torch.arange(width, device=rows.device)
        behind = prompt_ids[rows, (starts + width).clamp(max=prompt_ids.size(1) - 1)].unsqueeze(-1)
        is_label = behind == torch.tensor(self.label_ids, device=rows.device)
        behind = behind.masked_fill(~is_label.any(-1, keepdim=True), FREE)
        found[rows, number] = torch.cat([prompt_ids[rows.unsqueeze(-1), places], behind], dim=-1)
        least = label_prior.masked_fill(label_prior == -torch.inf, torch.inf).amin(-1)
        prior = least.unsqueeze(-1).repeat(1, found.size(1))
        own = torch.where(is_label, label_prior[rows], 0.0).sum(-1)
        prior[rows, number] = torch.where(is_label.any(-1), own, least[rows])
        return Cited(found, prior)

    def phases(
        self,
        completion_ids: torch.Tensor,
        label_counts: torch.Tensor,
        cited: Cited | None = None,
        temperature: float = 1.0,
    ) -> Phases:
        """What is allowed at each position, from the tokens before it: ids (B, O), counts (B,) with 1 <= K <= labels.

        The rule is total: it is defined behind tokens that it would not have allowed, too.

        Args:
            cited: what `cited` says of the prompts.
            temperature: that of the choice, 0 for the likeliest: `copy_prior` depends on it.
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
        copies, copy_prior = only.clone().unsqueeze(-1), torch.zeros(*ids.shape, 1, device=ids.device)
        if cited is not None:
            inside, copies, copy_prior = self._copies(ids, position, cited, temperature)
            several = (copies != FREE).sum(-1)
            only = torch.where(~marked & (several == 1), copies.amax(-1), only)
            only[~marked & inside & (several == 0)] = self.sid_ids[1]  # behind codes that the prompt does not show
        only[~marked & (position >= self.max_reasoning)] = self.ranking_id
        only = torch.where(marked & (left == 1), labels[open_labels.int().argmax(-1)], only)
        only[marked & (left == 0)] = self.eos_id
        only[ended] = self.pad_id
        free = only == FREE
        copies = copies.masked_fill(~(free & ~marked).unsqueeze(-1), FREE)
        copying = (copies != FREE).any(-1)
        return Phases(
            free & ~marked & ~copying,
            open_labels & (free & marked).unsqueeze(-1),
            only,
            copies,
            copy_prior.masked_fill(copies == FREE, 0.0),
        )

    def _copies(
        self, ids: torch.Tensor, position: torch.Tensor, cited: Cited, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where a semantic ID has begun and not ended, (B, O) bool, what may follow there, and the label behind its
        end, (B, O, M), and the log-prior of all that it may then become, (B, O, M).

        An ID is chosen token by token, yet P_prior(candidate) ** (1 / temperature) is what it shall be drawn from: so a
        token has the sum of it over the candidates behind that token. At 0 that is the likeliest of them.
        """
        begin, end = (_last(ids == number, position) for number in self.sid_ids)
        inside = begin > end
        shown = cited.tokens
        width, said = shown.size(-1), position - begin  # tokens of it that are there already, begin among them
        place = torch.arange(width, device=ids.device)
        at = (begin.clamp(min=0).unsqueeze(-1) + place).clamp(max=ids.size(1) - 1)
        own = ids.gather(1, at.flatten(1)).view(at.shape)
        same = (own.unsqueeze(2) == shown.unsqueeze(1)) | (place >= said.unsqueeze(-1)).unsqueeze(2)  # (B, O, M, W)
        fits = same.all(-1) & (shown[:, :, 0] != FREE).unsqueeze(1) & ((begin >= 0) & (said < width)).unsqueeze(-1)
        nexts = shown.gather(2, said.clamp(max=width - 1).unsqueeze(1).expand(-1, shown.size(1), -1)).transpose(1, 2)
        nexts = nexts.masked_fill(~fits, FREE)
        alike = nexts.unsqueeze(-1) == nexts.unsqueeze(-2)  # (B, O, M, M)
        prior = torch.where(alike, cited.prior[:, None, None], -torch.inf)
        prior = temperature * (prior / temperature).logsumexp(-1) if temperature else prior.amax(-1)
        again = alike.tril(-1).any(-1)
        return inside, nexts.masked_fill(again, FREE), prior

    def forbidden(self, device: torch.device) -> torch.Tensor:
        """Token ids that reasoning holds nowhere, or in a semantic ID alone."""
        inside = () if self.sid_ids is None else (*self.code_ids, self.sid_ids[1])
        return torch.tensor([*self.label_ids, self.eos_id, self.pad_id, *inside], device=device)

    def mask(self, phases: Phases, vocabulary: int) -> torch.Tensor:
        """Allowed tokens (B, O, V) bool."""
        allowed = phases.reasoning.unsqueeze(-1).repeat(1, 1, vocabulary)
        allowed[..., self.forbidden(allowed.device)] = False
        allowed[..., torch.tensor(self.label_ids, device=allowed.device)] |= phases.labels
        behind = phases.copies.masked_fill(phases.copies == FREE, vocabulary)
        allowed |= torch.nn.functional.pad(torch.zeros_like(allowed), (0, 1)).scatter_(-1, behind, True)[..., :-1]
        # FREE is no token id, so it matches nothing.
        return allowed | (torch.arange(vocabulary, device=allowed.device) == phases.only.unsqueeze(-1))

    def allowed(
        self,
        completion_ids: torch.Tensor,
        label_counts: torch.Tensor,
        vocabulary: int,
        cited: Cited | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Allowed tokens (B, O, V) bool and forced positions (B, O) bool."""
        phases = self.phases(completion_ids, label_counts, cited)
        return self.mask(phases, vocabulary), phases.only != FREE


class GrammarProcessor(LogitsProcessor):
    """Lets `generate` choose only what the grammar allows, with the candidates' log-prior added to their logits.

    `prompt_ids` (B, P) and `label_prior` (B, labels), one row per row of the batch; -inf behind a list's last label.
    `temperature` is that by which logits are divided behind this, 0 where the largest is taken.
    """

    def __init__(
        self, grammar: Grammar, prompt_ids: torch.Tensor, label_prior: torch.Tensor, temperature: float
    ) -> None:
        self.grammar, self.prompt_length, self.label_prior = grammar, prompt_ids.size(1), label_prior
        self.temperature = temperature
        self.cited = grammar.cited(prompt_ids, label_prior)
        self.labels = torch.tensor(grammar.label_ids, device=label_prior.device)
        self.label_counts = label_prior.isfinite().sum(-1)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # `phases` looks at the tokens before a position: append one position, and ask about it.
        asked = torch.nn.functional.pad(input_ids[:, self.prompt_length :], (0, 1), value=self.grammar.pad_id)
        phases = self.grammar.phases(asked, self.label_counts, self.cited, self.temperature)
        phases = Phases(*(part[:, -1:] for part in phases))
        weight, copies = self.grammar.llm_weight, phases.copies[:, 0]
        labels = weight * scores[:, self.labels] + self.label_prior.to(scores.dtype)
        scores = scores.index_copy(-1, self.labels, labels)
        cited = copies.clamp(min=0)  # FREE adds 0 to token 0
        more = (weight - 1) * scores.gather(-1, cited) + phases.copy_prior[:, 0].to(scores.dtype)
        scores = scores.scatter_add(-1, cited, more.masked_fill(copies == FREE, 0.0))
        return scores.masked_fill(~self.grammar.mask(phases, scores.size(-1)).squeeze(1), -torch.inf)


def constrained_log_probs(
    logits: torch.Tensor,
    completion_ids: torch.Tensor,
    label_prior: torch.Tensor,
    grammar: Grammar,
    temperature: float,
    cited: Cited | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities under the grammar, for logits (B, O, V) that predict completion_ids (B, O).

    Args:
        label_prior: (B, labels), added to the weighted logits of the labels; -inf behind a list's last label.
        cited: what `grammar.cited` says of the prompts, whose priors are added to the logits of what cites them.

    Returns:
        log-probabilities (B, O) in nats, 0 where the token is forced, -inf where the grammar forbids it; entropy
        (B, O) in nats over the allowed tokens, without gradient; forced (B, O) bool.

    Reasoning positions share one vocabulary mask and label positions read K logits, so no (B, O, V) mask is made.
    """
    phases = grammar.phases(completion_ids, label_prior.isfinite().sum(-1), cited, temperature)
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
    scores = grammar.llm_weight * logits[rows][:, labels].float() + label_prior[rows.nonzero()[:, 0]]
    scores = scores / temperature
    scores = scores.masked_fill(~phases.labels[rows], -torch.inf)
    is_label = completion_ids[rows].unsqueeze(-1) == labels
    chosen, spread = _choose(scores, is_label.int().argmax(-1))
    chosen = chosen.masked_fill(~is_label.any(-1), -torch.inf)
    log_probs, entropy = log_probs.masked_scatter(rows, chosen), entropy.masked_scatter(rows, spread)

    rows = (phases.copies != FREE).any(-1)
    tokens = phases.copies[rows]
    scores = (grammar.llm_weight * among(logits[rows], tokens) + phases.copy_prior[rows]) / temperature
    is_one = completion_ids[rows].unsqueeze(-1) == tokens
    chosen, spread = _choose(scores, is_one.int().argmax(-1))
    chosen = chosen.masked_fill(~is_one.any(-1), -torch.inf)
    return log_probs.masked_scatter(rows, chosen), entropy.masked_scatter(rows, spread), forced


def among(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (n, V) of these tokens (n, M) alone, in float32, -inf where one is FREE."""
    return logits.gather(-1, tokens.clamp(min=0)).float().masked_fill(tokens == FREE, -torch.inf)


def _last(flags: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Where a flag (B, O) was last set before each position, (B, O); -1 if nowhere."""
    last = torch.where(flags, position, -1).cummax(-1).values
    return torch.nn.functional.pad(last, (1, 0), value=-1)[:, :-1]


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
