"""Evaluate: RecBole's evaluator has the last word on every row.

Rows: base (the base model's own order), oracle (the target first), evidence (the prior alone, which the language model
starts from), what each re-ranker made of the lists, and the baselines. Two scopes: all users, and in_list, the users
whose list holds the target. With one target a ranking metric depends on the lists that hold it alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from recbole_gr2.bridge.evaluator import evaluate_rows
from recbole_gr2.bridge.models import ListedBase
from recbole_gr2.console import render_table
from recbole_gr2.errors import GR2Error
from recbole_gr2.prompts import kind, recent, shorten
from recbole_gr2.ranking import METRICS, holm, paired_comparison, promote
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.tokens import SID, sid_text
from recbole_gr2.stages import Context
from recbole_gr2.stages.baseline import BEYOND
from recbole_gr2.stages.candidates import recommender
from recbole_gr2.stages.rerank import PREFIX, Rankings, load_rankings, load_reasoning, reported_lists
from recbole_gr2.stages.tokenizer import load_items
from recbole_gr2.store import write_json
from recbole_gr2.teachers import true_statements
from recbole_gr2.types import Item, Request

PAIRS = (  # what each step is worth: its row, and the row that it has to beat
    ("sft", "evidence"),
    ("sft", "lambdamart"),
    ("sft", "onerec_think"),
    ("sft", "onerec_think-no-think"),
    ("distilled", "sft"),
    ("rl", "sft"),
    ("rl", "evidence"),
    ("rl", "lambdamart"),
    ("rl", "shuffled"),
    ("internalised", "rl"),
    ("internalised", "evidence"),
    ("evidence", "lambdamart"),
)
DIAGNOSTIC = ("oracle", "shuffled")  # rows that make no claim, and so belong to no family of tests
OWN = "the base model's own scores"
EXAMPLES = 2  # lists of each kind that are shown in words


def run(context: Context) -> dict:
    """Writes rows.json and per_user.csv, and examples.md where a row reasons.

    Raises:
        GR2Error: an invariant does not hold.
    """
    settings, items = context.settings, load_items(context.folders["tokenizer"], context.data.items)
    requests, in_list = reported_lists(context, items)
    context.say(f"{len(in_list):,} of {len(requests):,} lists hold their target")
    rankings: dict[str, Rankings] = {
        "base": {r.request_id: r.items for r in requests},
        "oracle": {r.request_id: promote(r.items, r.target) for r in in_list},
    }
    by_prior = {r.request_id: r.by_prior for r in requests}
    if by_prior != rankings["base"]:
        rankings["evidence"] = by_prior
    if "lambdamart" in settings["eval_rows"] and PREFIX + "lambdamart" not in context.folders:
        context.say("no evidence, so no lambdamart row")
    rerankers = {
        stage.removeprefix(PREFIX): folder for stage, folder in context.folders.items() if stage.startswith(PREFIX)
    }
    rankings |= {row: load_rankings(folder, items) for row, folder in rerankers.items()}
    rows = _metrics(context, requests, in_list, rankings)
    write_json(context.folder / "rows.json", rows)
    _write_per_user(context, in_list, rankings)
    said = {row: reasoning for row, folder in rerankers.items() if (reasoning := load_reasoning(folder))}
    if said:
        row = "rl" if "rl" in said else list(said)[-1]
        (context.folder / "examples.md").write_text(
            examples(in_list, row, rankings[row], said[row], items, settings["prompt_history"]), encoding="utf-8"
        )
    truth = (
        {}
        if settings["trace_teacher"] != "rules"
        else {
            row: truthfulness(in_list, reasoning, items, settings["prompt_history"]) for row, reasoning in said.items()
        }
    )
    return {
        "lists": len(requests),
        "in_list": len(in_list),
        "rows": rows,
        "pairs": _pairs(in_list, rankings, settings),
        "truth": truth,
    }


def truthfulness(
    requests: Sequence[Request], said: Mapping[str, str], items: Sequence[Item], shown: int
) -> dict[str, float]:
    """Share of these requests' answers, by request id, whose statements are true, if they are in the words of the rules
    teacher: each statement, and all of them."""
    found = [true_statements(said[r.request_id], r, items, shown) for r in requests]
    return {
        **{name: float(np.mean([each[name] for each in found])) for name in found[0]},
        "all": float(np.mean([all(each.values()) for each in found])),
    }


def examples(
    requests: Sequence[Request],
    row: str,
    rankings: Rankings,
    said: Mapping[str, str],
    items: Sequence[Item],
    shown: int,
) -> str:
    """In words, the lists in which a row moved the target furthest up, and those in which furthest down."""
    moved = {r.request_id: r.target_rank - rankings[r.request_id].index(r.target) - 1 for r in requests}
    ordered = sorted(requests, key=lambda r: -moved[r.request_id])
    chosen = [r for r in ordered[:EXAMPLES] if moved[r.request_id] > 0]
    chosen += [r for r in ordered[-EXAMPLES:] if moved[r.request_id] < 0]
    titles = {sid_text(item.sid): f"[{shorten(item.title, 60)}]" for item in items}

    def words(item: int) -> str:
        return shorten(items[item - 1].title, 60) + (f" ({kind(items[item - 1])})" if kind(items[item - 1]) else "")

    parts = []
    for request in chosen:
        ranking = rankings[request.request_id]
        table = [
            [str(place), str(ranking.index(item) + 1), "taken" if item == request.target else "", words(item)]
            for place, item in enumerate(request.items, start=1)
        ]
        reasoning = SID.sub(lambda found: titles.get(found[0], found[0]), said[request.request_id]).strip()
        parts.append(
            f"{request.request_id}, target from {request.target_rank} to {ranking.index(request.target) + 1}. History:"
            + "\n\n"
            + "".join(f"- {words(item)}\n" for item in recent(request.history, max(shown, 1)))
            + f"\n```\n{render_table(['base', row, 'target', 'candidate'], table)}\n```\n\n> {reasoning}\n"
        )
    return "\n".join(parts)


def _pairs(requests: list[Request], rankings: dict[str, Rankings], settings) -> list[dict]:
    """Paired differences between the rows of PAIRS that there are, in_list, Holm-adjusted."""
    pairs = [
        {
            "row": row,
            "versus": other,
            "metrics": _comparisons(
                _ranks(requests, rankings[row]), _ranks(requests, rankings[other]), len(requests), settings
            ),
        }
        for row, other in PAIRS
        if row in rankings and other in rankings
    ]
    adjust_pairs(pairs)
    return pairs


def _metrics(
    context: Context, requests: list[Request], in_list: list[Request], rankings: dict[str, Rankings]
) -> list[dict]:
    """RecBole's metrics of every row in both scopes, with paired comparisons to the base row.

    Raises:
        GR2Error: one of the invariants is broken: identity = base, Recall@K unchanged, oracle NDCG@K = base Recall@K.
    """
    settings, data = context.settings, context.data
    if settings["cand_file"]:
        base = ListedBase(data=data, requests=requests)
    else:
        base = recommender(context, context.folders["candidates"] / "base")  # loads: it is finished there
    users = {token: user for user, token in enumerate(data.user_tokens)}
    everyone = (
        None
        if settings["eval_max_lists"] is None and not settings["cand_file"]
        else [users[r.user_token] for r in requests]
    )
    scopes = {"all": everyone, "in_list": [users[r.user_token] for r in in_list]}
    by_user = {
        name: {users[r.user_token]: given[r.request_id] for r in requests if r.request_id in given}
        for name, given in rankings.items()
    }
    ranks = {name: _ranks(in_list, given) for name, given in rankings.items()}
    rows, own = [], {}
    for scope, ids in scopes.items():
        metrics = evaluate_rows(data, base, {**by_user, OWN: None}, split="test", users=ids)
        own[scope] = metrics.pop(OWN)
        count = len(data.rows("test")[1]) if ids is None else len(ids)
        for name, given in rankings.items():
            unchanged = float(np.mean([given[r.request_id] == r.items for r in in_list]))
            versus = {} if name == "base" else _comparisons(ranks[name], ranks["base"], count, settings)
            rows.append(
                {
                    "row": name,
                    "scope": scope,
                    "n": count,
                    "metrics": metrics[name],
                    "unchanged": unchanged,
                    "vs_base": versus,
                }
            )
    _check_invariants(rows, own, settings["cand_num"])
    rows += _model_rows(context, dict(zip((r.user_token for r in in_list), ranks["base"], strict=True)), everyone)
    for scope in scopes:
        adjust([row["vs_base"] for row in rows if row["scope"] == scope and row["row"] not in DIAGNOSTIC])
    return rows


def _model_rows(context: Context, base: dict[str, int], users: list[int] | None) -> list[dict]:
    """Rows of the other models, over all users alone: they recommend from the whole catalogue, not from the lists."""
    rows = []
    for name in dict.fromkeys(context.settings["models"]):
        if users is not None:
            context.say(f"{name}: no row, since it is evaluated on every user and this run on {len(users):,}")
            continue
        test = json.loads((context.folders[name] / "test.json").read_text(encoding="utf-8"))
        own = np.array([base.get(user, BEYOND) for user in test["users"]])
        versus = _comparisons(np.array(test["ranks"]), own, len(own), context.settings)
        rows.append(
            {
                "row": name,
                "scope": "all",
                "n": len(own),
                "metrics": context.inputs[name].facts["metrics"],
                "unchanged": None,
                "vs_base": versus,
            }
        )
    return rows


def _ranks(requests: list[Request], rankings: Rankings) -> np.ndarray:
    """1-based rank of the target in each list that holds it, (n,)."""
    return np.array([rankings[r.request_id].index(r.target) + 1 for r in requests])


def _comparisons(ours: np.ndarray, base: np.ndarray, n: int, settings) -> dict[str, dict[str, float]]:
    """Paired differences between two orders over n users; those whose list lacks the target differ by 0."""
    missing = np.full(n - len(ours), BEYOND)
    ours, base = np.concatenate([ours, missing]), np.concatenate([base, missing])
    seed, compared = derive_seed(settings["seed"], "comparisons"), {}
    for metric, value in METRICS.items():
        compared[metric] = paired_comparison(value(ours), value(base), seed=seed, draws=settings["eval_draws"])
    return compared


def adjust_pairs(pairs: list[dict]) -> None:
    """Holm-adjust pairs of rows as one family, in place, without those to a diagnostic row."""
    adjust([pair["metrics"] for pair in pairs if pair["versus"] not in DIAGNOSTIC])


def adjust(family: list[dict[str, dict[str, float]]]) -> None:
    """Add Holm-adjusted p-values over all comparisons of a family and their metrics, in place."""
    adjusted = holm({(row, metric): c["p"] for row, compared in enumerate(family) for metric, c in compared.items()})
    for (row, metric), p in adjusted.items():
        family[row][metric]["p_holm"] = p


def _check_invariants(rows: list[dict], own: dict[str, dict], count: int) -> None:
    by = {(row["row"], row["scope"]): row["metrics"] for row in rows}
    recall, ndcg = f"recall@{count}", f"ndcg@{count}"
    for (name, scope), metrics in by.items():
        base = own[scope]
        if name == "base" and _without_gauc(metrics) != _without_gauc(base):
            raise GR2Error("the base row differs from the base model", where=f"{scope}: {metrics} != {base}")
        if recall in metrics and metrics[recall] != base[recall]:
            raise GR2Error(f"re-ranking {count} items changed {recall}", where=f"{name}, {scope}")
        if name == "oracle" and ndcg in metrics and abs(metrics[ndcg] - base[recall]) > 1e-4:
            raise GR2Error(f"the oracle's {ndcg} is not the base model's {recall}", where=scope)


def _without_gauc(metrics: dict) -> dict:
    """GAUC gives tied scores their mean rank, and a re-ranked row has no ties; the others depend on the order alone."""
    return {name: value for name, value in metrics.items() if name != "gauc"}


def _write_per_user(context: Context, requests: list[Request], rankings: dict[str, Rankings]) -> None:
    """Rank of the target under every row, one line a user of the in_list scope, with what reports slice it by: the
    history's length, and how often the target was taken in training."""
    import pandas as pd

    taken = np.bincount(np.concatenate(list(context.data.train_sequences().values())))
    frame = pd.DataFrame(
        {
            "user": [r.user_token for r in requests],
            "history": [len(r.history) for r in requests],
            "popularity": [taken[r.target] if r.target < len(taken) else 0 for r in requests],
        }
    )
    for name, given in rankings.items():
        frame[name] = _ranks(requests, given)
    frame.to_csv(context.folder / "per_user.csv", index=False)


def read_per_user(folder: Path):
    """per_user.csv of an evaluate folder, as a frame."""
    import pandas as pd

    return pd.read_csv(folder / "per_user.csv", dtype={"user": str})
