"""Mid-training: a language model learns what semantic IDs stand for and how they follow on each other.

Four tasks of next-token prediction (GR2 section 3): `sequential`, a user's history as IDs; `persona`, the same with
titles and categories between the IDs; `caption`, an ID and its text; `general`, plain English, so that the language
stays. Two phases (OneRec-Think, section 3.1): first the embeddings of the new tokens alone on the persona task, with
the rest frozen; then everything (or LoRA) on the mix.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from recbole_gr2.errors import ConfigurationError, GateError, MissingFileError
from recbole_gr2.evidence import PROVIDERS, fact_names
from recbole_gr2.llm.adapter import merged, new_rows_alone, with_lora
from recbole_gr2.llm.backbone import RANDOM, best_dtype, load_backbone, load_saved, save_backbone, start_from_codebooks
from recbole_gr2.llm.beam import SidTrie
from recbole_gr2.llm.finetune import Row, finetune
from recbole_gr2.llm.likelihood import continuation_log_likelihood, perplexity
from recbole_gr2.prompts import SEQUENTIAL, PromptMaker, kind, templates_for
from recbole_gr2.seeding import derive_seed, seed_everything
from recbole_gr2.sid.tokens import SID_BEGIN, added_tokens, code_tokens, sid_text
from recbole_gr2.stages import Context
from recbole_gr2.stages.tokenizer import load_codebooks, load_items
from recbole_gr2.store import write_json
from recbole_gr2.teachers import phrases
from recbole_gr2.types import Candidate, Item, Request

PARAGRAPH = 120  # characters of the shortest paragraph that counts as text
PERSONA = "A shopper took"  # opens a persona text
HELD_OUT = 40  # paragraphs of plain text that perplexity is measured on


def run(context: Context) -> dict:
    """Writes model/, log.json and samples.json.

    Raises:
        GateError: the loss is not finite, or the rows of the new tokens did not move.
    """
    settings = context.settings
    items = load_items(context.folders["tokenizer"], context.data.items)
    histories = learnt_histories(context.data, settings)
    seed = derive_seed(settings["seed"], "midtrain")
    seed_everything(seed)
    learnt, held = general_texts(settings["mid_general"], settings["mid_tokens"] * share_of("general", settings), seed)
    model, tokenizer = load_backbone(
        settings["llm"],
        layers=settings["llm_layers"],
        seed=seed,
        random_config=settings["llm_random"],
        corpus=corpus(items, settings) + learnt + held,
        trim=settings["llm_trim_vocabulary"] and settings["llm"] != RANDOM,
        extra_tokens=added_tokens(settings["sid_levels"], settings["sid_codes"], settings["cand_num"]),
    )
    if settings["mid_codebooks"]:
        rows = tokenizer.convert_tokens_to_ids(code_tokens(settings["sid_levels"], settings["sid_codes"]))
        start_from_codebooks(model, torch.tensor(rows), load_codebooks(context.folders["tokenizer"], settings), seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    context.say(f"{settings['llm']}: {parameters / 1e6:.1f} M parameters, {len(tokenizer):,} tokens")
    bf16 = use_bf16(settings, device)
    unseen = [ids for text in held for ids in fitting(["", text], tokenizer, settings["mid_max_length"])]
    language = {"before": perplexity(model, unseen, pad_id=tokenizer.pad_token_id, bf16=bf16)}

    before = model.get_input_embeddings().weight[new_tokens(tokenizer)].detach().clone()
    common = {
        "batch_size": settings["mid_batch_size"],
        "micro_batch_size": settings["mid_micro_batch_size"],
        "warmup_share": settings["mid_warmup_share"],
        "max_length": settings["mid_max_length"],
        "seed": seed,
        "bf16": bf16,
        "save_steps": settings["mid_save_steps"],
        "say": context.say,
    }
    common["trie"] = code_choices(settings, tokenizer, items)
    texts = task_texts(items, histories, learnt, settings)
    longest = settings["mid_max_length"]
    first = mixture(texts, tokenizer, {"persona": 1.0}, settings["mid_embedding_tokens"], longest, seed)
    logs = []
    if first["persona"]:
        context.say(f"embeddings of the new tokens alone, {len(first['persona']):,} texts")
        with new_rows_alone(model, new_tokens(tokenizer)):
            logs += finetune(
                model,
                tokenizer,
                first["persona"],
                context.folder / "checkpoints" / "embeddings",
                part_weights={"persona": 1.0},
                learning_rate=settings["mid_embedding_learning_rate"],
                **common,
            )
    rows = mixture(texts, tokenizer, settings["mid_mix"], settings["mid_tokens"], longest, seed)
    context.say(f"all weights, {sum(map(len, rows.values())):,} texts")
    model = with_lora(model, settings["llm_lora_rank"], new_tokens(tokenizer))
    logs += finetune(
        model,
        tokenizer,
        [row for task in rows.values() for row in task],
        context.folder / "checkpoints" / "all",
        part_weights=dict.fromkeys(rows, 1.0),
        learning_rate=settings["mid_learning_rate"],
        **common,
    )
    model = merged(model)
    moved = (model.get_input_embeddings().weight[new_tokens(tokenizer)] - before).norm(dim=1)
    if not bool((moved > 0).any()):
        raise GateError("the rows of the new tokens did not change", where="midtrain", do="raise mid_learning_rate")
    language["after"] = perplexity(model, unseen, pad_id=tokenizer.pad_token_id, bf16=bf16)
    context.say(
        f"perplexity of {sum(map(len, unseen)):,} held-out tokens of plain text: "
        f"{language['before']:.1f} before, {language['after']:.1f} after"
    )
    save_backbone(model, tokenizer, context.folder / "model")
    write_json(context.folder / "log.json", logs)
    write_json(
        context.folder / "samples.json", {task: tokenizer.decode(r[0].input_ids) for task, r in rows.items() if r}
    )
    return {
        "parameters": parameters,
        "vocabulary": len(tokenizer),
        "bf16": bf16,
        "tokens": {task: sum(len(row.input_ids) for row in r) for task, r in rows.items()},
        "texts": {task: len(r) for task, r in rows.items()},
        "embedding_tokens": sum(len(row.input_ids) for row in first["persona"]),
        "loss_first": {k: v for k, v in logs[0].items() if k.startswith("loss")},
        "loss_last": {k: v for k, v in logs[-1].items() if k.startswith("loss")},
        "perplexity": language,
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
    return load_model(context.folders[stage])


def load_model(folder: Path):
    """(model, tokenizer) of a stage's folder, on the device of this machine."""
    model, tokenizer = load_saved(folder / "model")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def code_choices(settings: Mapping, tokenizer, items: Sequence[Item]) -> SidTrie | None:
    """What the codes of semantic IDs are chosen among, or None for the whole vocabulary."""
    return SidTrie.of(tokenizer, np.array([item.sid for item in items])) if settings["mid_constrained"] else None


