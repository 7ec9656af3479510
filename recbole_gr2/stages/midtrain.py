"""Mid-training: a language model learns what semantic IDs stand for and how they follow on each other.

Three tasks of next-token prediction (GR2 section 3): `sequential`, a user's history as IDs; `persona`, the same with
titles and categories between the IDs; `caption`, an ID and its text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

import torch

from recbole_gr2.errors import ConfigurationError, GateError
from recbole_gr2.llm.adapter import merged, with_lora
from recbole_gr2.llm.backbone import RANDOM, best_dtype, load_backbone, load_saved, save_backbone
from recbole_gr2.llm.finetune import Row, finetune
from recbole_gr2.prompts import PromptMaker, kind
from recbole_gr2.seeding import derive_seed, seed_everything
from recbole_gr2.sid.tokens import SID_BEGIN, added_tokens, sid_text
from recbole_gr2.stages import Context
from recbole_gr2.stages.tokenizer import load_items
from recbole_gr2.store import write_json
from recbole_gr2.teachers import phrases
from recbole_gr2.types import Candidate, Item, Request

SEQUENTIAL = "Items in the order in which one shopper took them: "


def run(context: Context) -> dict:
    """Writes model/, log.json and samples.json.

    Raises:
        GateError: the loss is not finite, or the rows of the new tokens did not move.
    """
    settings = context.settings
    items = load_items(context.folders["tokenizer"], context.data.items)
    histories = [
        tuple(map(int, sequence[:-1] if settings["mid_hold_out"] else sequence))
        for sequence in context.data.train_sequences().values()
    ]
    seed = derive_seed(settings["seed"], "midtrain")
    seed_everything(seed)
    model, tokenizer = load_backbone(
        settings["llm"], layers=settings["llm_layers"], seed=seed, random_config=settings["llm_random"],
        corpus=corpus(items, settings), trim=settings["llm_trim_vocabulary"] and settings["llm"] != RANDOM,
        extra_tokens=added_tokens(settings["sid_levels"], settings["sid_codes"], settings["cand_num"]),
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    context.say(f"{settings['llm']}: {parameters / 1e6:.1f} M parameters, {len(tokenizer):,} tokens")
    rows = mixture(items, histories, tokenizer, settings, seed)
    before = model.get_input_embeddings().weight[new_tokens(tokenizer)].detach().clone()
    bf16 = use_bf16(settings, device)
    model = with_lora(model, settings["llm_lora_rank"], new_tokens(tokenizer))
    log = finetune(
        model, tokenizer, [row for task in rows.values() for row in task], context.folder / "checkpoints",
        part_weights={"text": 1.0}, batch_size=settings["mid_batch_size"],
        micro_batch_size=settings["mid_micro_batch_size"], learning_rate=settings["mid_learning_rate"],
        warmup_share=settings["mid_warmup_share"], max_length=settings["mid_max_length"], seed=seed, bf16=bf16,
        save_steps=settings["mid_save_steps"], say=context.say,
    )  # fmt: skip
    model = merged(model)
    moved = (model.get_input_embeddings().weight[new_tokens(tokenizer)] - before).norm(dim=1)
    if not bool((moved > 0).any()):
        raise GateError("the rows of the new tokens did not change", where="midtrain", do="raise mid_learning_rate")
    save_backbone(model, tokenizer, context.folder / "model")
    write_json(context.folder / "log.json", log)
    write_json(context.folder / "samples.json", {task: tokenizer.decode(r[0].input_ids) for task, r in rows.items()})
    return {
        "parameters": parameters,
        "vocabulary": len(tokenizer),
        "bf16": bf16,
        "tokens": {task: sum(len(row.input_ids) for row in r) for task, r in rows.items()},
        "texts": {task: len(r) for task, r in rows.items()},
        "loss_first": log[0]["loss"],
        "loss_last": log[-1]["loss"],
        "new_rows_moved": float((moved > 0).float().mean()),
    }


def new_tokens(tokenizer) -> list[int]:
    """Ids of the tokens that this package added: they are the last ones of the vocabulary."""
    return list(range(tokenizer.convert_tokens_to_ids(SID_BEGIN), len(tokenizer)))


def use_bf16(settings: Mapping, device: str) -> bool:
    """Whether to train and generate under bfloat16 autocast."""
    return best_dtype(device) == "bf16" if settings["llm_bf16"] is None else settings["llm_bf16"]


def load_stage_model(context: Context, stage: str):
    """(model, tokenizer) that a stage wrote, on the device of this machine."""
    model, tokenizer = load_saved(context.folders[stage] / "model")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def mixture(items: Sequence[Item], histories: Sequence[Sequence[int]], tokenizer, settings: Mapping, seed: int
            ) -> dict[str, list[Row]]:  # fmt: skip
    """Texts of every task as rows, drawn without replacement until the task's share of `mid_tokens` is filled.

    A task with fewer texts than its share is used up once and said so by the token counts of the stage's facts.

    Raises:
        ConfigurationError: an unknown task.
    """
    tasks = {"sequential": sequential_texts, "persona": persona_texts, "caption": caption_texts}
    unknown = set(settings["mid_mix"]) - set(tasks)
    if unknown:
        raise ConfigurationError(f"unknown tasks {sorted(unknown)}", where="mid_mix", do=f"choose from {list(tasks)}")
    mixed = {}
    for task, share in settings["mid_mix"].items():
        texts = list(tasks[task](items, histories, settings))
        random.Random(derive_seed(seed, task)).shuffle(texts)
        room, rows = share / sum(settings["mid_mix"].values()) * settings["mid_tokens"], []
        for text in texts:
            for ids in fitting(text, tokenizer, settings["mid_max_length"]):
                rows.append(Row(input_ids=ids, parts=[1] * len(ids)))
                room -= len(ids)
            if room <= 0:
                break
        mixed[task] = rows
    return mixed


def fitting(text: Sequence[str], tokenizer, max_length: int) -> Iterator[list[int]]:
    """Token ids of a text given as pieces, in as many texts of at most `max_length` tokens as it takes.

    The first piece is repeated in front of each; pieces are never cut, but for one that is too long by itself, which
    ends at the limit.
    """
    pieces = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in text]
    head, end = pieces[0], [tokenizer.eos_token_id]
    room, ids = max_length - len(head) - 1, []
    for piece in pieces[1:]:
        piece = piece[:room]
        if ids and len(ids) + len(piece) > room:
            yield head + ids + end
            ids = []
        ids = ids + piece
    if ids:
        yield head + ids + end


def sequential_texts(items: Sequence[Item], histories, settings) -> Iterator[list[str]]:
    """A history as semantic IDs alone."""
    for history in histories:
        if len(history) > 1:
            yield [SEQUENTIAL, *(sid_text(items[i - 1].sid) for i in history)]


def persona_texts(items: Sequence[Item], histories, settings) -> Iterator[list[str]]:
    """A history as semantic IDs, each followed by its text."""
    show = PromptMaker.of(settings, items).shown
    for history in histories:
        if history:
            yield ["A shopper took", *(f"\n{describe(show(i))}" for i in history)]


def caption_texts(items: Sequence[Item], histories, settings) -> Iterator[list[str]]:
    """One item's semantic ID and its text."""
    show = PromptMaker.of(settings, items).shown
    for item in items:
        yield ["The item", f" {describe(show(item.item_id))}"]


