"""Finished runs that are made by hand: manifests, logs and per_user.csv without any training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_gr2.ranking import METRICS, adjust, compare_ranks
from recbole_gr2.report import FinishedRun
from recbole_gr2.rerankers.base import stage_name
from recbole_gr2.sid.tokens import sid_text
from recbole_gr2.store import write_lines, write_manifest
from recbole_gr2.types import StageRecord

DESCRIPTIONS = {
    "base": "The order of the base model.",
    "oracle": "The target first.",
    "prior": "The order of the prior.",
    "sft": "The language model after supervised fine-tuning.",
    "shuffled": "The language model on shuffled candidates.",
    "SASRec": "A recommender that ranks all items.",
}
DIAGNOSTIC = ("oracle", "shuffled")
RANKS = {  # of the targets of six hit users
    "base": [2, 1, 3, 5, 8, 4],
    "oracle": [1, 1, 1, 1, 1, 1],
    "prior": [1, 1, 3, 4, 8, 4],
    "sft": [1, 2, 1, 1, 6, 3],
    "shuffled": [2, 1, 3, 5, 8, 6],
}
STAGES: dict[str, dict[str, Any]] = {  # name -> summary, of all stages but evaluate
    "embeddings": {"items": 90, "dimensions": 8, "textless": 2, "collaborative": 1, "token": 1},
    "tokenizer": {
        "items": 90,
        "uniqueness": 1.0,
        "uniqueness_without_random_level": 0.75,
        "largest_collision": 2,
        "used_codes": [8, 7],
        "entropy": [2.5, 2.25],
        "reconstruction": 0.9,
        "neighbourhood": None,
    },
    "candidates": {
        "stats": {"train": {"lists": 1200, "recall@1": 0.25}, "test": {"lists": 60, "recall@1": 0.125}},
        "protocol": {"split": "leave-one-out in time order", "items of the history": "excluded"},
    },
    "prior": {
        "features": ["score", "popularity"],
        "steps": [20, 30],
        "quality": {"valid": {"lists": 12, "recall@1": 0.5, "base recall@1": 0.25}},
    },
}
LLM_STAGES: dict[str, dict[str, Any]] = {
    "traces": {
        "requests": 1200,
        "accepted": 900,
        "accepted_share": 0.75,
        "tries_mean": 1.5,
        "rejected_for": {"no reasoning": 30},
        "grounded": 0.5,
        "cited": 2000,
        "cited_in_prompt": 0.25,
        "usage": {},
        "cost": 1234.5,
    },
    "sft": {"texts": 900},
    "rl": {"requests": 300, "rounds": 12},
    "rerank_sft": {
        "method": "sft",
        "readable": 0.875,
        "statuses": {"ok": 5, "repaired": 1},
        "output_tokens": 40.5,
        "promoted_from_rank": {"1": 4, "3": 2},
        "promoted_from_slot": {"2": 6},
        "cited": 10,
        "cited_in_prompt": 0.3,
        "grounded": 0.7,
        "unchanged": 0.25,
        "as_prior": 0.35,
        "first_as_prior": 0.45,
        "requests_per_second": 2.5,
    },
}
LOGS = {
    "sft": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0}],
    "rl": [{"step": step, "reward": float(step), "unchanged": 0.5, "reward/ndcg": 0.25} for step in (1, 2, 3)],
}


def rounded(ranks: np.ndarray, users: int) -> dict[str, float]:
    """Metrics over `users` users, rounded as RecBole rounds them."""
    return {metric: round(float(value(ranks).sum()) / users, 4) for metric, value in METRICS.items()}


def evaluation(ranks: Mapping[str, Sequence[int]], everyone: int, **more: Any) -> dict[str, Any]:
    """The summary of an evaluate stage over hit users with these ranks and `everyone` users."""
    methods = []
    by_method = {method: np.array(each) for method, each in ranks.items()}
    hits = len(by_method["base"])
    for scope, users in (("all_users", everyone), ("hit_users", hits)):
        for method, each in by_method.items():
            versus = compare_ranks(each, by_method["base"], seed=0, draws=200, users=users)
            methods.append(
                {
                    "method": method,
                    "description": DESCRIPTIONS[method],
                    "diagnostic": method in DIAGNOSTIC,
                    "scope": scope,
                    "n": users,
                    "metrics": rounded(each, users),
                    "unchanged": float(np.mean(each == by_method["base"])),
                    "vs_base": {} if method == "base" else versus,
                }
            )
        adjust([e["vs_base"] for e in methods if e["scope"] == scope and not e["diagnostic"]])
    pairs = [pair for pair in (("sft", "prior"), ("sft", "shuffled")) if set(pair) <= set(ranks)]
    comparisons = [
        {
            "method": method,
            "versus": versus,
            "scope": "hit_users",
            "metrics": compare_ranks(by_method[method], by_method[versus], seed=0, draws=200),
        }
        for method, versus in pairs
    ]
    adjust([pair["metrics"] for pair in comparisons if pair["versus"] not in DIAGNOSTIC])
    return {
        "requests": everyone,
        "hit_users": hits,
        "methods": methods,
        "comparisons": comparisons,
        "truth": {"sft": {"habit": 1.0, "kind": 0.75, "why": 0.5, "all": 0.25}} if "sft" in ranks else {},
        **more,
    }


def recommender(diff: float, users: int) -> dict[str, Any]:
    """The entry of a recommender that ranks all items, with one metric."""
    return {
        "method": "SASRec",
        "description": DESCRIPTIONS["SASRec"],
        "diagnostic": False,
        "scope": "all_users",
        "n": users,
        "metrics": {metric: 0.1 for metric in METRICS},
        "unchanged": None,
        "vs_base": {"ndcg@10": {"diff": diff, "low": diff - 0.1, "high": diff + 0.1, "p": 0.5, "p_holm": 1.0}},
    }


ITEMS = 90
LENGTH = 10  # of a candidate list


def sid(item: int) -> tuple[int, ...]:
    """The semantic ID of an item, from 1."""
    return (item % 8, item // 8, 0, 0)


def write_lists(folders: Mapping[str, Path], ranks: Mapping[str, Sequence[int]], users: Sequence[str]) -> None:
    """Write the semantic IDs, the test lists and the answers in which the targets have these ranks.

    User number n, from 0, has the items 1 and 2 as history and the candidates n + 11 to n + 20 in another order: the
    target is item n + 11, and the others follow in ascending order. The reasoning of sft cites the target.
    """

    def order(number: int, rank: int) -> list[str]:
        first, *others = range(number + 11, number + 11 + LENGTH)
        return [str(item) for item in (*others[: rank - 1], first, *others[rank - 1 :])]

    write_lines(folders["tokenizer"] / "sids.jsonl", ({"item_id": str(n), "sid": sid(n)} for n in range(1, ITEMS + 1)))
    lines = []
    for number, user in enumerate(users):
        base, prior = order(number, ranks["base"][number]), order(number, ranks.get("prior", ranks["base"])[number])
        lines.append(
            {
                "request_id": f"test/{user}",
                "user_id": user,
                "split": "test",
                "history": ["1", "2"],
                "target": str(number + 11),
                "candidates": base,
                "log_prior": [-float(prior.index(item)) for item in base],
            }
        )
    write_lines(folders["prior"] / "test.jsonl", lines)
    for method in ranks.keys() - {"base", "oracle", "prior"}:
        cited = [sid_text(sid(number + 11)) for number in range(len(users))]
        write_lines(
            folders[stage_name(method)] / "rankings.jsonl",
            (
                {
                    "request_id": f"test/{user}",
                    "ranking": order(number, ranks[method][number]),
                    "status": "ok",
                    "reasoning": f"Best is {cited[number]} <b>" if method == "sft" else "",
                }
                for number, user in enumerate(users)
            ),
        )


def finished(
    folder: Path,
    *,
    seed: int = 2020,
    llm: bool = True,
    ranks: Mapping[str, Sequence[int]] | None = None,
    users: Sequence[str] = "abcdef",
    everyone: int = 60,
    entries: Sequence[dict[str, Any]] = (),
    stages: Mapping[str, dict[str, Any]] | None = None,
    preset: str = "smoke",
    dataset: str = "ml-100k",
    config: str = "",
) -> FinishedRun:
    """A finished run in `folder`.

    Args:
        folder: where the stages and the run are written.
        seed: seed of the run.
        llm: whether the run has a language model.
        ranks: ranks of the targets under each method.
        users: the hit users.
        everyone: number of all users.
        entries: further entries of methods.
        stages: further stages, with their summaries.
        preset: name of the preset in the result. That of the settings is smoke.
        dataset: name of the data set, whose item file has the items 1 to 90.
        config: further lines of config.yaml.
    """
    if ranks is None:
        ranks = RANKS if llm else {method: RANKS[method] for method in ("base", "oracle", "prior")}
    summary = evaluation(ranks, everyone)
    summary["methods"] += list(entries)
    answers = {stage_name(method): {} for method in ranks if method not in ("base", "oracle", "prior")}
    summaries = {**STAGES, **answers, **(LLM_STAGES if llm else {}), **(stages or {}), "evaluate": summary}
    records, folders = [], {}
    for number, (stage, values) in enumerate(summaries.items()):
        folders[stage] = folder / "stages" / stage
        folders[stage].mkdir(parents=True)
        record = StageRecord(
            stage=stage,
            key=f"{stage}-{seed}",
            version=1,
            needs={},
            settings={},
            seconds=10.0 * number + seed,
            peak_memory_mb=100 + number,
            summary=values,
            code="1.0 abc",
        )
        write_manifest(folders[stage], record)
        records.append(record)
        if stage in LOGS:
            (folders[stage] / "log.json").write_text(json.dumps(LOGS[stage]))
    write_lists(folders, ranks, users)
    frame = pd.DataFrame({"user": list(users), "history": [2, 2, 3, 9, 9, 9][: len(users)], "popularity": 1, **ranks})
    frame.to_csv(folders["evaluate"] / "per_user.csv", index=False)
    if llm:
        (folders["evaluate"] / "examples.md").write_text("valid/u7, target from 2 to 1.\n")
    path = folder / "runs" / f"seed-{seed}" / "result.json"
    path.parent.mkdir(parents=True)
    return FinishedRun(
        path=path,
        command=f"run_recbole_gr2.py --seed={seed}",
        dataset=dataset,
        base_model="SASRec",
        llm="random",
        preset=preset,
        seed=seed,
        settings={"sft_steps": {"value": 5, "from": "command line"}},
        config=f"preset: smoke\ndataset: {dataset}\nseed: {seed}\n{config}",
        records=tuple(records),
        cached=tuple(number % 2 == 0 for number in range(len(records))),
        folders=folders,
    )
