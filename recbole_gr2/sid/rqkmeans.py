"""Residual k-means: semantic IDs without a network, by k-means on what the levels before left over.

OneRec (technical report, arXiv 2506.13695) tokenizes its items this way. Nothing is trained, so the embeddings' own
distances decide; the table is drawn from the codes as the RQ-VAE's is (`sid.rqvae.assign`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from sklearn.metrics import pairwise_distances_argmin
from threadpoolctl import threadpool_limits

from recbole_gr2.sid.rqvae import CHUNK, SidConfig, checked, kmeans, kmeans_rows, saved_files

WEIGHTS, CONFIG = "rqkmeans.safetensors", "rqkmeans.json"


@dataclass(frozen=True)
class RQKMeans:
    """L codebooks of C centroids in the space of the embeddings: `codebooks` (L, C, D) float32."""

    config: SidConfig
    codebooks: np.ndarray

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Nearest codes (N, L) int64 of embeddings (N, D)."""
        codes = np.empty((len(embeddings), len(self.codebooks)), dtype=np.int64)
        for start in range(0, len(codes), CHUNK):
            residual = np.array(embeddings[start : start + CHUNK], dtype=np.float32)
            for level, centroids in enumerate(self.codebooks):
                codes[start : start + CHUNK, level] = nearest = _nearest(residual, centroids)
                residual -= centroids[nearest]
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Embeddings (N, D) that codes (N, L) stand for: the sums of their centroids."""
        return sum(centroids[code] for centroids, code in zip(self.codebooks, codes.T, strict=True))

    def save(self, folder: str | Path) -> None:
        """Write codebooks (safetensors) and config (JSON) to `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"codebooks": self.codebooks}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> RQKMeans:
        """Read what `save` wrote.

        Raises:
            MissingFileError: one of the two files is not there.
        """
        config, weights = saved_files(folder, CONFIG, WEIGHTS, where="sid.rqkmeans.RQKMeans.load")
        return cls(SidConfig(**json.loads(config.read_text())), load_file(weights)["codebooks"])


def fit_rqkmeans(embeddings: np.ndarray, config: SidConfig) -> RQKMeans:
    """k-means on the embeddings (N, D), then on the residuals of each level. The same seed gives the same codebooks.

    Raises:
        ConfigurationError: not a finite (N, D) matrix, or fewer items than codes.
    """
    data = checked(embeddings, config.codes)
    residual, codebooks = data[kmeans_rows(len(data), config)], []
    for level in range(config.levels):
        means = kmeans(residual, config.codes, config.seed + level)
        codebooks.append(means.cluster_centers_)
        residual = residual - means.cluster_centers_[means.labels_]
    return RQKMeans(config, np.stack(codebooks))


def _nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    with threadpool_limits(1):
        return pairwise_distances_argmin(points, centroids).astype(np.int64)
