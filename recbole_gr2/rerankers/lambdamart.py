"""LambdaMART on the candidate features: the standard learning-to-rank baseline, see `recbole_gr2.features.trees`."""

from __future__ import annotations

from collections.abc import Sequence

from recbole_gr2.features.trees import fit_trees, scores_of
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

    def fit(self, train: Sequence[Request], valid: Sequence[Request]) -> None:
        """Fit the trees. `summary["trees"]` is their number."""
        self.model = fit_trees(
            [_features(request) for request in train],
            [request.relevance for request in train],
            valid=([_features(request) for request in valid], [request.relevance for request in valid]),
            seed=self.seed,
        )
        self.summary = {"trees": self.model.best_iteration_}

    def rank(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """Sort the candidates by descending score of the trees."""
        scores = scores_of(self.model, [_features(request) for request in requests])
        return [by_score(request, row) for request, row in zip(requests, scores, strict=True)]


def _features(request: Request) -> CandidateFeatures:
    assert request.features is not None, "the prior stage computes features of these requests"
    return request.features
