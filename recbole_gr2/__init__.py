"""recbole-gr2: the Generative Reasoning Re-ranker (GR2, arXiv 2602.07774) as a plugin for RecBole."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_gr2.api import GR2, Run, rerank_file, run
    from recbole_gr2.serving import CandidateList, Reranked

__version__ = "0.1.0"
__all__ = ["GR2", "CandidateList", "Reranked", "Run", "rerank_file", "run"]


def __getattr__(name: str) -> Any:
    """Import the Python interface at its first use, because it needs RecBole and torch."""
    if name in __all__:
        return getattr(importlib.import_module("recbole_gr2.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
