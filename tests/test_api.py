"""The Python interface: re-ranking of other lists, the run as tables, and GR2 as a model class of RecBole."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_gr2 import GR2, CandidateList, Run
from recbole_gr2.artifacts import read_answers, read_requests
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError

pytestmark = pytest.mark.slow  # Together they need a finished run and many seconds.

METHODS = ("base", "prior", "midtrain", "sft", "rl", "shuffled")


@pytest.fixture(scope="module")
def finished_run(finished_command) -> Run:
    return Run(finished_command.path)


@pytest.fixture(scope="module")
def pooled(tiny_run, tiny_settings, tmp_path_factory) -> Run:
    """Several base models, a pool that LambdaMART selects from, windows, and a temporal split."""
    from recbole_gr2.quick_start import run

    root = tmp_path_factory.mktemp("pooled")
    values = {key: entry["value"] for key, entry in tiny_settings(root).chosen().items()}
    values |= {"preset": "smoke", "dataset": "tiny", "checkpoint_dir": str(root), "seed": 7, "eval_scope": "all_users"}
    values |= {"data_path": tiny_settings(root)["data_path"], "base_model": ["CausalSASRec", "PairCounts"]}
    values |= {"base_options": {"CausalSASRec": {"epochs": 2}}, "cand_pool": 12, "cand_ranker": "lambdamart"}
    values |= {"eval_rows": ["lambdamart", "midtrain"], "eval_windows": 3, "train_requests": 2}
    path = run(config_dict=values)
    assert path is not None
    return Run(path)


def lists_of(gr2: GR2, *, complete: bool) -> dict[str, CandidateList]:
    """The test lists of a run by request id: with scores, ranks and names as in the run, or without."""
    lists = {}
    with open(gr2.opened.folders["candidates"] / "test.jsonl", encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            more = {"scores": line["scores"], "sources": line.get("sources"), "user": line["user_id"]}
            lists[line["request_id"]] = CandidateList(
                history=line["history"],
                candidates=line["candidates"],
                times=line["times"],
                **(more if complete else {}),
            )
    return lists


def stored_of(gr2: GR2) -> dict[str, tuple[str, ...]]:
    """The rankings of rankings.jsonl as item tokens, by request id; of the prior those of its log-probabilities."""
    catalog = gr2.opened.data.catalog
    folder = gr2.opened.folders.get(f"rerank_{gr2.method}")
    if folder is None:
        requests = read_requests(gr2.opened.folders["prior"] / "test.jsonl", catalog)
        order = {r.request_id: r.by_prior if gr2.method == "prior" else r.items for r in requests}
        return {name: catalog.tokens(items) for name, items in order.items()}
    return {name: catalog.tokens(answer.ranking) for name, answer in read_answers(folder, catalog).items()}


# --- the same answers as in the run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_each_user_gets_the_answer_of_the_run(finished_run, method):
    gr2 = finished_run.reranker(method)
    lists, stored = lists_of(gr2, complete=True), stored_of(gr2)
    found = dict(zip(lists, gr2.rerank_batch(lists.values()), strict=True))
    assert len(stored) > 20
    assert {name: found[name].ranking[: len(ranking)] for name, ranking in stored.items()} == stored


@pytest.mark.slow
def test_each_user_of_ml_100k_gets_the_answer_of_the_run(tiny_settings, tmp_path):
    from recbole_gr2.quick_start import run

    values = {key: entry["value"] for key, entry in tiny_settings(tmp_path).chosen().items()}
    values |= {"preset": "smoke", "dataset": "ml-100k", "checkpoint_dir": str(tmp_path), "eval_scope": "all_users"}
    values |= {"base_model": ["PairCounts"], "eval_rows": ["lambdamart", "sft"], "sid_codes": 16, "sft_min_ok": 0.0}
    values |= {"sid_method": "rqkmeans", "prompt_max_reasoning": 8, "rl_overlong_buffer": 0}
    values |= {"text_title": "movie_title", "text_categories": "class", "text_brand": None, "train_requests": 1}
    path = run(config_dict=values)
    assert path is not None
    for method in ("prior", "lambdamart", "sft"):
        gr2 = Run(path).reranker(method)
        lists, stored = lists_of(gr2, complete=True), stored_of(gr2)
        assert len(lists) == len(stored) == 943
        found = dict(zip(lists, gr2.rerank_batch(lists.values()), strict=True))
        assert {name: found[name].ranking for name in stored} == stored, method


@pytest.mark.parametrize("method", ["base", "prior", "lambdamart", "midtrain"])
def test_a_pool_is_ranked_as_in_the_run(pooled, method):
    gr2 = pooled.reranker(method)
    lists, stored = lists_of(gr2, complete=True), stored_of(gr2)
    found = dict(zip(lists, gr2.rerank_batch(lists.values()), strict=True))
    assert {len(ranking) for ranking in stored.values()} == {12}
    assert {name: found[name].ranking for name in stored} == stored


@pytest.mark.slow
def test_lists_without_scores_are_scored_by_the_base_models(pooled):
    """The candidates of each test list in another order, and without user, get the same answer."""
    gr2 = pooled.reranker("lambdamart")
    stored = stored_of(gr2)
    lists = {
        name: replace(each, candidates=sorted(each.candidates)) for name, each in lists_of(gr2, complete=False).items()
    }
    found = dict(zip(lists, gr2.rerank_batch(lists.values()), strict=True))
    assert {name: each.ranking for name, each in found.items()} == stored


def test_a_new_user_with_the_history_of_a_user_gets_the_same_answer(finished_run):
    """No identity of a user reaches a method, and no other list of the batch changes an answer."""
    gr2 = finished_run.reranker("rl")
    lists, stored = lists_of(gr2, complete=True), stored_of(gr2)
    for name in list(stored)[:4]:
        each = lists[name]
        alone = gr2.rerank(each.history, each.candidates, scores=each.scores, times=each.times)
        assert alone.ranking[: len(stored[name])] == stored[name]


def test_a_language_model_gives_probabilities_reasoning_and_titles(finished_run):
    gr2 = finished_run.reranker("rl")
    each = next(iter(lists_of(gr2, complete=True).values()))
    found = gr2.rerank(each.history, each.candidates, scores=each.scores)
    assert all(0 <= chance <= 1 for chance in found.probabilities)
    assert math.isclose(sum(found.probabilities), 1, rel_tol=1e-5)
    assert found.probabilities[0] == max(found.probabilities)  # The answer is greedy.
    items = gr2.opened.data.catalog
    assert found.titles == tuple(items.item(items.id_of[token]).title for token in found.ranking)
    assert "<|sid_begin|>" not in found.reasoning and found.unknown == ()


def test_the_probabilities_of_the_prior_are_those_of_its_lists(finished_run):
    gr2 = finished_run.reranker("prior")
    name, each = next(iter(lists_of(gr2, complete=True).items()))
    requests = read_requests(gr2.opened.folders["prior"] / "test.jsonl", gr2.opened.data.catalog)
    (expected,) = (sorted(map(math.exp, r.prior), reverse=True) for r in requests if r.request_id == name)
    found = gr2.rerank(each.history, each.candidates, scores=each.scores, times=each.times)
    assert found.probabilities == pytest.approx(expected, rel=1e-5)


# --- lists that are no lists of the run -------------------------------------------------------------------------------


def test_unknown_items_are_reported_and_keep_their_places(finished_run):
    gr2 = finished_run.reranker("prior")
    known = gr2.rerank(["i00", "i01"], ["i02", "i11", "i03", "i20"])
    found = gr2.rerank(["i00", "gone", "i01"], ["i02", "new1", "i11", "i03", "new2", "i20"])
    assert found.ranking[1] == "new1" and found.ranking[4] == "new2"
    assert tuple(token for token in found.ranking if not token.startswith("new")) == known.ranking
    assert found.unknown == ("gone", "new1", "new2")
    assert found.titles[1] == "" and found.probabilities[1] is None and found.titles[0]


@pytest.mark.parametrize(
    ("history", "candidates"),
    [([], ["i02", "i11"]), (["gone"], ["i11", "i02"]), (["i00"], ["new1", "new2"]), (["i00"], ["i02"]), (["i00"], [])],
)
def test_a_list_without_a_known_history_or_candidates_stays_as_it_was(finished_run, history, candidates):
    found = finished_run.reranker("rl").rerank(history, candidates)
    assert (found.status, list(found.ranking), found.reasoning) == ("unranked", candidates, "")


@pytest.mark.parametrize("method", ["prior", "rl"])
def test_items_without_interactions_are_ranked_by_their_text(finished_run, method):
    gr2 = GR2.load(finished_run.path, method)
    texts = {"title": "Lamp number 3", "categories": "Things > Lamps", "brand": "Bolt"}
    found = gr2.rerank(["i00", "i01", "i02"], ["i50", "new", "i40"], items={"new": texts})
    assert sorted(found.ranking) == ["i40", "i50", "new"] and found.unknown == ()
    assert found.titles[found.ranking.index("new")] == "Lamp number 3"
    # It stays known, also in a history, and changes no other list.
    assert gr2.rerank(["i00", "new"], ["i50", "i40"]).unknown == ()
    stored, lists = stored_of(gr2), lists_of(gr2, complete=True)
    name = next(iter(stored))
    assert gr2.rerank_batch([lists[name]])[0].ranking[: len(stored[name])] == stored[name]


def test_new_items_get_semantic_ids_of_their_own(finished_run):
    gr2 = GR2.load(finished_run.path, "prior")
    texts = {f"new{number}": {"title": f"Kettle number {number}"} for number in range(5)}
    gr2.rerank(["i00"], ["i50", *texts], items=texts)
    catalog = gr2.ranker.catalog
    assert len(catalog) == gr2.opened.data.item_count + 5
    sids = [item.sid for item in catalog]
    assert len(set(sids[-5:])) == 5 and not set(sids[-5:]) & set(sids[:-5])


def test_items_of_the_item_file_need_no_text(tiny_data, finished_run, tmp_path):
    shutil.copytree(tiny_data / "tiny", tmp_path / "tiny")
    with open(tmp_path / "tiny" / "tiny.item", "a", encoding="utf-8") as file:
        file.write("cold\tLamp number 11\tThings > Lamps\tAcme\nblank\t\t\t\n")
    gr2 = GR2.load(finished_run.path, "prior", data_path=tmp_path)
    assert gr2.rerank(["i00"], ["i50", "cold", "i40"]).unknown == ()
    assert gr2.rerank(["i00"], ["i50", "blank", "i40"]).unknown == ("blank",)  # It has no text.


tokens = st.sampled_from([f"i{kind}{item}" for kind in range(6) for item in range(10)] + ["x", "", "i", "[PAD]"])


@given(
    history=st.lists(tokens, max_size=60),
    candidates=st.lists(tokens, max_size=8, unique=True),
    scores=st.none() | st.lists(st.floats(-1e30, 1e30), min_size=8, max_size=8),
    times=st.booleans(),
)
def test_any_list_gives_a_permutation(finished_run, history, candidates, scores, times):
    """Repeated and seen items included. Items that the run does not know keep their places."""
    gr2 = finished_run.reranker("prior")
    found = gr2.rerank(
        history,
        candidates,
        scores=scores and scores[: len(candidates)],
        times=[float(n) for n in range(len(history))] if times else None,
    )
    assert sorted(found.ranking) == sorted(candidates) and len(found.titles) == len(candidates)
    known = gr2.opened.data.catalog.id_of
    assert {place: token for place, token in enumerate(candidates) if token not in known} == {
        place: token for place, token in enumerate(found.ranking) if token not in known
    }
    chances = [chance for chance in found.probabilities if chance is not None]
    assert not chances or math.isclose(sum(chances), 1, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": ["i02", "i02"]}, "a candidate occurs twice"),
        ({"scores": [1.0]}, "1 scores for 2 candidates"),
        ({"scores": [1.0, float("nan")]}, "a score or a time is not a finite number"),
        ({"times": [1.0, 2.0]}, "2 times for 1 items"),
        ({"items": {"new": {}}}, "the item 'new' has the texts"),
        ({"items": {"new": {"name": "Lamp"}}}, "the item 'new' has the texts"),
    ],
)
def test_a_wrong_list_is_one_error(finished_run, change, message):
    with pytest.raises(ConfigurationError, match=message):
        finished_run.reranker("prior").rerank(**{"history": ["i00"], "candidates": ["i02", "i11"], **change})


def test_errors_of_load(finished_run, tmp_path, tiny_data):
    with pytest.raises(MissingFileError, match="there is no run"):
        GR2.load(tmp_path)
    with pytest.raises(ConfigurationError, match="did you mean prior"):
        GR2.load(finished_run.path, "priro")
    with pytest.raises(ConfigurationError, match="no method 'oracle'"):
        GR2.load(finished_run.path, "oracle")
    other = tmp_path / "tiny"
    shutil.copytree(tiny_data / "tiny", other)
    lines = (other / "tiny.inter").read_text(encoding="utf-8").splitlines(keepends=True)
    (other / "tiny.inter").write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(GR2Error, match="the data set tiny has changed since the run"):
        GR2.load(finished_run.path, "prior", data_path=tmp_path)


def test_a_results_folder_can_be_moved(finished_command, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(finished_command.root, moved)
    run = Run(moved / finished_command.path.relative_to(finished_command.root))
    gr2 = run.reranker("rl")
    assert all(moved in folder.parents for folder in gr2.opened.folders.values())
    shutil.rmtree(gr2.opened.folders["rl"])
    copy = tmp_path / "again"
    shutil.copytree(moved, copy)
    with pytest.raises(MissingFileError, match="has no finished rl any more"):
        Run(copy / run.path.relative_to(moved)).reranker("rl")


@pytest.mark.slow
def test_a_user_who_is_in_no_training_data_gets_the_answer_of_a_run_with_this_user(
    tiny_data, tiny_settings, tmp_path_factory
):
    """Under a temporal split, a user whose first interaction is one of the validation period changes no model.

    One run has this user among its test users, and the other one has never seen the user.
    """
    from recbole_gr2 import run

    header, *lines = (tiny_data / "tiny" / "tiny.inter").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    for row in rows:  # From user by user to step by step.
        user, step = divmod(int(row[3]), 1000)
        row[3] = str(1000 * step + user)
    rows = [row for row in rows if int(row[3]) < 9000]
    own = [["new", "i00", "3", "6500"], ["new", "i01", "3", "7500"], ["new", "i02", "3", "7600"]]
    runs = []
    # A user with a single interaction has no request. The period of validation has as many interactions in both runs.
    for name, more in (("with", own), ("without", [["other", *own[0][1:]]])):
        root = tmp_path_factory.mktemp(name)
        (root / "tiny").mkdir()
        text = "\n".join([header, *("\t".join(row) for row in [*rows, *more])])
        (root / "tiny" / "tiny.inter").write_text(f"{text}\n", encoding="utf-8")
        shutil.copy(tiny_data / "tiny" / "tiny.item", root / "tiny")
        values = {key: entry["value"] for key, entry in tiny_settings(root).chosen().items()}
        values |= {"preset": "smoke", "dataset": "tiny", "data_path": str(root), "checkpoint_dir": str(root)}
        values |= {"eval_args": {"split": {"date": [6000, 7000]}, "order": "TO"}, "eval_scope": "all_users"}
        values |= {"base_model": ["CausalSASRec", "PairCounts"], "base_options": {"CausalSASRec": {"epochs": 2}}}
        runs.append(run(values, cand_pool=8, eval_rows=["lambdamart", "midtrain"]))
    for method in ("prior", "lambdamart", "midtrain"):
        known, other = (each.reranker(method) for each in runs)
        each = lists_of(known, complete=False)["test/new"]
        assert list(each.history) == ["i00"] and "new" not in other.opened.data.user_tokens
        found, expected = other.rerank(each.history, each.candidates, times=each.times), stored_of(known)["test/new"]
        assert found.ranking[: len(expected)] == expected and len(expected) > 4


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_of_lists_gives_a_file_of_rankings(finished_run, tmp_path):
    from recbole_gr2 import rerank_file
    from recbole_gr2.rerankers.external import read_rankings

    gr2 = finished_run.reranker("rl")
    lists, stored = tmp_path / "lists.jsonl", stored_of(gr2)
    shutil.copy(gr2.opened.folders["candidates"] / "test.jsonl", lists)
    count = rerank_file(finished_run.path, lists, tmp_path / "out.jsonl", method="rl")
    rankings = read_rankings(tmp_path / "out.jsonl")
    assert count == len(rankings)
    assert {name: tuple(rankings[name][: len(ranking)]) for name, ranking in stored.items()} == stored
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0]["titles"] and lines[0]["status"] in ("ok", "repaired", "truncated", "unreadable")


@pytest.mark.parametrize(
    "line",
    [
        '{"history": ["i00"]}',
        '{"history": "i00", "candidates": ["i01", "i02"]}',
        '{"history": ["i00"], "candidates": ["i01", null]}',
        '{"history": ["i00"], "candidates": ["i01", "i02"], "scores": [1, "x"]}',
        '{"history": ["i00"], "candidates": ["i01", "i02"], "sources": {"A": 1}}',
        '{"history": ["i00"], "candidates": ["i01", "i02"], "items": ["i03"]}',
        "[1]",
    ],
)
def test_a_wrong_line_is_named(finished_run, tmp_path, line):
    from recbole_gr2 import rerank_file

    lists = tmp_path / "lists.jsonl"
    lists.write_text('{"history": ["i00"], "candidates": ["i01", "i02"]}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"lists\.jsonl:2"):
        rerank_file(finished_run.path, lists, tmp_path / "out.jsonl", method="prior")
    assert not (tmp_path / "out.jsonl").exists()


# --- the run as tables ------------------------------------------------------------------------------------------------


def test_the_tables_of_a_run_are_those_of_its_result(finished_run, finished_command):
    result = finished_command.result
    for entry in result["methods"]:
        row = finished_run.methods.loc[(entry["scope"], entry["method"])]
        assert row["users"] == entry["n"][0]
        assert {metric: row[metric] for metric in entry["metrics"]} == {
            metric: values["mean"] for metric, values in entry["metrics"].items()
        }
    frame = finished_run.comparisons
    one = frame.query("scope == 'hit_users' and method == 'prior' and versus == 'base' and metric == 'ndcg@5'")
    (expected,) = (
        e["vs_base"]["ndcg@5"] for e in result["methods"] if (e["scope"], e["method"]) == ("hit_users", "prior")
    )
    assert one[["diff", "low", "high", "p", "p_holm"]].iloc[0].to_dict() == expected
    assert set(finished_run.stages.index) == set(finished_command.stages)
    assert (finished_run.per_user["oracle"] == 1).all()
    assert len(finished_run.per_user) == result["methods"][-1]["n"][0]


def test_a_run_compared_with_itself(finished_run):
    """The sign of a difference, and its size, are those of two different runs in test_commands.py."""
    frame = finished_run.compare(finished_run.path / "result.json", methods=["prior", "rl"])
    assert set(frame.index.get_level_values("method")) == {"prior", "rl"}
    assert (frame["this"] == frame["other"]).all() and (frame["diff"].dropna() == 0).all()


# --- RecBole ----------------------------------------------------------------------------------------------------------


def test_recbole_evaluates_the_run(finished_run, tmp_path, monkeypatch):
    """RecBole's own functions on a checkpoint give the metrics of the run, and full rankings without ties."""
    monkeypatch.chdir(tmp_path)  # RecBole writes its log there.
    import torch
    from recbole.quick_start.quick_start import load_data_and_model
    from recbole.trainer import Trainer
    from recbole.utils import get_model
    from recbole.utils.case_study import full_sort_scores, full_sort_topk

    assert get_model("GR2") is GR2
    for method in ("prior", "rl"):
        finished_run.reranker(method).save(tmp_path / "gr2.pth")
        config, model, dataset, _, _, test = load_data_and_model(str(tmp_path / "gr2.pth"))
        assert isinstance(model, GR2) and model.method == method
        metrics = Trainer(config, model).evaluate(test, load_best_model=False, show_progress=False)
        expected = finished_run.methods.loc[("all_users", method)].drop("users").to_dict()
        assert {name: metrics[name] for name in expected} == expected
    users = dataset.token2id(dataset.uid_field, ["u3", "u7"])
    scores = full_sort_scores(users, model, test)
    for row in scores:
        finite = row[row > -torch.inf].tolist()
        assert sorted(finite, reverse=True) == [-float(rank) for rank in range(1, len(finite) + 1)]
    _, items = full_sort_topk(users, model, test, k=5)
    stored = stored_of(model)
    for user, row in zip(("u3", "u7"), items, strict=True):
        ranking = stored.get(f"test/{user}")
        assert ranking is None or tuple(dataset.id2token(dataset.iid_field, row.cpu())) == ranking[:5]


