"""The user's own re-rankers: classes, functions and files, through the setting `eval_rows`."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import recbole_gr2
from recbole_gr2 import pipeline
from recbole_gr2.artifacts import read_answers, read_requests
from recbole_gr2.comparisons import declared_pairs
from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.quick_start import main
from recbole_gr2.rerankers.base import Reranker, as_answers, stage_name
from recbole_gr2.rerankers.external import read_rankings
from recbole_gr2.rerankers.registry import chosen, find_reranker
from recbole_gr2.testing import synthetic_requests

ROOT = Path(recbole_gr2.__file__).parent.parent
MODULE = '''
from recbole_gr2.rerankers.base import Reranker

SEEN = {}


def rank(request, catalog):
    """Longest titles first."""
    assert request.target == 0 and request.grades == ()
    return sorted(request.items, key=lambda item: -len(catalog.item(item).title))


class ByPrior(Reranker):
    name = "by_prior"
    trained = True
    compare_with = ("lambdamart",)

    def fit(self, train, valid):
        assert train and valid and all(request.has_signal for request in [*train, *valid])
        self.summary = {"fitted_to": len(train)}

    def rank(self, requests):
        SEEN["labels"] = {(request.target, request.grades) for request in requests}
        return [request.by_prior for request in requests]


class Broken(Reranker):
    name = "broken"

    def rank(self, requests):
        return [request.items[1:] for request in requests]


class Needy(Reranker):
    name = "needy"
    needs = ("no_such_stage",)

    def rank(self, requests):
        return [request.items for request in requests]


class Sft(Broken):
    name = "sft"


class Raises(Reranker):
    def rank(self, requests):
        return [request.no_such_attribute for request in requests]


class FitRaises(Broken):
    name = "fit_raises"

    def fit(self, train, valid):
        raise ValueError("no data")


class NoList(Reranker):
    name = "no_list"

    def rank(self, requests):
        return None


class WithoutContext(Broken):
    name = "without_context"

    def __init__(self, context):
        self.weight = 1.0


class WithoutRank(Reranker):
    name = "without_rank"


class WrongRank(Reranker):
    name = "wrong_rank"

    def rank(self, request, catalog):
        return request.items


class Base(Broken):
    name = "base"


class Rl(Broken):
    name = "rl"


class Compared(Broken):
    name = "compared"
    compare_with = ("lamdbamart",)


class ComparedWithText(Broken):
    name = "compared_with_text"
    compare_with = "lambdamart"


def returns_none(request, catalog):
    return None


def fails(request, catalog):
    return {}["x"]


def tokens(request, catalog):
    return catalog.tokens(request.items)


def alone(request):
    return request.items


def counted(data):
    name = f"{sum(len(sequence) for sequence in data.sequences)} interactions"
    return lambda request: {name: [0.0 for _ in request.items]}


number = 3
'''


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """The file of the module `mine`, on the path."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    yield tmp_path / "mine.py"
    sys.modules.pop("mine", None)


@pytest.fixture(scope="module")
def finished(tiny_run, finished_copy):
    """A run on the data set `tiny` without language model."""
    return tiny_run(finished_copy(), eval_rows=["lambdamart"])


def again(finished, tiny_run, **changes):
    return tiny_run(finished.settings["checkpoint_dir"], data=finished.data, **changes)


def planned(finished, tiny_settings, rows, **changes) -> dict[str, str]:
    settings = tiny_settings(finished.settings["checkpoint_dir"], eval_rows=rows, **changes)
    return {entry.stage.name: entry.action for entry in pipeline.plan(settings, finished.data)}


def lists(finished):
    return read_requests(finished.folders["prior"] / "test.jsonl", finished.data.catalog)


def test_a_class_and_a_function(finished, tiny_run, mine):
    run = again(finished, tiny_run, eval_rows=["lambdamart", "mine:rank", "mine:ByPrior"])
    catalog = run.data.catalog
    answers = read_answers(run.folders["rerank_mine.rank"], catalog)
    requests = {request.request_id: request for request in lists(finished)}
    for answer in answers.values():
        lengths = [len(catalog.item(item).title) for item in answer.ranking]
        assert lengths == sorted(lengths, reverse=True) and answer.status == "ok"
    by_prior = read_answers(run.folders["rerank_by_prior"], catalog)
    assert all(answer.ranking == requests[name].by_prior for name, answer in by_prior.items())
    assert run.records["rerank_by_prior"].summary["fitted_to"] > 50
    assert sys.modules["mine"].SEEN["labels"] == {(0, ())}
    summary = run.records["evaluate"].summary
    methods = {(entry["method"], entry["scope"]): entry for entry in summary["methods"]}
    for scope in ("all_users", "hit_users"):
        assert methods["by_prior", scope]["metrics"] == methods["prior", scope]["metrics"]
        assert "p_holm" in methods["mine:rank", scope]["vs_base"]["ndcg@5"]
    pairs = {(pair["method"], pair["versus"]) for pair in summary["comparisons"]}
    assert pairs == {
        ("prior", "lambdamart"),
        ("mine:rank", "prior"),  # a function is compared with every other method
        ("mine:rank", "lambdamart"),
        ("mine:rank", "by_prior"),
        ("by_prior", "lambdamart"),
    }
    for pair in summary["comparisons"]:
        for metric in pair["metrics"].values():
            assert {"diff", "low", "high", "p", "p_holm"} == set(metric)
    every = again(finished, tiny_run, eval_rows=["lambdamart", "mine:ByPrior"], eval_comparisons="all")
    assert len(every.records["evaluate"].summary["comparisons"]) == 3


