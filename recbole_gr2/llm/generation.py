"""Generate completions under the grammar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from recbole_gr2.batching import by_length
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.grammar import Grammar, GrammarProcessor, prior_tensor
from recbole_gr2.llm.inputs import bf16_autocast, evaluating, left_pad, positions
from recbole_gr2.llm.kv_cache import Prefix, decoding, preallocated_cache
from recbole_gr2.progress import progress
from recbole_gr2.seeding import derive_seed


class Completion(NamedTuple):
    """A completion.

    Attributes:
        ids: token ids, which end with eos.
        first_choice: probability of each of the K labels to be chosen first, given the reasoning, (K,). They are those
            of a temperature of 1 and sum to 1.
    """

    ids: list[int]
    first_choice: list[float]


def generate_completions(
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
) -> list[Completion]:
    """Return G completions for each of B prompts.

    Every completion is legal under the grammar. Each prompt is read once for all its completions, and the first tokens
    that all prompts share are read once for all prompts. A sample depends only on the seed, its prompt, its prior and
    its number within the group, not on other prompts. So `batch_size` changes the speed only.

    Args:
        model: The language model.
        prompt_ids: Token ids of each prompt, up to the start of the assistant turn.
        label_priors: Log-prior of the K labels of each prompt, added to their logits. Zeros leave the choice to the
            model. 1 <= K <= number of labels of the grammar.
        grammar: The grammar of completions.
        num_generations: Completions per prompt, G.
        temperature: 0 chooses the most likely token. Otherwise logits / temperature are sampled, without top-k or
            top-p.
        batch_size: Completions that are decoded together, at least those of one prompt.
        seed: Seed of the samples.
        bf16: Run the model under bfloat16 autocast.

    Returns:
        B * G completions: those of the first prompt, then those of the second, and so on.

    Raises:
        ConfigurationError: A prompt is empty, or its number of candidates is outside 1..labels.
    """
    for ids, prior in zip(prompt_ids, label_priors, strict=True):
        if not ids or not 1 <= len(prior) <= len(grammar.label_ids):
            raise ConfigurationError(
                f"a prompt of {len(ids)} tokens with {len(prior)} candidates cannot be ranked",
                where="generate_completions",
                why=f"a prompt needs at least one token and 1 to {len(grammar.label_ids)} candidates",
                do="use fewer candidates (cand_num), or add labels to the tokenizer",
            )
    completions: dict[int, Completion] = {}
    batches = by_length([len(ids) for ids in prompt_ids], max(1, batch_size // num_generations))
    # `generate` of PEFT overwrites the generation config of the base model. The LoRA layers are part of the base model.
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    with evaluating(model), torch.no_grad(), bf16_autocast(model.device, bf16), decoding(base):
        prefix = Prefix.read(base, common_start(prompt_ids))
        for batch in progress(batches, "answers, batch"):
            prompts, priors = [prompt_ids[i] for i in batch], [label_priors[i] for i in batch]
            generated = _generate_batch(base, prompts, priors, grammar, num_generations, temperature, seed, prefix)
            for number, completion in enumerate(generated):
                prompt, sample = divmod(number, num_generations)
                completions[batch[prompt] * num_generations + sample] = completion
    return [completions[number] for number in range(len(prompt_ids) * num_generations)]


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
    """Return the token ids of the completions of `generate_completions`."""
    completions = generate_completions(
        model,
        prompt_ids,
        label_priors,
        grammar=grammar,
        num_generations=num_generations,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
        bf16=bf16,
    )
    return [completion.ids for completion in completions]


def common_start(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return the tokens with which several prompts begin, without the last token of the shortest prompt.

    >>> common_start([[7, 8, 1, 2], [7, 8, 3], [7, 8]])
    [7]
    >>> common_start([[7, 8, 1]])
    []
    """
    first, length = prompts[0] if prompts else [], 0
    longest = min(map(len, prompts)) - 1 if len(prompts) > 1 else 0
    while length < longest and all(prompt[length] == first[length] for prompt in prompts):
        length += 1
    return first[:length]


class GumbelSampler(LogitsProcessor):
    """Add Gumbel noise to logits / temperature. The largest score is then a sample of the softmax.

    Each completion has its own random generator. `generate` would sample from the global generator, so that a sample
    would depend on the completions before it in the batch.

    Args:
        temperature: Divisor of the logits, above 0.
        seeds: A seed per completion.
        device: Device of the scores.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores (B, V) with noise."""
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores / self.temperature - noise.log()  # type: ignore[return-value]  # -log(exponential) is a Gumbel


def _generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    priors: Sequence[Sequence[float]],
    grammar: Grammar,
    num_generations: int,
    temperature: float,
    seed: int,
    prefix: Prefix | None,
) -> list[Completion]:
    start = prefix.length if prefix else 0
    ids, mask = left_pad(prompts, grammar.pad_id, model.device, start=start)
    whole, _ = left_pad(prompts, grammar.pad_id, model.device)  # no padding within a semantic ID
    cache = prefix.cache(model, len(ids)) if prefix else preallocated_cache(model)
    if num_generations > 1 and ids.size(1) > 1:  # read each prompt once, except its last token
        head = mask[:, :-1]
        if head.size(1) > start:
            model(
                input_ids=ids[:, start:-1],
                attention_mask=head,
                position_ids=positions(head)[:, start:],
                use_cache=True,
                logits_to_keep=1,
                past_key_values=cache,
            )
        cache.batch_repeat_interleave(num_generations)
    ids, mask, whole = (part.repeat_interleave(num_generations, dim=0) for part in (ids, mask, whole))
    label_prior = prior_tensor(priors, grammar, ids.device).repeat_interleave(num_generations, dim=0)
    rules = GrammarProcessor(grammar, whole, label_prior, temperature)
    processors = LogitsProcessorList([rules])
    if temperature > 0:
        seeds = [derive_seed(seed, sample, *prompt) for prompt in prompts for sample in range(num_generations)]
        processors.append(GumbelSampler(temperature, seeds, ids.device))
    config = GenerationConfig(
        do_sample=False,  # the Gumbel noise samples
        max_new_tokens=grammar.max_reasoning + 1 + max(map(len, priors)) + 1,
        eos_token_id=grammar.eos_id,
        pad_token_id=grammar.pad_id,
        use_cache=True,
    )
    with _generation_config(model, config):
        output = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_processor=processors)
    completions, choices = output[:, ids.size(1) :].tolist(), rules.first_choice.tolist()
    return [
        Completion(tokens[: tokens.index(grammar.eos_id) + 1], choice[: len(priors[row // num_generations])])
        for row, (tokens, choice) in enumerate(zip(completions, choices, strict=True))
    ]


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the generation config of the model: `generate` reads every unset field from it (top_k, penalties)."""
    original, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = original