def test_recbole_ranks_rows_that_are_not_of_the_run(finished_run):
    """Validation rows have no stored answer; they are ranked when RecBole asks for their scores."""
    import torch

    gr2 = finished_run.reranker("prior")
    rows, users = gr2.opened.data.rows("valid")
    requests = {
        r.request_id: r for r in read_requests(gr2.opened.folders["prior"] / "valid.jsonl", gr2.opened.data.catalog)
    }
    scores = gr2.full_sort_predict(rows)
    for user, row in zip(users.tolist(), scores, strict=True):
        request = requests[f"valid/{gr2.opened.data.user_tokens[user]}"]
        assert tuple(torch.topk(row, len(request.items)).indices.tolist()) == request.by_prior


@pytest.mark.slow
def test_recbole_searches_on_the_validation_split(finished_copy, tiny_settings):
    """The objective reads no test target, and its score is the validation figure of the method."""
    from recbole_gr2.api import objective_function

    values = {key: entry["value"] for key, entry in tiny_settings(finished_copy()).chosen().items()}
    values |= {
        "preset": "smoke",
        "dataset": "tiny",
        "eval_rows": ["lambdamart"],
        "gr2_method": "prior",
        "topk": [5, 10],
    }
    values["data_path"] = tiny_settings("x")["data_path"]
    found = objective_function(values)
    assert found["model"] == "GR2" and found["valid_score_bigger"] and found["test_result"] == {}
    assert found["best_valid_score"] == found["best_valid_result"]["ndcg@10"] > 0


def test_a_run_of_imported_lists_has_no_base_models(finished_run):
    gr2 = GR2.load(finished_run.path, "prior")
    gr2.ranker.settings = {**gr2.ranker.settings, "cand_file": "lists.jsonl"}
    with pytest.raises(ConfigurationError, match="imported its candidate lists"):
        _ = gr2.ranker.base_model


def test_recbole_cannot_train_it(finished_run):
    with pytest.raises(ConfigurationError, match="RecBole's trainer cannot train GR2"):
        finished_run.reranker("prior").calculate_loss(None)


def test_the_package_has_the_names():
    import recbole_gr2

    assert Path(recbole_gr2.__file__).name == "__init__.py"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = recbole_gr2.nothing
