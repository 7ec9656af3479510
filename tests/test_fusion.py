"""Fusion of several base models: values computed by hand, the choice of weights, and the lists of a run."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from changed_data import copy_tiny
from hypothesis import given
from hypothesis import strategies as st

from recbole_gr2.artifacts import read_recommendations, read_requests
from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.evaluator import RecboleCheck, Scored, Source, in_chunks, joined
from recbole_gr2.bridge.fusion import Fusion, choose_weights, item_ranks, places_of, ranks_of, standardise
from recbole_gr2.bridge.models import UNREACHED, Batch
from recbole_gr2.errors import ConfigurationError, QualityCheckError
from recbole_gr2.features.extraction import TrainingData, extract_features
from recbole_gr2.recommenders import load_base_model
from recbole_gr2.stages.candidates import base_models

pytestmark = pytest.mark.slow  # Together they need many seconds.

INF = float("inf")
TWO = ["PairCounts", "ItemKNN"]


def fused(name: str, weights: list[float], *scores: list[float]) -> list[float]:
    fusion = Fusion(name)
    parts = torch.stack([fusion.comparable(torch.tensor([row])) for row in scores])
    return fusion.fuse(parts, weights)[0].tolist()


# --- values computed by hand -----------------------------------------------------------------------------------------


def test_standard_scores_leave_out_masked_and_unreached_items():
    scores = torch.tensor([[-INF, 1.0, 3.0, -INF], [-INF, 1.0, 3.0, UNREACHED], [-INF, 7.0, 7.0, 7.0]])
    assert standardise(scores).tolist() == [[-INF, -1, 1, -INF], [-INF, -1, 1, -1], [-INF, 0, 0, 0]]


def test_weighted_sum_of_standard_scores():
    # Standardised: (-1, 1, masked) and (1, -1, masked).
    assert fused("zscore", [1, 3], [-INF, 1, 3, -INF], [-INF, 40, 20, -INF]) == [-INF, 2, -2, -INF]


def test_reciprocal_ranks():
    first, second = [-INF, 9, 5, 1], [-INF, 1, 9, 5]
    expected = [2 / 61 + 1 / 63, 2 / 62 + 1 / 61, 2 / 63 + 1 / 62]
    assert fused("rank", [2, 1], first, second) == [-INF, *map(pytest.approx, expected)]


def test_quota_gives_each_model_its_share_of_the_places():
    first, second = [-INF, 9, 8, 7, 6, 5], [-INF, 1, 2, 3, 4, 5]
    # Two places of three belong to the first model: 1, 3, 4, 6, ... The second has 2, 5, 8, ...
    assert places_of([2, 1], 3).tolist() == [[1, 3, 4], [2, 5, 6]]
    ranking = np.argsort([-score for score in fused("quota", [2, 1], first, second)[1:]], kind="stable") + 1
    assert ranking.tolist() == [1, 5, 2, 3, 4]
    assert fused("quota", [1, 0], first, second)[1:] == [-1, -2, -3, -4, -5]


def test_an_item_that_one_model_alone_can_score_enters_by_its_quota():
    collaborative, text = [-INF, 9, 8, 7, 6, UNREACHED], [-INF, 0, 0, 0, 0, 5]
    assert max(range(6), key=fused("zscore", [4, 1], collaborative, text).__getitem__) == 1
    order = sorted(range(1, 6), key=lambda item: -fused("quota", [4, 1], collaborative, text)[item])
    assert 5 in order[:3]


@given(
    st.sampled_from(["zscore", "rank", "quota"]),
    st.lists(st.lists(st.integers(0, 5), min_size=6, max_size=6), min_size=1, max_size=3),
)
def test_one_model_keeps_its_order_and_masked_items_stay_masked(name, scores):
    rows = [[-INF, *map(float, row)] for row in scores]
    rows = [[*row[:3], -INF, *row[4:]] for row in rows]
    for row in rows:
        alone = fused(name, [0.5], row)
        assert [score == -INF for score in alone] == [score == -INF for score in row]
        for one in range(7):
            for other in range(7):
                assert not (row[one] > row[other] and alone[one] <= alone[other])
    together = fused(name, [1.0] * len(rows), *rows)
    assert [score == -INF for score in together] == [score == -INF for score in rows[0]]


@given(st.lists(st.integers(0, 9), min_size=2, max_size=8))
def test_ranks_are_those_of_a_stable_sort(scores):
    order = sorted(range(len(scores)), key=lambda item: -scores[item])
    rows = torch.tensor([scores], dtype=torch.float)
    ranks = item_ranks(rows)[0].tolist()
    everything = torch.arange(len(scores)).flip(0)
    assert ranks_of(rows, everything[None])[0].tolist() == item_ranks(rows)[0, everything].tolist()
    assert [ranks[item] for item in order] == list(range(1, len(scores) + 1))


# --- choice of the weights -------------------------------------------------------------------------------------------


def model_of(scores: np.ndarray, targets: np.ndarray) -> SimpleNamespace:
    """A base model with these scores (U, N + 1) and these targets (U,) of the validation rows."""
    half = len(scores) // 2
    parts = [slice(0, half), slice(half, None)]
    batches = [Batch({"item": torch.tensor(targets[part])}, torch.tensor(scores[part])) for part in parts]
    return SimpleNamespace(data=SimpleNamespace(iid="item"), batches=lambda split: iter(batches))


def random_models(users: int = 60, items: int = 300) -> tuple[list[SimpleNamespace], np.ndarray]:
    """A model that knows half of the targets, one that knows the other half, and one that knows nothing."""
    rng = np.random.default_rng(0)
    targets = rng.integers(1, items + 1, users)
    scores = rng.normal(size=(3, users, items + 1))
    scores[:, :, 0] = -INF
    scores[0, np.arange(0, users, 2), targets[::2]] += 4
    scores[1, np.arange(1, users, 2), targets[1::2]] += 4
    return [model_of(each, targets) for each in scores], targets


@pytest.mark.parametrize("name", ["zscore", "rank", "quota"])
def test_validation_chooses_weights_with_the_highest_recall(name):
    models, _ = random_models()
    fusion = Fusion(name)
    weights, recall = choose_weights(models, fusion, 10)

    def recall_of(weights):
        rank = []
        for batches in zip(*(model.batches("valid") for model in models), strict=True):
            parts = torch.stack([fusion.comparable(batch.scores) for batch in batches])
            scores = fusion.fuse(parts, weights)
            rank += item_ranks(scores).gather(1, batches[0].rows["item"][:, None])[:, 0].tolist()
        return float(np.mean(np.array(rank) <= 10))

    assert recall == pytest.approx(recall_of(weights))
    assert recall > max(recall_of((1, 1, 1)), recall_of((1, 0, 0)), recall_of((0, 1, 0)))
    assert weights[2] < min(weights[:2])
    assert (weights, recall) == choose_weights(models, fusion, 10)


def test_no_target_among_the_candidates_is_an_error():
    scores = np.tile(np.arange(300.0), (4, 1))
    with pytest.raises(QualityCheckError, match="no validation target is among the first 10 items"):
        choose_weights([model_of(scores, np.array([1, 2, 3, 4]))] * 2, Fusion("zscore"), 10)


# --- lists of a run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("fused"), ["candidates"], base_model=TWO, cand_num=8)


def test_lists_are_those_of_the_fused_scores(run):
    context = run.context()
    weights = run.records["candidates"].summary["fusion"]
    assert list(weights) == TWO and max(weights.values()) > 0
    requests = {
        split: read_requests(run.folders["candidates"] / f"{split}.jsonl", run.data.catalog)
        for split in ("train", "valid", "test")
    }
    for split in requests:
        models = [load_base_model(context, name, "hold_out" if split == "train" else "base") for name in TWO]
        scores = [
            {
                user: row.double().numpy()
                for users, rows in model.scores(split)
                for user, row in zip(users.tolist(), rows, strict=True)
            }
            for model in models
        ]
        ids = {token: user for user, token in enumerate(run.data.user_tokens)}
        for request in requests[split][:20]:
            rows = [each[ids[request.user_token]] for each in scores]
            standard = [(row - row[row > -INF].mean()) / row[row > -INF].std() for row in rows]
            total = sum(weight * row for weight, row in zip(weights.values(), standard, strict=True))
            items = list(request.items)
            assert np.all(np.diff(total[items]) <= 1e-5)
            assert total[items].min() >= np.sort(total)[-len(items)] - 1e-5
            for name, row, source, each in zip(TWO, rows, request.sources, standard, strict=True):
                assert source.name == name and np.allclose(source.scores, each[items], atol=1e-5)
                assert all(
                    np.sum(row > row[i]) < rank <= np.sum(row >= row[i])
                    for i, rank in zip(items, source.ranks, strict=True)
                )
            assert request.provider == " + ".join(TWO) + (" hold-out" if split == "train" else "")


def test_each_base_model_alone_recommends_what_it_recommends_without_the_other(run, tiny_run, tmp_path):
    for name in TWO:
        alone = tiny_run(tmp_path / name, ["candidates"], base_model=name, cand_num=8)
        one = read_recommendations(run.folders["candidates"], name)
        other = read_recommendations(alone.folders["candidates"])
        assert one.users == other.users and np.array_equal(one.items, other.items)
        assert np.array_equal(one.target_rank, other.target_rank)


def test_the_fused_order_is_what_recboles_evaluator_scores(run):
    models, _ = base_models(run.context())
    base, hold_out = models["base"], models["hold_out"]
    assert (base.metadata["hold_out"], hold_out.metadata["hold_out"]) == (False, True)
    check = RecboleCheck(base)
    recommended = read_recommendations(run.folders["candidates"])
    place = {user: position for position, user in enumerate(recommended.users)}
    for scored in base.batches("test"):
        rows, scores = scored.rows, scored.scores
        users = rows[run.data.uid].numpy()
        own = [place[run.data.user_tokens[user]] for user in users]
        batch = SimpleNamespace(
            items=recommended.items[own].astype(np.int64), target_rank=recommended.target_rank[own].astype(np.int64)
        )
        check.add(batch, scores, rows[run.data.iid])
    check.finish()


def test_ranks_and_scores_of_the_models_are_features(run):
    requests = read_requests(run.folders["candidates"] / "test.jsonl", run.data.catalog)[:3]
    data = TrainingData(
        catalog=run.data.catalog, sequences=[[1, 2, 3]], times=[[1, 2, 3]], embeddings=np.eye(len(run.data.catalog))
    )
    names, features = extract_features(requests, ["sources"], data)
    assert names == [f"{what} by {name}" for name in TWO for what in ("log rank", "score")]
    for request, values in zip(requests, features, strict=True):
        assert np.allclose(values.candidates[:, 0], np.log(request.sources[0].ranks))
        assert np.allclose(values.candidates[:, 3], request.sources[1].scores)


def test_test_targets_change_no_list(tiny_run, tiny_data, tmp_path):
    runs = []
    for scramble in (False, True):
        copy = tmp_path / str(scramble)
        copy_tiny(Path(tiny_data), copy, scrambled=1 if scramble else 0)
        options = {"base_model": TWO, "cand_num": 8, "data_path": str(copy), "dataset": "tiny"}
        runs.append(tiny_run(copy / "run", ["candidates"], **options))
    assert runs[0].records["candidates"].summary["fusion"] == runs[1].records["candidates"].summary["fusion"]
    for split in ("train", "valid", "test"):
        one, other = (
            {
                request.user_token: (run.data.catalog.tokens(request.items), request.sources)
                for request in read_requests(run.folders["candidates"] / f"{split}.jsonl", run.data.catalog)
            }
            for run in runs
        )
        assert one == other and len(one) > 100
    targets = [[next(iter(run.data.targets(user, "test"))) for user in run.data.sequences] for run in runs]
    assert sum(a != b for a, b in zip(*targets, strict=True)) > 100


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"base_model": []}, "base_model is [], expected at least one model"),
        ({"base_model": ["Pop", "Pop"]}, "base_model has 'Pop' twice"),
        ({"base_model": ["Pop", "SASrec"]}, "nearest: SASRec"),
        ({"base_model": TWO, "cand_weights": {"ItemKNN": 1, "BPR": 1}}, "cand_weights has 'BPR', expected names in"),
        ({"base_model": TWO, "cand_weights": {"ItemKNN": 0}}, "expected at least one weight > 0"),
        ({"base_model": TWO, "cand_weights": {"ItemKNN": -1}}, "cand_weights is"),
        ({"base_options": {"BPR": {"epochs": 1}}}, "base_options has 'BPR', expected a name in base_model"),
        ({"base_model": TWO, "base_options": {"PairCounts": {"windw": 1}}}, "nearest: window"),
        ({"base_model": TWO, "base_options": {"PairCounts": {"window": 0}}}, "base_options.PairCounts.window is 0"),
        ({"base_model": TWO, "base_options": {"PairCounts": 3}}, "expected dict of dict"),
        ({"base_model": TWO, "base_options": {"ItemKNN": {"MAX_ITEM_LIST_LENGTH": 5}}}, "unknown option"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tiny_settings, tmp_path, changes, text):
    with pytest.raises(ConfigurationError) as error:
        tiny_settings(tmp_path, **changes)
    assert text in str(error.value)


def test_options_reach_the_base_models_that_they_name(tiny_settings, tmp_path):
    options = {"base_options": {"PairCounts": {"window": 2}}, "base_max_history": 4}
    settings = tiny_settings(tmp_path, base_model=["PairCounts", "TextNeighbours"], **options)
    pairs, texts = (settings.options_of(name, base=True) for name in settings["base_model"])
    assert (pairs["window"], pairs["max_history"]) == (2, 4)
    assert texts["max_history"] == 4 and "window" not in texts
    assert tiny_settings(tmp_path, base_model="Pop")["base_model"] == ["Pop"]


def test_given_weights_are_used(tiny_run, tmp_path):
    run = tiny_run(tmp_path, ["candidates"], base_model=TWO, cand_weights={"ItemKNN": 2}, cand_fusion="quota")
    assert run.records["candidates"].summary["fusion"] == {"PairCounts": 0, "ItemKNN": 2}
    alone = read_recommendations(run.folders["candidates"], "ItemKNN")
    together = read_recommendations(run.folders["candidates"])
    assert np.array_equal(alone.items[:, :5], together.items[:, :5])


def test_a_further_base_model_trains_no_other_one_again(run, tiny_settings):
    from recbole_gr2 import pipeline

    settings = tiny_settings(run.settings["checkpoint_dir"], base_model=[*TWO, "Pop"], cand_num=8)
    plan = {entry.stage.name: entry.action for entry in pipeline.plan(settings, Data(settings), stages=["candidates"])}
    assert [plan[f"base_model_{name}"] for name in (*TWO, "Pop")] == ["cached", "cached", "run"]
    assert plan["candidates"] == "run"


def scored_rows(users: range) -> Scored:
    """Rows whose numbers tell their user and their place."""
    column = np.array(users)[:, None]
    alone = Scored(np.array(users), column * 100 + np.arange(3), column / 2 + np.arange(3), np.array(users) % 4)
    sources = (Source(alone, column * 10 + np.arange(3), column - np.arange(3.0)), Source(None, column, column / 4))
    return Scored(
        np.array(users), column * 1000 + np.arange(3), column / 8 + np.arange(3), np.array(users) % 5, sources
    )


def test_joined_batches_are_those_of_all_rows():
    def numbers(scored: Scored | None) -> list:
        if scored is None:
            return []
        own = [scored.users, scored.items, scored.scores, scored.target_rank]
        parts = [part.tolist() for part in own]
        return parts + [[numbers(s.alone), s.ranks.tolist(), s.scores.tolist()] for s in scored.sources]

    batches = [scored_rows(range(start, min(start + 4, 11))) for start in range(0, 11, 4)]
    whole = joined(iter(batches), 11)
    assert numbers(whole) == numbers(scored_rows(range(11)))
    chunks = list(in_chunks(whole, 4))
    assert [numbers(chunk) for chunk in chunks] == [numbers(batch) for batch in batches]
    assert np.shares_memory(chunks[0].sources[0].ranks, whole.sources[0].ranks)
