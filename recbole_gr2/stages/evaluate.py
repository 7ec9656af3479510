"""Evaluate: every stage's model re-ranks the test lists, and RecBole's evaluator has the last word.

Rows: base (the base model's own order), oracle (the target first), evidence (the prior alone, which the language model
starts from), LambdaMART over the same evidence, each stage's model, the RL model on shuffled candidates, which shows
how far it goes by position, and the baselines. Two scopes: all users, and in_list, the users whose list holds the
target. With one target a ranking metric depends on the lists that hold it alone, so these are the ones re-ranked.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from recbole_gr2.bridge import ListedBase, evaluate_rows
from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.generator import ONEREC_THINK
from recbole_gr2.llm.likelihood import continuation_log_likelihood
from recbole_gr2.prompts import PromptMaker, history_ids, shuffled_order
from recbole_gr2.ranking import holm, ndcg_at, paired_comparison, promote, recall_at
from recbole_gr2.rerankers.lambdamart import lambdamart
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.tokens import sid_text
from recbole_gr2.stages import Context
from recbole_gr2.stages.baseline import BEYOND
from recbole_gr2.stages.candidates import recommender
from recbole_gr2.stages.evidence import load_facts, load_requests
from recbole_gr2.stages.midtrain import code_choices, load_stage_model, use_bf16
from recbole_gr2.stages.onerec_think import candidate_scores
from recbole_gr2.stages.sft import answer_grammar, answer_requests
from recbole_gr2.stages.tokenizer import load_items
from recbole_gr2.store import write_json, write_lines
from recbole_gr2.types import Item, Request

DIAGNOSTIC = ("oracle", "shuffled")  # rows that make no claim, and so belong to no family of tests
OWN = "the base model's own scores"
MODELS = ("lambdamart", "midtrain", "sft", "rl", "shuffled")
Rankings = dict[str, tuple[int, ...]]


def run(context: Context) -> dict:
    """Writes rows.json, per_user.csv and answers-<row>.jsonl.

    Raises:
        GR2Error: an invariant does not hold.
    """
    settings, data = context.settings, context.data
    unknown = set(settings["eval_rows"]) - set(MODELS)
    if unknown or settings["eval_scope"] not in ("in_list", "all"):
        raise ConfigurationError(
            f"eval_rows {settings['eval_rows']}, eval_scope {settings['eval_scope']}",
            do=f"choose rows from {', '.join(MODELS)} and scope in_list or all",
        )
    items = load_items(context.folders["tokenizer"], data.items)
    requests = load_requests(context, "test", items)
    limit = settings["eval_max_lists"]
    if limit is not None and limit < len(requests):
        requests = random.Random(derive_seed(settings["seed"], "test lists")).sample(requests, limit)
    in_list = [r for r in requests if r.target_rank]
    scored = in_list if settings["eval_scope"] == "in_list" else requests
    facts: dict = {"lists": len(requests), "in_list": len(in_list), "rankings": {}}

    rankings: dict[str, Rankings] = {
        "base": {r.request_id: r.items for r in requests},
        "oracle": {r.request_id: promote(r.items, r.target) for r in in_list},
    }
    by_prior = {r.request_id: r.by_prior for r in requests}
    if by_prior != rankings["base"]:
        rankings["evidence"] = by_prior
    for row in (*settings["eval_rows"], *(row for name, row in ONEREC_THINK.items() if name in context.folders)):
        if row == "lambdamart" and not context.inputs["evidence"].facts["facts"]:
            context.say("no evidence, so no lambdamart row")
            continue
        started = time.monotonic()
        rankings[row], how = _rank(context, row, items, scored)
        seconds = time.monotonic() - started
        unchanged = float(np.mean([rankings[row][r.request_id] == r.items for r in scored]))
        as_evidence = float(np.mean([rankings[row][r.request_id] == by_prior[r.request_id] for r in scored]))
        facts["rankings"][row] = {
            **how, "unchanged": unchanged, "as_evidence": as_evidence, "seconds": round(seconds, 1),
            "lists_per_second": round(len(scored) / seconds, 2),
        }  # fmt: skip
        context.say(f"{row}: {len(scored):,} lists in {seconds:.0f} s, {unchanged:.1%} unchanged, {how}")
    facts["rows"] = _metrics(context, requests, in_list, rankings)
    write_json(context.folder / "rows.json", facts["rows"])
    _write_per_user(context, in_list, rankings)
    return facts


def _rank(context: Context, row: str, items: Sequence[Item], requests: list[Request]) -> tuple[Rankings, dict]:
    """One model's rankings of these requests, and what is known of how they came about."""
    settings = context.settings
    if row == "midtrain":
        return likelihood_rankings(context, items, requests), {}
    if row in ONEREC_THINK.values():
        scores = candidate_scores(context, items, requests, row)
        return {r.request_id: by_score(r, own) for r, own in zip(requests, scores, strict=True)}, {}
    if row == "lambdamart":
        return lambdamart_rankings(context, items, requests)
    model, tokenizer = load_stage_model(context, "rl" if row == "shuffled" else row)
    orders = None
    if row == "shuffled":
        orders = {r.request_id: shuffled_order(r, settings["seed"], "shuffled") for r in requests}
    answers, _ = answer_requests(
        model, tokenizer, PromptMaker.of(settings, items), answer_grammar(tokenizer, settings), requests,
        bf16=use_bf16(settings, model.device.type), orders=orders, batch_size=settings["eval_batch_lists"],
    )  # fmt: skip
    write_lines(
        context.folder / f"answers-{row}.jsonl",
        ({"request_id": a.request_id, "ranking": [items[i - 1].token for i in a.ranking], "status": a.status,
          "reasoning": a.reasoning, "output_tokens": a.output_tokens} for a in answers),
    )  # fmt: skip
    statuses = Counter(answer.status for answer in answers)
    readable = 1.0 - statuses["unreadable"] / len(answers)
    tokens = float(np.mean([answer.output_tokens for answer in answers]))
    promoted = Counter(r.items.index(a.ranking[0]) + 1 for r, a in zip(requests, answers, strict=True))
    return {a.request_id: a.ranking for a in answers}, {
        "readable": readable, "statuses": dict(statuses), "output_tokens": round(tokens, 1),
        "promoted_from_rank": {str(rank): promoted[rank] for rank in sorted(promoted)},
    }  # fmt: skip


