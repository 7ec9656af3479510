"""Tokenizer: item embeddings -> RQ-VAE or residual k-means -> one semantic ID an item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.contrastive import co_engaged
from recbole_gr2.sid.quality import check, health, neighbourhood_line
from recbole_gr2.sid.rqkmeans import RQKMeans, fit_rqkmeans
from recbole_gr2.sid.rqvae import RQVAE, RQVAEConfig, SidConfig, assign, fit_rqvae
from recbole_gr2.sid.tokens import sid_text
from recbole_gr2.stages import Context
from recbole_gr2.stages.embeddings import load_embeddings
from recbole_gr2.store import read_lines, write_json, write_lines
from recbole_gr2.types import Item

METHODS = {"rqvae": (RQVAEConfig, RQVAE), "rqkmeans": (SidConfig, RQKMeans)}  # name -> configuration, tokenizer


def run(context: Context) -> dict:
    """Writes the tokenizer (rqvae.safetensors or rqkmeans.safetensors), sids.jsonl and health.json.

    Raises:
        ConfigurationError: an unknown `sid_method`, or a value that it cannot use.
        GateError: uniqueness below `sid_min_unique`, or a level with fewer than two codes in use.
    """
    settings, items = context.settings, context.data.items
    config = tokenizer_config(settings)
    embeddings = load_embeddings(context)
    tokenizer = fit(embeddings, config, context.data)
    tokenizer.save(context.folder)
    codes = assign(tokenizer, embeddings, seed=derive_seed(settings["seed"], "last level"))
    report = health(codes, tokenizer, embeddings, [item.categories for item in items])
    check(report, settings["sid_min_unique"])
    write_lines(
        context.folder / "sids.jsonl",
        ({"item_id": i.token, "sid": [int(c) for c in row]} for i, row in zip(items, codes, strict=True)),
    )
    facts = asdict(report)
    write_json(context.folder / "health.json", facts)
    context.say(
        f"uniqueness {report.uniqueness:.4%} ({report.uniqueness_without_random_level:.2%} by nearest codes "
        f"alone), codes in use {report.used_codes}, entropy {tuple(round(e, 2) for e in report.entropy)} bits, "
        f"reconstruction {report.reconstruction:.3f}; e.g. {sid_text(tuple(map(int, codes[0])))}"
    )
    context.say(neighbourhood_line(facts["neighbourhood"]))
    return facts


def tokenizer_config(settings: Mapping[str, Any]) -> SidConfig:
    """The `sid_` settings of the method that they name.

    Raises:
        ConfigurationError: there is no such method, it has no loss that a setting weighs, or a value is out of range.
    """
    method = settings["sid_method"]
    if method not in METHODS:
        raise ConfigurationError(f"there is no tokenizer {method!r}", where="sid_method", do=f"choose {list(METHODS)}")
    if method != "rqvae" and settings["sid_diversity"]:  # unlike the contrastive loss it is never on by default
        raise ConfigurationError(
            f"{method} is not trained by a loss",
            where="sid_diversity",
            why="it would have no effect",
            do="set it to 0, or sid_method to rqvae",
        )
    config, _ = METHODS[method]
    names = config.__dataclass_fields__
    values = {name: settings[f"sid_{name}"] for name in names if f"sid_{name}" in settings}
    if "hidden" in values:
        values["hidden"] = tuple(values["hidden"])
    return config(**{**values, "seed": derive_seed(settings["seed"], "sid")})


def fit(embeddings: np.ndarray, config: SidConfig, data: Any) -> RQVAE | RQKMeans:
    """The tokenizer of a configuration. `data` gives the interactions that a contrastive loss learns from.

    These are training interactions without the targets of the users' train lists.
    """
    if not isinstance(config, RQVAEConfig):
        return fit_rqkmeans(embeddings, config)
    pairs = None
    if config.contrastive:
        pairs = co_engaged(data.open_sequences(), data.item_count)
    return fit_rqvae(embeddings, config, pairs=pairs)


def load_codebooks(folder: Path, settings: Mapping[str, Any]) -> torch.Tensor:
    """The vectors behind the codes, (L, C, D)."""
    _, tokenizer = METHODS[settings["sid_method"]]
    return torch.as_tensor(tokenizer.load(folder).codebooks).detach()


def load_items(folder: Path, items: Sequence[Item]) -> tuple[Item, ...]:
    """The catalogue with its semantic IDs."""
    sids = {line["item_id"]: tuple(line["sid"]) for line in read_lines(folder / "sids.jsonl")}
    return tuple(replace(item, sid=sids[item.token]) for item in items)
