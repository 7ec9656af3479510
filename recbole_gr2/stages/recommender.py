"""Stages of `models`: other recommenders for the whole catalogue, compared with the base model in the result table.

The stage trains a RecBole model. Other stages train the language models GR2Generator and OneRec-Think. The stage
`evaluate` computes the metrics. With `eval_split: valid` a second stage adds the recommendations of the validation
split.
"""

from __future__ import annotations

from typing import Any

from recbole_gr2.artifacts import write_recommendations
from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.evaluator import collect, depth_of, joined, recommend
from recbole_gr2.bridge.models import BaseModel
from recbole_gr2.config import GENERATOR, ONEREC_THINK, Settings
from recbole_gr2.onerec_think import search_width
from recbole_gr2.recommenders import (
    check_model,
    check_model_size,
    load_recommender,
    stages_of,
    training_options,
    validation_stage,
)
from recbole_gr2.types import Context, Stage


def run(context: Context) -> dict[str, Any]:
    """Write recommendations.npz of the test split, and model/ (weights, metadata) of a RecBole model.

    The stage has the name of the model. Ties are broken by the rule of the model, see `bridge.models.break_ties`.
    """
    model = load_recommender(context, context.stage)
    hits, users = _recommend(context, model, "test")
    if context.settings["eval_split"] == "test":
        context.say(f"{context.stage}: {hits:,} of {users:,} targets are among the first 10 items")
    return dict(model.metadata)


def run_validation(context: Context) -> dict[str, Any]:
    """Write recommendations.npz of the validation split by the trained model that the parameter `model` names."""
    name = context.parameters["model"]
    hits, users = _recommend(context, load_recommender(context, name), "valid")
    context.say(f"{name}: {hits:,} of {users:,} validation targets are among the first 10 items")
    return {"split": "valid"}


def _recommend(context: Context, model: BaseModel, split: str) -> tuple[int, int]:
    """Write recommendations.npz. Returns the number of targets among the first 10 items, and of all targets."""
    batches = recommend(model, split, depth_of(context.data), break_ties=True, check=True)
    scored = joined(batches, len(context.data.rows(split)[0]))
    recommendations = collect(context.data, scored, exclude_seen=model.exclude_seen)
    write_recommendations(context.folder, recommendations)
    ranks = recommendations.target_rank
    return int(((ranks > 0) & (ranks <= 10)).sum()), len(ranks)


def check_settings(settings: Settings) -> None:
    """Check that the recommenders exist."""
    for model in settings["models"]:
        check_model(model, settings, base=False)


def stages(settings: Settings) -> list[Stage]:
    """Declare a stage for each recommender, and a second one with `eval_split: valid`."""
    names = list(dict.fromkeys(settings["models"]))
    declared = [_stage(model, stages_of(model, settings, base=False)) for model in names]
    if settings["eval_split"] == "valid":
        declared += [
            Stage(
                name=validation_stage(model),
                version=1,
                run=run_validation,
                needs=(model, *stages_of(model, settings, base=False)),
                parameters={"model": model},
            )
            for model in names
        ]
    return declared


def _stage(model: str, needs: tuple[str, ...]) -> Stage:
    common: tuple[str, ...] = ("cand_exclude_seen", "seed")
    if model in ONEREC_THINK:
        return Stage(
            name=model,
            version=5,
            run=run,
            settings=common,
            needs=needs,
            key_values=lambda settings: {"beams": search_width(settings)},
            check=check_settings,
        )
    if model == GENERATOR:
        return Stage(
            name=model,
            version=3,
            run=run,
            settings=(*common, "cand_beams"),
            needs=needs,
            check=check_settings,
        )

    def key_values(settings: Settings) -> dict[str, Any]:
        return training_options(settings, model, base=False)

    def check_data(settings: Settings, data: Data) -> None:
        check_model_size(model, data, base=False)

    return Stage(
        name=model,
        version=3,
        run=run,
        settings=(*common, "models_options", "cand_beams", "refit"),
        needs=needs,
        key_values=key_values,
        check=check_settings,
        check_data=check_data,
    )