def lambdamart_rankings(context: Context, items: Sequence[Item], requests: list[Request]) -> tuple[Rankings, dict]:
    """Candidates by LambdaMART over the evidence that GR2 has, fitted to the train lists that GR2 learns from."""
    lists = {}
    for split in ("train", "valid"):
        held = [r for r in load_requests(context, split, items) if r.target_rank]
        lists[split] = load_facts(context, split, held), [r.target_rank - 1 for r in held]
    scores, trees = lambdamart(lists["train"], lists["valid"], load_facts(context, "test", requests),
                               seed=derive_seed(context.settings["seed"], "lambdamart"))  # fmt: skip
    return {r.request_id: by_score(r, row) for r, row in zip(requests, scores, strict=True)}, {"trees": trees}


def by_score(request: Request, scores: Sequence[float]) -> tuple[int, ...]:
    """Candidates by descending score, ties in base order."""
    return tuple(item for _, item in sorted(zip(scores, request.items, strict=True), key=lambda pair: -pair[0]))


def likelihood_rankings(context: Context, items: Sequence[Item], requests: list[Request]) -> Rankings:
    """Candidates by the likelihood of their semantic IDs after the history, under the mid-trained model."""
    settings = context.settings
    model, tokenizer = load_stage_model(context, "midtrain")
    sids = {i.item_id: tokenizer(sid_text(i.sid), add_special_tokens=False)["input_ids"] for i in items}
    begin = sids[items[0].item_id][:1]
    prompts = [history_ids(r.history, items, tokenizer, settings["mid_max_length"]) + begin for r in requests]
    scores = continuation_log_likelihood(
        model, prompts, [[sids[i][1:-1] for i in r.items] for r in requests], pad_id=tokenizer.pad_token_id,
        batch_size=settings["eval_batch_lists"], bf16=use_bf16(settings, model.device.type),
        trie=code_choices(settings, tokenizer, items),
    )  # fmt: skip
    return {r.request_id: by_score(r, row) for r, row in zip(requests, scores, strict=True)}


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
    everyone = None if settings["eval_max_lists"] is None and not settings["cand_file"] else [
        users[r.user_token] for r in requests]  # fmt: skip
    scopes = {"all": everyone, "in_list": [users[r.user_token] for r in in_list]}
    by_user = {name: {users[r.user_token]: given[r.request_id] for r in requests if r.request_id in given}
               for name, given in rankings.items()}  # fmt: skip
    ranks = {name: _ranks(in_list, given) for name, given in rankings.items()}
    rows, own = [], {}
    for scope, ids in scopes.items():
        metrics = evaluate_rows(data, base, {**by_user, OWN: None}, split="test", users=ids)
        own[scope] = metrics.pop(OWN)
        count = len(data.rows("test")[1]) if ids is None else len(ids)
        for name, given in rankings.items():
            unchanged = float(np.mean([given[r.request_id] == r.items for r in in_list]))
            versus = {} if name == "base" else _comparisons(ranks[name], ranks["base"], count, settings)
            rows.append({"row": name, "scope": scope, "n": count, "metrics": metrics[name], "unchanged": unchanged,
                         "vs_base": versus})  # fmt: skip
    _check_invariants(rows, own, settings["cand_num"])
    rows += _model_rows(context, dict(zip((r.user_token for r in in_list), ranks["base"], strict=True)), everyone)
    for scope in scopes:
        _adjust([row["vs_base"] for row in rows if row["scope"] == scope and row["row"] not in DIAGNOSTIC])
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
        rows.append({"row": name, "scope": "all", "n": len(own), "metrics": context.inputs[name].facts["metrics"],
                     "unchanged": None, "vs_base": versus})  # fmt: skip
    return rows


