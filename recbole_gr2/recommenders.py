"""Recommenders from the whole catalogue by name: RecBole models, GR2Generator and OneRec-Think."""

from __future__ import annotations

from typing import Any

from recbole_gr2.artifacts import load_catalog, read_embeddings
from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.fusion import FusedModel, Fusion
from recbole_gr2.bridge.generative import Generator
from recbole_gr2.bridge.models import BaseModel
from recbole_gr2.bridge.support import check_size, check_support, model_options
from recbole_gr2.bridge.training import load_model as load_base
from recbole_gr2.bridge.training import train_or_load
from recbole_gr2.config import GENERATOR, ONEREC_THINK, Settings, base_model_properties
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.model import device, uses_bf16
from recbole_gr2.model import input_of
from recbole_gr2.onerec_think import onerec_think_recommender
from recbole_gr2.policy import load_model, use_bf16, whole_midtrain
from recbole_gr2.prompts import history_ids
from recbole_gr2.sid.embed import item_text
from recbole_gr2.types import Context

# Folders in the stage of a base model: the base model, the hold-out base model, and the one of `refit`.
BASE, HOLD_OUT, REFIT = "base", "hold_out", "refit"
VALIDATION = "validation"  # stage with the recommendations of the validation split, for `eval_split: valid`
EVALUATION = ("metrics", "topk")  # RecBole's options that matter to the evaluate stage only
STAGE_OF = {"sids": "tokenizer", "text_embeddings": "embeddings"}  # Input of a model -> the stage that makes it.


def base_stage(model: str) -> str:
    """Return the name of the stage that trains a base model."""
    return f"base_model_{model}"


def validation_stage(model: str) -> str:
    """Return the name of the stage with the recommendations of one of `models` for the validation split."""
    return f"{VALIDATION}_{model}"


def stages_of(model: str, settings: Settings, *, base: bool) -> tuple[str, ...]:
    """Return the names of the stages that a recommender reads.

    Args:
        model: name of the recommender.
        settings: settings of the run.
        base: whether it is the base model, see `training_options`.
    """
    if model == GENERATOR:
        return ("tokenizer", whole_midtrain(settings))
    if model in ONEREC_THINK:
        return ("tokenizer", ONEREC_THINK[model])
    reads = input_of(model, model_options(model, settings, base=base))
    return (STAGE_OF[reads],) if reads in STAGE_OF else ()


def training_options(settings: Settings, model: str, *, base: bool) -> dict[str, object]:
    """Return RecBole's options and the defaults of a model, as values of a stage's key.

    Args:
        settings: settings of the run.
        model: name of the RecBole model.
        base: whether it is a base model, see `Settings.options_of`.
    """
    options = settings.recbole_results(base=base)
    values: dict[str, object] = {f"recbole.{k}": v for k, v in options.items() if k not in EVALUATION}
    values[f"{model}.defaults"] = base_model_properties(model)
    if "bf16" in base_model_properties(model):
        values[f"{model}.bf16"] = uses_bf16(model_options(model, settings, base=base)["bf16"], device())
    if base:
        values["base_options"] = settings["base_options"].get(model, {})
    return values


def check_model(name: str, settings: Settings, *, base: bool) -> None:
    """Check that a recommender exists and can be trained with these settings.

    Args:
        name: name of the recommender.
        settings: settings of the run.
        base: whether it is to be the base model.

    Raises:
        ConfigurationError: there is no such model, it cannot be the base model, or it lacks something.
        DependencyError: the model needs a package that is not installed.
    """
    if base and name in ONEREC_THINK:
        raise ConfigurationError(
            f"{name} cannot be the base model",
            where="base_model",
            why="it is a baseline and proposes no candidates of train requests",
            do="name it in models",
        )
    if name != GENERATOR and name not in ONEREC_THINK:
        check_support(name, settings, base=base)


def check_model_size(name: str, data: Data, *, base: bool) -> None:
    """Check that the data set is large enough for a recommender, see `recbole_gr2.bridge.support.check_size`."""
    if name != GENERATOR and name not in ONEREC_THINK:
        check_size(name, data, base=base)


