"""A run that is killed in every stage ends with the files of one that is not. Settings that are read are in keys."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pages import logged_keys
from safetensors.torch import load_file

from recbole_gr2 import pipeline
from recbole_gr2.bridge.data import Data
from recbole_gr2.config import Settings
from recbole_gr2.console import Console
from recbole_gr2.llm.model import load_saved
from recbole_gr2.llm.train import ProgressLines
from recbole_gr2.rerankers.registry import RERANKERS

OPTIONS = {
    "eval_rows": list(RERANKERS),
    "models": ["BPR", "Pop"],
    "models_options": {"epochs": 1},
    "llm_save_steps": 2,
    "rl_save_steps": 1,
    "sft_steps": 6,
    "score_steps": 6,
    "rl_steps": 3,
    "distilled_steps": 3,
    "onerec_think_steps": 6,
    "mid_tokens": 6000,
}
FASTER = {"llm_save_steps": 4, "rl_save_steps": 2, "eval_batch_size": 2048, "eval_batch_lists": 7}  # same results
TRAINED = (
    "midtrain",
    "sft",
    "score",
    "rl",
    "distilled",
    "internalised",
    "onerec_think",
    "onerec_think-no-think",
)
COMPARED = {".safetensors", ".json", ".jsonl", ".npy", ".npz", ".csv", ".txt", ".md"}

pytestmark = pytest.mark.slow


class Recorded(Settings):
    """Settings that remember which of them were read by which stage."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        self.read.setdefault(self.stage, set()).add(key)
        return value


@pytest.fixture(scope="module")
def uninterrupted(tiny_settings, tmp_path_factory):
    """(settings as read, plan, data) of a run with other speed settings."""
    recorded = copy.copy(tiny_settings(tmp_path_factory.mktemp("whole"), **{**OPTIONS, **FASTER}))
    recorded.__class__, recorded.stage, recorded.read = Recorded, "", {}
    data = Data(recorded)

    def watched(stage):
        def run(context):
            recorded.stage = stage.name
            return stage.run(context)

        return replace(stage, run=run)

    planned = pipeline.plan(recorded, data)
    assert {entry.action for entry in planned} == {"run"}
    watching = [replace(entry, stage=watched(entry.stage)) for entry in planned]
    pipeline.execute(watching, recorded, data, Console())
    recorded.stage = ""
    return recorded, planned, data


@pytest.fixture(scope="module")
def killed(uninterrupted, tiny_settings, tmp_path_factory):
    """(stage -> first step after the kill, plan) of the same run, killed once in each of its stages.

    Stages that train a language model are killed after a checkpoint, the others before their manifest is written.
    """
    _, whole, data = uninterrupted
    settings = tiny_settings(tmp_path_factory.mktemp("killed"), **OPTIONS)
    first_steps: dict[str, int] = {}
    write_manifest, on_log = pipeline.write_manifest, ProgressLines.on_log
    for previous, stage in zip(
        [None, *(entry.stage.name for entry in whole)], [*(e.stage.name for e in whole), None], strict=True
    ):

        def stop_manifest(folder, record, stage=stage):
            if record.stage == stage:
                raise KeyboardInterrupt
            write_manifest(folder, record)

        def stop_training(self, args, state, control, stage=stage, previous=previous, **kwargs):
            phase_1 = "embeddings" in args.output_dir
            if previous is not None and f"/{previous}/" in args.output_dir and not phase_1:
                first_steps.setdefault(previous, state.global_step)
            if f"/{stage}/" in args.output_dir and state.global_step >= 3 and not phase_1:
                raise KeyboardInterrupt
            return on_log(self, args, state, control, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "write_manifest", stop_manifest)
            patch.setattr(ProgressLines, "on_log", stop_training)
            planned = pipeline.plan(settings, data)
            actions = {entry.stage.name: entry.action for entry in planned}
            assert previous is None or actions[previous] == "resume"
            if stage is None:
                pipeline.execute(planned, settings, data, Console())
            else:
                with pytest.raises(KeyboardInterrupt):
                    pipeline.execute(planned, settings, data, Console())
    return first_steps, pipeline.plan(settings, data)


def without_times(logged):
    """What log.json contains: lines, or lines by the part of the stage."""
    if isinstance(logged, dict):
        return {part: without_times(lines) for part, lines in logged.items()}
    return [{name: value for name, value in line.items() if name != "step_time"} for line in logged]


def assert_same(one: Path, two: Path) -> None:
    if one.suffix == ".safetensors":
        left, right = load_file(one), load_file(two)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), one
    elif one.name == "log.json":
        assert without_times(json.loads(one.read_text())) == without_times(json.loads(two.read_text())), one
    else:
        assert one.read_bytes() == two.read_bytes(), one


def test_a_killed_run_ends_as_one_that_was_not(uninterrupted, killed):
    _, whole, _ = uninterrupted
    _, again = killed
    assert [entry.action for entry in again] == ["cached"] * len(whole)
    compared = 0
    for one, two in zip(whole, again, strict=True):
        assert one.key == two.key and one.stage.name == two.stage.name
        record = pipeline.read_manifest(one.folder)
        assert record.files.keys() == pipeline.read_manifest(two.folder).files.keys()
        for name in record.files:
            if Path(name).suffix in COMPARED:
                assert_same(one.folder / name, two.folder / name)
                compared += 1
        assert not (two.folder / pipeline.CLOCK).exists() and len(list(two.folder.parent.iterdir())) == 1
    assert compared > 50


