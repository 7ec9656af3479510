"""Parts of the users: by their target and by whether training has interactions of them.

A part says how often training has the target, or whether the target follows an item of the history.

Most gains of sequential recommenders are on targets that directly follow a history item in training (arXiv 2606.17276).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from recbole_gr2.bridge.data import Data
from recbole_gr2.features.providers import SparseLookup
from recbole_gr2.ranking import ndcg_at

CUTOFF = 10  # of the NDCG of a part
OCCURRENCES = "target 0 times in training", "target 1 to 4 times", "target 5 times or more"
USERS = "new user, without training interactions", "known user"
RELATIONS = (
    "successor of the last item",
    "successor of another history item",
    "two steps from the last item",
    "none of these",
)


def target_slices(data: Data, users: Sequence[str], split: str = "test") -> pd.DataFrame:
    """Return the parts that users belong to.

    Args:
        data: the data set.
        users: tokens of users with a request of the split.
        split: test or valid.

    Returns:
        One row per user, in this order, with the columns `occurrences` (see `OCCURRENCES`), `relation` and `user` (see
        `USERS`). An item is a successor of another one if it directly follows it in the training items of any user. It
        is two steps away if it is a successor of a successor. The first relation that holds counts.
    """
    from scipy.sparse import csr_matrix

    known = data.train_sequences()
    sequences = list(known.values())
    size = data.item_count + 1
    counts = np.bincount(np.concatenate(sequences), minlength=size)
    before, after = (np.concatenate([items[part] for items in sequences]) for part in (slice(-1), slice(1, None)))
    follows = csr_matrix((np.ones(len(before), dtype=np.float32), (before, after)), shape=(size, size))
    direct, indirect = SparseLookup(follows), SparseLookup(follows @ follows)
    ids = {token: user for user, token in enumerate(data.user_tokens)}
    rows = []
    for user in (ids[token] for token in users):
        target, history = next(iter(data.targets(user, split))), data.history(user, split)
        after_each = direct.values_at(np.array(history), target) > 0
        holds = (after_each[-1], after_each[:-1].any(), indirect.values_at(history[-1], target) > 0, True)
        occurrences = 0 if counts[target] == 0 else 1 if counts[target] < 5 else 2
        rows.append((OCCURRENCES[occurrences], RELATIONS[holds.index(True)], USERS[user in known]))
    return pd.DataFrame(rows, columns=["occurrences", "relation", "user"])


def slice_metrics(
    parts: pd.DataFrame, users: Sequence[str], ranks: Mapping[str, Mapping[str, int]]
) -> list[dict[str, Any]]:
    """Return size and NDCG@10 of each part, over all its users.

    Args:
        parts: see `target_slices`.
        users: user tokens, one per row of `parts`.
        ranks: method -> user -> rank of the target, from 1. A user without a rank has no hit.

    Returns:
        For each part `slice`, its `users`, the `share` of all users, `listed`, the share of its users that have a rank
        by any method, and `ndcg@10` by method.
    """
    tables = {method: np.array([found.get(user, np.inf) for user in users]) for method, found in ranks.items()}
    found = np.any([np.isfinite(table) for table in tables.values()], axis=0)
    entries = []
    for column, names in (("occurrences", OCCURRENCES), ("relation", RELATIONS), ("user", USERS)):
        for name in names:
            part = (parts[column] == name).to_numpy()
            if part.any():
                entries.append(
                    {
                        "slice": name,
                        "users": int(part.sum()),
                        "share": float(part.mean()),
                        "listed": float(found[part].mean()),
                        f"ndcg@{CUTOFF}": {
                            method: float(ndcg_at(table[part], CUTOFF).mean()) for method, table in tables.items()
                        },
                    }
                )
    return entries
