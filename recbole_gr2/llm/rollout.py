"""From prompts to rankings: constrained generation, and reading a completion back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from recbole_gr2.console import progress
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.constraint import Grammar, GrammarProcessor
from recbole_gr2.ranking import complete
from recbole_gr2.seeding import derive_seed
from recbole_gr2.types import Answer, Request

ROOM = 128  # tokens that a cache takes more before it is copied; ours


def generate_rankings(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    label_priors: Sequence[Sequence[float]],
    *,
    grammar: Grammar,
    num_generations: int = 1,
    temperature: float = 0.0,
    batch_size: int = 64,
    seed: int = 0,
    bf16: bool = False,
) -> list[list[int]]:
    """Completions of B prompts, G each, prompt-major: B * G token lists that end with eos.

    Every completion is legal under the grammar. Each prompt is read once, however large G is. A sample depends on
    (seed, its prompt and prior, its number in the group) alone, not on what else is in the batch, so `batch_size` is a
    matter of speed.

    Args:
        prompt_ids: token ids of each prompt, up to the start of the assistant turn.
        label_priors: log-prior of each prompt's K labels, added to their logits; zeros leave the choice to the model.
            1 <= K <= labels of the grammar.
        temperature: 0 takes the likeliest token; above, logits / temperature are sampled without top-k or top-p.
        batch_size: completions decoded side by side (at least one prompt's G).
        bf16: run the model under bfloat16 autocast.

    Raises:
        ConfigurationError: an empty prompt, or a K outside the grammar.
    """
    for ids, prior in zip(prompt_ids, label_priors, strict=True):
        if not ids or not 1 <= len(prior) <= len(grammar.label_ids):
            raise ConfigurationError(
                f"a prompt of {len(ids)} tokens with {len(prior)} candidates cannot be ranked",
                why=f"a prompt needs a token, and 1 to {len(grammar.label_ids)} candidates",
                do="fewer candidates (cand_num) or more labels in the tokenizer",
            )
    completions: list[list[int]] = [[] for _ in range(len(prompt_ids) * num_generations)]
    by_length = sorted(range(len(prompt_ids)), key=lambda i: (-len(prompt_ids[i]), i))  # the largest batch first
    prompts_per_batch = max(1, batch_size // num_generations)
    with evaluating(model), torch.no_grad(), _autocast(model.device, bf16):
        for start in progress(range(0, len(by_length), prompts_per_batch), "answers"):
            chunk = by_length[start : start + prompts_per_batch]
            prompts, priors = [prompt_ids[i] for i in chunk], [label_priors[i] for i in chunk]
            rows = _generate_batch(model, prompts, priors, grammar, num_generations, temperature, seed)
            for position, ids in enumerate(rows):
                prompt, sample = divmod(position, num_generations)
                completions[chunk[prompt] * num_generations + sample] = ids
    return completions


def read_answer(
    request: Request,
    completion_ids: Sequence[int],
    label_items: Sequence[int],
    grammar: Grammar,
    tokenizer: PreTrainedTokenizerBase,
) -> Answer:
    """Read a completion back. Total: any token list gives a full permutation of the request's candidates.

    The ranking is the labels in the order of their first mention behind the first ranking mark; candidates that are
    not mentioned follow in base order. Everything behind eos is ignored.

    Args:
        label_items: item id that label i stands for in the prompt; a permutation of `request.items`.

    Returns:
        Answer with status `unreadable` (no usable label), else `truncated` (the reasoning ran into its limit), else
        `repaired` (a label missing, repeated or foreign), else `ok`. `foreign` counts the tokens behind the mark that
        are none of the request's labels.
    """
    if sorted(label_items) != sorted(request.items):
        raise ConfigurationError(
            "the labels of the prompt do not stand for the candidates of the request",
            where=f"request {request.request_id}",
            why="the answer would be read as a ranking of other items",
            do="pass the item ids in the order in which the prompt labels them",
        )
    ids = list(completion_ids)
    tokens = ids.index(grammar.eos_id) + 1 if grammar.eos_id in ids else len(ids)
    text = [token for token in ids[:tokens] if token != grammar.eos_id]
    mark = text.index(grammar.ranking_id) if grammar.ranking_id in text else len(text)
    item_of = dict(zip(grammar.label_ids, label_items, strict=False))  # labels beyond K stand for nothing
    said = text[mark + 1 :]
    named = [item_of[token] for token in said if token in item_of]
    missing = len(label_items) - len(set(named))
    repeated = len(named) - len(set(named))
    foreign = len(said) - len(named)
    if not named:
        status = "unreadable"
    elif grammar.was_truncated(text):
        status = "truncated"
    else:
        status = "repaired" if missing or repeated or foreign else "ok"
    return Answer(
        request_id=request.request_id,
        ranking=complete(named, request.items),
        status=status,
        # without the labels of cited candidates, which mean nothing without their prompt
        reasoning=tokenizer.decode(
            [t for t in text[:mark] if t not in grammar.label_ids], skip_special_tokens=True
        ).strip(),
        missing=missing,
        repeated=repeated,
        foreign=foreign,
        output_tokens=tokens,
    )


class GumbelSampler(LogitsProcessor):
    """Adds Gumbel noise to logits / temperature, so that the largest score is a sample of the softmax.

    Each row draws from a generator of its own. `generate` samples from the one global stream instead, where a row's
    draw depends on how many rows stand before it.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores / self.temperature - noise.log()  # -log of an exponential is a standard Gumbel


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, with room behind them: a further token is written there, where transformers' own
    layer copies all of them for every token.

    Keys are kept in the dtype of the values. Under autocast rotary embeddings leave them in float32, and attention would
    round the whole cache for every token anew.
    """

    room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, the new ones (B, heads, tokens, D) included."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.size(-2)
        if self.room is None or after > self.room[0].size(-2) or self.keys.data_ptr() != self.room[0].data_ptr():
            shape = (*key_states.shape[:2], after + ROOM, key_states.size(-1))
            self.room = value_states.new_empty(shape), value_states.new_empty(shape)
            if before:
                self._write(self.keys, self.values, 0, before)
        self._write(key_states, value_states, before, after)
        self.keys, self.values = (part[:, :, :after] for part in self.room)
        return self.keys, self.values

    def _write(self, keys: torch.Tensor, values: torch.Tensor, start: int, stop: int) -> None:
        for part, new in zip(self.room, (keys, values), strict=True):
            part[:, :, start:stop] = new


def roomy_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for this model; layers that do not keep every token (sliding windows) are transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def left_pad(sequences: Sequence[Sequence[int]], value: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, P) padded on the left, and their attention mask (B, P)."""
    length = max(map(len, sequences))
    ids = [[value] * (length - len(row)) + list(row) for row in sequences]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def prior_tensor(priors: Sequence[Sequence[float]], grammar: Grammar, device: torch.device) -> torch.Tensor:
    """Log-priors of B lists as one tensor (B, labels), -inf behind a list's last label."""
    labels = len(grammar.label_ids)
    return torch.tensor([[*prior, *[-torch.inf] * (labels - len(prior))] for prior in priors], device=device)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, P) that count real tokens, as `generate` does: padding does not shift a prompt."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def attention_bias(sees: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """What transformers adds to attention scores, (B, 1, Q, T), so that each of Q tokens attends to what it sees alone.

    Args:
        sees: (B, Q, T), which of the T tokens each may attend to. It takes the place of the model's own mask.
    """
    bias = torch.zeros(sees.shape, dtype=model.dtype, device=sees.device)
    return bias.masked_fill(~sees, torch.finfo(model.dtype).min).unsqueeze(1)


def check_window(model: PreTrainedModel, longest: int) -> None:
    """Refuse texts of which a model with a sliding window would not see the beginning: `attention_bias` has no window.

    Raises:
        ConfigurationError: there is a window, and `longest` tokens are more.
    """
    window = getattr(model.config, "sliding_window", None)
    if window is not None and longest > window:
        raise ConfigurationError(
            f"a prompt and what follows have {longest} tokens, and the model sees the last {window}",
            where="llm",
            why="continuations are read side by side behind their prompt, which has to be in sight of them all",
            do="take shorter histories (mid_max_length, prompt_history) or a model without a sliding window",
        )


def _generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    priors: Sequence[Sequence[float]],
    grammar: Grammar,
    num_generations: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    # PEFT's own `generate` overwrites the base model's generation config for good; its layers live in the base model.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids, mask = left_pad(prompts, grammar.pad_id, model.device)
    cache = roomy_cache(base)
    if num_generations > 1 and ids.size(1) > 1:  # read each prompt once, all but its last token
        head = mask[:, :-1]
        base(
            input_ids=ids[:, :-1],
            attention_mask=head,
            position_ids=positions(head),
            use_cache=True,
            logits_to_keep=1,
            past_key_values=cache,
        )
        cache.batch_repeat_interleave(num_generations)
    ids, mask = (part.repeat_interleave(num_generations, dim=0) for part in (ids, mask))
    label_prior = prior_tensor(priors, grammar, ids.device).repeat_interleave(num_generations, dim=0)
    processors = LogitsProcessorList([GrammarProcessor(grammar, ids, label_prior, temperature)])
    if temperature > 0:
        seeds = [derive_seed(seed, sample, *prompt) for prompt in prompts for sample in range(num_generations)]
        processors.append(GumbelSampler(temperature, seeds, ids.device))
    config = GenerationConfig(
        do_sample=False,  # sampling is the Gumbel noise
        max_new_tokens=grammar.max_reasoning + 1 + max(map(len, priors)) + 1,
        eos_token_id=grammar.eos_id,
        pad_token_id=grammar.pad_id,
        use_cache=True,
    )
    with _generation_config(base, config):
        output = base.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_processor=processors)
    rows = output[:, ids.size(1) :].tolist()
    return [row[: row.index(grammar.eos_id) + 1] for row in rows]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode; its own mode comes back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation config: `generate` fills every unset field from it (top_k, penalties, beams)."""
    theirs, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = theirs


def _autocast(device: torch.device, bf16: bool):
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
