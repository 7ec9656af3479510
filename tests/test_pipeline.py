"""The run as a whole: what is cached, what runs again and why, who may import whom, and what is left behind."""

import ast
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import recbole_gr2
from recbole_gr2 import pipeline
from recbole_gr2.bridge.data import Data
from recbole_gr2.config import RECBOLE_SPEED, declarations, load_settings
from recbole_gr2.console import Console
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.pipeline import BASELINE, BASELINES, INTERNALISE, NAMES, RERANK, STAGES, TRAINED_ONEREC_THINK
from recbole_gr2.quick_start import main
from recbole_gr2.report import curves_table, latex_tables, learning_curves, metrics_table, pairs_table, render_report
from recbole_gr2.stages.evaluate import read_per_user
from recbole_gr2.store import (
    code_version,
    locked,
    other_records,
    read_lines,
    read_manifest,
    stage_key,
    write_json,
    write_lines,
)

PACKAGE = Path(recbole_gr2.__file__).parent
ROWS = [f"rerank_{row}" for row in load_settings(config_dict={})["eval_rows"]]
TABLE = [*NAMES[:-1], *ROWS, NAMES[-1]]  # of a run without baselines


@pytest.fixture(scope="module")
def data(smoke_run):
    return Data(load_settings(config_dict={"preset": "smoke"}))


def planned(smoke_run, data, given=None, **changes):
    """The plan of the smoke command with other settings, by stage."""
    chosen = load_settings(config_dict={"preset": "smoke", "checkpoint_dir": str(smoke_run.root), **changes})
    return {entry.stage.name: entry for entry in pipeline.plan(chosen, data, **(given or {}))}


def actions(plan) -> dict[str, str]:
    return {name: entry.action for name, entry in plan.items()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base_model": "OneRecThink"}, "OneRecThink is no base model"),
        ({"models": ["SASRec"], "models_words": {"epoch": 3}}, r"no model of \['SASRec'\] has the words \['epoch'\]"),
        ({"models": ["Pop"], "models_words": {"n_layers": 3}}, "has the words"),
        ({"rl_rewards": {"rank_gian": 1.0}}, "did you mean rank_gain"),
        ({"sid_method": "rqvea"}, "no tokenizer 'rqvea'"),
        ({"prompt_evidence": ["next", "weather"]}, r"there are no facts \['weather'\] to show"),
        ({"prompt_llm_weight": 0}, "prompt_llm_weight is 0"),
        ({"prompt_evidence": ["next"], "evidence_providers": []}, r"there are no facts \['next'\] to show"),
        ({"trace_price": {"promt": 0.1}}, r"trace_price has no \['promt'\]"),
        ({"rl_start": "midtrain"}, "rl_start is 'midtrain'"),
        ({"trace_mode": "guess"}, "trace_mode is 'guess'"),
        ({"ort_variant": "other"}, "ort_variant is 'other'"),
        ({"eval_scope": "some"}, "eval_scope is 'some'"),
        ({"evidence_fits": 0}, "evidence_fits is 0"),
        ({"eval_rows": ["sft", "stf"]}, r"no re-ranker \['stf'\]"),
    ],
)
def test_what_settings_alone_show_is_told_before_data_is_loaded(given, message):
    with pytest.raises(ConfigurationError, match=message):
        pipeline.check(load_settings(config_dict={"preset": "smoke", **given}))
    words = {"epochs": 2, "n_layers": 1, "train_batch_size": 8}  # a word that one of the models has will do
    pipeline.check(load_settings(config_dict={"preset": "smoke", "models": ["Pop", "SASRec"], "models_words": words}))


# --- what runs again -------------------------------------------------------------------------------------------------


def test_the_second_run_is_all_cached(smoke_run, capsys):
    assert main(smoke_run.argv) == 0
    captured = capsys.readouterr()
    path = Path(captured.out.splitlines()[-1])
    again = json.loads(path.read_text())
    assert [stage["cached"] for stage in again["stages"]] == [True] * len(TABLE)
    assert [stage["cached"] for stage in smoke_run.result["stages"]] == [False] * len(TABLE)
    for field in ("rows", "tokenizer", "seeds", "llm", "command"):
        assert again[field] == smoke_run.result[field]
    assert "cached" in captured.err and "first time" not in captured.err