def sid_log_likelihood(
    model,
    tokenizer,
    settings: Mapping,
    items: Sequence[Item],
    heads: Sequence[Sequence[int]],
    lists: Sequence[Sequence[int]],
) -> list[list[float]]:
    """Log-likelihood of the codes of B lists of K item ids, each behind its head (token ids): B lists of K numbers."""
    sids = [tokenizer(sid_text(item.sid), add_special_tokens=False)["input_ids"] for item in items]
    return continuation_log_likelihood(
        model,
        [[*head, sids[0][0]] for head in heads],
        [[sids[i - 1][1:-1] for i in own] for own in lists],
        pad_id=tokenizer.pad_token_id,
        batch_size=settings["eval_batch_lists"],
        bf16=use_bf16(settings, model.device.type),
        trie=code_choices(settings, tokenizer, items),
    )


def learnt_histories(data, settings: Mapping) -> list[list[int]]:
    """What language models learn of every user, oldest first: by `mid_hold_out` without targets of the train lists."""
    if settings["mid_hold_out"]:
        return data.open_sequences()
    return [sequence.tolist() for sequence in data.train_sequences().values()]


def share_of(task: str, settings: Mapping) -> float:
    """A task's share of the mix."""
    return settings["mid_mix"].get(task, 0.0) / sum(settings["mid_mix"].values())


