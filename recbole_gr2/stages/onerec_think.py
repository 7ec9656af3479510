"""OneRec-Think (arXiv 2510.11639): fine-tuning of the mid-trained model with or without traces, and GRPO.

`recbole_gr2.onerec_think` describes the baseline and uses the models that this module trains.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from recbole_gr2.artifacts import load_catalog, read_embeddings
from recbole_gr2.bridge.data import Data
from recbole_gr2.config import ONEREC_THINK, Settings
from recbole_gr2.distributed import RANK, WORLD_SIZE, check_replicas, check_shares, share, wait_for_all
from recbole_gr2.llm.adapter import merged, with_lora
from recbole_gr2.llm.beam import SidTrie
from recbole_gr2.llm.card import write_model_card
from recbole_gr2.llm.generation import generate_rankings
from recbole_gr2.llm.model import save_language_model
from recbole_gr2.llm.train import Example, FiniteLoss, ProgressLines, finetune
from recbole_gr2.llm.vocabulary import add_tokens
from recbole_gr2.onerec_think import END_OF_THINK, THINK, prompt_ids, prompt_maker, reasons, trace_grammar
from recbole_gr2.plain_text import plain_text
from recbole_gr2.policy import llm_training, load_model, new_tokens, resolved_bf16, sid_trie, use_bf16, whole_midtrain
from recbole_gr2.prompts import PromptMaker, encode, encode_chat, kind, load_template, shorten
from recbole_gr2.seeding import derive_seed, seed_everything
from recbole_gr2.sid.tokens import sid_text
from recbole_gr2.store import read_lines, write_json, write_lines
from recbole_gr2.tasks import PERSONA, describe
from recbole_gr2.types import Candidate, Context, Item, Request, Stage

TRACE, ITEM = 1, 2  # parts of an example
WARMUP_SHARE = 0.1  # share of the steps in which the learning rate rises. OneRec-Think, released code.
# Settings that do not change the models.
EXCLUDED = ("prompt_grounded", "prompt_llm_weight", "prompt_items", "onerec_think_beams")
EPSILON = 0.2  # clip range of GRPO, the same on both sides
Position = tuple[tuple[int, ...], int]  # a history and the next item


def run(context: Context) -> dict[str, Any]:
    """Fine-tune the mid-trained model on all training interactions, with traces or without as the stage's name says.

    Writes model/, README.md, log.json and sample.txt; in variant `paper` also rationales.jsonl and rollouts. Several
    processes may run it together.
    """
    settings, catalog, with_traces = context.settings, load_catalog(context), reasons(context.stage)
    maker = prompt_maker(settings, catalog)
    seed = derive_seed(settings["seed"], "onerec_think")  # the same for both models: they learn the same histories
    positions = training_positions(context.data.known_items("train"), seed=seed)
    size = settings["onerec_think_batch_size"]
    steps = min(settings["onerec_think_steps"], math.ceil(settings["onerec_think_passes"] * len(positions) / size))
    positions = positions[: steps * size]
    if not with_traces:
        traces = [""] * len(positions)
    elif settings["onerec_think_variant"] == "public":
        traces = [sentence(catalog.item(target)) for _, target in positions]
    else:
        traces = rationales(context, maker, positions)
    context.say(f"{len(positions):,} histories" + (f", for example {traces[0]!r}" if with_traces else ""))
    model, tokenizer = load_model(context.folders[whole_midtrain(settings)])
    if with_traces:
        add_tokens(model, tokenizer, [THINK, END_OF_THINK], seed)
    examples = [
        training_example(maker, tokenizer, history, catalog.item(target), trace, settings["onerec_think_max_trace"])
        for (history, target), trace in zip(positions, traces, strict=True)
    ]
    lengths = [len(example.input_ids) for example in examples]
    context.say(f"{sum(lengths) / len(lengths):.0f} tokens on average, {max(lengths)} at most")
    seed_everything(seed)
    model = with_lora(model, settings["llm_lora_rank"], new_tokens(tokenizer))
    logs = {
        "sft": finetune(
            model,
            tokenizer,
            examples,
            context.folder / "checkpoints" / "sft",
            training=llm_training(
                settings,
                steps=steps,
                batch_size=size,
                learning_rate=settings["onerec_think_learning_rate"],
                warmup_share=WARMUP_SHARE,
                seed=seed,
            ),
            part_weights={"trace": 1.0, "item": 1.0},
            max_length=max(lengths),
            trie=sid_trie(settings, tokenizer, catalog),
            say=context.say,
        )
    }
    model = merged(model)
    if with_traces and reinforces(settings):
        model, logs["rl"] = reinforce(context, model, tokenizer, maker, positions)
    if RANK == 0:
        save_language_model(model, tokenizer, context.folder / "model")
        reasoning = "after a reasoning text" if with_traces else "without reasoning"
        write_model_card(
            context,
            purpose=f"the semantic ID of the next item {reasoning} (OneRec-Think)",
            method=context.stage,
            settings=("llm", "onerec_think_"),
            excluded=EXCLUDED,
        )
        write_json(context.folder / "log.json", logs)
        (context.folder / "sample.txt").write_text(tokenizer.decode(examples[0].input_ids) + "\n", encoding="utf-8")
    return {
        "texts": len(positions),
        "steps": steps,
        "tokens": sum(lengths),
        **{f"{part}_{when}": log[line] for part, log in logs.items() for when, line in (("first", 0), ("last", -1))},
    }


def training_positions(sequences: Sequence[Sequence[int]], *, seed: int) -> list[Position]:
    """Return every history of at least one item with its next item, in random order.

    >>> sorted(training_positions([[5, 6, 7], [9]], seed=0))
    [((5,), 6), ((5, 6), 7)]
    """
    positions = [(tuple(items[:place]), items[place]) for items in sequences for place in range(1, len(items))]
    random.Random(seed).shuffle(positions)
    return positions


def sentence(item: Item) -> str:
    """Return the trace of variant `public`: one sentence with the item's category, or its title without a category."""
    return f" Next is {kind(item) or shorten(item.title, 30) or plain_text(item.token)}. "


