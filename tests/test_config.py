"""Settings: where a value comes from, what is refused, and what reaches RecBole."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recbole_gr2.config import (
    declarations,
    load_settings,
    properties_folder,
    read_declarations,
    read_yaml,
    recbole_config,
    recbole_models,
    recbole_properties,
)
from recbole_gr2.config.declaration import CUSTOM, PACKAGE, TYPES, check_option, recbole_declarations, speed_settings
from recbole_gr2.config.page import settings_page
from recbole_gr2.config.recbole_options import (
    RECBOLE_FIXED,
    RECBOLE_TRAINING,
    candidate_models,
    model_declarations,
    recbole_options,
)
from recbole_gr2.config.renamed import REMOVED, RENAMED, RENAMED_VALUES
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.quick_start import main, parse

SMOKE = {"preset": "smoke"}
ROOT = Path(__file__).resolve().parent.parent


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
    monkeypatch.setattr("recbole_gr2.config.declaration.PACKAGE", tmp_path)

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


def test_a_file_in_the_folder_of_a_data_set_has_its_properties(tmp_path):
    """It replaces the package's file of this data set, and presets, files and the command line override it."""
    folder = tmp_path / "amazon-beauty"
    folder.mkdir()
    (folder / "other.yaml").write_text("text_brand: other")
    here = {"data_path": str(tmp_path), "dataset": "amazon-beauty"}
    package = load_settings(config_dict={**SMOKE, **here})
    assert package["text_brand"] == "brand" and package.origin["text_brand"] == "dataset/amazon-beauty.yaml"
    own = folder / "amazon-beauty.yaml"
    own.write_text("text_title: name\ncand_num: 7\nsid_epochs: 3\n")
    settings = load_settings(config_dict={**SMOKE, **here}, command_line={"cand_num": 8})
    assert settings["text_title"] == "name" and settings.origin["text_title"] == str(own)
    assert settings["text_brand"] is None and "user_inter_num_interval" not in settings.recbole
    assert settings["cand_num"] == 8 and settings.origin["sid_epochs"] == "preset/smoke.yaml"
    assert load_settings(config_dict={**SMOKE, **here, "data_path": "elsewhere"})["text_title"] == "title"
    own.write_text("text_titel: name")
    with pytest.raises(ConfigurationError, match="nearest: text_title") as error:
        load_settings(config_dict={**SMOKE, **here})
    assert str(own) in str(error.value)


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


