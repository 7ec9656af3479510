"""The requests that stages train on and report over."""

from __future__ import annotations

import random

from recbole_gr2.artifacts import load_requests
from recbole_gr2.bridge.data import Data
from recbole_gr2.seeding import derive_seed
from recbole_gr2.types import Context, Request


def training_requests(context: Context, limit: int | None = None, purpose: str = "") -> list[Request]:
    """Return the train requests that contain their target and candidates of different relevance.

    Args:
        context: a context whose stage needs the prior stage.
        limit: return at most so many, sampled without replacement.
        purpose: name that the seed of the sample is derived from.
    """
    requests = [request for request in load_requests(context, "train") if request.has_signal]
    if limit is not None and limit < len(requests):
        requests = random.Random(derive_seed(context.settings["seed"], purpose, "lists")).sample(requests, limit)
    return requests


def reported_requests(context: Context) -> tuple[list[Request], list[Request]]:
    """Return the test requests that the run reports over, and those of them that contain their target.

    The second list holds the requests of the hit users.
    """
    requests, limit = load_requests(context, "test"), context.settings["eval_max_lists"]
    if limit is not None and limit < len(requests):
        requests = random.Random(derive_seed(context.settings["seed"], "test lists")).sample(requests, limit)
    return requests, [request for request in requests if request.target_rank]


def training_histories(data: Data, hold_out: bool) -> list[list[int]]:
    """Return the training interactions of every user as item ids, oldest first.

    Args:
        data: the data set.
        hold_out: leave out the targets of the train requests.
    """
    if hold_out:
        return data.sequences_without_train_targets()
    return [sequence.tolist() for sequence in data.train_sequences().values()]
