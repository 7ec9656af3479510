"""Generating semantic IDs: our beam search and transformers' own under the same trie, side by side in one run.

    python benchmarks/generation.py [--users 64] [--beams 10] [--items 12000] [--layers 6]

Both read the same prompts with the same untrained model of SmolLM2-135M's shape and search the same catalogue, so that
they have to name the same items (the share is printed). transformers.generate gets the trie as
prefix_allowed_tokens_fn; a code's probability is that among the whole vocabulary, as it knows no other; `choices` is
ours with codes as choices among the catalogue's, which is how the package generates, and finds other items. Seconds are
those of the processor over all threads.
"""

from __future__ import annotations

import argparse
import time


def main() -> None:
    """One line a way of searching."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()

    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from recbole_gr2.llm.beam import SidTrie, beam_items
    from recbole_gr2.llm.rollout import left_pad

    levels, count, words, begin, pad = 4, 256, 12_000, 1, 0
    rng = np.random.default_rng(0)
    codes = rng.integers(0, count, (options.items, levels))
    codes[:, 1] = (codes[:, 0] + rng.integers(0, 32, options.items)) % count  # alike items share two codes
    tokens = words + np.arange(levels * count).reshape(levels, count)
    trie = SidTrie.build(codes, tokens, begin_id=begin)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words + levels * count,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=options.layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            pad_token_id=pad,
            bos_token_id=None,
            eos_token_id=None,
            initializer_range=0.1,
        )
    ).eval()
    prompts = [rng.integers(2, words, 6 * rng.integers(4, 15)).tolist() for _ in range(options.users)]

    following: dict[tuple[int, ...], list[int]] = {}
    for row in tokens[np.arange(levels), codes].tolist():
        for depth in range(levels):
            following.setdefault(tuple(row[:depth]), []).append(row[depth])
    following = {prefix: sorted(set(said)) for prefix, said in following.items()}

    def transformers_own() -> list[list[tuple[int, ...]]]:
        ids, mask = left_pad([[*prompt, begin] for prompt in prompts], pad, model.device)
        size = ids.size(1)
        found = model.generate(
            ids,
            attention_mask=mask,
            num_beams=options.beams,
            num_return_sequences=options.beams,
            do_sample=False,
            max_new_tokens=levels,
            min_new_tokens=levels,
            length_penalty=0.0,
            pad_token_id=pad,
            prefix_allowed_tokens_fn=lambda batch, said: following[tuple(said[size:].tolist())],
        )[:, size:]
        return [list(map(tuple, rows)) for rows in found.view(options.users, options.beams, levels).tolist()]

    def ours(constrained: bool) -> list[list[tuple[int, ...]]]:
        beams = beam_items(
            model, prompts, trie, beams=options.beams, batch_size=options.users, pad_id=pad, constrained=constrained
        )
        sids = tokens[np.arange(levels), codes[trie.items[trie.starts[-1][:-1]].numpy() - 1]]
        return [list(map(tuple, sids[leaves].tolist())) for leaves in beams.leaves.numpy()]

    ways = {
        "transformers.generate": transformers_own,
        "ours, whole vocabulary": lambda: ours(False),
        "ours, choices": lambda: ours(True),
    }
    print(f"{options.users} prompts, {options.beams} beams, {options.items:,} items, {options.layers} layers\n")
    print("| search | s | users/s | ratio | same items as the first |\n|---|---|---|---|---|")
    first = None
    with torch.no_grad():
        for name, search in ways.items():
            started = time.process_time()
            found = search()
            seconds = time.process_time() - started
            first = first or (seconds, found)
            same = np.mean([len(set(a) & set(b)) / options.beams for a, b in zip(found, first[1], strict=True)])
            print(
                f"| {name} | {seconds:.1f} | {options.users / seconds:.1f} | {first[0] / seconds:.1f} | {same:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
