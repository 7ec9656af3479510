"""Evaluate: RecBole's evaluator computes the metrics of every method on the test split or the validation split.

There are two scopes: `all_users`, and `hit_users`, the users whose candidate list contains their target. With one
target, ranking metrics depend on the hit users only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from recbole_gr2.artifacts import (
    load_catalog,
    read_answers,
    read_recommendations,
    write_per_user,
)
from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.evaluator import check_invariants, depth_of, evaluate_methods, is_general
from recbole_gr2.comparisons import compare_pairs, declared_pairs
from recbole_gr2.config import Settings
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.inspection import examples, truthfulness
from recbole_gr2.lists import pool_size, reported_requests
from recbole_gr2.ranking import Comparison, adjust, compare_ranks, complete
from recbole_gr2.recommenders import VALIDATION, validation_stage
from recbole_gr2.rerankers.apply import input_orders
from recbole_gr2.rerankers.base import as_answers, stage_name
from recbole_gr2.rerankers.registry import chosen, orders
from recbole_gr2.seeding import derive_seed
from recbole_gr2.slices import slice_metrics, target_slices
from recbole_gr2.store import write_json
from recbole_gr2.types import Answer, Context, Recommendations, Request, Stage

Rankings = dict[str, tuple[int, ...]]  # request id -> item ids, best first
MISS = 10**9  # rank of a target that a recommender does not propose: every metric is 0


def run(context: Context) -> dict[str, Any]:
    """Write methods.json and per_user.csv, and examples.md if a method reasons.

    Raises:
        GR2Error: an identity that the metrics must fulfil is violated.
    """
    settings, catalog = context.settings, load_catalog(context)
    requests, hits = reported_requests(context, pool=True)
    context.say(f"{len(hits):,} of {len(requests):,} candidate lists contain their target")
    methods = [*orders(settings), *chosen(settings)]
    rankings: dict[str, Rankings] = {}
    unchanged: dict[str, float] = {}
    answers: dict[str, dict[str, Answer]] = {}
    for method in methods:
        if stage_name(method.name) in context.folders:
            answers[method.name] = read_answers(context.folders[stage_name(method.name)], catalog)
            given = {name: answer.ranking for name, answer in answers[method.name].items()}
        else:
            ordered = as_answers(requests, method(context).rank(requests), method=method.name)
            given = {answer.request_id: answer.ranking for answer in ordered}
        inputs = dict(zip([r.request_id for r in requests], input_orders(requests, settings, method), strict=True))
        ranked = requests if len(given) == len(requests) else hits
        rankings[method.name] = {
            r.request_id: complete(given.get(r.request_id, ()), inputs[r.request_id]) for r in ranked
        }
        unchanged[method.name] = float(
            np.mean(
                [rankings[method.name][r.request_id] == inputs[r.request_id] for r in hits if r.request_id in given]
            )
        )
    candidates = context.folders[_candidates(settings)]
    recommendations = {name: read_recommendations(candidates, name) for name in _alone(settings)} | {
        name: read_recommendations(context.folders[stage]) for name, stage in _models(settings).items()
    }
    base = read_recommendations(candidates)
    entries = _methods(context, requests, hits, rankings, unchanged, base, recommendations)
    descriptions = {method.name: method.description for method in methods}
    diagnostic = [method.name for method in methods if method.diagnostic]
    for entry in entries:
        entry["description"] = descriptions.get(entry["method"], "a recommender, over the whole catalogue")
        entry["diagnostic"] = entry["method"] in diagnostic
    for scope in ("all_users", "hit_users"):
        family = [e["vs_base"] for e in entries if e["scope"] == scope and not e["diagnostic"]]
        adjust(family)
    write_json(context.folder / "methods.json", entries)
    _write_per_user(context, hits, rankings)
    history = settings["prompt_history"]
    reasoning = {name: each for name, each in answers.items() if any(a.reasoning for a in each.values())}
    listed = {name: _read_lists(requests, each, settings["cand_num"]) for name, each in reasoning.items()}
    if reasoning:
        name = "rl" if "rl" in reasoning else list(reasoning)[-1]
        text = examples([r for r in listed[name] if r.target_rank], name, reasoning[name], catalog, history)
        (context.folder / "examples.md").write_text(text, encoding="utf-8")
    checkable = settings["trace_teacher"] == "rules"
    pairs = declared_pairs(
        [method.name for method in methods],
        {method.name: method.compare_with for method in methods},
        every=settings["eval_comparisons"] == "all",
        without=[*diagnostic, "base"],
    )
    ranks = {name: _ranks(hits, given) for name, given in rankings.items()}
    comparisons = compare_pairs(
        pairs, lambda one, other: _compare(settings, ranks[one], ranks[other], len(hits)), diagnostic
    )
    users = [request.user_token for request in requests]
    places = {name: dict(zip([r.user_token for r in hits], each.tolist(), strict=True)) for name, each in ranks.items()}
    return {
        "slices": slice_metrics(target_slices(context.data, users, settings["eval_split"]), users, places),
        "requests": len(requests),
        "hit_users": len(hits),
        "methods": entries,
        "comparisons": [{**pair, "scope": "hit_users"} for pair in comparisons],
        "truth": {
            name: truthfulness(listed[name], each, catalog, history) for name, each in reasoning.items() if checkable
        },
    }


def _read_lists(pools: Sequence[Request], answers: Mapping[str, Answer], count: int) -> list[Request]:
    """The requests that were answered, with the candidates that the answers are about: the first of the ranking."""
    answered = [pool for pool in pools if pool.request_id in answers]
    return [pool.shortlist(answers[pool.request_id].ranking[:count]) for pool in answered]


def _methods(
    context: Context,
    requests: Sequence[Request],
    hits: Sequence[Request],
    rankings: Mapping[str, Rankings],
    unchanged: Mapping[str, float],
    base: Recommendations,
    recommendations: Mapping[str, Recommendations],
) -> list[dict[str, Any]]:
    """RecBole's metrics of every method in both scopes, with the paired comparison to the base order."""
    settings, data, count = context.settings, context.data, pool_size(context.settings)
    split = settings["eval_split"]
    users = set(base.users) if settings["eval_max_lists"] is None else {r.user_token for r in requests}
    scopes = {"all_users": users, "hit_users": {r.user_token for r in hits}}
    by_user = {
        name: {r.user_token: given[r.request_id] for r in requests if r.request_id in given}
        for name, given in rankings.items()
    }
    general = not settings["cand_file"] and all(map(is_general, settings["base_model"]))
    metrics = evaluate_methods(data, base, by_user, scopes, general=general, split=split)
    base_rank = _target_ranks(base)
    listed = {
        scope: float(np.mean([base_rank[user] <= count for user in members])) for scope, members in scopes.items()
    }
    check_invariants(metrics, count, listed, decimals=data.config["metric_decimal_place"])
    ranks = {name: _ranks(hits, given) for name, given in rankings.items()}
    entries: list[dict[str, Any]] = []
    for scope, members in scopes.items():
        for name in rankings:
            entries.append(
                {
                    "method": name,
                    "scope": scope,
                    "n": len(members),
                    "metrics": metrics[name][scope],
                    "unchanged": unchanged[name],
                    "vs_base": {} if name == "base" else _compare(settings, ranks[name], ranks["base"], len(members)),
                }
            )
    for name, other in recommendations.items():
        general = is_general(name)
        alone = evaluate_methods(data, other, {name: None}, {"all_users": users}, general=general, split=split)
        rank = _target_ranks(other)
        pairs = np.array([(rank[user], base_rank[user]) for user in base.users if user in users])
        entries.append(
            {
                "method": name,
                "scope": "all_users",
                "n": len(users),
                "metrics": alone[name]["all_users"],
                "unchanged": None,
                "vs_base": _compare(settings, pairs[:, 0], pairs[:, 1], len(users)),
            }
        )
    return entries


