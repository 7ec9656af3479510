"""LambdaMART on the candidate features, as implemented by LightGBM.

Burges, "From RankNet to LambdaRank to LambdaMART: An Overview", MSR-TR-2010-82.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_gr2.errors import MissingFileError
from recbole_gr2.features.prior import Relevance, Scorer, cross_fit_with
from recbole_gr2.types import CandidateFeatures

if TYPE_CHECKING:
    from lightgbm import Booster, LGBMRanker

MOST_TREES = 500  # Our choice; the validation lists stop earlier.
PATIENCE = 50  # trees without a better NDCG@5 of the validation lists. Our choice.
FILE = "lambdamart.txt"
SCORE_BATCH = 1024  # lists that are scored together; it limits the memory


def fit_trees(
    features: Sequence[CandidateFeatures],
    relevance: Relevance,
    *,
    valid: tuple[Sequence[CandidateFeatures], Relevance] | None,
    seed: int,
    trees: int = MOST_TREES,
) -> LGBMRanker:
    """Fit LambdaMART to lists.

    Small trees and strong shrinkage are our choice: 7 leaves give the best NDCG@5 on the validation requests of Amazon
    Beauty (7: .600, 15: .596, 31: .591, two seeds).

    Args:
        features: features of the train lists.
        relevance: relevance of their candidates.
        valid: features and relevance of validation lists, which choose the number of trees; None for `trees` trees.
        seed: seed of the samples of lists and features.
        trees: largest number of trees.

    Returns:
        The model. With validation lists `best_iteration_` is the number of trees that it uses.
    """
    from lightgbm import LGBMRanker, early_stopping

    model = LGBMRanker(
        objective="lambdarank",
        n_estimators=trees,
        learning_rate=0.05,
        num_leaves=7,
        min_child_samples=50,
        subsample=0.8,
        subsample_freq=1,
        colsample_bytree=0.4,
        reg_lambda=1.0,
        random_state=seed,
        n_jobs=1,
        deterministic=True,
        force_row_wise=True,
        verbose=-1,
    )
    table, labels, sizes = _table(features, relevance)
    options: dict[str, Any] = {}
    if valid is not None:
        valid_table, valid_labels, valid_sizes = _table(*valid)
        options = {
            "eval_X": (valid_table,),
            "eval_y": (valid_labels,),
            "eval_group": [valid_sizes],
            "eval_at": [5],
            "callbacks": [early_stopping(PATIENCE, verbose=False)],
        }
    return model.fit(table, labels, group=sizes, **options)


def scores_of(model: LGBMRanker | Booster, features: Sequence[CandidateFeatures]) -> list[list[float]]:
    """Return the scores (K,) of the candidates of each list."""
    scores: list[list[float]] = []
    for start in range(0, len(features), SCORE_BATCH):
        part = features[start : start + SCORE_BATCH]
        values: Any = model.predict(np.concatenate([columns(each) for each in part]))
        sizes = np.cumsum([len(each.candidates) for each in part])[:-1]
        scores += [row.tolist() for row in np.split(values, sizes)]
    return scores


def save_trees(model: LGBMRanker, folder: Path) -> None:
    """Write the trees that the validation lists chose, in LightGBM's format."""
    model.booster_.save_model(folder / FILE, num_iteration=model.best_iteration_)


def load_trees(folder: Path, *, do: str) -> Booster:
    """Read what `save_trees` wrote.

    Args:
        folder: the folder of the stage.
        do: what the user can do if there is no such file.

    Raises:
        MissingFileError: there is no such file.
    """
    from lightgbm import Booster

    if not (folder / FILE).is_file():
        raise MissingFileError(
            f"there is no {FILE}", where=str(folder), why="it contains the trees of LambdaMART", do=do
        )
    return Booster(model_file=folder / FILE)


def cross_fit_trees(
    features: Sequence[CandidateFeatures], relevance: Relevance, *, users: Sequence[str], trees: int, seed: int
) -> list[list[float]]:
    """Return the scores of each list under trees that were not fitted to lists of its user.

    Args:
        features: features of the train lists.
        relevance: relevance of their candidates.
        users: user of each list.
        trees: number of trees.
        seed: seed of the folds and of the fits.

    Raises:
        QualityCheckError: the lists belong to fewer than two users.
    """

    def fit(part: Sequence[CandidateFeatures], labels: Relevance, seed: int) -> Scorer:
        model = fit_trees(part, labels, valid=None, seed=seed, trees=trees)
        return lambda others: scores_of(model, others)

    return cross_fit_with(fit, features, relevance, users=users, seed=seed)


def columns(features: CandidateFeatures) -> np.ndarray:
    """Return one row per candidate, (K, F + (RECENT + 2) P).

    A row has the candidate features, the pair features of every history position (0 where the history is shorter), and
    the maximum and the sum of the pair features over the history.
    """
    pairs = features.pairs.astype(np.float32)
    flat = features.padded.reshape(len(pairs), -1).astype(np.float32)
    return np.concatenate([features.candidates, flat, pairs.max(axis=1), pairs.sum(axis=1)], axis=1)


def _table(features: Sequence[CandidateFeatures], relevance: Relevance) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Columns of all candidates, their relevance, and the number of candidates of each list."""
    table = np.concatenate([columns(each) for each in features])
    return table, np.concatenate(list(relevance)).astype(int), [len(row) for row in relevance]
