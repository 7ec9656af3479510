"""Traces: a teacher writes reasoning for a ranking of each train request (GR2, section 4).

Only train requests that contain their target are used. In targeted mode the teacher sees the target. Under rejection
sampling it does not, and a trace is accepted if it ranks the target first; the teacher gets `trace_tries` attempts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_gr2.artifacts import load_catalog, write_traces
from recbole_gr2.bridge.data import Data
from recbole_gr2.config import Settings
from recbole_gr2.errors import QualityCheckError
from recbole_gr2.lists import training_requests
from recbole_gr2.llm.download import check_name, identity
from recbole_gr2.llm.endpoint import check_endpoint, check_url
from recbole_gr2.llm.model import RANDOM, load_language_model
from recbole_gr2.policy import Policy, citations, engine, engine_value, resolved_bf16
from recbole_gr2.prompts import prompt_values
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.tokens import added_tokens
from recbole_gr2.store import check_text, file_hash, module_hash
from recbole_gr2.teachers import Teacher, ask, build_teacher, find_teacher
from recbole_gr2.types import Context, Request, Stage, Trace


def run(context: Context) -> dict[str, Any]:
    """Write accepted.jsonl and rejected.jsonl, which contains every rejected attempt with the reason.

    Raises:
        QualityCheckError: the share of requests with an accepted trace is below `trace_min_accepted`.
    """
    settings, catalog = context.settings, load_catalog(context)
    mode = settings["trace_mode"]
    targeted = mode == "targeted"
    requests = training_requests(context, settings["trace_max_lists"], "traces")
    teacher = _teacher(context)
    accepted: list[Trace] = []
    rejected: list[Trace] = []
    pending = requests
    for attempt in range(1 if targeted else settings["trace_tries"]):
        replies = ask(teacher, pending, targeted=targeted, attempt=attempt)
        remaining = []
        for request, reply in zip(pending, replies, strict=True):
            reason = reply.problem or objection(request, reply.ranking, reply.reasoning)
            trace = Trace(
                request_id=request.request_id,
                teacher=teacher.name,
                mode=mode,
                reasoning=reply.reasoning,
                ranking=reply.ranking,
                accepted=not reason,
                reason=reason or "top-1 is the target",
                tries=attempt + 1,
            )
            if reason:
                rejected.append(trace)
                remaining.append(request)
            else:
                accepted.append(trace)
        pending = remaining
        context.say(f"attempt {attempt + 1}: {len(accepted):,} of {len(requests):,} requests have an accepted trace")
        if not pending:
            break
    write_traces(context.folder / "accepted.jsonl", accepted, catalog)
    write_traces(context.folder / "rejected.jsonl", rejected, catalog)
    share = len(accepted) / max(len(requests), 1)
    reasons = Counter(trace.reason for trace in rejected)
    if not accepted or share < settings["trace_min_accepted"]:
        frequent = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(3))
        raise QualityCheckError(
            f"{share:.1%} of {len(requests)} requests have an accepted trace; most frequent reasons of rejection: "
            f"{frequent or 'none'}",
            where=f"teacher {teacher.name}, mode {mode}",
            why="requests without a trace are left out, so that too little training data would remain",
            do="raise trace_tries, use trace_mode targeted, or use a stronger teacher",
        )
    usage = getattr(teacher, "usage", {})
    return {
        "requests": len(requests),
        "accepted": len(accepted),
        "accepted_share": share,
        "tries_mean": sum(trace.tries for trace in accepted) / len(accepted),
        "rejected_for": dict(reasons),
        **citations(accepted, requests, catalog, settings["prompt_history"]),
        "usage": usage,
        "cost": cost(usage, settings["trace_price"]),
    }


def _teacher(context: Context) -> Teacher:
    """The teacher that the settings name."""
    settings = context.settings
    seed = derive_seed(settings["seed"], "traces")

    def language_model() -> Policy:
        if settings["trace_llm"] is None:
            return Policy.load(context, "midtrain")
        extra = added_tokens(settings["sid_levels"], settings["sid_codes"], settings["cand_num"])
        model, tokenizer = load_language_model(settings["trace_llm"], extra_tokens=extra, seed=settings["seed"])
        return Policy.of(model, tokenizer, context)

    replies = Path(settings["checkpoint_dir"], "gr2", settings["dataset"], "replies.jsonl")
    return build_teacher(
        settings["trace_teacher"],
        catalog=load_catalog(context),
        settings=settings,
        seed=seed,
        language_model=language_model,
        replies=replies,
    )


def objection(request: Request, ranking: tuple[int, ...], reasoning: str) -> str:
    """Return why a trace is rejected, or "" if it is accepted."""
    if sorted(ranking) != sorted(request.items):
        return "not a permutation of the candidates"
    if not reasoning.strip():
        return "no reasoning"
    return "" if request.sorted_by_grade(ranking)[0] == ranking[0] else "top-1 is not the target"


def cost(usage: Mapping[str, int], price: Mapping[str, float]) -> float | None:
    """Return the cost of an endpoint's tokens, or None without a price.

    Args:
        usage: `prompt_tokens` and `completion_tokens`.
        price: price of a million tokens for `prompt` and `completion`.

    >>> cost({"prompt_tokens": 2_000_000, "completion_tokens": 500_000}, {"prompt": 0.1, "completion": 0.4})
    0.4
    """
    parts = [usage[f"{kind}_tokens"] * value / 1e6 for kind, value in price.items() if f"{kind}_tokens" in usage]
    return sum(parts) if parts else None


def check_settings(settings: Settings) -> None:
    """Check the endpoint's address, and that the user's teacher, a teacher's model and the recorded traces exist."""
    check_url(settings["trace_endpoint"], where="trace_endpoint")
    find_teacher(settings["trace_teacher"])
    if settings["trace_llm"] is not None:
        check_name(settings["trace_llm"], where="trace_llm", others=(RANDOM,))
    if settings["trace_file"]:
        check_text(settings["trace_file"], where="trace_file")