EVERY_ROW = " ".join(ROWS)
LLM_ROWS = " ".join(ROWS[1:])  # lambdamart reads evidence alone
DEPENDS = {
    "rl_temperature": (0.8, "rl rerank_rl rerank_shuffled evaluate"),
    "rl_rewards": ({"rank_gain": 1.0}, "rl rerank_rl rerank_shuffled evaluate"),
    "eval_draws": (100, "evaluate"),
    "eval_rows": (["rl"], "evaluate"),
    "eval_scope": ("all", f"{EVERY_ROW} evaluate"),
    "sft_learning_rate": (0.1, "sft rl rerank_sft rerank_rl rerank_shuffled evaluate"),
    "trace_tries": (3, "traces sft rl rerank_sft rerank_rl rerank_shuffled evaluate"),
    "prompt_template": ("rerank-nokp", f"traces sft rl {EVERY_ROW} evaluate"),  # mid-training learns the words of both
    "prompt_max_reasoning": (20, f"traces sft rl {EVERY_ROW} evaluate"),
    "mid_tokens": (1, f"midtrain traces sft rl {LLM_ROWS} evaluate"),
    "llm_random": ({"hidden_size": 32}, f"midtrain traces sft rl {LLM_ROWS} evaluate"),
    "llm_lora_rank": (4, f"midtrain traces sft rl {LLM_ROWS} evaluate"),
    "prompt_title_chars": (9, f"midtrain traces sft rl {EVERY_ROW} evaluate"),
    "evidence_hidden": (8, f"evidence traces sft rl {EVERY_ROW} evaluate"),
    "sid_epochs": (1, f"tokenizer midtrain traces sft rl {EVERY_ROW} evaluate"),
    "sid_encoder": ("all-minilm-l6-v2", f"embeddings tokenizer midtrain evidence traces sft rl {EVERY_ROW} evaluate"),
    "cand_exclude_seen": (False, f"candidates evidence traces sft rl {EVERY_ROW} evaluate"),
    "base_epochs": (1, f"candidates evidence traces sft rl {EVERY_ROW} evaluate"),
    "base_model": ("BPR", f"candidates evidence traces sft rl {EVERY_ROW} evaluate"),
    "MAX_ITEM_LIST_LENGTH": (10, f"candidates evidence traces sft rl {EVERY_ROW} evaluate"),
    "seed": (1, " ".join(TABLE[1:])),
}


@pytest.mark.parametrize("key", DEPENDS)
def test_a_setting_runs_what_depends_on_it(smoke_run, data, key):
    value, again = DEPENDS[key]
    plan = planned(smoke_run, data, **{key: value})
    assert [name for name, entry in plan.items() if entry.action == "run"] == again.split()
    assert {entry.action for entry in plan.values()} <= {"run", "cached"}
    first = plan[again.split()[0]]
    named = f"recbole.{key.removeprefix('base_')}" if key in ("base_epochs", "MAX_ITEM_LIST_LENGTH") else key
    old = read_manifest(other_folder(first)).settings.get(named)
    assert f"{named} {old} -> " in first.why
    later = plan[again.split()[-1]]
    assert later is first or later.why


def test_tokenizers_share_the_embeddings(smoke_run, data):
    """The encoder enters the tokenizer's key by the embeddings' key alone, the seed not the embeddings' at all."""
    plan = planned(smoke_run, data, sid_method="rqkmeans", seed=1)
    assert plan["embeddings"].action == "cached" and plan["tokenizer"].action == "run"
    assert plan["tokenizer"].needs == {"embeddings": plan["embeddings"].key}
    assert "sid_encoder" in plan["embeddings"].settings and "sid_levels" not in plan["embeddings"].settings
    assert "sid_encoder" not in plan["tokenizer"].settings and "sid_levels" in plan["tokenizer"].settings


