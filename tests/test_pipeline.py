"""The run as a whole: what is cached, what runs again and why, and what a run leaves behind."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from conftest import called
from safetensors.torch import load_file

import recbole_gr2
from recbole_gr2 import pipeline, store
from recbole_gr2.artifacts import read_per_user
from recbole_gr2.config import declarations, load_settings
from recbole_gr2.config.declaration import speed_settings
from recbole_gr2.console import Console
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.meter import CLOCK
from recbole_gr2.store import LOCK, code_version, locked, read_lines, read_manifest, write_json
from recbole_gr2.types import Stage

PACKAGE = Path(recbole_gr2.__file__).parent
ROOT = PACKAGE.parent
METHODS = ["base", "oracle", "prior", "lambdamart", "midtrain", "sft", "rl", "shuffled"]


# --- the plan, on hand-made stages -----------------------------------------------------------------------------------


class Runner:
    """Hand-made stages `a -> b -> d` and `c -> d`, which write a file and count their starts."""

    def __init__(self, root: Path, monkeypatch) -> None:
        self.starts: list[str] = []
        self.settings = load_settings(config_dict={"checkpoint_dir": str(root), "dataset": "toy"})
        self.data = SimpleNamespace(fingerprint="data")
        self.stages = [
            self.stage("a", settings=("sid_epochs",)),
            self.stage("b", settings=("rl_steps",), needs=("a",)),
            self.stage("c", settings=("rl_steps",)),
            self.stage("d", settings=("eval_draws",), needs=("b", "c")),
            self.stage("optional"),
            self.stage("last", needs=("d",)),
        ]
        monkeypatch.setattr(pipeline, "all_stages", lambda settings: self.stages)

    def stage(self, name: str, **options) -> Stage:
        def run(context):
            self.starts.append(name)
            (context.folder / "result").write_text(name)
            checkpoint = context.folder / "checkpoints" / "checkpoint-3"
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "weights").write_text("w")
            (context.folder / "checkpoints" / "kept").write_text("k")
            return {"name": name, "inputs": sorted(context.inputs)}

        run.__module__ = "recbole_gr2.lists"
        return Stage(name=name, version=1, run=run, **options)

    def plan(self, stages=(), from_stage=None, force=False, **changes):
        settings = load_settings(
            config_dict={"checkpoint_dir": self.settings["checkpoint_dir"], "dataset": "toy", **changes}
        )
        return pipeline.plan(settings, self.data, stages=stages, from_stage=from_stage, force=force)

    def run(self, **options):
        return pipeline.execute(self.plan(**options), self.settings, self.data, Console())


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Runner:
    return Runner(tmp_path, monkeypatch)


def actions(planned) -> dict[str, str]:
    return {entry.stage.name: entry.action for entry in planned}


def test_by_default_the_last_stage_and_all_that_it_needs_run(toy):
    assert actions(toy.plan()) == dict.fromkeys(["a", "b", "c", "d", "last"], "run")
    assert {entry.why for entry in toy.plan()} == {"first time"}
    done = toy.run()
    assert toy.starts == ["a", "b", "c", "d", "last"] and [finished for _, finished in done] == [False] * 5
    assert done[3][0].summary == {"name": "d", "inputs": ["b", "c"]}
    assert actions(toy.plan()) == dict.fromkeys(["a", "b", "c", "d", "last"], "cached")
    assert [finished for _, finished in toy.run()] == [True] * 5 and len(toy.starts) == 5


def test_named_stages_run_with_all_that_they_need(toy):
    assert list(actions(toy.plan(stages=["b"]))) == ["a", "b"]
    assert list(actions(toy.plan(stages=["optional", "c"]))) == ["c", "optional"]
    with pytest.raises(ConfigurationError, match="there is no stage 'lst'") as error:
        toy.plan(stages=["lst"])
    assert "last" in error.value.do
    with pytest.raises(ConfigurationError, match="there is no stage 'z'"):
        toy.plan(from_stage="z")


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"sid_epochs": 7}, ["a", "b", "d", "last"]),
        ({"rl_steps": 7}, ["b", "c", "d", "last"]),
        ({"eval_draws": 300}, ["d", "last"]),
        ({"rl_temperature": 0.3}, []),
        ({"llm_save_steps": 3}, []),
    ],
)
def test_a_changed_setting_runs_the_stages_that_depend_on_it(toy, changes, again):
    toy.run()
    planned = toy.plan(**changes)
    assert [name for name, action in actions(planned).items() if action == "run"] == again
    ((key, value),) = changes.items()
    for entry in planned:
        if entry.action == "run":
            direct = key in entry.settings
            assert (f"{key} {toy.settings[key]} -> {value}" in entry.why) == direct
            assert direct or "new " in entry.why


def test_the_reason_is_the_difference_to_the_most_similar_run(toy):
    """A later run with more changes does not hide it."""
    toy.run()
    pipeline.execute(toy.plan(sid_epochs=7, rl_steps=9), toy.settings, toy.data, Console())
    assert [entry.why for entry in toy.plan(rl_steps=8)][:2] == ["", f"rl_steps {toy.settings['rl_steps']} -> 8"]


def test_versions_and_data_are_part_of_every_key(toy):
    toy.run()
    toy.stages[2] = replace(toy.stages[2], version=2)
    assert actions(toy.plan()) == {"a": "cached", "b": "cached", "c": "run", "d": "run", "last": "run"}
    toy.data.fingerprint = "other"
    planned = toy.plan()
    assert set(actions(planned).values()) == {"run"} and planned[0].why == "data or code changed"


def test_a_stage_of_different_code_is_reported_and_used(toy):
    toy.run()
    folder = toy.plan()[1].folder
    write_json(folder / "manifest.json", {**json.loads((folder / "manifest.json").read_text()), "sources": "0"})
    entry = toy.plan()[1]
    assert (entry.action, entry.finished) == ("outdated", True) and entry.why.startswith("made by ")
    toy.run()
    assert len(toy.starts) == 5


def test_from_stage_and_force_run_again_in_an_empty_folder(toy):
    toy.run()
    (toy.plan()[1].folder / "left over").write_text("x")
    planned = toy.plan(from_stage="b")
    assert actions(planned) == {"a": "cached", "b": "run", "c": "cached", "d": "run", "last": "run"}
    assert planned[1].why == "requested"
    toy.run(from_stage="b")
    assert toy.starts[5:] == ["b", "d", "last"] and not (planned[1].folder / "left over").exists()
    assert set(actions(toy.plan(force=True)).values()) == {"run"}


def test_an_interrupted_stage_resumes(toy, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(context):
        (context.folder / "half").write_text("x")
        raise Stopped

    whole = toy.stages[1]
    stop.__module__ = whole.run.__module__
    toy.stages[1] = replace(whole, run=stop)
    with pytest.raises(Stopped):
        toy.run()
    toy.stages[1] = whole
    planned = toy.plan()
    assert actions(planned) == {"a": "cached", "b": "resume", "c": "run", "d": "run", "last": "run"}
    toy.run()
    assert toy.starts == ["a", "b", "c", "d", "last"] and (planned[1].folder / "half").exists()


def test_checkpoints_are_removed_after_the_manifest_is_written(toy, monkeypatch):
    def fail(folder, record):
        raise OSError("no space left")

    checkpoint = toy.plan()[0].folder / "checkpoints" / "checkpoint-3"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(pipeline, "write_manifest", fail)
        toy.run()
    assert checkpoint.is_dir()
    toy.run()
    folder = checkpoint.parents[1]
    assert not checkpoint.exists() and list(read_manifest(folder).files) == ["checkpoints/kept", "result"]
    assert sorted(path.name for path in folder.iterdir()) == [LOCK, "checkpoints", "manifest.json", "result"]


def test_a_stage_without_manifest_runs_alone(toy):
    toy.run()
    (toy.plan()[1].folder / "manifest.json").unlink()
    planned = toy.plan()
    assert actions(planned) == {"a": "cached", "b": "resume", "c": "cached", "d": "cached", "last": "cached"}
    assert planned[1].why == "interrupted before it was finished"
    assert [finished for _, finished in toy.run()] == [True, False, True, True, True] and toy.starts[5:] == ["b"]


class Stopped(Exception):
    """An interruption of a stage."""


def stop_in(toy, name, error=Stopped):
    """Make a stage raise an error after its first file. Returns a function that undoes this."""
    number = [stage.name for stage in toy.stages].index(name)
    whole = toy.stages[number]

    def stop(context):
        whole.run(context)
        raise error

    stop.__module__ = whole.run.__module__
    toy.stages[number] = replace(whole, run=stop)

    def undo():
        toy.stages[number] = whole

    return undo


@pytest.mark.parametrize("request_", [{"from_stage": "b"}, {"force": True}])
def test_a_stopped_request_continues_where_it_was(toy, request_):
    toy.run()
    del toy.starts[:]
    again = [name for name in ("a", "b", "c", "d", "last") if "force" in request_ or name in ("b", "d", "last")]
    undo = stop_in(toy, "d")
    with pytest.raises(Stopped):
        toy.run(**request_)
    undo()
    assert toy.starts == again[:-1]
    assert {name: action for name, action in actions(toy.plan(**request_)).items() if action != "cached"} == {
        "d": "resume",
        "last": "run",
    }
    toy.run(**request_)
    assert toy.starts == [*again[:-1], "d", "last"]
    toy.run(**request_)  # the request is fulfilled: the next one computes everything again
    assert toy.starts == [*again[:-1], "d", "last", *again]


def test_another_command_finishes_a_stopped_request(toy):
    toy.run()
    del toy.starts[:]
    undo = stop_in(toy, "b")
    with pytest.raises(Stopped):
        toy.run(from_stage="b")
    undo()
    assert actions(toy.plan()) == {"a": "cached", "b": "resume", "c": "cached", "d": "run", "last": "run"}
    toy.run()
    assert toy.starts == ["b", "b", "d", "last"]
    assert set(actions(toy.plan()).values()) == {"cached"} and not list(toy.settings.results_folder.glob("requests/*"))


def test_a_request_uses_nothing_of_an_unfinished_stage(toy):
    undo = stop_in(toy, "d")
    with pytest.raises(Stopped):
        toy.run()
    undo()
    left = toy.plan()[3].folder / "left over"
    left.write_text("x")
    undo = stop_in(toy, "b")
    with pytest.raises(Stopped):
        toy.run(force=True)
    undo()
    toy.run(force=True)
    assert not left.exists()


def test_a_damaged_file_of_a_finished_stage_is_repaired_by_from_stage(toy):
    toy.run()
    file = toy.plan()[1].folder / "result"
    file.write_text("longer")
    for plan in (toy.plan, toy.run, lambda: toy.plan(from_stage="d")):
        with pytest.raises(GR2Error, match="result of the finished stage b has 6 bytes instead of 1") as error:
            plan()
        assert "--from_stage b" in error.value.do
    toy.run(from_stage="b")
    assert file.read_text() == "b" and set(actions(toy.plan()).values()) == {"cached"}


def test_a_changed_large_file_is_found_when_a_stage_reads_it(toy, monkeypatch):
    monkeypatch.setattr(store, "SMALL", 0)
    toy.run()
    file = toy.plan()[1].folder / "result"
    file.write_text("B")
    del toy.starts[:]
    assert actions(toy.plan())["b"] == "cached"  # checksums of all large files would take minutes
    with pytest.raises(GR2Error, match="result of the finished stage b has another content"):
        toy.run(from_stage="d")
    assert toy.starts == []


@pytest.mark.parametrize("content", ["", "{", '{"schema": 99}'])
def test_a_manifest_that_cannot_be_read_is_repaired_by_from_stage(toy, content):
    toy.run()
    file = toy.plan()[1].folder / "manifest.json"
    file.write_text(content)
    with pytest.raises(GR2Error, match="manifest") as error:
        toy.run()
    assert "--from_stage b" in error.value.do
    toy.run(from_stage="b")
    assert set(actions(toy.plan()).values()) == {"cached"}


def test_the_manifest_of_another_stage_is_an_error(toy):
    toy.run()
    one, other = (entry.folder for entry in toy.plan()[:2])
    shutil.copy(other / "manifest.json", one / "manifest.json")
    with pytest.raises(GR2Error, match="the manifest belongs to b/") as error:
        toy.plan()
    assert "--from_stage a" in error.value.do


def test_what_a_kill_left_of_a_finished_stage_is_removed(toy, monkeypatch):
    def kill(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_remove_intermediate", kill)
        toy.run()
    folder = toy.plan()[0].folder
    assert actions(toy.plan())["a"] == "cached" and (folder / "checkpoints" / "checkpoint-3").exists()
    toy.run()
    assert toy.starts.count("a") == 1
    assert sorted(path.name for path in folder.iterdir()) == [LOCK, "checkpoints", "manifest.json", "result"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["kept"]


def test_files_that_a_kill_left_unfinished_are_not_results(toy):
    folder = toy.plan()[0].folder
    folder.mkdir(parents=True)
    (folder / ".result.tmp").write_text("half")
    toy.run()
    assert list(read_manifest(folder).files) == ["checkpoints/kept", "result"] and not (folder / ".result.tmp").exists()


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "results cannot be written")]
)
def test_a_disk_error_is_one_error_and_the_command_continues(toy, number, message):
    undo = stop_in(toy, "b", OSError(number, os.strerror(number)))
    with pytest.raises(GR2Error, match=message) as error:
        toy.run()
    assert str(toy.plan()[1].folder) in error.value.where
    undo()
    toy.run()
    assert toy.starts == ["a", "b", "b", "c", "d", "last"]


def test_the_wall_time_contains_interrupted_starts(toy):
    folder, began = toy.plan()[0].folder, 1_000_000.0
    folder.mkdir(parents=True)
    write_json(folder / CLOCK, {"started": began, "before": 70.0})
    (folder / "result").write_text("half")
    for path in folder.iterdir():
        os.utime(path, (began, began))
    os.utime(folder / "result", (began, began + 500.0))
    started = time.monotonic()
    toy.run()
    assert 570.0 <= read_manifest(folder).seconds < 571.0 + time.monotonic() - started
    assert not (folder / CLOCK).exists()


def test_two_runs_never_write_one_stage(toy):
    folder = toy.plan()[0].folder
    folder.mkdir(parents=True)
    with open(folder / LOCK, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(recbole_gr2.errors.GR2Error, match="another process is working on this stage"):
            toy.run()
    toy.run()


def test_a_stage_that_another_run_reads_is_not_computed_again(toy):
    toy.run()
    folder = toy.plan()[0].folder
    with locked(folder, shared=True):  # as by a stage that needs it
        assert set(actions(toy.plan()).values()) == {"cached"} and [done for _, done in toy.run()] == [True] * 5
        with pytest.raises(GR2Error, match="or reads its files"):
            toy.run(from_stage="a")
    assert (folder / "result").exists()


def test_what_another_run_finished_meanwhile_is_kept(toy):
    planned = toy.plan()
    toy.run()
    done = pipeline.execute(planned, toy.settings, toy.data, Console())
    assert [finished for _, finished in done] == [True] * 5 and len(toy.starts) == 5


def test_stages_that_cannot_be_ordered(toy):
    toy.stages[0] = replace(toy.stages[0], needs=("d",))
    with pytest.raises(ValueError, match="stages need each other"):
        toy.plan()
    toy.stages[0] = replace(toy.stages[0], needs=("nowhere",))
    with pytest.raises(ConfigurationError, match="needs the unknown stages"):
        toy.plan()


def test_all_problems_of_the_stages_are_reported_together(toy):
    def problem(text):
        def check(settings):
            raise ConfigurationError(text)

        return check

    toy.stages[0] = replace(toy.stages[0], check=problem("first problem"))
    with pytest.raises(ConfigurationError, match="^first problem"):
        pipeline.check(toy.settings)
    toy.stages[1] = replace(toy.stages[1], check=problem("second problem"))
    with pytest.raises(ConfigurationError, match="(?s)2 problems.*first problem.*second problem"):
        pipeline.check(toy.settings)


# --- the real stages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base_model": "OneRecThink"}, "OneRecThink cannot be the base_model"),
        (
            {"models": ["SASRec"], "models_options": {"epoch": 3}},
            "models_options has the unknown option 'epoch' of SASRec; nearest: epochs",
        ),
        ({"models": ["Pop"], "models_options": {"n_layers": 3}}, "unknown option 'n_layers' of Pop"),
        ({"rl_rewards": {"rank_gian": 1.0}}, "did you mean rank_gain"),
        ({"eval_rows": ["sft", "stf"]}, "eval_rows has 'stf'"),
        ({"prior_features": ["sources"]}, "which has no features with one base model"),
        ({"mid_max_length": 20}, "mid_max_length is 20, expected at least 29"),
        # 3 history items and 5 candidates have semantic IDs of 5 tokens; the labels occur twice, and two tokens end it.
        ({"sft_max_length": 20, "cand_num": 5}, "sft_max_length is 20, and every training text has more than"),
    ],
)
def test_settings_are_checked_before_data_is_loaded(given, message):
    with pytest.raises(ConfigurationError, match=message):
        pipeline.check(load_settings(config_dict={"preset": "smoke", **given}))


def test_an_option_of_one_of_the_models_is_enough():
    options = {"epochs": 2, "n_layers": 1, "train_batch_size": 8}
    pipeline.check(
        load_settings(config_dict={"preset": "smoke", "models": ["Pop", "SASRec"], "models_options": options})
    )


@pytest.fixture(scope="module")
def command(finished_command):
    return finished_command


@pytest.fixture(scope="module")
def data(command):
    from recbole_gr2.bridge.data import Data

    return Data(load_settings(config_files=[command.argv[1]]))


def planned(command, data, given=None, **changes):
    """The plan of the command with other settings, by stage."""
    settings = load_settings(
        config_files=[command.argv[1]], config_dict={"checkpoint_dir": str(command.root), **changes}
    )
    return {entry.stage.name: entry for entry in pipeline.plan(settings, data, **(given or {}))}


def again(plan) -> list[str]:
    return [name for name, entry in plan.items() if entry.action == "run"]


@pytest.mark.slow
def test_the_second_run_is_cached(command, tmp_path):
    code, stdout, _ = called(command.copy(tmp_path / "saved"))
    result = json.loads(Path(stdout.splitlines()[-1]).read_text())
    assert code == 0 and {value for stage in result["stages"] for value in stage["cached"]} == {True}
    assert {value for stage in command.result["stages"] for value in stage["cached"]} == {False}
    for field in ("methods", "comparisons", "tokenizer", "seeds", "llm"):
        assert result[field] == command.result[field]


@pytest.mark.parametrize(
    "changes", [{"metrics": ["Recall", "NDCG", "MRR", "Hit"]}, {"topk": [1, 5, 7, 10]}, {"eval_draws": 300}]
)
def test_metrics_change_only_evaluate(command, data, changes):
    assert again(planned(command, data, **changes)) == ["evaluate"]


LANGUAGE_MODELS = {"sft", "rl", "rerank_sft", "rerank_rl", "rerank_shuffled", "evaluate"}
LISTS = {"candidates", "prior", "traces", "rerank_lambdamart", "rerank_midtrain", *LANGUAGE_MODELS}
MID_TRAINED = {"midtrain", "rerank_midtrain", *LANGUAGE_MODELS}
SEMANTIC_IDS = {"tokenizer", "traces", "rerank_lambdamart", *MID_TRAINED}
RECBOLE_OPTIONS = {"base_epochs": "recbole.epochs", "MAX_ITEM_LIST_LENGTH": "recbole.MAX_ITEM_LIST_LENGTH"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rl_temperature": 0.8}, {"rl", "rerank_rl", "rerank_shuffled", "evaluate"}),
        ({"rl_rewards": {"rank_gain": 1.0}}, {"rl", "rerank_rl", "rerank_shuffled", "evaluate"}),
        ({"sft_learning_rate": 0.1}, LANGUAGE_MODELS),
        ({"trace_tries": 3}, {"traces", *LANGUAGE_MODELS}),
        ({"prompt_template": "rerank-nokp"}, {"traces", *LANGUAGE_MODELS}),  # mid-training covers both templates
        ({"prompt_max_reasoning": 20}, {"traces", *LANGUAGE_MODELS}),
        ({"prompt_title_chars": 9}, {"traces", *MID_TRAINED}),
        ({"mid_tokens": 100}, MID_TRAINED),
        ({"llm_lora_rank": 4}, MID_TRAINED),
        ({"llm_random": {"hidden_size": 48}}, MID_TRAINED),
        ({"sid_epochs": 1}, SEMANTIC_IDS),
        ({"sid_encoder": "all-minilm-l6-v2"}, {"embeddings", "prior", *SEMANTIC_IDS}),
        ({"base_epochs": 1}, {"base_model_CausalSASRec", *LISTS}),
        ({"MAX_ITEM_LIST_LENGTH": 10}, {"base_model_CausalSASRec", *LISTS}),
        ({"base_model": "BPR"}, {"base_model_BPR", *LISTS}),
        ({"seed": 1}, {"base_model_CausalSASRec", *LISTS, *SEMANTIC_IDS}),  # all but the embeddings
        ({"cand_exclude_seen": False}, LISTS),
        ({"cand_num": 7}, {"midtrain", *LISTS}),  # mid-training adds the labels
        ({"eval_scope": "all_users"}, {name for name in LISTS if name.startswith("rerank_")} | {"evaluate"}),
        ({"eval_rows": ["rl"]}, {"evaluate"}),
    ],
)
def test_a_setting_runs_what_reads_it(command, data, changes, expected):
    """Nothing else runs, and the first stage names the setting with its old value."""
    plan = planned(command, data, **changes)
    assert set(again(plan)) == expected and {entry.action for entry in plan.values()} == {"run", "cached"}
    assert all(plan[name].why for name in again(plan))
    ((key, _),) = changes.items()
    name = RECBOLE_OPTIONS.get(key, "cand_pool" if key == "cand_num" else key)  # cand_num is the default of cand_pool
    first = next(stage for stage in again(plan) if stage in command.stages)  # BPR has no earlier run
    assert f"{name} {read_manifest(command.stages[first]).settings.get(name)} -> " in plan[first].why


def test_the_plan_is_printed_with_reasons(command):
    code, stdout, stderr = called([*command.argv, "--rl_temperature=0.8", "--dry_run"])
    lines = {line.split()[0]: line for line in stderr.splitlines() if line}
    assert code == 0 and stdout == "" and lines["sft"].split()[2:] == ["cached"]
    assert lines["rl"].endswith("  rl_temperature 1.0 -> 0.8") and lines["rerank_rl"].endswith("  new rl")


def test_tokenizers_share_the_embeddings(command, data):
    plan = planned(command, data, sid_method="rqkmeans", seed=1)
    assert plan["embeddings"].action == "cached" and plan["tokenizer"].action == "run"
    assert plan["tokenizer"].needs == {"embeddings": plan["embeddings"].key}
    assert "sid_encoder" in plan["embeddings"].settings and "sid_encoder" not in plan["tokenizer"].settings
    assert "sid_levels" not in plan["embeddings"].settings and "sid_levels" in plan["tokenizer"].settings


def test_speed_settings_change_no_key(command, data):
    before = {name: entry.key for name, entry in planned(command, data).items()}
    speed = [e for e in declarations().values() if e.speed and e.key not in ("data_path", "checkpoint_dir")]
    other = {int: lambda v: v * 2, str: lambda v: f"{v},", dict: lambda v: {**v, "prompt": 1.0}}
    other |= {list: lambda v: ["tensorboard"], bool: lambda v: not v}  # report_to; llm_gradient_checkpointing
    doubled = {entry.key: other[entry.type](entry.default) for entry in speed}
    assert len(doubled) >= 5
    doubled |= {"worker": 4, "log_wandb": True, "show_progress": False}
    assert {"worker", "log_wandb", "show_progress"} < speed_settings()
    assert {name: entry.key for name, entry in planned(command, data, **doubled).items()} == before


def test_only_what_the_methods_need_runs(command, data):
    plan = planned(command, data, eval_rows=["lambdamart"])
    assert not {"midtrain", "traces", "sft", "rl"} & set(plan) and "rerank_lambdamart" in plan
    assert "distilled" not in planned(command, data)
    plan = planned(command, data, eval_rows=["distilled", "internalised", "onerec_think"])
    assert {"distilled", "internalised", "onerec_think", "rerank_internalised"} <= set(plan)
    assert "rerank_lambdamart" not in planned(command, data, prior_features=[], eval_rows=["lambdamart", "sft"])


def test_rl_may_start_from_the_distilled_model(command, data, tmp_path):
    plain, plan = planned(command, data), planned(command, data, rl_start="distilled")
    assert set(plan["rl"].needs) == set(plain["rl"].needs) - {"sft"} | {"distilled"}
    assert {"midtrain", "sft"} <= set(plan["distilled"].needs)  # the teacher is the sft model of the run
    named = planned(command, data, eval_rows=["distilled", "rl"])
    assert named["rl"].key == plain["rl"].key and named["distilled"].key == plan["distilled"].key
    with pytest.raises(MissingFileError, match="no-such-stage"):
        planned(command, data, rl_start="distilled", distilled_teacher=str(tmp_path / "no-such-stage"))
    alone = planned(command, data, rl_start="distilled", distilled_teacher=str(command.stages["sft"]))
    assert "sft" not in alone["distilled"].needs and alone["distilled"].key != plan["distilled"].key


def test_files_and_modules_of_the_user_are_part_of_the_keys(command, data, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def changed(file: str, texts, **changes) -> set[str]:
        plans = []
        for text in texts:
            (tmp_path / file).write_text(text)
            plans.append(planned(command, data, **changes))
        return {name for name in plans[0] if plans[0][name].key != plans[1][name].key}

    template = str(tmp_path / "mine.yaml")
    texts = ("system: S\nuser: U\n", "system: S\nuser: V\n")
    by_prompt = changed("mine.yaml", texts, prompt_template=template)
    assert by_prompt == {"midtrain", "traces", "rerank_midtrain", *LANGUAGE_MODELS}
    lists = {"cand_file": str(tmp_path / "lists.jsonl")}
    with pytest.raises(MissingFileError, match="lists.jsonl"):
        planned(command, data, **lists)
    assert changed("lists.jsonl", ("{}\n", "{}\n{}\n"), **lists) == LISTS
    text = "def feature(data): ..."
    providers = {"prior_features": ["base", "my_features:feature"]}
    assert changed("my_features.py", (text, f"{text}  # changed"), **providers) == LISTS - {"candidates"}
    assert changed("my_teacher.py", ("T = 1", "T = 2"), trace_teacher="my_teacher:T") == {"traces", *LANGUAGE_MODELS}
    rewards = {"rl_rewards": {"my_rewards:r": 1.0}}
    source = ("def r(request, answer): return 1.0", "def r(request, answer): return 0.0")
    assert changed("my_rewards.py", source, **rewards) == {"rl", "rerank_rl", "rerank_shuffled", "evaluate"}
    assert changed("my_helper.py", ("A = 1", "A = 2"), **rewards) == set()
    (tmp_path / "my_rewards.py").write_text("import my_helper\ndef r(request, answer): return 1.0")
    assert changed("my_helper.py", ("A = 1", "A = 2"), **rewards) == {"rl", "rerank_rl", "rerank_shuffled", "evaluate"}
    for teacher in ("no_such_package.module:Teacher", "no_such_module:Teacher"):
        with pytest.raises(ConfigurationError, match="no module"):
            planned(command, data, trace_teacher=teacher)


@pytest.mark.parametrize(
    ("setting", "others", "first"),
    [
        ("llm", {}, "midtrain"),
        ("sid_encoder", {}, "embeddings"),
        ("trace_llm", {"trace_teacher": "local_llm"}, "traces"),
        ("distilled_teacher", {"eval_rows": ["distilled"]}, "distilled"),
    ],
)
def test_the_files_of_a_model_folder_are_part_of_the_keys(command, data, tmp_path, setting, others, first):
    folder = tmp_path / "folder"
    (folder / "model").mkdir(parents=True)
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(b"weights")

    def keys(folder=folder):
        return {name: entry.key for name, entry in planned(command, data, **{setting: str(folder)}, **others).items()}

    before = keys()
    os.utime(weights, (1.0, 1.0))
    assert keys() == before
    weights.write_bytes(b"Weights")
    changed = keys()
    assert next(name for name in changed if changed[name] != before[name]) == first
    assert (
        before["evaluate"] != changed["evaluate"]
        and before["base_model_CausalSASRec"] == changed["base_model_CausalSASRec"]
    )
    assert keys(folder.rename(tmp_path / "renamed")) == changed


def test_files_with_the_same_content_give_the_same_keys(command, data, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.yaml").write_text("system: S\nuser: U\n")
        (tmp_path / name / "general.txt").write_text("text " * 50)
        (tmp_path / name / "lists.jsonl").write_text("{}\n")
        (tmp_path / name / "ranked.jsonl").write_text("{}\n")
    one, two = (
        planned(
            command,
            data,
            prompt_template=str(folder / "mine.yaml"),
            mid_general=str(folder / "general.txt"),
            cand_file=str(folder / "lists.jsonl"),
            eval_rows=["sft", f"file:{folder / 'ranked.jsonl'}"],
        )
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert {name: entry.key for name, entry in one.items()} == {name: entry.key for name, entry in two.items()}


def test_what_the_machine_decides_is_part_of_the_keys(command, data, monkeypatch):
    from recbole_gr2 import tasks
    from recbole_gr2.llm import model

    def changed(before, after):
        return {name for name in before if before[name].key != after[name].key}

    models = {"midtrain", "rerank_midtrain", *LANGUAGE_MODELS}
    given = planned(command, data, llm_bf16=True, base_bf16=True)
    plain = planned(command, data, llm_bf16=False, base_bf16=True)
    assert changed(given, plain) == models
    for kind, same in (("bf16", given), ("fp32", plain)):
        monkeypatch.setattr(model, "best_dtype", lambda device, kind=kind: kind)
        assert changed(planned(command, data, llm_bf16=None, base_bf16=True), same) == set()
    monkeypatch.setattr(tasks, "general_source", lambda file: "the documentation of another version of Python")
    monkeypatch.setattr("recbole_gr2.stages.midtrain.general_source", tasks.general_source)
    assert changed(planned(command, data, base_bf16=True), plain) == models


def test_a_prompt_is_printed_without_a_model(command, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    code, first, _ = called([*command.argv, "--show_prompt"])
    assert code == 0 and first.startswith("[system]\n") and first.count("<|sid_begin|>") > 5
    assert [first.count(f"<|{label}|>") for label in "ABCDEF"] == [1] * 5 + [0]
    requests = [line["request_id"] for line in read_lines(command.stages["traces"] / "accepted.jsonl")]
    code, other, _ = called([*command.argv, "--show_prompt", requests[3]])
    assert code == 0 and other not in ("", first)
    code, _, stderr = called([*command.argv, "--show_prompt", "train/nobody"])
    assert code == 2 and "no train request 'train/nobody'" in stderr
    code, _, stderr = called([*command.argv[:-1], tmp_path, "--show_prompt"])
    assert code == 2 and "have not run" in stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rerank_shuffled", "evaluate"])
def test_a_stage_without_manifest_gives_the_same_result_at_another_speed(command, tmp_path, stage):
    argv = [*command.copy(tmp_path / "saved"), "--eval_batch_lists=7", "--eval_batch_size=100"]
    folder = tmp_path / "saved" / command.stages[stage].relative_to(command.root)
    before = {name: (folder / name).read_bytes() for name in read_manifest(folder).files}
    for name in (*before, "manifest.json"):
        (folder / name).unlink()
    code, stdout, stderr = called(argv)
    assert code == 0 and "interrupted before it was finished" in stderr
    result = json.loads(Path(stdout.splitlines()[-1]).read_text())
    assert [each["stage"] for each in result["stages"] if each["cached"] == [False]] == [stage]
    assert before and {name: (folder / name).read_bytes() for name in before} == before
    for field in ("methods", "comparisons"):
        assert result[field] == command.result[field]


@pytest.mark.slow
@pytest.mark.distributed
def test_several_processes_give_the_results_of_one(command, tmp_path):
    """They share mid-training, SFT, RL and the answers. One of them runs the traces and the evaluation."""
    argv = command.copy(tmp_path / "saved")
    stages = tmp_path / "saved" / "gr2" / "tiny" / "stages"
    removed = ["midtrain", "traces", "sft", "rl", "rerank_sft", "rerank_shuffled", "evaluate"]
    for name in removed:
        shutil.rmtree(stages / name)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(ROOT / "run_recbole_gr2.py", *argv),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = done.stdout.split()  # of the first process alone
    result = json.loads(Path(path).read_text())
    assert {stage["stage"] for stage in result["stages"] if not stage["cached"][0]} == set(removed)
    for field in ("methods", "comparisons"):
        assert result[field] == command.result[field]
    for name in removed:
        (after,) = (folder for folder in (stages / name).iterdir() if folder.is_dir())
        before = command.stages[name]
        assert set(read_manifest(after).files) == set(read_manifest(before).files), name
        if (after / "model").exists():
            ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (after, before))
            assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in theirs), name
        elif (after / "rankings.jsonl").exists():
            rankings = [[line["ranking"] for line in read_lines(f / "rankings.jsonl")] for f in (after, before)]
            assert rankings[0] == rankings[1] and rankings[0], name


# --- what a run leaves behind ----------------------------------------------------------------------------------------


def test_result_json_follows_its_schema(command):
    schema = json.loads((ROOT / "docs" / "result.schema.json").read_text())
    jsonschema.validate(command.result, schema)
    result = command.result
    assert (result["dataset"], result["base_model"], result["llm"]) == ("tiny", "CausalSASRec", "random")
    assert (result["schema"], result["preset"], result["seeds"]) == (2, "smoke", [2020])
    assert result["command"].split()[1:] == command.argv
    assert [stage["stage"] for stage in result["stages"]] == list(command.stages)
    for stage in result["stages"]:
        assert stage["seconds"][0] >= 0 and stage["peak_memory_mb"][0] > 100 and len(stage["key"][0]) == 12
        assert stage["code"] == [code_version()]


def test_comparisons_of_the_result(command):
    per_user = read_per_user(command.stages["evaluate"])
    pairs = command.result["comparisons"]
    for pair in pairs:
        assert set(pair["metrics"]) == {"recall@1", "recall@5", "ndcg@5", "ndcg@10"}
        first = (per_user[pair["method"]] == 1).mean() - (per_user[pair["versus"]] == 1).mean()
        assert pair["metrics"]["recall@1"]["diff"] == pytest.approx(first, abs=1e-12)
    assert {(pair["method"], pair["versus"]) for pair in pairs} == {
        ("sft", "prior"),
        ("sft", "lambdamart"),
        ("rl", "sft"),
        ("rl", "prior"),
        ("rl", "lambdamart"),
        ("rl", "shuffled"),
        ("prior", "lambdamart"),
    }


def test_methods_of_the_result(command):
    methods = {(entry["method"], entry["scope"]): entry for entry in command.result["methods"]}
    assert set(methods) == {(name, scope) for name in METHODS for scope in ("all_users", "hit_users")}
    (everyone,), (hits,) = methods["base", "all_users"]["n"], methods["base", "hit_users"]["n"]
    assert everyone == 150 and 50 < hits < 150

    def values(name, scope):
        return {metric: value["values"][0] for metric, value in methods[name, scope]["metrics"].items()}

    for (name, scope), entry in methods.items():
        assert entry["n"] == [everyone if scope == "all_users" else hits]
        base, metrics = values("base", scope), values(name, scope)
        assert set(metrics) == {f"{m}@{k}" for m in ("recall", "ndcg", "mrr") for k in (1, 3, 5, 10)}
        assert metrics["recall@5"] == base["recall@5"]  # lists have five candidates
        assert 0 <= entry["unchanged"] <= 1 and (entry["unchanged"] == 1) == (name == "base")
        assert set(entry["vs_base"]) == (set() if name == "base" else {"recall@1", "recall@5", "ndcg@5", "ndcg@10"})
        for metric, versus in entry["vs_base"].items():
            assert versus["diff"] == pytest.approx(metrics[metric] - base[metric], abs=1.1e-4)  # RecBole rounds
            assert versus["low"] <= versus["diff"] <= versus["high"] and 0 < versus["p"] <= 1
            assert ("p_holm" in versus) == (name not in ("oracle", "shuffled"))
            assert versus.get("p_holm", 1.0) >= versus["p"]
    for scope in ("all_users", "hit_users"):
        oracle = values("oracle", scope)
        assert oracle["ndcg@5"] == oracle["recall@1"] == values("base", scope)["recall@5"]
    assert values("base", "hit_users")["recall@5"] == 1.0


def test_the_run_folder(command):
    folder = command.path.parent
    assert command.stdout.splitlines() == [str(command.path)]
    assert folder.parent == command.root / "gr2" / "tiny" / "runs"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "report.html",
        "report.md",
        "result.json",
        "run.json",
        "table.tex",
    }
    assert command.result["command"] in (folder / "report.md").read_text()
    settings = load_settings(config_files=[folder / "config.yaml"])
    assert settings["preset"] == "smoke" and settings["checkpoint_dir"] == str(command.root)
    log = json.loads((command.stages["rl"] / "log.json").read_text())
    curves = command.result["curves"]
    assert set(curves) >= {"midtrain", "sft", "rl"} and set(curves["sft"]) >= {"loss/reasoning", "loss/ranking"}
    assert curves["rl"]["reward"][-1] == log[-1]["reward"]
    answers = {name: read_lines(command.stages[f"rerank_{name}"] / "rankings.jsonl") for name in METHODS[3:]}
    reasoning = {name for name, lines in answers.items() if any(line["reasoning"] for line in lines)}
    assert set(command.result["truth"]) == reasoning <= {"sft", "rl", "shuffled"}
    changed = command.result["settings"]
    assert changed["llm"]["value"] == "random" and "seed" not in changed
    assert not {"checkpoint_dir", "data_path"} & set(changed)


def test_manifests_list_their_files(command):
    for stage, folder in command.stages.items():
        record = read_manifest(folder)
        assert record.stage == stage and record.key == folder.name and record.files
        for name in record.files:
            assert (folder / name).is_file(), f"{stage}/{name}"


def test_nothing_is_pickled(command):
    endings = {path.suffix for path in command.root.rglob("*") if path.is_file()}
    assert {".json", ".jsonl", ".safetensors", ".csv"} <= endings
    assert not endings & {".pth", ".pt", ".pkl", ".bin"}


def test_parsing_imports_no_large_library():
    code = (
        "import sys, recbole_gr2.quick_start as q\n"
        "q.parse(['--preset=smoke', '--rl_steps=3'])\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'recbole', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
