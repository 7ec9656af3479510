"""A pool of more items than the language model ranks: the selection of candidates, and the metrics."""

import math
from dataclasses import replace

import numpy as np
import pytest

from recbole_gr2.artifacts import read_answers, read_per_user
from recbole_gr2.lists import candidate_requests, reported_requests, selected, training_requests
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
    features=CandidateFeatures(np.arange(8.0).reshape(4, 2), np.arange(16.0).reshape(4, 2, 2)),
)


def test_a_shortlist_keeps_everything_that_belongs_to_its_candidates():
    short = REQUEST.shortlist([4, 9])
    assert short.items == (9, 4) and [c.rank for c in short.candidates] == [1, 2]
    assert [c.score for c in short.candidates] == [-3, -4]
    assert np.allclose(np.exp(short.prior), [3 / 7, 4 / 7]) and short.by_prior == (4, 9)
    assert short.grades == (2, 1) and short.target_rank == 1
    assert short.sources == (SourceScores("A", (3, 4), (0.2, 0.1)), SourceScores("B", (7, 6), (2.0, 3.0)))
    assert short.features.candidates.tolist() == [[4, 5], [6, 7]] and short.features.pairs.shape == (2, 2, 2)
    assert replace(REQUEST, prior=(), grades=(), features=None, sources=()).shortlist([7, 5]).prior == ()


@pytest.mark.parametrize(("ranker", "candidates", "others"), [("prior", (9, 4), (5, 7)), ("none", (7, 5), (9, 4))])
def test_the_ranker_selects_the_candidates(ranker, candidates, others):
    assert selected(REQUEST, {"cand_num": 2, "cand_ranker": ranker}) == (candidates, others)


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
