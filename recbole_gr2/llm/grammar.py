"""The grammar of a completion: which tokens are allowed, and the probability of each.

A completion is `reasoning ... <|ranking|> L1 .. LK eos`. The labels are a permutation of the first K labels. Generation
masks the next token with this grammar. Training normalizes log-probabilities with the same grammar, so that the ratio
of the DAPO objective (arXiv 2503.14476, eq. 8) is a ratio of the sampled distribution. If only one token is allowed, it
is *forced*: its probability is 1, and it contributes no gradient.

A *grounded* grammar restricts semantic IDs in the reasoning to those of the prompt. Each token of an ID is chosen among
the tokens that continue one of these IDs. If a label follows an ID in the prompt, it also follows the ID in the
reasoning, so that the ranking can copy it.

The prior of a candidate takes part wherever a candidate is chosen, by its label or by its ID:
P(choice) ~ P_LLM(choice) ** llm_weight * P_prior(candidate). An item of the history has the lowest prior of all
candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.sid.tokens import SID_BEGIN, SID_END, is_code, level_of

FREE = -1  # replaces a token id; in `Phases.only`: more than one token is allowed


class Phases(NamedTuple):
    """The allowed tokens at each position of B completions of O tokens. Exactly one of four cases applies.

    Attributes:
        reasoning: (B, O) bool: all tokens except `Grammar.forbidden`.
        labels: (B, O, K) bool: exactly these labels, at least two.
        only: (B, O) long: the single allowed token, or FREE.
        copies: (B, O, M) long: exactly these tokens, at least two different ones. FREE fills the other places.
        copy_prior: (B, O, M): added to the logits of `copies`, 0 in the other places.
    """

    reasoning: torch.Tensor
    labels: torch.Tensor
    only: torch.Tensor
    copies: torch.Tensor
    copy_prior: torch.Tensor


class Cited(NamedTuple):
    """The semantic IDs of B prompts.

    Attributes:
        tokens: (B, M, L + 3): tokens of each ID from begin to end, then its label. FREE fills the other places.
        prior: (B, M): log-prior of this label, or the lowest of all labels.
    """

    tokens: torch.Tensor
    prior: torch.Tensor


@dataclass(frozen=True)
class Grammar:
    """The token ids of the grammar, and its settings.

    Args:
        ranking_id: Id of the ranking mark.
        label_ids: Ids of the labels.
        eos_id: Id of the token that ends a turn.
        pad_id: Id of the padding token.
        max_reasoning: Longest reasoning in tokens. 0: no reasoning.
        sid_ids: Ids of the tokens that begin and end a semantic ID. None: the reasoning is not grounded.
        code_ids: Ids of the code tokens, if grounded.
        levels: L, codes of a semantic ID, if grounded.
        llm_weight: Power of the model's probability wherever a candidate is chosen, above 0.
    """

    ranking_id: int
    label_ids: tuple[int, ...]
    eos_id: int
    pad_id: int
    max_reasoning: int
    sid_ids: tuple[int, int] | None = None
    code_ids: tuple[int, ...] = ()
    levels: int = 0
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
        levels: int | None = None,
        llm_weight: float = 1.0,
    ) -> Grammar:
        """Return the grammar of a tokenizer that encodes the ranking mark and each label as a single token.

        Args:
            tokenizer: The tokenizer.
            ranking: Text of the ranking mark.
            labels: Texts of the labels.
            max_reasoning: Longest reasoning in tokens.
            grounded: Restrict semantic IDs in the reasoning to those of the prompt.
            levels: Codes of a semantic ID. None: as many as the tokenizer has levels of codes.
            llm_weight: Power of the model's probability wherever a candidate is chosen.

        Raises:
            ConfigurationError: A token is not in the vocabulary, or the tokenizer has no eos token.
        """
        vocabulary = tokenizer.get_vocab()
        ends = (SID_BEGIN, SID_END) if grounded else ()
        absent = [token for token in (ranking, *labels, *ends) if token not in vocabulary]
        if absent or tokenizer.eos_token_id is None:
            raise ConfigurationError(
                f"the tokenizer has no token for {', '.join(absent) or 'the end of a turn (eos)'}",
                where=f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}",
                why="a ranking consists of single tokens and ends with eos",
                do="add the tokens of sid.tokens.added_tokens and set eos_token before the grammar is built",
            )
        eos: int = tokenizer.eos_token_id
        pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
        label_ids = tuple(vocabulary[label] for label in labels)
        grammar = cls(vocabulary[ranking], label_ids, eos, pad, max_reasoning, llm_weight=llm_weight)
        if not grounded:
            return grammar
        codes = sorted(number for token, number in vocabulary.items() if is_code(token))
        return replace(
            grammar,
            sid_ids=(vocabulary[SID_BEGIN], vocabulary[SID_END]),
            code_ids=tuple(codes),
            levels=levels or len({level_of(token) for token in vocabulary if is_code(token)}),
        )

    def was_truncated(self, completion_ids: Sequence[int]) -> bool:
        """Return whether the reasoning filled all `max_reasoning` (> 0) tokens, so that its limit ended it."""
        head = completion_ids[: self.max_reasoning]
        return 0 < self.max_reasoning == len(head) and self.ranking_id not in head and self.eos_id not in head

    def cited(self, prompt_ids: torch.Tensor, label_prior: torch.Tensor) -> Cited | None:
        """Return the semantic IDs of prompts, or None without `sid_ids`.

        A semantic ID is the token that begins one, `levels` codes, and the token that ends one. The IDs of a prompt do
        not depend on the other prompts of the batch.

        Args:
            prompt_ids: (B, P).
            label_prior: Log-priors of the labels, (B, labels), -inf after the last label of a list.
        """
        if self.sid_ids is None:
            return None
        width = self.levels + 2
        begins, ends = (prompt_ids == number for number in self.sid_ids)
        whole = begins[:, : 1 - width] & ends[:, width - 1 :]
        tokens = torch.full(
            (len(prompt_ids), max([1, *whole.sum(-1).tolist()]), width + 1), FREE, device=prompt_ids.device
        )
        rows, starts = whole.nonzero(as_tuple=True)
        number = whole.cumsum(-1)[rows, starts] - 1
        columns = starts.unsqueeze(-1) + torch.arange(width, device=rows.device)
        label = prompt_ids[rows, (starts + width).clamp(max=prompt_ids.size(1) - 1)].unsqueeze(-1)
        is_label = label == torch.tensor(self.label_ids, device=rows.device)
        label = label.masked_fill(~is_label.any(-1, keepdim=True), FREE)
        tokens[rows, number] = torch.cat([prompt_ids[rows.unsqueeze(-1), columns], label], dim=-1)
        lowest = label_prior.masked_fill(label_prior == -torch.inf, torch.inf).amin(-1)
        prior = lowest.unsqueeze(-1).repeat(1, tokens.size(1))
        of_label = torch.where(is_label, label_prior[rows], 0.0).sum(-1)
        prior[rows, number] = torch.where(is_label.any(-1), of_label, lowest[rows])
        return Cited(tokens, prior)

    def phases(
        self,
        completion_ids: torch.Tensor,
        label_counts: torch.Tensor,
        cited: Cited | None = None,
        temperature: float = 1.0,
    ) -> Phases:
        """Return the allowed tokens at each position, given the tokens before it.

        The result is also defined after tokens that the grammar forbids.

        Args:
            completion_ids: (B, O).
            label_counts: Number of labels of each prompt, (B,), from 1 to the number of labels.
            cited: The semantic IDs of the prompts.
            temperature: Temperature of the choice, on which `copy_prior` depends. 0 chooses the most likely token.
        """
        ids = completion_ids
        labels = torch.tensor(self.label_ids, device=ids.device)
        position = torch.arange(ids.size(1), device=ids.device)
        marked = _before(ids == self.ranking_id)
        ended = _before(ids == self.eos_id)
        used = _before((ids.unsqueeze(-1) == labels) & marked.unsqueeze(-1))
        exists = torch.arange(len(labels), device=ids.device) < label_counts.unsqueeze(-1)
        open_labels = exists.unsqueeze(1) & ~used
        remaining = open_labels.sum(-1)

        only = torch.full_like(ids, FREE)
        copies, copy_prior = only.clone().unsqueeze(-1), torch.zeros(*ids.shape, 1, device=ids.device)
        if cited is not None and self.sid_ids is not None:
            inside, copies, copy_prior = self._copies(ids, position, cited, self.sid_ids, temperature)
            count = (copies != FREE).sum(-1)
            only = torch.where(~marked & (count == 1), copies.amax(-1), only)
            only[~marked & inside & (count == 0)] = self.sid_ids[1]  # after codes that the prompt does not contain
        only[~marked & (position >= self.max_reasoning)] = self.ranking_id
        only = torch.where(marked & (remaining == 1), labels[open_labels.int().argmax(-1)], only)
        only[marked & (remaining == 0)] = self.eos_id
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
        self,
        ids: torch.Tensor,
        position: torch.Tensor,
        cited: Cited,
        sid_ids: tuple[int, int],
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the continuations of semantic IDs that have begun in completions (B, O).

        An ID is chosen token by token, but candidates should be drawn with P_prior(candidate) ** (1 / temperature). So
        the probability of a token is the sum of this over all candidates that it can lead to. At temperature 0 it is
        the maximum.

        Returns:
            Whether an ID has begun and not ended, (B, O) bool; the allowed next tokens, (B, O, M), including the label
            after the end of an ID; and the log-prior of the candidates that they lead to, (B, O, M).
        """
        begin, end = (_last(ids == number, position) for number in sid_ids)
        inside = begin > end
        width, written = cited.tokens.size(-1), position - begin  # number of tokens since begin, including begin
        offset = torch.arange(width, device=ids.device)
        columns = (begin.clamp(min=0).unsqueeze(-1) + offset).clamp(max=ids.size(1) - 1)
        prefix = ids.gather(1, columns.flatten(1)).view(columns.shape)
        # (B, O, M, W)
        same = (prefix.unsqueeze(2) == cited.tokens.unsqueeze(1)) | (offset >= written.unsqueeze(-1)).unsqueeze(2)
        fits = (
            same.all(-1)
            & (cited.tokens[:, :, 0] != FREE).unsqueeze(1)
            & ((begin >= 0) & (written < width)).unsqueeze(-1)
        )
        index = written.clamp(max=width - 1).unsqueeze(1).expand(-1, cited.tokens.size(1), -1)
        following = cited.tokens.gather(2, index).transpose(1, 2).masked_fill(~fits, FREE)
        equal = following.unsqueeze(-1) == following.unsqueeze(-2)  # (B, O, M, M)
        prior = torch.where(equal, cited.prior[:, None, None], -torch.inf)
        prior = temperature * (prior / temperature).logsumexp(-1) if temperature else prior.amax(-1)
        repeated = equal.tril(-1).any(-1)
        return inside, following.masked_fill(repeated, FREE), prior

    def forbidden(self, device: torch.device) -> torch.Tensor:
        """Return the token ids that reasoning never contains, or only within a semantic ID."""
        inside = () if self.sid_ids is None else (*self.code_ids, self.sid_ids[1])
        return torch.tensor([*self.label_ids, self.eos_id, self.pad_id, *inside], device=device)

    def mask(self, phases: Phases, vocabulary: int) -> torch.Tensor:
        """Return whether each token is allowed, (B, O, V) bool, for V = `vocabulary`."""
        allowed = phases.reasoning.unsqueeze(-1).repeat(1, 1, vocabulary)
        allowed[..., self.forbidden(allowed.device)] = False
        allowed[..., torch.tensor(self.label_ids, device=allowed.device)] |= phases.labels
        copies = phases.copies.masked_fill(phases.copies == FREE, vocabulary)
        allowed |= torch.nn.functional.pad(torch.zeros_like(allowed), (0, 1)).scatter_(-1, copies, True)[..., :-1]
        # FREE is not a token id, so it matches nothing.
        return allowed | (torch.arange(vocabulary, device=allowed.device) == phases.only.unsqueeze(-1))


