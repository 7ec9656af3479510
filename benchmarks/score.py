"""Compare scores in one pass, with each form of items, with generated answers, in one run.

    python benchmarks/score.py [--lists 16] [--layers 6] [--history 5] [--repeats 2]

All methods rank the same lists of ten movies of ml-100k with the first layers of SmolLM2-135M, or with an untrained
model of its shape if the package smollm2-135m-instruct is not installed. The model is not trained further, because only
the speed is measured. `reason+rank` generates up to 64 tokens of reasoning and the ranking, `rank` the ranking alone.
Lists per second are those of processor time in one thread without loading the model, the best of some alternating
runs. `prompts` is the share of this time in which prompts are rendered and encoded.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace


def main() -> None:
    """Print one line per method."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lists", type=int, default=16)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--history", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()

    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as a run does
    import numpy as np
    import torch

    from recbole_gr2.bridge.data import Data
    from recbole_gr2.config import load_settings
    from recbole_gr2.errors import GR2Error
    from recbole_gr2.llm.item_vectors import ItemEncoder, item_groups
    from recbole_gr2.llm.model import load_language_model
    from recbole_gr2.policy import Policy, answer_grammar, use_bf16
    from recbole_gr2.prompts import FORMS, VECTOR, PromptMaker
    from recbole_gr2.scorer import Scorer
    from recbole_gr2.sid.tokens import added_tokens, sid_text
    from recbole_gr2.tasks import vocabulary_texts
    from recbole_gr2.types import Candidate, CandidateFeatures, Request

    torch.set_num_threads(1)
    rng, features = np.random.default_rng(0), 41
    chosen = {"preset": "laptop", "prompt_history": options.history, "eval_batch_lists": 16}
    settings = load_settings(config_dict=chosen)
    items = Data(settings).catalog
    levels, codes = settings["sid_levels"], settings["sid_codes"]
    catalog = items.with_sids({item.token: tuple(rng.integers(0, codes, levels).tolist()) for item in items})
    loading = {
        "corpus": vocabulary_texts(catalog, settings),
        "extra_tokens": added_tokens(levels, codes, settings["cand_num"]),
    }
    try:
        name = "smollm2-135m-instruct"
        model, tokenizer = load_language_model(name, layers=range(options.layers), trim=True, **loading)
    except GR2Error:
        name = "untrained"
        shape = {"vocab_size": 9000, "hidden_size": 576, "intermediate_size": 1536}
        shape |= {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": options.layers}
        model, tokenizer = load_language_model("random", random_config=shape, **loading)

    def request_of(number: int) -> Request:
        drawn = rng.choice(len(catalog), 40, replace=False) + 1
        candidates = tuple(
            Candidate(item_id=int(n), score=0.0, rank=rank) for rank, n in enumerate(drawn[:10], start=1)
        )
        table = rng.normal(size=(10, features)).astype(np.float32)
        return Request(
            request_id=str(number),
            user_token=str(number),
            split="test",
            history=tuple(map(int, drawn[10:])),
            candidates=candidates,
            target=0,
            provider="benchmark",
            prior=tuple(np.log(rng.dirichlet(np.ones(10))).tolist()),
            features=CandidateFeatures(table, np.zeros((10, 1, 0), np.float16)),
        )

    requests = [request_of(number) for number in range(options.lists)]
    sids = tokenizer([sid_text(item.sid) for item in catalog], add_special_tokens=False)["input_ids"]
    texts = rng.normal(size=(len(catalog), 384)).astype(np.float32)
    width = model.get_input_embeddings().embedding_dim
    encoder = ItemEncoder(texts, np.array(sids)[:, 1:-1], item_groups(catalog), features, width)
    model.item_inputs = encoder.catalogue(model.get_input_embeddings())
    bf16 = use_bf16(settings, "cpu")

    def policy(reasoning: bool) -> Policy:
        return Policy(
            model=model,
            tokenizer=tokenizer,
            maker=PromptMaker.of(settings, catalog),
            grammar=answer_grammar(tokenizer, settings, reasoning=reasoning),
            bf16=bf16,
            batch_size=16,
        )

    text = Scorer(
        model=model,
        tokenizer=tokenizer,
        maker=PromptMaker.of(settings, catalog),
        grammar=answer_grammar(tokenizer, settings, reasoning=False),
        bf16=bf16,
        batch_size=16,
    )
    scorers = {form: replace(text, maker=PromptMaker.of(settings, catalog, form)) for form in FORMS}
    methods: dict[str, Callable[[], object]] = {
        "reason+rank, text": lambda: policy(True).answer(requests),
        "rank, text": lambda: policy(False).answer(requests),
        **{f"score, {form}": lambda scorer=scorer: scorer.answer(requests) for form, scorer in scorers.items()},
        **{
            f"score, {form}, invariant": lambda scorer=scorer: replace(scorer, invariant=True).answer(requests)
            for form, scorer in scorers.items()
            if form in ("text", VECTOR)
        },
    }
    shown = {f"score, {form}": scorer for form, scorer in scorers.items()}
    shown |= {f"{name}, invariant": replace(scorer, invariant=True) for name, scorer in shown.items()}
    shown |= {"reason+rank, text": text, "rank, text": text}
    best = dict.fromkeys(methods, float("inf"))
    for _ in range(options.repeats):
        for method, answer in methods.items():
            started = time.process_time()
            answer()
            best[method] = min(best[method], time.process_time() - started)
    print(f"{name}, {options.layers} layers, {options.lists} lists, {'bfloat16' if bf16 else 'float32'}, one thread\n")
    print("| method | positions | lists/s | x reason+rank | x rank | prompts |\n|---|---|---|---|---|---|")
    first, second = best["reason+rank, text"], best["rank, text"]
    for method, seconds in best.items():
        started = time.process_time()
        inputs = [shown[method].list_input(request) for request in requests]
        rendering = (time.process_time() - started) / seconds
        positions = np.mean([len(each.input_ids) for each in inputs])
        print(
            f"| {method} | {positions:.0f} | {options.lists / seconds:.1f} | {first / seconds:.1f} | "
            f"{second / seconds:.1f} | {rendering:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