def describe(shown: Mapping[str, str]) -> str:
    """An item in words."""
    text = f"{shown['sid']}, its title is {shown['title']}"
    if shown["category"]:
        text += f", its category is {shown['category']}"
    if shown["brand"]:
        text += f", its brand is {shown['brand']}"
    return text


def corpus(items: Sequence[Item], settings: Mapping) -> list[str]:
    """Every text that later stages may show, without semantic IDs: what a trimmed vocabulary has to cover."""
    from dataclasses import replace

    plain = [replace(item, sid=()) for item in items]
    size, texts = settings["cand_num"], [SEQUENTIAL, *phrases()]
    maker = replace(PromptMaker.of(settings, plain), history=size)  # whatever a prompt will show of it
    for start in range(0, len(plain), size):
        block = [item.item_id for item in plain[start : start + size]]
        request = Request(
            request_id="corpus", user_token="", split="train", history=tuple(block), target=block[0],
            provider="",
            candidates=tuple(Candidate(item_id=i, score=0.0, rank=r) for r, i in enumerate(block, start=1)),
        )  # fmt: skip
        texts += [message["content"] for message in maker.render(request).messages]
    texts += ["".join(text) for text in caption_texts(plain, (), settings)]
    texts += [f" {kind(item)}; {item.brand}; {kind(item).lower()}" for item in plain]
    return texts
