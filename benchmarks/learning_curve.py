"""Measure what more train lists bring: the metrics of the prior and of LambdaMART by the number of train lists.

    python benchmarks/learning_curve.py DATASET DATA_PATH PRIOR_FOLDER...

The folders are those of finished stages `prior`, for example of two runs with `train_requests` 1 and 2. The re-rankers
are fitted to the lists of a quarter, of half and of all users, as in a run, and rank the validation lists. The test
lists are not read. R@10 and NDCG@10 are means over all validation users; a list without its target counts 0.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

SHARES = (0.25, 0.5, 1.0)  # of the users
FITS, STEPS, SEED = 3, 1000, 2020


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("data_path")
    parser.add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args()

    import numpy as np

    from recbole_gr2.artifacts import read_prior
    from recbole_gr2.bridge.data import Data
    from recbole_gr2.config import load_settings
    from recbole_gr2.features.prior import fit_priors, log_prior
    from recbole_gr2.features.trees import fit_trees, scores_of
    from recbole_gr2.ranking import ndcg_at

    data = Data(load_settings(config_dict={"dataset": options.dataset, "data_path": options.data_path}))
    print("| folder | users | train lists | prior R@10 | prior NDCG@10 | LambdaMART R@10 | LambdaMART NDCG@10 |")
    print("|---|---|---|---|---|---|---|")
    for folder in options.folders:
        train = [request for request in read_prior(folder, "train", data.catalog) if request.features]
        valid = read_prior(folder, "valid", data.catalog)
        hits = [request for request in valid if request.target_rank]
        checks = [request.features for request in hits], [request.relevance for request in hits]
        users = np.random.default_rng(SEED).permutation(sorted({request.user_token for request in train}))

        for share in SHARES:
            chosen = set(users[: round(share * len(users))])
            lists = [request for request in train if request.user_token in chosen]
            features, relevance = [request.features for request in lists], [request.relevance for request in lists]
            prior, _, _ = fit_priors(features, relevance, valid=checks, steps=[STEPS] * FITS, seed=SEED)
            trees = fit_trees(features, relevance, valid=checks, seed=SEED)
            figures: list[float] = []
            for scores in (log_prior(prior, checks[0]), scores_of(trees, checks[0])):
                ranked = [replace(request, prior=tuple(row)) for request, row in zip(hits, scores, strict=True)]
                ranks = np.array([request.by_prior.index(request.target) + 1 for request in ranked])
                figures += [(ranks <= 10).sum() / len(valid), ndcg_at(ranks, 10).sum() / len(valid)]
            cells = " | ".join(f"{figure:.4f}".lstrip("0") for figure in figures)
            print(f"| {folder.name} | {len(chosen):,} | {len(lists):,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
