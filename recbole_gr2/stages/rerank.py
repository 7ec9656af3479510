"""Rerank: one re-ranker orders the test lists, for a row of the table.

`rerank_sft`, `rerank_rl`, `rerank_distilled`: the stage's model answers. `rerank_internalised`: that of internalise,
without reasoning. `rerank_shuffled`: the RL model on shuffled candidates, which shows how far it goes by position.
`rerank_midtrain`, `rerank_onerec_think`: by the likelihood of the candidates' semantic IDs. `rerank_lambdamart`:
LightGBM over the same evidence.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from recbole_gr2.generator import ONEREC_THINK
from recbole_gr2.prompts import PromptMaker, history_ids, shuffled_order
from recbole_gr2.rerankers.lambdamart import lambdamart
from recbole_gr2.seeding import derive_seed
from recbole_gr2.stages import Context
from recbole_gr2.stages.evidence import load_described, load_requests
from recbole_gr2.stages.midtrain import load_stage_model, sid_log_likelihood, use_bf16
from recbole_gr2.stages.onerec_think import candidate_scores
from recbole_gr2.stages.sft import answer_requests
from recbole_gr2.stages.tokenizer import load_items
from recbole_gr2.stages.traces import answer_grammar, grounding
from recbole_gr2.store import read_lines, write_lines
from recbole_gr2.types import Answer, Item, Request

MODELS = {"shuffled": "rl", "distilled": "distill", "internalised": "internalise"}  # stages of rows with other names
PREFIX = "rerank_"  # of the stages' names, in front of the row's
Rankings = dict[str, tuple[int, ...]]


def run(context: Context) -> dict:
    """Writes rankings.jsonl for the row that the stage is named after; with a language model's answers, their text."""
    settings, row = context.settings, context.stage.removeprefix(PREFIX)
    items = load_items(context.folders["tokenizer"], context.data.items)
    requests, in_list = reported_lists(context, items)
    requests = in_list if settings["eval_scope"] == "in_list" else requests
    details: dict[str, dict] = {}
    how: dict = {}
    started = time.monotonic()
    if row == "lambdamart":
        rankings, how = lambdamart_rankings(context, items, requests)
    elif row == "midtrain":
        rankings = likelihood_rankings(context, items, requests)
    elif row in ONEREC_THINK.values():
        scores = candidate_scores(context, items, requests, row)
        rankings = {r.request_id: by_score(r, own) for r, own in zip(requests, scores, strict=True)}
    else:
        rankings, how, details = answered_rankings(context, items, requests, row)
    seconds = time.monotonic() - started
    write_lines(
        context.folder / "rankings.jsonl",
        (
            {"request_id": name, "ranking": [items[i - 1].token for i in ranking], **details.get(name, {})}
            for name, ranking in rankings.items()
        ),
    )
    unchanged = float(np.mean([rankings[r.request_id] == r.items for r in requests]))
    as_evidence = float(np.mean([rankings[r.request_id] == r.by_prior for r in requests]))
    first_as_evidence = float(np.mean([rankings[r.request_id][0] == r.by_prior[0] for r in requests]))
    context.say(f"{row}: {len(requests):,} lists in {seconds:.0f} s, {unchanged:.1%} unchanged, {how}")
    return {
        **how,
        "unchanged": unchanged,
        "as_evidence": as_evidence,
        "first_as_evidence": first_as_evidence,
        "seconds": round(seconds, 1),
        "lists_per_second": round(len(requests) / seconds, 2),
    }


def reported_lists(context: Context, items: Sequence[Item]) -> tuple[list[Request], list[Request]]:
    """The test lists that the run reports over, and those of them that hold their target."""
    requests, limit = load_requests(context, "test", items), context.settings["eval_max_lists"]
    if limit is not None and limit < len(requests):
        requests = random.Random(derive_seed(context.settings["seed"], "test lists")).sample(requests, limit)
    return requests, [r for r in requests if r.target_rank]


def load_rankings(folder: Path, items: Sequence[Item]) -> Rankings:
    """Rankings that a rerank stage wrote, as item ids."""
    ids = {item.token: item.item_id for item in items}
    return {
        line["request_id"]: tuple(ids[token] for token in line["ranking"])
        for line in read_lines(folder / "rankings.jsonl")
    }


