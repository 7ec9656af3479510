"""The stages of a run, one module each.

A stage module has `STAGE`, a `Stage`, or a function `stages(settings) -> list[Stage]` if it declares several. A new
stage is one module and its name in `MODULES`. By default a run computes the last declared stage and all stages that it
needs.
"""

from __future__ import annotations

import importlib

from recbole_gr2.config import Settings
from recbole_gr2.types import Stage

MODULES = (
    "embeddings",
    "tokenizer",
    "midtrain",
    "base_model",
    "candidates",
    "prior",
    "traces",
    "sft",
    "rl",
    "onerec_think",
    "recommender",
    "rerank",
    "evaluate",
)


def all_stages(settings: Settings) -> list[Stage]:
    """Every stage that a run with these settings can compute, in the order of `MODULES`."""
    found: list[Stage] = []
    for name in MODULES:
        module = importlib.import_module(f"recbole_gr2.stages.{name}")
        found += module.stages(settings) if hasattr(module, "stages") else [module.STAGE]
    return found
