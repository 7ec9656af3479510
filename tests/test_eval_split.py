"""`eval_split: valid`: every method is reported on the validation split, and no test target is read."""

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml
from changed_data import copy_tiny
from conftest import METRICS, called

from recbole_gr2 import pipeline
from recbole_gr2.artifacts import read_per_user, read_recommendations, read_requests
from recbole_gr2.bridge.data import Data
from recbole_gr2.errors import GR2Error, QualityCheckError
from recbole_gr2.ranking import ndcg_at
from recbole_gr2.stages import candidates

pytestmark = pytest.mark.slow

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "result.schema.json").read_text())
CUTOFFS = [1, 5, 10, 20]
OPTIONS = {
    "base_model": ["PairCounts", "ItemKNN"],
    "metrics": METRICS,
    "topk": CUTOFFS,
    "metric_decimal_place": 12,
    "models": ["Pop", "ItemKNN"],
    "cand_pool": 8,
    "eval_scope": "all_users",
    "eval_rows": ["lambdamart", "validation_methods:last_first"],
}
METHODS = """
def last_first(request, items):
    return request.items[::-1]
"""


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    """A module of the user with a method."""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "validation_methods.py").write_text(METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


@pytest.fixture(scope="module")
def run_copy(tiny_run, tiny_data, tmp_path_factory, methods):
    """run_copy(scrambled): a run on the validation split of a copy of the data with other test targets."""

    def run(scrambled: bool):
        folder = tmp_path_factory.mktemp("valid")
        copy_tiny(Path(tiny_data), folder, scrambled=int(scrambled))
        return tiny_run(folder / "run", **OPTIONS, eval_split="valid", data_path=str(folder))

    return run


@pytest.fixture(scope="module")
def valid(run_copy):
    """A run on the validation split with two base models, two recommenders and a method of the user."""
    return run_copy(False)


def entries_of(run) -> dict[tuple[str, str], dict]:
    return {(entry["method"], entry["scope"]): entry for entry in run.records["evaluate"].summary["methods"]}


def validation_targets(run) -> dict[str, int]:
    """The last but one item of each user."""
    return {run.data.user_tokens[user]: int(items[-2]) for user, items in run.data.sequences.items()}


def contents(folder: Path) -> dict[str, bytes]:
    names = ("manifest.json", ".lock")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name not in names}


def test_metrics_are_those_of_the_validation_targets(valid):
    """By hand, from the rank of the last but one item of each user, for the base order and each recommender."""
    targets, entries = validation_targets(valid), entries_of(valid)
    sources = {
        "base": read_recommendations(valid.folders["validation"]),
        "PairCounts": read_recommendations(valid.folders["validation"], "PairCounts"),
        "Pop": read_recommendations(valid.folders["validation_Pop"]),
        "ItemKNN": read_recommendations(valid.folders["validation_ItemKNN"]),
    }
    assert {name for name, scope in entries if scope == "all_users"} == {
        *sources,
        "oracle",
        "prior",
        "lambdamart",
        "validation_methods:last_first",
    }
    for name, found in sources.items():
        places = [
            row.index(targets[user]) + 1 if targets[user] in row else 0
            for user, row in zip(found.users, found.items.tolist(), strict=True)
        ]
        assert [rank if rank <= found.items.shape[1] else 0 for rank in found.target_rank.tolist()] == places
        ranks = np.where(found.target_rank > 0, found.target_rank, np.inf)
        for k in CUTOFFS:
            metrics = entries[name, "all_users"]["metrics"]
            assert metrics[f"ndcg@{k}"] == pytest.approx(ndcg_at(ranks, k).mean(), abs=1e-9), (name, k)
            assert metrics[f"recall@{k}"] == pytest.approx((ranks <= k).mean(), abs=1e-9), (name, k)


def test_rerankers_order_the_validation_lists(valid):
    requests = read_requests(valid.folders["candidates"] / "valid.jsonl", valid.data.catalog)
    rows = [
        json.loads(line) for line in (valid.folders["rerank_lambdamart"] / "rankings.jsonl").read_text().splitlines()
    ]
    assert [row["request_id"] for row in rows] == [request.request_id for request in requests]
    assert {row["request_id"].partition("/")[0] for row in rows} == {"valid"}
    ranks = read_per_user(valid.folders["evaluate"]).set_index("user")["validation_methods:last_first"].to_dict()
    targets, expected = validation_targets(valid), {}
    for request in read_requests(valid.folders["prior"] / "valid.jsonl", valid.data.catalog):
        chosen, others = request.by_prior[:5], request.by_prior[5:]
        order = [item for item in reversed(request.items) if item in chosen] + list(others)
        if (target := targets[request.user_token]) in order:
            expected[request.user_token] = order.index(target) + 1
    assert ranks == expected and len(ranks) == entries_of(valid)["prior", "hit_users"]["n"] > 50


