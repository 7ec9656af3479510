"""The interface of a re-ranker.

A re-ranker is one method of the result tables. `recbole_gr2.rerankers.registry` lists the built-in ones; users name
their own in the setting `eval_rows`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recbole_gr2.artifacts import load_catalog
from recbole_gr2.catalog import Catalog
from recbole_gr2.config import Settings
from recbole_gr2.errors import GR2Error
from recbole_gr2.lists import pool_size
from recbole_gr2.plugins import name_of
from recbole_gr2.seeding import derive_seed
from recbole_gr2.types import Answer, Context, Request

ALL = "all"  # in `compare_with`: every other method of the run


class Reranker:
    """Base class of re-rankers.

    Subclasses implement `rank`, and `fit` if they learn from train requests. The class attributes describe the method.

    Args:
        context: context of the stage that runs the re-ranker. Its `folders` are those of the stages in `needs`, of the
            tokenizer and of the prior stage.

    >>> class ByPopularity(Reranker):
    ...     name = "by_popularity"
    ...     def rank(self, requests):
    ...         counts = self.item_counts()
    ...         return [sorted(request.items, key=lambda item: -counts[item]) for request in requests]
    """

    name: ClassVar[str] = ""
    """Name in the tables and in `eval_rows`."""

    description: ClassVar[str] = ""
    """One sentence for the report."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Names of further stages whose folders the re-ranker reads."""

    trained: ClassVar[bool] = False
    """Whether the method learns from training data."""

    compare_with: ClassVar[tuple[str, ...]] = ()
    """Names of the methods that a paired test compares it with, besides the base order; ("all",) for every method."""

    diagnostic: ClassVar[bool] = False
    """Whether the method makes no claim, such as an upper bound. Its tests are left out of the Holm correction."""

    distributed: ClassVar[bool] = False
    """Whether several processes share the requests. If so, each of them calls `rank` with all requests and gets all
    answers. If not, one process calls it.
    """

    needs_features: ClassVar[bool] = False
    """Whether it needs candidate features. Without feature providers the method is left out."""

    whole_pool: ClassVar[bool] = False
    """Whether it ranks all `cand_pool` items that the base models propose; else the `cand_num` candidates."""

    windowed: ClassVar[bool] = True
    """Whether `eval_windows` lets the method rank more of the pool. Without effect if `whole_pool` is set."""

    settings_prefixes: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the settings that can change its rankings."""

    @classmethod
    def slides(cls, settings: Settings) -> bool:
        """Return whether the method ranks several windows of the pool, see `recbole_gr2.lists.rank_windows`."""
        larger = pool_size(settings) > settings["cand_num"]
        return cls.windowed and not cls.whole_pool and larger and settings["eval_windows"] > 1

    def __init__(self, context: Context) -> None:
        self.context = context
        self.summary: dict[str, Any] = {}
        """Figures for the manifest and the report."""

    @property
    def settings(self) -> Settings:
        """Settings of the run."""
        return self.context.settings

    @property
    def catalog(self) -> Catalog:
        """The catalogue with titles and semantic IDs."""
        return load_catalog(self.context)

    @property
    def seed(self) -> int:
        """A seed for this method, derived from the seed of the run."""
        return derive_seed(self.settings["seed"], self.name)

    def item_counts(self) -> np.ndarray:
        """Number of training interactions of each item by internal id, (N + 1,)."""
        interactions = np.concatenate(list(self.context.data.train_sequences().values()))
        return np.bincount(interactions, minlength=len(self.catalog) + 1)

    def fit(self, train: Sequence[Request], valid: Sequence[Request]) -> None:
        """Learn from requests with labels. It is called once before `rank`.

        Args:
            train: train requests that contain their target.
            valid: validation requests that contain their target, for example for early stopping. With
                `eval_split: valid` they are also among the requests to rank, so that the figures are optimistic.
        """

    def save(self, folder: Path) -> None:
        """Write what `fit` learned, so that a finished run can rank other lists without another fit. Optional.

        Args:
            folder: the folder of the stage. It contains rankings.jsonl.
        """

    def load(self, folder: Path) -> bool:
        """Read what `save` wrote, and return whether there was anything to read. If not, `fit` is called again."""
        return False

    def rank(self, requests: Sequence[Request]) -> Sequence[Answer | Sequence[int]]:
        """Rank the candidates of the requests of `eval_split`.

        Args:
            requests: requests without labels: `target` is 0 and `grades` is ().

        Returns:
            For each request, in the same order, its candidates as item ids, best first, or an `Answer`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method rank")


def as_answers(requests: Sequence[Request], rankings: Sequence[Answer | Sequence[int]], *, method: str) -> list[Answer]:
    """Return the output of `Reranker.rank` as answers.

    Raises:
        GR2Error: the number of rankings is wrong, or a ranking is not a permutation of the candidates.
    """
    if not hasattr(rankings, "__len__"):
        raise GR2Error(
            f"rank returned an object of the type {type(rankings).__name__} instead of a list of rankings",
            where=f"method {method}",
            why="each request needs one ranking",
            do="return a list with one ranking for each request, in the order of the requests",
        )
    if len(rankings) != len(requests):
        raise GR2Error(
            f"{len(rankings)} rankings for {len(requests)} requests",
            where=f"method {method}",
            why="each request needs one ranking",
            do="return one ranking for each request, in the order of the requests",
        )
    answers = []
    for request, ranking in zip(requests, rankings, strict=True):
        where = f"method {method}, request {request.request_id}"
        if isinstance(ranking, Answer):
            answer = replace(ranking, ranking=_item_ids(ranking.ranking, where=where))
        else:
            answer = Answer(request_id=request.request_id, ranking=_item_ids(ranking, where=where))
        if sorted(answer.ranking) != sorted(request.items) or answer.request_id != request.request_id:
            raise GR2Error(
                f"the ranking {answer.ranking} is not a permutation of the candidates {request.items}",
                where=where,
                why="re-ranking must neither add nor drop items",
                do="return every item of request.items once, best first",
            )
        answers.append(answer)
    return answers


def _item_ids(ranking: Any, *, where: str) -> tuple[int, ...]:
    """Return a ranking as a tuple of integers.

    Raises:
        GR2Error: it contains something else than whole numbers, or is no sequence.
    """
    if isinstance(ranking, Iterable):
        ranking = list(ranking)
        try:
            items = tuple(int(item) for item in ranking)
            if all(item == value for item, value in zip(items, ranking, strict=True)):
                return items
        except (TypeError, ValueError, OverflowError):
            pass
    raise GR2Error(
        f"the ranking {ranking!s:.200} is no list of item ids",
        where=where,
        why="a ranking consists of internal item ids as in request.items, not of tokens or other texts",
        do="return every item of request.items once, best first",
    )


def user_name(method: type[Reranker]) -> str:
    """Return `module:attribute` for a method of the user, and a name without colon for a built-in one."""
    return method.name if ":" in method.name else name_of(method)


def by_score(request: Request, scores: Sequence[float] | np.ndarray) -> tuple[int, ...]:
    """Return the candidates by descending score. Equal scores keep the base order.

    Args:
        request: the request.
        scores: a score of each candidate in base order, (K,).
    """
    return tuple(item for _, item in sorted(zip(scores, request.items, strict=True), key=lambda pair: -pair[0]))


def stage_name(method: str) -> str:
    """Return the name of the stage that runs a method. It is also the name of a folder.

    >>> stage_name("mymodule:rank")
    'rerank_mymodule.rank'
    """
    return "rerank_" + re.sub(r"[^\w.-]", ".", method)
