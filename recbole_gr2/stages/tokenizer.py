"""Tokenizer: item texts -> embeddings -> RQ-VAE -> one semantic ID an item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from recbole_gr2.llm.packages import resolve
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.embed import embed_texts, hash_embeddings
from recbole_gr2.sid.rqvae import RQVAEConfig, assign, check, fit_rqvae, health
from recbole_gr2.sid.tokens import sid_text
from recbole_gr2.stages import Context
from recbole_gr2.store import read_lines, write_json, write_lines
from recbole_gr2.types import Item


def run(context: Context) -> dict:
    """Writes rqvae.safetensors, embeddings.npy, sids.jsonl and health.json.

    Raises:
        GateError: uniqueness below `sid_min_unique`, or a level with fewer than two codes in use.
    """
    settings, items = context.settings, context.data.items
    texts = [item_text(item) for item in items]
    if settings["sid_encoder"] == "hash":
        embeddings = hash_embeddings(texts)
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        embeddings = embed_texts(texts, resolve(settings["sid_encoder"]), device=device)
    np.save(context.folder / "embeddings.npy", embeddings)
    context.say(f"{len(texts):,} texts embedded, {embeddings.shape[1]} dimensions")

    names = RQVAEConfig.__dataclass_fields__
    values = {name: settings[f"sid_{name}"] for name in names if f"sid_{name}" in settings}
    config = RQVAEConfig(**{**values, "hidden": tuple(values["hidden"]), "seed": derive_seed(settings["seed"], "sid")})
    model = fit_rqvae(embeddings, config)
    model.save(context.folder)
    codes = assign(model, embeddings, seed=derive_seed(settings["seed"], "last level"))
    report = health(codes, model, embeddings)
    model.config = replace(config, random_last=0)
    nearest = health(assign(model, embeddings, seed=0), model, embeddings)
    check(report, settings["sid_min_unique"])
    write_lines(
        context.folder / "sids.jsonl",
        ({"item_id": i.token, "sid": [int(c) for c in row]} for i, row in zip(items, codes, strict=True)),
    )
    facts = {**asdict(report), "uniqueness_without_random_level": nearest.uniqueness}
    write_json(context.folder / "health.json", facts)
    context.say(f"uniqueness {report.uniqueness:.4%} ({nearest.uniqueness:.2%} by nearest codes alone), codes in use "
                f"{report.used_codes}, entropy {tuple(round(e, 2) for e in report.entropy)} bits, "
                f"reconstruction {report.reconstruction:.3f}; e.g. {sid_text(tuple(map(int, codes[0])))}")  # fmt: skip
    return facts


def item_text(item: Item) -> str:
    """What the encoder reads of an item; the token where there is no text at all."""
    return " | ".join(filter(None, (item.title, item.brand, item.categories))) or item.token


def load_items(folder: Path, items: Sequence[Item]) -> tuple[Item, ...]:
    """The catalogue with its semantic IDs."""
    sids = {line["item_id"]: tuple(line["sid"]) for line in read_lines(folder / "sids.jsonl")}
    return tuple(replace(item, sid=sids[item.token]) for item in items)
