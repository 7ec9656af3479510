"""The built-in re-rankers: LambdaMART finds a planted pattern, and a position bias is detected."""

import numpy as np
import pytest

from recbole_gr2.config.rules import GENERATING
from recbole_gr2.errors import QualityCheckError
from recbole_gr2.features.trees import columns, cross_fit_trees, fit_trees, scores_of
from recbole_gr2.prompts import shuffled_order
from recbole_gr2.ranking import promote
from recbole_gr2.rerankers.answers import Sft, first_places
from recbole_gr2.rerankers.base import Reranker, by_score
from recbole_gr2.rerankers.lambdamart import LambdaMART
from recbole_gr2.rerankers.orders import BaseOrder, Oracle, PriorOrder
from recbole_gr2.rerankers.registry import ORDERS, RERANKERS
from recbole_gr2.testing import synthetic_context
from recbole_gr2.types import RECENT, Answer, Candidate, CandidateFeatures, Request


def planted(count: int, seed: int) -> list[Request]:
    """Requests with 4 to 6 candidates. The target has the largest second feature, eight times out of ten."""
    rng = np.random.default_rng(seed)
    requests = []
    for number in range(count):
        table = rng.normal(size=(rng.integers(4, 7), 3)).astype(np.float32)
        target = int(table[:, 1].argmax()) if rng.random() < 0.8 else int(rng.integers(len(table)))
        requests.append(
            Request(
                request_id=f"train/{number}",
                user_token=str(number),
                split="train",
                history=(9,),
                candidates=tuple(Candidate(item_id=n + 1, score=-n, rank=n + 1) for n in range(len(table))),
                target=target + 1,
                provider="p",
                features=CandidateFeatures(table, np.zeros((len(table), 1, 0), np.float16)),
            )
        )
    return requests


def fitted(train: int = 400, valid: int = 200) -> LambdaMART:
    reranker = LambdaMART(synthetic_context())
    reranker.fit(planted(train, 0), planted(valid, 1))
    return reranker


def test_every_method_describes_itself():
    methods = {method.name: method for method in (*ORDERS, *RERANKERS.values())}
    assert set(methods) == {
        "base",
        "oracle",
        "prior",
        "lambdamart",
        "midtrain",
        "sft",
        "rl",
        "shuffled",
        "distilled",
        "internalised",
        "score",
        "onerec_think",
        "onerec_think-no-think",
    }
    for name, method in methods.items():
        assert issubclass(method, Reranker) and method.name == name and method.description
        assert set(method.compare_with) <= set(methods) - {name}
        assert method.trained == (name not in ("base", "oracle", "shuffled")) or name == "shuffled"
    assert {name for name, method in methods.items() if method.diagnostic} == {"oracle", "shuffled"}


def test_the_methods_that_generate_answers():
    assert set(GENERATING) == {name for name, method in RERANKERS.items() if issubclass(method, Sft)}


def test_orders():
    (request,) = planted(1, 3)
    context = synthetic_context()
    assert BaseOrder(context).rank([request]) == [request.items]
    assert Oracle(context).rank([request])[0][0] == request.target
    assert Oracle(context).rank([request.without_labels()]) == [request.items]
    assert [answer.ranking for answer in PriorOrder(context).rank([request])] == [request.items]  # there is no prior
    assert by_score(request, [1.0] * len(request.items)) == request.items
    assert by_score(request, range(len(request.items))) == request.items[::-1]


def test_lambdamart_gets_what_the_prior_gets():
    pairs = np.array([[[1, 2], [3, 5]], [[-1, 0], [-2, 0]]], np.float16)  # two candidates, two items, two features
    table = columns(CandidateFeatures(np.array([[7.0], [8.0]], np.float32), pairs))
    assert table.shape == (2, 1 + 2 * (RECENT + 2))
    assert table[:, :5].tolist() == [[7, 1, 2, 3, 5], [8, -1, 0, -2, 0]] and not table[:, 5:-4].any()
    assert table[:, -4:].tolist() == [[3, 5, 4, 7], [-1, 0, -3, 0]]  # maximum, sum


def test_lambdamart_finds_a_planted_pattern():
    requests, reranker = planted(300, 2), fitted()
    rankings = reranker.rank([request.without_labels() for request in requests])
    assert 1 <= reranker.summary["trees"] <= 500
    assert all(sorted(order) == sorted(r.items) for order, r in zip(rankings, requests, strict=True))
    first = np.mean([order[0] == request.target for order, request in zip(rankings, requests, strict=True)])
    assert first > 0.7  # 0.84 is the maximum, 0.2 is chance
    assert fitted().rank(requests) == rankings


def test_cross_fitted_trees_do_not_depend_on_the_targets_of_the_user():
    """Another target of a user changes the scores of other users only. Two lists of a user are in one fold."""
    requests = planted(60, 0)
    features, users = [request.features for request in requests], [f"u{n // 2}" for n in range(60)]
    relevance = [request.relevance for request in requests]
    changed = [relevance[0][::-1], relevance[1][::-1], *relevance[2:]]
    first, second = (cross_fit_trees(features, each, users=users, trees=5, seed=3) for each in (relevance, changed))
    assert relevance[:2] != changed[:2] and first[:2] == second[:2] and first != second
    assert [len(row) for row in first] == [len(request.items) for request in requests]
    fitted_to_all = scores_of(fit_trees(features, relevance, valid=None, seed=3, trees=5), features)
    assert fitted_to_all != first
    with pytest.raises(QualityCheckError, match="belong to 1 users"):
        cross_fit_trees(features, relevance, users=["u"] * 60, trees=5, seed=3)


def test_lambdamart_ranks_a_list_independently_of_the_others():
    requests, reranker = planted(20, 2), fitted(100, 50)
    assert reranker.rank(requests)[7:8] == reranker.rank(requests[7:8])


def test_stored_trees_rank_alike(tmp_path):
    requests, reranker = planted(20, 2), fitted(100, 50)
    again = LambdaMART(synthetic_context())
    assert not again.load(tmp_path)
    reranker.save(tmp_path)
    assert again.load(tmp_path) and again.rank(requests) == reranker.rank(requests)


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_fixed_slot_is_detected(shuffled):
    """Scripted policies over 400 lists of 5. The target has the base ranks 1 to 5 in turn."""
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
        return first_places(requests, answers, orders)

    assert places("third slot")["promoted_from_slot"] == {"3": 400}
    assert places("copy-cat")["promoted_from_rank"] == {"1": 400}
    assert set(places("oracle")["promoted_from_rank"].values()) == {80}
    if shuffled:  # each of the five slots or ranks has 80 of 400, with a standard deviation of 8
        for name, where in (("third slot", "rank"), ("copy-cat", "slot"), ("oracle", "slot")):
            spread = places(name)[f"promoted_from_{where}"]
            assert len(spread) == 5 and max(spread.values()) < 112 and sum(spread.values()) == 400
