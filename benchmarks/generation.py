"""Compare our beam search with that of transformers on semantic IDs, with the same trie, in one run.

    python benchmarks/generation.py [--users 64] [--beams 10] [--items 12000] [--layers 6]

Both read the same prompts with the same untrained model of the shape of SmolLM2-135M and search the same catalog. They
have to return the same items (the share is printed). transformers.generate gets the trie as prefix_allowed_tokens_fn,
and normalizes the probability of a code over the whole vocabulary. `choices` is our search as the package uses it: it
normalizes over the codes of the catalog, and returns other items. Seconds are processor time over all threads.
"""

from __future__ import annotations

import argparse
import time


def main() -> None:
    """Print one line per search."""
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
    from recbole_gr2.llm.inputs import left_pad

    levels, count, words, begin, pad = 4, 256, 12_000, 1, 0
    rng = np.random.default_rng(0)
    codes = rng.integers(0, count, (options.items, levels))
    codes[:, 1] = (codes[:, 0] + rng.integers(0, 32, options.items)) % count  # similar items share two codes
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
    following = {prefix: sorted(set(codes)) for prefix, codes in following.items()}

    def transformers_search() -> list[list[tuple[int, ...]]]:
        ids, mask = left_pad([[*prompt, begin] for prompt in prompts], pad, model.device)
        size = ids.size(1)
        output = model.generate(
            ids,
            attention_mask=mask,
            num_beams=options.beams,
            num_return_sequences=options.beams,
            do_sample=False,
            max_new_tokens=levels,
            min_new_tokens=levels,
            length_penalty=0.0,
            pad_token_id=pad,
            prefix_allowed_tokens_fn=lambda batch, ids: following[tuple(ids[size:].tolist())],
        )[:, size:]
        return [list(map(tuple, sids)) for sids in output.view(options.users, options.beams, levels).tolist()]

    def ours(constrained: bool) -> list[list[tuple[int, ...]]]:
        beams = beam_items(
            model, prompts, trie, beams=options.beams, batch_size=options.users, pad_id=pad, constrained=constrained
        )
        sids = tokens[np.arange(levels), codes[trie.items[trie.starts[-1][:-1]].numpy() - 1]]
        return [list(map(tuple, sids[leaves].tolist())) for leaves in beams.leaves.numpy()]

    searches = {
        "transformers.generate": transformers_search,
        "ours, whole vocabulary": lambda: ours(False),
        "ours, choices": lambda: ours(True),
    }
    print(f"{options.users} prompts, {options.beams} beams, {options.items:,} items, {options.layers} layers\n")
    print("| search | s | users/s | ratio | same items as the first |\n|---|---|---|---|---|")
    first = None
    with torch.no_grad():
        for name, search in searches.items():
            started = time.process_time()
            result = search()
            seconds = time.process_time() - started
            first = first or (seconds, result)
            same = np.mean([len(set(a) & set(b)) / options.beams for a, b in zip(result, first[1], strict=True)])
            print(
                f"| {name} | {seconds:.1f} | {options.users / seconds:.1f} | {first[0] / seconds:.1f} | {same:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
