"""The evaluation: rankings, features and examples agree with the tables."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import METRICS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_gr2 import pipeline
from recbole_gr2.artifacts import (
    load_catalog,
    load_requests,
    read_answers,
    read_embeddings,
    read_feature_names,
    read_per_user,
    read_recommendations,
    read_requests,
    write_answers,
)
from recbole_gr2.bridge.data import exact_time_dataset
from recbole_gr2.bridge.evaluator import (
    check_invariants,
    evaluate_methods,
    from_lists,
    is_general,
    item_counts,
    recommend,
)
from recbole_gr2.bridge.models import BaseModel
from recbole_gr2.catalog import Catalog
from recbole_gr2.config import ONEREC_THINK, load_settings, recbole_config
from recbole_gr2.console import Console
from recbole_gr2.errors import QualityCheckError
from recbole_gr2.features.extraction import TrainingData, extract_features
from recbole_gr2.inspection import examples
from recbole_gr2.lists import reported_requests
from recbole_gr2.ranking import promote
from recbole_gr2.sid.tokens import sid_text
from recbole_gr2.stages import evaluate
from recbole_gr2.teachers import RulesTeacher
from recbole_gr2.types import Answer, Candidate, Item, Request


@pytest.mark.parametrize("method", load_settings(config_dict={"preset": "smoke"})["eval_rows"])
def test_rankings_are_those_of_the_tables(finished, method):
    answers = read_answers(finished.folders[f"rerank_{method}"], finished.data.catalog)
    _, hits = reported_requests(finished.context())
    assert len(answers) == len(hits)
    assert all(sorted(answers[r.request_id].ranking) == sorted(r.items) for r in hits)
    table = read_per_user(finished.folders["evaluate"]).set_index("user")[method]
    assert {r.user_token: answers[r.request_id].ranking.index(r.target) + 1 for r in hits} == table.to_dict()


def test_features_belong_to_their_requests(finished):
    """Features of a request that was read equal those that are computed again, in another order of the requests."""
    context = finished.context()
    requests = load_requests(context, "test")[:50][::-1]
    assert [len(r.features.candidates) for r in requests] == [len(r.items) for r in requests]
    assert [r.features.pairs.shape[:2] for r in requests] == [(len(r.items), min(len(r.history), 10)) for r in requests]
    training = TrainingData(
        catalog=finished.data.catalog,
        sequences=finished.data.known_items("train"),
        times=finished.data.known_times("train"),
        embeddings=read_embeddings(finished.folders["embeddings"]),
    )
    names, again = extract_features(requests, finished.settings["prior_features"], training)
    assert names == read_feature_names(finished.folders["prior"])
    for request, features in zip(requests, again, strict=True):
        assert np.array_equal(request.features.candidates, features.candidates)
        assert np.array_equal(request.features.pairs, features.pairs)
        assert features.candidates[:, names.index("rank")].tolist() == list(range(1, len(request.items) + 1))
    train = load_requests(context, "train")
    assert all((r.features is not None) == bool(r.prior) == r.has_signal for r in train)


def test_the_result_has_the_share_of_true_statements(finished, tmp_path):
    """Answers of sft, rl and shuffled get texts of the rules teacher, some of them with a wrong statement."""
    context = finished.context("evaluate", tmp_path / "evaluate")
    catalog = load_catalog(context)
    _, hits = reported_requests(context)
    teacher = RulesTeacher(catalog=catalog, settings=finished.settings, seed=0)
    # Of several candidates with the same semantic ID the last one is checked.
    true = [teacher.text(request, request.items[-1]) for request in hits]
    wrong_habit = [re.sub("takes .*?[.] <", "takes Nothing. <", text) for text in true]
    wrong_kind = [re.sub(">: .*?, ", ">: Nothing, ", text) for text in true]
    texts = {
        "sft": true,
        "rl": [*true[:40], *wrong_habit[40:]],
        "shuffled": [*wrong_kind[:40], *wrong_habit[40:]],
    }
    for method, reasoning in texts.items():
        answers = read_answers(finished.folders[f"rerank_{method}"], catalog)
        given = [replace(answers[r.request_id], reasoning=text) for r, text in zip(hits, reasoning, strict=True)]
        (tmp_path / method).mkdir()
        write_answers(tmp_path / method, given, catalog)
    context.folder.mkdir()
    changed = {f"rerank_{method}": tmp_path / method for method in texts}
    truth = evaluate.run(replace(context, folders={**finished.folders, **changed}))["truth"]
    share = 40 / len(hits)
    assert 0.1 < share < 0.9 and truth == {
        "sft": {"habit": 1.0, "kind": 1.0, "why": 1.0, "all": 1.0},
        "rl": pytest.approx({"habit": share, "kind": 1.0, "why": 1.0, "all": share}),
        "shuffled": pytest.approx({"habit": share, "kind": 1 - share, "why": 1.0, "all": 0.0}),
    }


def test_examples_show_where_the_target_went():
    """Up from 3 to 1, up from 2 to 1, unmoved, down from 1 to 2: a list that did not move is left out."""
    catalog = Catalog(
        Item(item_id=n, token=f"t{n}", title=f"Thing {n}", categories=f"Root > Kind{n % 3}", sid=(n, n + 1))
        for n in range(1, 31)
    )
    moves = {"a": (12, (12, 10, 11)), "b": (11, (11, 10, 12)), "c": (10, (10, 12, 11)), "d": (10, (11, 10, 12))}
    candidates = tuple(Candidate(item_id=i, score=-float(r), rank=r) for r, i in enumerate((10, 11, 12), start=1))
    request = Request(
        request_id="",
        user_token="u",
        split="test",
        history=(1, 2, 3),
        candidates=candidates,
        target=1,
        provider="p",
    )
    requests = [replace(request, request_id=name, target=target) for name, (target, _) in moves.items()]
    reasoning = f" Best is {sid_text((12, 13))}, {sid_text((99, 99))}"
    answers = {
        name: Answer(request_id=name, ranking=ranking, reasoning=reasoning) for name, (_, ranking) in moves.items()
    }
    text = examples(requests, "rl", answers, catalog, 2)
    assert [line for line in text.splitlines() if "the target moved" in line] == [
        "a: the target moved from rank 3 to 1. History:",
        "b: the target moved from rank 2 to 1. History:",
        "d: the target moved from rank 1 to 2. History:",
    ]
    first = text.split("b: the target")[0].splitlines()
    assert "- Thing 1 (Kind1)" not in first and "- Thing 2 (Kind2)" in first and "- Thing 3 (Kind0)" in first
    table = [line.split() for line in first if line.endswith("(Kind0)") and "Thing 12" in line]
    assert table == [["3", "1", "target", "Thing", "12", "(Kind0)"]]
    assert f"> Best is [Thing 12], {sid_text((99, 99))}" in first  # an ID of no item stays as it is


# --- metrics of the tables -------------------------------------------------------------------------------------------

CUTOFFS = [1, 5, 10, 20]
EXACT = {
    "cand_num": 5,
    "metrics": METRICS,
    "topk": CUTOFFS,
    "metric_decimal_place": 12,
    "models": ["Pop", "ItemKNN"],
    "eval_rows": ["lambdamart"],
}


@pytest.fixture(scope="module")
def table(tiny_run, finished_copy):
    """A run with lists of five candidates, cut-offs up to 20, and two other recommenders, in exact figures."""
    return tiny_run(finished_copy(), **EXACT)


def entries_of(run) -> dict[tuple[str, str], dict]:
    return {(entry["method"], entry["scope"]): entry for entry in run.records["evaluate"].summary["methods"]}


def one_target(rank: int | None, k: int, items: int) -> dict[str, float]:
    """The metrics of one user with one target at this rank, None for a target that is not proposed."""
    hit = float(rank is not None and rank <= k)
    inverse = hit / (rank or 1)
    gain = hit / np.log2((rank or 1) + 1)
    return {
        **{"recall": hit, "hit": hit, "precision": hit / k, "ndcg": gain, "mrr": inverse, "map": inverse},
        "gauc": (items - (rank or items)) / (items - 1),
    }


def test_differences_to_base_are_those_of_the_table(table):
    """For every method, metric and scope, however deep the lists are."""
    entries, compared = entries_of(table), 0
    for (_, scope), entry in entries.items():
        base = entries["base", scope]["metrics"]
        for metric, comparison in entry["vs_base"].items():
            assert comparison["diff"] == pytest.approx(entry["metrics"][metric] - base[metric], abs=1e-9)
            assert comparison["low"] <= comparison["diff"] <= comparison["high"]
            compared += comparison["diff"] != 0
    assert {method for method, _ in entries} == {"base", "oracle", "prior", "lambdamart", "Pop", "ItemKNN"}
    assert len(entries) == 2 * 4 + 2 and compared > 25


def test_metrics_of_other_recommenders_by_hand(table):
    items = table.data.item_count
    for name in ("candidates", "Pop", "ItemKNN"):
        entry = entries_of(table)["base" if name == "candidates" else name, "all_users"]
        ranks = read_recommendations(table.folders[name]).target_rank.tolist()
        for k in CUTOFFS:
            for metric in ("recall", "hit", "precision", "ndcg", "mrr", "map"):
                expected = np.mean([one_target(rank or None, k, items)[metric] for rank in ranks])
                assert entry["metrics"][f"{metric}@{k}"] == pytest.approx(expected, abs=1e-9), (name, metric, k)
        assert entry["n"] == len(ranks) == 150


def test_the_evaluation_scores_nothing_again(table, monkeypatch):
    """Scores of another device differ in their last digits. The stored lists are the base order."""
    before = table.records["evaluate"].summary

    def refuse(*args, **kwargs):
        raise AssertionError("a model scores users again")

    monkeypatch.setattr(BaseModel, "score_rows", refuse)
    planned = pipeline.plan(table.settings, table.data, from_stage="evaluate")
    done = pipeline.execute(planned, table.settings, table.data, Console())
    assert done[-1][0].summary == before and not done[-1][1]


def test_scores_have_to_be_numbers(table, monkeypatch):
    (rows, _), parts = table.data.rows("test"), []
    scores = np.full((len(rows), table.data.item_count + 1), 1.0)
    scores[3, 7] = np.nan

    class Broken(BaseModel):
        def score_rows(self, rows, histories):
            import torch

            return torch.from_numpy(scores[: len(rows)])

    model = Broken(name="broken", model=None, data=table.data, exclude_seen=False, metadata={})
    with pytest.raises(QualityCheckError, match="not a number"):
        parts += recommend(model, "test", 5, break_ties=False)
    assert not parts


# --- popularity ------------------------------------------------------------------------------------------------------


def test_popularity_of_general_models_is_recboles(table):
    """RecBole counts the training interactions of its own data set of a general model."""
    config = recbole_config(table.settings, "BPR", repeatable=False)
    stock = exact_time_dataset(sequential=False)(config).build()[0].item_counter
    assert item_counts(table.data, general=True) == stock
    assert item_counts(table.data, general=False) == table.data.built[0].item_counter != stock
    recommendations = read_recommendations(table.folders["Pop"])
    entry = entries_of(table)["Pop", "all_users"]["metrics"]
    for k in CUTOFFS:
        counted = [[stock[item] for item in row] for row in recommendations.items[:, :k].tolist()]
        assert entry[f"averagepopularity@{k}"] == pytest.approx(np.mean(counted), abs=1e-9)
    tail = sorted(stock, key=lambda item: (stock[item], item))[: max(int(0.1 * len(stock)), 1)]
    share = np.isin(recommendations.items[:, :20], tail).mean()
    assert entry["tailpercentage@20"] == pytest.approx(share, abs=1e-9)


def test_which_models_are_general():
    assert is_general("BPR") and is_general("Pop") and is_general("ItemKNN")
    assert not any(map(is_general, ("SASRec", "CausalSASRec", "TIGER", "GR2Generator", *ONEREC_THINK)))


# --- short lists -----------------------------------------------------------------------------------------------------


@st.composite
def short_lists(draw):
    """The length of each user's list, whether it contains the target, and a seed for the order of the items."""
    users = draw(st.integers(2, 12))
    lengths = draw(st.lists(st.integers(0, 9), min_size=users, max_size=users))
    return lengths, draw(st.lists(st.booleans(), min_size=users, max_size=users)), draw(st.integers(0, 2**32 - 1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(short_lists())
def test_metrics_of_short_lists_are_those_of_a_brute_force(table, drawn):
    """Whatever the lengths of the lists are: an item outside of a list is never a hit."""
    lengths, contained, seed = drawn
    data, rng = table.data, np.random.default_rng(seed)
    users = data.rows("test")[1][: len(lengths)].tolist()
    targets = [next(iter(data.targets(user, "test"))) for user in users]
    lists = []
    for target, length, has_target in zip(targets, lengths, contained, strict=True):
        others = [item for item in rng.permutation(np.arange(1, data.item_count + 1)).tolist() if item != target]
        chosen = others[: max(length - has_target, 0)] + [target] * (has_target and length > 0)
        lists.append(tuple(rng.permutation(chosen).tolist()))
    tokens = [data.user_tokens[user] for user in users]
    recommendations = from_lists(
        data,
        [
            SimpleNamespace(
                items=items, user_token=token, target_rank=items.index(target) + 1 if target in items else None
            )
            for items, token, target in zip(lists, tokens, targets, strict=True)
        ],
    )
    shuffled = [tuple(rng.permutation(items).tolist()) for items in lists]
    first = [promote(items, target) if target in items else items for items, target in zip(lists, targets, strict=True)]
    given_rankings = {"base": lists, "shuffled": shuffled, "oracle": first}
    rankings = {name: dict(zip(tokens, each, strict=True)) for name, each in given_rankings.items()}
    metrics = evaluate_methods(data, recommendations, {**rankings, "base": None}, {"all_users": set(tokens)})
    share = np.mean([target in items for items, target in zip(lists, targets, strict=True)])
    check_invariants(metrics, 10, {"all_users": share}, decimals=12)
    check_invariants(metrics, 9, {"all_users": share}, decimals=12)  # no list is longer, and topk has no 9
    shortest = min(map(len, lists))
    for name, each in given_rankings.items():
        found = metrics[name]["all_users"]
        ranks = [items.index(t) + 1 if t in items else None for items, t in zip(each, targets, strict=True)]
        for k in CUTOFFS:
            expected = [one_target(rank, k, data.item_count) for rank in ranks]
            for metric in ("recall", "hit", "precision", "ndcg", "mrr", "map"):
                mean = np.mean([one[metric] for one in expected])
                assert found[f"{metric}@{k}"] == pytest.approx(mean, abs=1e-9), (name, metric, k)
            assert found["gauc"] == pytest.approx(np.mean([one["gauc"] for one in expected]), abs=1e-6)
            assert (f"itemcoverage@{k}" in found) == (f"averagepopularity@{k}" in found) == (k <= shortest)
            if k <= shortest:
                covered = {item for items in each for item in items[:k]}
                assert found[f"itemcoverage@{k}"] == pytest.approx(len(covered) / data.item_count, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "small"),
    [
        ("GR2Generator", {}),
        ("TIGER", {"base_n_layers": 1, "base_n_heads": 2, "base_head_size": 16, "base_inner_size": 64}),
    ],
)
def test_a_search_with_few_beams_gives_short_lists(table, tiny_run, model, small):
    """Three semantic IDs, with cand_num 5 and cut-offs up to 20."""
    options = {**EXACT, "base_model": model, "models": ["Pop"], "cand_beams": 3, **small}
    run = tiny_run(table.settings["checkpoint_dir"], **options)
    entries = entries_of(run)
    requests = read_requests(run.folders["candidates"] / "test.jsonl", run.data.catalog)
    ranks = read_recommendations(run.folders["candidates"]).target_rank
    listed = float(np.mean((ranks > 0) & (ranks <= 5)))  # also of users with one item, which is no list to re-rank
    assert min(len(request.items) for request in requests) < 5 and listed > 0
    base, oracle = entries["base", "all_users"]["metrics"], entries["oracle", "all_users"]["metrics"]
    for k in (5, 10, 20):
        assert base[f"recall@{k}"] == oracle[f"ndcg@{k}"] == pytest.approx(listed, abs=1e-9)
    assert "itemcoverage@20" not in base and "itemcoverage@20" in entries["Pop", "all_users"]["metrics"]
    for (_, scope), entry in entries.items():
        for metric, comparison in entry["vs_base"].items():
            expected = entry["metrics"][metric] - entries["base", scope]["metrics"][metric]
            assert comparison["diff"] == pytest.approx(expected, abs=1e-9)


# --- other recommenders on a part of the users ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kept", [150, 70])
def test_recommenders_beside_imported_lists(table, tiny_run, tmp_path, kept):
    """They are reported on the users of the lists. Lists that cover all users give the figures of all users."""
    lists = [
        json.loads(line)
        for split in ("train", "valid", "test")
        for line in (table.folders["candidates"] / f"{split}.jsonl").read_text().splitlines()
    ]
    tokens = [line["user_id"] for line in lists if line["split"] == "test"][-kept:]
    file = tmp_path / "lists.jsonl"
    file.write_text(
        "".join(json.dumps(line) + "\n" for line in lists if line["split"] != "test" or line["user_id"] in tokens)
    )
    options = {**EXACT, "models": ["Pop"], "cand_file": str(file)}
    run = tiny_run(table.settings["checkpoint_dir"], data=table.data, **options)
    entries, before = entries_of(run), entries_of(table)
    assert entries["Pop", "all_users"]["n"] == entries["base", "all_users"]["n"] == kept
    if kept == 150:
        assert entries["Pop", "all_users"]["metrics"] == before["Pop", "all_users"]["metrics"]
    recommendations = read_recommendations(table.folders["Pop"])
    ranks = dict(zip(recommendations.users, recommendations.target_rank.tolist(), strict=True))
    for k in CUTOFFS:
        expected = np.mean([one_target(ranks[token] or None, k, 60)["ndcg"] for token in tokens])
        assert entries["Pop", "all_users"]["metrics"][f"ndcg@{k}"] == pytest.approx(expected, abs=1e-9)
    for (_, scope), entry in entries.items():
        for metric, comparison in entry["vs_base"].items():
            expected = entry["metrics"][metric] - entries["base", scope]["metrics"][metric]
            assert comparison["diff"] == pytest.approx(expected, abs=1e-9)


def test_recommenders_beside_a_sample_of_the_lists(table, tiny_run):
    run = tiny_run(table.settings["checkpoint_dir"], data=table.data, **{**EXACT, "eval_max_lists": 40})
    requests, _ = reported_requests(run.context())
    recommendations = read_recommendations(run.folders["ItemKNN"])
    ranks = dict(zip(recommendations.users, recommendations.target_rank.tolist(), strict=True))
    entry = entries_of(run)["ItemKNN", "all_users"]
    expected = np.mean([one_target(ranks[request.user_token] or None, 10, 60)["recall"] for request in requests])
    assert entry["n"] == len(requests) == 40 and entry["metrics"]["recall@10"] == pytest.approx(expected, abs=1e-9)
