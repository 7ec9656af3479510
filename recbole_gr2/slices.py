"""Parts of the users: by their target and by whether training has interactions of them.

A part says how often training has the target, or whether the target follows an item of the history.

Most gains of sequential recommenders are on targets that directly follow a history item in training (arXiv 2606.17276).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from recbole_gr2.bridge.data import Data
from recbole_gr2.model.linear import SparseLookup
from recbole_gr2.ranking import ndcg_at

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

CUTOFF = 10  # of the NDCG of a part
BLOCK = 1024  # users at a time
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
    from scipy import sparse

    known = data.train_sequences()
    sequences = list(known.values())
    size = data.item_count + 1
    counts = np.bincount(np.concatenate(sequences), minlength=size)
    before, after = (np.concatenate([items[part] for items in sequences]) for part in (slice(-1), slice(1, None)))
    follows = sparse.csr_matrix((np.ones(len(before), dtype=np.float32), (before, after)), shape=(size, size))
    direct = SparseLookup(follows)
    ids = {token: user for user, token in enumerate(data.user_tokens)}
    numbers = [ids[token] for token in users]
    targets = [next(iter(data.targets(number, split))) for number in numbers]
    histories = [data.history(number, split) for number in numbers]
    two_steps = _two_steps(follows, [history[-1] for history in histories], targets)
    rows = []
    for user, target, history, indirect in zip(numbers, targets, histories, two_steps, strict=True):
        after_each = direct.values_at(np.array(history), target) > 0
        holds = (after_each[-1], after_each[:-1].any(), indirect, True)
        occurrences = 0 if counts[target] == 0 else 1 if counts[target] < 5 else 2
        rows.append((OCCURRENCES[occurrences], RELATIONS[holds.index(True)], USERS[user in known]))
    return pd.DataFrame(rows, columns=["occurrences", "relation", "user"])


def _two_steps(follows: csr_matrix, items: Sequence[int], targets: Sequence[int]) -> np.ndarray:
    """Whether a successor of a successor of an item is the target, (B,).

    Only the rows of the items and the columns of the targets are read, because the square of the matrix is far larger.

    Args:
        follows: how often the second item follows the first, (N + 1, N + 1).
        items: B items.
        targets: the target of each item.
    """
    precedes, found = follows.T.tocsr(), np.zeros(len(items), dtype=bool)
    for start in range(0, len(items), BLOCK):
        block = slice(start, start + BLOCK)
        between = follows[items[block]].multiply(precedes[targets[block]])
        found[block] = np.asarray(between.sum(axis=1)).ravel() > 0
    return found


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
