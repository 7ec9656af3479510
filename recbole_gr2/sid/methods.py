"""The tokenizers by name (setting `sid_method`): their settings, how they are fitted, and how they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.contrastive import co_engaged
from recbole_gr2.sid.quantizer import Quantizer, SidConfig
from recbole_gr2.sid.rqkmeans import RQKMeans, fit_rqkmeans
from recbole_gr2.sid.rqvae import RQVAE, RQVAEConfig, fit_rqvae

if TYPE_CHECKING:
    from recbole_gr2.bridge.data import Data

# Name -> class of the settings, class of the tokenizer.
METHODS: Mapping[str, tuple[type[SidConfig], type[RQVAE] | type[RQKMeans]]] = {
    "rqvae": (RQVAEConfig, RQVAE),
    "rqkmeans": (SidConfig, RQKMeans),
}


def tokenizer_config(settings: Mapping[str, Any]) -> SidConfig:
    """Build the configuration of the tokenizer that `sid_method` names from the `sid_` settings.

    Raises:
        ConfigurationError: the method does not exist, a setting has no effect on it, or a value is out of range.
    """
    method = settings["sid_method"]
    if method not in METHODS:
        raise ConfigurationError(
            f"there is no tokenizer {method!r}",
            where="sid_method",
            why="the tokenizer assigns the semantic IDs",
            do=f"choose one of {', '.join(METHODS)}",
        )
    # sid_contrastive is not checked, because it is on by default.
    if method != "rqvae" and settings["sid_diversity"]:
        raise ConfigurationError(
            f"{method} is not trained by a loss",
            where="sid_diversity",
            why="the setting would have no effect",
            do="set it to 0, or set sid_method to rqvae",
        )
    config, _ = METHODS[method]
    names = config.__dataclass_fields__
    values = {name: settings[f"sid_{name}"] for name in names if f"sid_{name}" in settings}
    if "hidden" in values:
        values["hidden"] = tuple(values["hidden"])
    return config(**{**values, "seed": derive_seed(settings["seed"], "sid")})


def fit(embeddings: np.ndarray, config: SidConfig, data: Data) -> Quantizer:
    """Fit the tokenizer that a configuration belongs to.

    Args:
        embeddings: item embeddings, (N, D).
        config: the configuration, see `tokenizer_config`.
        data: the data set. The contrastive loss reads its training interactions without the targets of the train lists.
            Without this loss no interaction is read.

    Raises:
        ConfigurationError: the embeddings or the interactions cannot be used.
        QualityCheckError: the training diverges.
    """
    if not isinstance(config, RQVAEConfig):
        return fit_rqkmeans(embeddings, config)
    pairs = None
    if config.contrastive:
        pairs = co_engaged(data.known_items("hold_out"), data.item_count)
    return fit_rqvae(embeddings, config, pairs=pairs)


def load_tokenizer(folder: Path, settings: Mapping[str, Any]) -> Quantizer:
    """Load the tokenizer in a folder.

    Raises:
        MissingFileError: the folder has no such tokenizer.
    """
    _, tokenizer = METHODS[settings["sid_method"]]
    return tokenizer.load(folder)


def load_codebooks(folder: Path, settings: Mapping[str, Any]) -> torch.Tensor:
    """Load the codebook vectors of the tokenizer in a folder, (L, C, D) float32.

    Raises:
        MissingFileError: the folder has no such tokenizer.
    """
    _, tokenizer = METHODS[settings["sid_method"]]
    return torch.as_tensor(tokenizer.load(folder).codebooks).detach()