def _ranks(requests: Sequence[Request], rankings: Rankings) -> np.ndarray:
    """Rank of the target in each list that contains it, from 1, (n,)."""
    return np.array([rankings[r.request_id].index(r.target) + 1 for r in requests])


def _target_ranks(recommendations: Recommendations) -> dict[str, int]:
    """Rank of each user's target in the whole catalogue, from 1, by user token; MISS if it is not proposed."""
    ranks = np.where(recommendations.target_rank > 0, recommendations.target_rank, MISS)
    return dict(zip(recommendations.users, ranks.tolist(), strict=True))


def _compare(settings: Settings, first: np.ndarray, second: np.ndarray, users: int) -> dict[str, Comparison]:
    seed = derive_seed(settings["seed"], "comparisons")
    return compare_ranks(first, second, users=users, seed=seed, draws=settings["eval_draws"])


def _write_per_user(context: Context, hits: Sequence[Request], rankings: Mapping[str, Rankings]) -> None:
    """Write the rank of the target under every method for each hit user, with what reports slice it by."""
    popularity = np.bincount(np.concatenate(list(context.data.train_sequences().values())))
    frame = pd.DataFrame(
        {
            "user": [r.user_token for r in hits],
            "history": [len(r.history) for r in hits],
            "popularity": [popularity[r.target] if r.target < len(popularity) else 0 for r in hits],
        }
    )
    for name, given in rankings.items():
        frame[name] = _ranks(hits, given)
    write_per_user(context.folder, frame)


