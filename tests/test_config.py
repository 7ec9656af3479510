"""Settings: where a value comes from, what is refused, and what reaches RecBole."""

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from recbole_gr2 import config
from recbole_gr2.config import TYPES, declarations, load_settings, properties_folder, read_yaml, recbole_config
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.quick_start import main, parse

SMOKE = {"preset": "smoke"}


def problems(**settings) -> str:
    with pytest.raises(ConfigurationError) as error:
        load_settings(config_dict={**SMOKE, **settings})
    return str(error.value)


# --- where a value comes from ----------------------------------------------------------------------------------------


def test_precedence(tmp_path, monkeypatch):
    folder = tmp_path / "properties"
    shutil.copytree(properties_folder(), folder)
    for kind, name in (("dataset", "amazon-beauty"), ("preset", "laptop")):
        (folder / kind / f"{name}.yaml").write_text("")
    files = [tmp_path / "first.yaml", tmp_path / "second.yaml"]
    for file in files:
        file.write_text("")
    monkeypatch.setattr(config, "properties_folder", lambda: folder)

    def value(**layers):
        settings = load_settings(
            config_dict={"dataset": "amazon-beauty", "preset": "laptop", **layers.get("config_dict", {})},
            command_line=layers.get("command_line"),
            config_files=files,
        )
        return settings["rl_steps"], settings.origin["rl_steps"]

    default = declarations()["rl_steps"].default
    assert value() == (default, "properties")
    (folder / "dataset" / "amazon-beauty.yaml").write_text("rl_steps: 101")
    assert value() == (101, "dataset/amazon-beauty.yaml")
    (folder / "preset" / "laptop.yaml").write_text("rl_steps: 102")
    assert value() == (102, "preset/laptop.yaml")
    files[0].write_text("rl_steps: 103")
    assert value() == (103, str(files[0]))
    files[1].write_text("rl_steps: 104")
    assert value() == (104, str(files[1]))
    assert value(config_dict={"rl_steps": 105}) == (105, "config_dict")
    assert value(config_dict={"rl_steps": 105}, command_line={"rl_steps": 106}) == (106, "command line")