def load_reasoning(folder: Path) -> dict[str, str]:
    """What the answers of a rerank stage say in front of their rankings, by request id; {} where none reasons."""
    said = {line["request_id"]: line.get("reasoning", "") for line in read_lines(folder / "rankings.jsonl")}
    return said if any(said.values()) else {}


def answered_rankings(
    context: Context, items: Sequence[Item], requests: list[Request], row: str
) -> tuple[Rankings, dict, dict[str, dict]]:
    """A language model's answers: their rankings, facts about them all, and each one's details by request."""
    settings = context.settings
    model, tokenizer = load_stage_model(context, MODELS.get(row, row))
    grammar = answer_grammar(tokenizer, settings, reasoning=row != "internalised")
    maker = PromptMaker.of(settings, items)
    orders = {
        r.request_id: shuffled_order(r, settings["seed"], "shuffled") if row == "shuffled" else maker.order(r)
        for r in requests
    }
    answers, _ = answer_requests(
        model,
        tokenizer,
        maker,
        grammar,
        requests,
        bf16=use_bf16(settings, model.device.type),
        orders=orders,
        batch_size=settings["eval_batch_lists"],
    )
    statuses = Counter(answer.status for answer in answers)
    facts = {
        "readable": 1.0 - statuses["unreadable"] / len(answers),
        "statuses": dict(statuses),
        "output_tokens": round(float(np.mean([answer.output_tokens for answer in answers])), 1),
        **promoted(requests, answers, orders),
        **grounding(answers, requests, items, settings["prompt_history"]),
    }
    details = {
        a.request_id: {"status": a.status, "reasoning": a.reasoning, "output_tokens": a.output_tokens} for a in answers
    }
    return {a.request_id: a.ranking for a in answers}, facts, details


def promoted(
    requests: Sequence[Request], answers: Sequence[Answer], orders: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, int]]:
    """Where the first places come from: from which rank of the base order, and from which slot of the prompt.

    A policy with a position bias promotes a fixed slot (GR2, section 5). In shuffled prompts the base ranks do not show
    it, in prompts in base order both are the same.

    Args:
        orders: base positions in the order shown, by request id.
    """
    places = [r.items.index(a.ranking[0]) for r, a in zip(requests, answers, strict=True)]
    slots = [list(orders[r.request_id]).index(place) for r, place in zip(requests, places, strict=True)]
    return {
        name: {str(place + 1): count for place, count in sorted(Counter(found).items())}
        for name, found in (("promoted_from_rank", places), ("promoted_from_slot", slots))
    }


def lambdamart_rankings(context: Context, items: Sequence[Item], requests: list[Request]) -> tuple[Rankings, dict]:
    """Candidates by LambdaMART over the evidence that GR2 has, fitted to the train lists that GR2 learns from."""
    lists = {}
    for split in ("train", "valid"):
        held = [r for r in load_requests(context, split, items) if r.teaches]
        lists[split] = load_described(context, split, held), [r.gains for r in held]
    scores, trees = lambdamart(
        lists["train"],
        lists["valid"],
        load_described(context, "test", requests),
        seed=derive_seed(context.settings["seed"], "lambdamart"),
    )
    return {r.request_id: by_score(r, row) for r, row in zip(requests, scores, strict=True)}, {"trees": trees}


def by_score(request: Request, scores: Sequence[float]) -> tuple[int, ...]:
    """Candidates by descending score, ties in base order."""
    return tuple(item for _, item in sorted(zip(scores, request.items, strict=True), key=lambda pair: -pair[0]))


def likelihood_rankings(context: Context, items: Sequence[Item], requests: list[Request]) -> Rankings:
    """Candidates by the likelihood of their semantic IDs after the history, under the mid-trained model."""
    settings = context.settings
    model, tokenizer = load_stage_model(context, "midtrain")
    heads = [history_ids(r.history, items, tokenizer, settings["mid_max_length"]) for r in requests]
    scores = sid_log_likelihood(model, tokenizer, settings, items, heads, [r.items for r in requests])
    return {r.request_id: by_score(r, row) for r, row in zip(requests, scores, strict=True)}