def training_example(
    maker: PromptMaker,
    tokenizer: Any,
    history: Sequence[int],
    target: Item,
    trace: str,
    max_trace: int,
) -> Example:
    """Return prompt, trace and item as token ids with the part of each token.

    Prompt tokens have no loss. Part 1 is the trace and its end, part 2 the codes of the item. `<think>`,
    `<|sid_begin|>` and `<|sid_end|>` are determined and have no loss. Without a trace, or with `max_trace` 0, the item
    follows the prompt. A longer trace is cut at the limit, as in generation.
    """
    head = prompt_ids(maker, tokenizer, history)
    trace_ids, sid = encode(trace, tokenizer), encode(sid_text(target.sid), tokenizer)
    thought: list[int] = []
    parts: list[int] = []
    if trace and max_trace:
        trace_ids = trace_ids[: max_trace - 1]
        begin, end = tokenizer.convert_tokens_to_ids([THINK, END_OF_THINK])
        thought, parts = [begin, *trace_ids, end], [0, *[TRACE] * len(trace_ids), TRACE]
    return Example(input_ids=[*head, *thought, *sid], parts=[*[0] * len(head), *parts, 0, *[ITEM] * (len(sid) - 2), 0])


def rationales(context: Context, maker: PromptMaker, positions: Sequence[Position]) -> list[str]:
    """Return a trace for each history and next item, written by the mid-trained model, which sees both."""
    settings, file = context.settings, context.folder / "rationales.jsonl"
    written = file.is_file()  # by an earlier start of this stage
    wait_for_all()
    if written:
        return [line["rationale"] for line in read_lines(file)]
    model, tokenizer = load_model(context.folders[whole_midtrain(settings)])
    seed = derive_seed(settings["seed"], "onerec_think", "rationales")
    add_tokens(model, tokenizer, [THINK, END_OF_THINK], seed)
    embeddings = read_embeddings(context.folders["embeddings"])
    prompts = []
    for history, target in positions:
        similar = most_similar(history, target, embeddings, settings["onerec_think_similar"])
        prompt = rationale_prompt(maker, tokenizer, similar, target)
        prompts.append([*prompt, tokenizer.convert_tokens_to_ids(THINK)])
    completions = share(
        prompts,
        lambda part: generate_rankings(
            model,
            part,
            [[0.0]] * len(part),
            grammar=trace_grammar(tokenizer, settings),
            temperature=settings["onerec_think_temperature"],
            seed=seed,
            batch_size=settings["eval_batch_lists"],
            bf16=use_bf16(settings, model.device.type),
        ),
    )
    texts = (" ".join(tokenizer.decode(ids[:-3], skip_special_tokens=True).split()) for ids in completions)
    if RANK == 0:
        write_lines(
            file,
            (
                {"history": history, "target": target, "rationale": f" {text} "}
                for (history, target), text in zip(positions, texts, strict=True)
            ),
        )
    wait_for_all()
    return [line["rationale"] for line in read_lines(file)]


def most_similar(history: Sequence[int], target: int, embeddings: np.ndarray, count: int) -> tuple[int, ...]:
    """Return the `count` history items whose text embeddings are most similar to the target's, oldest first.

    Args:
        history: item ids.
        target: item id.
        embeddings: text embeddings of all items, (N, D). The similarity is the cosine.
        count: number of items.

    >>> most_similar((1, 2, 3), 4, np.array([[0.0, 1], [2, 0], [1, 1], [3, 0]]), 2)
    (2, 3)
    """
    past = embeddings[np.asarray(history) - 1]
    scale = np.linalg.norm(past, axis=1).clip(1e-12)
    nearest = np.argsort(-(past @ embeddings[target - 1]) / scale, kind="stable")[:count]
    return tuple(history[place] for place in sorted(nearest))


