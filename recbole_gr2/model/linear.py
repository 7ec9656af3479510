"""Linear item-item weights in closed form, from interactions and item texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import scipy.sparse
    from numpy.typing import ArrayLike

BLOCK = 1024  # Rows of weights that are computed at the same time.
EXACT_ITEMS = 20_000  # Most items with exact weights, in a dense matrix of 1.6 GB. Our choice.
# Neighbours of an item in `neighbour_weights`: items with common users, and items with similar texts. Our choice.
TOGETHER, SIMILAR = 16, 16
MANY = 10_000  # Number of entries from which `SparseLookup` sorts them first.
CELLS = 8  # Cells that `similar_items` searches for each item. Our choice.


def inverse_gram(
    interactions: scipy.sparse.csr_matrix, embeddings: np.ndarray, *, ridge: float, text_weight: float
) -> np.ndarray:
    """Return P = (X^T X + text_weight T T^T + ridge I)^-1, (N, N) float32.

    The weights of EASE (Steck, WWW 2019, arXiv 1905.03375, equation 8) are B = -P / diag(P) with a diagonal of 0. The
    dimensions of the text embeddings are further rows of X, weighted by `text_weight` (collective EASE; Jeunen, Van
    Balen and Goethals, RecSys 2020). The matrix is inverted in place by a Cholesky decomposition in float32, so that
    the memory is about 4 N^2 bytes.

    Args:
        interactions: X, (U, N) float32.
        embeddings: T, (N, D). Not used if `text_weight` is 0.
        ridge: weight of the regularization, above 0.
        text_weight: weight of the texts, at least 0.
    """
    import torch

    matrix = torch.from_numpy((interactions.T @ interactions).toarray())
    if text_weight:
        texts = torch.from_numpy(np.asarray(embeddings, dtype=np.float32))
        matrix.addmm_(texts, texts.T, alpha=text_weight)
    matrix.diagonal().add_(ridge)
    torch.linalg.cholesky(matrix, out=matrix)
    torch.cholesky_inverse(matrix, out=matrix)
    return matrix.numpy()


def largest_weights(inverse: np.ndarray, count: int) -> scipy.sparse.csr_matrix:
    """Return the weights B = -P / diag(P) of the items 0..N, (N + 1, N + 1) float32, with a diagonal of 0.

    Args:
        inverse: P for the items 1..N, (N, N). Item 0 is padding and has no weights.
        count: number of weights with the largest absolute values to keep in each row; 0 keeps all.
    """
    import scipy.sparse

    size = len(inverse)
    count = min(count, size) or size
    scale = -inverse.diagonal()
    columns, values = np.empty((size, count), dtype=np.int32), np.empty((size, count), dtype=np.float32)
    for start in range(0, size, BLOCK):
        rows = np.arange(start, min(start + BLOCK, size))
        block = inverse[rows] / scale
        block[np.arange(len(rows)), rows] = 0.0
        if count < size:
            kept = np.sort(np.argpartition(-np.abs(block), count - 1, axis=1)[:, :count], axis=1)
        else:
            kept = np.broadcast_to(np.arange(size), block.shape)
        columns[rows], values[rows] = kept + 1, np.take_along_axis(block, kept, axis=1)
    ends = np.r_[0, np.arange(size + 1) * count]  # The row of the padding is empty.
    return scipy.sparse.csr_matrix((values.ravel(), columns.ravel(), ends), shape=(size + 1, size + 1))


def neighbour_weights(
    interactions: scipy.sparse.csr_matrix, embeddings: np.ndarray, *, ridge: float, text_weight: float
) -> scipy.sparse.csr_matrix:
    """Return sparse item-item weights B for large catalogues, (N, N) float32, with a diagonal of 0.

    Each column is a ridge regression of an item on its neighbours S: b_S = (G_SS + ridge I)^-1 g_S with
    G = X^T X + text_weight T T^T. This is the model of `inverse_gram` with other weights fixed to 0 (SLIM with feature
    selection: Ning and Karypis, ICDM 2011). If all other items were neighbours, B would be -P / diag(P). The
    neighbours of item j are the `TOGETHER` items i with the largest G_ij among those with common users, and the
    `SIMILAR` items that `similar_items` finds.

    Time and memory grow with the items and with the pairs of items that have common users; only the search for similar
    texts grows with N^1.5.

    Args:
        interactions: X, (U, N) float32.
        embeddings: T, (N, D) of length 1 or 0. Not used if `text_weight` is 0.
        ridge: weight of the regularization, above 0.
        text_weight: weight of the texts, at least 0.
    """
    import scipy.sparse

    counts = SparseLookup(interactions.T.tocsr() @ interactions)
    vectors = np.asarray(embeddings if text_weight else embeddings[:, :0], dtype=np.float32)
    similar = similar_items(vectors, SIMILAR) if text_weight else np.empty((len(vectors), 0), dtype=np.int64)
    rows, columns, values = [], [], []
    for start in range(0, len(vectors), BLOCK):
        items = np.arange(start, min(start + BLOCK, len(vectors)))
        chosen = np.full((len(items), TOGETHER + similar.shape[1]), -1)
        chosen[:, TOGETHER:] = similar[items]
        for number, item in enumerate(items.tolist()):
            found, users = counts.row(item)
            if len(found) > TOGETHER + 1:  # The item itself is one of them.
                strength = users + text_weight * (vectors[found] @ vectors[item])
                strength[found == item] = -np.inf
                found = found[np.argpartition(-strength, TOGETHER - 1)[:TOGETHER]]
            else:
                found = found[found != item]
            chosen[number, : len(found)] = found
        chosen.sort(axis=1)
        chosen[:, 1:][chosen[:, 1:] == chosen[:, :-1]] = -1  # A place that repeats a neighbour is empty.
        used = chosen >= 0
        row, place = np.nonzero(used)
        rows.append(chosen[row, place].astype(np.int32))
        columns.append(items[row].astype(np.int32))
        solved = _regressions(counts, vectors, items, chosen, ridge=ridge, text_weight=text_weight)
        values.append(solved[row, place])
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    return scipy.sparse.csr_matrix(entries, shape=(len(vectors), len(vectors)))


def _regressions(
    counts: SparseLookup,
    vectors: np.ndarray,
    items: np.ndarray,
    chosen: np.ndarray,
    *,
    ridge: float,
    text_weight: float,
) -> np.ndarray:
    """Weights of the neighbours of some items, (B, S) float32. A place without a neighbour has the weight 0.

    Args:
        counts: X^T X.
        vectors: T, (N, D).
        items: B items.
        chosen: the neighbours S of each of them, (B, S); -1 for a place without one.
        ridge, text_weight: see `neighbour_weights`.
    """
    import torch

    used, width = chosen >= 0, chosen.shape[1]
    known = np.where(used, chosen, 0)
    upper, lower = np.triu_indices(width)
    gram = np.empty((len(items), width, width), dtype=np.float32)
    gram[:, upper, lower] = gram[:, lower, upper] = counts.values_at(known[:, upper], known[:, lower])
    texts = vectors[known]
    gram += text_weight * (texts @ texts.transpose(0, 2, 1))
    gram *= used[:, :, None] & used[:, None, :]
    gram[:, np.arange(width), np.arange(width)] += ridge
    target = counts.values_at(known, items[:, None]) + text_weight * (texts @ vectors[items][:, :, None])[:, :, 0]
    target = (target * used).astype(np.float32)
    return torch.linalg.solve(torch.from_numpy(gram), torch.from_numpy(target)).numpy()


def similar_items(vectors: np.ndarray, count: int) -> np.ndarray:
    """Return the items with the most similar texts that a search in cells finds, (N, count) int64.

    There are sqrt(N) cells. The centres are items, drawn with a fixed seed, and an item belongs to the cell whose
    centre is most similar to it. It is compared with the items of the `CELLS` cells whose centres are most similar. So
    the time grows with N^1.5 instead of N^2, and some of the most similar items are missed. A place without an item
    has -1.

    Args:
        vectors: text embeddings of length 1 or 0, (N, D) float32.
        count: number of items.
    """
    size = len(vectors)
    cells = max(1, round(size**0.5))
    centres = vectors[np.random.default_rng(0).permutation(size)[:cells]].T
    nearest = np.empty((size, min(CELLS, cells)), dtype=np.int32)
    for start in range(0, size, BLOCK):
        block = slice(start, start + BLOCK)
        nearest[block] = np.argsort(-(vectors[block] @ centres), axis=1, kind="stable")[:, : nearest.shape[1]]
    best, cosine = np.full((size, count), -1), np.full((size, count), -np.inf, dtype=np.float32)
    members_of = _groups(nearest[:, 0], cells)
    for place in range(nearest.shape[1]):
        for members, searching in zip(members_of, _groups(nearest[:, place], cells), strict=True):
            for start in range(0, len(searching), BLOCK):
                items = searching[start : start + BLOCK]
                found = vectors[items] @ vectors[members].T
                found[items[:, None] == members] = -np.inf
                found = np.concatenate([cosine[items], found], axis=1)
                ids = np.concatenate([best[items], np.broadcast_to(members, (len(items), len(members)))], axis=1)
                top = np.argpartition(-found, count - 1, axis=1)[:, :count]
                best[items], cosine[items] = np.take_along_axis(ids, top, 1), np.take_along_axis(found, top, 1)
    best[cosine == -np.inf] = -1
    return best


def _groups(numbers: np.ndarray, count: int) -> list[np.ndarray]:
    """Places of each number 0 .. count - 1, in their order.

    >>> [places.tolist() for places in _groups(np.array([1, 0, 1]), 3)]
    [[1], [0, 2], []]
    """
    ends = np.cumsum(np.bincount(numbers, minlength=count))
    return np.split(np.argsort(numbers, kind="stable"), ends[:-1])


class SparseLookup:
    """Reads many entries of a sparse matrix at once. It is much faster than SciPy's indexing.

    Args:
        matrix: a sparse matrix.
    """

    def __init__(self, matrix: scipy.sparse.spmatrix) -> None:
        matrix = matrix.tocsr()
        matrix.sum_duplicates()  # It also sorts the entries.
        self._columns = matrix.shape[1]
        rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
        rows *= self._columns
        rows += matrix.indices
        self._keys, self._values, self._starts = rows, matrix.data, matrix.indptr

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns of the entries of a row, and their values."""
        part = slice(self._starts[number], self._starts[number + 1])
        return self._keys[part] - number * self._columns, self._values[part]

    def rows(self, numbers: Sequence[int], columns: np.ndarray) -> np.ndarray:
        """Return the entries of some rows at the same columns, (R, C).

        It is faster than `values_at` if there are few rows, because it searches each row alone.

        Args:
            numbers: numbers of the rows, (R,).
            columns: columns, (C,).
        """
        entries = np.zeros((len(numbers), len(columns)), dtype=self._values.dtype)
        for entry, number in zip(entries, numbers, strict=True):
            found, values = self.row(number)
            if len(found):
                place = found.searchsorted(columns)
                place[place == len(found)] = 0
                same = found[place] == columns
                entry[same] = values[place[same]]
        return entries

    def values_at(self, rows: ArrayLike, columns: ArrayLike) -> np.ndarray:
        """Return the entries at (rows, columns). The two arguments are broadcast against each other."""
        keys = np.asarray(rows, dtype=np.int64) * self._columns + columns
        if not len(self._keys):
            return np.zeros(keys.shape, dtype=np.float32)
        if keys.size < MANY:
            index = np.searchsorted(self._keys, keys)
        else:  # In order, many searches are four times as fast, because they read neighbouring keys.
            order = np.argsort(keys, axis=None)
            index = np.empty(keys.size, dtype=np.int64)
            index[order] = np.searchsorted(self._keys, keys.ravel()[order])
            index = index.reshape(keys.shape)
        index = index.clip(max=len(self._keys) - 1)
        return np.where(self._keys[index] == keys, self._values[index], 0.0)
