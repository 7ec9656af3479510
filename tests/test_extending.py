"""The examples of docs/extending.md run, and pass the contract tests that the page shows."""

import importlib
import json
import re
import runpy
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recbole_gr2.config import load_settings, read_yaml
from recbole_gr2.prompts import PromptMaker, load_template
from recbole_gr2.quick_start import parse
from recbole_gr2.testing import synthetic_catalog, synthetic_context, synthetic_request

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"^```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
TESTS = [name.removesuffix(".py") for name, _ in BLOCKS if name.startswith("test_")]


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """A folder with the files of the page, importable."""
    for name, text in BLOCKS:
        file = tmp_path / Path(name).name if "properties" not in name else tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = {Path(name).stem for name, _ in BLOCKS if name.endswith(".py")}
    yield tmp_path
    for name in modules:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("module", TESTS)
def test_the_contract_tests_of_the_page_pass(examples, module):
    classes = [value for name, value in vars(importlib.import_module(module)).items() if name.startswith("Test")]
    assert classes
    for tests in classes:
        for name in dir(tests):
            if name.startswith("test_"):
                getattr(tests(), name)()


def test_the_page_has_an_example_of_each_kind():
    assert len(TESTS) == 4 and len({name for name, _ in BLOCKS}) == len(BLOCKS) >= 15


# The commands of the sections "Base model" and "Stage" need the files that these sections add to the package.
COMMANDS = [c for c in re.findall(r"^recbole-gr2 run (.*)$", PAGE.read_text(), re.M) if "LastItem" not in c]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_settings_of_the_commands_are_valid(examples, monkeypatch, command):
    monkeypatch.chdir(examples)
    options, values = parse([*shlex.split(command, comments=True), "--preset=smoke"])
    settings = load_settings(command_line=values, config_files=options.config_files)
    assert values and all(settings[key] == value for key, value in values.items() if not key.startswith("base_e"))


def test_the_prompt_template(examples):
    maker = PromptMaker(
        template=load_template(str(examples / "my_prompt.yaml")), catalog=synthetic_catalog(), history=3, title_chars=40
    )
    _, user = maker.render(synthetic_request(candidates=2)).messages
    assert re.search(r"<\|sid_end\|><\|A\|> Product \d+", user["content"])


def test_the_data_set(examples, monkeypatch):
    monkeypatch.chdir(examples)
    (examples / "ratings.csv").write_text("user,product,time\nu1,p1,10\nu1,p2,20\n")
    (examples / "products.csv").write_text("product,title,brand,category\np1,Red Nail Polish,Acme,Beauty > Nails\n")
    runpy.run_path(str(examples / "convert.py"))
    folder = examples / "data" / "shop"
    assert (folder / "shop.inter").read_text().splitlines()[1] == "u1\tp1\t10"
    assert (folder / "shop.item").read_text().splitlines()[1] == "p1\tRed Nail Polish\tAcme\tBeauty > Nails"
    columns = (folder / "shop.item").read_text().splitlines()[0]
    named = {value for key, value in read_yaml((examples / "shop.yaml").read_text()).items() if key.startswith("text_")}
    assert named == {column.split(":")[0] for column in columns.split("\t")} - {"item_id"}


def test_the_base_model(examples):
    model_class = importlib.import_module("last_item").LastItem
    config = {
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "item_length",
        "NEG_PREFIX": "neg_",
        "MAX_ITEM_LIST_LENGTH": 5,
        "device": "cpu",
        **read_yaml((examples / "properties/model/LastItem.yaml").read_text()),
    }

    class DataSet:
        def num(self, field):
            return 7

    model = model_class(config, DataSet())
    batch = {
        "item_id_list": torch.tensor([[3, 4, 0, 0, 0], [3, 5, 4, 0, 0], [4, 5, 0, 0, 0]]),
        "item_length": torch.tensor([2, 3, 2]),
        "item_id": torch.tensor([1, 2, 3]),
    }
    scores = model.full_sort_predict(batch)
    assert scores.shape == (3, 7) and torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
    assert torch.equal(model.predict(batch), scores[torch.arange(3), torch.tensor([1, 2, 3])])
    model.calculate_loss(batch).backward()


def test_the_stage(examples):
    from recbole_gr2.config import read_declarations

    stage = importlib.import_module("popularity").STAGE
    declared = read_declarations(examples / "properties/stage/popularity.yaml")
    assert all(key.startswith(stage.settings) for key in declared)
    context = replace(synthetic_context(), settings={"popularity_items": 3}, folder=examples)
    summary = stage.run(context)
    counts = json.loads((examples / "popularity.json").read_text())
    assert len(counts) == 3 and max(counts.values()) == summary["largest"]
