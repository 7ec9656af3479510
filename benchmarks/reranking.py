"""Compare the ways to re-rank lists with one language model, in one run.

    python benchmarks/reranking.py [--lists 32] [--repeats 2] [--output DIR]

All methods rank the same lists of movies of ml-100k with the first layers of SmolLM2-135M, or with an untrained model
of its shape if the package smollm2-135m-instruct is not installed. The model is not trained further, because only the
speed is measured.

reason+rank   up to 64 tokens of reasoning and the ranking, under the grammar of this package
rank          the ranking alone, under the grammar
score         one forward pass, with each form of items; `invariant` separates the candidates from each other
generate      `generate` of transformers: 64 tokens of reasoning and a ranking in JSON, or the JSON alone, by its length
pairs         one prompt for each (history, candidate), as a cross-encoder reads them

Lists per second are those of processor time in one thread without loading the model: the best of some alternating runs.
`prompt` is the share of the time that one pass over the same prompts takes. The latency is that of lists that are
answered one at a time. The memory is the peak of a process that has loaded the model and runs this method alone.

With an output folder, the script varies the history, the number of candidates and the layers, and writes the plots.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

REASONING = 64  # tokens
BATCH = 16  # lists
# Tokens of {"ranking": ["A", "B", ...]} by the tokenizer of SmolLM2: three for each label, and four others.
JSON_LABEL, JSON_OTHERS = 3, 4
FEATURES = 41  # number of features of a candidate, as in a run on ml-100k
SWEEPS = {"history": [5, 20, 50], "candidates": [5, 10, 20], "layers": [3, 6, 12, 30]}
SWEPT = ("generate, reasoning and JSON", "pairs", "reason+rank, text", "score, text", "score, vector")

Methods = dict[str, Callable[[Sequence[Any]], object]]


class Inputs(NamedTuple):
    """A language model and the lists that it ranks."""

    name: str
    settings: Any
    catalog: Any
    model: Any
    tokenizer: Any
    requests: list[Any]
    bf16: bool


def load_inputs(layers: int, history: int, candidates: int, lists: int) -> Inputs:
    """Return the first layers of the model, and lists of movies that are drawn at random.

    A candidate in the middle is the target. Features and priors are drawn at random, too.
    """
    import numpy as np
    import torch

    from recbole_gr2.bridge.data import Data
    from recbole_gr2.config import load_settings
    from recbole_gr2.errors import GR2Error
    from recbole_gr2.llm.model import load_language_model
    from recbole_gr2.policy import use_bf16
    from recbole_gr2.sid.tokens import added_tokens
    from recbole_gr2.tasks import vocabulary_texts
    from recbole_gr2.types import Candidate, CandidateFeatures, Request

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    chosen = {
        "preset": "laptop",
        "prompt_items": "text",
        "prompt_history": history,
        "cand_num": candidates,
        "cand_pool": candidates,
    }
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
        model, tokenizer = load_language_model(name, layers=range(layers), trim=True, **loading)
    except GR2Error:
        name = "untrained"
        shape = {"vocab_size": 9000, "hidden_size": 576, "intermediate_size": 1536}
        shape |= {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": layers}
        model, tokenizer = load_language_model("random", random_config=shape, **loading)

    def request_of(number: int) -> Request:
        drawn = rng.choice(len(catalog), candidates + history, replace=False) + 1
        listed = [Candidate(item_id=int(n), score=0.0, rank=rank) for rank, n in enumerate(drawn[:candidates], start=1)]
        table = rng.normal(size=(candidates, FEATURES)).astype(np.float32)
        return Request(
            request_id=str(number),
            user_token=str(number),
            split="test",
            history=tuple(map(int, drawn[candidates:])),
            candidates=tuple(listed),
            target=int(drawn[candidates // 2]),
            provider="benchmark",
            prior=tuple(np.log(rng.dirichlet(np.ones(candidates))).tolist()),
            features=CandidateFeatures(table, np.zeros((candidates, 1, 0), np.float16)),
        )

    bf16 = use_bf16(settings, "cpu")
    name = f"{name}, {layers} layers, {'bfloat16' if bf16 else 'float32'}"
    return Inputs(name, settings, catalog, model, tokenizer, [request_of(number) for number in range(lists)], bf16)


def set_up(layers: int, history: int, candidates: int, lists: int) -> tuple[str, list[Any], Methods, dict[str, float]]:
    """Return the name of the model, the requests, the methods, and the mean number of positions of their prompts."""
    import numpy as np

    from recbole_gr2.llm.item_vectors import ItemEncoder, item_groups
    from recbole_gr2.policy import Policy, answer_grammar
    from recbole_gr2.prompts import FORMS, VECTOR, PromptMaker
    from recbole_gr2.scorer import Scorer
    from recbole_gr2.sid.tokens import sid_text

    name, settings, catalog, model, tokenizer, requests, bf16 = load_inputs(layers, history, candidates, lists)
    sids = tokenizer([sid_text(item.sid) for item in catalog], add_special_tokens=False)["input_ids"]
    texts = np.random.default_rng(1).normal(size=(len(catalog), 384)).astype(np.float32)
    encoder = ItemEncoder(
        texts, np.array(sids)[:, 1:-1], item_groups(catalog), FEATURES, model.get_input_embeddings().embedding_dim
    )
    model.item_inputs = encoder.catalogue(model.get_input_embeddings())
    shared: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "bf16": bf16, "batch_size": BATCH}

    def policy(reasoning: bool) -> Policy:
        grammar = answer_grammar(tokenizer, settings, reasoning=reasoning)
        return Policy(maker=PromptMaker.of(settings, catalog), grammar=grammar, **shared)

    grammar = answer_grammar(tokenizer, settings, reasoning=False)
    scorers = {form: Scorer(maker=PromptMaker.of(settings, catalog, form), grammar=grammar, **shared) for form in FORMS}
    separate = {form: replace(scorers[form], invariant=True) for form in ("text", VECTOR)}

    def prompts(request: Any) -> list[int]:
        return list(scorers["text"].list_input(request).input_ids)

    json = JSON_LABEL * candidates + JSON_OTHERS
    methods: Methods = {
        "generate, reasoning and JSON": partial(generate, shared, prompts, REASONING + json),
        "generate, JSON": partial(generate, shared, prompts, json),
        "pairs": partial(pairs, shared, prompts),
        "reason+rank, text": lambda part: policy(True).answer(part),
        "rank, text": lambda part: policy(False).answer(part),
        **{f"score, {form}": scorer.answer for form, scorer in scorers.items()},
        **{f"score, {form}, invariant": scorer.answer for form, scorer in separate.items()},
    }
    pair = sum(map(len, map(prompts, single(requests[:4]))))
    lengths = dict.fromkeys(methods, float(np.mean([len(prompts(request)) for request in requests])))
    lengths["pairs"] = pair / 4
    for method, scorer in [*scorers.items(), *((f"{form}, invariant", each) for form, each in separate.items())]:
        lengths[f"score, {method}"] = float(np.mean([len(scorer.list_input(r).input_ids) for r in requests]))
    return name, requests, methods, lengths


def single(requests: Sequence[Any]) -> list[Any]:
    """Return a request with one candidate for each candidate of the requests."""
    return [
        replace(request, candidates=(candidate._replace(rank=1),), prior=(0.0,), features=None)
        for request in requests
        for candidate in request.candidates
    ]


def generate(shared: dict[str, Any], prompts: Callable[[Any], list[int]], tokens: int, requests: Sequence[Any]) -> None:
    """Generate a number of tokens greedily with the `generate` of transformers."""
    for ids, mask in batches(shared, [prompts(request) for request in requests]):
        shared["model"].generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=shared["tokenizer"].pad_token_id,
        )


def pairs(shared: dict[str, Any], prompts: Callable[[Any], list[int]], requests: Sequence[Any]) -> None:
    """Read one prompt for each candidate, and compute the logits of its last token."""
    from recbole_gr2.llm.inputs import positions

    for ids, mask in batches(shared, [prompts(request) for request in single(requests)]):
        places = positions(mask)
        shared["model"](input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=1)


def batches(shared: dict[str, Any], texts: Sequence[Sequence[int]]) -> Iterator[tuple[Any, Any]]:
    """Yield token ids and attention mask of each batch, with autocast and without gradients."""
    import torch

    from recbole_gr2.batching import by_length
    from recbole_gr2.llm.inputs import bf16_autocast, left_pad

    device, pad = shared["model"].device, shared["tokenizer"].pad_token_id
    with torch.no_grad(), bf16_autocast(device, shared["bf16"]):
        for batch in by_length([len(text) for text in texts], BATCH):
            yield left_pad([texts[number] for number in batch], pad, device)


def best_times(methods: Methods, requests: Sequence[Any], repeats: int) -> dict[str, float]:
    """Return the least seconds of processor time of each method, over alternating runs."""
    best = dict.fromkeys(methods, float("inf"))
    for _ in range(repeats):
        for method, answer in methods.items():
            started = time.process_time()
            answer(requests)
            best[method] = min(best[method], time.process_time() - started)
    return best


def latencies(answer: Callable[[Sequence[Any]], object], requests: Sequence[Any]) -> tuple[float, float]:
    """Return median and 95th percentile of the seconds of lists that are answered one at a time."""
    import numpy as np

    seconds = []
    for request in requests:
        started = time.process_time()
        answer([request])
        seconds.append(time.process_time() - started)
    return float(np.median(seconds)), float(np.quantile(seconds, 0.95))


def peak_memory(answer: Callable[[Sequence[Any]], object], requests: Sequence[Any]) -> float:
    """Return the peak memory in MiB of a child process that runs a method."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        answer(requests)
        os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return float(file.read())