def model_inputs(context: Context, model: str, *, base: bool) -> dict[str, Any]:
    """Return what a RecBole model reads besides RecBole's training data, as values of its configuration.

    Args:
        context: a context whose stage needs the stages of `stages_of(model)`.
        model: name of the model.
        base: whether it is the base model, see `training_options`.
    """
    reads = input_of(model, model_options(model, context.settings, base=base))
    if reads == "sids":
        return {"sids": load_catalog(context).sids, "cand_beams": context.settings["cand_beams"]}
    if reads == "item_texts":
        return {"item_texts": [item_text(item) for item in context.data.catalog]}
    if reads == "text_embeddings":
        return {"text_embeddings": read_embeddings(context.folders["embeddings"], mapped=True)}
    return {}


def load_base_model(context: Context, name: str, kind: str = BASE) -> BaseModel:
    """Return a trained base model.

    Args:
        context: a context whose stage needs `base_stage(name)` and the stages of `stages_of(name)`; for the mid-trained
            model see `load_generator`.
        name: name of the base model.
        kind: BASE, HOLD_OUT or REFIT: the model of validation and test, of train requests, or the refitted one of test.
    """
    if name == GENERATOR:
        return load_generator(context, hold_out=kind == HOLD_OUT)
    folder = context.folders[base_stage(name)] / kind
    return load_base(context.data, folder, model=name, inputs=model_inputs(context, name, base=True))


def load_fused_model(context: Context, kind: str = BASE) -> BaseModel:
    """Return the base models of a run as one, with the weights that the stage `candidates` chose.

    Args:
        context: a context whose stage needs the stage `candidates` and the stages of `load_base_model`.
        kind: see `load_base_model`.
    """
    settings, names = context.settings, context.settings["base_model"]
    models = [load_base_model(context, name, kind) for name in names]
    if len(models) == 1:
        return models[0]
    weights = context.inputs["candidates"].summary["fusion"]
    return FusedModel.of(models, Fusion(settings["cand_fusion"]), [weights[name] for name in names])


def load_generator(context: Context, *, hold_out: bool = False) -> Generator:
    """Return a mid-trained model as a recommender (GR2, section 4).

    Args:
        context: a context whose stage needs the tokenizer and the mid-training stage.
        hold_out: whether the model must not have seen the targets of the train requests, because it proposes their
            candidates. It is then that of the stage `midtrain` with `mid_hold_out`, else that of `whole_midtrain`.
    """
    settings, catalog = context.settings, load_catalog(context)
    model, tokenizer = load_model(context.folders["midtrain" if hold_out else whole_midtrain(settings)])
    longest = settings["mid_max_length"]
    return Generator(
        name=GENERATOR,
        model=model,
        tokenizer=tokenizer,
        data=context.data,
        exclude_seen=settings["cand_exclude_seen"],
        metadata={"model": GENERATOR, "hold_out": hold_out, "epochs": 0},
        catalog=catalog,
        beams=settings["cand_beams"],
        constrained=settings["mid_constrained"],
        batch_size=settings["eval_batch_lists"],
        prompts=lambda histories: [history_ids(history, catalog, tokenizer, longest) for history in histories],
        bf16=use_bf16(settings, model.device.type),
    )


def load_recommender(context: Context, name: str) -> BaseModel:
    """Return a recommender of the result table. A RecBole model is trained unless it is finished in `model/`.

    Args:
        context: a context whose stage needs the stages of `stages_of(name)`. If it also needs the stage `name`, the
            model of this stage is loaded, without the one of `refit`, which has learnt the validation targets.
        name: name of the recommender.
    """
    if name == GENERATOR:
        return load_generator(context)
    if name in ONEREC_THINK:
        return onerec_think_recommender(context, name)
    inputs = model_inputs(context, name, base=False)
    if name in context.folders:
        return load_base(context.data, context.folders[name] / "model", model=name, base=False, inputs=inputs)
    options: dict[str, Any] = {"model": name, "base": False, "inputs": inputs, "say": context.say}
    model = train_or_load(context.data, context.folder / "model", **options)
    if not context.settings["refit"]:
        return model
    epochs = model.metadata["epochs"]
    context.say(f"refit: {epochs} epochs with the validation items")
    return train_or_load(context.data, context.folder / REFIT, refit=True, epochs=epochs, **options)
