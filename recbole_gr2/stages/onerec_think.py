"""OneRec-Think (arXiv 2510.11639), a baseline: the mid-trained model learns to name the next item behind a trace.

Mid-training is its itemic alignment. `onerec_think` is fine-tuned from it to answer a history with `<think> trace
</think>` and the semantic ID of the next item, `onerec_think-no-think` on the same prompts to answer with the ID alone.

* `public`, its released code: a trace is one sentence that names the kind of the next item.
* `paper`: a trace is a rationale that the mid-trained model itself writes, knowing the next item and the items of the
  history that are most like it; then GRPO on traces of the model's own, paid by the Rollout-Beam reward.

Each re-ranks lists by the likelihood of the candidates' IDs behind each sampled trace. As the baselines `OneRecThink`
and `OneRecThink-no-think` they recommend from the whole catalogue by beam search there. An item counts with its best
trace, as the released code removes duplicates.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from transformers.trainer_utils import get_last_checkpoint

from recbole_gr2.generator import ONEREC_THINK, Generator
from recbole_gr2.llm.adapter import merged, with_lora
from recbole_gr2.llm.backbone import add_tokens, save_backbone
from recbole_gr2.llm.beam import SidTrie
from recbole_gr2.llm.constraint import Grammar
from recbole_gr2.llm.finetune import ProgressLines, Row, finetune
from recbole_gr2.llm.rollout import generate_rankings
from recbole_gr2.prompts import PromptMaker, kind, recent, sequential_ids, shorten
from recbole_gr2.seeding import derive_seed, seed_everything
from recbole_gr2.sid.tokens import SID_BEGIN, sid_text
from recbole_gr2.stages import Context
from recbole_gr2.stages.embeddings import load_embeddings
from recbole_gr2.stages.midtrain import (
    PERSONA,
    code_choices,
    describe,
    learnt_histories,
    load_stage_model,
    new_tokens,
    sid_log_likelihood,
    use_bf16,
)
from recbole_gr2.stages.tokenizer import load_items
from recbole_gr2.store import read_lines, write_json, write_lines
from recbole_gr2.types import Candidate, Item, Request

THINK, END_OF_THINK = "<think>", "</think>"
SHOWN = 30  # items of a history that stand as semantic IDs, the last ones: about as many as mid-training shows at once
TRACE, ITEM = 1, 2


def run(context: Context) -> dict:
    """Fine-tunes the mid-trained model, with traces or without as the stage's name says.

    Writes model/, log.json and sample.txt; rationales.jsonl and rollouts under `paper`.
    """
    items = load_items(context.folders["tokenizer"], context.data.items)
    settings, think = context.settings, thinks(context.stage)
    maker = prompt_maker(settings, items)
    seed = derive_seed(settings["seed"], "onerec_think")  # of both models: they learn the same histories
    drawn = training_positions(learnt_histories(context.data, settings), seed=seed)
    size = settings["ort_batch_size"]
    steps = min(settings["ort_steps"], math.ceil(settings["ort_passes"] * len(drawn) / size))
    drawn = drawn[: steps * size]
    if not think:
        traces = [""] * len(drawn)
    elif settings["ort_variant"] == "public":
        traces = [sentence(items[target - 1]) for _, target in drawn]
    else:
        traces = rationales(context, maker, drawn)
    context.say(f"{len(drawn):,} histories" + (f", e.g. {traces[0]!r}" if think else ""))
    model, tokenizer = load_stage_model(context, "midtrain")
    if think:
        add_tokens(model, tokenizer, [THINK, END_OF_THINK], seed)
    rows = [
        training_row(maker, tokenizer, history, items[target - 1], trace, settings["ort_max_trace"])
        for (history, target), trace in zip(drawn, traces, strict=True)
    ]
    lengths = [len(row.input_ids) for row in rows]
    context.say(f"{sum(lengths) / len(lengths):.0f} tokens on average, {max(lengths)} at most")
    seed_everything(seed)
    model = with_lora(model, settings["llm_lora_rank"], new_tokens(tokenizer))
    logs = {
        "sft": finetune(
            model,
            tokenizer,
            rows,
            context.folder / "checkpoints" / "sft",
            part_weights={"trace": settings["ort_trace_weight"], "item": 1.0},
            steps=steps,
            batch_size=size,
            micro_batch_size=settings["ort_micro_batch_size"],
            learning_rate=settings["ort_learning_rate"],
            warmup_share=settings["ort_warmup_share"],
            max_length=max(lengths),
            seed=seed,
            bf16=use_bf16(settings, model.device.type),
            save_steps=settings["ort_save_steps"],
            trie=code_choices(settings, tokenizer, items),
            say=context.say,
        )
    }
    model = merged(model)
    if think and settings["ort_variant"] == "paper" and settings["ort_rl_steps"]:
        model, logs["rl"] = reinforce(context, model, tokenizer, maker, drawn)
    save_backbone(model, tokenizer, context.folder / "model")
    write_json(context.folder / "log.json", logs)
    (context.folder / "sample.txt").write_text(tokenizer.decode(rows[0].input_ids) + "\n", encoding="utf-8")
    return {
        "texts": len(drawn),
        "steps": steps,
        "tokens": sum(lengths),
        **{f"{stage}_{when}": log[line] for stage, log in logs.items() for when, line in (("first", 0), ("last", -1))},
    }


def thinks(name: str) -> bool:
    """Whether a row or recommender is the one with traces."""
    return not name.endswith("-no-think")


# --- training --------------------------------------------------------------------------------------------------------


def training_positions(sequences: Sequence[Sequence[int]], *, seed: int) -> list[tuple[tuple[int, ...], int]]:
    """Every (history, next item) of the sequences in random order; each history has an item or more.

    >>> sorted(training_positions([[5, 6, 7], [9]], seed=0))
    [((5,), 6), ((5, 6), 7)]
    """
    found = [(tuple(items[:place]), items[place]) for items in sequences for place in range(1, len(items))]
    random.Random(seed).shuffle(found)
    return found


def prompt_maker(settings: Mapping, items: Sequence[Item]) -> PromptMaker:
    """How items are shown; `ort_texts` of a history have their text."""
    return replace(PromptMaker.of(settings, items), history=settings["ort_texts"])


def sentence(item: Item) -> str:
    """The trace of the public variant: one sentence with the item's category, or its title where there is none."""
    return f" Next is {kind(item) or shorten(item.title, 30) or item.token}. "


