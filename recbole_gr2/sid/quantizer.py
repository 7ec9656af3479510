"""What all semantic-ID tokenizers share: settings, k-means, input checks, and the assignment of semantic IDs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from recbole_gr2.errors import ConfigurationError, MissingFileError

RANDOM_MODES = ("unused_first", "uniform")
CHUNK = 4096  # Items per forward pass outside training. It is a constant, because the batch size can change a result.
KMEANS_ITEMS_PER_CODE = 256  # Size of the k-means sample. More items do not move the centroids.


@dataclass(frozen=True)
class SidConfig:
    """Settings of the semantic IDs, common to all tokenizers. The symbols are those of GR2, section 3.

    Args:
        levels: L, the number of codes of a semantic ID, 1 to 26.
        codes: C, the size of the codebook of each level, at least 2.
        random_last: M, the number of last levels whose codes `assign` draws at random, 0 to levels - 1.
        random_mode: `unused_first` draws among the codes that no other item with the same prefix has. `uniform` draws
            among all codes.
        seed: seed of the fit.

    Attributes:
        by_steps: whether the tokenizer is trained in optimizer steps.

    Raises:
        ConfigurationError: a value is outside its range. The error names all such values.
    """

    by_steps: ClassVar[bool] = False
    levels: int = 4
    codes: int = 256
    random_last: int = 1
    random_mode: str = "unused_first"
    seed: int = 2020

    def rules(self) -> dict[str, bool]:
        """Return each rule as a sentence, and whether the settings meet it."""
        return {
            "levels must be 1..26": 1 <= self.levels <= 26,
            "codes must be at least 2": self.codes >= 2,
            "random_last must be 0..levels-1": 0 <= self.random_last < self.levels,
            f"random_mode must be one of {', '.join(RANDOM_MODES)}": self.random_mode in RANDOM_MODES,
        }

    def __post_init__(self) -> None:
        broken = [rule for rule, is_met in self.rules().items() if not is_met]
        if broken:
            raise ConfigurationError(
                "; ".join(broken),
                where="semantic-ID tokenizer settings",
                why="a tokenizer cannot be built from these values",
                do="correct the values named above",
            )


class Quantizer(Protocol):
    """A fitted tokenizer that converts item embeddings to codes."""

    @property
    def config(self) -> SidConfig:
        """Settings of the semantic IDs."""
        ...

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the nearest codes of embeddings (N, D), (N, L) int64."""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return the embeddings (N, D) that codes (N, L) represent."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write the weights and the settings to a folder."""
        ...


def assign(quantizer: Quantizer, embeddings: np.ndarray, *, seed: int) -> np.ndarray:
    """Return the semantic IDs of N items, (N, L) int64.

    The codes are the nearest ones. Only the codes of the last `random_last` levels are drawn at random. In the mode
    `unused_first`, items with the same prefix get distinct codes as long as at most C^M items share the prefix. After
    C^M items a new round starts.

    Args:
        quantizer: a fitted tokenizer.
        embeddings: item embeddings, (N, D).
        seed: seed of the random levels. The same seed gives the same semantic IDs.
    """
    config = quantizer.config
    codes = quantizer.encode(embeddings)
    if config.random_last == 0:
        return codes
    generator, combinations = np.random.default_rng(seed), config.codes**config.random_last
    prefix_length = config.levels - config.random_last
    if config.random_mode == "uniform":
        draws = generator.integers(combinations, size=len(codes))
    else:
        draws = np.empty(len(codes), dtype=np.int64)
        _, prefixes, counts = np.unique(codes[:, :prefix_length], axis=0, return_inverse=True, return_counts=True)
        by_prefix = np.argsort(prefixes.reshape(-1), kind="stable")
        for positions in np.split(by_prefix, np.cumsum(counts)[:-1]):
            for start in range(0, len(positions), combinations):
                block = positions[start : start + combinations]
                draws[block] = generator.choice(combinations, size=len(block), replace=False)
    for level in reversed(range(prefix_length, config.levels)):
        draws, codes[:, level] = np.divmod(draws, config.codes)
    return codes


