"""LambdaMART on the candidate features: the standard learning-to-rank baseline, see `recbole_gr2.features.trees`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_gr2.features.trees import FILE, fit_trees, load_trees, save_trees, scores_of
from recbole_gr2.ranking import ndcg_at
from recbole_gr2.rerankers.base import Reranker, by_score
from recbole_gr2.store import read_json, write_json
from recbole_gr2.types import CandidateFeatures, Request

WEIGHTS = tuple(number / 10 for number in range(11))  # of the trees in an ensemble. Our choice.
WEIGHT_FILE = "weight.json"


class LambdaMART(Reranker):
    """LightGBM's LambdaMART on the features that the prior has, fitted to the same train requests.

    The validation requests choose the number of trees.
    """

    name = "lambdamart"
    whole_pool = True
    description = "LightGBM's LambdaMART on the features and train requests of the prior"
    trained = True
    needs_features = True

    model: Any  # LightGBM's LGBMRanker, or its Booster after `load`

    def fit(self, train: Sequence[Request], valid: Sequence[Request]) -> None:
        """Fit the trees. `summary["trees"]` is their number."""
        self.model = fit_trees(
            [_features(request) for request in train],
            [request.relevance for request in train],
            valid=([_features(request) for request in valid], [request.relevance for request in valid]),
            seed=self.seed,
        )
        self.summary = {"trees": self.model.best_iteration_}

    def save(self, folder: Path) -> None:
        """Write the trees to lambdamart.txt, in LightGBM's format."""
        save_trees(self.model, folder)

    def load(self, folder: Path) -> bool:
        """Read the trees that `save` wrote."""
        if not (folder / FILE).is_file():  # of an earlier version
            return False
        self.model = load_trees(folder, do="repeat the command of the run with --from_stage rerank_lambdamart")
        return True

    def _trees(self, requests: Sequence[Request]) -> list[list[float]]:
        """Score of each candidate of each request by the trees."""
        return scores_of(self.model, [_features(request) for request in requests])

    def rank(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """Sort the candidates by descending score of the trees."""
        scores = self._trees(requests)
        return [by_score(request, row) for request, row in zip(requests, scores, strict=True)]


class Ensemble(LambdaMART):
    """The weighted sum of the scores of LambdaMART and of the prior, each standardised within the list.

    Both are fitted to the same features and train requests. The weight is chosen among `WEIGHTS` by NDCG@10 of the
    validation requests; of equal ones the smallest.
    """

    name = "ensemble"
    description = "the weighted sum of the scores of the prior and of LambdaMART"
    compare_with = ("prior", "lambdamart")

    def fit(self, train: Sequence[Request], valid: Sequence[Request]) -> None:
        """Fit the trees and choose their weight. `summary` has `trees`, their number, and `weight`."""
        super().fit(train, valid)
        scores = self._trees(valid)

        def quality(weight: float) -> float:
            rankings = [_weighted(request, row, weight) for request, row in zip(valid, scores, strict=True)]
            ranks = [ranking.index(r.target) + 1 for r, ranking in zip(valid, rankings, strict=True)]
            return float(ndcg_at(np.array(ranks), 10).mean())

        self.weight = max(WEIGHTS, key=quality)
        self.summary = {**self.summary, "weight": self.weight}

    def save(self, folder: Path) -> None:
        """Write the trees and their weight."""
        super().save(folder)
        write_json(folder / WEIGHT_FILE, self.weight)

    def load(self, folder: Path) -> bool:
        """Read what `save` wrote."""
        if not super().load(folder):
            return False
        self.weight = read_json(folder / WEIGHT_FILE)
        return True

    def rank(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """Sort the candidates by descending weighted sum."""
        scores = self._trees(requests)
        return [_weighted(request, row, self.weight) for request, row in zip(requests, scores, strict=True)]


def _weighted(request: Request, trees: Sequence[float], weight: float) -> tuple[int, ...]:
    """The candidates by descending weighted sum of the standardised scores of the trees and of the prior."""
    return by_score(request, weight * _standardised(trees) + (1 - weight) * _standardised(request.prior))


def _standardised(values: Sequence[float]) -> np.ndarray:
    """Values with mean 0 and standard deviation 1; all 0 if they are equal."""
    centred = np.asarray(values) - np.mean(values)
    return centred / (centred.std() or 1.0)


def _features(request: Request) -> CandidateFeatures:
    assert request.features is not None, "the prior stage computes features of these requests"
    return request.features
