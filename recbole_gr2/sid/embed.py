"""Text to vectors: what the semantic-ID tokenizer quantises (GR2 section 3, "item embeddings")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from recbole_gr2.console import progress
from recbole_gr2.errors import MissingFileError

MAX_TOKENS = 128  # a title and its categories fit; the rest of a description adds time, not neighbours
HASHED_NGRAMS = 2**18  # before folding: wide enough that document frequencies belong to one n-gram


def embed_texts(texts: Sequence[str], encoder: str | Path, *, batch_size: int = 64, device: str = "cpu") -> np.ndarray:
    """Sentence embeddings of N texts by a Hugging Face encoder, (N, D) float32, each of length 1.

    Token states are averaged under the attention mask, as sentence-transformers' MiniLM and MPNet models are trained
    to be read (Reimers and Gurevych, arXiv 1908.10084, section 3). Batches hold texts of similar length; the rows come
    back in the order of `texts`. `batch_size` changes the padding, hence the last bits of the floats, nothing else.

    Args:
        texts: N texts, cut at 128 tokens; an empty text is embedded as such.
        encoder: a folder or hub id that AutoTokenizer and AutoModel can load.
        batch_size: texts a forward pass.
        device: a torch device.

    Raises:
        MissingFileError: there is no such encoder.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model = AutoModel.from_pretrained(encoder, dtype=torch.float32).to(device).eval()
    except OSError as error:  # what transformers raises for a folder or hub id that it cannot load
        raise MissingFileError(
            f"no text encoder at {str(encoder)!r}: {error}",
            where="sid_encoder",
            why="items get their semantic IDs from embeddings of their text",
            do="name a packaged encoder (all-minilm-l6-v2), the folder of one, a hub id, or hash",
        ) from error
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    if not len(texts):
        return vectors
    tokens = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    longest_first = np.argsort([-len(ids) for ids in tokens], kind="stable")  # running out of memory shows at once
    with torch.inference_mode():
        for start in progress(range(0, len(texts), batch_size), "texts"):
            rows = longest_first[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt").to(device)
            states = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (states * mask).sum(1) / mask.sum(1)
            vectors[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
    return vectors


def hash_embeddings(texts: Sequence[str], dim: int = 256) -> np.ndarray:
    """Embeddings without a model, (N, dim) float32, for smoke runs: they know shared spelling, not shared meaning.

    TF-IDF of the words' character 3- to 5-grams, folded to `dim` by signed feature hashing (Weinberger et al.,
    arXiv 0902.2206): deterministic, with noise of about 1 / sqrt(dim) in a cosine. Rows have length 1, or 0 where the
    text is empty.
    """
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.preprocessing import normalize

    hashing = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=HASHED_NGRAMS, norm=None)
    weights = TfidfTransformer().fit_transform(hashing.transform(texts))
    columns = np.arange(HASHED_NGRAMS)
    fold = csr_matrix((np.ones(HASHED_NGRAMS), (columns, columns % dim)), shape=(HASHED_NGRAMS, dim))
    return normalize((weights @ fold).toarray()).astype(np.float32)


def neighbour_means(vectors: np.ndarray, rows: np.ndarray, pairs: csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings for items without text: the mean of what they are taken with, weighted by how often; ours.

    Only neighbours outside `rows` count, so that what fills one gap does not come from another.

    Args:
        vectors: text embeddings of all items, (N, D).
        rows: items without text, (M,).
        pairs: how often items were taken together, (N, N), e.g. what `co_engaged` gives.

    Returns:
        Which of `rows` have such neighbours, (M,) bool, and the means of these, of length 1, (M', D).
    """
    with_text = np.ones(len(vectors), dtype=vectors.dtype)
    with_text[rows] = 0
    sums = pairs[rows] @ (vectors * with_text[:, None])
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    found = lengths[:, 0] > 1e-6  # else no neighbour with a text, or vectors that cancel out
    return found, (sums[found] / lengths[found]).astype(np.float32)


def textless_line(facts: Mapping) -> str:
    """What became of items without text, from the embeddings stage's facts.

    >>> textless_line({"items": 50, "textless": 3, "collaborative": 2, "token": 1})
    '3 of 50 items have no text: 2 embedded by what they were taken with, 1 by their token'
    """
    if not facts["textless"]:
        return "every item has a text"
    return (
        f"{facts['textless']:,} of {facts['items']:,} items have no text: {facts['collaborative']:,} embedded by "
        f"what they were taken with, {facts['token']:,} by their token"
    )
