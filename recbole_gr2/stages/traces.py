"""Traces: a teacher argues for a ranking of each train list; accepted arguments become training texts.

Only train lists that hold their target are used. Targeted: the teacher is told the target. Rejection: it is not, and
its argument is kept if its first item is the target, up to `trace_tries` times (GR2 section 4).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from recbole_gr2.errors import GateError
from recbole_gr2.extension import find
from recbole_gr2.llm.constraint import Grammar
from recbole_gr2.prompts import PromptMaker, recent
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.tokens import RANKING, SID, label_tokens, sid_text
from recbole_gr2.stages import Context
from recbole_gr2.stages.evidence import load_requests
from recbole_gr2.stages.midtrain import load_stage_model, use_bf16
from recbole_gr2.stages.tokenizer import load_items
from recbole_gr2.store import read_lines, write_lines
from recbole_gr2.teachers import LocalLLMTeacher, RecordedTeacher, RulesTeacher, Teacher
from recbole_gr2.types import Answer, Item, Request, Trace


def run(context: Context) -> dict:
    """Writes accepted.jsonl and rejected.jsonl (every rejected try, with its reason).

    Raises:
        GateError: the share of requests with an accepted trace is below `trace_min_accepted`.
    """
    settings = context.settings
    mode = settings["trace_mode"]
    items = load_items(context.folders["tokenizer"], context.data.items)
    requests = training_requests(context, items, settings["trace_max_lists"], "traces")
    seed = derive_seed(settings["seed"], "traces")

    def local_llm() -> LocalLLMTeacher:
        model, tokenizer = _teacher_model(context)
        grammar = answer_grammar(tokenizer, settings)
        bf16, temperature = use_bf16(settings, model.device.type), settings["trace_temperature"]
        return LocalLLMTeacher(
            model, tokenizer, PromptMaker.of(settings, items), grammar, seed=seed, bf16=bf16, temperature=temperature
        )

    def openai_api() -> Teacher:
        from recbole_gr2.teachers.openai_api import OpenAITeacher

        return OpenAITeacher(
            PromptMaker.of(settings, items),
            model=settings["trace_endpoint_model"],
            base_url=settings["trace_endpoint"],
            concurrency=settings["trace_concurrency"],
            temperature=settings["trace_temperature"],
            replies=Path(settings["checkpoint_dir"], "gr2", settings["dataset"], "replies.jsonl"),
        )

    build = {
        "rules": lambda: RulesTeacher(
            items, seed=seed, temperature=settings["trace_temperature"], history=settings["prompt_history"]
        ),
        "local_llm": local_llm,
        "openai_api": openai_api,
        "recorded": lambda: RecordedTeacher(settings["trace_file"], items),
    }
    teacher = find(settings["trace_teacher"], build, where="trace_teacher")()
    accepted, rejected, pending = [], [], requests
    for attempt in range(settings["trace_tries"] if mode == "rejection" else 1):
        arguments = teacher.argue(pending, targeted=mode == "targeted", attempt=attempt)
        still = []
        for request, argument in zip(pending, arguments, strict=True):
            reason = objection(request, argument.ranking, argument.reasoning)
            trace = Trace(
                request_id=request.request_id,
                teacher=teacher.name,
                mode=mode,
                reasoning=argument.reasoning,
                ranking=argument.ranking,
                accepted=not reason,
                reason=reason or "top-1 is the target",
                tries=attempt + 1,
            )
            (rejected if reason else accepted).append(trace)
            if reason:
                still.append(request)
        pending = still
        context.say(f"try {attempt + 1}: {len(accepted):,} of {len(requests):,} requests have a trace")
        if not pending:
            break
    for name, traces in (("accepted", accepted), ("rejected", rejected)):  # the recorded teacher reads such lines, too
        write_lines(
            context.folder / f"{name}.jsonl",
            ({**asdict(trace), "ranking": [items[i - 1].token for i in trace.ranking]} for trace in traces),
        )
    share = len(accepted) / len(requests)
    if not accepted or share < settings["trace_min_accepted"]:
        raise GateError(
            f"{share:.1%} of {len(requests)} requests have an accepted trace",
            where=f"teacher {teacher.name}, {mode}",
            why="the rest would be dropped, and too little would be left to learn from",
            do="raise trace_tries, use trace_mode targeted, or a stronger teacher",
        )
    usage = getattr(teacher, "usage", {})
    return {
        "requests": len(requests),
        "accepted": len(accepted),
        "accepted_share": share,
        "tries_mean": sum(t.tries for t in accepted) / len(accepted),
        "rejected_for": dict(Counter(t.reason for t in rejected)),
        **grounding(accepted, requests, items, settings["prompt_history"]),
        "usage": usage,
        "cost": cost(usage, settings["trace_price"]),
    }


def answer_grammar(tokenizer, settings, *, reasoning: bool = True) -> Grammar:
    """The form of every answer of this run; without reasoning the ranking comes at once."""
    longest = settings["prompt_max_reasoning"] if reasoning else 0
    return Grammar.of(
        tokenizer,
        RANKING,
        label_tokens(settings["cand_num"]),
        longest,
        grounded=settings["prompt_grounded"],
        llm_weight=settings["prompt_llm_weight"] if settings["evidence_providers"] else 1.0,
    )


def objection(request: Request, ranking: tuple[int, ...], reasoning: str) -> str:
    """Why a trace is not accepted; empty if it is."""
    if sorted(ranking) != sorted(request.items):
        return "not a permutation of the candidates"
    if not reasoning.strip():
        return "no reasoning"
    return "" if request.by_gain(ranking)[0] == ranking[0] else "top-1 is not the target"


def grounding(said: Sequence[Trace | Answer], requests: Sequence[Request], items: Sequence[Item], shown: int) -> dict:
    """What traces or answers cite: `grounded`, the share that cite the semantic ID of the item they put first; `cited`,
    how many IDs they cite in all; `cited_in_prompt`, the share of these that the prompt showed (None without any).

    Args:
        shown: items of the history that a prompt shows, the last ones.
    """
    asked = {request.request_id: request for request in requests}
    picked, found, cited = 0, 0, 0
    for each in said:
        request = asked[each.request_id]
        visible = {sid_text(items[i - 1].sid) for i in (*recent(request.history, shown), *request.items)}
        sids = SID.findall(each.reasoning)
        picked += sid_text(items[each.ranking[0] - 1].sid) in sids
        found, cited = found + sum(sid in visible for sid in sids), cited + len(sids)
    return {"grounded": picked / len(said), "cited": cited, "cited_in_prompt": found / cited if cited else None}


def cost(usage: Mapping[str, int], price: Mapping[str, float]) -> float | None:
    """What an endpoint's tokens cost at prices a million tokens; None without a price.

    >>> cost({"prompt_tokens": 2_000_000, "completion_tokens": 500_000}, {"prompt": 0.1, "completion": 0.4})
    0.4
    """
    paid = [usage[f"{kind}_tokens"] * value / 1e6 for kind, value in price.items() if f"{kind}_tokens" in usage]
    return sum(paid) if paid else None


def training_requests(context: Context, items: tuple[Item, ...], limit: int | None, purpose: str) -> list[Request]:
    """Train lists that hold their target; at most `limit` of them, drawn by seed."""
    requests = [r for r in load_requests(context, "train", items) if r.teaches]
    if limit is not None and limit < len(requests):
        requests = random.Random(derive_seed(context.settings["seed"], purpose, "lists")).sample(requests, limit)
    return requests


def accepted_traces(context: Context, items: Sequence[Item]) -> dict[str, Trace]:
    """Accepted traces by request id."""
    ids = {item.token: item.item_id for item in items}
    lines = read_lines(context.folders["traces"] / "accepted.jsonl")
    return {
        line["request_id"]: Trace(**{**line, "ranking": tuple(ids[token] for token in line["ranking"])})
        for line in lines
    }


def _teacher_model(context: Context):
    from recbole_gr2.llm.backbone import load_backbone
    from recbole_gr2.sid.tokens import added_tokens

    settings = context.settings
    if settings["trace_llm"] is None:
        return load_stage_model(context, "midtrain")
    extra = added_tokens(settings["sid_levels"], settings["sid_codes"], settings["cand_num"])
    return load_backbone(settings["trace_llm"], extra_tokens=extra, seed=settings["seed"])
