"""Residual k-means: semantic IDs without a neural network, by k-means on the residuals of the previous levels.

OneRec (technical report, arXiv 2506.13695) tokenizes its items this way. The codes follow the distances of the
embeddings, because no encoder is trained.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from sklearn.metrics import pairwise_distances_argmin
from threadpoolctl import threadpool_limits

from recbole_gr2.sid.quantizer import CHUNK, SidConfig, check_embeddings, kmeans, kmeans_sample, saved_files

WEIGHTS, CONFIG = "rqkmeans.safetensors", "rqkmeans.json"


@dataclass(frozen=True)
class RQKMeans:
    """L codebooks of C centroids in the embedding space.

    Attributes:
        config: settings of the semantic IDs.
        codebooks: the centroids, (L, C, D) float32.
    """

    config: SidConfig
    codebooks: np.ndarray

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the nearest codes of embeddings (N, D), (N, L) int64."""
        codes = np.empty((len(embeddings), len(self.codebooks)), dtype=np.int64)
        for start in range(0, len(codes), CHUNK):
            residual = np.array(embeddings[start : start + CHUNK], dtype=np.float32)
            for level, centroids in enumerate(self.codebooks):
                codes[start : start + CHUNK, level] = nearest = _nearest(residual, centroids)
                residual -= centroids[nearest]
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return the embeddings (N, D) that codes (N, L) represent: the sums of their centroids."""
        return sum(centroids[code] for centroids, code in zip(self.codebooks, codes.T, strict=True))

    def save(self, folder: str | Path) -> None:
        """Write the codebooks (safetensors) and the settings (JSON) to a folder. The folder is created if necessary."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"codebooks": self.codebooks}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> RQKMeans:
        """Read a tokenizer that `save` wrote.

        Raises:
            MissingFileError: one of the two files does not exist.
        """
        config, weights = saved_files(folder, CONFIG, WEIGHTS, where="sid.rqkmeans.RQKMeans.load")
        return cls(SidConfig(**json.loads(config.read_text())), load_file(weights)["codebooks"])


def fit_rqkmeans(embeddings: np.ndarray, config: SidConfig) -> RQKMeans:
    """Fit k-means on the embeddings, then on the residuals of each level. The same seed gives the same codebooks.

    Args:
        embeddings: finite item embeddings, (N, D), N at least `config.codes`.
        config: settings of the semantic IDs.

    Raises:
        ConfigurationError: the embeddings are not a finite (N, D) matrix, or there are fewer items than codes.
    """
    data = check_embeddings(embeddings, config.codes)
    residual, codebooks = data[kmeans_sample(len(data), config)], []
    for level in range(config.levels):
        clusters = kmeans(residual, config.codes, config.seed + level)
        codebooks.append(clusters.cluster_centers_)
        residual = residual - clusters.cluster_centers_[clusters.labels_]
    return RQKMeans(config, np.stack(codebooks))


def _nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the index of the nearest centroid of each point, (N,) int64."""
    with threadpool_limits(1):
        return pairwise_distances_argmin(points, centroids).astype(np.int64)
