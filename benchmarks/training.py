"""Compare training steps with those of TRL, and CausalSASRec with RecBole's SASRec, in one run.

    python benchmarks/training.py [sft grpo sasrec] [--repeats 2]

sft      a step of the stage sft and of TRL's SFTTrainer, with the same texts of ml-100k, 16 in a step
grpo     a round of the stage rl and of TRL's GRPOTrainer: eight completions of each of eight prompts, and one update
sasrec   CausalSASRec on ml-100k, and RecBole's SASRec, as RecBole trains it, until it has the same validation metric

sft and grpo train the first six layers of SmolLM2-135M, or an untrained model of this shape if the package
smollm2-135m-instruct is not installed. The tokens a second are those of processor time in one thread, without the
start: the difference of a long and a short training. A repeat gives the better one of alternating runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from reranking import Inputs, load_inputs

STEPS = 1, 5  # optimizer steps of sft in the short and in the long training
ROUNDS = 1, 3  # rounds of grpo
TEXTS, PROMPTS, GENERATIONS = 16, 8, 8  # texts of a step; prompts of a round, and completions of each
LEARNING_RATE = 1e-5
STOCK: dict[str, Any] = {  # options of both trainers of TRL
    "per_device_train_batch_size": TEXTS,
    "learning_rate": LEARNING_RATE,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}

Train = Callable[[Path, int], float]  # trains for some steps in a folder, and returns the number of tokens


def seconds(train: Train, steps: int) -> tuple[float, float]:
    """Return the processor time of a training, and its tokens."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        tokens = train(Path(folder), steps)
        return time.process_time() - started, tokens


def compare(methods: dict[str, Train], steps: tuple[int, int], repeats: int, unit: str) -> None:
    """Print seconds of a step and tokens a second of each method, and the ratio to the last one."""
    best: dict[str, tuple[float, float]] = {}
    for _ in range(repeats):
        for name, train in methods.items():
            (short, few), (long, many) = (seconds(train, count) for count in steps)
            step = (long - short) / (steps[1] - steps[0])
            best[name] = min(best.get(name, (float("inf"), 0.0)), (step, (many - few) / (steps[1] - steps[0])))
    _, (reference, words) = list(best.items())[-1]
    print(f"\n| {unit} | s | tokens | tokens/s | x {list(best)[-1]} |\n|---|---|---|---|---|")
    for name, (step, tokens) in best.items():
        ratio = tokens / step / (words / reference)
        print(f"| {name} | {step:.2f} | {tokens:,.0f} | {tokens / step:,.0f} | {ratio:.2f} |", flush=True)