def _candidates(settings: Settings) -> str:
    """Name of the stage with the recommendations of the base models for the reported split."""
    return "candidates" if settings["eval_split"] == "test" else VALIDATION


def _models(settings: Settings) -> dict[str, str]:
    """The other recommenders of the run by name, with the stage that has their recommendations for the split."""
    reported = settings["eval_split"]
    return {name: name if reported == "test" else validation_stage(name) for name in settings["models"]}


def _alone(settings: Settings) -> list[str]:
    """Names of the base models that are a method of their own: of several, those that are not in `models`."""
    names = settings["base_model"]
    alone = len(names) > 1 and not settings["cand_file"]
    return [name for name in names if name not in settings["models"]] if alone else []


def key_values(settings: Settings) -> dict[str, Any]:
    """Return RecBole's options of the evaluator and the methods, without the folders of files with rankings."""
    names = ("metrics", "topk", "metric_decimal_place")
    options = settings.recbole_results(base=False)
    values = {f"recbole.{name}": options[name] for name in names if name in options}
    if settings["eval_split"] != "test":
        values["eval_split"] = settings["eval_split"]
    return {**values, "eval_rows": [reranker.name for reranker in chosen(settings)]}


def check_data(settings: Settings, data: Data) -> None:
    """Check that the cut-offs are not above the number of items that are recommended."""
    depth = depth_of(data)
    if max(settings["topk"]) > depth:
        raise ConfigurationError(
            f"topk contains {max(settings['topk'])}, but {depth} items per user are recommended",
            where="topk",
            why="a longer list is not stored, or the catalogue is smaller",
            do=f"choose cut-offs of at most {depth}",
        )


def stages(settings: Settings) -> list[Stage]:
    """Declare the stage. It needs the stages of all methods of the run."""
    return [
        Stage(
            name="evaluate",
            version=10,
            run=run,
            settings=("eval_", "cand_num", "cand_ranker", "seed", "trace_teacher", "prompt_history"),
            excluded=("eval_split",),  # The keys of test results have no such value.
            needs=(
                _candidates(settings),
                "tokenizer",
                "prior",
                *(stage_name(reranker.name) for reranker in chosen(settings)),
                *_models(settings).values(),
            ),
            key_values=key_values,
            check_data=check_data,
        )
    ]
