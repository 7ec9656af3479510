"""The size of a language model from its configuration, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.download import resolve
from recbole_gr2.llm.model import RANDOM, check_layers, random_config, read_config

FLOAT = 4  # bytes of a weight in float32, the type in which models are trained and stored


@dataclass(frozen=True, kw_only=True)
class Size:
    """Number of weights of a model.

    Attributes:
        parameters: all weights, with the layers that the run keeps.
        embeddings: those of the token embeddings, of which a trimmed vocabulary keeps a part.
        trimmed: whether the vocabulary is trimmed.
    """

    parameters: int
    embeddings: int
    trimmed: bool

    @property
    def least(self) -> int:
        """Least number of weights that are trained and stored."""
        return self.parameters - self.embeddings * self.trimmed

    def training_bytes(self, *, lora: bool) -> int:
        """Return the memory of the weights, and without LoRA of their gradients and Adam's two moments, in bytes."""
        return self.least * FLOAT * (1 if lora else 4)

    def disk_bytes(self, stages: int, *, lora: bool) -> int:
        """Return the disk space of the model of each of `stages` stages, and without LoRA of a checkpoint, in bytes."""
        return self.least * FLOAT * (stages + (0 if lora else 3))


def model_size(settings: Mapping[str, Any]) -> Size:
    """Return the size of the language model of a run. A packaged model that is not on this machine is downloaded.

    Args:
        settings: settings of the run.

    Raises:
        MissingFileError: the configuration of the model cannot be read.
        ConfigurationError: `llm_layers` names a layer that the model does not have.
    """
    from transformers import AutoModelForCausalLM

    name = settings["llm"]
    config = random_config(settings["llm_random"]) if name == RANDOM else read_config(resolve(name))
    if settings["llm_layers"] is not None:
        check_layers(settings["llm_layers"], config.num_hidden_layers)
        config.num_hidden_layers = len(settings["llm_layers"])
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[number] for number in settings["llm_layers"]]
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        raise ConfigurationError(
            f"transformers cannot build the model: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            where=f"llm {name}",
            why="its configuration is not that of a causal language model",
            do="choose a causal language model",
        ) from error
    embeddings = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    trimmed = bool(settings["llm_trim_vocabulary"]) and name != RANDOM
    return Size(
        parameters=sum(weights.numel() for weights in model.parameters()),
        embeddings=embeddings * (1 if tied else 2),
        trimmed=trimmed,
    )