def test_a_change_of_the_source_runs_only_this_method_again(finished, tiny_run, tiny_settings, mine):
    rows = ["lambdamart", "mine:rank", "mine:ByPrior"]
    again(finished, tiny_run, eval_rows=rows)
    assert set(planned(finished, tiny_settings, rows).values()) == {"cached"}
    mine.write_text(MODULE + "\n# changed\n")
    changed = {name for name, action in planned(finished, tiny_settings, rows).items() if action == "run"}
    assert changed == {"rerank_mine.rank", "rerank_by_prior", "evaluate"}  # both are in this module


@pytest.mark.parametrize("form", ["user_id", "request_id", "trec"])
def test_a_file_with_rankings(finished, tiny_run, tiny_settings, tmp_path, form):
    requests, catalog = lists(finished), finished.data.catalog
    file = tmp_path / f"{form}.jsonl"
    reversed_orders = {r.user_token: [*catalog.tokens(r.items[::-1]), "stranger"] for r in requests[1:]}
    if form == "trec":
        text = [
            f"{user} Q0 {token} {n} {-n} mine"
            for user, order in reversed_orders.items()
            for n, token in enumerate(order)
        ]
        text.reverse()  # the order of the lines does not matter
    else:
        prefix = "" if form == "user_id" else "test/"
        text = [json.dumps({form: prefix + user, "ranking": order}) for user, order in reversed_orders.items()]
    file.write_text("\n".join(text) + "\n")
    rows = ["lambdamart", f"file:{file}"]
    run = again(finished, tiny_run, eval_rows=rows, eval_scope="all_users")
    answers = read_answers(run.folders[stage_name(form)], catalog)
    assert answers[requests[0].request_id].ranking == requests[0].items
    assert all(answers[r.request_id].ranking == r.items[::-1] for r in requests[1:])
    summary = run.records[stage_name(form)].summary
    assert summary["statuses"] == {"ok": len(requests) - 1, "repaired": 0, "unreadable": 1}
    assert summary["foreign"] == len(requests) - 1
    assert set(planned(finished, tiny_settings, rows, eval_scope="all_users").values()) == {"cached"}
    file.write_text("\n".join(text[1:]) + "\n")
    plan = planned(finished, tiny_settings, rows, eval_scope="all_users")
    assert {name for name, action in plan.items() if action == "run"} == {stage_name(form), "evaluate"}


def test_files_that_cannot_be_read(finished, tiny_run, tmp_path):
    with pytest.raises(GR2Error, match="there is no file"):
        read_rankings(tmp_path / "gone.jsonl")
    for text, where in (
        ('{"user_id": "1", "ranking": ["a"]}\n{"user_id": "1", "ranking": ["a"]}\n', ":2"),
        ('{"user_id": "1"}\n', ":1"),
        ("1 Q0 a 1 0.5 x\n1 Q0 a 1 high x\n", ":2"),
        ("1 a 0.5\n", ":1"),
        ("1 Q0 a 1 0.5 x\n1 Q0 a 2 0.4 x\n", ":2"),
        ('{"user_id": "1", "ranking": ["a"]}\n["a"]\n', ":2"),
        ("1 Q0 a 1 0.5 x\n1 Q0 b 2 nan x\n", ":2"),
    ):
        file = tmp_path / "rankings"
        file.write_text(text)
        with pytest.raises(ConfigurationError) as error:
            read_rankings(file)
        assert where in str(error.value)
    file.write_text('{"user_id": "nobody", "ranking": ["nothing"]}\n')
    with pytest.raises(ConfigurationError, match="ranks no candidate of any request"):
        again(finished, tiny_run, eval_rows=[f"file:{file}"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["lambdamrat"], "did you mean lambdamart"),
        (["prior"], "eval_rows has 'prior', expected one of lambdamart"),
        (["mine:nothing"], "cannot import 'mine:nothing'"),
        (["no_module_here:rank"], "no module"),
        (["mine:number"], "neither a subclass"),
        (["sft", "mine:Sft"], "two methods have the name 'sft'"),
        (["mine:Needy"], "needs the unknown stages"),
        (["mine:rnak"], "the module has rank"),
        (["mine:Base"], "two methods have the name 'base'"),
        (["mine:Rl"], "two methods have the name 'rl'"),
        (["mine:Compared"], "is to be compared with 'lamdbamart', which is no method"),
        (["mine:ComparedWithText"], "is 'lambdamart'"),
        (["mine:WithoutRank"], "'mine:WithoutRank' has no method rank"),
        (["mine:WrongRank"], "'mine:WrongRank.rank' cannot be called as rank(requests): missing a required argument"),
        (["mine:alone"], "'mine:alone' cannot be called as rank(request, catalog): too many positional arguments"),
    ],
)
def test_wrong_names(finished, tiny_settings, mine, rows, message):
    with pytest.raises(ConfigurationError) as error:
        planned(finished, tiny_settings, rows)
    assert message in str(error.value)


