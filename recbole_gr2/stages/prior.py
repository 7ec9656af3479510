"""Prior: features of the candidates, and a small model that turns them into a probability of each candidate.

The language model starts from this prior. Features of train requests are computed from training interactions without
the targets of the train requests, like their candidate lists; those of validation and test requests from all training
interactions. The prior is fitted to train requests that contain their target. Validation requests decide when to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from safetensors.torch import save_file

from recbole_gr2.artifacts import (
    SPLITS,
    read_embeddings,
    read_requests,
    write_feature_names,
    write_features,
    write_requests,
)
from recbole_gr2.config import Settings
from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.features.extraction import TrainingData, extract_features, find_providers
from recbole_gr2.features.prior import cross_fit, fit_priors, log_prior
from recbole_gr2.features.trees import cross_fit_trees, fit_trees, save_trees, scores_of
from recbole_gr2.lists import ranks_by_trees
from recbole_gr2.model.linear import EXACT_ITEMS
from recbole_gr2.ranking import ndcg_at
from recbole_gr2.seeding import derive_seed
from recbole_gr2.store import module_hash
from recbole_gr2.types import CandidateFeatures, Context, Request, Stage


def run(context: Context) -> dict[str, Any]:
    """Write <split>.jsonl, the requests with their prior, features.json and the feature arrays, prior.safetensors.

    Train requests without a training signal get no prior, because nothing is learned from them. Without feature
    providers no request gets one.
    """
    settings, data = context.settings, context.data
    requests = {
        split: read_requests(context.folders["candidates"] / f"{split}.jsonl", data.catalog) for split in SPLITS
    }
    if not settings["prior_features"]:
        for split in SPLITS:
            write_requests(context.folder / f"{split}.jsonl", requests[split], data.catalog)
        context.say("no feature providers, so there is no prior")
        return {"features": []}
    used = {**requests, "train": [request for request in requests["train"] if request.has_signal]}
    names, features = _features(context, used)
    seed = derive_seed(settings["seed"], "evidence")
    relevance = [request.relevance for request in used["train"]]
    hits = [position for position, request in enumerate(used["valid"]) if request.target_rank]
    valid = [features["valid"][n] for n in hits], [used["valid"][n].relevance for n in hits]
    prior, steps, error = fit_priors(
        features["train"],
        relevance,
        valid=valid,
        steps=[settings["prior_steps"]] * settings["prior_fits"],
        seed=seed,
    )
    priors = {split: log_prior(prior, features[split]) for split in ("valid", "test")}
    users = [request.user_token for request in used["train"]]
    typical = round(sum(steps) / len(steps))
    priors["train"] = cross_fit(features["train"], relevance, users=users, steps=typical, seed=seed)
    save_file(prior.state_dict(), context.folder / "prior.safetensors")
    write_feature_names(context.folder, names)
    summary: dict[str, Any] = {"features": names, "steps": steps, "valid_cross_entropy": error}
    rankers: dict[str, list[list[float]]] = {}
    if ranks_by_trees(settings):
        seed = derive_seed(settings["seed"], "ranker")
        trees = fit_trees(features["train"], relevance, valid=valid, seed=seed)
        rankers = {split: scores_of(trees, features[split]) for split in ("valid", "test")}
        count = summary["trees"] = trees.best_iteration_
        save_trees(trees, context.folder)
        rankers["train"] = cross_fit_trees(features["train"], relevance, users=users, trees=count, seed=seed)
        context.say(f"cand_ranker lambdamart: {count} trees")
    quality = {}
    for split in SPLITS:
        write_features(context.folder, split, features[split])
        scores = rankers.get(split, [[]] * len(used[split]))
        with_prior = {
            request.request_id: replace(request, prior=tuple(row), ranker=tuple(ranker))
            for request, row, ranker in zip(used[split], priors[split], scores, strict=True)
        }
        joined = [with_prior.get(request.request_id, request) for request in requests[split]]
        write_requests(context.folder / f"{split}.jsonl", joined, data.catalog)
        if split != "test":
            quality[split] = _quality([r for r in with_prior.values() if r.target_rank])
            context.say(
                f"{split}: target first {quality[split]['recall@1']:.4f} (base {quality[split]['base recall@1']:.4f}), "
                f"ndcg@5 {quality[split]['ndcg@5']:.4f} (base {quality[split]['base ndcg@5']:.4f}), "
                f"{quality[split]['requests']:,} requests"
            )
    return {**summary, "quality": quality}


def _features(
    context: Context, requests: dict[str, list[Request]]
) -> tuple[list[str], dict[str, list[CandidateFeatures]]]:
    """Names of the candidate features, and the features of every request by split."""
    settings, data = context.settings, context.data
    embeddings = read_embeddings(context.folders["embeddings"])
    names: list[str] = []
    features: dict[str, list[CandidateFeatures]] = {}
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
        together = [request for split in splits for request in requests[split]]
        found, rows = extract_features(together, settings["prior_features"], training)
        if names and found != names:
            raise GR2Error(
                f"the features of the {splits[0]} requests are {found}, and those of the train requests {names}",
                where=f"prior_features {settings['prior_features']}",
                why="the columns of the features must mean the same for every request",
                do="derive the names of features from nothing but the items, not from the training interactions",
            )
        names = found
        for split in splits:
            features[split], rows = rows[: len(requests[split])], rows[len(requests[split]) :]
    for split in SPLITS:
        context.say(
            f"{split}: {len(names)} candidate features and {features[split][0].pairs.shape[2]} pair features of "
            f"{len(features[split]):,} requests"
        )
    return names, features


def _say_sparse(context: Context, training: TrainingData) -> None:
    """Print whether the weights of the feature provider `linear` are sparse."""
    items = len(set().union(*training.sequences))
    if "linear" in context.settings["prior_features"] and items > EXACT_ITEMS:
        context.say(f"linear has sparse weights, because {items:,} items have interactions, more than {EXACT_ITEMS:,}")


def _quality(requests: Sequence[Request]) -> dict[str, Any]:
    """Metrics of the prior's order and of the base order, over requests that contain their target."""
    base = np.array([request.target_rank for request in requests])
    prior = np.array([request.by_prior.index(request.target) + 1 for request in requests])
    return {
        "requests": len(requests),
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
    version=8,
    run=run,
    settings=("prior_", "refit", "seed"),
    needs=("candidates", "embeddings"),
    check=check_settings,
    key_values=key_values,
)