def task_texts(
    items: Sequence[Item], histories: Sequence[Sequence[int]], general: Sequence[str], settings: Mapping
) -> dict[str, list[list[str]]]:
    """Every text of every task, as pieces.

    Raises:
        ConfigurationError: an unknown task in `mid_mix`.
    """
    tasks = {
        "sequential": list(sequential_texts(items, histories)),
        "persona": list(persona_texts(items, histories, settings)),
        "caption": list(caption_texts(items, settings)),
        "general": [["", text] for text in general],
    }
    unknown = set(settings["mid_mix"]) - set(tasks)
    if unknown:
        raise ConfigurationError(f"unknown tasks {sorted(unknown)}", where="mid_mix", do=f"choose from {list(tasks)}")
    return tasks


def mixture(
    texts: Mapping[str, Sequence[Sequence[str]]],
    tokenizer,
    mix: Mapping[str, float],
    tokens: int,
    max_length: int,
    seed: int,
) -> dict[str, list[Row]]:
    """Texts of each task as rows until the task's share of `tokens` is filled, in as many passes as that takes.

    A task's place in the alphabet, from 1, is the part of its rows, so that its loss is logged by itself.
    """
    mixed = {}
    for part, (task, share) in enumerate(sorted(mix.items()), start=1):
        drawn, shuffler = list(texts[task]), random.Random(derive_seed(seed, task))
        room, rows = share / sum(mix.values()) * tokens, []
        while room > 0 and drawn:
            shuffler.shuffle(drawn)
            for text in drawn:
                if room <= 0:
                    break
                for ids in fitting(text, tokenizer, max_length):
                    rows.append(Row(input_ids=ids, parts=[part] * len(ids)))
                    room -= len(ids)
        mixed[task] = rows
    return mixed


def general_texts(file: str | None, tokens: float, seed: int) -> tuple[list[str], list[str]]:
    """Paragraphs of plain English: (to learn, about `tokens` tokens; never learnt, to measure the language by).

    Args:
        file: a text file with paragraphs between blank lines; None takes the documentation that comes with Python.

    Raises:
        MissingFileError: the file is not there.
        ConfigurationError: it holds no paragraph.
    """
    if file is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    elif Path(file).is_file():
        text = Path(file).read_text(encoding="utf-8")
    else:
        raise MissingFileError(f"there is no text file {file}", where="mid_general", do="check its path")
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    paragraphs = [part for part in paragraphs if len(part) >= PARAGRAPH and part[0].isalpha()]
    if not paragraphs:
        raise ConfigurationError(
            f"no paragraph of {PARAGRAPH} characters",
            where=f"mid_general: {file}",
            do="give plain text with blank lines between paragraphs",
        )
    random.Random(derive_seed(seed, "general")).shuffle(paragraphs)
    held = paragraphs[: min(HELD_OUT, len(paragraphs) // 2 + 1)]
    learnt, room = [], 4 * tokens  # about four characters a token
    for part in paragraphs[len(held) :]:
        if room <= 0:
            break
        learnt.append(part)
        room -= len(part)
    return learnt, held


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


def sequential_texts(items: Sequence[Item], histories: Sequence[Sequence[int]]) -> Iterator[list[str]]:
    """A history as semantic IDs alone."""
    for history in histories:
        if len(history) > 1:
            yield [SEQUENTIAL, *(sid_text(items[i - 1].sid) for i in history)]


def persona_texts(items: Sequence[Item], histories: Sequence[Sequence[int]], settings: Mapping) -> Iterator[list[str]]:
    """A history as semantic IDs, each followed by its text."""
    show = PromptMaker.of(settings, items).shown
    for history in histories:
        if history:
            yield [PERSONA, *(f"\n{describe(show(i))}" for i in history)]


def caption_texts(items: Sequence[Item], settings: Mapping) -> Iterator[list[str]]:
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
            request_id="corpus",
            user_token="",
            split="train",
            history=tuple(block),
            target=block[0],
            provider="",
            candidates=tuple(Candidate(item_id=i, score=0.0, rank=r) for r, i in enumerate(block, start=1)),
        )
        texts += [message["content"] for message in maker.render(request).messages]
    every = {name: level % 10 for level, name in enumerate(fact_names(list(PROVIDERS)))}
    request = replace(request, facts=(every,) * len(request.items))
    for template in templates_for(settings["prompt_template"]):  # their own words; those of the items are there
        texts += [message["content"] for message in replace(maker, template=template).render(request).messages]
    texts += ["".join(text) for text in caption_texts(plain, settings)]
    texts += [f" {kind(item)}; {item.brand}; {kind(item).lower()}" for item in plain]
    return texts