def training_row(
    maker: PromptMaker, tokenizer, history: Sequence[int], target: Item, trace: str, max_trace: int
) -> Row:
    """Prompt, trace and item as tokens: no loss on the prompt, part 1 on the trace and its end, part 2 on the codes.

    Without a trace, or at `max_trace` 0, the item follows on the prompt. `<think>`, `<|sid_begin|>` and `<|sid_end|>`
    stand where nothing else may, so they carry no loss. A longer trace ends at its limit, as it would in generation.
    """
    head = prompt_ids(maker, tokenizer, history)
    said, sid = tokenizer([trace, sid_text(target.sid)], add_special_tokens=False)["input_ids"]
    thought, parts = [], []
    if trace and max_trace:
        said = said[: max_trace - 1]
        begin, end = tokenizer.convert_tokens_to_ids([THINK, END_OF_THINK])
        thought, parts = [begin, *said, end], [0, *[TRACE] * len(said), TRACE]
    return Row(input_ids=[*head, *thought, *sid], parts=[*[0] * len(head), *parts, 0, *[ITEM] * (len(sid) - 2), 0])


def prompt_ids(maker: PromptMaker, tokenizer, history: Sequence[int]) -> list[int]:
    """Token ids of a history, up to where the next item begins: its last items with their texts, as mid-training's
    persona task writes them, then all of them as semantic IDs, as its sequential task does.

    Piece by piece, as in mid-training: a whole text could be cut into other tokens.
    """
    texts = (f"\n{describe(maker.shown(item))}" for item in recent(history, maker.history))
    pieces = tokenizer([PERSONA, *texts, "\n"], add_special_tokens=False)["input_ids"]
    return [token for ids in pieces for token in ids] + sequential_ids(recent(history, SHOWN), maker.items, tokenizer)