def test_re_ranking_keeps_the_recall_of_the_list(valid):
    entries = entries_of(valid)
    shares = {scope: entries["base", scope]["metrics"]["recall@10"] for scope in ("all_users", "hit_users")}
    for (name, scope), entry in entries.items():
        if entry["unchanged"] is not None:
            for metric in ("recall@10", "recall@20", "itemcoverage@10"):
                assert entry["metrics"][metric] == entries["base", scope]["metrics"][metric], (name, metric)
    assert 0 < shares["all_users"] < shares["hit_users"] <= 1
    assert entries["oracle", "hit_users"]["metrics"]["ndcg@1"] == 1.0


def test_test_targets_change_nothing(valid, run_copy):
    """Files and figures of every stage whose results are reported are equal to the last bit."""
    other = run_copy(True)
    assert other.data.fingerprint != valid.data.fingerprint
    changed = [
        valid.data.sequences[user][-1] != items[-1] and np.array_equal(valid.data.sequences[user][:-1], items[:-1])
        for user, items in other.data.sequences.items()
    ]
    assert sum(changed) == 150  # of 152 users; the two others only fix the ids
    stages = [name for name in valid.folders if name.startswith(("rerank_", "validation", "evaluate"))]
    assert len(stages) == 6
    for stage in stages:
        assert contents(valid.folders[stage]) == contents(other.folders[stage]), stage
        assert _figures(valid.records[stage].summary) == _figures(other.records[stage].summary), stage
    for name in ("valid.jsonl", "train.jsonl", "features-valid.npy", "prior.safetensors"):
        assert contents(valid.folders["prior"])[name] == contents(other.folders["prior"])[name], name
    assert contents(valid.folders["prior"])["test.jsonl"] != contents(other.folders["prior"])["test.jsonl"]
    assert valid.data.summary().reachable_targets == other.data.summary().reachable_targets


def _figures(summary: Mapping) -> dict:
    return {name: value for name, value in summary.items() if name not in ("seconds", "requests_per_second")}


def test_both_splits_share_all_stages_but_those_of_the_evaluation(valid, tiny_settings):
    options = {**OPTIONS, "data_path": valid.settings["data_path"]}
    planned = pipeline.plan(settings := tiny_settings(valid.settings["checkpoint_dir"], **options), valid.data)
    assert settings["eval_split"] == "test"
    actions = {entry.stage.name: entry.action for entry in planned}
    run = [name for name, action in actions.items() if action != "cached"]
    assert run == ["rerank_lambdamart", "rerank_validation_methods.last_first", "evaluate"]
    assert not [name for name in actions if name.startswith("validation")]
    assert not any("eval_split" in entry.settings for entry in planned)  # so that finished runs stay cached


