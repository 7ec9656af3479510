"""Recommenders of this package that are implemented as RecBole models. A base model is searched here before RecBole."""

from __future__ import annotations

MODELS = {"CausalSASRec": "recbole_gr2.model.causal_sasrec", "TIGER": "recbole_gr2.model.tiger"}
READS_SIDS = {"TIGER"}  # Models that read the semantic IDs of the catalogue from `config["sids"]`.


def load(name: str) -> type:
    """Return the class of a model in `MODELS`. The import is delayed, because the module imports RecBole and torch.

    Raises:
        KeyError: there is no such model.
    """
    import importlib

    return getattr(importlib.import_module(MODELS[name]), name)
