"""A pool of more items than the language model ranks: the selection of candidates, and the metrics."""

import math
from dataclasses import replace

import numpy as np
import pytest

from recbole_gr2.artifacts import read_answers, read_per_user
from recbole_gr2.lists import (
    base_orders,
    candidate_requests,
    rank_windows,
    reported_requests,
    selected,
    training_requests,
)
from recbole_gr2.types import Candidate, CandidateFeatures, Request, SourceScores

POOL, COUNT = 12, 5

REQUEST = Request(
    request_id="train/u",
    user_token="u",
    split="train",
    history=(1, 2),
    candidates=tuple(
        Candidate(item_id=item, score=-float(rank), rank=rank) for rank, item in enumerate((7, 5, 9, 4), 1)
    ),
    target=9,
    provider="A + B",
    sources=(
        SourceScores("A", (1, 2, 3, 4), (0.4, 0.3, 0.2, 0.1)),
        SourceScores("B", (9, 8, 7, 6), (0.0, 1.0, 2.0, 3.0)),
    ),
    prior=tuple(math.log(share) for share in (0.1, 0.2, 0.3, 0.4)),
    grades=(0, 0, 2, 1),
    ranker=(0.5, -1.0, 0.5, 2.0),
    features=CandidateFeatures(np.arange(8.0).reshape(4, 2), np.arange(16.0).reshape(4, 2, 2)),
)


def test_a_shortlist_keeps_everything_that_belongs_to_its_candidates():
    short = REQUEST.shortlist([4, 9])
    assert short.items == (9, 4) and [c.rank for c in short.candidates] == [1, 2]
    assert [c.score for c in short.candidates] == [-3, -4]
    assert np.allclose(np.exp(short.prior), [3 / 7, 4 / 7]) and short.by_prior == (4, 9)
    assert short.grades == (2, 1) and short.target_rank == 1
    assert short.ranker == (0.5, 2.0)
    assert short.sources == (SourceScores("A", (3, 4), (0.2, 0.1)), SourceScores("B", (7, 6), (2.0, 3.0)))
    assert short.features.candidates.tolist() == [[4, 5], [6, 7]] and short.features.pairs.shape == (2, 2, 2)
    assert replace(REQUEST, prior=(), grades=(), features=None, sources=()).shortlist([7, 5]).prior == ()


@pytest.mark.parametrize(
    ("ranker", "candidates", "others"),
    [
        ("prior", (9, 4), (5, 7)),
        ("lambdamart", (7, 4), (9, 5)),  # of two equal scores the one that comes first in the base order
        ("none", (7, 5), (9, 4)),
    ],
)
def test_the_ranker_selects_the_candidates(ranker, candidates, others):
    assert selected(REQUEST, {"cand_num": 2, "cand_ranker": ranker}) == (candidates, others)


def list_of(count):
    """A request with the items 1..count in base order, whose prior prefers odd items."""
    prior = [0.0 if item % 2 else -9.0 for item in range(1, count + 1)]
    candidates = tuple(Candidate(item_id=item, score=-float(item), rank=item) for item in range(1, count + 1))
    return replace(
        REQUEST,
        request_id=f"test/{count}",
        candidates=candidates,
        prior=tuple(prior),
        sources=(),
        grades=(),
        ranker=(),
        features=None,
        target=1,
    )


def best_last(windows):
    """A re-ranker that reverses the base order."""
    return [window.items[::-1] for window in windows]


def test_windows_by_hand():
    """In the order of the prior the pool is 1 3 5 7 2 4 6. A window has 4 items and moves by 2."""
    pool, seen = list_of(7), []

    def rank(windows):
        seen.append([window.items for window in windows])
        return best_last(windows)

    settings = {"cand_num": 4, "cand_ranker": "prior", "eval_windows": 2}
    assert rank_windows([pool], settings, rank) == [(7, 5, 3, 1, 4, 2, 6)]
    # places 3 to 6 have 5 7 2 4 and get 7 5 4 2; then places 1 to 4 have 1 3 7 5
    assert seen == [[(2, 4, 5, 7)], [(1, 3, 5, 7)]]
    assert rank_windows([pool], {**settings, "eval_windows": 1}, best_last) == [(7, 5, 3, 1, 2, 4, 6)]
    # the third window has 3 items: 2 4 6 become 6 4 2, then 5 7 6 4 become 7 6 5 4, then 1 3 7 6 become 7 6 3 1
    expected = [(7, 6, 3, 1, 5, 4, 2)]
    assert rank_windows([pool], {**settings, "eval_windows": 3}, best_last) == expected
    assert rank_windows([pool], {**settings, "eval_windows": 99}, best_last) == expected  # the pool has three windows
    assert rank_windows([pool], {**settings, "cand_ranker": "none", "eval_windows": 3}, base_orders) == [pool.items]


def test_windows_of_lists_of_different_lengths():
    settings = {"cand_num": 4, "cand_ranker": "none", "eval_windows": 9}
    pools = [list_of(count) for count in (2, 4, 5, 9)]
    together = rank_windows(pools, settings, best_last)
    assert together == [rank_windows([pool], settings, best_last)[0] for pool in pools]
    assert [order[0] for order in together] == [2, 4, 5, 9]  # the last item moves to the first place
    assert [sorted(order) for order in together] == [list(pool.items) for pool in pools]