def test_a_config_file_may_choose_preset_and_data_set(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: smoke\ndataset: amazon-beauty\n")
    settings = load_settings(config_files=[file])
    assert (settings["preset"], settings["llm"], settings["text_brand"]) == ("smoke", "random", "brand")
    assert load_settings(config_files=[file], command_line={"preset": "gpu"})["preset"] == "gpu"


def test_without_a_preset_the_machine_chooses(monkeypatch):
    import torch

    for gpu, preset in ((True, "gpu"), (False, "laptop")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert load_settings()["preset"] == preset


def test_missing_files_and_presets():
    with pytest.raises(MissingFileError, match="nowhere.yaml"):
        load_settings(config_files=["nowhere.yaml"])
    with pytest.raises(ConfigurationError, match="no preset named 'huge'") as error:
        load_settings(config_dict={"preset": "huge"})
    assert "laptop" in error.value.do


# --- what is refused -------------------------------------------------------------------------------------------------


def test_all_problems_together_with_the_nearest_names():
    text = problems(rl_epsilon_hi=0.3, sid_code=256, mid_tokens="many", seed=1.5, totally_else=1)
    assert "unknown key 'rl_epsilon_hi'; nearest: rl_epsilon_high" in text
    assert "unknown key 'sid_code'; nearest: sid_codes" in text
    assert "mid_tokens is 'many', expected int" in text
    assert "seed is 1.5, expected int" in text
    assert "unknown key 'totally_else'" in text


@pytest.mark.parametrize(
    ("key", "wrong", "expected"),
    [
        ("cand_num", True, "int"),
        ("cand_num", None, "int"),
        ("cand_num", 10.0, "int"),
        ("rl_temperature", "hot", "float"),
        ("rl_temperature", False, "float"),
        ("cand_exclude_seen", 1, "bool"),
        ("cand_exclude_seen", "yes", "bool"),
        ("topk", 10, "list"),
        ("mid_mix", ["sequential"], "dict"),
        ("prompt_template", ["rerank"], "str"),
        ("eval_max_lists", "all", "int or nothing (~)"),
    ],
)
def test_wrong_types(key, wrong, expected):
    assert f"{key} is {wrong!r}, expected {expected}" in problems(**{key: wrong})


def test_types_that_are_converted():
    settings = load_settings(config_dict={**SMOKE, "rl_temperature": 1, "eval_max_lists": None, "gpu_id": 1})
    assert settings["rl_temperature"] == 1.0 and isinstance(settings["rl_temperature"], float)
    assert settings["eval_max_lists"] is None
    assert settings["gpu_id"] == "1"


# --- ours, RecBole's, the base model's -------------------------------------------------------------------------------


def test_a_training_word_alone_names_the_alternatives():
    text = problems(learning_rate=0.1)
    assert "learning_rate is ambiguous" in text and "base_learning_rate" in text and "sft_learning_rate" in text


def test_base_words_reach_the_base_model_and_argv_does_not(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_recbole_gr2.py", "--learning_rate=9", "--hidden_size=9", "--seed=9"])
    settings = load_settings(
        config_dict={**SMOKE, "base_model": "SASRec", "base_learning_rate": 0.0077, "base_hidden_size": 32}
    )
    built = recbole_config(settings, "SASRec", loss_type="CE")
    assert (built["learning_rate"], built["hidden_size"], built["seed"]) == (0.0077, 32, 2020)
    assert settings["sft_learning_rate"] != 0.0077 and "learning_rate" not in settings


def test_a_base_word_goes_before_the_same_word_for_all():
    settings = load_settings(config_dict={**SMOKE, "base_MAX_ITEM_LIST_LENGTH": 20, "MAX_ITEM_LIST_LENGTH": 30})
    assert recbole_config(settings, "SASRec", loss_type="CE")["MAX_ITEM_LIST_LENGTH"] == 20


def test_base_words_are_those_of_the_base_model():
    assert "unknown key 'base_n_layers'" in problems(base_model="BPR", base_n_layers=3)
    assert load_settings(config_dict={**SMOKE, "base_model": "BPR", "base_embedding_size": 8})


def test_the_plugins_own_base_model_brings_its_defaults():
    from recbole_gr2.bridge.models import find_model

    built = recbole_config(load_settings(config_dict=SMOKE), find_model("CausalSASRec"))
    ours = read_yaml((properties_folder() / "model" / "CausalSASRec.yaml").read_text())
    assert built["hidden_dropout_prob"] == ours["hidden_dropout_prob"]
    assert built["learning_rate"] == ours["learning_rate"]
    assert built["epochs"] == 3  # the preset's base_epochs


def test_nothing_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = "__import__('os').system('touch owned')"
    settings = load_settings(
        config_dict={**SMOKE, "wandb_project": evil, "base_hidden_act": evil},
        command_line=parse([f"--trace_teacher={evil}", "--base_initializer_range=1e-4"])[1],
    )
    assert settings["trace_teacher"] == evil
    built = recbole_config(settings, "SASRec", loss_type="CE")
    assert built["wandb_project"] == evil and built["hidden_act"] == evil
    assert built["initializer_range"] == 1e-4
    assert not (tmp_path / "owned").exists()


def test_yaml_numbers():
    assert read_yaml("[1e-4, 5E3, -1e-4, 1.5e+3, .5, 1., 10, -3]") == [1e-4, 5e3, -1e-4, 1500.0, 0.5, 1.0, 10, -3]
    assert read_yaml("[1e, e4, 1.2.3, '1e-4']") == ["1e", "e4", "1.2.3", "1e-4"]


# --- the property files ----------------------------------------------------------------------------------------------


def test_every_key_is_documented():
    known = declarations()
    assert len(known) > 60
    for key, entry in known.items():
        where = f"{entry.file}:{entry.line} {key}"
        assert entry.type in TYPES.values(), where
        assert len(entry.text) > 10 and entry.text.endswith("."), where
        assert entry.check(entry.default) == entry.default, where


def test_an_undocumented_or_untyped_key_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "properties"
    shutil.copytree(properties_folder(), folder)
    monkeypatch.setattr(config, "properties_folder", lambda: folder)
    file = folder / "stage" / "rl.yaml"
    text = file.read_text()
    file.write_text(text + "\nrl_new: 3\n")
    with pytest.raises(ConfigurationError, match="rl_new"):
        declarations()
    file.write_text(text + "\nrl_new: 3  # (number) A new key.\n")
    with pytest.raises(ConfigurationError, match=r"unreadable type \(number\)"):
        declarations()


def test_errors_name_settings_that_exist():
    known = declarations()
    word, named = re.compile(r"\b(?:cand|distill|eval|llm|mid|ort|prior|prompt|rl|sft|sid|trace)_[a-z_]+\b"), {}
    for file in Path(config.__file__).parent.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
        for argument in (keyword for call in calls for keyword in call.keywords if keyword.arg in ("where", "do")):
            for part in ast.walk(argument.value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    named |= dict.fromkeys(word.findall(part.value), f"{file.name}:{part.lineno}")
    assert len(named) > 30
    assert {key: place for key, place in named.items() if key not in known} == {}


@pytest.mark.parametrize("preset", ["smoke", "laptop", "gpu", "paper"])
def test_presets_have_known_keys(preset):
    assert load_settings(config_dict={"preset": preset})["preset"] == preset


def test_no_preset_is_left_out():
    assert {file.stem for file in (properties_folder() / "preset").iterdir()} == {"smoke", "laptop", "gpu", "paper"}


def test_data_set_and_model_files_have_known_keys():
    datasets = sorted((properties_folder() / "dataset").glob("*.yaml"))
    models = sorted((properties_folder() / "model").glob("*.yaml"))
    assert len(datasets) >= 3 and {"CausalSASRec", "TIGER"} <= {file.stem for file in models}
    for file in datasets:
        load_settings(config_dict={**SMOKE, "dataset": file.stem})
    for file in models:
        load_settings(config_dict={**SMOKE, "base_model": file.stem})
        theirs = config.recbole_properties() / "model" / f"{file.stem.removeprefix('Causal')}.yaml"
        if theirs.is_file():
            words = set(read_yaml(theirs.read_text()))
        else:  # a model that RecBole does not have: what its class reads
            source = Path(config.__file__).parent / "model" / f"{file.stem.lower()}.py"
            words = set(re.findall(r'config\["(\w+)"\]', source.read_text()))
        assert set(read_yaml(file.read_text())) <= words | config.RECBOLE_TRAINING


def test_every_recbole_word_of_ours_means_the_same_there():
    ours = {key for key in declarations() if key in config.recbole_words()}
    assert {"seed", "topk", "metrics", "valid_metric", "eval_args", "eval_batch_size"} <= ours
    settings = load_settings(config_dict={**SMOKE, "topk": [2, 4], "valid_metric": "MRR@4", "eval_batch_size": 77})
    built = recbole_config(settings, "SASRec", loss_type="CE")
    assert (built["topk"], built["valid_metric"], built["eval_batch_size"]) == ([2, 4], "MRR@4", 77)


# --- a config file that reproduces a run -----------------------------------------------------------------------------


def test_as_yaml_round_trip(tmp_path):
    given = {
        **SMOKE,
        "base_learning_rate": 1e-4,
        "user_inter_num_interval": "[5,inf)",
        "rl_rewards": {"ndcg": 1.0},
        "base_hidden_size": 32,
        "topk": [3, 9],
        "text_title": "movie_title",
        "base_seed": 7,
        "seed": 8,
    }
    settings = load_settings(config_dict=given)
    file = tmp_path / "config.yaml"
    file.write_text(settings.as_yaml())
    again = load_settings(config_files=[file])
    assert dict(again) == dict(settings)
    assert again.recbole == settings.recbole
    assert again.recbole["seed"] == 7 and again["seed"] == 8
    assert again.as_yaml() == settings.as_yaml()
    assert yaml.safe_load(settings.as_yaml())["base_learning_rate"] == 1e-4


def test_speed_settings_are_in_no_result():
    settings = load_settings(config_dict=SMOKE)
    everything = settings.results([""])
    speed = {key for key, entry in declarations().items() if entry.speed}
    assert {"eval_batch_lists", "rl_save_steps", "data_path"} <= speed
    assert not speed & set(everything) and len(everything) > 50
    assert not config.RECBOLE_SPEED & set(settings.recbole_results())
    assert "eval_batch_size" in settings.recbole and "metrics" in settings.recbole_results()


# --- the command line ------------------------------------------------------------------------------------------------


def test_both_ways_to_write_a_setting():
    options, settings = parse(
        [
            "-d",
            "ml-100k",
            "--seed=3",
            "--rl_steps",
            "7",
            "--rl_rewards={ndcg: 1e-1}",
            "--topk",
            "[1, 2]",
            "--eval_max_lists=",
            "--llm=~",
            "--base_model",
            "BPR",
            "--stages",
            "sft,rl",
            "--rl_temperature",
            "-1",
            "--dry_run",
        ]
    )
    assert settings == {
        "dataset": "ml-100k",
        "base_model": "BPR",
        "seed": 3,
        "rl_steps": 7,
        "rl_rewards": {"ndcg": 0.1},
        "topk": [1, 2],
        "eval_max_lists": None,
        "llm": None,
        "rl_temperature": -1,
    }
    assert options.dry_run and options.stages == "sft,rl" and not options.force


@pytest.mark.parametrize("argv", [["rl_steps=3"], ["--rl_steps"], ["--rl_steps", "--force"], ["stray", "--seed=1"]])
def test_words_that_are_no_setting(argv):
    with pytest.raises(ConfigurationError, match="cannot read"):
        parse(argv)


def test_a_setting_with_a_blank_behind_config_files():
    options, settings = parse(["--config_files", "mine.yaml", "--eval_rows=[midtrain, sft]"])
    assert options.config_files == ["mine.yaml"] and settings == {"eval_rows": ["midtrain", "sft"]}


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--sed=1"], 2, "unknown key 'sed'; nearest: seed"),
        (["--seed=one"], 2, "seed is 'one', expected int"),
        (["--learning_rate=0.1"], 2, "base_learning_rate"),
        (["-m", "SASRec"], 2, "--base_model SASRec"),
        (["--base_model=Nobody", "--stages=candidates"], 2, "no model named 'Nobody'"),
        (["--stages=candidate"], 2, "no stage named 'candidate'"),
        (["--from_stage=candidate"], 2, "no stage named 'candidate'"),
        (["--config_files", "nowhere.yaml"], 4, "nowhere.yaml"),
        (["--dataset=nowhere"], 4, "--data_path DIR"),
        (["--prompt_template=nowhere", "--dry_run"], 4, "no prompt template"),
    ],
)
def test_exit_codes(argv, code, text, capsys, tmp_path):
    assert main(["--preset=smoke", f"--checkpoint_dir={tmp_path}", *argv]) == code
    captured = capsys.readouterr()
    assert text in captured.err and captured.out == ""


@pytest.mark.parametrize("word", ["SASRec,Pop", "SASRec, Pop", "[SASRec, Pop]", "['SASRec', 'Pop']"])
def test_models_on_the_command_line(word):
    from recbole_gr2.quick_start import parse

    assert parse(["--models", word])[1]["models"] == ["SASRec", "Pop"]
    assert parse([f"--models={word}"])[1]["models"] == ["SASRec", "Pop"]
    assert parse(["--models", "Pop"])[1]["models"] == ["Pop"]
