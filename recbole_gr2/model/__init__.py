"""Recommenders of this package that are implemented as RecBole models. A base model is searched here before RecBole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODELS = {
    "CausalSASRec": "recbole_gr2.model.causal_sasrec",
    "PairCounts": "recbole_gr2.model.pair_counts",
    "TIGER": "recbole_gr2.model.tiger",
    "TextEASE": "recbole_gr2.model.text_ease",
    "TextNeighbours": "recbole_gr2.model.text_neighbours",
    "TextSASRec": "recbole_gr2.model.text_sasrec",
}
# What a model reads besides RecBole's training data. `recommenders.model_inputs` passes it in the configuration of the
# model: `sids`, codes (N, L) of the items 1..N; `item_texts`, a list of N texts, which may be empty; `text_embeddings`,
# (N, D) float32. A mapping has the input for each value of the model's option `representation`.
READS: Mapping[str, str | Mapping[str, str]] = {
    "PairCounts": "item_texts",
    "TIGER": "sids",
    "TextEASE": "text_embeddings",
    "TextNeighbours": {"tfidf": "item_texts", "embedding": "text_embeddings"},
    "TextSASRec": "text_embeddings",
}


def load(name: str) -> type:
    """Return the class of a model in `MODELS`. The import is delayed, because the module imports RecBole and torch.

    Raises:
        KeyError: there is no such model.
    """
    import importlib

    return getattr(importlib.import_module(MODELS[name]), name)


def input_of(name: str, options: Mapping[str, Any]) -> str | None:
    """Return what a model reads besides RecBole's training data, see `READS`; None if it reads nothing else.

    Args:
        name: name of a model of RecBole or of this package.
        options: options of the model by name.

    >>> input_of("TIGER", {}), input_of("TextNeighbours", {"representation": "tfidf"}), input_of("BPR", {})
    ('sids', 'item_texts', None)
    """
    reads = READS.get(name)
    return reads[options["representation"]] if isinstance(reads, Mapping) else reads