@pytest.fixture(scope="module")
def run(finished_copy, tiny_run):
    options = {"cand_pool": POOL, "eval_rows": ["lambdamart", "sft"], "topk": [1, COUNT, POOL]}
    return tiny_run(finished_copy(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_language_models_get_the_selected_candidates_and_others_the_whole_pool(run, split):
    context = run.context()
    pools, lists = candidate_requests(context, split, pool=True), candidate_requests(context, split)
    assert {len(request.items) for request in pools} == {POOL} and len(pools) > 100
    for pool, short in zip(pools, lists, strict=True):
        assert len(short.items) == COUNT and set(short.items) <= set(pool.items)
        if pool.prior:
            assert set(short.items) == set(pool.by_prior[:COUNT])
            assert math.isclose(sum(map(math.exp, short.prior)), 1, rel_tol=1e-6)
    for request in training_requests(context):
        assert len(request.items) == COUNT and request.target in request.items


@pytest.mark.slow
def test_answers_of_a_language_model_rank_its_candidates(run):
    _, hits = reported_requests(run.context())
    answers = read_answers(run.folders["rerank_sft"], run.data.catalog)
    assert {request.request_id for request in hits} <= set(answers)
    assert all(len(answer.ranking) == COUNT for answer in answers.values())
    answers = read_answers(run.folders["rerank_lambdamart"], run.data.catalog)
    assert all(len(answer.ranking) == POOL for answer in answers.values())


@pytest.mark.slow
def test_items_behind_the_candidates_keep_the_order_of_the_ranker(run):
    _, pools = reported_requests(run.context(), pool=True)
    answers = read_answers(run.folders["rerank_sft"], run.data.catalog)
    table = read_per_user(run.folders["evaluate"]).set_index("user")
    behind = 0
    for request in pools:
        order = request.by_prior
        place = order.index(request.target) + 1
        assert table.loc[request.user_token, "prior"] == place
        if place > COUNT:
            behind += 1
            assert table.loc[request.user_token, "sft"] == place
        else:
            ranking = answers[request.request_id].ranking
            assert table.loc[request.user_token, "sft"] == ranking.index(request.target) + 1
    assert behind > 0


@pytest.mark.slow
def test_lambdamart_selects_the_candidates(finished_copy, tiny_run):
    """The validation lists have the order of the method `lambdamart`; train lists are ordered by other fits."""
    changed = tiny_run(finished_copy(), cand_pool=POOL, cand_ranker="lambdamart", eval_rows=["lambdamart", "midtrain"])
    context = changed.context()
    for split in ("train", "valid", "test"):
        lists = zip(candidate_requests(context, split, pool=True), candidate_requests(context, split), strict=True)
        for pool, short in lists:
            assert len(pool.ranker) == (POOL if pool.prior else 0)
            assert set(short.items) == set(pool.by_ranker[:COUNT])
    _, pools = reported_requests(context, pool=True)
    table = read_per_user(changed.folders["evaluate"]).set_index("user")
    not_selected = [pool for pool in pools if pool.target not in pool.by_ranker[:COUNT]]
    assert not_selected
    for pool in not_selected:
        assert table.loc[pool.user_token, "midtrain"] == pool.by_ranker.index(pool.target) + 1


@pytest.mark.slow
def test_windows_rank_the_whole_pool(run, finished_copy, tiny_run):
    """Three windows of five items cover nine of twelve; with one window the results are those of the candidates."""
    wide = tiny_run(finished_copy(), cand_pool=POOL, eval_windows=3, eval_rows=["midtrain", "sft"])
    context = wide.context()
    _, pools = reported_requests(context, pool=True)
    unchanged = rank_windows(pools, wide.settings, base_orders)
    table = read_per_user(wide.folders["evaluate"]).set_index("user")
    moved = 0
    for method in ("midtrain", "sft"):
        answers = read_answers(wide.folders[f"rerank_{method}"], wide.data.catalog)
        assert set(answers) == {pool.request_id for pool in pools}  # also those whose candidates lack the target
        for pool in pools:
            ranking = answers[pool.request_id].ranking
            assert sorted(ranking) == sorted(pool.items) and ranking[9:] == pool.by_prior[9:]
            assert table.loc[pool.user_token, method] == ranking.index(pool.target) + 1
            moved += pool.by_prior.index(pool.target) >= COUNT > ranking.index(pool.target)
    assert moved > 0
    summary = wide.records["rerank_sft"].summary
    same = [answers[pool.request_id].ranking == order for pool, order in zip(pools, unchanged, strict=True)]
    assert summary["unchanged"] == np.mean(same)


@pytest.mark.slow
def test_no_method_changes_which_items_are_in_the_pool(run):
    rows = {(entry["method"], entry["scope"]): entry["metrics"] for entry in run.records["evaluate"].summary["methods"]}
    assert {method for method, _ in rows} == {"base", "oracle", "prior", "lambdamart", "sft"}
    assert len({metrics["recall@12"] for (_, scope), metrics in rows.items() if scope == "all_users"}) == 1
    assert all(metrics["recall@12"] == 1 for (_, scope), metrics in rows.items() if scope == "hit_users")
    share = [rows[method, "hit_users"]["recall@5"] for method in ("prior", "sft")]
    assert share[0] == share[1] < 1  # the selection of the candidates limits the language model


def test_a_pool_below_the_candidates_is_refused(tiny_settings, tmp_path):
    from recbole_gr2.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match="cand_pool is 4, expected at least cand_num"):
        tiny_settings(tmp_path, cand_pool=4)
    with pytest.raises(ConfigurationError, match="cand_ranker is prior, but prior_features is"):
        tiny_settings(tmp_path, cand_pool=9, prior_features=[])
    assert tiny_settings(tmp_path, cand_pool=9, prior_features=[], cand_ranker="none")["cand_pool"] == 9
