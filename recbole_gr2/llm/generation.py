"""Generate completions under the grammar.

`generate_completions` is the only function that generates, and `ENGINES` the only place that names the engines that
compute the logits. Both engines use the same objects for the grammar, the priors and the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from recbole_gr2.batching import by_length
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.adapter import base_model
from recbole_gr2.llm.grammar import Grammar, GrammarProcessor, prior_tensor
from recbole_gr2.llm.inputs import bf16_autocast, common_length, evaluating, left_pad, positions, right_pad
from recbole_gr2.llm.kv_cache import Prefix, preallocated_cache
from recbole_gr2.progress import progress
from recbole_gr2.seeding import derive_seed

TRANSFORMERS, VLLM = "transformers", "vllm"
QUEUE = 16  # batches that vLLM gets together: it starts a completion as soon as another one ends


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
    engine: str = TRANSFORMERS,
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
        bf16: Run the model under bfloat16 autocast. vLLM runs it in bfloat16.
        engine: What runs the model, a name in `ENGINES`. It changes rounding only.

    Returns:
        B * G completions: those of the first prompt, then those of the second, and so on.

    Raises:
        ConfigurationError: A prompt is empty, its number of candidates is outside 1..labels, or the engine cannot run
            the model.
        DependencyError: The package of the engine is missing.
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
    size = max(1, batch_size // num_generations)
    longest = max(map(len, prompt_ids), default=0) + new_tokens(grammar, len(grammar.label_ids))
    with ENGINES[engine](model, prompt_ids, longest, batch_size, bf16) as decode:
        batches = by_length([len(ids) for ids in prompt_ids], size * (QUEUE if engine == VLLM else 1))
        for batch in progress(batches, "answers, batch"):
            prompts, priors = [prompt_ids[i] for i in batch], [label_priors[i] for i in batch]
            group = Group.of(prompts, priors, grammar, num_generations, temperature, seed, model.device)
            for number, ids in enumerate(decode(group)):
                prompt, sample = divmod(number, num_generations)
                choice = group.rules.first_choice[number, : len(priors[prompt])].tolist()
                ended = ids[: ids.index(grammar.eos_id) + 1]
                completions[batch[prompt] * num_generations + sample] = Completion(ended, choice)
    return [completions[number] for number in range(len(prompt_ids) * num_generations)]


def check_engine(name: str) -> None:
    """Check that an engine can be used, see `vllm_engine.check_vllm`."""
    if name == VLLM:
        from recbole_gr2.llm.vllm_engine import check_vllm

        check_vllm()


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
    engine: str = TRANSFORMERS,
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
        engine=engine,
    )
    return [completion.ids for completion in completions]


def common_start(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return the tokens with which several prompts begin, without the last token of the shortest prompt.

    >>> common_start([[7, 8, 1, 2], [7, 8, 3], [7, 8]])
    [7]
    >>> common_start([[7, 8, 1]])
    []
    """
    return prompts[0][: common_length([prompt[:-1] for prompt in prompts])] if len(prompts) > 1 else []


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
        return self.sample(scores, range(len(scores)))  # type: ignore[return-value]

    def sample(self, scores: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return the scores (n, V) of the completions with these numbers, with noise."""
        noise = torch.empty_like(scores)
        for row, number in zip(noise, rows, strict=True):
            row.exponential_(generator=self.generators[number])
        return scores / self.temperature - noise.log()  # -log(exponential) is a Gumbel


def new_tokens(grammar: Grammar, labels: int) -> int:
    """Return the largest number of tokens of a completion: reasoning, ranking mark, labels and eos."""
    return grammar.max_reasoning + 1 + labels + 1


@dataclass(frozen=True)
class Group:
    """Prompts that an engine decodes together, and what changes the logits of their completions.

    Attributes:
        prompts: token ids of each prompt.
        num_generations: completions of each prompt, G. Their numbers are 0..G - 1 for the first prompt, and so on.
        new_tokens: largest number of tokens of a completion.
        rules: the grammar and the priors.
        noise: samples a token; without it the most likely one is chosen.
    """

    prompts: Sequence[Sequence[int]]
    num_generations: int
    new_tokens: int
    rules: GrammarProcessor
    noise: GumbelSampler | None

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        priors: Sequence[Sequence[float]],
        grammar: Grammar,
        num_generations: int,
        temperature: float,
        seed: int,
        device: torch.device,
    ) -> Group:
        """Return a group, see the arguments of `generate_completions`."""
        ids, _ = left_pad(prompts, grammar.pad_id, device)  # no padding within a semantic ID
        label_prior = prior_tensor(priors, grammar, device)
        ids, label_prior = (part.repeat_interleave(num_generations, dim=0) for part in (ids, label_prior))
        noise = None
        if temperature > 0:
            seeds = [derive_seed(seed, sample, *prompt) for prompt in prompts for sample in range(num_generations)]
            noise = GumbelSampler(temperature, seeds, device)
        return cls(
            prompts=prompts,
            num_generations=num_generations,
            new_tokens=new_tokens(grammar, max(map(len, priors))),
            rules=GrammarProcessor(grammar, ids, label_prior, temperature),
            noise=noise,
        )

    def scores(self, logits: torch.Tensor, rows: Sequence[int], written: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return scores (n, V) whose largest is the next token.

        Args:
            logits: logits of the next token of n completions, (n, V).
            rows: numbers of these completions.
            written: their tokens, lists of any length.
        """
        ids, lengths = right_pad(written, self.rules.grammar.pad_id, logits.device)
        scores = self.rules.restrict(logits, ids, lengths, torch.tensor(rows, device=logits.device))
        return self.noise.sample(scores, rows) if self.noise else scores


# --- the engines ---------------------------------------------------------------------------------------------------

Decode = Callable[[Group], list[list[int]]]


@contextmanager
def _transformers(
    model: Any, prompt_ids: Sequence[Sequence[int]], longest: int, batch_size: int, bf16: bool
) -> Iterator[Decode]:
    base = base_model(model)  # `generate` of PEFT overwrites the generation config of the base model
    with evaluating(model), torch.no_grad(), bf16_autocast(model.device, bf16):
        prefix = Prefix.read(base, common_start(prompt_ids))
        yield lambda group: _generate(base, group, prefix)


@contextmanager
def _vllm(
    model: Any, prompt_ids: Sequence[Sequence[int]], longest: int, batch_size: int, bf16: bool
) -> Iterator[Decode]:
    from recbole_gr2.llm.vllm_engine import engine_of

    with torch.no_grad():
        engine = engine_of(model, longest, batch_size, bf16)
        yield lambda group: engine.decode(
            [prompt for prompt in group.prompts for _ in range(group.num_generations)],
            group.scores,
            new_tokens=group.new_tokens,
            eos_id=group.rules.grammar.eos_id,
        )


# Each engine takes a model, all prompts, the length of the longest text, the number of completions that are decoded
# together, and whether to compute in bfloat16. It provides a function that returns the token ids of each completion.
ENGINES: dict[str, Callable[[Any, Sequence[Sequence[int]], int, int, bool], AbstractContextManager[Decode]]] = {
    TRANSFORMERS: _transformers,
    VLLM: _vllm,
}


def _generate(model: Any, group: Group, prefix: Prefix | None) -> list[list[int]]:
    start = prefix.length if prefix else 0
    grammar, num_generations = group.rules.grammar, group.num_generations
    ids, mask = left_pad(group.prompts, grammar.pad_id, model.device, start=start)
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
    ids, mask = (part.repeat_interleave(num_generations, dim=0) for part in (ids, mask))
    config = GenerationConfig(
        do_sample=False,  # the Gumbel noise samples
        max_new_tokens=group.new_tokens,
        eos_token_id=grammar.eos_id,
        pad_token_id=grammar.pad_id,
        use_cache=True,
    )
    processors = LogitsProcessorList([group.rules, *([group.noise] if group.noise else [])])
    with _generation_config(model, config):
        output = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_processor=processors)
    completions: list[list[int]] = output[:, ids.size(1) :].tolist()
    return completions


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the generation config of the model: `generate` reads every unset field from it (top_k, penalties)."""
    original, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = original