def _ranks(requests: list[Request], rankings: Rankings) -> np.ndarray:
    """1-based rank of the target in each list that holds it, (n,)."""
    return np.array([rankings[r.request_id].index(r.target) + 1 for r in requests])


def _comparisons(ours: np.ndarray, base: np.ndarray, n: int, settings) -> dict[str, dict[str, float]]:
    """Paired differences to the base order over n users; those whose list lacks the target differ by 0."""
    missing = np.full(n - len(ours), BEYOND)
    ours, base = np.concatenate([ours, missing]), np.concatenate([base, missing])
    seed, compared = derive_seed(settings["seed"], "comparisons"), {}
    for metric, value in (("recall@1", lambda r: recall_at(r, 1)), ("recall@5", lambda r: recall_at(r, 5)),
                          ("ndcg@5", lambda r: ndcg_at(r, 5)), ("ndcg@10", lambda r: ndcg_at(r, 10))):  # fmt: skip
        compared[metric] = paired_comparison(value(ours), value(base), seed=seed, draws=settings["eval_draws"])
    return compared


def _adjust(family: list[dict[str, dict[str, float]]]) -> None:
    """Add Holm-adjusted p-values over all rows and metrics of one scope, in place."""
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
    """Rank of the target under every row, one line a user of the in_list scope."""
    import pandas as pd

    frame = pd.DataFrame({"user": [r.user_token for r in requests], "history": [len(r.history) for r in requests]})
    for name, given in rankings.items():
        frame[name] = _ranks(requests, given)
    frame.to_csv(context.folder / "per_user.csv", index=False)
