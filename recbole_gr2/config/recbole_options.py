"""Options, models and metrics of RecBole, read from its files without an import of RecBole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from recbole_gr2 import compat
from recbole_gr2.config.declaration import TYPES, Declaration, properties_folder, read_declarations
from recbole_gr2.config.values import read_yaml

MODEL_COMMENT = re.compile(r"^(\w+):.*#\s*\((\w+)[^)]*\)(.*)", flags=re.MULTILINE)  # in a property file of RecBole
# RecBole options of the training of one model.
RECBOLE_TRAINING = {
    "epochs",
    "train_batch_size",
    "learner",
    "learning_rate",
    "train_neg_sample_args",
    "eval_step",
    "stopping_step",
    "clip_grad_norm",
    "weight_decay",
    "loss_decimal_place",
    "loss_type",
    "enable_amp",
    "enable_scaler",
    "require_pow",
}
# RecBole options with one usable value. `repeatable` is required for sequential data. `normalize_all` would rescale
# the float columns; the exact time order does not depend on it.
RECBOLE_FIXED = {"repeatable": True, "normalize_all": False}
ACTIVATIONS = ("gelu", "relu", "swish", "tanh", "sigmoid")  # of RecBole's Transformer (layers.py:502)
SMALLER = "smaller = True"  # in the class of a metric of RecBole
SEQUENTIAL, GENERAL = "sequential", "general"  # kinds of RecBole's models that can propose candidates
GENERATOR = "GR2Generator"  # the mid-trained language model as a recommender
# Recommender -> its method as a re-ranker of the base model's lists, with and without reasoning traces.
ONEREC_THINK = {"OneRecThink": "onerec_think", "OneRecThink-no-think": "onerec_think-no-think"}


@cache
def recbole_options() -> frozenset[str]:
    """Return the options of RecBole's Config that do not belong to one model or to its training."""
    folder = recbole_properties()
    options = {"eval_args"}
    for file in (folder / "overall.yaml", folder / "dataset" / "sample.yaml"):
        options |= set(read_yaml(file.read_text(encoding="utf-8")))
    return frozenset(options - RECBOLE_TRAINING - set(RECBOLE_FIXED))


def recbole_metrics() -> list[str]:
    """Return the names of the ranking metrics in RecBole's source, without an import of RecBole."""
    source = (recbole_properties().parent / "evaluator" / "metrics.py").read_text(encoding="utf-8")
    return re.findall(r"^class (\w+)\((?:TopkMetric|AbstractMetric)\)", source, flags=re.MULTILINE)


def smaller_is_better() -> list[str]:
    """Return the names of the ranking metrics in RecBole's source of which a smaller value is better."""
    source = (recbole_properties().parent / "evaluator" / "metrics.py").read_text(encoding="utf-8")
    classes = re.split(r"^class ", source, flags=re.MULTILINE)
    return [name for name in recbole_metrics() for text in classes if text.startswith(f"{name}(") and SMALLER in text]


def recbole_models() -> dict[str, str]:
    """Return the models in RecBole's source by name, each with its kind, without an import of RecBole.

    The kind is sequential, general, context-aware, knowledge-aware or external.
    """
    return _models_in(recbole_properties().parent / "model")


@cache
def _models_in(folder: Path) -> dict[str, str]:
    kinds = {"context_aware": "context-aware", "knowledge_aware": "knowledge-aware", "exlib": "external"}
    found = {}
    for file in sorted(folder.glob("*_recommender/*.py")):
        kind = file.parent.name.removesuffix("_recommender")
        for name in re.findall(r"^class (\w+)\(", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if name.lower() == file.stem:  # RecBole looks a model up in the file of this name
                found[name] = kinds.get(kind, kind)
    return found


def candidate_models() -> list[str]:
    """Return the names of the models that RecBole trains and that can propose candidates."""
    own = [file.stem for file in (properties_folder() / "model").glob("*.yaml")]
    return sorted({*own, *(name for name, kind in recbole_models().items() if kind in (SEQUENTIAL, GENERAL))})


def model_declarations(model: str) -> dict[str, Declaration]:
    """Return the declarations of a model's options.

    Those of a model of RecBole are derived from its property file: the type is that of the comment or of the default,
    and a number is not negative unless the default is.
    """
    own, theirs = (model_file(folder, model) for folder in (properties_folder(), recbole_properties()))
    if own:
        return read_declarations(own)
    return dict(_derived_declarations(theirs.read_text(encoding="utf-8"))) if theirs else {}


@cache
def _derived_declarations(text: str) -> Mapping[str, Declaration]:
    comments = {key: (kind, rest) for key, kind, rest in MODEL_COMMENT.findall(text)}
    declared = {}
    for key, default in (read_yaml(text) or {}).items():
        name, comment = comments.get(key, ("", ""))
        kind = TYPES.get(name, type(default))
        if not isinstance(default, kind):
            kind = float if kind is int and isinstance(default, float) else object
        choices = re.search(r"[Rr]ange in \[([^\]]+)\]", comment)
        number = kind in (int, float) and isinstance(default, int | float)
        share = key.endswith(("_prob", "dropout")) and kind is float
        size = key.endswith(("size", "n_heads")) and number and default >= 1
        names = re.findall(r"\w+", choices[1]) if choices else ACTIVATIONS if key == "hidden_act" else ()
        declared[key] = Declaration(
            key=key,
            default=default,
            type=float if name == "float" and number else kind,
            choices=tuple(dict.fromkeys([*names, default])) if names and kind is str else (),
            low=1 if size else 0 if number and default >= 0 else None,
            high=1 if share else None,
            optional=default is None,
        )
    return declared


def model_file(folder: Path, model: str) -> Path | None:
    """The property file of a model. Names are compared and form no path, because they come from the user."""
    return next((file for file in (folder / "model").glob("*.yaml") if file.stem == model), None)


def base_model_properties(model: str) -> dict[str, Any]:
    """Return the defaults of a base model: those of this package if it has any, else those of RecBole."""
    for folder in (properties_folder(), recbole_properties()):
        if file := model_file(folder, model):
            return read_yaml(file.read_text(encoding="utf-8")) or {}
    return {}


def recbole_properties() -> Path:
    """Return the folder of RecBole's property files, without an import of RecBole.

    Raises:
        DependencyError: RecBole is not installed.
    """
    import importlib.util

    spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        raise compat.missing_recbole()
    return Path(spec.submodule_search_locations[0]) / "properties"
