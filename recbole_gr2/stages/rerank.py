"""Rerank: a re-ranker orders the candidates of the requests of `eval_split`. Each re-ranker has a stage."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recbole_gr2.artifacts import load_catalog, write_answers
from recbole_gr2.bridge.data import Data
from recbole_gr2.config import Settings
from recbole_gr2.distributed import RANK
from recbole_gr2.errors import GR2Error, QualityCheckError
from recbole_gr2.lists import (
    base_orders,
    rank_windows,
    reported_requests,
)
from recbole_gr2.plugins import calling
from recbole_gr2.policy import engine, engine_value, resolved_bf16
from recbole_gr2.prompts import prompt_values
from recbole_gr2.rerankers.apply import fit, rank, rank_by_windows
from recbole_gr2.rerankers.base import Reranker, stage_name, user_name
from recbole_gr2.rerankers.external import FILE, read_rankings
from recbole_gr2.types import Context, Stage

REGISTRY = "recbole_gr2.rerankers.registry"


def run(context: Context) -> dict[str, Any]:
    """Write rankings.jsonl, the answers of the re-ranker that the parameter `reranker` names.

    The re-ranker gets requests without labels. With `eval_scope: hit_users` it gets the requests of the hit users only.
    With `eval_windows` an answer ranks the whole pool, and its other fields are those of the first window.

    Raises:
        QualityCheckError: no list contains its target.
    """
    settings, method = context.settings, context.parameters["reranker"]
    name, where = user_name(method), f"method {method.name}"
    with calling(name, where=where):
        reranker: Reranker = method(context)
    if not hasattr(reranker, "summary"):
        raise GR2Error(
            f"the method {method.name} has no context",
            where="eval_rows",
            why="its own __init__ does not call that of Reranker",
            do="call super().__init__(context)",
        )
    sliding = reranker.slides(settings)
    requests, hits = reported_requests(context, pool=reranker.whole_pool or sliding)
    if not hits:
        raise QualityCheckError(
            f"no {settings['eval_split']} list of {reranker.name} contains its target",
            where=f"cand_num {settings['cand_num']}, cand_ranker {settings['cand_ranker']}",
            why="re-ranking cannot improve such a list",
            do="raise cand_num, or train the base models longer (base_epochs)",
        )
    if settings["eval_scope"] == "hit_users":
        requests = hits
    if type(reranker).fit is not Reranker.fit:
        fit(reranker, context)
        if RANK == 0:
            with calling(name, where=f"{where}, save"):
                reranker.save(context.folder)
    started = time.monotonic()
    answers = rank_by_windows(reranker, requests) if sliding else rank(reranker, requests)
    seconds = time.monotonic() - started
    if RANK == 0:
        write_answers(context.folder, answers, load_catalog(context))
    pairs = list(zip(requests, answers, strict=True))
    inputs = rank_windows(requests, settings, base_orders) if sliding else base_orders(requests)
    unchanged = float(np.mean([answer.ranking == order for answer, order in zip(answers, inputs, strict=True)]))
    context.say(f"{reranker.name}: {len(requests):,} requests in {seconds:.0f} s, {unchanged:.1%} unchanged")
    return {
        **reranker.summary,
        "method": reranker.name,
        "unchanged": unchanged,
        "as_prior": float(np.mean([answer.ranking == request.by_prior for request, answer in pairs])),
        "first_as_prior": float(np.mean([answer.ranking[0] == request.by_prior[0] for request, answer in pairs])),
        "seconds": round(seconds, 1),
        "requests_per_second": round(len(requests) / max(seconds, 1e-9), 2),
    }


def check_settings(settings: Settings) -> None:
    """Check the files with rankings."""
    for name in settings["eval_rows"]:
        if name.startswith(FILE):
            read_rankings(Path(name.removeprefix(FILE)))


def stages(settings: Settings) -> list[Stage]:
    """Declare a stage for each re-ranker."""
    from recbole_gr2.rerankers.registry import chosen, source_values

    sources = source_values(settings)
    return [_stage(reranker, sources.get(reranker.name, {})) for reranker in chosen(settings)]


def _stage(reranker: type[Reranker], sources: Mapping[str, str]) -> Stage:
    def key_values(settings: Settings) -> dict[str, Any]:
        values: dict[str, Any] = dict(sources)
        if "prompt_" in reranker.settings_prefixes:
            values |= prompt_values(settings)
        if "llm_bf16".startswith(reranker.settings_prefixes):
            values |= resolved_bf16(settings)
        if "llm_engine".startswith(reranker.settings_prefixes):
            values |= engine_value(settings)
        if settings["eval_split"] != "test":
            values["eval_split"] = settings["eval_split"]
        return values

    def check_data(settings: Settings, data: Data) -> None:
        if "llm_engine".startswith(reranker.settings_prefixes):
            engine(settings)

    built_in = reranker.__module__.startswith("recbole_gr2.rerankers.")
    return Stage(
        name=stage_name(reranker.name),
        version=6,
        run=run,
        settings=(
            "eval_scope",
            "eval_max_lists",
            "cand_num",
            "cand_ranker",
            "seed",
            *(("eval_windows",) if reranker.windowed and not reranker.whole_pool else ()),
            *reranker.settings_prefixes,
        ),
        # The keys of test results have no eval_split, those of the default form of items no prompt_items, and those of
        # the default engine no llm_engine.
        excluded=("eval_split", "prompt_items", "llm_engine"),
        needs=tuple(dict.fromkeys(("tokenizer", "prior", *reranker.needs))),
        key_values=key_values,
        check=check_settings,
        check_data=check_data,
        parameters={"reranker": reranker},
        distributed=reranker.distributed,
        modules=(reranker.__module__,) if built_in else (),
        unused_modules=(REGISTRY,),
    )