def test_recommendations_have_to_begin_with_the_lists(valid, tmp_path):
    """For example if another device gives other scores."""
    changed = tmp_path / "candidates"
    shutil.copytree(valid.folders["candidates"], changed)
    lines = [json.loads(line) for line in (changed / "valid.jsonl").read_text().splitlines()]
    lines[3]["candidates"] = lines[3]["candidates"][::-1]
    (changed / "valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    context = valid.context("validation", tmp_path)
    context = replace(context, folders={**valid.folders, "candidates": changed})
    with pytest.raises(GR2Error) as error:
        candidates.run_validation(context)
    assert "of 1 users do not begin" in str(error.value) and lines[3]["user_id"] in error.value.where


def test_test_lists_without_targets_stop_only_test_runs(valid, tiny_settings, tmp_path):
    data = copy.copy(valid.data)
    data.sequences = {user: np.array([*items[:-1], items[0]]) for user, items in data.sequences.items()}
    said: list[str] = []
    context = replace(valid.context("candidates", tmp_path), data=data, say=said.append)
    assert candidates.run(context)["stats"]["test"]["hit_users"] == 0
    assert any(line.startswith("valid:") for line in said) and not any("test" in line for line in said)
    with pytest.raises(QualityCheckError, match="no test list contains its target"):
        candidates.run(replace(context, settings=tiny_settings(tmp_path, **OPTIONS)))


def test_imported_lists(valid, tiny_run, tmp_path):
    file = tmp_path / "lists.jsonl"
    file.write_text(
        "".join((valid.folders["candidates"] / f"{s}.jsonl").read_text() for s in ("train", "valid", "test"))
    )
    root = valid.settings["checkpoint_dir"]
    options = {**OPTIONS, "models": [], "eval_split": "valid", "cand_file": str(file)}
    options |= {"data_path": valid.settings["data_path"]}
    run = tiny_run(root, data=None, **options)
    one, other = entries_of(valid), entries_of(run)
    for name in ("base", "prior", "oracle"):
        for scope in ("all_users", "hit_users"):
            assert one[name, scope]["metrics"]["ndcg@5"] == other[name, scope]["metrics"]["ndcg@5"]
    assert Data(run.settings).fingerprint == valid.data.fingerprint


# --- the command -----------------------------------------------------------------------------------------------------

ABLATION = {
    "stages": ["evaluate"],
    "settings": {"eval_rows": []},
    "columns": {"prior ndcg@5": "evaluate.methods.method=prior&scope=all_users.metrics.ndcg@5"},
    "variants": [
        {"name": "all features"},
        {"name": "few features", "settings": {"prior_features": ["base"]}, "published": {"prior ndcg@5": 0.1}},
    ],
}


def test_reports_and_ablations_name_the_split(finished_command, tmp_path):
    """With all language models. Their stages are those of the test run."""
    argv = [*finished_command.copy(tmp_path / "saved"), "--eval_split=valid"]
    code, stdout, stderr = called(argv)
    assert code == 0, stderr
    path = Path(stdout.splitlines()[-1])
    result, report = json.loads(path.read_text()), (path.parent / "report.md").read_text()
    jsonschema.validate(result, SCHEMA, cls=jsonschema.Draft202012Validator)
    assert (result["split"], finished_command.result["split"]) == ("valid", "test")
    rerun = {stage["stage"] for stage in result["stages"] if not stage["cached"][0]}
    rows = ("lambdamart", "midtrain", "sft", "rl", "shuffled")
    assert rerun == {"validation", "evaluate", *(f"rerank_{name}" for name in rows)}
    assert {entry["method"] for entry in result["methods"]} == {"base", "oracle", "prior", *rows}
    headings = [line for line in report.splitlines() if line.startswith("#")]
    assert "# GR2 on tiny, validation" in headings and "## tiny, validation, all users, n = 150" in headings
    assert "figures of the validation split" in report and "- reported split: validation" in report
    assert "tiny, validation split, hit users" in (path.parent / "table.tex").read_text()
    candidate_lines = report.partition("## Candidates")[2].partition("\n## ")[0].splitlines()
    rows_of_splits = [line.split()[1] for line in candidate_lines if line.startswith("| ")]
    assert [name for name in rows_of_splits if name in ("train", "valid", "test")] == ["train", "valid"]
    assert "all users of the validation split" in report and "test: " not in stderr

    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(ABLATION))
    code, stdout, stderr = called([*argv, "--ablation", file])
    assert code == 0, stderr
    path = Path(stdout.splitlines()[-1])
    ablation, report = json.loads(path.read_text()), (path.parent / "report.md").read_text()
    jsonschema.validate(ablation, SCHEMA, cls=jsonschema.Draft202012Validator)
    found = {(entry["method"], entry["scope"]): entry["metrics"]["ndcg@5"]["mean"] for entry in result["methods"]}
    assert ablation["split"] == "valid"
    assert ablation["variants"][0]["figures"] == {"prior ndcg@5": found["prior", "all_users"]}
    assert report.startswith("# Ablation two on tiny, validation\n") and "are those of the validation split" in report
    assert "Published figures are those of the test split." in report and "ablation two, tiny, validation" in stderr

    variants = [{"name": "a"}, {"name": "b", "settings": {"eval_split": "valid"}}]
    file.write_text(yaml.safe_dump({**ABLATION, "variants": variants}))
    code, _, stderr = called([*argv[:-1], "--ablation", file])
    assert code == 2 and "variants report the splits test and valid" in stderr
