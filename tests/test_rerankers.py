"""LambdaMART: it finds a planted pattern, stops by validation, and gives the same scores again."""

import numpy as np

from recbole_gr2.rerankers.lambdamart import lambdamart


def planted(count: int, seed: int):
    """Lists of 4 to 6 in which the target is the candidate with the largest second fact, eight times out of ten."""
    rng = np.random.default_rng(seed)
    tables = [rng.normal(size=(rng.integers(4, 7), 3)).astype(np.float32) for _ in range(count)]
    targets = [int(t[:, 1].argmax()) if rng.random() < 0.8 else int(rng.integers(len(t))) for t in tables]
    return tables, [np.arange(len(t)) == target for t, target in zip(tables, targets, strict=True)]


def test_it_finds_a_planted_pattern():
    asked, truth = planted(300, 2)
    scores, trees = lambdamart(planted(400, 0), planted(200, 1), asked, seed=5)
    assert [len(row) for row in scores] == [len(table) for table in asked] and 1 <= trees <= 500
    first = np.mean([gains[row.argmax()] for row, gains in zip(scores, truth, strict=True)])
    assert first > 0.7  # 0.84 is the most there is, 0.2 is chance
    again, _ = lambdamart(planted(400, 0), planted(200, 1), asked, seed=5)
    assert all(np.array_equal(one, two) for one, two in zip(scores, again, strict=True))


def test_a_list_is_scored_whatever_stands_beside_it():
    asked, _ = planted(20, 2)
    together, _ = lambdamart(planted(100, 0), planted(50, 1), asked, seed=5)
    alone, _ = lambdamart(planted(100, 0), planted(50, 1), asked[7:8], seed=5)
    assert np.array_equal(together[7], alone[0])