def other_folder(entry) -> Path:
    (folder,) = [folder for folder in entry.folder.parent.iterdir() if folder.name != entry.key]
    return folder


def test_the_cause_is_printed(smoke_run, capsys):
    assert main([*smoke_run.argv, "--rl_temperature=0.8", "--dry_run"]) == 0
    shown = capsys.readouterr()
    assert "rl_temperature 1.0 -> 0.8" in shown.err and "new rl" in shown.err and shown.out == ""


def test_speed_settings_change_no_key(smoke_run, data):
    before = {name: entry.key for name, entry in planned(smoke_run, data).items()}
    folders = ("data_path", "checkpoint_dir")
    speed = [entry for entry in declarations().values() if entry.speed and entry.key not in folders]
    other = {int: lambda value: value * 2, str: lambda value: f"{value},", dict: lambda value: {**value, "prompt": 1.0}}
    doubled = {entry.key: other[entry.type](entry.default) for entry in speed}
    assert len(doubled) >= 7
    doubled |= {"worker": 4, "log_wandb": True, "show_progress": False}
    assert {"worker", "log_wandb", "show_progress"} < RECBOLE_SPEED
    assert {name: entry.key for name, entry in planned(smoke_run, data, **doubled).items()} == before


def copied(smoke_run, tmp_path) -> list[str]:
    """The smoke command on a copy of its folder."""
    shutil.copytree(smoke_run.root, tmp_path / "saved")
    return ["--preset", "smoke", "--checkpoint_dir", str(tmp_path / "saved")]


def stage_folder(tmp_path: Path, stage: str) -> Path:
    (folder,) = (tmp_path / "saved" / "gr2" / "ml-100k" / "stages" / stage).iterdir()
    return folder