def rationale_prompt(maker: PromptMaker, tokenizer: Any, history: Sequence[int], target: int) -> list[int]:
    """Return the chat prompt that asks for a rationale. It contains the target, because its answer is training data."""
    items = "\n".join(describe(maker.fields(item)) for item in history)
    text = f"{PERSONA}\n{items}\nNext the shopper took {describe(maker.fields(target))}. Say why, in one sentence."
    return encode_chat([{"role": "user", "content": text}], tokenizer)


def reinforce(
    context: Context,
    model: PreTrainedModel,
    tokenizer: Any,
    maker: PromptMaker,
    positions: Sequence[Position],
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """Return the model after GRPO with the Rollout-Beam reward on the training histories, and the log."""
    from copy import deepcopy

    from recbole_gr2.llm.checkpoints import last_checkpoint
    from recbole_gr2.llm.dapo_config import dapo_config
    from recbole_gr2.llm.onerec_trainer import RolloutBeamTrainer

    settings, folder = context.settings, context.folder / "checkpoints" / "rl"
    codes = maker.catalog.sids
    think = tokenizer.convert_tokens_to_ids(THINK)
    prompts, requests = [], {}
    for number, (history, target) in enumerate(positions):
        name = f"train/{number}"
        prompts.append(
            {
                "request_id": name,
                "prompt_ids": [*prompt_ids(maker, tokenizer, history), think],
                "label_items": [target],
                "label_prior": [0.0],
            }
        )
        requests[name] = Request(  # the only label of the grammar stands for the target, whatever the trace contains
            request_id=name,
            user_token="",
            split="train",
            history=tuple(history),
            target=target,
            provider="",
            candidates=(Candidate(item_id=target, score=0.0, rank=1),),
        )
    seed = derive_seed(settings["seed"], "onerec_think", "rl")
    seed_everything(seed)
    config = dapo_config(
        str(folder),
        steps=settings["onerec_think_rl_steps"],
        prompts_per_step=settings["onerec_think_rl_prompts_per_step"],
        num_generations=settings["onerec_think_rl_num_generations"],
        num_iterations=1,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        micro_batch_size=settings["llm_micro_batch_size"],
        gradient_checkpointing=settings["llm_gradient_checkpointing"],
        learning_rate=settings["onerec_think_rl_learning_rate"],
        mask_truncated=False,
        bf16=use_bf16(settings, model.device.type),
        seed=seed,
        save_steps=settings["rl_save_steps"],
        use_cpu=model.device.type == "cpu",
        processes=WORLD_SIZE,
    )
    reference = deepcopy(model)
    model = with_lora(model, settings["llm_lora_rank"], new_tokens(tokenizer))
    trainer = RolloutBeamTrainer(
        model,
        config,
        prompts,
        requests=requests,
        grammar=trace_grammar(tokenizer, settings),
        tokenizer=tokenizer,
        trie=SidTrie.of(tokenizer, codes),
        codes=torch.from_numpy(codes),
        beams=settings["onerec_think_rl_beams"],
        constrained=settings["mid_constrained"],
        reference=reference,
        kl=settings["onerec_think_rl_kl"],
        callbacks=[
            ProgressLines(context.say, ("reward", "frac_groups_kept", "kl", "completions/mean_length")),
            FiniteLoss(),
        ],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    return merged(model), [line for line in trainer.state.log_history if "reward" in line]


def check_settings(settings: Settings) -> None:
    """Check that the processes can share a step."""
    for name in ("onerec_think_batch_size", "onerec_think_rl_prompts_per_step"):
        check_shares(name, settings[name])


def check_data(settings: Settings, data: Data) -> None:
    """Check that the processes can run GRPO, if it is a part of the stage."""
    if reinforces(settings):
        check_replicas("GRPO (onerec_think_rl_steps)")


def reinforces(settings: Settings) -> bool:
    """Return whether the model with traces is trained with GRPO after the fine-tuning."""
    return settings["onerec_think_variant"] == "paper" and settings["onerec_think_rl_steps"] > 0


def key_values(settings: Settings) -> dict[str, Any]:
    """Return the hash of the prompt template, and whether the model trains in bfloat16."""
    return {"prompt_template": load_template(settings["prompt_template"]).sha, **resolved_bf16(settings)}


def stages(settings: Settings) -> list[Stage]:
    """Declare the two models."""
    return [
        Stage(
            name=name,
            version=3,
            run=run,
            settings=("onerec_think_", "prompt_", "llm_lora_rank", "llm_bf16", "llm_micro_batch_size", "seed"),
            excluded=EXCLUDED,
            needs=("embeddings", "tokenizer", whole_midtrain(settings)),
            check=check_settings,
            check_data=check_data if reasons(name) else lambda settings, data: None,
            key_values=key_values,
            distributed=True,
        )
        for name in ONEREC_THINK.values()
    ]
