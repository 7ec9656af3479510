"""GR2Generator: the mid-trained language model as base model and as another recommender."""

import json

import pytest

from recbole_gr2.artifacts import read_recommendations, read_requests
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.recommenders import load_generator


@pytest.fixture(scope="module")
def generated(tiny_run, tmp_path_factory):
    return tiny_run(
        tmp_path_factory.mktemp("generator"),
        ["GR2Generator", "evaluate"],
        base_model="GR2Generator",
        models=["GR2Generator"],
        eval_rows=["lambdamart"],
        cand_beams=30,
    )


def test_it_proposes_the_candidates_of_all_splits(generated):
    assert "base_model" not in generated.folders
    for split in ("train", "valid", "test"):
        requests = read_requests(generated.folders["candidates"] / f"{split}.jsonl", generated.data.catalog)
        assert len(requests) > 100
        for request in requests:
            assert 2 <= len(set(request.items)) == len(request.items) <= 5
            assert not set(request.items) & set(request.history)
            scores = [candidate.score for candidate in request.candidates]
            assert scores == sorted(scores, reverse=True) and scores[-1] > -1e3 and scores[0] < 0


def test_as_a_recommender_it_has_the_recall_of_its_lists(generated):
    stats = json.loads((generated.folders["candidates"] / "stats.json").read_text())["test"]
    ranks = read_recommendations(generated.folders["GR2Generator"]).target_rank
    assert ((ranks > 0) & (ranks <= 5)).mean() == pytest.approx(stats["recall@5"], abs=0.02)
    methods = {(e["method"], e["scope"]): e for e in generated.records["evaluate"].summary["methods"]}
    base, oracle = methods["base", "all_users"]["metrics"], methods["oracle", "all_users"]["metrics"]
    assert oracle["ndcg@5"] == pytest.approx(base["recall@5"], abs=1e-4)


def test_it_must_not_have_seen_the_targets_of_train_requests(generated):
    with pytest.raises(ConfigurationError, match="was mid-trained on the targets"):
        load_generator(generated.context(mid_hold_out=False), hold_out=True)
