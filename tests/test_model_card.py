"""The README.md in the folder of each stage that trains a language model."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from recbole_gr2.config import load_settings
from recbole_gr2.llm.card import write_model_card
from recbole_gr2.testing import synthetic_context


@pytest.fixture
def card(tmp_path):
    """card(key=value, ..): the model card of a stage under these settings."""

    def written(*, method="sft", settings=("llm", "sft_"), excluded=(), **values):
        chosen = load_settings(config_dict={"dataset": "shop", "preset": "smoke", **values})
        context = replace(synthetic_context(), stage="sft", settings=chosen, folder=tmp_path)
        write_model_card(context, purpose="tests", method=method, settings=settings, excluded=excluded)
        return ModelCard.load(tmp_path / "README.md")

    return written


def listed(card):
    """The settings of a card."""
    return yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])


def test_a_packaged_base_model(card):
    found = card(llm="smollm2-135m-instruct", cand_num=7)
    metadata = found.data.to_dict()
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (metadata["license"], metadata["datasets"]) == ("apache-2.0", ["shop"])
    assert found.text.lstrip().startswith("# sft on shop\n")
    assert "labels of 7 candidates" in " ".join(found.text.split()) and 'method="sft"' in found.text
    assert "mean nothing" not in found.text


def test_an_untrained_base_model(card):
    found = card(llm="random")
    assert not {"base_model", "license"} & set(found.data.to_dict())
    assert "The answers of this model mean nothing." in found.text


def test_a_base_model_of_the_hub(card):
    found = card(llm="Qwen/Qwen3-0.6B")
    assert found.data.base_model == "Qwen/Qwen3-0.6B" and found.data.license is None
    assert "see the page of the base model" in found.text


def test_a_folder_is_named_without_its_path(card, tmp_path):
    (tmp_path / "my-model").mkdir()
    text = str(card(llm=str(tmp_path / "my-model")))
    assert "the folder `my-model`" in text and str(tmp_path) not in text


def test_settings(card):
    """Those that can change the model, without speed settings and without those that the caller excludes."""
    found = listed(card(sft_steps=3, llm_save_steps=9))
    assert found["sft_steps"] == 3 and all(name.startswith(("llm_", "sft_")) for name in found)
    assert "llm_save_steps" not in found
    assert "sft_steps" not in listed(card(sft_steps=3, excluded=["sft_steps"]))


def test_the_card_depends_only_on_the_settings(card):
    assert str(card(sft_steps=3)) == str(card(sft_steps=3)) != str(card(sft_steps=4))


def test_a_model_without_a_method(card):
    text = card(method=None).text
    assert "GR2.load" not in text and 'load_saved("model")' in text


@pytest.mark.slow
def test_every_trained_model_has_a_card(finished):
    trained = {name: folder for name, folder in finished.folders.items() if (Path(folder) / "model").is_dir()}
    assert {"midtrain", "sft", "rl"} <= set(trained)
    for name, folder in trained.items():
        assert ModelCard.load(folder / "README.md").text.lstrip().startswith(f"# {name} on tiny\n")
        assert "README.md" in finished.records[name].files
