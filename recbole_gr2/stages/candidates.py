"""Candidates: the base model's top-K list of every row, without leakage.

* Valid and test lists come from the base model, trained on train rows alone. The target is never inserted.
* Train lists come from a hold-out base, trained without each user's last train interaction (the last `train_targets`),
  which is their target.
  Lists of a model that has seen the target rank it first far too often, and a re-ranker that is trained on them learns
  to keep the order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recbole_gr2.bridge.data import SPLITS
from recbole_gr2.bridge.models import BaseModel, train_base
from recbole_gr2.errors import ConfigurationError, GateError
from recbole_gr2.generator import GENERATOR, Generator
from recbole_gr2.llm.beam import UNREACHED
from recbole_gr2.model import READS_SIDS
from recbole_gr2.prompts import history_ids
from recbole_gr2.requests import read_requests, request_id, write_requests
from recbole_gr2.sid.tokens import MAX_CANDIDATES
from recbole_gr2.stages import Context
from recbole_gr2.stages.midtrain import load_stage_model, use_bf16
from recbole_gr2.stages.tokenizer import load_items
from recbole_gr2.store import write_json
from recbole_gr2.types import Candidate, Request


def run(context: Context) -> dict:
    """Writes base/, hold_out_base/ (weights), train.jsonl, valid.jsonl, test.jsonl and stats.json.

    Raises:
        ConfigurationError: K is below 2 or above the number of labels.
        GateError: recall@K of a split is 0, so that there is nothing to re-rank.
    """
    data, settings = context.data, context.settings
    if not 2 <= settings["cand_num"] <= MAX_CANDIDATES:
        raise ConfigurationError(
            f"cand_num is {settings['cand_num']}",
            why="a list has something to order, and a label for every candidate",
            do=f"choose 2 to {MAX_CANDIDATES}",
        )
    if settings["cand_file"]:
        lists, facts = _imported(context), {"imported": settings["cand_file"]}
    else:
        base = recommender(context, context.folder / "base", say=context.say)
        context.say(f"base model {base.name}: best epoch {base.facts['epochs']}, valid {base.facts.get('best_valid')}")
        context.say(f"hold-out base: {base.facts['epochs']} epochs without the targets of the train lists")
        hold_out = recommender(context, context.folder / "hold_out_base", hold_out=True, epochs=base.facts["epochs"])
        providers = {"train": hold_out, "valid": base, "test": base}
        lists = {split: top_candidates(providers[split], split, settings["cand_num"]) for split in SPLITS}
        facts = {"base": base.facts, "hold_out_base": hold_out.facts}
    stats = {}
    for split, requests in lists.items():
        write_requests(context.folder / f"{split}.jsonl", requests, data.items)
        ranks = [r.target_rank for r in requests if r.target_rank]
        stats[split] = {
            "lists": len(requests),
            "in_list": len(ranks),
            f"recall@{settings['cand_num']}": len(ranks) / max(len(requests), 1),
            "recall@1": ranks.count(1) / max(len(requests), 1),
        }
        context.say(
            f"{split}: {len(requests)} lists, {len(ranks)} hold their target ({len(ranks) / max(len(requests), 1):.4f})"
        )
        if not ranks:
            raise GateError(
                f"no {split} list holds its target: recall@{settings['cand_num']} is 0",
                where=f"base_model {settings['base_model']}",
                why="there is nothing a re-ranker could do",
                do="train the base model longer (base_epochs) or raise cand_num",
            )
    write_json(context.folder / "stats.json", stats)
    return {**facts, "stats": stats}


def recommender(
    context: Context, folder: Path, *, model: str | None = None, hold_out: bool = False, **options
) -> BaseModel:
    """The base model, or another one by name, trained to `folder` or loaded from it.

    The generator is the mid-trained model, which is there already. It has not seen the targets of the train lists
    (`mid_hold_out`), so it is its own hold-out base.

    Raises:
        ConfigurationError: the generator was mid-trained on the targets of the train lists.
    """
    settings = context.settings
    name = model or settings["base_model"]
    if name in READS_SIDS:
        items = load_items(context.folders["tokenizer"], context.data.items)
        options["sids"] = np.array([item.sid for item in items])
    if name != GENERATOR:
        return train_base(context.data, folder, model=model, hold_out=hold_out, **options)
    if hold_out and not settings["mid_hold_out"]:
        raise ConfigurationError(
            f"the train lists of {GENERATOR} would come from a model that has seen their targets",
            where="mid_hold_out",
            why="a re-ranker would learn to keep their order",
            do="set mid_hold_out: True",
        )
    llm, tokenizer = load_stage_model(context, "midtrain")
    items = load_items(context.folders["tokenizer"], context.data.items)
    return Generator(
        name=GENERATOR,
        model=llm,
        tokenizer=tokenizer,
        data=context.data,
        exclude_seen=settings["cand_exclude_seen"],
        facts={"model": GENERATOR, "hold_out": hold_out, "epochs": 0},
        items=items,
        beams=settings["cand_beams"],
        constrained=settings["mid_constrained"],
        batch_size=settings["eval_batch_lists"],
        prompts=lambda histories: [history_ids(h, items, tokenizer, settings["mid_max_length"]) for h in histories],
        bf16=use_bf16(settings, llm.device.type),
    )


def top_candidates(base: BaseModel, split: str, count: int) -> list[Request]:
    """The base model's first `count` unmasked items of every row of a split.

    The target of a train list with several is the best of those it holds, by grade, then by time; of a list that holds
    none, the best of all.
    Rows without a history, or with fewer than two unmasked items, give no request: there is nothing to order.
    """
    import torch

    data, requests = base.data, []
    for users, scores in base.scores(split):
        # The evaluator's own reach, so that ties at the end of a list break as they break there.
        top = torch.topk(scores, data.reach(count), dim=-1)
        for user, items, values in zip(
            users.tolist(), top.indices[:, :count].tolist(), top.values.tolist(), strict=True
        ):
            history = data.history(user, split)
            real = [(i, v) for i, v in zip(items, values, strict=False) if v > UNREACHED]
            if not history or len(real) < 2:
                continue
            wanted, grades = data.targets(user, split), ()
            held = [item for item, _ in real if wanted.get(item)]
            if split == "train" and data.graded:
                grades = tuple(wanted.get(item, 0) for item, _ in real)
            target = min(held or wanted, key=lambda item: (-wanted[item], list(wanted).index(item)))
            requests.append(
                Request(
                    request_id=request_id(split, data.user_tokens[user]),
                    user_token=data.user_tokens[user],
                    split=split,
                    history=history,
                    candidates=tuple(
                        Candidate(item_id=i, score=v, rank=rank) for rank, (i, v) in enumerate(real, start=1)
                    ),
                    target=target,
                    grades=grades,
                    provider=f"{base.name}{' hold-out' if base.facts['hold_out'] else ''}",
                )
            )
    return requests


def _imported(context: Context) -> dict[str, list[Request]]:
    """Lists of a file, checked against the data set's own rows.

    Raises:
        ConfigurationError: a target or history that is not the row's.
    """
    data = context.data
    users = {token: user for user, token in enumerate(data.user_tokens)}
    lists = {split: [] for split in SPLITS}
    for request in read_requests(Path(context.settings["cand_file"]), data.items):
        user = users.get(request.user_token)
        if (
            request.split not in SPLITS
            or user is None
            or request.history != data.history(user, request.split)
            or request.target not in data.targets(user, request.split)
        ):
            raise ConfigurationError(
                "an imported list does not belong to a row of this data set",
                where=request.request_id,
                why="a longer history would leak the target",
                do="export lists with this plugin, and keep history, target and split as they are there",
            )
        if not 2 <= len(request.items) <= context.settings["cand_num"]:
            raise ConfigurationError(
                f"an imported list has {len(request.items)} candidates",
                where=request.request_id,
                do="import lists of 2 to cand_num candidates",
            )
        lists[request.split].append(request)
    return lists