def rationales(context: Context, maker: PromptMaker, drawn: Sequence[tuple[Sequence[int], int]]) -> list[str]:
    """A trace for each (history, next item), in the words of the mid-trained model, which is told both."""
    settings, file = context.settings, context.folder / "rationales.jsonl"
    if file.is_file():  # it is written whole
        return [line["rationale"] for line in read_lines(file)]
    model, tokenizer = load_stage_model(context, "midtrain")
    seed = derive_seed(settings["seed"], "onerec_think", "rationales")
    add_tokens(model, tokenizer, [THINK, END_OF_THINK], seed)
    embeddings = load_embeddings(context)
    asked = [
        [
            *rationale_prompt(
                maker, tokenizer, most_similar(history, target, embeddings, settings["ort_similar"]), target
            ),
            tokenizer.convert_tokens_to_ids(THINK),
        ]
        for history, target in drawn
    ]
    grammar = Grammar.of(tokenizer, END_OF_THINK, [SID_BEGIN], settings["ort_max_trace"])
    completions = generate_rankings(
        model,
        asked,
        [[0.0]] * len(asked),
        grammar=grammar,
        temperature=settings["ort_temperature"],
        seed=seed,
        batch_size=settings["eval_batch_lists"],
        bf16=use_bf16(settings, model.device.type),
    )
    words = (tokenizer.decode(ids[:-3], skip_special_tokens=True) for ids in completions)
    write_lines(
        file,
        (
            {"history": history, "target": target, "rationale": f" {' '.join(said.split())} "}
            for (history, target), said in zip(drawn, words, strict=True)
        ),
    )
    return [line["rationale"] for line in read_lines(file)]


def most_similar(history: Sequence[int], target: int, embeddings: np.ndarray, count: int) -> tuple[int, ...]:
    """The `count` items of a history whose text embeddings (N, D) are nearest to the target's by cosine, in time order.

    >>> most_similar((1, 2, 3), 4, np.array([[0.0, 1], [2, 0], [1, 1], [3, 0]]), 2)
    (2, 3)
    """
    past = embeddings[np.asarray(history) - 1]
    scale = np.linalg.norm(past, axis=1).clip(1e-12)
    nearest = np.argsort(-(past @ embeddings[target - 1]) / scale, kind="stable")[:count]
    return tuple(history[place] for place in sorted(nearest))