def sft(inputs: Inputs, repeats: int) -> None:
    """Compare steps of supervised fine-tuning."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from recbole_gr2.llm.train import Training, finetune
    from recbole_gr2.policy import answer_grammar
    from recbole_gr2.prompts import PromptMaker
    from recbole_gr2.stages.sft import training_example
    from recbole_gr2.types import Trace

    _, settings, catalog, model, tokenizer, requests, bf16 = inputs
    maker, grammar = PromptMaker.of(settings, catalog), answer_grammar(tokenizer, settings)

    def trace(request: Any) -> Trace:
        titles = ", ".join(catalog.item(item).title for item in request.items)
        return Trace(
            request_id=request.request_id,
            teacher="titles",
            mode="targeted",
            reasoning=titles,
            ranking=tuple(request.items),
            accepted=True,
            reason="",
        )

    examples = [training_example(maker, r, maker.render(r), trace(r), tokenizer, grammar) for r in requests]
    texts = [each.input_ids for each in examples]
    scored = [[int(part > 0) for part in each.parts] for each in examples]

    def tokens(steps: int) -> float:
        return steps * TEXTS * sum(map(len, texts)) / len(texts)

    def ours(folder: Path, steps: int) -> float:
        training = Training(
            steps=steps,
            batch_size=TEXTS,
            micro_batch_size=TEXTS,
            learning_rate=LEARNING_RATE,
            warmup_share=0.0,
            seed=1,
            bf16=bf16,
            save_steps=1000,
        )
        finetune(
            deepcopy(model),
            tokenizer,
            examples,
            folder,
            part_weights={"reasoning": 1.0, "ranking": 1.0},
            training=training,
            max_length=2048,
        )
        return tokens(steps)

    def stock(folder: Path, steps: int) -> float:
        config = SFTConfig(
            str(folder),
            **STOCK,
            max_steps=steps,
            completion_only_loss=True,
            max_length=None,
            bf16=bf16,
        )
        data = Dataset.from_dict({"input_ids": texts, "completion_mask": scored})
        SFTTrainer(plain(model), config, train_dataset=data, processing_class=tokenizer).train()
        return tokens(steps)

    compare({"recbole-gr2": ours, "TRL": stock}, STEPS, repeats, "step of sft")


def grpo(inputs: Inputs, repeats: int) -> None:
    """Compare rounds of reinforcement learning without further prompts, with one update."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from recbole_gr2.llm.dapo import DAPOTrainer
    from recbole_gr2.llm.dapo_config import dapo_config
    from recbole_gr2.llm.generation import new_tokens
    from recbole_gr2.policy import answer_grammar
    from recbole_gr2.prompts import PromptMaker
    from recbole_gr2.rewards import WeightedRewards
    from recbole_gr2.stages.rl import prompt_record

    _, settings, catalog, model, tokenizer, requests, bf16 = inputs
    maker, grammar = PromptMaker.of(settings, catalog), answer_grammar(tokenizer, settings)
    prompts = [prompt_record(maker, request, tokenizer) for request in requests]
    read = PROMPTS * sum(len(prompt["prompt_ids"]) for prompt in prompts) / len(prompts)  # tokens of the prompts
    longest = new_tokens(grammar, len(grammar.label_ids))

    def written(trainer: Any) -> float:
        lengths = [line["completions/mean_length"] for line in trainer.state.log_history if "reward" in line]
        return float(sum(read + PROMPTS * GENERATIONS * length for length in lengths))

    def ours(folder: Path, rounds: int) -> float:
        config = dapo_config(
            str(folder),
            steps=rounds,
            prompts_per_step=PROMPTS,
            num_generations=GENERATIONS,
            num_iterations=1,
            micro_batch_size=TEXTS,
            learning_rate=LEARNING_RATE,
            mask_truncated=False,
            bf16=bf16,
            seed=1,
            save_steps=rounds,
            use_cpu=True,
        )
        trainer = DAPOTrainer(
            deepcopy(model),
            config,
            prompts,
            requests={request.request_id: request for request in requests},
            rewards=WeightedRewards({"rank_gain": 1.0}),
            grammar=grammar,
            tokenizer=tokenizer,
            max_resample=0,
        )
        trainer.train()
        return written(trainer)

    def stock(folder: Path, rounds: int) -> float:
        config = GRPOConfig(
            str(folder),
            **STOCK,
            max_steps=rounds,
            gradient_accumulation_steps=PROMPTS * GENERATIONS // TEXTS,
            num_generations=GENERATIONS,
            max_completion_length=longest,
            generation_kwargs={"min_new_tokens": longest},
            bf16=bf16,
            logging_steps=1,
        )
        trainer = GRPOTrainer(
            plain(model),
            lambda completions, **columns: [float(len(str(each)) % 7) for each in completions],
            config,
            train_dataset=Dataset.from_dict({"prompt": [maker.render(request).messages for request in requests]}),
            processing_class=tokenizer,
        )
        trainer.train()
        return written(trainer)

    compare({"recbole-gr2": ours, "TRL": stock}, ROUNDS, repeats, "round of grpo")


def plain(model: Any) -> Any:
    """Return a copy of the model with the attention of transformers."""
    copy = deepcopy(model)
    copy.set_attn_implementation("sdpa")
    return copy


class Reached(BaseException):
    """A model has the metric that the other one has reached."""


def sasrec() -> None:
    """Train CausalSASRec with early stopping, and SASRec until it has the same metric on the validation rows."""
    from recbole_gr2.bridge import training
    from recbole_gr2.bridge.data import Data
    from recbole_gr2.config import load_settings

    data = Data(load_settings(config_dict={"preset": "laptop", "base_model": ["CausalSASRec"]}))
    # Length buckets are a part of this package. RecBole computes the loss of whole batches.
    training.BucketedLoss = lambda network, say: network.calculate_loss  # type: ignore[assignment, misc]
    print("\n| model | s | ndcg@10 |\n|---|---|---|")
    wanted = float("inf")
    for model in ("CausalSASRec", "SASRec"):
        started, curve, most = time.process_time(), list[tuple[float, float]](), wanted

        def say(text: str, started: float = started, curve: Any = curve, most: float = most) -> None:
            if " epoch " in text:
                curve.append((float(text.split()[-1]), time.process_time() - started))
                print(f"{curve[-1][1]:,.0f} s, {text}", file=sys.stderr, flush=True)
                if curve[-1][0] >= most:
                    raise Reached

        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Reached):
            training.train_model(data, Path(folder), model=model, say=say)
        best = max(value for value, _ in curve)
        first = next(moment for value, moment in curve if value == best)
        print(f"| {model} | {first:,.0f} | {best:.4f} |", flush=True)
        wanted = best


def main(words: Sequence[str] | None = None) -> None:
    """Print a table for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", default=["sft", "grpo", "sasrec"])
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args(words)
    if {"sft", "grpo"} & set(options.parts):
        inputs = load_inputs(6, 5, 10, TEXTS * STEPS[1])
        print(f"{inputs.name}, one thread")
        for part in ("sft", "grpo"):
            if part in options.parts:
                {"sft": sft, "grpo": grpo}[part](inputs, options.repeats)
    if "sasrec" in options.parts:
        sasrec()


if __name__ == "__main__":
    main()