def test_missing_files_and_presets_name_the_nearest(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere.yaml"):
        load_settings(config_files=["nowhere.yaml"])
    (tmp_path / "settings.yaml").write_text("")
    with pytest.raises(MissingFileError, match="no config file") as missing:
        load_settings(config_files=[tmp_path / "setting.yaml"])
    assert f"did you mean {tmp_path / 'settings.yaml'}?" in missing.value.do
    for preset, names in (("huge", ""), ("Laptops", "did you mean laptop? "), (["gpu"], "did you mean gpu? ")):
        with pytest.raises(ConfigurationError, match="no preset named") as error:
            load_settings(config_dict={"preset": preset})
        assert error.value.do == f"{names}Choose from gpu, laptop, paper, quick, smoke"


def test_settings_are_checked_before_torch_is_imported():
    code = """
import sys
from recbole_gr2.config import load_settings
from recbole_gr2.errors import ConfigurationError
for settings in ({"trace_mode": "guess"}, {"trace_mode": "guess", "preset": "gpu"}, {"preset": "huge"}):
    try:
        load_settings(config_dict=settings)
    except ConfigurationError:
        pass
    else:
        sys.exit("no error")
load_settings(config_dict={"preset": "gpu"})
sys.exit("torch was imported" if "torch" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what is refused -------------------------------------------------------------------------------------------------


def test_all_problems_together_with_the_nearest_names():
    text = problems(rl_epsilon_hi=0.3, sid_code=256, mid_tokens="many", seed=1.5, totally_else=1)
    assert "unknown key 'rl_epsilon_hi'; nearest: rl_epsilon_high" in text
    assert "unknown key 'sid_code'; nearest: sid_codes" in text
    assert "config_dict: mid_tokens is 'many', expected int >= 1" in text
    assert "config_dict: seed is 1.5, expected int >= 0" in text
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
        ("eval_max_lists", "all", "int >= 1 or nothing (~)"),
        ("llm_layers", [0, "last"], "list of int >= 0 or nothing (~)"),
        ("llm_bf16", "no", "bool or nothing (~)"),
    ],
)
def test_wrong_types(key, wrong, expected):
    assert f"{key} is {wrong!r}, expected {expected}" in problems(**{key: wrong})


@pytest.mark.parametrize(
    ("key", "wrong", "expected"),
    [
        ("cand_num", 1, "int 2 to 26"),
        ("cand_num", 27, "int 2 to 26"),
        ("rl_num_generations", 1, "int >= 2"),
        ("onerec_think_rl_num_generations", 1, "int >= 2"),
        ("rl_temperature", 0, "float 0.01 to 100"),
        ("rl_temperature", float("nan"), "float 0.01 to 100"),
        ("prompt_llm_weight", 0.0, "float > 0"),
        ("prompt_max_reasoning", -5, "int >= 0"),
        ("prompt_history", -1, "int >= 0"),
        ("trace_max_lists", 0, "int >= 1 or nothing (~)"),
        ("eval_max_lists", 0, "int >= 1 or nothing (~)"),
        ("eval_draws", 50, "int >= 100"),
        ("sft_steps", 0, "int >= 1"),
        ("prior_fits", 0, "int >= 1"),
        ("sid_levels", 1, "int 2 to 26"),
        ("sid_levels", 27, "int 2 to 26"),
        ("sid_ema_decay", 1.0, "float >= 0, < 1"),
        ("sid_min_unique", 1.01, "float 0 to 1"),
        ("rl_epsilon_low", 0.0, "float > 0, <= 1"),
        ("MAX_ITEM_LIST_LENGTH", 0, "int >= 1"),
        ("topk", [5, 0], "list of int >= 1"),
        ("mid_mix", {"sequential": -1.0}, "dict of float >= 0"),
        ("trace_price", {"prompt": "free"}, "dict of float >= 0"),
        ("base_n_layers", 0, "int >= 1"),
        *(
            (f"{prefix}_batch_size", 0, "int >= 1")
            for prefix in ("mid", "sft", "score", "onerec_think", "sid", "llm_micro", "eval")
        ),
    ],
)
def test_values_out_of_range(key, wrong, expected):
    assert f"config_dict: {key} is {wrong!r}, expected {expected}" in problems(**{key: wrong})


@pytest.mark.parametrize(
    ("key", "near", "choices"),
    [
        ("trace_mode", "target", "targeted, rejection"),
        ("rl_start", "distil", "sft, distilled"),
        ("onerec_think_variant", "papers", "public, paper"),
        ("eval_scope", "all_user", "hit_users, all_users"),
        ("eval_split", "tests", "test, valid"),
        ("eval_comparisons", "al", "declared, all"),
        ("text_missing", "tokens", "collaborative, token"),
        ("sid_method", "rqvea", "rqvae, rqkmeans"),
        ("sid_random_mode", "uniformly", "unused_first, uniform"),
        ("cand_fusion", "zscor", "zscore, rank, quota"),
        ("cand_ranker", "priors", "prior, lambdamart, none"),
        ("score_loss", "pair", "listwise, pairwise"),
        ("prompt_items", "texts", "text, short, sid, vector"),
        ("llm_engine", "transformer", "transformers, vllm"),
        ("trace_teacher", "rule", "rules, local_llm, openai_api, recorded, module:attribute"),
    ],
)
def test_choices(key, near, choices):
    text = problems(**{key: near})
    assert f"{key} is {near!r}, expected one of {choices}; did you mean " in text
    for choice in choices.split(", "):
        needed = {"eval_rows": ["score"]} if choice == "vector" else {"trace_file": "traces.jsonl"}
        assert load_settings(config_dict={**SMOKE, **needed, key: choice})[key] == choice


def test_all_choices_are_tested():
    limited = {key for key, entry in declarations().items() if entry.choices}
    tested = next(mark for mark in test_choices.pytestmark if mark.name == "parametrize").args[1]
    assert limited == {key for key, *_ in tested} | {"eval_rows", "prior_features", "report_to"}


def test_the_choices_of_lists_are_the_built_in_objects():
    from recbole_gr2.features.providers import PROVIDERS
    from recbole_gr2.rerankers.registry import RERANKERS

    for key, builtin in (("eval_rows", RERANKERS), ("prior_features", PROVIDERS)):
        assert declarations()[key].choices == (*builtin, CUSTOM)
    assert "eval_rows has 'stf', expected one of lambdamart, " in problems(eval_rows=["sft", "stf"])
    assert problems(eval_rows=["stf"]).count("did you mean sft") == 1
    assert "prior_features has 'popularty'" in problems(prior_features=["popularty", "mine:feature"])
    assert load_settings(config_dict={**SMOKE, "eval_rows": ["mine:rank", "file:x.jsonl"]})
    assert "report_to has 'tensorbord', expected one of tensorboard, " in problems(report_to=["tensorbord"])


def test_candidate_lists_have_a_label_for_each_candidate():
    from recbole_gr2.sid.tokens import MAX_CANDIDATES

    assert declarations()["cand_num"].high == MAX_CANDIDATES


def test_a_choice_may_be_an_attribute_of_a_module():
    assert CUSTOM in declarations()["trace_teacher"].choices
    assert load_settings(config_dict={**SMOKE, "trace_teacher": "mine:Teacher"})["trace_teacher"] == "mine:Teacher"
    assert "trace_mode is 'mine:mode'" in problems(trace_mode="mine:mode")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mid_mix": {}}, "mid_mix is {}, expected at least one share > 0"),
        ({"mid_mix": {"caption": 0}}, "expected at least one share > 0"),
        ({"mid_mix": {"poems": 1.0}}, "mid_mix has unknown tasks ['poems'], expected sequential, "),
        ({"trace_price": {"promt": 0.1}}, "trace_price has unknown keys ['promt'], expected prompt, completion"),
        ({"metrics": ["Recal"]}, "metrics has an unknown metric 'Recal'; nearest: Recall"),
        (
            {"valid_metric": "NDGC@7"},
            "valid_metric is 'NDGC@7', expected a metric and a cut-off such as NDCG@10",
        ),
        ({"valid_metric": "MAP@x"}, "valid_metric is 'MAP@x'"),
        ({"topk": []}, "topk is []"),
        ({"trace_temperature": 1e-300}, "trace_temperature is 1e-300, expected 0 or at least 0.01"),
        ({"onerec_think_temperature": 0.001}, "expected 0 or at least 0.01: logits would overflow"),
        ({"prompt_template": "rerank-kp"}, "no prompt template 'rerank-kp'; nearest: rerank-nokp, rerank, or the path"),
        ({"prompt_template": "rerank.yaml"}, "no prompt template 'rerank.yaml'"),
        ({"sid_levels": 3, "sid_random_last": 3}, "sid_random_last is 3, expected less than sid_levels (3)"),
        ({"prompt_max_reasoning": 8}, "rl_overlong_buffer is 16, expected at most prompt_max_reasoning (8)"),
    ],
)
def test_combinations(given, message):
    assert message in problems(**given)


def test_permitted_combinations():
    for given in (
        {"prompt_max_reasoning": 0},
        {"prompt_template": str(properties_folder() / "prompt" / "rerank.yaml")},
        {"prompt_max_reasoning": 8, "rl_overlong_buffer": 0},
        {"mid_mix": {"sequential": 1}, "trace_price": {"prompt": 1}},
        {"metrics": ["recall", "GiniIndex"], "valid_metric": "Recall@5", "topk": [5]},
    ):
        assert {key: load_settings(config_dict={**SMOKE, **given})[key] for key in given} == given


# --- keys of earlier versions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["command_line", "config_dict", "config_files", "layers"])
def test_an_old_key_of_any_source_names_its_successor(source, tmp_path):
    old = {"ort_rl_kl": 0.1, "rl_injected": 3, "sft_save_steps": 9}
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(old))
    value = {"config_files": [file], "layers": {"layer": old}}.get(source, old)
    with pytest.raises(ConfigurationError) as error:
        load_settings(
            **{"config_dict": SMOKE, source: value} if source != "config_dict" else {source: {**SMOKE, **old}}
        )
    name = {"command_line": "command line", "config_files": str(file), "layers": "layer"}.get(source, source)
    assert f"{name}: ort_rl_kl is now named onerec_think_rl_kl" in str(error.value)
    assert f"{name}: sft_save_steps is now named llm_save_steps" in str(error.value)
    assert f"{name}: rl_injected was removed; its value is now always 0. No base model" in str(error.value)


def test_old_keys_and_values_have_successors():
    declared = declarations()
    assert len(RENAMED) > 20 and len(REMOVED) > 15
    assert not {*RENAMED, *REMOVED} & set(declared)
    assert set(RENAMED.values()) <= set(declared)
    assert all(fixed and reason.endswith(".") for fixed, reason in REMOVED.values())
    for (key, old), new in RENAMED_VALUES.items():
        assert new in declared[key].choices
        assert problems(**{key: old}).count(f"did you mean {new}?") == 1


def test_the_migration_page_lists_all_old_keys_and_values():
    page = (ROOT / "docs" / "migration.md").read_text()
    for old, new in RENAMED.items():
        assert f"| `{old}` | `{new}` |" in page
    for old, (fixed, reason) in REMOVED.items():
        assert f"| `{old}` | `{fixed}` | {reason} |" in page
    for (key, old), new in RENAMED_VALUES.items():
        assert f"| `{key}: {old}` | `{key}: {new}` |" in page


@pytest.mark.parametrize("key", ["normalize_all", "base_normalize_all", "repeatable", "base_repeatable"])
def test_fixed_recbole_options(key, tmp_path):
    assert f"{key} was removed; its value is now always" in problems(**{key: True})
    settings = load_settings(config_dict=SMOKE)
    built = recbole_config(settings, "SASRec", loss_type="CE")
    assert {name: built[name] for name in RECBOLE_FIXED} == {"repeatable": True, "normalize_all": False}
    assert recbole_config(settings, "BPR", repeatable=False)["repeatable"] is False
    assert not set(RECBOLE_FIXED) & set(yaml.safe_load(settings.as_yaml()))


# --- conversion ------------------------------------------------------------------------------------------------------


def test_types_that_are_converted():
    settings = load_settings(config_dict={**SMOKE, "rl_temperature": 1, "eval_max_lists": None, "gpu_id": 1})
    assert settings["rl_temperature"] == 1.0 and isinstance(settings["rl_temperature"], float)
    assert settings["eval_max_lists"] is None
    assert settings["gpu_id"] == "1"
    settings = load_settings(config_dict={**SMOKE, "mid_mix": {"sequential": 1}, "sid_hidden": [8, 4]})
    assert isinstance(settings["mid_mix"]["sequential"], float) and settings["sid_hidden"] == [8, 4]


# --- keys of this package, of RecBole, of the base model -------------------------------------------------------------


def test_an_ambiguous_training_option_names_the_alternatives():
    text = problems(learning_rate=0.1)
    assert "learning_rate is ambiguous" in text and "base_learning_rate" in text and "sft_learning_rate" in text
    text = problems(train_batch_size=8)
    assert "use base_train_batch_size for the base model" in text and "key of a stage" not in text


def test_base_options_reach_the_base_model_and_argv_does_not(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_recbole_gr2.py", "--learning_rate=9", "--hidden_size=9", "--seed=9"])
    settings = load_settings(
        config_dict={**SMOKE, "base_model": "SASRec", "base_learning_rate": 0.0077, "base_hidden_size": 32}
    )
    built = recbole_config(settings, "SASRec", loss_type="CE")
    assert (built["learning_rate"], built["hidden_size"], built["seed"]) == (0.0077, 32, 2020)
    assert settings["sft_learning_rate"] != 0.0077 and "learning_rate" not in settings


def test_a_base_option_overrides_the_shared_option():
    settings = load_settings(config_dict={**SMOKE, "base_MAX_ITEM_LIST_LENGTH": 20, "MAX_ITEM_LIST_LENGTH": 30})
    assert recbole_config(settings, "SASRec", loss_type="CE")["MAX_ITEM_LIST_LENGTH"] == 20


def test_base_options_are_those_of_the_base_model():
    assert "unknown key 'base_n_layers'" in problems(base_model="BPR", base_n_layers=3)
    assert load_settings(config_dict={**SMOKE, "base_model": "BPR", "base_embedding_size": 8})


def test_a_base_model_of_this_package_has_its_defaults():
    from recbole_gr2.bridge.models import find_model

    built = recbole_config(load_settings(config_dict=SMOKE), find_model("CausalSASRec"))
    defaults = read_yaml((properties_folder() / "model" / "CausalSASRec.yaml").read_text())
    assert built["hidden_dropout_prob"] == defaults["hidden_dropout_prob"]
    assert built["learning_rate"] == defaults["learning_rate"]
    assert built["epochs"] == 3  # the preset's base_epochs


def test_nothing_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = "__import__('os').system('touch owned')"
    settings = load_settings(
        config_dict={**SMOKE, "wandb_project": evil, "base_LABEL_FIELD": evil},
        command_line=parse([f"--trace_llm={evil}", "--base_initializer_range=1e-4"])[1],
    )
    assert settings["trace_llm"] == evil
    built = recbole_config(settings, "SASRec", loss_type="CE")
    assert built["wandb_project"] == evil and built["LABEL_FIELD"] == evil
    assert built["initializer_range"] == 1e-4
    assert not (tmp_path / "owned").exists()


def test_yaml_numbers():
    assert read_yaml("[1e-4, 5E3, -1e-4, 1.5e+3, .5, 1., 10, -3]") == [1e-4, 5e3, -1e-4, 1500.0, 0.5, 1.0, 10, -3]
    assert read_yaml("[1e, e4, 1.2.3, '1e-4']") == ["1e", "e4", "1.2.3", "1e-4"]


# --- the property files ----------------------------------------------------------------------------------------------


def test_every_key_is_documented():
    declared = declarations()
    assert len(declared) > 60
    for key, entry in declared.items():
        where = f"{entry.file}:{entry.line} {key}"
        assert entry.type in TYPES.values(), where
        assert len(entry.text) > 10 and entry.text.endswith("."), where
        assert entry.check(entry.default) == entry.default, where


def test_an_undocumented_or_untyped_key_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "properties"
    shutil.copytree(properties_folder(), folder)
    monkeypatch.setattr("recbole_gr2.config.declaration.PACKAGE", tmp_path)
    file = folder / "stage" / "rl.yaml"
    text = file.read_text()
    file.write_text(text + "\nrl_new: 3\n")
    with pytest.raises(ConfigurationError, match="rl_new"):
        declarations()
    for spec in (
        "number",
        "int > many",
        "int 1..x",
        "bool: yes | no",
        "dict >= 1",
        "int, fast",
        "set of int",
        "int: 1",
    ):
        file.write_text(text + f"\nrl_new: 3  # ({spec}) A new key.\n")
        with pytest.raises(ConfigurationError, match=re.escape(f"unreadable type ({spec})")):
            declarations()


def test_errors_name_settings_that_exist():
    declared = declarations()
    prefixes = "cand|distilled|eval|llm|mid|onerec_think|prior|prompt|rl|sft|sid|trace"
    word, named = re.compile(rf"\b(?:{prefixes})_[a-z_]+\b"), {}
    for file in PACKAGE.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
        for argument in (keyword for call in calls for keyword in call.keywords if keyword.arg in ("where", "do")):
            for part in ast.walk(argument.value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    named |= dict.fromkeys(word.findall(part.value), f"{file.name}:{part.lineno}")
    assert len(named) > 30
    assert {key: place for key, place in named.items() if key not in declared} == {}


@pytest.mark.parametrize("preset", ["smoke", "laptop", "gpu", "paper"])
def test_presets_have_known_keys(preset):
    assert load_settings(config_dict={"preset": preset})["preset"] == preset


def test_no_preset_is_left_out():
    assert {file.stem for file in (properties_folder() / "preset").iterdir()} == {
        "smoke",
        "quick",
        "laptop",
        "gpu",
        "paper",
    }


def test_data_set_and_model_files_have_known_keys():
    from recbole_gr2.bridge.models import find_model

    datasets = sorted((properties_folder() / "dataset").glob("*.yaml"))
    models = sorted((properties_folder() / "model").glob("*.yaml"))
    assert len(datasets) >= 3 and {"CausalSASRec", "TIGER"} <= {file.stem for file in models}
    for file in datasets:
        load_settings(config_dict={**SMOKE, "dataset": file.stem})
    for file in models:
        load_settings(config_dict={**SMOKE, "base_model": file.stem})
        bases = [base for base in find_model(file.stem).__mro__ if "recbole" in base.__module__]
        options = {key for base in bases for key in re.findall(r'config\[\s*"(\w+)"\s*\]', inspect.getsource(base))}
        assert set(read_yaml(file.read_text())) <= options | RECBOLE_TRAINING


def test_declared_recbole_options_reach_recbole():
    shared = {key for key in declarations() if key in recbole_options()}
    assert {"seed", "topk", "metrics", "valid_metric", "eval_args", "eval_batch_size"} <= shared
    settings = load_settings(config_dict={**SMOKE, "topk": [2, 4], "valid_metric": "MRR@4", "eval_batch_size": 77})
    built = recbole_config(settings, "SASRec", loss_type="CE")
    assert (built["topk"], built["valid_metric"], built["eval_batch_size"]) == ([2, 4], "MRR@4", 77)


def test_the_settings_page_is_up_to_date():
    page = settings_page()
    assert (ROOT / "docs" / "settings.md").read_text() == page, "run: python -m recbole_gr2.config > docs/settings.md"
    models = [entry for file in (properties_folder() / "model").iterdir() for entry in read_declarations(file).values()]
    assert page.count("\n| `") == len(declarations()) + len(recbole_declarations()) + len(models)
    assert "| `cand_num` | int | 2 to 26 | `10` |  |  | Number of candidates" in page
    assert "| `data_path` | str |  | `dataset/` |  | yes |" in page
    assert "| `base_n_layers` | int | >= 1 | `2` |" in page


# --- a config file that reproduces a run -----------------------------------------------------------------------------


def test_as_yaml_round_trip(tmp_path):
    given = {
        **SMOKE,
        "base_learning_rate": 1e-4,
        "user_inter_num_interval": "[5,inf)",
        "rl_rewards": {"ndcg": 1.0},
        "base_hidden_size": 32,
        "topk": [3, 9],
        "valid_metric": "NDCG@9",
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
    assert {"gpu_id", "worker", "log_wandb"} <= speed_settings()
    assert not speed_settings() & set(settings.recbole_results())
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
        "base_model": ["BPR"],
        "seed": 3,
        "rl_steps": 7,
        "rl_rewards": {"ndcg": 0.1},
        "topk": [1, 2],
        "eval_max_lists": None,
        "llm": None,
        "rl_temperature": -1,
    }
    assert options.dry_run and options.stages == ("sft", "rl") and not options.force


@pytest.mark.parametrize("argv", [["rl_steps=3"], ["--rl_steps"], ["--rl_steps", "--force"], ["stray", "--seed=1"]])
def test_arguments_that_are_no_setting(argv):
    with pytest.raises(ConfigurationError, match="cannot read"):
        parse(argv)


def test_a_setting_with_a_blank_after_config_files():
    options, settings = parse(["--config_files", "mine.yaml", "--eval_rows=[midtrain, sft]"])
    assert options.config_files == ["mine.yaml"] and settings == {"eval_rows": ["midtrain", "sft"]}


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--sed=1"], 2, "unknown key 'sed'; nearest: seed"),
        (["--seed=one"], 2, "command line: seed is 'one', expected int >= 0"),
        (["--ort_steps=3"], 2, "command line: ort_steps is now named onerec_think_steps"),
        (["--learning_rate=0.1"], 2, "base_learning_rate"),
        (["-m", "SASRec"], 2, "--base_model SASRec"),
        (["--base_model=Nobody", "--stages=candidates"], 2, "no model named 'Nobody'"),
        pytest.param(["--stages=candidate"], 2, "there is no stage 'candidate'", marks=pytest.mark.slow),
        pytest.param(["--from_stage=candidate"], 2, "there is no stage 'candidate'", marks=pytest.mark.slow),
        (["--config_files", "nowhere.yaml"], 4, "nowhere.yaml"),
        (["--dataset=nowhere"], 4, "--data_path DIR"),
        (["--prompt_template=nowhere"], 2, "no prompt template 'nowhere'"),
    ],
)
def test_exit_codes(argv, code, text, capsys, tmp_path):
    assert main(["--preset=smoke", f"--checkpoint_dir={tmp_path}", *argv]) == code
    captured = capsys.readouterr()
    assert text in captured.err and captured.out == ""


@pytest.mark.parametrize("word", ["SASRec,Pop", "SASRec, Pop", "[SASRec, Pop]", "['SASRec', 'Pop']"])
def test_models_on_the_command_line(word):
    assert parse(["--models", word])[1]["models"] == ["SASRec", "Pop"]
    assert parse([f"--models={word}"])[1]["models"] == ["SASRec", "Pop"]
    assert parse(["--models", "Pop"])[1]["models"] == ["Pop"]


# --- options of RecBole ----------------------------------------------------------------------------------------------


def test_every_option_of_recbole_is_declared_with_its_default():
    declared, defaults = recbole_declarations(), {}
    for name in ("overall.yaml", "dataset/sample.yaml"):
        defaults |= read_yaml((recbole_properties() / name).read_text())
    options = (recbole_options() | RECBOLE_TRAINING) - set(RECBOLE_FIXED)
    assert options - set(declared) - set(declarations()) == {"loss_type"}  # an option of some models
    assert set(declared) <= options and not set(declared) & set(declarations())
    assert {key: entry.default for key, entry in declared.items()} == {key: defaults[key] for key in declared}
    for entry in declared.values():
        assert check_option(entry, entry.default) == entry.default


def test_the_defaults_of_all_models_are_permitted():
    models = candidate_models()
    assert len(models) == 70 and {"CausalSASRec", "TIGER", "SASRec", "BPR", "EASE"} <= set(models)
    for model in models:
        for key, entry in model_declarations(model).items():
            assert entry.check(entry.default) == entry.default, (model, key)
    for model in ("NextItNet", "CDAE", "GRU4RecCPR", "ItemKNN"):
        load_settings(config_dict={**SMOKE, "base_model": model})


def test_the_models_of_recbole_are_those_that_it_finds():
    from recbole.utils import ModelType, get_model

    kinds = {"general": {ModelType.GENERAL, ModelType.TRADITIONAL}, "sequential": {ModelType.SEQUENTIAL}}
    models = recbole_models()
    assert len(models) == 94
    for name in ("SASRec", "FOSSIL", "EASE", "FM", "KGAT"):
        assert get_model(name).type in kinds.get(models[name], {ModelType.CONTEXT, ModelType.KNOWLEDGE})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base_model": "sasrec"}, "there is no model named 'sasrec'; nearest: SASRec"),
        ({"base_model": "FM"}, "FM is a context-aware model, but candidates need scores for the whole catalogue"),
        ({"models": ["KGAT"]}, "KGAT is a knowledge-aware model"),
        ({"base_model": "SASRec-no"}, "nearest: SASRec"),
        ({"rm_dup_inter": True}, "rm_dup_inter is True, expected one of first, last or nothing (~)"),
        ({"rm_dup_inter": "fist"}, "did you mean first"),
        ({"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni50"}}, "eval_args is "),
        ({"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO"}}, "group_by: none"),
        ({"eval_args": {"split": {"RS": [0.8, 0.2]}, "order": "TO", "group_by": "none"}}, "eval_args is "),
        ({"eval_args": {"split": {"RS": [0.8, 0.2, 0]}, "order": "TO", "group_by": "none"}}, "eval_args is "),
        ({"eval_args": {"split": {"date": ["2014-01-01"]}, "order": "TO"}}, "eval_args is "),
        ({"eval_args": {"splits": {}}}, "eval_args has the unknown keys ['splits']"),
        ({"benchmark_filename": ["a", "b"]}, "expected three different names"),
        ({"benchmark_filename": ["a", "b", "a"]}, "expected three different names"),
        (
            {
                "benchmark_filename": ["a", "b", "c"],
                "eval_args": {"split": {"date": [1, 2]}, "order": "TO", "group_by": "none"},
            },
            "remove one of them",
        ),
        (
            {"benchmark_filename": ["a", "b", "c"], "user_inter_num_interval": "[5,inf)"},
            "set user_inter_num_interval: [0,inf)",
        ),
        ({"metrics": ["AUC"]}, "metrics has an unknown metric 'AUC'"),
        ({"valid_metric": "Recall"}, "valid_metric is 'Recall', expected a metric and a cut-off"),
        ({"valid_metric": "GAUC@10"}, "valid_metric is 'GAUC@10'"),
        ({"valid_metric": "NDCG@0"}, "valid_metric is 'NDCG@0'"),
        ({"load_col": {"inter": "user_id"}}, "load_col has 'inter': 'user_id', expected a list of columns"),
        (
            {"numerical_features": ["timestamp"]},
            "numerical_features has timestamp, which the run reads as user, item or time",
        ),
        ({"USER_ID_FIELD": "item_id"}, "expected three columns"),
        ({"unused_col": {"inter": ["item_id"]}}, "unused_col has item_id, which the run needs"),
        ({"unused_col": {"user": ["age"]}}, "unused_col names the files ['user']"),
        ({"val_interval": {"rating": "3"}}, "val_interval has rating: '3', expected an interval"),
        ({"train_grades": {"rating": [5, 3]}}, "expected one column and its rising thresholds"),
        ({"train_grades": {"rating": [3, 5]}}, "train_grades names the column 'rating', which load_col does not load"),
        ({"base_learner": "adm"}, "base_learner is 'adm', expected one of adam, adamw, "),
        ({"base_epochs": 0}, "base_epochs is 0, expected int >= 1"),
        ({"base_eval_step": 0}, "base_eval_step is 0, expected int >= 1"),
        ({"base_model": "SASRec", "base_loss_type": "XE"}, "base_loss_type is 'XE', expected one of BPR, CE"),
        (
            {"base_model": "SASRec", "base_n_heads": 3},
            "base_hidden_size is 64, expected a multiple of base_n_heads (3)",
        ),
        ({"base_model": "SASRec", "base_hidden_size": 0}, "base_hidden_size is 0, expected int >= 1"),
        ({"base_model": "SASRec", "base_hidden_act": "gelo"}, "did you mean gelu"),
        ({"base_model": "SASRec", "base_attn_dropout_prob": 1.5}, "expected float 0 to 1"),
        ({"base_model": "BPR", "base_loss_type": "CE"}, "unknown key 'base_loss_type'"),
        ({"base_model": "SASRec", "base_train_neg_sample_args": {"sample_num": 2}}, "the loss of SASRec is CE"),
        ({"base_train_neg_sample_args": {"sample_num": 2}}, "the loss of CausalSASRec is CE"),
        ({"base_model": "BPR", "base_train_neg_sample_args": {"sample_num": 0}}, "expected distribution uniform or"),
        ({"base_model": "BPR", "base_train_neg_sample_args": {"number": 1}}, "unknown keys ['number']"),
        ({"base_enable_amp": True}, "CausalSASRec has no mixed precision"),
        ({"base_clip_grad_norm": {"max": 1}}, "clip_grad_norm is {'max': 1.0}"),
        ({"models": ["SASRec"], "models_options": {"epochs": 0}}, "models_options.epochs is 0, expected int >= 1"),
        (
            {"models": ["SASRec"], "models_options": {"n_layers": "two"}},
            "models_options.n_layers is 'two', expected int",
        ),
        ({"gpu_id": "first"}, "gpu_id is 'first', expected numbers of GPUs"),
        ({"save_dataset": True}, "this package stores no data sets"),
        ({"seed": 2**40}, "seed is 1099511627776, expected int >= 0"),
        ({"rl_learning_rate": float("inf")}, "rl_learning_rate is inf, expected float > 0"),
        ({"checkpoint_dir": ""}, "checkpoint_dir is empty"),
        ({"checkpoint_dir": "~/saved"}, "write the whole path"),
        ({"checkpoint_dir": "a\0b"}, "checkpoint_dir is 'a\\x00b', expected str"),
        ({"dataset": "../other"}, "expected the name of a folder in data_path"),
        ({"model": "SASRec"}, "--base_model SASRec"),
        ({"eval_rows": ["sft", "sft"]}, "eval_rows has 'sft' twice"),
        ({"topk": [5, 5]}, "topk has 5 twice"),
        ({"llm_layers": [0, 0]}, "llm_layers has 0 twice"),
        ({"trace_endpoint": "localhost:8000"}, "expected a URL such as http://localhost:8000/v1"),
        ({"trace_mode": "rejection", "trace_temperature": 0}, "all attempts would give the same reply"),
        ({"trace_teacher": "recorded"}, "trace_file names no file with its traces"),
    ],
)
def test_options_that_fail_late_are_refused(given, message):
    assert message in problems(**given)


def test_options_that_recbole_permits_are_permitted():
    for given in (
        {"rm_dup_inter": "last", "gpu_id": "", "field_separator": ",", "user_inter_num_interval": [5, 10]},
        {"gpu_id": "0,1", "valid_metric": "gauc", "metrics": ["GAUC"], "topk": [1]},
        {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}},
        {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "none"}},
        {"eval_args": {"split": {"date": ["2014-01-01", "2014-04-01"]}, "order": "TO"}},
        {"load_col": {"inter": "*", "item": ["item_id", "title"]}, "train_grades": {"rating": [3]}},
        {"val_interval": {"rating": "[3,inf)", "brand": ["a", "b"]}},
        {"base_model": "BPR", "base_train_neg_sample_args": {"distribution": "popularity", "sample_num": 2}},
        {
            "base_model": "SASRec",
            "base_loss_type": "BPR",
            "base_train_neg_sample_args": {"dynamic": True, "candidate_num": 2},
        },
        {"base_model": "SASRec", "base_hidden_size": 48, "base_n_heads": 3, "base_clip_grad_norm": {"max_norm": 5}},
        {"trace_mode": "rejection", "trace_temperature": 0, "trace_tries": 1},
        {"models": ["Pop", "OneRecThink", "GR2Generator", "TIGER"]},
    ):
        assert load_settings(config_dict={**SMOKE, **given})
    chosen = load_settings(config_dict={**SMOKE, "user_inter_num_interval": [5, 10], "item_inter_num_interval": None})
    assert chosen.recbole["user_inter_num_interval"] == "[5,10]"
    assert chosen.recbole["item_inter_num_interval"] == "[0,inf)"


def test_combinations_are_checked_with_the_preset_of_the_machine(monkeypatch):
    given = {"rl_overlong_buffer": 90}  # the preset gpu permits 96 reasoning tokens, the default is 64
    monkeypatch.setattr("recbole_gr2.config.settings.default_preset", lambda: "gpu")
    assert load_settings(config_dict=given)["prompt_max_reasoning"] == 96
    monkeypatch.setattr("recbole_gr2.config.settings.default_preset", lambda: "laptop")
    with pytest.raises(ConfigurationError, match="rl_overlong_buffer is 90"):
        load_settings(config_dict=given)
    assert load_settings(config_dict=given, machine=False)["rl_overlong_buffer"] == 90
