"""Compare answers with the preallocated cache and with the cache of transformers, in one run.

    python benchmarks/answers.py [--prompts 16] [--tokens 400] [--reasoning 64] [--layers 6] [--no-bf16]

Both generate rankings of ten candidates with the same untrained model of the shape of SmolLM2-135M. Greedy: one answer
per prompt. Sampled: eight answers for each of half the prompts. The answers have to be equal. Seconds are processor
time over all threads, the better of two alternating runs.
"""

from __future__ import annotations

import argparse
import time


def main() -> None:
    """Print one line per kind of answers and cache."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--reasoning", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--no-bf16", action="store_true")
    options = parser.parse_args()

    import numpy as np
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from recbole_gr2.llm import generation
    from recbole_gr2.llm.grammar import Grammar

    words, rng = 12_000, np.random.default_rng(0)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words + 20,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=options.layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            initializer_range=0.1,
        )
    ).eval()
    grammar = Grammar(
        ranking_id=words + 10,
        label_ids=tuple(range(words, words + 10)),
        eos_id=1,
        pad_id=0,
        max_reasoning=options.reasoning,
    )
    prompts = [rng.integers(2, words, options.tokens - rng.integers(0, 60)).tolist() for _ in range(options.prompts)]
    kinds = {"greedy": (prompts, 1, 0.0), "sampled": (prompts[: options.prompts // 2], 8, 1.0)}
    caches = {
        "transformers": lambda model: DynamicCache(config=model.config),
        "preallocated": generation.preallocated_cache,
    }

    def answers(kind: str, cache: str) -> tuple[float, list[list[int]]]:
        inputs, generations, temperature = kinds[kind]
        generation.preallocated_cache = caches[cache]
        started = time.process_time()
        completions = generation.generate_rankings(
            model,
            inputs,
            [[0.0] * 10] * len(inputs),
            grammar=grammar,
            num_generations=generations,
            temperature=temperature,
            batch_size=max(16, 8 * generations),
            bf16=not options.no_bf16,
        )
        return time.process_time() - started, completions

    print("| answers | cache | s | ratio | equal |\n|---|---|---|---|---|")
    for kind in kinds:
        runs = {cache: [] for cache in caches}
        for cache in [*caches, *caches]:
            runs[cache].append(answers(kind, cache))
        (first, reference), *_ = (min(results) for results in runs.values())
        for cache, results in runs.items():
            seconds, completions = min(results)
            same = np.mean([a == b for a, b in zip(completions, reference, strict=True)])
            print(f"| {kind} | {cache} | {seconds:.1f} | {first / seconds:.2f} | {same:.1%} |", flush=True)


if __name__ == "__main__":
    main()
