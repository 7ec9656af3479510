"""Which of RecBole's models can be a base model, and what the others lack.

Most refusals are derived from the class of the model, its property file and the settings. The tables below hold what
cannot be derived. docs/base-models.md lists the result for every model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_gr2.bridge.models import find_model
from recbole_gr2.config import Settings, base_model_properties, recbole_config
from recbole_gr2.errors import ConfigurationError, DependencyError
from recbole_gr2.model import MODELS

if TYPE_CHECKING:
    from recbole_gr2.bridge.data import Data

# RecBole trains these models in several runs, one for each value of `train_stage`. `training` trains them in one.
PRETRAINED: dict[str, tuple[str, ...]] = {
    "RaCT": ("actor_pretrain", "critic_pretrain", "finetune"),
    "S3Rec": ("pretrain", "finetune"),
}
# Model -> package that RecBole imports only when it trains the model, and the option with the value for which it does.
PACKAGES: dict[str, tuple[str, str | None, str | None]] = {
    "NCL": ("faiss", None, None),
    "NNCF": ("community", "neigh_info_method", "louvain"),
}
# Options that name a number of items, which must not exceed the catalogue: RaCT, SASRecCPR and GRU4RecCPR.
ITEMS = ("metrics_k", "reranker_CAN_NUM")
# Option -> its only value here. With another value RecBole unpickles a file of the data set (ldiffrec.py:232).
UNSAFE = {"n_cate": 1}
FEATURES = ("selected_features", "item_attribute")  # options that name columns of the .item file
OPTION = {True: "base_{}", False: "models_options: {}"}  # how a user sets an option of the base model, or of `models`


def check_support(name: str, settings: Settings, *, base: bool) -> None:
    """Check that a model can be trained and scored with these settings, before any data is read.

    Args:
        name: name of a model of RecBole or of this package.
        settings: settings of the run.
        base: whether it is a base model, see `Settings.options_of`; else it is one of `models`.

    Raises:
        ConfigurationError: there is no such model, it cannot score the catalogue, or it lacks something.
        DependencyError: the model imports a package that is not installed.
    """
    model_class: Any = find_model(name)
    if name in MODELS:
        return
    where = "base_model" if base else "models"
    _check_graph(name, where)
    options = model_options(name, settings, base=base)
    _check_package(name, options, where)
    _check_options(name, options, OPTION[base])
    if any(key in base_model_properties(name) for key in FEATURES):
        _check_features(name, recbole_config(settings, model_class, base=base), base)


def model_options(name: str, settings: Settings, *, base: bool) -> dict[str, Any]:
    """Return RecBole's options and those of a model by name.

    Args:
        name: name of a model of RecBole or of this package.
        settings: settings of the run.
        base: see `check_support`.
    """
    return {**base_model_properties(name), **settings.options_of(name, base=base)}


def check_size(name: str, data: Data, *, base: bool) -> None:
    """Check that the data set is large enough for a model, before anything is trained.

    Args:
        name: name of a model of RecBole or of this package.
        data: the data set.
        base: see `check_support`.

    Raises:
        ConfigurationError: the model draws more items or users than there are.
    """
    model_class: Any = find_model(name)
    if name in MODELS:
        return
    config = recbole_config(data.settings, model_class, base=base)
    option = OPTION[base]
    for key in ITEMS:
        wanted = max(map(int, str(config[key] or 0).split(",")))  # reranker_CAN_NUM may be a text such as 500,100,20.
        if wanted > data.item_count:
            raise ConfigurationError(
                f"{name} sorts out the best {wanted} items, and the catalogue has {data.item_count}",
                where=option.format(key),
                why="RecBole's implementation needs at least as many items",
                do=f"set it to at most {data.item_count}",
            )
    if config["cor_weight"] and config["n_factors"] and config["n_factors"] > 1:  # DGCF, see dgcf.py:78
        rows = int(data.split.known["hold_out"].sum())
        users, items = len(data.sequences) + 1, data.item_count + 1
        drawn = max(users, items) // (rows // config["train_batch_size"] + 1)
        if drawn > min(users, items):
            raise ConfigurationError(
                f"{name} draws {drawn} users and {drawn} items for its correlation loss, and the data set has "
                f"{users - 1} users and {items - 1} items",
                where=option.format("train_batch_size"),
                why="RecBole draws max(users, items) / batches of both",
                do="lower it, so that an epoch has more batches, or set "
                f"{option.format('cor_weight')} to 0 to train without this loss",
            )


def _check_package(name: str, options: Mapping[str, Any], where: str) -> None:
    """Raise a DependencyError if the model needs a package that is not installed."""
    package, option, value = PACKAGES.get(name, ("", None, None))
    if package and (option is None or options[option] == value) and importlib.util.find_spec(package) is None:
        raise DependencyError(
            f"{name} needs the package {package}, which is not installed"
            + (f", for {option}: {value}" if option else ""),
            where=where,
            why="RecBole imports it while it trains the model",
            do="install it, or choose another model",
        )


def _check_graph(name: str, where: str) -> None:
    """Raise a ConfigurationError if RecBole gives the model a data set with a knowledge graph."""
    from recbole.data.dataset import KnowledgeBasedDataset

    own = dataset_class(name)
    if own is not None and issubclass(own, KnowledgeBasedDataset):
        raise ConfigurationError(
            f"{name} needs a knowledge graph and embeddings of its entities",
            where=where,
            why="this package reads interactions and item texts only; a knowledge graph changes the numbers of items",
            do="choose a model that needs no knowledge graph, e.g. GRU4Rec or SASRec",
        )


def dataset_class(name: str) -> type | None:
    """Return RecBole's own data set class of a model, `<name>Dataset`, or None."""
    import recbole.data.dataset as datasets

    return getattr(datasets, f"{name}Dataset", None)


