"""Embeddings: item texts -> vectors. A stage of its own, so that every tokenizer of the same texts shares them."""

from __future__ import annotations

import numpy as np
import torch

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.packages import resolve
from recbole_gr2.sid.contrastive import co_engaged
from recbole_gr2.sid.embed import embed_texts, hash_embeddings, neighbour_means, textless_line
from recbole_gr2.stages import Context
from recbole_gr2.types import Item

MISSING = ("collaborative", "token")


def run(context: Context) -> dict:
    """Writes embeddings.npy, (N, D) float32: row n is the item of id n + 1.

    An item without any text gets the embedding of its token, or a collaborative one where `text_missing` says so and
    it has neighbours with text: items that users took just before or after it, in training interactions without each
    user's last one, which is the target of the user's train list.

    Raises:
        ConfigurationError: an unknown `text_missing`.
        MissingFileError: there is no such encoder.
    """
    settings, data = context.settings, context.data
    if settings["text_missing"] not in MISSING:
        raise ConfigurationError(
            f"there is no embedding {settings['text_missing']!r} of items without text",
            where="text_missing",
            do=f"choose {list(MISSING)}",
        )
    texts = [item_text(item) for item in data.items]
    read = [text or item.token for text, item in zip(texts, data.items, strict=True)]
    if settings["sid_encoder"] == "hash":
        embeddings = hash_embeddings(read)
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        embeddings = embed_texts(read, resolve(settings["sid_encoder"]), device=device)
    context.say(f"{len(texts):,} texts embedded, {embeddings.shape[1]} dimensions")
    textless, collaborative = np.array([row for row, text in enumerate(texts) if not text], dtype=np.int64), 0
    if len(textless) and settings["text_missing"] == "collaborative":
        pairs = co_engaged(data.open_sequences(), data.item_count)
        found, means = neighbour_means(embeddings, textless, pairs)
        embeddings[textless[found]] = means
        collaborative = int(found.sum())
    facts = {
        "items": len(texts),
        "dimensions": embeddings.shape[1],
        "textless": len(textless),
        "collaborative": collaborative,
        "token": len(textless) - collaborative,
    }
    context.say(textless_line(facts))
    np.save(context.folder / "embeddings.npy", embeddings)
    return facts


def item_text(item: Item) -> str:
    """What the encoder reads of an item; "" where there is no text at all."""
    return " | ".join(filter(None, (item.title, item.brand, item.categories, item.description)))


def load_embeddings(context: Context) -> np.ndarray:
    """The embedding of every item, (N, D) float32."""
    return np.load(context.folders["embeddings"] / "embeddings.npy")
