"""`recbole-gr2 tune`: what is refused, which trials are run, how a study continues, and its result."""

import contextlib
import copy
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

from recbole_gr2 import ablation, pipeline
from recbole_gr2.commands.tune import tune
from recbole_gr2.config import load_settings
from recbole_gr2.config.recbole_options import smaller_is_better
from recbole_gr2.errors import GR2Error, QualityCheckError
from recbole_gr2.search_space import read_space
from recbole_gr2.store import read_manifest, write_manifest
from recbole_gr2.types import StageRecord

pytestmark = pytest.mark.slow  # Together they need a finished run and many seconds.

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "result.schema.json").read_text())
SPACE = {
    "method": "prior",
    "metric": "ndcg@10",
    "trials": 4,
    "sampler": "tpe",
    "settings": {"eval_rows": [], "base_model": ["PairCounts", "ItemKNN"], "cand_weights": {"PairCounts": 1.0}},
    "space": {
        "prior_steps": {"int": [20, 400], "log": True},
        "cand_weights.ItemKNN": {"float": [0.5, 4.0]},
        "prior_features": {"choice": [["base"], ["base", "popularity"]]},
    },
}
app = typer.Typer(rich_markup_mode=None)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(tune)


def called(argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            app([str(word) for word in argv], standalone_mode=False)
        except GR2Error as error:
            code = error.exit_code
            print(f"error: {error}", file=sys.stderr)
    return code, stdout.getvalue(), stderr.getvalue()


@pytest.fixture
def command(tmp_path, tiny_data):
    """command(changes of the space file, words): the words of the command on the data set `tiny`."""
    options = tmp_path / "tiny.yaml"
    options.write_text(yaml.safe_dump({**TINY, "data_path": str(tiny_data), "checkpoint_dir": str(tmp_path / "saved")}))

    def build(changes=None, *words, name="space.yaml"):
        values = {key: value for key, value in {**SPACE, **(changes or {})}.items() if value != "REMOVED"}
        (tmp_path / name).write_text(yaml.safe_dump(values, sort_keys=False))
        return [tmp_path / name, "--config_files", options, *words]

    return build


# --- what is refused -------------------------------------------------------------------------------------------------


def space_with(**entries):
    return {"space": {name.replace("__", "."): spec for name, spec in entries.items()}}


@pytest.mark.parametrize(
    ("changes", "words", "what", "do"),
    [
        ({"methd": "prior"}, [], "unknown key 'methd'", "did you mean method"),
        ({"method": "REMOVED"}, [], "method is missing", "docs/tuning.md"),
        ({"method": "priors"}, [], "no method 'priors'", "did you mean prior"),
        ({"method": "sft"}, [], "no method 'sft'", "Add the method to eval_rows"),
        ({"method": "Pop"}, ["--models", "SASRec"], "no method 'Pop'", "eval_rows or models"),
        ({"method": "ItemKNN", "scope": "hit_users"}, [], "ItemKNN is no re-ranker", "scope: all_users"),
        ({"metric": "ndgc@10"}, [], "no metric 'ndgc@10'", "did you mean ndcg@10"),
        ({"metric": "ndcg@7"}, [], "no metric 'ndcg@7'", "topk: [1, 3, 5, 7, 10]"),
        ({"metric": "hit@10"}, [], "no metric 'hit@10'", "metrics: [Recall, NDCG, MRR, hit]"),
        ({"scope": "all"}, [], "scope is 'all'", "did you mean all_users"),
        ({"sampler": "gird"}, [], "sampler is 'gird'", "did you mean grid"),
        ({"trials": 0}, [], "trials is 0", "trials: 20"),
        ({"trials": "REMOVED"}, [], "trials is None", "trials: 20"),
        ({"space": {}}, [], "space is {}", "docs/tuning.md"),
        (space_with(prior_stepz={"int": [1, 2]}), [], "unknown key 'prior_stepz'; nearest: prior_steps", "correct"),
        (space_with(prior_steps={"int": [0, 9]}), [], "prior_steps is 0, expected int >= 1", "correct them"),
        (space_with(prior_steps={"float": [1, 9]}), [], "prior_steps is 1.0, expected int >= 1", "correct them"),
        (space_with(cand_num={"choice": [5, 30]}), [], "cand_num is 30, expected int 2 to 26", "correct them"),
        (space_with(prior_features={"choice": [["bace"]]}), [], "did you mean base", "correct them"),
        (space_with(prior_steps=[1, 9]), [], "prior_steps is [1, 9]", "write {int:"),
        (space_with(prior_steps={"int": [9, 1]}), [], "prior_steps is {'int': [9, 1]}", "write {int:"),
        (space_with(prior_steps={"int": [1, 2.5]}), [], "prior_steps is {'int': [1, 2.5]}", "write {int:"),
        (space_with(prior_steps={"int": [1, 9], "lgo": True}), [], "'lgo': True", "write {int:"),
        (space_with(prior_steps={"int": [1, 9], "step": 3}), [], "'step': 3", "write {int:"),
        (space_with(prior_steps={"int": [1, 9], "log": True, "step": 1}), [], "'log': True", "write {int:"),
        (space_with(prior_steps={"choice": [1, 1]}), [], "'choice': [1, 1]", "write {int:"),
        (space_with(prior_steps__x={"int": [1, 9]}), [], "'prior_steps.x' is no part of a mapping", "name a whole"),
        (space_with(cand_weights__Pop={"float": [0, 1]}), [], "cand_weights has 'Pop'", "correct them"),
        (
            {
                "settings": {},
                **space_with(cand_weights={"choice": [{"ItemKNN": 1}]}, cand_weights__ItemKNN={"float": [0, 1]}),
            },
            [],
            "'cand_weights.ItemKNN' has two values",
            "keep one",
        ),
        (space_with(eval_rows={"choice": [[]]}), [], "'eval_rows' has two values", "keep one of them"),
        (space_with(dataset={"choice": ["tiny"]}), [], "dataset cannot be searched", "remove it"),
        (space_with(eval_split={"choice": ["test"]}), [], "eval_split cannot be searched", "remove it"),
        (space_with(eval_batch_lists={"int": [1, 2]}), [], "eval_batch_lists cannot be searched", "remove it"),
        ({"sampler": "grid"}, [], "'log': True", "write {int:"),
        ({"settings": {"eval_split": "test"}}, [], "eval_split is given", "remove eval_split"),
        ({}, ["--eval_split=valid"], "eval_split is given", "remove eval_split"),
        ({}, ["--prior_steps=7"], "prior_steps is also given on the command line", "keep one of them"),
        ({}, ["--prior_step=7"], "unknown key 'prior_step'", "correct them"),
        ({}, ["--seeds", "1,2"], "--seeds cannot be used with tune", "--seed changes the seed"),
        ({}, ["--stages", "prior", "--force"], "--stages, --force cannot be used with tune", "remove it"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(command, tmp_path, monkeypatch, changes, words, what, do):
    def refuse(*args, **kwargs):
        raise AssertionError("the data are read")

    monkeypatch.setattr(ablation, "Data", refuse)
    code, stdout, stderr = called(command(changes, *words))
    assert code == 2 and not stdout
    assert what in stderr.partition("  where")[0].partition("  why")[0] and do in stderr.partition("  do")[2], stderr
    assert stderr.count("error:") == 1 and "  why" in stderr
    assert not (tmp_path / "saved").exists()


def test_the_space_file_has_to_exist(tmp_path):
    code, _, stderr = called([tmp_path / "none.yaml"])
    assert code == 4 and "none.yaml" in stderr
    (tmp_path / "list.yaml").write_text("[1]")
    assert called([tmp_path / "list.yaml"])[0] == 2


def test_mistakes_are_found_without_torch(command):
    script = (
        "import sys, typer\nfrom recbole_gr2.commands.tune import tune\nfrom recbole_gr2.errors import GR2Error\n"
        "app = typer.Typer()\n"
        "app.command(context_settings={'allow_extra_args': True, 'ignore_unknown_options': True})(tune)\n"
        "try:\n    app(standalone_mode=False)\nexcept GR2Error as error:\n    print(error, 'torch' in sys.modules)"
    )
    argv = command(space_with(prior_stepz={"int": [1, 2]}), "--dataset=tiny")
    run = subprocess.run([sys.executable, "-c", script, *map(str, argv)], capture_output=True, text=True)
    assert "nearest: prior_steps" in run.stdout and run.stdout.endswith("False\n"), run.stderr


def test_metrics_of_which_a_smaller_value_is_better(command):
    assert smaller_is_better() == ["AveragePopularity", "GiniIndex"]
    (file, *_) = command({"metric": "GiniIndex@10"})
    assert read_space(file).direction == "minimize" and read_space(command()[0]).direction == "maximize"


# --- trials ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    return {}


class Killed(BaseException):
    """Ends a command at once."""


@pytest.fixture
def executed(monkeypatch, loaded):
    """Settings of the executed trials. Stages are finished at once, and the value is computed from the settings.

    `executed.killed` is the number of the execution that is killed, before or after its last stage.
    """

    def load(settings, load=ablation.Data):
        data = copy.copy(loaded.setdefault(repr(settings.recbole["MAX_ITEM_LIST_LENGTH"]), None) or load(settings))
        loaded[repr(settings.recbole["MAX_ITEM_LIST_LENGTH"])] = data
        data = copy.copy(data)
        data.settings = settings
        return data

    class Executed(list):
        killed: tuple[int, str] = (-1, "")
        fails = staticmethod(lambda settings: False)
        users = staticmethod(lambda settings: 150)

    executed = Executed()

    def execute(planned, settings, data, console):
        executed.append({name: settings[name] for name in ("prior_steps", "cand_weights", "prior_features")})
        assert settings["eval_split"] == "valid"
        done = []
        for entry in planned:
            if entry.stage.name == "evaluate" and executed.killed == (len(executed), "before"):
                raise Killed
            if entry.stage.name == "prior" and executed.fails(settings):
                raise QualityCheckError("too few lists", where="prior", why="x", do="y")
            finished = (record := read_manifest(entry.folder)) is not None
            if record is None:
                entry.folder.mkdir(parents=True, exist_ok=True)
                summary = _summary(settings, executed.users(settings)) if entry.stage.name == "evaluate" else {}
                record = StageRecord(
                    stage=entry.stage.name,
                    key=entry.key,
                    version=entry.stage.version,
                    needs=entry.needs,
                    settings=entry.settings,
                    seconds=1.0,
                    peak_memory_mb=100,
                    summary=summary,
                    sources=entry.sources,
                )
                write_manifest(entry.folder, record)
            done.append((record, finished))
        if executed.killed == (len(executed), "after"):
            raise Killed
        return done

    def _summary(settings, users):
        value = 0.5 - 0.1 * abs(math.log10(settings["prior_steps"] / 100)) - 0.01 * settings["cand_weights"]["ItemKNN"]
        value += 0.05 * len(settings["prior_features"])
        entry = {"method": "prior", "scope": "all_users", "n": users, "metrics": {"ndcg@10": value}}
        return {"methods": [{**entry, "method": "base"}, entry]}

    monkeypatch.setattr(ablation, "Data", load)
    monkeypatch.setattr(pipeline, "execute", execute)
    return executed


def result_of(argv) -> dict:
    code, stdout, stderr = called(argv)
    assert code == 0, stderr
    result = json.loads(Path(stdout.splitlines()[-1]).read_text())
    jsonschema.validate(result, SCHEMA, cls=jsonschema.Draft202012Validator)
    return {**result, "path": Path(stdout.splitlines()[-1])}


def trials_of(result) -> list[dict]:
    return [{key: value for key, value in trial.items() if key != "seconds"} for trial in result["trials"]]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_trials_have_values_of_the_space(command, executed, sampler):
    result = result_of(command({"sampler": sampler, "trials": 12}, "--no_test"))
    assert len(result["trials"]) == len(executed) == 12
    for trial, settings in zip(result["trials"], executed, strict=True):
        changed = trial["settings"]
        assert set(changed) == set(SPACE["space"])
        assert 20 <= changed["prior_steps"] <= 400 and 0.5 <= changed["cand_weights.ItemKNN"] <= 4.0
        assert changed["prior_features"] in SPACE["space"]["prior_features"]["choice"]
        assert settings["cand_weights"] == {"PairCounts": 1.0, "ItemKNN": changed["cand_weights.ItemKNN"]}
        assert settings["prior_steps"] == changed["prior_steps"]
    values = [trial["value"] for trial in result["trials"]]
    assert result["best"] == values.index(max(values)) + 1 and len(set(values)) == 12
    assert sum(result["importance"].values()) == pytest.approx(1.0) and result["tests"] == []


def test_a_grid_runs_every_combination_once(command, executed):
    space = {
        "prior_steps": {"int": [20, 40], "step": 10},
        "cand_weights.ItemKNN": {"float": [0.5, 0.7], "step": 0.1},
        "prior_features": {"choice": [["base"]]},
    }
    result = result_of(command({"sampler": "grid", "trials": "REMOVED", "space": space}, "--no_test"))
    found = [tuple(trial["settings"].values())[:2] for trial in result["trials"]]
    assert found == [(steps, weight) for steps in (20, 30, 40) for weight in (0.5, 0.6, 0.7)]


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_killed_trial_is_run_again_with_the_same_parameters(command, executed, tmp_path, number, place):
    """Before or after its last stage. The study ends with the trials of one that was not killed."""
    expected = trials_of(result_of(command({}, "--no_test", f"--checkpoint_dir={tmp_path / 'whole'}")))
    whole = list(executed)
    executed.clear()
    executed.killed = (number, place)
    with pytest.raises(Killed):
        called(command({}, "--no_test"))
    assert executed == whole[:number]
    executed.killed = (-1, "")
    assert trials_of(result_of(command({}, "--no_test"))) == expected
    assert executed == [*whole[:number], *whole[number - 1 :]]
    assert trials_of(result_of(command({}, "--no_test"))) == expected and len(executed) == 5


def test_more_trials_continue_a_study_and_another_space_starts_one(command, executed):
    first = result_of(command({"trials": 2}, "--no_test"))
    more = result_of(command({"trials": 4}, "--no_test"))
    assert more["path"] == first["path"] and trials_of(more)[:2] == trials_of(first) and len(executed) == 4
    space = {**SPACE["space"], "prior_steps": {"int": [20, 401], "log": True}}
    others = [{"space": space}, {"sampler": "random"}, {"settings": {**SPACE["settings"], "prior_fits": 3}}]
    folders = {result_of(command({**other, "trials": 1}, "--no_test"))["path"].parent for other in others}
    folders.add(result_of(command({"trials": 1}, "--no_test", "--seed=7"))["path"].parent)
    assert len({*folders, first["path"].parent}) == 5


def test_failed_quality_checks_are_recorded_and_other_errors_stop(command, executed, monkeypatch):
    executed.fails = lambda settings: len(settings["prior_features"]) == 1
    result = result_of(command({"trials": 8}, "--no_test"))
    failed = [trial for trial in result["trials"] if trial["state"] == "failed"]
    assert 0 < len(failed) < 8 and len(executed) == 8
    for trial in result["trials"]:
        assert (trial["value"] is None) == (trial in failed) == (len(trial["settings"]["prior_features"]) == 1)
        assert ("too few lists" in trial["failed"]) == (trial in failed)
    report = (result["path"].parent / "report.md").read_text()
    assert report.count("too few lists") == len(failed)
    executed.fails = lambda settings: True
    code, stdout, stderr = called(command({"trials": 2, "sampler": "random"}, "--no_test"))
    assert code == 5 and not stdout and "none of 2 trials has a value" in stderr
    monkeypatch.setattr(pipeline, "execute", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        called(command({"trials": 9}, "--no_test"))
    monkeypatch.undo()


def test_trials_of_different_users_are_not_compared(command, executed):
    executed.users = lambda settings: settings["prior_steps"]
    code, _, stderr = called(command({"trials": 3}, "--no_test"))
    assert code == 2 and "was evaluated on" in stderr and len(executed) == 2


def test_best_yaml_has_the_settings_of_the_best_trial(command, executed, tmp_path):
    result = result_of(command({}, "--no_test"))
    best = result["trials"][result["best"] - 1]["settings"]
    settings = load_settings(config_files=[result["path"].parent / "best.yaml"])
    assert settings["prior_steps"] == best["prior_steps"] and settings["prior_features"] == best["prior_features"]
    assert settings["cand_weights"] == {"PairCounts": 1.0, "ItemKNN": best["cand_weights.ItemKNN"]}
    assert settings["eval_split"] == "test" and settings["eval_rows"] == [] and settings["dataset"] == "tiny"
    assert settings["checkpoint_dir"] == str(tmp_path / "saved")
    values = yaml.safe_load((result["path"].parent / "best.yaml").read_text())
    assert len(values) < 40 and "eval_split" not in values and "rl_steps" in values  # what differs from the preset


def test_a_dry_run_starts_no_trial(command, executed, tmp_path):
    code, stdout, stderr = called(command({}, "--dry_run"))
    assert code == 0 and not stdout and not executed
    assert "trials: 0 finished, 4 left" in stderr and "trial 1 of 4: prior_steps" in stderr
    assert not (tmp_path / "saved").exists()
    result = result_of(command({"trials": 1}, "--no_test"))
    assert "trials: 1 finished, 3 left" in called(command({}, "--dry_run"))[2]
    result["path"].with_name("study.db").write_text("no database")
    code, _, stderr = called(command({}, "--no_test"))
    assert code == 1 and "the study cannot be read" in stderr and "remove the file" in stderr


@given(st.integers(1, 50), st.integers(0, 60), st.integers(1, 9))
def test_points_of_a_grid_are_those_of_a_range(tmp_path_factory, low, width, step):
    high = low + width // step * step
    file = tmp_path_factory.mktemp("grid") / "space.yaml"
    spec = {"int": [low, high], "step": step}
    file.write_text(yaml.safe_dump({**SPACE, "sampler": "grid", "space": {"prior_steps": spec}}))
    points = [point["prior_steps"] for point in read_space(file).grid()]
    assert points == list(range(low, high + 1, step))


# --- a whole study ---------------------------------------------------------------------------------------------------

REAL = {
    "method": "lambdamart",
    "metric": "recall@5",
    "trials": 2,
    "sampler": "random",
    "settings": {"eval_rows": ["lambdamart"], "base_model": ["PairCounts", "ItemKNN"]},
    "space": {"cand_fusion": {"choice": ["zscore", "rank", "quota"]}, "prior_steps": {"int": [5, 20]}},
}


@pytest.mark.slow
def test_a_study_ends_with_one_test_evaluation_and_continues_after_kill_9(command, tmp_path):
    result = result_of(command(REAL))
    root, folder = tmp_path / "saved" / "gr2" / "tiny", result["path"].parent
    assert folder.parent == root / "tuning" and len(list((root / "runs").iterdir())) == 1
    (test,) = result["tests"]
    run = json.loads(Path(test["result"]).read_text())
    jsonschema.validate(run, SCHEMA, cls=jsonschema.Draft202012Validator)
    values = {(e["method"], e["scope"]): e["metrics"]["recall@5"]["mean"] for e in run["methods"]}
    assert run["split"] == "test" and test["trial"] == result["best"]
    assert test["value"] == values["lambdamart", "all_users"]
    report = (folder / "report.md").read_text()
    link = os.path.relpath(Path(test["result"]).with_name("report.md"), folder)
    assert f"]({link})" in report and (folder / link).is_file() and "validation" in report.splitlines()[0]
    again = result_of(command(REAL))
    assert trials_of(again) == trials_of(result) and again["tests"] == result["tests"]
    assert len(list((root / "runs").iterdir())) == 1

    argv = [str(word) for word in command(REAL, "--no_test", f"--checkpoint_dir={tmp_path / 'killed'}")]
    script = (
        "import typer\nfrom recbole_gr2.commands.tune import tune\n"
        "app = typer.Typer()\n"
        "app.command(context_settings={'allow_extra_args': True, 'ignore_unknown_options': True})(tune)\napp()"
    )
    process = subprocess.Popen([sys.executable, "-c", script, *argv], stderr=subprocess.DEVNULL)
    while process.poll() is None and not _stored(tmp_path / "killed"):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 0 < _stored(tmp_path / "killed") < 2
    assert trials_of(result_of(argv)) == trials_of(result)


def _stored(root: Path) -> int:
    """Number of trials in the file of the study."""
    import sqlite3

    files = list(root.glob("gr2/tiny/tuning/*/study.db"))
    if not files:
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{files[0]}?mode=ro", uri=True)) as connection:
        try:
            return connection.execute("select count(*) from trials").fetchone()[0]
        except sqlite3.OperationalError:  # the table does not exist yet
            return 0