def table(options: argparse.Namespace) -> None:
    """Print one line per method."""
    name, requests, methods, positions = set_up(6, 5, 10, options.lists)
    few = requests[:BATCH]
    memory = {method: peak_memory(answer, few) for method, answer in methods.items()}
    best = best_times(methods, requests, options.repeats)
    reading = best["score, text"]  # one pass over the prompts of all generating methods
    references = ["generate, reasoning and JSON", "pairs"]
    print(f"{name}, one thread, {options.lists} lists of ten, histories of five\n")
    print(
        "| method | positions | lists/s | prompt tokens/s | "
        + " | ".join(f"x {each}" for each in references)
        + " | prompt | p50, ms | p95, ms | memory, MiB |\n"
        + "|---" * 10
        + "|"
    )
    for method, seconds in best.items():
        median, high = latencies(methods[method], few)
        generates = method.startswith(("generate", "reason", "rank"))
        print(
            f"| {method} | {positions[method]:.0f} | {len(requests) / seconds:.1f} "
            f"| {positions[method] * len(requests) / seconds:,.0f} | "
            + " | ".join(f"{best[each] / seconds:.1f}" for each in references)
            + f" | {f'{reading / seconds:.0%}' if generates else ''} | {median * 1e3:.0f} | {high * 1e3:.0f} "
            f"| {memory[method]:,.0f} |",
            flush=True,
        )


