"""Tokenizer: an RQ-VAE or residual k-means turns item embeddings into one semantic ID per item."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from recbole_gr2.artifacts import read_embeddings, write_sids
from recbole_gr2.bridge.data import Data
from recbole_gr2.config import Settings
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.methods import fit, tokenizer_config
from recbole_gr2.sid.quality import check, health, neighbourhood_line, usage_line
from recbole_gr2.sid.quantizer import assign, check_items
from recbole_gr2.sid.rqvae import RQVAEConfig
from recbole_gr2.sid.tokens import sid_text
from recbole_gr2.store import write_json
from recbole_gr2.types import Context, Stage


def run(context: Context) -> dict[str, Any]:
    """Write the tokenizer (rqvae.safetensors or rqkmeans.safetensors), sids.jsonl and health.json.

    Raises:
        QualityCheckError: too few semantic IDs are unique (`sid_min_unique`), or a level uses fewer than two codes.
    """
    settings, data = context.settings, context.data
    embeddings = read_embeddings(context.folders["embeddings"])
    tokenizer = fit(embeddings, tokenizer_config(settings), data)
    tokenizer.save(context.folder)
    codes = assign(tokenizer, embeddings, seed=derive_seed(settings["seed"], "last level"))
    report = health(codes, tokenizer, embeddings, [item.categories for item in data.catalog])
    check(report, settings["sid_min_unique"], tokenizer.config)
    write_sids(context.folder, data.catalog, codes)
    summary = asdict(report)
    write_json(context.folder / "health.json", summary)
    context.say(
        f"uniqueness {report.uniqueness:.4%} ({report.uniqueness_without_random_level:.2%} with nearest codes only), "
        f"codes in use {report.used_codes}, entropy {tuple(round(e, 2) for e in report.entropy)} bits, "
        f"reconstruction {report.reconstruction:.3f}; for example {sid_text(tuple(map(int, codes[0])))}"
    )
    if line := usage_line(report, tokenizer.config):
        context.say(line)
    context.say(neighbourhood_line(summary["neighbourhood"]))
    return summary


def check_settings(settings: Settings) -> None:
    """Check the `sid_` settings, see `recbole_gr2.sid.methods.tokenizer_config`."""
    tokenizer_config(settings)


def check_data(settings: Settings, data: Data) -> None:
    """Check that the catalogue has an item for each code, if k-means is used."""
    config = tokenizer_config(settings)
    if not isinstance(config, RQVAEConfig) or config.kmeans_init:
        check_items(data.item_count, config.codes)


STAGE = Stage(
    name="tokenizer",
    version=3,
    run=run,
    settings=("sid_", "seed"),
    excluded=("sid_encoder",),
    needs=("embeddings",),
    check=check_settings,
    check_data=check_data,
)
