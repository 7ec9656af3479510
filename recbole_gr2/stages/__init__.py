"""The stages of a run, one module each.

A stage module has `STAGE`, a `Stage`, or a function `stages(settings) -> list[Stage]` if it declares several. A new
stage is one module and its entry in `MODULES`. By default a run computes the last declared stage and all stages that it
needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping

from recbole_gr2.config import ONEREC_THINK, Settings
from recbole_gr2.errors import ConfigurationError, nearest
from recbole_gr2.types import Stage

# Module -> names of its stages; () if they depend on the settings.
MODULES: Mapping[str, tuple[str, ...]] = {
    "base_model": (),  # first, because its mistakes are found within seconds, and most models need no other stage
    "candidates": ("candidates",),  # and `validation` with `eval_split: valid`
    "embeddings": ("embeddings",),
    "tokenizer": ("tokenizer",),
    "midtrain": ("midtrain", "midtrain_all"),
    "prior": ("prior",),
    "traces": ("traces",),
    "sft": ("sft",),
    "score": ("score",),
    "rl": ("distilled", "rl", "internalised"),
    "onerec_think": ("onerec_think", "onerec_think-no-think"),
    "recommender": (),
    "rerank": (),
    "evaluate": ("evaluate",),
}
BASE_MODEL = "base_model_"  # start of the names of the stages that train a base model
VALIDATION = "validation_"  # start of the names of the stages with validation recommendations of `models`
RERANK = "rerank_"  # start of the names of the stages that run a re-ranker


def all_stages(settings: Settings) -> list[Stage]:
    """Every stage that a run with these settings can compute, in the order of `MODULES`."""
    found: list[Stage] = []
    for name in MODULES:
        module = importlib.import_module(f"recbole_gr2.stages.{name}")
        found += module.stages(settings) if hasattr(module, "stages") else [module.STAGE]
    return found


def check_names(names: Iterable[str], settings: Settings) -> None:
    """Check names of stages without an import of their modules, which import torch.

    The names of the stages that run a re-ranker are not checked, because a class of the user can choose its name.

    Raises:
        ConfigurationError: there is no stage of a name. The error names the nearest ones.
    """
    known = [f"{BASE_MODEL}{name}" for name in settings["base_model"]]
    known += [name for group in MODULES.values() for name in group] + settings["models"]
    if settings["eval_split"] != "test":
        known += ["validation", *(f"{VALIDATION}{name}" for name in settings["models"])]
    methods = [*settings["eval_rows"], *(ONEREC_THINK[model] for model in settings["models"] if model in ONEREC_THINK)]
    known += dict.fromkeys(f"{RERANK}{name}" for name in methods if ":" not in name)
    for name in names:
        if not name.startswith(RERANK) or not any(":" in row for row in settings["eval_rows"]):
            check_name(name, known)


def check_name(name: str, known: Iterable[str]) -> None:
    """Check that a stage is one of the known ones.

    Raises:
        ConfigurationError: there is no stage of this name. The error names the nearest ones.
    """
    known = list(known)
    if name not in known:
        near = nearest(name, known)
        raise ConfigurationError(
            f"there is no stage {name!r:.200}",
            where="--stages, --from_stage",
            do=(f"did you mean {' or '.join(near)}? " if near else "") + f"Choose from {', '.join(known)}",
        )
