"""GR2Generator: the mid-trained language model as base model and as another recommender."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from recbole_gr2 import pipeline
from recbole_gr2.artifacts import load_catalog, read_recommendations, read_requests
from recbole_gr2.bridge.models import UNREACHED
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.recommenders import load_generator


@pytest.fixture(scope="module")
def generated(tiny_run, finished_copy):
    return tiny_run(
        finished_copy(),
        ["GR2Generator", "evaluate"],
        base_model="GR2Generator",
        models=["GR2Generator"],
        eval_rows=["lambdamart"],
        cand_beams=30,
    )


@pytest.mark.slow
def test_it_proposes_the_candidates_of_all_splits(generated):
    assert not any(name.startswith("base_model") for name in generated.folders)
    for split in ("train", "valid", "test"):
        requests = read_requests(generated.folders["candidates"] / f"{split}.jsonl", generated.data.catalog)
        assert len(requests) > 100
        for request in requests:
            assert 2 <= len(set(request.items)) == len(request.items) <= 5
            assert not set(request.items) & set(request.history)
            scores = [candidate.score for candidate in request.candidates]
            assert scores == sorted(scores, reverse=True) and scores[-1] > -1e3 and scores[0] < 0


@pytest.mark.slow
def test_as_a_recommender_it_has_the_recall_of_its_lists(generated):
    """Only a target that shares its semantic ID has another rank: the recommender ranks it behind the other items."""
    recommended = read_recommendations(generated.folders["GR2Generator"])
    ranks = dict(zip(recommended.users, recommended.target_rank.tolist(), strict=True))
    catalog = load_catalog(generated.context())
    items_of = Counter(item.sid for item in catalog)
    requests = read_requests(generated.folders["candidates"] / "test.jsonl", generated.data.catalog)
    assert {request.user_token for request in requests} == set(ranks)
    for request in requests:
        rank, listed = ranks[request.user_token], request.target_rank
        if listed:
            assert listed <= rank < listed + items_of[catalog.item(request.target).sid]
        else:
            assert rank == 0 or rank > 5
    assert sum(request.has_signal and items_of[catalog.item(request.target).sid] == 1 for request in requests) > 3

    stats = json.loads((generated.folders["candidates"] / "stats.json").read_text())["test"]
    methods = {(e["method"], e["scope"]): e for e in generated.records["evaluate"].summary["methods"]}
    base, oracle = methods["base", "all_users"]["metrics"], methods["oracle", "all_users"]["metrics"]
    for k in (1, 5):
        assert base[f"recall@{k}"] == pytest.approx(stats[f"recall@{k}"], abs=6e-5)  # RecBole rounds
        hits = sum(0 < rank <= k for rank in ranks.values()) / len(ranks)
        assert methods["GR2Generator", "all_users"]["metrics"][f"recall@{k}"] == pytest.approx(hits, abs=6e-5)
    assert oracle["ndcg@5"] == pytest.approx(base["recall@5"], abs=1e-4)


@pytest.mark.slow
def test_it_has_not_seen_the_targets_of_train_requests(generated):
    """The stage `midtrain` proposes the candidates of train requests, and `midtrain_all` all others."""
    lists = {
        split: read_requests(generated.folders["candidates"] / f"{split}.jsonl", generated.data.catalog)
        for split in ("train", "test")
    }
    assert {request.provider for request in lists["train"]} == {"GR2Generator hold-out"}
    assert {request.provider for request in lists["test"]} == {"GR2Generator"}
    users = {token: user for user, token in enumerate(generated.data.user_tokens)}
    for split, stage in (("train", "midtrain"), ("test", "midtrain_all")):
        context = generated.context()
        folders = {**context.folders, "midtrain_all": context.folders[stage]}
        generator = load_generator(replace(context, folders=folders))
        requests = lists[split][:20]
        histories = [generated.data.history(users[request.user_token], split) for request in requests]
        for request, scores in zip(requests, generator.score_rows(None, histories).tolist(), strict=True):
            expected = [candidate.score for candidate in request.candidates]
            assert [scores[item] for item in request.items] == pytest.approx(expected, abs=1e-4)


def test_without_hold_out_it_cannot_be_the_base_model(tiny_settings, tmp_path):
    with pytest.raises(ConfigurationError, match="is mid-trained on the targets") as error:
        pipeline.check(tiny_settings(tmp_path, base_model="GR2Generator", mid_hold_out=False))
    assert error.value.where == "mid_hold_out"
    pipeline.check(tiny_settings(tmp_path, models=["GR2Generator"], mid_hold_out=False))


@pytest.mark.slow
def test_few_beams_give_as_many_unseen_items(generated):
    """No beam ends at a seen item, and the scores of the others do not depend on the mask."""
    context = generated.context(cand_beams=5)
    generator = load_generator(context)
    _, users = generated.data.rows("test")
    histories = [generated.data.history(user, "test") for user in users.tolist()]
    scores = generator.score_rows(None, histories)
    beams = (scores > UNREACHED).sum(1)
    assert (beams >= 5).all()  # more, if items share a semantic ID
    wide = replace(load_generator(context), beams=1000, exclude_seen=False).score_rows(None, histories)
    found = scores > UNREACHED
    torch.testing.assert_close(scores[found], wide[found], atol=1e-4, rtol=0)
    assert not torch.isneginf(wide[:, 1:]).any() and torch.isneginf(scores).any()