def test_a_ranking_has_to_be_a_permutation(finished, tiny_run, mine):
    with pytest.raises(GR2Error, match="is not a permutation of the candidates") as error:
        again(finished, tiny_run, eval_rows=["mine:Broken"])
    assert "method broken, request test/" in error.value.where
    requests = synthetic_requests("test", 3)
    with pytest.raises(GR2Error, match="2 rankings for 3 requests"):
        as_answers(requests, [request.items for request in requests[:2]], method="mine")


@pytest.mark.parametrize(
    ("attribute", "what", "where"),
    [
        ("Raises", "'mine:Raises' raised AttributeError: 'Request' object has no attribute", "method mine:Raises"),
        ("FitRaises", "'mine:FitRaises' raised ValueError: no data", "method fit_raises, fit"),
        ("NoList", "rank returned an object of the type NoneType", "method no_list"),
        ("returns_none", "the ranking None is no list of item ids", "method mine:returns_none, request test/"),
        ("WithoutContext", "the method without_context has no context", "eval_rows"),
        ("fails", "'mine:fails' raised KeyError: 'x'", "request test/"),
        ("tokens", "is no list of item ids", "method mine:tokens, request test/"),
    ],
)
def test_a_wrong_method_ends_in_one_error(finished, tiny_run, mine, attribute, what, where):
    with pytest.raises(GR2Error) as error:
        again(finished, tiny_run, eval_rows=[f"mine:{attribute}"])
    assert what in error.value.what and where in error.value.where
    if "raised" in what:
        line = int(error.value.what.rpartition(":")[2].rstrip(")"))
        assert f"({mine}:{line})" in error.value.what and mine.read_text().splitlines()[line - 1].strip()


def test_names_of_features_must_not_depend_on_the_interactions(finished, tiny_run, mine):
    with pytest.raises(GR2Error, match="the features of the valid requests are .* and those of the train requests"):
        again(finished, tiny_run, eval_rows=["lambdamart"], prior_features=["mine:counted"])


def test_names_of_methods(mine, tiny_settings, tmp_path):
    settings = tiny_settings(tmp_path, eval_rows=["rl", "sft"], models=["OneRecThink"])
    assert [method.name for method in chosen(settings)] == ["rl", "sft", "onerec_think"]
    assert find_reranker("mine:rank").name == "mine:rank" and find_reranker("file:a/b.jsonl").name == "b"
    assert issubclass(find_reranker("mine:rank"), Reranker)


def test_declared_pairs_by_hand():
    methods = ["base", "oracle", "prior", "sft", "mine"]
    declared = {"prior": ["lambdamart"], "sft": ["prior", "oracle"], "mine": ["all"]}
    without = ["oracle", "base"]
    assert declared_pairs(methods, declared, every=False, without=without) == [
        ("sft", "prior"),
        ("sft", "oracle"),
        ("mine", "prior"),
        ("mine", "sft"),
    ]
    assert declared_pairs(methods, {}, every=True, without=without) == [
        ("prior", "sft"),
        ("prior", "mine"),
        ("sft", "mine"),
    ]
    assert declared_pairs(methods, {}, every=False, without=without) == []


@pytest.mark.slow
def test_the_command_of_a_user(finished, tmp_path):
    """In a folder with a module and a file, as the documentation shows it."""
    (tmp_path / "mine.py").write_text(MODULE)
    requests, catalog = lists(finished), finished.data.catalog
    (tmp_path / "rankings.jsonl").write_text(
        "".join(
            json.dumps({"user_id": r.user_token, "ranking": catalog.tokens(r.items[::-1])}) + "\n" for r in requests
        )
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({k: v["value"] for k, v in finished.settings.chosen().items()}))
    argv = [
        "--config_files",
        "tiny.yaml",
        f"--dataset={finished.settings['dataset']}",
        "--preset=smoke",
        f"--data_path={finished.settings['data_path']}",
        f"--checkpoint_dir={finished.settings['checkpoint_dir']}",
        "--eval_rows=[lambdamart, mine:rank, mine:ByPrior, file:rankings.jsonl]",
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "run_recbole_gr2.py", *argv],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(Path(done.stdout.splitlines()[-1]).read_text())
    names = list(dict.fromkeys(entry["method"] for entry in result["methods"]))
    assert names == ["base", "oracle", "prior", "lambdamart", "mine:rank", "by_prior", "rankings"]
    assert len(result["comparisons"]) == 10 - 1  # every pair of the last five but prior and by_prior
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert main(["--preset=smoke", "--eval_rows=[lambdamrat]", f"--checkpoint_dir={tmp_path}"]) == 2
    assert "did you mean lambdamart" in stderr.getvalue()