def assign_new(quantizer: Quantizer, embeddings: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return semantic IDs of M new items beside those of a catalogue, (M, L) int64.

    The codes are the nearest ones. The codes of the last `random_last` levels are the first ones that no item with the
    same prefix has. If all are taken, they are the first ones.

    Args:
        quantizer: a fitted tokenizer.
        embeddings: embeddings of the new items, (M, D).
        codes: semantic IDs of the catalogue, (N, L).
    """
    config = quantizer.config
    new = quantizer.encode(embeddings)
    if config.random_last == 0:
        return new
    length = config.levels - config.random_last
    taken = {tuple(row) for row in codes.tolist()}
    for row in new:
        for number in range(config.codes**config.random_last):
            rest = number
            for level in reversed(range(length, config.levels)):
                rest, row[level] = divmod(rest, config.codes)
            if tuple(row.tolist()) not in taken:
                break
        else:
            row[length:] = 0
        taken.add(tuple(row.tolist()))
    return new


def kmeans_sample(items: int, config: SidConfig) -> np.ndarray:
    """Return the positions of the items that k-means is fitted on, in random order.

    These are all items, or `KMEANS_ITEMS_PER_CODE` items per code if there are more.
    """
    return np.random.default_rng(config.seed).permutation(items)[: KMEANS_ITEMS_PER_CODE * config.codes]


def kmeans(points: np.ndarray, codes: int, seed: int) -> KMeans:
    """Fit k-means with k-means++ initialisation on points (N, D). The result does not depend on the number of threads.

    Args:
        points: N points, N >= `codes`.
        codes: number of clusters.
        seed: seed of the initialisation.
    """
    # One thread, because k-means adds the sums of its threads in the order in which they finish.
    with threadpool_limits(1), warnings.catch_warnings():
        # Equal points are usual in small catalogues, and the stage reports how many codes are used.
        warnings.filterwarnings("ignore", "Number of distinct clusters", ConvergenceWarning)
        return KMeans(codes, n_init=1, random_state=seed).fit(points)


def check_embeddings(embeddings: np.ndarray, min_items: int) -> np.ndarray:
    """Return embeddings (N, D) as a contiguous float32 array.

    Args:
        embeddings: item embeddings.
        min_items: least number of items.

    Raises:
        ConfigurationError: the embeddings are not a finite (N, D) matrix, or there are fewer than `min_items` items.
    """
    data = np.ascontiguousarray(embeddings, dtype=np.float32)
    chunks = (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))
    if data.ndim != 2 or not len(data) or not all(np.isfinite(chunk).all() for chunk in chunks):
        raise ConfigurationError(
            f"item embeddings must be a finite (N, D) matrix, got shape {data.shape}",
            where="tokenizer stage",
            why="the tokenizer is fitted to these values",
            do="check the item texts and the encoder that embedded them",
        )
    check_items(len(data), min_items)
    return data


def check_items(items: int, min_items: int) -> None:
    """Check that a catalogue is large enough for k-means.

    Args:
        items: number of items, N.
        min_items: least number of items: the number of codes if the codebooks start from k-means, else 1.

    Raises:
        ConfigurationError: there are fewer items.
    """
    if items < min_items:
        raise ConfigurationError(
            f"{items} items are too few for {min_items} codes per level",
            where="sid_codes",
            why="k-means needs at least one item for each code",
            do=f"set sid_codes to {fitting_codes(items)}",
        )


def fitting_codes(items: int) -> int:
    """Return a size of the codebooks that suits N items: a power of 2 with at least two items for each code, or 2.

    With fewer items the residuals of the first level are nearly 0, and later levels have nothing to distinguish.

    >>> fitting_codes(5), fitting_codes(40), fitting_codes(300)
    (2, 16, 128)
    """
    return 1 << max(1, (items // 2).bit_length() - 1)


def saved_files(folder: str | Path, *names: str, where: str) -> list[Path]:
    """Return the paths of the files of a saved tokenizer.

    Args:
        folder: folder of the tokenizer.
        names: names of the files.
        where: the caller, for the error message.

    Raises:
        MissingFileError: a file does not exist.
    """
    files = [Path(folder) / name for name in names]
    for file in files:
        if not file.is_file():
            raise MissingFileError(
                f"no {file.name} in {str(file.parent)!r}",
                where=where,
                why="the codebooks of the tokenizer are needed to assign semantic IDs to items",
                do="run the tokenizer stage again",
            )
    return files