def check_data(settings: Settings, data: Data) -> None:
    """Check that there is a client for the endpoint of the teacher, and that the engine of a local one can be used."""
    if settings["trace_teacher"] == "openai_api":
        check_endpoint(settings["trace_endpoint"], where="trace_endpoint")
    if settings["trace_teacher"] == "local_llm":
        engine(settings)


def key_values(settings: Settings) -> dict[str, Any]:
    """Return the hashes of the prompt template and of the recorded traces, and what identifies the teacher."""
    values: dict[str, Any] = dict(prompt_values(settings))
    if ":" in settings["trace_teacher"]:
        module = settings["trace_teacher"].partition(":")[0]
        values["trace_teacher.sha"] = module_hash(module, where="trace_teacher")
    if settings["trace_file"]:
        values["trace_file"] = file_hash(settings["trace_file"], where="trace_file")
    if settings["trace_teacher"] == "local_llm":
        values |= resolved_bf16(settings) | engine_value(settings)
        if settings["trace_llm"] is not None:
            values["trace_llm"] = identity(settings["trace_llm"], where="trace_llm")
    return values


def stages(settings: Settings) -> list[Stage]:
    """Declare the stage. It needs the mid-trained model only if that model is the teacher."""
    own_model = settings["trace_teacher"] == "local_llm" and settings["trace_llm"] is None
    return [
        Stage(
            name="traces",
            version=8,
            run=run,
            settings=("trace_", "cand_num", "cand_ranker", "prompt_", "seed"),
            excluded=("prompt_items",),  # the key has it if it is not the default
            needs=("tokenizer", "prior", *(("midtrain",) if own_model else ())),
            check=check_settings,
            check_data=check_data,
            key_values=key_values,
        )
    ]
