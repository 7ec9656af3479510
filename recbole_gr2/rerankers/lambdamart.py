"""LambdaMART on the candidate features: the standard learning-to-rank baseline, see `recbole_gr2.features.trees`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_gr2.features.trees import FILE, fit_trees, load_trees, save_trees, scores_of
from recbole_gr2.rerankers.base import Reranker, by_score
from recbole_gr2.types import CandidateFeatures, Request


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


def _features(request: Request) -> CandidateFeatures:
    assert request.features is not None, "the prior stage computes features of these requests"
    return request.features
