"""LambdaMART on the candidate features, as implemented by LightGBM: the standard learning-to-rank baseline.

Burges, "From RankNet to LambdaRank to LambdaMART: An Overview", MSR-TR-2010-82.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recbole_gr2.rerankers.base import Reranker, by_score
from recbole_gr2.types import CandidateFeatures, Request


class LambdaMART(Reranker):
    """LightGBM's LambdaMART on the features that the prior has, fitted to the same train requests.

    The validation requests choose the number of trees. Small trees and strong shrinkage are our choice: 7 leaves give
    the best NDCG@5 on the validation requests of Amazon Beauty (7: .600, 15: .596, 31: .591, two seeds).
    """

    name = "lambdamart"
    whole_pool = True
    description = "LightGBM's LambdaMART on the features and train requests of the prior"
    trained = True
    needs_features = True

    def fit(self, train: Sequence[Request], valid: Sequence[Request]) -> None:
        """Fit the trees. `summary["trees"]` is their number."""
        from lightgbm import LGBMRanker, early_stopping

        self.model = LGBMRanker(
            objective="lambdarank",
            n_estimators=500,
            learning_rate=0.05,
            num_leaves=7,
            min_child_samples=50,
            subsample=0.8,
            subsample_freq=1,
            colsample_bytree=0.4,
            reg_lambda=1.0,
            random_state=self.seed,
            n_jobs=1,
            deterministic=True,
            force_row_wise=True,
            verbose=-1,
        )
        table, relevance, sizes = _table(train)
        valid_table, valid_relevance, valid_sizes = _table(valid)
        self.model.fit(
            table,
            relevance,
            group=sizes,
            eval_X=(valid_table,),
            eval_y=(valid_relevance,),
            eval_group=[valid_sizes],
            eval_at=[5],
            callbacks=[early_stopping(50, verbose=False)],
        )
        self.summary = {"trees": self.model.best_iteration_}

    def rank(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """Sort the candidates by descending score of the trees."""
        scores = self.model.predict(np.concatenate([columns(_features(request)) for request in requests]))
        parts = np.split(scores, np.cumsum([len(request.items) for request in requests])[:-1])
        return [by_score(request, part) for request, part in zip(requests, parts, strict=True)]


def columns(features: CandidateFeatures) -> np.ndarray:
    """Return one row per candidate, (K, F + (RECENT + 2) P).

    A row has the candidate features, the pair features of every history position (0 where the history is shorter), and
    the maximum and the sum of the pair features over the history.
    """
    pairs = features.pairs.astype(np.float32)
    flat = features.padded.reshape(len(pairs), -1).astype(np.float32)
    return np.concatenate([features.candidates, flat, pairs.max(axis=1), pairs.sum(axis=1)], axis=1)


def _features(request: Request) -> CandidateFeatures:
    assert request.features is not None, "the prior stage computes features of these requests"
    return request.features


def _table(requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Columns of all candidates, their relevance, and the number of candidates of each request."""
    table = np.concatenate([columns(_features(request)) for request in requests])
    relevance = np.concatenate([request.relevance for request in requests]).astype(int)
    return table, relevance, [len(request.items) for request in requests]
