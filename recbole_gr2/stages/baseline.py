"""A baseline: another recommender over the whole catalogue, evaluated like the base model, for the same table.

A RecBole model is trained here; those made of language models are trained before, by midtrain and onerec_think.
"""

from __future__ import annotations

import numpy as np

from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.evaluator import evaluate_rows
from recbole_gr2.generator import ONEREC_THINK
from recbole_gr2.stages import Context, onerec_think
from recbole_gr2.stages.candidates import recommender
from recbole_gr2.stages.tokenizer import load_items
from recbole_gr2.store import write_json

BEYOND = 10**9  # rank of a target that the evaluator does not reach


def run(context: Context) -> dict:
    """Writes test.json, users and ranks of their targets, for the model that the stage is named after.

    Of a RecBole model it writes model/ (weights, facts), too. A baseline recommends from the whole catalogue, so it has a
    row over all users alone.
    """
    if context.stage in ONEREC_THINK:
        model = onerec_think.recommender(context, load_items(context.folders["tokenizer"], context.data.items))
    else:
        model = recommender(context, context.folder / "model", model=context.stage, say=context.say)
    ranks = TargetRanks(context.data)
    metrics = evaluate_rows(context.data, model, {context.stage: None}, split="test", watch=ranks.add)[context.stage]
    write_json(context.folder / "test.json", {"users": ranks.users, "ranks": ranks.ranks})
    context.say(f"{context.stage}: {metrics}")
    return {"metrics": metrics, **model.facts}


class TargetRanks:
    """User tokens of rows, and the 1-based rank of each target, BEYOND where the evaluator does not look."""

    def __init__(self, data: Data) -> None:
        self.data, self.users, self.ranks = data, [], []

    def add(self, batch, scores) -> None:
        """One batch of rows with its scores (B, N + 1)."""
        import torch

        top = torch.topk(scores, self.data.reach(1), dim=-1).indices.cpu()
        hits = (top == batch[self.data.iid].unsqueeze(1)).numpy()
        self.ranks += np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, BEYOND).tolist()
        self.users += [self.data.user_tokens[user] for user in batch[self.data.uid].tolist()]
