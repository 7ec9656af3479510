"""Linear item-item weights in closed form, from interactions and item texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import scipy.sparse

BLOCK = 1024  # Rows of weights that are computed at the same time.


def inverse_gram(
    interactions: scipy.sparse.csr_matrix, embeddings: np.ndarray, *, ridge: float, text_weight: float
) -> np.ndarray:
    """Return P = (X^T X + text_weight T T^T + ridge I)^-1, (N, N) float32.

    The weights of EASE (Steck, WWW 2019, arXiv 1905.03375, equation 8) are B = -P / diag(P) with a diagonal of 0. The
    dimensions of the text embeddings are further rows of X, weighted by `text_weight` (collective EASE; Jeunen, Van
    Balen and Goethals, RecSys 2020). The matrix is inverted in place by a Cholesky decomposition in float32. The memory
    is about 2 x 4 N^2 bytes.

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
