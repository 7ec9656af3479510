"""Parts of the test users by their target, against values found by hand."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from recbole_gr2.slices import OCCURRENCES, RELATIONS, slice_metrics, target_slices
from recbole_gr2.slices import USERS as KNOWN

# Users: training items, then the items of validation and test. In training 2 follows 1, 3 follows 2 and 5 follows 4.
USERS = {
    "direct": ([1, 2, 3], 1, 2),  # 2 follows 1, the last item
    "earlier": ([4, 5], 3, 5),  # 5 follows 4, an earlier item
    "two steps": ([6, 4], 1, 3),  # 1 -> 2 -> 3
    "unknown": ([2, 3], 7, 8),  # 8 does not occur in training
    "often": ([1, 2, 1, 2, 1, 2, 1, 2], 6, 1),
    "new": ([], 1, 2),
}


@pytest.fixture
def data():
    names = list(USERS)
    return SimpleNamespace(
        item_count=8,
        user_tokens=["[PAD]", *names],
        train_sequences=lambda: {n: np.array(USERS[name][0]) for n, name in enumerate(names, 1) if USERS[name][0]},
        history=lambda user, split: (*USERS[names[user - 1]][0], USERS[names[user - 1]][1]),
        targets=lambda user, split: {USERS[names[user - 1]][2]: 1},
    )


def test_parts_by_hand(data):
    parts = target_slices(data, list(USERS))
    assert dict(zip(USERS, parts["relation"], strict=True)) == {
        "direct": "successor of the last item",
        "earlier": "successor of another history item",
        "two steps": "two steps from the last item",
        "unknown": "none of these",
        "often": "successor of another history item",  # 1 follows 2, but not 6
        "new": "successor of the last item",
    }
    # Training has 2 six times, 5 once, 3 twice, 8 never and 1 five times.
    assert [OCCURRENCES.index(name) for name in parts["occurrences"]] == [2, 1, 1, 0, 2, 2]
    assert [name.partition(" ")[0] for name in parts["user"]] == ["known"] * 5 + ["new"]


def test_metrics_count_users_without_a_hit():
    parts = pd.DataFrame(
        {"occurrences": OCCURRENCES[1], "relation": [*RELATIONS[:1] * 3, RELATIONS[3]], "user": KNOWN[1]}
    )
    ranks = {"base": {"a": 3, "b": 11}, "other": {"a": 1, "b": 11}}
    rows = {row["slice"]: row for row in slice_metrics(parts, ["a", "b", "c", "d"], ranks)}
    assert set(rows) == {OCCURRENCES[1], RELATIONS[0], RELATIONS[3], KNOWN[1]}
    first = rows[RELATIONS[0]]
    assert (first["users"], first["share"], first["listed"]) == (3, 0.75, pytest.approx(2 / 3))
    assert first["ndcg@10"] == {"base": pytest.approx(0.5 / 3), "other": pytest.approx(1 / 3)}
    assert rows[RELATIONS[3]]["listed"] == 0 and rows[RELATIONS[3]]["ndcg@10"] == {"base": 0, "other": 0}