def _check_options(name: str, options: Mapping[str, Any], option: str) -> None:
    """Raise a ConfigurationError for options that make RecBole load weights of another run, or unpickle a file."""
    problems = {key: "leave it empty" for key in base_model_properties(name) if key.endswith("_path") and options[key]}
    stages = PRETRAINED.get(name)
    if stages and options["train_stage"] != stages[0]:
        problems["train_stage"] = "leave it out; all stages are trained one after the other"
    problems |= {key: f"set it to {value}" for key, value in UNSAFE.items() if key in options and options[key] != value}
    if problems:
        raise ConfigurationError(
            f"{name} would load a file that this run did not write: " + ", ".join(problems),
            where=", ".join(option.format(key) for key in problems),
            why="RecBole stores such files as pickles, which can execute any code, and torch does not load them",
            do="; ".join(f"{option.format(key)}: {remedy}" for key, remedy in problems.items()),
        )


def _check_features(name: str, config: Any, base: bool) -> None:
    """Raise a ConfigurationError if the model reads columns of the .item file that RecBole does not load."""
    keys = [key for key in FEATURES if key in base_model_properties(name)]
    named = [config[key] for key in keys]
    fields = [field for value in named for field in ([value] if isinstance(value, str) else value or [])]
    file = Path(config["data_path"]) / f"{config['dataset']}.item"
    columns = _columns(file, config["field_separator"])
    loaded = columns if config["load_col"] is None else config["load_col"].get("item", [])
    missing = [field for field in fields if field not in loaded or (columns and field not in columns)]
    if fields and not missing:
        return
    usable = [
        column for column, kind in columns.items() if kind.startswith("token") and column != config["ITEM_ID_FIELD"]
    ]
    own = " and ".join(OPTION[base].format(key) for key in keys)
    raise ConfigurationError(
        f"{name} reads item features, and RecBole does not load {', '.join(missing) or 'any'}",
        where=f"{own}, load_col",
        why="the model embeds columns of the .item file that RecBole loads",
        do=f"name one of its columns in {own} and load it: load_col: {{inter: [user_id, item_id, timestamp], "
        f"item: [item_id, {(usable or ['class'])[-1]}]}}"
        + (f"; {file.name} has {', '.join(usable) or 'no such column'}" if columns else ""),
    )


def _columns(file: Path, separator: str) -> dict[str, str]:
    """Return name and type of the columns in the header of an atomic file; empty if there is no such file."""
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        fields = [field.strip().partition(":") for field in next(lines, "").split(separator)]
    return {name: kind for name, _, kind in fields}
