"""Prior: features of the candidates, and a small model that turns them into a probability of each candidate.

The language model starts from this prior. Features of train requests are computed from training interactions without
the targets of the train requests, like their candidate lists; those of validation and test requests from all training
interactions. The prior is fitted to train requests that contain their target. Validation requests decide when to stop.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from safetensors.torch import save_file

from recbole_gr2.artifacts import (
    SPLITS,
    StoredFeatures,
    numbered_requests,
    read_embeddings,
    write_feature_names,
    write_features,
    write_requests,
)
from recbole_gr2.config import Settings
from recbole_gr2.distributed import in_processes
from recbole_gr2.errors import ConfigurationError, GR2Error, QualityCheckError
from recbole_gr2.features.extraction import TrainingData, extract_features, find_providers, make_describes
from recbole_gr2.features.prior import cross_fit, fit_priors, log_prior
from recbole_gr2.features.providers import PROVIDERS, Describe
from recbole_gr2.features.trees import cross_fit_trees, fit_trees, save_trees, scores_of
from recbole_gr2.lists import ranks_by_trees
from recbole_gr2.model.linear import EXACT_ITEMS
from recbole_gr2.progress import Loop
from recbole_gr2.ranking import ndcg_at
from recbole_gr2.seeding import derive_seed
from recbole_gr2.store import module_hash, read_json
from recbole_gr2.types import CandidateFeatures, Context, Request, Stage

CHUNK = 1024  # lists that are in memory at a time, a multiple of the lists that pass through the prior at a time


def run(context: Context) -> dict[str, Any]:
    """Write <split>.jsonl, the requests with their prior, features.json and the feature arrays, prior.safetensors.

    Train requests without a training signal get no prior, because nothing is learned from them. Without feature
    providers no request gets one. Requests are read and written in chunks, so that they are not all in memory.
    """
    settings, data = context.settings, context.data
    if not settings["prior_features"]:
        for split in SPLITS:
            requests = (request for chunk in _chunks(context, split) for request in chunk)
            write_requests(context.folder / f"{split}.jsonl", requests, data.catalog)
        context.say("no feature providers, so there is no prior")
        return {"features": []}
    names, train, hits = _write_features(context)
    seed = derive_seed(settings["seed"], "evidence")
    valid = hits.features, hits.relevance
    prior, steps, error = fit_priors(
        train.features,
        train.relevance,
        valid=valid,
        steps=[settings["prior_steps"]] * settings["prior_fits"],
        seed=seed,
    )
    typical = round(sum(steps) / len(steps))
    of_train = cross_fit(train.features, train.relevance, users=train.users, steps=typical, seed=seed)
    save_file(prior.state_dict(), context.folder / "prior.safetensors")
    write_feature_names(context.folder, names)
    summary: dict[str, Any] = {"features": names, "steps": steps, "valid_cross_entropy": error}
    trees, ranker_of_train = None, [list[float]()] * len(of_train)
    if ranks_by_trees(settings):
        seed = derive_seed(settings["seed"], "ranker")
        trees = fit_trees(train.features, train.relevance, valid=valid, seed=seed)
        count = summary["trees"] = trees.best_iteration_
        save_trees(trees, context.folder)
        ranker_of_train = cross_fit_trees(train.features, train.relevance, users=train.users, trees=count, seed=seed)
        context.say(f"cand_ranker lambdamart: {count} trees")

    def scored(split: str, ranks: list[tuple[int, int]]) -> Iterator[Request]:
        """The requests of a split with their prior. Adds the ranks of listed targets, but of no test target."""
        stored, rows_of_train = StoredFeatures(context.folder, split), zip(of_train, ranker_of_train, strict=True)
        for chunk in _chunks(context, split):
            used = _used(chunk, split)
            if split == "train":
                rows = list(islice(rows_of_train, len(used)))
            else:
                features = [stored.next(request) for request in used]
                rankers = scores_of(trees, features) if trees else [[]] * len(used)
                rows = list(zip(log_prior(prior, features), rankers, strict=True))
            joined = {
                request.request_id: replace(request, prior=tuple(row), ranker=tuple(ranker))
                for request, (row, ranker) in zip(used, rows, strict=True)
            }
            if split != "test":
                ranks += [(r.target_rank, r.by_prior.index(r.target) + 1) for r in joined.values() if r.target_rank]
            yield from (joined.get(request.request_id, request) for request in chunk)

    quality = {}
    for split in SPLITS:
        ranks: list[tuple[int, int]] = []
        write_requests(context.folder / f"{split}.jsonl", scored(split, ranks), data.catalog)
        if split != "test":
            quality[split] = _quality(ranks)
            context.say(
                f"{split}: target first {quality[split]['recall@1']:.4f} (base {quality[split]['base recall@1']:.4f}), "
                f"ndcg@5 {quality[split]['ndcg@5']:.4f} (base {quality[split]['base ndcg@5']:.4f}), "
                f"{quality[split]['requests']:,} requests"
            )
    return {**summary, "quality": quality}


class _Lists(NamedTuple):
    """Features, relevance of the candidates, and user of the lists that a prior is fitted to or validated on."""

    features: list[CandidateFeatures]
    relevance: list[Sequence[int]]
    users: list[str]


def _chunks(context: Context, split: str) -> Iterator[list[Request]]:
    """The candidate lists of a split, `CHUNK` at a time."""
    lines = numbered_requests(context.folders["candidates"] / f"{split}.jsonl", context.data.catalog)
    while chunk := [request for _, request in islice(lines, CHUNK)]:
        yield chunk


def _used(requests: Sequence[Request], split: str) -> list[Request]:
    """The requests that get features: all but train requests without a training signal."""
    return [request for request in requests if split != "train" or request.has_signal]


def _write_features(context: Context) -> tuple[list[str], _Lists, _Lists]:
    """Write the features of every request.

    Returns:
        The names of the candidate features, the train lists, and the validation lists that contain their target.
    """
    settings, data = context.settings, context.data
    embeddings = read_embeddings(context.folders["embeddings"])
    lists = read_json(context.folders["candidates"] / "stats.json")
    names: list[str] = []
    kept = {"train": _Lists([], [], []), "valid": _Lists([], [], [])}
    known: dict[str, tuple[str, ...]] = {"hold_out": ("train",), "train": ("valid", "test")}
    if settings["refit"]:
        known = {"hold_out": ("train",), "train": ("valid",), "refit": ("test",)}
    for interactions, splits in known.items():
        training = TrainingData(
            catalog=data.catalog,
            sequences=data.known_items(interactions),
            times=data.known_times(interactions),
            embeddings=embeddings,
        )
        _say_sparse(context, training)
        describes = make_describes(settings["prior_features"], training)
        for split in splits:
            with Loop(f"features, {split} list", lists[split]["lists"]) as loop:
                features = _features(context, split, describes, loop, names, kept.get(split))
                count = write_features(context.folder, split, features)
            if not count:
                raise QualityCheckError(
                    f"no {split} list has features",
                    where="the prior stage",
                    why="the split has no list, or no train list has candidates of different relevance",
                    do="raise cand_pool or cand_num, so that more train lists contain their target",
                )
            context.say(f"{split}: {len(names)} candidate features of {count:,} requests")
        del training, describes  # Their item-item matrices take gigabytes. Free them before the next are computed.
    return names, kept["train"], kept["valid"]


def _features(
    context: Context, split: str, describes: Sequence[Describe], loop: Loop, names: list[str], kept: _Lists | None
) -> Iterator[CandidateFeatures]:
    """Yield the features of the requests of a split.

    Args:
        context: the context of the stage.
        split: name of the split.
        describes: the functions that compute the features.
        loop: the progress.
        names: the names of the features of a candidate; [] before the first request, when they are added.
        kept: where to keep train lists, and validation lists that contain their target.
    """
    providers = context.settings["prior_features"]
    # The user's own feature providers can use torch, or depend on the requests before.
    own = any(name not in PROVIDERS for name in providers)
    processes = 1 if own or sys.platform != "linux" else torch.get_num_threads()
    for number, chunk in enumerate(_chunks(context, split)):
        loop.at(number * CHUNK)
        used = _used(chunk, split)
        if not used:
            continue
        features: list[CandidateFeatures] = []
        for found, rows in in_processes(partial(extract_features, names=providers, data=describes), used, processes):
            names += () if names else found
            if found != names:
                _refuse(found, names, split, context.settings)
            features += rows
        for request, row in zip(used, features, strict=True):
            if kept is not None and request.target_rank:
                kept.features.append(row)
                kept.relevance.append(request.relevance)
                kept.users.append(request.user_token)
        yield from features


def _refuse(found: list[str], names: list[str], split: str, settings: Settings) -> NoReturn:
    """Raise the error of requests whose features have other names than those of the train requests."""
    raise GR2Error(
        f"the features of the {split} requests are {found}, and those of the train requests {names}",
        where=f"prior_features {settings['prior_features']}",
        why="the columns of the features must mean the same for every request",
        do="derive the names of features from nothing but the items, not from the training interactions",
    )


def _say_sparse(context: Context, training: TrainingData) -> None:
    """Print whether the weights of the feature provider `linear` are sparse."""
    items = len(set().union(*training.sequences))
    if "linear" in context.settings["prior_features"] and items > EXACT_ITEMS:
        context.say(f"linear has sparse weights, because {items:,} items have interactions, more than {EXACT_ITEMS:,}")


def _quality(ranks: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Metrics of the base order and of the prior's order, over requests that contain their target.

    Args:
        ranks: rank of the target in base order and by the prior, from 1, of each request.
    """
    base, prior = np.array(ranks).reshape(-1, 2).T
    return {
        "requests": len(ranks),
        "recall@1": float((prior == 1).mean()),
        "base recall@1": float((base == 1).mean()),
        "ndcg@5": float(ndcg_at(prior, 5).mean()),
        "base ndcg@5": float(ndcg_at(base, 5).mean()),
    }


def check_settings(settings: Settings) -> None:
    """Check that the feature providers exist, and that one of them has features for one base model."""
    find_providers(settings["prior_features"])
    if settings["prior_features"] == ["sources"] and len(settings["base_model"]) == 1 and not settings["cand_file"]:
        raise ConfigurationError(
            "prior_features is [sources], which has no features with one base model",
            where="prior_features",
            why="the prior and LambdaMART would have nothing to learn from",
            do="name further features such as base, or several base models",
        )


def key_values(settings: Settings) -> dict[str, Any]:
    """Return the hashes of the modules of the user's own feature providers, and whether LambdaMART is fitted."""
    own = [name for name in settings["prior_features"] if ":" in name]
    hashes = {f"{name}.sha": module_hash(name.partition(":")[0], where="prior_features") for name in own}
    return {**hashes, **({"cand_ranker": "lambdamart"} if ranks_by_trees(settings) else {})}


STAGE = Stage(
    name="prior",
    version=9,
    run=run,
    settings=("prior_", "refit", "seed"),
    needs=("candidates", "embeddings"),
    check=check_settings,
    key_values=key_values,
)
