"""Checks before a run: data set, folders, packages, memory and disk space; and the expected time of the stages."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from recbole_gr2 import pipeline, preflight
from recbole_gr2.bridge.data import Data
from recbole_gr2.errors import ConfigurationError, DependencyError, GR2Error, MissingFileError
from recbole_gr2.llm.model import random_config, random_model
from recbole_gr2.llm.size import model_size
from recbole_gr2.quick_start import main
from recbole_gr2.stages import all_stages, check_names
from recbole_gr2.store import write_json, write_manifest
from recbole_gr2.types import StageRecord

GIB = 2**30


@pytest.fixture(scope="module")
def data(tiny_settings, tmp_path_factory):
    return Data(tiny_settings(tmp_path_factory.mktemp("data")))


@pytest.fixture
def disk(monkeypatch):
    """disk(free): the disk has this many free bytes."""
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def command(tiny_data: Path, root: Path, *argv: str) -> int:
    options = ["--preset=smoke", "--dataset=tiny", "--sid_codes=8", f"--data_path={tiny_data}"]
    return main([*options, f"--checkpoint_dir={root}", *argv])


# --- folders and data sets -------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in ("/proc/none", str(tmp_path / "file"), str(tmp_path / "file" / "below"), str(tmp_path / ("x" * 300))):
        assert command(tmp_path, Path(folder), "--dataset=ml-100k") == 2
        assert f"where checkpoint_dir {folder}" in capsys.readouterr().err


def test_a_folder_is_checked_without_a_trace(tmp_path, disk):
    preflight.check_folder(tmp_path / "a" / "b", where="checkpoint_dir")
    assert not any(tmp_path.iterdir())
    disk(10 * 2**20)
    with pytest.raises(ConfigurationError, match="10 MiB are free"):
        preflight.check_folder(tmp_path / "a", where="checkpoint_dir")


def test_data_sets_of_a_similar_name_are_named(tiny_settings, tiny_data, tmp_path):
    for name, near in (("tinny", "tiny"), ("amazon-beuty", "amazon-beauty"), ("ml-100", "ml-100k")):
        with pytest.raises(MissingFileError, match="there is no data set") as error:
            preflight.check_dataset(tiny_settings(tmp_path, dataset=name))
        assert f"did you mean {near}" in error.value.do and error.value.where == str(tiny_data)
    for name in ("tiny", "amazon-beauty", "ml-100k"):
        preflight.check_dataset(tiny_settings(tmp_path, dataset=name))


def test_names_of_stages_are_known_without_their_modules(tiny_settings, tmp_path):
    rows = ["lambdamart", "internalised", "onerec_think-no-think"]
    settings = tiny_settings(tmp_path, models=["SASRec", "OneRecThink"], eval_rows=rows)
    names = [stage.name for stage in all_stages(settings)]
    check_names(names, settings)
    with pytest.raises(ConfigurationError, match="there is no stage 'rerank_x'") as error:
        check_names(["rerank_x"], settings)
    chosen = error.value.do.partition("Choose from ")[2].split(", ")
    assert sorted(chosen) == sorted(names)


# --- what a stage needs ----------------------------------------------------------------------------------------------


def test_a_missing_package_of_a_teacher_is_reported_before_any_stage(tiny_data, tmp_path, monkeypatch, capsys):
    for argument in ("--trace_teacher=openai_api", "--distilled_teacher=http://localhost:1/v1"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "openai", None)
            rows = "--eval_rows=[distilled]"
            assert command(tiny_data, tmp_path, argument, rows, "--dry_run") == DependencyError.exit_code
            assert "error: the openai package is not installed" in capsys.readouterr().err
            assert command(tiny_data, tmp_path, argument, "--stages=candidates", "--dry_run") == 0
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        assert command(tiny_data, tmp_path, argument, rows, "--dry_run") == ConfigurationError.exit_code
        assert "set OPENAI_API_KEY" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"topk": [5, 61]}, "topk contains 61, but 60 items per user are recommended"),
        ({"rl_prompts_per_step": 151}, "a round needs 151 train requests, and 150 users have one"),
        ({"distilled_teacher": "nowhere", "eval_rows": ["distilled"]}, "nowhere/model"),
    ],
)
def test_what_the_data_do_not_allow_is_refused_before_any_stage(changes, text, tiny_settings, tmp_path, data):
    settings = tiny_settings(tmp_path, **changes)
    with pytest.raises(GR2Error, match=text):
        pipeline.check_data(pipeline.plan(settings, data), settings, data)
    pipeline.check_data(pipeline.plan(settings, data, stages=["candidates"]), settings, data)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"llm": "smollm2-135m"}, "did you mean smollm2-135m-instruct"),
        ({"llm": "a/b/c"}, "there is no language model 'a/b/c'"),
        ({"sid_encoder": "hsh"}, "(?s)'hsh'.*sid_encoder.*did you mean hash"),
        ({"trace_llm": "./nowhere"}, "(?s)'./nowhere'.*trace_llm"),
        ({"llm_random": {"hiden_size": 32}}, "did you mean hidden_size"),
        ({"llm_random": {"num_attention_heads": 3}}, "no model can have llm_random"),
        ({"llm_random": {"num_key_value_heads": 3}}, "no model can have llm_random"),
        ({"llm_random": {"hidden_size": -1}}, "no model can have llm_random"),
        ({"llm_random": {"vocab_size": 258}}, "vocab_size is below 259"),
        ({"llm_random": {"hidden_act": "rellu"}}, "no model can have llm_random"),
        ({"trace_teacher": "broken_module:Teacher"}, "ZeroDivisionError: division by zero .*broken_module.py:1"),
        ({"trace_teacher": ":x"}, "cannot import ':x'"),
        ({"prior_features": ["..:x"]}, "cannot import '..:x'"),
        ({"eval_rows": ["file:nowhere.jsonl"]}, "nowhere.jsonl cannot be read"),
        ({"eval_rows": ["file:broken.jsonl"]}, "has no ranking of a new request"),
        ({"cand_file": "binary"}, "binary is not encoded in UTF-8"),
        ({"trace_file": "empty"}, "empty is empty"),
        ({"mid_general": "binary"}, "binary is not encoded in UTF-8"),
    ],
)
def test_files_and_modules_are_checked_before_data_are_read(changes, text, tiny_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("broken_module.py").write_text("1 / 0\n")
    Path("broken.jsonl").write_text('{"user_id": "u1"}\n')
    Path("binary").write_bytes(b"text\n\xff\xfe\n")
    Path("empty").write_text("")
    with pytest.raises(GR2Error, match=text):
        pipeline.check(tiny_settings(tmp_path, **changes))


def test_processes_that_cannot_share_a_step(tiny_settings, tmp_path, monkeypatch):
    from recbole_gr2 import distributed

    monkeypatch.setattr(distributed, "WORLD_SIZE", 3)
    with pytest.raises(ConfigurationError, match="3 processes cannot share 2 equally") as error:
        pipeline.check(tiny_settings(tmp_path))
    names = ("mid_batch_size", "sft_batch_size", "rl_prompts_per_step", "onerec_think_batch_size")
    assert all(name in str(error.value) for name in names)


# --- memory and disk space -------------------------------------------------------------------------------------------


def test_the_size_of_a_model_is_that_of_its_weights(tiny_settings, tmp_path):
    settings = tiny_settings(tmp_path)
    model, tokenizer = random_model(["text"], config=settings["llm_random"])
    fields = {**settings["llm_random"], "vocab_size": len(tokenizer)}
    settings = tiny_settings(tmp_path, llm_random=fields)
    size = model_size(settings)
    assert size.parameters == model.num_parameters() and size.embeddings == len(tokenizer) * 32
    one = model_size({**settings, "llm_layers": [1]})
    layer = sum(weights.numel() for weights in model.model.layers[1].parameters())
    assert one.parameters == size.parameters - layer
    with pytest.raises(ConfigurationError, match="a model with 2 layers cannot keep the layers"):
        model_size({**settings, "llm_layers": [2]})
    assert size.training_bytes(lora=True) * 4 == size.training_bytes(lora=False) == 16 * size.parameters
    assert size.disk_bytes(3, lora=True) == 12 * size.parameters
    assert replace(size, trimmed=True).least == size.parameters - size.embeddings
    assert random_config(settings["llm_random"]).vocab_size == len(tokenizer)


def test_a_model_in_a_folder(tiny_settings, tmp_path):
    model, tokenizer = random_model(["text"])
    settings = tiny_settings(tmp_path, llm=str(tmp_path / "model"), llm_trim_vocabulary=True)
    (tmp_path / "model").mkdir()
    with pytest.raises(MissingFileError, match="contains no model"):
        model_size(settings)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    size = model_size(settings)
    assert size.parameters == model.num_parameters() and size.least == size.parameters - size.embeddings
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="cannot load a language model"):
        model_size(settings)


def test_a_model_that_does_not_fit_is_refused_before_any_stage(tiny_settings, tmp_path, data, monkeypatch, disk):
    settings = tiny_settings(tmp_path, eval_rows=["midtrain"])
    planned, lines = pipeline.plan(settings, data), []
    need = model_size(settings).training_bytes(lora=False)
    for free in (None, need):
        monkeypatch.setattr(preflight, "gpu_memory", lambda free=free: free)
        preflight.check_resources(planned, settings, lines.append)
    assert len(lines) == 4 and lines[0].startswith("random: 0.0 M parameters; training needs more than")
    assert lines[1].startswith("training times by arithmetic, at most about: midtrain ")
    monkeypatch.setattr(preflight, "gpu_memory", lambda: need - 1)
    with pytest.raises(ConfigurationError, match="the GPU has .* of free memory") as error:
        preflight.check_resources(planned, settings, lines.append)
    assert "the stages midtrain" in error.value.why and "llm_lora_rank" in error.value.do
    candidates = pipeline.plan(settings, data, stages=["candidates"])
    preflight.check_resources(candidates, settings, lines.append)  # no stage trains the model
    lora = tiny_settings(tmp_path, eval_rows=["midtrain"], llm_lora_rank=2)
    preflight.check_resources(pipeline.plan(lora, data), lora, lines.append)
    monkeypatch.setattr(preflight, "gpu_memory", lambda: None)
    disk(need)
    preflight.check_resources(planned, settings, lines.append)
    disk(need - 1)
    with pytest.raises(ConfigurationError, match="are free on the disk"):
        preflight.check_resources(planned, settings, lines.append)


def test_times_by_arithmetic_are_those_of_stages_without_an_earlier_run(tiny_settings, tmp_path, data, monkeypatch):
    settings = tiny_settings(tmp_path, eval_rows=["rl"])
    planned, lines = pipeline.plan(settings, data), []
    speed = 6 * model_size(settings).least / 0.2  # of which a fifth is one token a second
    monkeypatch.setattr(preflight, "matrix_speed", lambda bf16: speed)
    (midtrain,) = [entry for entry in planned if entry.stage.name == "midtrain"]
    folder = midtrain.folder.with_name("old")
    folder.mkdir(parents=True)
    record = StageRecord(
        stage="midtrain", key="old", version=1, needs={}, settings=midtrain.settings, seconds=9.0, peak_memory_mb=1.0
    )
    write_manifest(folder, record)
    preflight.check_resources(planned, settings, lines.append)
    rounds = 2 * settings["rl_num_iterations"]
    sft, rl = 4 * settings["sft_batch_size"] * 1024, rounds * 2 * settings["rl_num_generations"] * 1024
    times = f"sft {preflight.duration(sft)}, rl {preflight.duration(rl)}"
    assert f"at most about: {times} (6 operations for each weight and token, at 20% of the speed of" in lines[1]


def test_a_dry_run_fetches_no_model(tiny_settings, tmp_path, data, monkeypatch):
    monkeypatch.setenv("RECBOLE_GR2_CACHE", str(tmp_path))
    settings = tiny_settings(tmp_path, llm="smollm2-135m-instruct")
    lines: list[str] = []
    preflight.check_resources(pipeline.plan(settings, data), settings, lines.append, dry_run=True)
    assert lines == ["memory and disk space of smollm2-135m-instruct are not checked: the first run downloads it"]


def test_a_dry_run_refuses_a_model_that_cannot_be_loaded(tiny_settings, tmp_path, data):
    settings = tiny_settings(tmp_path, llm="no-such/model")  # The tests have no network.
    with pytest.raises(MissingFileError, match="cannot load a language model from 'no-such/model'") as error:
        preflight.check_resources(pipeline.plan(settings, data), settings, [].append, dry_run=True)
    assert "huggingface.co" in error.value.why and error.value.where == "no-such/model"


# --- expected time ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_time_is_that_of_the_earlier_run_with_the_fewest_other_settings(tiny_settings, tmp_path, data, tiny_run):
    def planned(**changes):
        return pipeline.plan(tiny_settings(tmp_path, **changes), data, stages=["tokenizer"])

    assert [preflight.expected_time(entry) for entry in planned()] == ["unknown"] * 2
    assert preflight.expected_total(planned()).startswith("unknown")
    near, far = {"sid_commitment": 0.3}, {"sid_commitment": 0.3, "sid_ema_decay": 0.9, "sid_learning_rate": 0.002}
    for seconds, changes in ((4200, near), (90, far)):
        manifest = tiny_run(tmp_path, ["tokenizer"], data=data, **changes).folders["tokenizer"] / "manifest.json"
        write_json(manifest, {**json.loads(manifest.read_text()), "seconds": seconds})
    embeddings, tokenizer = planned(sid_commitment=0.4)
    assert preflight.expected_time(embeddings) == ""
    assert preflight.expected_time(tokenizer) == "about 70 min (other settings)"
    total = "about 70 min, from the times of earlier runs on this data set"
    assert preflight.expected_total([embeddings, tokenizer]) == total
    again = pipeline.plan(tiny_settings(tmp_path, **near), data, stages=["tokenizer"], from_stage="tokenizer")
    assert preflight.expected_time(again[1]) == "about 70 min"
    scaled = replace(tokenizer, stage=replace(tokenizer.stage, amount="sid_epochs"))
    for epochs, expected in ((20, "about 70 min"), (5, "about 18 min")):  # 20 in the earlier run
        entry = replace(scaled, settings={**scaled.settings, "sid_epochs": epochs})
        assert preflight.expected_time(entry).startswith(expected)
    everything = pipeline.plan(tiny_settings(tmp_path, sid_commitment=0.4), data, stages=["midtrain"])
    assert preflight.expected_total(everything) == f"{total}; without midtrain, which never ran"
    assert preflight.expected_total(planned(**near)) == "none, every stage is finished"


def test_the_time_on_another_data_set_is_named_as_such(tiny_settings, tmp_path, data):
    """That of the most similar run. A damaged manifest is left out."""
    (entry,) = pipeline.plan(tiny_settings(tmp_path), data, stages=["embeddings"])
    other = entry.folder.parents[3] / "films" / "stages" / "embeddings"
    for key, seconds, changes in (("a", 90, {"seed": 1}), ("b", 4200, {}), ("c", 5, None)):
        (other / key).mkdir(parents=True)
        record = StageRecord(
            stage="embeddings",
            key=key,
            version=1,
            needs={},
            settings={**entry.settings, **(changes or {})},
            seconds=seconds,
            peak_memory_mb=1.0,
        )
        write_manifest(other / key, record)
        if changes is None:
            (other / key / "manifest.json").write_text("{")
    assert preflight.expected_time(entry) == "unknown; 70 min on films"
    assert preflight.expected_total([entry]).startswith("unknown")


def test_of_two_runs_the_one_with_nearly_as_much_work_counts(tiny_settings, tmp_path, data):
    planned = pipeline.plan(tiny_settings(tmp_path, rl_steps=40), data, stages=["rl"])
    (entry,) = [each for each in planned if each.stage.name == "rl"]
    for steps, seconds in ((20, 1200), (4, 500), (400, 20_000)):  # 60, 125 and 50 seconds a round
        folder = entry.folder.with_name(str(steps))
        folder.mkdir(parents=True)
        settings = {**entry.settings, "rl_steps": steps}
        record = StageRecord(
            stage="rl", key=str(steps), version=1, needs={}, settings=settings, seconds=seconds, peak_memory_mb=1.0
        )
        write_manifest(folder, record)
    assert preflight.expected_time(entry) == "about 40 min (other settings)"


@pytest.mark.parametrize(("hidden", "expected"), [(32, "about 70 min"), (64, "unknown")])
def test_the_time_of_another_language_model_does_not_count(tiny_settings, tmp_path, data, hidden, expected):
    """The earlier run of `sft` read a model that mid-training had loaded."""
    planned = pipeline.plan(tiny_settings(tmp_path), data, stages=["sft"])
    entries = {entry.stage.name: entry for entry in planned}
    model = {**entries["midtrain"].settings["llm_random"], "hidden_size": hidden}
    for name, needs, changes in (("midtrain", {}, {"llm_random": model}), ("sft", {"midtrain": "old"}, {})):
        folder = entries[name].folder.parent / "old"
        folder.mkdir(parents=True)
        settings = {**entries[name].settings, **changes}
        write_manifest(
            folder,
            StageRecord(
                stage=name, key="old", version=1, needs=needs, settings=settings, seconds=4200, peak_memory_mb=1.0
            ),
        )
    for name in ("midtrain", "sft"):
        assert preflight.expected_time(entries[name], planned) == expected


def test_a_dry_run_checks_everything_and_leaves_nothing(tiny_data, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert command(tiny_data, tmp_path / "saved", "--dry_run", "--eval_rows=[sft]") == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "expected time: unknown" in captured.err
    assert "preset smoke: All stages in two minutes with a small random language model." in captured.err
    (header,) = [line for line in captured.err.splitlines() if line.startswith("stage ")]
    assert header.split() == ["stage", "key", "plan", "time", "why"]
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]