def rationale_prompt(maker: PromptMaker, tokenizer, history: Sequence[int], target: int) -> list[int]:
    """The request for a rationale as a chat prompt. It names the target: what it gives is training data."""
    shown = "\n".join(describe(maker.shown(item)) for item in history)
    text = f"{PERSONA}\n{shown}\nNext the shopper took {describe(maker.shown(target))}. Say why, in one sentence."
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def reinforce(context: Context, model, tokenizer, maker: PromptMaker, drawn: Sequence[tuple[Sequence[int], int]]):
    """(model, log) after GRPO with the Rollout-Beam reward on the histories that were learnt."""
    from copy import deepcopy

    from recbole_gr2.llm.dapo import dapo_config
    from recbole_gr2.llm.rollout_beam import RolloutBeamTrainer

    settings, folder = context.settings, context.folder / "checkpoints" / "rl"
    grammar = Grammar.of(tokenizer, END_OF_THINK, [SID_BEGIN], settings["ort_max_trace"])
    codes = np.array([item.sid for item in maker.items])
    think, rows, requests = tokenizer.convert_tokens_to_ids(THINK), [], {}
    for number, (history, target) in enumerate(drawn):
        name = f"train/{number}"
        rows.append(
            {
                "request_id": name,
                "prompt_ids": [*prompt_ids(maker, tokenizer, history), think],
                "label_items": [target],
                "label_prior": [0.0],
            }
        )
        requests[name] = Request(  # the grammar's one label stands for the target, whatever the trace says
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
        steps=settings["ort_rl_steps"],
        prompts_per_step=settings["ort_rl_prompts_per_step"],
        num_generations=settings["ort_rl_num_generations"],
        num_iterations=1,
        epsilon_high=0.2,  # GRPO: as epsilon_low
        micro_batch_size=settings["ort_rl_micro_batch_size"],
        learning_rate=settings["ort_rl_learning_rate"],
        mask_truncated=False,
        bf16=use_bf16(settings, model.device.type),
        seed=seed,
        save_steps=settings["ort_rl_save_steps"],
        use_cpu=model.device.type == "cpu",
    )
    config.save_total_limit = 1
    reference = deepcopy(model)
    trainer = RolloutBeamTrainer(
        with_lora(model, settings["llm_lora_rank"], new_tokens(tokenizer)),
        config,
        rows,
        requests=requests,
        grammar=grammar,
        tokenizer=tokenizer,
        trie=SidTrie.of(tokenizer, codes),
        codes=torch.from_numpy(codes),
        beams=settings["ort_rl_beams"],
        constrained=settings["mid_constrained"],
        reference=reference,
        kl=settings["ort_rl_kl"],
        callbacks=[ProgressLines(context.say, ("reward", "frac_groups_kept", "kl", "completions/mean_length"))],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    return merged(trainer.model), [line for line in trainer.state.log_history if "reward" in line]


# --- use -------------------------------------------------------------------------------------------------------------


def prompts(
    model, tokenizer, maker: PromptMaker, settings: Mapping, think: bool, histories: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Token ids behind which the next item is named: B histories -> B * S prompts, S traces of a history side by side.

    A trace is a completion under the answer's grammar whose only label is `<|sid_begin|>`: free words, `</think>`, and
    then the item. It depends on seed, history and its number alone. Without traces S is 1.
    """
    heads = [prompt_ids(maker, tokenizer, history) for history in histories]
    if not think or not settings["ort_max_trace"]:
        return heads
    grammar = Grammar.of(tokenizer, END_OF_THINK, [SID_BEGIN], settings["ort_max_trace"])
    samples = settings["ort_samples"]
    begun = [[*head, tokenizer.convert_tokens_to_ids(THINK)] for head in heads]
    completions = generate_rankings(
        model,
        begun,
        [[0.0]] * len(begun),
        grammar=grammar,
        num_generations=samples,
        temperature=settings["ort_temperature"],
        batch_size=settings["eval_batch_lists"],
        seed=derive_seed(settings["seed"], "onerec_think"),
        bf16=use_bf16(settings, model.device.type),
    )
    ends = (tokenizer.convert_tokens_to_ids(SID_BEGIN), grammar.eos_id)
    assert all(tuple(completion[-2:]) == ends for completion in completions)
    return [begun[number // samples] + completion[:-2] for number, completion in enumerate(completions)]


def recommender(context: Context, items: Sequence[Item]) -> Generator:
    """The trained model of the baseline that the stage is named after, as a recommender over the whole catalogue."""
    settings = context.settings
    model, tokenizer = load_stage_model(context, ONEREC_THINK[context.stage])
    return Generator(
        name=context.stage,
        model=model,
        tokenizer=tokenizer,
        data=context.data,
        exclude_seen=settings["cand_exclude_seen"],
        facts={"model": context.stage, "hold_out": settings["mid_hold_out"]},
        items=items,
        beams=settings["ort_beams"],
        constrained=settings["mid_constrained"],
        batch_size=settings["eval_batch_lists"],
        bf16=use_bf16(settings, model.device.type),
        prompts=partial(prompts, model, tokenizer, prompt_maker(settings, items), settings, thinks(context.stage)),
    )


def candidate_scores(
    context: Context, items: Sequence[Item], requests: Sequence[Request], row: str
) -> list[list[float]]:
    """Log-likelihood of each candidate's codes behind the prompt, B lists of K: of several traces its best.

    It is the log-probability that the beam search gives the same item.
    """
    settings = context.settings
    model, tokenizer = load_stage_model(context, row)
    heads = prompts(
        model,
        tokenizer,
        prompt_maker(settings, items),
        settings,
        thinks(row),
        [request.history for request in requests],
    )
    samples = len(heads) // max(len(requests), 1)
    lists = [request.items for request in requests for _ in range(samples)]
    scores = sid_log_likelihood(model, tokenizer, settings, items, heads, lists)
    return [np.max(scores[n * samples : (n + 1) * samples], axis=0).tolist() for n in range(len(requests))]