def test_every_logged_value_is_documented_and_the_other_way_round(uninterrupted):
    _, planned, _ = uninterrupted
    logged: set[str] = set()
    for entry in planned:
        if entry.stage.name in TRAINED:
            log = json.loads((entry.folder / "log.json").read_text())
            parts = log.values() if isinstance(log, dict) else [log]
            logged |= {name for lines in parts for line in lines for name in line}
    assert logged - logged_keys() == set()
    assert logged_keys() - logged == {"kl", "reward/rollout_beam"}  # of the variant `paper`, see test_onerec_think.py


def test_training_continues_from_its_checkpoints(killed):
    """Otherwise a run that starts from the beginning would pass the comparison, too."""
    first_steps, _ = killed
    assert set(TRAINED) <= set(first_steps) and all(first_steps[stage] >= 3 for stage in TRAINED)


def test_every_setting_that_a_stage_reads_is_in_its_key(uninterrupted):
    """Otherwise a changed setting would be answered from the cache."""
    settings, planned, _ = uninterrupted
    always = {"dataset", "checkpoint_dir", "data_path", "preset"}  # in the path of the folder, or without effect
    # PromptMaker.of reads these, but the texts of mid-training do not depend on them; `models` are needs of evaluate.
    harmless = {("midtrain", "prompt_history"), ("midtrain", "prompt_shuffle"), ("evaluate", "models")}
    harmless |= {("midtrain", "prompt_template")}  # in the key as the hash of all templates
    harmless |= {("candidates", "cand_num")}  # in the key as the size of the pool
    harmless |= {("prior", "cand_ranker")}  # in the key if LambdaMART selects candidates, which only then is fitted
    harmless |= {("midtrain_all", setting) for stage, setting in harmless if stage == "midtrain"}
    speed = {key for key, entry in settings.declared.items() if entry.speed}
    covered: dict[str, set[str]] = {}
    for entry in planned:
        keys = {key.removeprefix("recbole.") for key in entry.settings} | always
        covered[entry.stage.name] = keys.union(*(covered[need] for need in entry.needs))
    assert set(settings.read) >= set(covered) and sum(map(len, settings.read.values())) > 60
    harmless |= {(name, "eval_split") for name in covered}  # in the key if it is not test, see test_eval_split.py
    harmless |= {(name, "prompt_items") for name in covered}  # in the key if it is not text, see test_prompts.py
    # In the fingerprint of the data, see test_scale.py, and in the key if it is not transformers, see test_engines.py.
    harmless |= {(name, setting) for name in covered for setting in ("max_requests", "llm_engine")}
    missing = {(name, key) for name in covered for key in settings.read[name] - covered[name] - speed}
    assert missing <= harmless, missing - harmless


def test_a_model_folder_can_be_moved(killed, tmp_path):
    """No file in it contains an absolute path."""
    _, planned = killed
    (folder,) = [entry.folder for entry in planned if entry.stage.name == "sft"]
    model, tokenizer = load_saved(shutil.copytree(folder / "model", tmp_path / "model"))
    assert model.get_input_embeddings().weight.size(0) == len(tokenizer)


def test_an_internalised_answer_consists_of_the_ranking(uninterrupted):
    from recbole_gr2.store import read_lines

    settings, planned, _ = uninterrupted
    (folder,) = [entry.folder for entry in planned if entry.stage.name == "rerank_internalised"]
    answers = list(read_lines(folder / "rankings.jsonl"))
    assert {line["output_tokens"] for line in answers} == {1 + settings["cand_num"] + 1}  # mark, labels, end
    assert {(line["reasoning"], line["status"]) for line in answers} == {("", "ok")}
    first_slots = pipeline.read_manifest(folder).summary["promoted_from_slot"]
    assert len(first_slots) > 1 and sum(first_slots.values()) == len(answers)


def test_other_recommenders_are_evaluated_on_all_users(uninterrupted):
    from recbole_gr2.artifacts import read_recommendations

    _, planned, _ = uninterrupted
    folders = {entry.stage.name: entry.folder for entry in planned}
    summary = pipeline.read_manifest(folders["evaluate"]).summary
    methods = {(entry["method"], entry["scope"]): entry for entry in summary["methods"]}
    base = methods["base", "all_users"]
    for name in ("BPR", "Pop"):
        assert (name, "hit_users") not in methods
        entry, recommended = methods[name, "all_users"], read_recommendations(folders[name])
        ranks = recommended.target_rank
        assert entry["n"] == len(ranks) == len(set(recommended.users)) == base["n"] and entry["unchanged"] is None
        for k in (1, 5, 10):  # RecBole's metrics agree with the ranks
            hits = ((ranks > 0) & (ranks <= k)).mean()
            assert entry["metrics"][f"recall@{k}"] == pytest.approx(hits, abs=6e-5)
        difference = entry["metrics"]["recall@5"] - base["metrics"]["recall@5"]
        assert entry["vs_base"]["recall@5"]["diff"] == pytest.approx(difference, abs=1.1e-4)
        assert entry["vs_base"]["recall@5"]["p_holm"] >= entry["vs_base"]["recall@5"]["p"]