def test_a_prompt_is_shown_without_a_model(smoke_run, tmp_path, capsys, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    argv = ["--preset", "smoke", "--checkpoint_dir"]
    assert main([*argv, str(smoke_run.root), "--show_prompt"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("[system]\n") and first.count("<|sid_begin|>") > 10
    assert [first.count(f"<|{label}|>") for label in "ABCDEFGHIJK"] == [1] * 10 + [0]
    traced = list(read_lines(smoke_run.stages["traces"] / "accepted.jsonl"))
    assert main([*argv, str(smoke_run.root), "--show_prompt", traced[3]["request_id"]]) == 0
    assert capsys.readouterr().out not in ("", first)
    assert main([*argv, str(smoke_run.root), "--show_prompt", "train/nobody"]) == 2
    assert "no train list 'train/nobody'" in capsys.readouterr().err
    assert main([*argv, str(tmp_path), "--show_prompt"]) == 2
    assert "have not run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("rerank_shuffled", {"rankings.jsonl"}),
        ("evaluate", {"rows.json", "per_user.csv", "examples.md"}),
    ],
)
def test_a_stage_without_manifest_goes_on_and_speed_changes_nothing(smoke_run, tmp_path, capsys, stage, names):
    argv = copied(smoke_run, tmp_path)
    folder = stage_folder(tmp_path, stage)
    before = {name: (folder / name).read_text() for name in names}
    assert {path.name for path in folder.iterdir()} == {*names, "manifest.json", ".lock"}
    for name in (*names, "manifest.json"):
        (folder / name).unlink()
    assert main([*argv, "--eval_batch_lists=7", "--eval_batch_size=100", "--dry_run"]) == 0
    assert "resume  stopped before it was finished" in capsys.readouterr().err
    assert main([*argv, "--eval_batch_lists=7", "--eval_batch_size=100"]) == 0
    result = json.loads(Path(capsys.readouterr().out.splitlines()[-1]).read_text())
    assert [entry["stage"] for entry in result["stages"] if not entry["cached"]] == [stage]
    assert {name: (folder / name).read_text() for name in names} == before
    assert result["rows"] == smoke_run.result["rows"]


def test_the_time_of_stopped_starts_counts_up_to_what_they_left(smoke_run, tmp_path):
    argv = copied(smoke_run, tmp_path)
    folder, began = stage_folder(tmp_path, "tokenizer"), 1_000_000.0
    (folder / "manifest.json").unlink()
    write_json(folder / pipeline.CLOCK, {"started": began, "before": 70.0})
    for path in folder.iterdir():
        os.utime(path, (began, began))
    os.utime(folder / "rqvae.safetensors", (began, began + 500.0))
    started = time.monotonic()
    assert main([*argv, "--stages=tokenizer"]) == 0
    assert 570.0 < read_manifest(folder).seconds < 570.0 + time.monotonic() - started
    assert not (folder / pipeline.CLOCK).exists()


def test_from_stage_force_and_stages(smoke_run, data):
    plan = planned(smoke_run, data, {"from_stage": "sft"})
    again = DEPENDS["sft_learning_rate"][1].split()
    assert actions(plan) == {name: "run" if name in again else "cached" for name in TABLE}
    assert plan["sft"].why == "asked for"
    assert set(actions(planned(smoke_run, data, {"force": True})).values()) == {"run"}
    assert list(planned(smoke_run, data, {"stages": ["tokenizer"]})) == ["embeddings", "tokenizer"]
    assert list(planned(smoke_run, data, {"stages": ["traces"]})) == list(NAMES[:6])
    assert list(planned(smoke_run, data, {"stages": ["evaluate"]})) == TABLE
    for wrong in ({"stages": ["evaluation"]}, {"from_stage": "evaluation"}):
        with pytest.raises(ConfigurationError, match="no stage named 'evaluation'"):
            planned(smoke_run, data, wrong)


def test_rl_may_start_from_distill(smoke_run, data, tmp_path):
    plain = planned(smoke_run, data)
    plan = planned(smoke_run, data, rl_start="distill")
    assert list(plan).index("distill") == list(plan).index("rl") - 1 and "distill" not in plain
    assert set(plan["rl"].needs) == set(plain["rl"].needs) - {"sft"} | {"distill"}
    assert {"midtrain", "sft"} <= set(plan["distill"].needs)  # the teacher is this run's sft model
    asked = planned(smoke_run, data, eval_rows=["distilled"])
    assert asked["rl"].key == plain["rl"].key and asked["distill"].key == plan["distill"].key
    assert set(asked["rerank_distilled"].needs) > {"distill"}
    with pytest.raises(MissingFileError, match="no-such-stage"):
        planned(smoke_run, data, rl_start="distill", distill_teacher=str(tmp_path / "no-such-stage"))
    teacher = str(smoke_run.stages["sft"])
    alone = planned(smoke_run, data, rl_start="distill", distill_teacher=teacher)
    assert "sft" not in alone["distill"].needs and alone["distill"].key != plan["distill"].key


def test_a_stage_that_runs_again_starts_from_an_empty_folder(smoke_run, tmp_path):
    argv = copied(smoke_run, tmp_path)
    folder = stage_folder(tmp_path, "tokenizer")
    (folder / "left.over").write_text("x")
    assert main([*argv, "--stages=tokenizer", "--from_stage=tokenizer"]) == 0
    assert not (folder / "left.over").exists() and read_manifest(folder)
    assert (folder / "sids.jsonl").read_text() == (smoke_run.stages["tokenizer"] / "sids.jsonl").read_text()


def test_two_runs_never_write_one_stage(smoke_run, tmp_path, capsys):
    argv = copied(smoke_run, tmp_path)
    folder = stage_folder(tmp_path, "tokenizer")
    (folder / "manifest.json").unlink()
    with open(folder / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert main([*argv, "--stages=tokenizer"]) == 1
    assert "another process is working on this stage" in capsys.readouterr().err
    assert main([*argv, "--stages=tokenizer"]) == 0


def test_what_another_run_finished_meanwhile_is_kept(smoke_run, data, tmp_path):
    argv = copied(smoke_run, tmp_path)
    shutil.rmtree(stage_folder(tmp_path, "tokenizer"))
    chosen = load_settings(config_dict={"preset": "smoke", "checkpoint_dir": str(tmp_path / "saved")})
    plan = pipeline.plan(chosen, data, stages=["tokenizer"])
    assert [entry.action for entry in plan] == ["cached", "run"]
    assert main([*argv, "--stages=tokenizer"]) == 0
    written = (stage_folder(tmp_path, "tokenizer") / "manifest.json").stat().st_mtime_ns
    assert [cached for _, cached in pipeline.execute(plan, chosen, data, Console())] == [True, True]
    assert (stage_folder(tmp_path, "tokenizer") / "manifest.json").stat().st_mtime_ns == written


def test_several_processes_share_rl(smoke_run, tmp_path):
    argv = copied(smoke_run, tmp_path)
    before = smoke_run.stages["rl"]
    shutil.rmtree(stage_folder(tmp_path, "rl"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            PACKAGE.parent / "run_recbole_gr2.py",
            *argv,
            "--stages=rl",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("rl done in") == 1  # one of them speaks
    after = stage_folder(tmp_path, "rl")
    said = [
        [
            {**line, "advantage": round(line["advantage"], 4)}
            for line in read_lines(folder / "checkpoints" / "rollouts.jsonl")
            if line["step"] == 0
        ]
        for folder in (before, after)
    ]
    assert said[0] == said[1] and said[0]  # of the first round; weights then differ in their last digits
    assert read_manifest(after).files == read_manifest(before).files


def test_other_stages_are_for_one_process(smoke_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "PROCESSES", 2)
    assert main([*copied(smoke_run, tmp_path), "--stages=tokenizer", "--seed=3"]) == 2
    assert "tokenizer would be run by 2 processes at once" in capsys.readouterr().err


def test_extensions_are_part_of_the_keys(smoke_run, data, tmp_path, monkeypatch):
    prompt = tmp_path / "mine.yaml"
    keys = []
    for text in ("system: S\nuser: U\n", "system: S\nuser: V\n"):
        prompt.write_text(text)
        keys.append(planned(smoke_run, data, prompt_template=str(prompt)))
    for name in TABLE:
        same = name in ("embeddings", "candidates", "tokenizer", "evidence")
        assert (keys[0][name].key == keys[1][name].key) == same, name
    lists = tmp_path / "lists.jsonl"
    with pytest.raises(MissingFileError, match="lists.jsonl"):
        planned(smoke_run, data, cand_file=str(lists))
    lists.write_text("{}\n")
    one = planned(smoke_run, data, cand_file=str(lists))["candidates"].key
    lists.write_text("{}\n{}\n")
    assert planned(smoke_run, data, cand_file=str(lists))["candidates"].key != one
    (tmp_path / "my_facts.py").write_text("def facts(observed): ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    providers = {"evidence_providers": ["base", "my_facts:facts"]}
    one = planned(smoke_run, data, **providers)
    (tmp_path / "my_facts.py").write_text("def facts(observed): ...  # changed")
    two = planned(smoke_run, data, **providers)
    assert one["evidence"].key != two["evidence"].key and one["midtrain"].key == two["midtrain"].key
    with pytest.raises(ConfigurationError, match="there is no 'weather'"):
        planned(smoke_run, data, evidence_providers=["weather"])
    for teacher in ("no_such_package.module:Teacher", "no_such_module:Teacher"):
        with pytest.raises(ConfigurationError, match="no module"):
            planned(smoke_run, data, trace_teacher=teacher)


def test_the_data_is_part_of_every_key():
    settings = {"a": 1}
    key = stage_key("rl", 1, settings, {"sft": "x"}, "data")
    others = [
        stage_key("sft", 1, settings, {"sft": "x"}, "data"),
        stage_key("rl", 2, settings, {"sft": "x"}, "data"),
        stage_key("rl", 1, {"a": 2}, {"sft": "x"}, "data"),
        stage_key("rl", 1, settings, {"sft": "y"}, "data"),
        stage_key("rl", 1, settings, {"sft": "x"}, "other"),
    ]
    assert len({key, *others}) == 6
    assert stage_key("rl", 1, {"b": 2, "a": 1}, {}, "") == stage_key("rl", 1, {"a": 1, "b": 2}, {}, "")


# --- the store -------------------------------------------------------------------------------------------------------


def test_code_version(tmp_path):
    """The version alone where it is installed; in a checkout the commit too, with a mark on changed files."""
    package = tmp_path / "recbole_gr2"
    package.mkdir()
    (package / "__init__.py").write_text("one")
    (tmp_path / "notes").write_text("not of the checkout")
    assert code_version(package) == recbole_gr2.__version__
    (tmp_path / ".git").mkdir()  # not one that git knows
    assert code_version(package) == f"{recbole_gr2.__version__} unknown commit"
    (tmp_path / ".git").rmdir()
    for words in (
        ["init", "-q"],
        ["add", "recbole_gr2"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"],
        ["tag", "v1"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = code_version(package)
    commit = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    version, short = clean.split()
    assert version == recbole_gr2.__version__ and len(short) == 8 and commit.startswith(short)
    (package / "__init__.py").write_text("two")
    assert code_version(package) == clean + "+"


def test_store(tmp_path):
    assert read_manifest(tmp_path) is None and other_records(tmp_path / "rl" / "key") == []
    file = tmp_path / "lines.jsonl"
    assert write_lines(file, ({"n": n} for n in range(3))) == 3
    assert list(read_lines(file)) == [{"n": 0}, {"n": 1}, {"n": 2}]
    with pytest.raises(ZeroDivisionError):
        write_lines(file, ({"n": 1 / n} for n in (1, 0)))
    assert len(list(read_lines(file))) == 3  # old or whole
    file.write_text('{"n": 1}\n\n{"n": \n')
    with pytest.raises(GR2Error, match="lines.jsonl:3"):
        list(read_lines(file))
    write_json(tmp_path / "x.json", {"a": [1]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1]}
    with locked(tmp_path / "stage"), pytest.raises(GR2Error, match="another process"), locked(tmp_path / "stage"):
        pass
    with locked(tmp_path / "stage"):
        pass


# --- what is left behind ---------------------------------------------------------------------------------------------


def test_result_json_has_the_documented_fields(smoke_run):
    result = smoke_run.result
    assert set(result) == {
        "dataset",
        "base_model",
        "llm",
        "preset",
        "seeds",
        "command",
        "settings",
        "rows",
        "pairs",
        "truth",
        "tokenizer",
        "curves",
        "stages",
    }
    per_user = read_per_user(smoke_run.stages["evaluate"])
    for pair in result["pairs"]:
        assert set(pair["metrics"]) == {"recall@1", "recall@5", "ndcg@5", "ndcg@10"}
        first = (per_user[pair["row"]] == 1).mean() - (per_user[pair["versus"]] == 1).mean()
        assert pair["metrics"]["recall@1"]["diff"] == pytest.approx(first, abs=1e-12)
    assert [(pair["row"], pair["versus"]) for pair in result["pairs"]] == [
        ("sft", "evidence"),
        ("sft", "lambdamart"),
        ("rl", "sft"),
        ("rl", "evidence"),
        ("rl", "lambdamart"),
        ("rl", "shuffled"),
        ("evidence", "lambdamart"),
    ]
    assert (result["dataset"], result["base_model"], result["llm"]) == ("ml-100k", "CausalSASRec", "random")
    assert (result["preset"], result["seeds"]) == ("smoke", [2020])
    assert result["command"].split()[1:] == smoke_run.argv
    assert 0.99 <= result["tokenizer"]["uniqueness"] <= 1.0
    assert [stage["stage"] for stage in result["stages"]] == TABLE
    for stage in result["stages"]:
        assert set(stage) == {"stage", "key", "seconds", "peak_memory_mb", "cached", "code"}
        assert stage["seconds"] >= 0 and stage["peak_memory_mb"] > 100 and len(stage["key"]) == 12


def test_rows_of_the_result(smoke_run):
    rows = {(row["row"], row["scope"]): row for row in smoke_run.result["rows"]}
    names = ["base", "oracle", "evidence", "lambdamart", "midtrain", "sft", "rl", "shuffled"]
    assert sorted(rows) == sorted((name, scope) for name in names for scope in ("all", "in_list"))
    everyone, inside = rows["base", "all"]["n"], rows["base", "in_list"]["n"]
    assert everyone == 943 and 20 < inside < 300
    for (name, scope), row in rows.items():
        assert set(row) == {"row", "scope", "n", "metrics", "unchanged", "vs_base"}
        assert row["n"] == (everyone if scope == "all" else inside)
        assert {f"{m}@{k}" for m in ("recall", "ndcg", "mrr") for k in (1, 3, 5, 10)} == set(row["metrics"])
        base = rows["base", scope]
        assert row["metrics"]["recall@10"] == base["metrics"]["recall@10"]
        assert 0 <= row["unchanged"] <= 1 and (row["unchanged"] == 1) == (name == "base")
        assert set(row["vs_base"]) == (set() if name == "base" else {"recall@1", "recall@5", "ndcg@5", "ndcg@10"})
        for metric, versus in row["vs_base"].items():
            difference = row["metrics"][metric] - base["metrics"][metric]
            assert versus["diff"] == pytest.approx(difference, abs=1.1e-4)  # RecBole rounds to four digits
            assert versus["low"] <= versus["diff"] <= versus["high"] and 0 < versus["p"] <= 1
            assert ("p_holm" in versus) == (name not in ("oracle", "shuffled"))
            assert versus.get("p_holm", 1.0) >= versus["p"]
    for scope in ("all", "in_list"):
        oracle, recall = rows["oracle", scope]["metrics"], rows["base", scope]["metrics"]["recall@10"]
        assert oracle["ndcg@10"] == oracle["recall@1"] == recall
    assert rows["base", "in_list"]["metrics"]["recall@10"] == 1.0
    share = inside / everyone
    for metric, value in rows["base", "in_list"]["metrics"].items():  # one is the other times the share of users
        assert rows["base", "all"]["metrics"][metric] == pytest.approx(value * share, abs=1e-4)


def test_the_run_folder(smoke_run):
    folder = smoke_run.path.parent
    assert smoke_run.stdout.splitlines() == [str(smoke_run.path)]
    assert folder.parent == smoke_run.root / "gr2" / "ml-100k" / "runs"
    report = (folder / "report.md").read_text()
    for scope in ("all", "in_list"):
        table = metrics_table(smoke_run.result, scope)
        assert table in report
        oracle = next(line for line in table.splitlines() if line.startswith("oracle")).split()
        assert oracle[-2] == "+100.0%"  # the way to itself, in either scope, however few lists hold their target
    assert smoke_run.result["command"] in report and "one seed" in report
    chosen = load_settings(config_files=[folder / "config.yaml"])
    assert chosen["preset"] == "smoke" and chosen["checkpoint_dir"] == str(smoke_run.root)
    done = [(read_manifest(path), False) for path in smoke_run.stages.values()]
    evaluated = smoke_run.stages["evaluate"]
    assert render_report(smoke_run.result, done, evaluated) == report  # a function of what the stages wrote
    assert latex_tables(smoke_run.result) == (folder / "table.tex").read_text()
    assert (evaluated / "examples.md").read_text().strip() in report
    assert "## Slices" in report and pairs_table(smoke_run.result) in report
    assert set(smoke_run.result["truth"]) == {"sft", "rl", "shuffled"}
    assert all(0 <= shares["all"] <= min(shares.values()) for shares in smoke_run.result["truth"].values())
    assert smoke_run.result["curves"] == learning_curves(smoke_run.stages)
    log = json.loads((smoke_run.stages["rl"] / "log.json").read_text())
    curves = smoke_run.result["curves"]
    assert set(curves) >= {"midtrain", "sft", "rl"} and set(curves["sft"]) >= {"loss/reasoning", "loss/ranking"}
    assert curves["rl"]["reward"][-1] == log[-1]["reward"] and curves_table(curves) in report
    settings = smoke_run.result["settings"]
    assert settings["llm"]["from"] == "preset/smoke.yaml" and "seed" not in settings
    assert settings["base_epochs"] == {"value": 3, "from": "preset/smoke.yaml"}
    assert not {"checkpoint_dir", "data_path"} & set(settings)
    assert {stage["code"] for stage in smoke_run.result["stages"]} == {code_version()}


def test_manifests_list_their_files(smoke_run):
    for stage, folder in smoke_run.stages.items():
        record = read_manifest(folder)
        assert record.stage == stage and record.key == folder.name and record.files
        for name in record.files:
            assert (folder / name).is_file(), f"{stage}/{name}"


def test_nothing_is_pickled(smoke_run):
    endings = {path.suffix for path in smoke_run.root.rglob("*") if path.is_file()}
    assert {".json", ".jsonl", ".safetensors", ".csv"} <= endings
    assert not endings & {".pth", ".pt", ".pkl", ".bin"}


# --- floors ----------------------------------------------------------------------------------------------------------

FLOORS = (
    {"errors", "processes", "types"},
    {"compat", "console", "extension", "ranking", "seeding", "store", "text"},
    {"config", "requests"},
    {"sid", "evidence"},
    {"prompts", "llm"},
    {"model"},
    {"bridge"},
    {"rewards", "teachers", "rerankers", "generator"},
    {"stages"},
    {"pipeline"},
    {"report"},
    {"ablation", "seeds"},
    {"quick_start"},
)
DOORS = ("config.py", "bridge/", "compat.py", "model/")


def imports(file: Path) -> list[str]:
    """Every module that a file imports, at its top or in a function."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def source_files() -> list[Path]:
    files = sorted(file for file in PACKAGE.rglob("*.py") if "properties" not in file.parts)
    assert len(files) > 20
    return files


def test_a_module_imports_from_lower_floors_only():
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    seen = 0
    for file in source_files():
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for module in imports(file):
            package, _, rest = module.partition(".")
            theirs = rest.split(".")[0]
            if package != "recbole_gr2" or theirs not in floor_of or theirs == room:
                continue
            seen += 1
            assert floor_of[theirs] < floor_of[room], f"{file.name} imports {module}"
    assert seen > 100
    rooms = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in source_files()}
    assert rooms - {"__init__"} == set(floor_of)  # a new room has to choose its floor


def test_recbole_is_met_at_the_doors_only():
    meeting = set()
    for file in source_files():
        name = str(file.relative_to(PACKAGE))
        if any(module.split(".")[0] == "recbole" for module in imports(file)):
            assert name.startswith(DOORS), name
            meeting.add(name)
    assert {"config.py", "compat.py", *(f"bridge/{name}.py" for name in ("data", "evaluator", "models"))} < meeting
    modules = [module for file in source_files() for module in imports(file)]
    assert not any(module.startswith("recbole.quick_start") for module in modules)  # it imports ray


def test_every_stage_has_a_file():
    files = {file.stem for file in (PACKAGE / "stages").glob("*.py")} - {"__init__"}
    others = (BASELINE, *BASELINES.values(), RERANK, INTERNALISE, TRAINED_ONEREC_THINK)
    assert files == {stage.code or stage.name for stage in (*STAGES, *others)}
    for number, stage in enumerate(STAGES):
        assert set(stage.needs) <= set(NAMES[:number])


def test_parsing_loads_nothing_heavy():
    code = (
        "import sys, recbole_gr2.quick_start as q\n"
        "q.parse(['--preset=smoke', '--rl_steps=3'])\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'recbole', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.strip() == "[]"
