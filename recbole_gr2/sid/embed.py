"""Text embeddings of items: the input of the semantic-ID tokenizer (GR2, section 3, "item embeddings")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from recbole_gr2.errors import MissingFileError
from recbole_gr2.progress import progress
from recbole_gr2.types import Item

HASH = "hash"  # the name of an encoder without a model
MAX_TOKENS = 128  # Enough for a title and its categories. More of a description costs time without better neighbours.
BLOCK = 10_000  # texts that are weighted at a time in `hash_embeddings`
HASHED_NGRAMS = 2**18  # Hash buckets before folding. There are so many that n-grams rarely share a bucket.


def item_text(item: Item) -> str:
    """Return the text of an item that the encoder reads. It is empty if the item has no text.

    >>> item_text(Item(item_id=1, token="B001", title="Soap", brand="Acme", categories="Bath > Soap"))
    'Soap | Acme | Bath > Soap'
    """
    return " | ".join(filter(None, (item.title, item.brand, item.categories, item.description)))


def embed_texts(texts: Sequence[str], encoder: str | Path, *, batch_size: int = 64, device: str = "cpu") -> np.ndarray:
    """Embed N texts with a Hugging Face encoder, (N, D) float32. Each embedding has the length 1.

    An embedding is the mean of the token states under the attention mask. The MiniLM and MPNet models of
    sentence-transformers are trained for this (Reimers and Gurevych, arXiv 1908.10084, section 3). Batches contain
    texts of similar length. The result has the order of `texts`.

    Args:
        texts: N texts. They are truncated to 128 tokens. A text may be empty.
        encoder: a folder or a hub id that AutoTokenizer and AutoModel can load.
        batch_size: texts per forward pass. It changes the padding and thus only the last bits of the result.
        device: a torch device.

    Raises:
        MissingFileError: the encoder does not exist.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
        # Weights as pickles and code of the model's own could do any harm, so neither is loaded.
        model = AutoModel.from_pretrained(encoder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
        model = model.to(device).eval()
    except (OSError, ValueError) as error:  # a folder or hub id that transformers cannot load, or another kind of model
        raise MissingFileError(
            f"no text encoder at {str(encoder)!r}: {error}",
            where="sid_encoder",
            why="semantic IDs are computed from the embeddings of item texts",
            do="set sid_encoder to a packaged encoder (all-minilm-l6-v2), a folder with safetensors, a hub id, or hash",
        ) from error
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    if not len(texts):
        return vectors
    # A special token in a text, such as [SEP], is read as text.
    tokens = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS, split_special_tokens=True)["input_ids"]
    # The longest texts come first, so that an out-of-memory error occurs at once.
    by_length = np.argsort([-len(ids) for ids in tokens], kind="stable")
    with torch.inference_mode():
        for start in progress(range(0, len(texts), batch_size), "texts, batch"):
            positions = by_length[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [tokens[i] for i in positions]}, return_tensors="pt").to(device)
            states = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (states * mask).sum(1) / mask.sum(1)
            vectors[positions] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
    return vectors


def hash_embeddings(texts: Sequence[str], dim: int = 256) -> np.ndarray:
    """Embed N texts without a model, (N, dim) float32. Texts with similar spelling get similar vectors.

    It is for smoke runs. The vectors are TF-IDF weights of character 3- to 5-grams within words, folded to `dim` by
    signed feature hashing (Weinberger et al., arXiv 0902.2206). They are deterministic. The error of a cosine is about
    1 / sqrt(dim). A vector has the length 1, or 0 if its text is empty.

    Args:
        texts: N texts.
        dim: dimension of the vectors.
    """
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.preprocessing import normalize

    hashing = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=HASHED_NGRAMS, norm=None)
    # Counts are exact in float32. In blocks, the other matrices are never in memory as a whole.
    blocks = [
        hashing.transform(texts[start : start + BLOCK]).astype(np.float32) for start in range(0, len(texts), BLOCK)
    ]
    frequency = sum((np.bincount(block.indices, minlength=HASHED_NGRAMS) for block in blocks), np.zeros(HASHED_NGRAMS))
    inverse = np.log((len(texts) + 1) / (frequency + 1)) + 1  # as in scikit-learn's TfidfTransformer
    columns = np.arange(HASHED_NGRAMS)
    fold = csr_matrix((np.ones(HASHED_NGRAMS), (columns, columns % dim)), shape=(HASHED_NGRAMS, dim))
    vectors = np.empty((len(texts), dim), dtype=np.float32)
    for number, block in enumerate(blocks):
        weights = block.astype(np.float64)
        weights.data *= inverse[weights.indices]
        vectors[number * BLOCK : (number + 1) * BLOCK] = normalize((normalize(weights) @ fold).toarray())
    return vectors


def neighbour_means(vectors: np.ndarray, textless: np.ndarray, pairs: csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Embed items without text by the mean of their co-engaged items, weighted by the counts. Our choice.

    Only items with text count, so that no item is embedded by another one without text.

    Args:
        vectors: text embeddings of all items, (N, D).
        textless: positions of the items without text, from 0, (M,).
        pairs: counts of co-engaged items, (N, N), see `recbole_gr2.sid.contrastive.co_engaged`.

    Returns:
        (mask, means). The mask (M,) marks the items that have a co-engaged item with text. `means` (M', D) float32 are
        the embeddings of these items, of length 1.
    """
    with_text = np.ones(len(vectors), dtype=vectors.dtype)
    with_text[textless] = 0
    sums = pairs[textless] @ (vectors * with_text[:, None])
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    mask = lengths[:, 0] > 1e-6  # The length is 0 if there is no such item, or if the vectors cancel out.
    return mask, (sums[mask] / lengths[mask]).astype(np.float32)


def textless_line(summary: Mapping[str, Any]) -> str:
    """Return one line about items without text, from the summary of the embeddings stage.

    >>> textless_line({"items": 50, "textless": 3, "collaborative": 2, "token": 1})
    '3 of 50 items have no text: 2 embedded by co-engaged items, 1 by their token'
    """
    if not summary["textless"]:
        return "every item has a text"
    return (
        f"{summary['textless']:,} of {summary['items']:,} items have no text: {summary['collaborative']:,} embedded by "
        f"co-engaged items, {summary['token']:,} by their token"
    )
