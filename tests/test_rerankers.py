"""LambdaMART: it finds a planted pattern, stops by validation, and gives the same scores again. Position bias: a policy
that promotes a fixed slot of the prompt is seen, whatever the order of the candidates in it."""

import numpy as np
import pytest

from recbole_gr2.evidence import RECENT, Described
from recbole_gr2.prompts import shuffled_order
from recbole_gr2.ranking import promote
from recbole_gr2.rerankers.lambdamart import columns, lambdamart
from recbole_gr2.stages.rerank import promoted
from recbole_gr2.types import Answer, Candidate, Request


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


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_fixed_slot_is_seen(shuffled):
    """Scripted policies over 400 lists of 5, whose target is the item that stands in base rank 1 to 5 in turn."""
    candidates = tuple(Candidate(item_id=item, score=-item, rank=item) for item in range(1, 6))
    requests = [
        Request(
            request_id=f"test/{n}",
            user_token=str(n),
            split="test",
            history=(9,),
            candidates=candidates,
            target=n % 5 + 1,
            provider="p",
        )
        for n in range(400)
    ]
    orders = {r.request_id: shuffled_order(r, 7) if shuffled else tuple(range(5)) for r in requests}
    policies = {
        "oracle": lambda r: r.target,
        "copy-cat": lambda r: r.items[0],
        "third slot": lambda r: r.items[orders[r.request_id][2]],
    }

    def places(policy: str) -> dict[str, dict[str, int]]:
        answers = [
            Answer(request_id=r.request_id, ranking=promote(r.items, policies[policy](r)), status="ok")
            for r in requests
        ]
        return promoted(requests, answers, orders)

    assert places("third slot")["promoted_from_slot"] == {"3": 400}
    assert places("copy-cat")["promoted_from_rank"] == {"1": 400}
    assert set(places("oracle")["promoted_from_rank"].values()) == {80}
    if shuffled:  # each of the five slots or ranks has 80 of 400, with a standard deviation of 8
        for name, where in (("third slot", "rank"), ("copy-cat", "slot"), ("oracle", "slot")):
            spread = places(name)[f"promoted_from_{where}"]
            assert len(spread) == 5 and max(spread.values()) < 112 and sum(spread.values()) == 400