class GrammarProcessor(LogitsProcessor):
    """Restrict `generate` to the grammar, and add the log-prior of candidates to their logits.

    Args:
        grammar: The grammar.
        prompt_ids: (B, P), one row per completion.
        label_prior: (B, labels), -inf after the last label of a list.
        temperature: Divisor of the logits in the next processor, or 0 if the largest logit is chosen.

    Attributes:
        first_choice: Probability of each label to be chosen first, (B, labels); 0 before that choice is made, and
            after the last label of a list.
    """

    def __init__(
        self, grammar: Grammar, prompt_ids: torch.Tensor, label_prior: torch.Tensor, temperature: float
    ) -> None:
        self.grammar, self.prompt_length, self.label_prior = grammar, prompt_ids.size(1), label_prior
        self.temperature = temperature
        self.cited = grammar.cited(prompt_ids, label_prior)
        self.labels = torch.tensor(grammar.label_ids, device=label_prior.device)
        self.label_counts = label_prior.isfinite().sum(-1)
        self.first_choice = torch.zeros_like(label_prior)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, V) with priors, -inf for forbidden tokens."""
        written = input_ids[:, self.prompt_length :]
        rows = torch.arange(len(scores), device=scores.device)
        return self.restrict(scores, written, torch.full_like(rows, written.size(1)), rows)

    def restrict(
        self, scores: torch.Tensor, written: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Return the scores (n, V) of n of the completions with priors, -inf for forbidden tokens.

        Args:
            scores: Logits of the next token of each completion, (n, V).
            written: The tokens of each completion, padded on the right, (n, O).
            lengths: Number of tokens of each completion, (n,).
            rows: Numbers of the completions, (n,).
        """
        label_prior = self.label_prior[rows]
        cited = self.cited and Cited(*(part[rows] for part in self.cited))
        # `phases` describes a position by the tokens before it: append one position, and read that of the next token.
        written = torch.nn.functional.pad(written, (0, 1), value=self.grammar.pad_id)
        phases = self.grammar.phases(written, self.label_counts[rows], cited, self.temperature)
        number = torch.arange(len(rows), device=rows.device)
        phases = Phases(*(part[number, lengths].unsqueeze(1) for part in phases))
        weight, copies = self.grammar.llm_weight, phases.copies[:, 0]
        labels = weight * scores[:, self.labels] + label_prior.to(scores.dtype)
        last = written[number, (lengths - 1).clamp(min=0)]
        first = (last == self.grammar.ranking_id) & (lengths > 0) & (self.first_choice[rows].sum(-1) == 0)
        self.first_choice[rows[first]] = labels[first].float().softmax(-1)
        scores = scores.index_copy(-1, self.labels, labels)
        copied = copies.clamp(min=0)  # FREE adds 0 to token 0
        more = (weight - 1) * scores.gather(-1, copied) + phases.copy_prior[:, 0].to(scores.dtype)
        scores = scores.scatter_add(-1, copied, more.masked_fill(copies == FREE, 0.0))
        return scores.masked_fill(~self.grammar.mask(phases, scores.size(-1)).squeeze(1), -torch.inf)


