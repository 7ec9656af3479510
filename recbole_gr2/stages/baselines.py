"""Baselines: other RecBole models, trained and evaluated like the base model, for the same table."""

from __future__ import annotations

import numpy as np

from recbole_gr2.bridge import BaseModel, evaluate_rows
from recbole_gr2.stages import Context
from recbole_gr2.stages.candidates import recommender
from recbole_gr2.store import write_json

BEYOND = 10**9  # rank of a target that the evaluator does not reach


def run(context: Context) -> dict:
    """Writes <model>/ (weights, facts, test.json) for each of `models`.

    They are recommenders over the whole catalogue, so they have rows over all users alone.
    """
    rows = {}
    for name in context.settings["models"]:
        (context.folder / name).mkdir(exist_ok=True)
        model = recommender(context, context.folder / name, model=name, say=context.say)
        metrics = evaluate_rows(context.data, model, {name: None}, split="test")[name]
        users, ranks = target_ranks(model)
        write_json(context.folder / name / "test.json", {"users": users, "ranks": ranks})
        rows[name] = {"metrics": metrics, **model.facts}
        context.say(f"{name}: {metrics}")
    return {"rows": rows}


def target_ranks(model: BaseModel) -> tuple[list[str], list[int]]:
    """User tokens of the test rows, and the 1-based rank of each target, BEYOND where the evaluator does not look."""
    import torch

    data, users, ranks = model.data, [], []
    for batch, scores in model.scores("test"):
        targets = torch.tensor([data.target(user, "test") for user in batch.tolist()])
        top = torch.topk(model.judged(scores, targets), data.reach(1), dim=-1).indices
        hits = (top == targets.unsqueeze(1)).numpy()
        ranks += np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, BEYOND).tolist()
        users += [data.user_tokens[user] for user in batch.tolist()]
    return users, ranks
