"""LambdaMART: it finds a planted pattern, stops by validation, and gives the same scores again."""

import numpy as np

from recbole_gr2.evidence import RECENT, Described
from recbole_gr2.rerankers.lambdamart import columns, lambdamart


def planted(count: int, seed: int):
    """Lists of 4 to 6 in which the target is the candidate with the largest second fact, eight times out of ten."""
    rng = np.random.default_rng(seed)
    tables = [rng.normal(size=(rng.integers(4, 7), 3)).astype(np.float32) for _ in range(count)]
    targets = [int(t[:, 1].argmax()) if rng.random() < 0.8 else int(rng.integers(len(t))) for t in tables]
    known = [Described(t, np.zeros((len(t), 1, 0), np.float16)) for t in tables]
    return known, [np.arange(len(t)) == target for t, target in zip(tables, targets, strict=True)]


def test_it_sees_what_the_prior_sees():
    pairs = np.array([[[1, 2], [3, 5]], [[-1, 0], [-2, 0]]], np.float16)  # two candidates, two items, two facts
    table = columns(Described(np.array([[7.0], [8.0]], np.float32), pairs))
    assert table.shape == (2, 1 + 2 * (RECENT + 2))
    assert table[:, :5].tolist() == [[7, 1, 2, 3, 5], [8, -1, 0, -2, 0]] and not table[:, 5:-4].any()
    assert table[:, -4:].tolist() == [[3, 5, 4, 7], [-1, 0, -3, 0]]  # largest, sum


def test_it_finds_a_planted_pattern():
    asked, truth = planted(300, 2)
    scores, trees = lambdamart(planted(400, 0), planted(200, 1), asked, seed=5)
    assert [len(row) for row in scores] == [len(each.facts) for each in asked] and 1 <= trees <= 500
    first = np.mean([gains[row.argmax()] for row, gains in zip(scores, truth, strict=True)])
    assert first > 0.7  # 0.84 is the most there is, 0.2 is chance
    again, _ = lambdamart(planted(400, 0), planted(200, 1), asked, seed=5)
    assert all(np.array_equal(one, two) for one, two in zip(scores, again, strict=True))


def test_a_list_is_scored_whatever_stands_beside_it():
    asked, _ = planted(20, 2)
    together, _ = lambdamart(planted(100, 0), planted(50, 1), asked, seed=5)
    alone, _ = lambdamart(planted(100, 0), planted(50, 1), asked[7:8], seed=5)
    assert np.array_equal(together[7], alone[0])
