"""Embeddings: item texts -> vectors. A stage of its own, so that every tokenizer of the same texts shares them."""

from __future__ import annotations

import numpy as np
import torch

from recbole_gr2.llm.packages import resolve
from recbole_gr2.sid.embed import embed_texts, hash_embeddings
from recbole_gr2.stages import Context
from recbole_gr2.types import Item


def run(context: Context) -> dict:
    """Writes embeddings.npy, (N, D) float32: row n is the item of id n + 1."""
    encoder = context.settings["sid_encoder"]
    texts = [item_text(item) for item in context.data.items]
    if encoder == "hash":
        embeddings = hash_embeddings(texts)
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        embeddings = embed_texts(texts, resolve(encoder), device=device)
    np.save(context.folder / "embeddings.npy", embeddings)
    context.say(f"{len(texts):,} texts embedded, {embeddings.shape[1]} dimensions")
    return {"items": len(texts), "dimensions": embeddings.shape[1]}


def item_text(item: Item) -> str:
    """What the encoder reads of an item; the token where there is no text at all."""
    return " | ".join(filter(None, (item.title, item.brand, item.categories, item.description))) or item.token


def load_embeddings(context: Context) -> np.ndarray:
    """The text embedding of every item, (N, D) float32."""
    return np.load(context.folders["embeddings"] / "embeddings.npy")