def sweep(options: argparse.Namespace, folder: Path) -> None:
    """Measure lists per second by history, candidates and layers, print them, and write a plot of each."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    base = {"layers": 6, "history": 5, "candidates": 10}
    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(10, 3.2), sharey=True)
    for axis, (what, values) in zip(axes, SWEEPS.items(), strict=True):
        rates: dict[str, list[float]] = {method: [] for method in SWEPT}
        for value in values:
            _, requests, methods, _ = set_up(**{**base, what: value}, lists=options.sweep_lists)
            for method, seconds in best_times({each: methods[each] for each in SWEPT}, requests, 1).items():
                rates[method].append(len(requests) / seconds)
        print(f"\n| {what} | " + " | ".join(map(str, values)) + " |\n|" + "---|" * (len(values) + 1))
        for method, row in rates.items():
            print(f"| {method} | " + " | ".join(f"{rate:.1f}" for rate in row) + " |", flush=True)
            axis.plot(values, row, marker="o", label=method)
        axis.set(xlabel={"history": "items of the history"}.get(what, what), xscale="log", yscale="log")
        axis.set_xticks(values, map(str, values))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("lists/s, one core")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(folder / "reranking.svg", metadata={"Date": None})


def main() -> None:
    """Print the table, and with an output folder the sweeps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--lists", type=int, default=32)
    parser.add_argument("--sweep_lists", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    table(options)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        sweep(options, options.output)


if __name__ == "__main__":
    main()
