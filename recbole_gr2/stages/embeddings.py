"""Embeddings: item texts as vectors. A stage of its own, so that all tokenizers of the same texts share them."""

from __future__ import annotations

from typing import Any

import numpy as np

from recbole_gr2.artifacts import write_embeddings
from recbole_gr2.config import Settings
from recbole_gr2.llm.download import check_name, identity, resolve
from recbole_gr2.llm.model import device
from recbole_gr2.sid.contrastive import co_engaged
from recbole_gr2.sid.embed import HASH, embed_texts, hash_embeddings, item_text, neighbour_means, textless_line
from recbole_gr2.types import Context, Stage


def run(context: Context) -> dict[str, Any]:
    """Write embeddings.npy.

    An item without any text gets the embedding of its token. With `text_missing: collaborative` it gets the mean
    embedding of the items with text that users interacted with directly before or after it, if there are any. These
    interactions exclude the targets of the train requests.

    Raises:
        MissingFileError: there is no such encoder.
    """
    settings, data = context.settings, context.data
    texts = [item_text(item) for item in data.catalog]
    inputs = [text or item.token for text, item in zip(texts, data.catalog, strict=True)]
    if settings["sid_encoder"] == HASH:
        embeddings = hash_embeddings(inputs)
    else:
        embeddings = embed_texts(inputs, resolve(settings["sid_encoder"], where="sid_encoder"), device=device())
    context.say(f"{len(texts):,} texts, {embeddings.shape[1]} dimensions")
    textless = np.array([position for position, text in enumerate(texts) if not text], dtype=np.int64)
    collaborative = 0
    if len(textless) and settings["text_missing"] == "collaborative":
        pairs = co_engaged(data.known_items("hold_out"), data.item_count)
        has_neighbours, means = neighbour_means(embeddings, textless, pairs)
        embeddings[textless[has_neighbours]] = means
        collaborative = int(has_neighbours.sum())
    summary = {
        "items": len(texts),
        "dimensions": embeddings.shape[1],
        "textless": len(textless),
        "collaborative": collaborative,
        "token": len(textless) - collaborative,
    }
    context.say(textless_line(summary))
    write_embeddings(context.folder, embeddings)
    return summary


def check_settings(settings: Settings) -> None:
    """Check the name of the encoder."""
    check_name(settings["sid_encoder"], where="sid_encoder", others=(HASH,))


def key_values(settings: Settings) -> dict[str, Any]:
    """Return what identifies the encoder."""
    encoder = settings["sid_encoder"]
    return {} if encoder == HASH else {"sid_encoder": identity(encoder, where="sid_encoder")}


STAGE = Stage(
    name="embeddings",
    version=3,
    run=run,
    settings=("sid_encoder", "text_"),
    check=check_settings,
    key_values=key_values,
)