def prior_tensor(priors: Sequence[Sequence[float]], grammar: Grammar, device: torch.device) -> torch.Tensor:
    """Return the log-priors of B lists as one tensor (B, labels), with -inf after the last label of a list."""
    labels = len(grammar.label_ids)
    return torch.tensor([[*prior, *[-torch.inf] * (labels - len(prior))] for prior in priors], device=device)


def constrained_log_probs(
    logits: torch.Tensor,
    completion_ids: torch.Tensor,
    label_prior: torch.Tensor,
    grammar: Grammar,
    temperature: float,
    cited: Cited | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of completions and entropies under the grammar.

    Reasoning positions share one mask over the vocabulary, and label positions read K logits. So no mask of shape
    (B, O, V) is built.

    Args:
        logits: (B, O, V), which predict `completion_ids`.
        completion_ids: (B, O).
        label_prior: (B, labels), added to the weighted logits of the labels; -inf after the last label of a list.
        grammar: The grammar.
        temperature: Divisor of the logits, above 0.
        cited: The semantic IDs of the prompts (`grammar.cited`), with their priors.

    Returns:
        Log-probabilities (B, O) in nats: 0 for a forced token, -inf for a forbidden one. Entropies (B, O) in nats over
        the allowed tokens, without gradient.
    """
    phases = grammar.phases(completion_ids, label_prior.isfinite().sum(-1), cited, temperature)
    wrong = (phases.only != FREE) & (completion_ids != phases.only)
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
    return log_probs.masked_scatter(rows, chosen), entropy.masked_scatter(rows, spread)


def among(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits (n, V) of the tokens (n, M) in float32, -inf for FREE."""
    return logits.gather(-1, tokens.clamp(min=0)).float().masked_fill(tokens == FREE, -torch.inf)


def _last(flags: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return the last earlier position at which a flag (B, O) is set, (B, O), or -1."""
    last = torch.where(flags, position, -1).cummax(-1).values
    return torch.nn.functional.pad(last, (1, 0), value=-1)[:, :-1]


def _before(flags: torch.Tensor) -> torch.Tensor:
    """Return whether a flag (B, O, ...) is set at any earlier position."""
    counts = flags.int()
    return counts.cumsum(1) - counts > 0


def _choose(scores: torch.Tensor, choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability of the choice and entropy of each row of scores (n, m), -inf where forbidden."""
    log_probs = scores.log_softmax(-1)
    with torch.no_grad():  # the entropy is only logged; its graph would store another (n, V)
        entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)
    return log_probs.gather(-1, choice.unsqueeze(-1)).squeeze(-1), entropy
