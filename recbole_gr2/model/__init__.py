"""RecBole models that the plugin brings. A base model is looked up here first, then in RecBole."""

from __future__ import annotations

MODELS = {"CausalSASRec": "recbole_gr2.model.causal_sasrec", "TIGER": "recbole_gr2.model.tiger"}
READS_SIDS = {"TIGER"}  # these are given the catalogue's semantic IDs, `config["sids"]`


def load(name: str) -> type:
    """The class of one of `MODELS`; imported on demand, since it imports RecBole and torch."""
    import importlib

    return getattr(importlib.import_module(MODELS[name]), name)
