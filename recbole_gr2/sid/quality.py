"""Quality of semantic IDs: whether they are unique, and whether items that share codes are similar."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from recbole_gr2.errors import QualityCheckError
from recbole_gr2.sid.quantizer import CHUNK, Quantizer, SidConfig, fitting_codes
from recbole_gr2.types import Health, Neighbourhood


def health(codes: np.ndarray, quantizer: Quantizer, embeddings: np.ndarray, categories: Sequence[str] = ()) -> Health:
    """Measure the quality of semantic IDs.

    Args:
        codes: the semantic IDs as `assign` returned them, (N, L).
        quantizer: the tokenizer that made them.
        embeddings: the item embeddings, (N, D).
        categories: N category texts, "" for an item without one. Without any category the neighbourhood is not
            measured.
    """
    _, sizes = np.unique(codes, axis=0, return_counts=True)
    shares = [np.unique(column, return_counts=True)[1] / len(codes) for column in codes.T]
    nearest = quantizer.encode(embeddings)
    chunks = [slice(start, start + CHUNK) for start in range(0, len(codes), CHUNK)]
    cosines = np.concatenate([_cosines(quantizer.decode(nearest[chunk]), embeddings[chunk]) for chunk in chunks])
    return Health(
        items=len(codes),
        uniqueness=len(sizes) / len(codes),
        uniqueness_without_random_level=len(np.unique(nearest, axis=0)) / len(codes),
        largest_collision=int(sizes.max()),
        used_codes=tuple(len(share) for share in shares),
        entropy=tuple(float(-(share * np.log2(share)).sum()) + 0.0 for share in shares),
        reconstruction=float(cosines.mean()),
        neighbourhood=neighbourhood(codes[:, : codes.shape[1] - quantizer.config.random_last], categories),
    )


def neighbourhood(codes: np.ndarray, categories: Sequence[str]) -> Neighbourhood | None:
    """Measure whether items with a common prefix have the same category, over all pairs of items with a category.

    The measure is our own. All pairs are counted without sampling: a group of n items has n * (n - 1) / 2 pairs.

    Args:
        codes: the levels that are not drawn at random, (N, P).
        categories: N category texts, "" for an item without one.

    Returns:
        The measure, or None if fewer than two items have a category.
    """
    positions = [position for position, text in enumerate(categories) if text]
    if len(positions) < 2:
        return None
    paths = [category_path(categories[position]) for position in positions]
    path, top = _labels(paths), _labels([parts[:2] for parts in paths])
    prefixes = [codes[positions, :length] for length in range(1, codes.shape[1] + 1)]
    every_pair = len(positions) * (len(positions) - 1) // 2
    return Neighbourhood(
        items=len(positions),
        pairs=tuple(_pairs(prefix) for prefix in prefixes),
        same_path=tuple(_share(_pairs(prefix, path), _pairs(prefix)) for prefix in prefixes),
        same_top=tuple(_share(_pairs(prefix, top), _pairs(prefix)) for prefix in prefixes),
        random_path=_pairs(path) / every_pair,
        random_top=_pairs(top) / every_pair,
    )


def category_path(categories: str) -> tuple[str, ...]:
    """Split a category text into parts. Two items have the same category if their parts are equal.

    A path has its parts in order. Plain words, such as the genres of ml-100k, form a set in alphabetical order. The
    first two parts of a set are thus not a more general category, only a coarser grouping.

    >>> category_path("Beauty > Skin Care > Face"), category_path("Drama Comedy")
    (('Beauty', 'Skin Care', 'Face'), ('Comedy', 'Drama'))
    """
    return tuple(categories.split(" > ")) if " > " in categories else tuple(sorted(set(categories.split())))


def neighbourhood_line(neighbourhood: Mapping[str, Any] | None) -> str:
    """Return one line about a `Neighbourhood`, given as a dictionary.

    >>> neighbourhood_line({"same_path": (0.25,), "same_top": (0.5,), "random_path": 0.02, "random_top": 0.2})
    'pairs that share 1 codes: same category path 25.0 % (all pairs 2.0 %), same first two parts 50.0 % (20.0 %)'
    """
    if not neighbourhood:
        return "categories of pairs: not measured, because fewer than two items have a category"

    def percent(*shares: float | None) -> str:
        return ", ".join("-" if share is None else f"{100 * share:.1f} %" for share in shares)

    lengths = ", ".join(str(length) for length in range(1, len(neighbourhood["same_path"]) + 1))
    return (
        f"pairs that share {lengths} codes: same category path {percent(*neighbourhood['same_path'])} "
        f"(all pairs {percent(neighbourhood['random_path'])}), "
        f"same first two parts {percent(*neighbourhood['same_top'])} ({percent(neighbourhood['random_top'])})"
    )


def usage_line(health: Health, config: SidConfig) -> str | None:
    """Return one line about nearest-code levels that use less than half of their codes, or None if there is none.

    A random last level makes semantic IDs distinct even if the other levels say little about the items.

    Args:
        health: the measured quality.
        config: settings of the tokenizer.
    """
    possible = min(config.codes, health.items)
    nearest = health.used_codes[: config.levels - config.random_last]
    few = [f"{used} on level {level}" for level, used in enumerate(nearest, 1) if 2 * used < possible]
    if not few:
        return None
    remedies = [f"sid_codes {fitting_codes(health.items)}"] if config.codes > fitting_codes(health.items) else []
    remedies += ["more sid_epochs"] if config.by_steps else []
    return f"note: of {possible} possible codes the items use {', '.join(few)}; try {' or '.join(remedies)}"


def check(health: Health, min_unique: float, config: SidConfig) -> None:
    """Stop if later stages cannot use the semantic IDs. The error advises only what is not set yet.

    Args:
        health: the measured quality.
        min_unique: least uniqueness, 0 to 1.
        config: settings of the tokenizer.

    Raises:
        QualityCheckError: the uniqueness is below `min_unique`, or a level uses fewer than 2 codes.
    """
    problems, remedies = [], []
    if health.uniqueness < min_unique:
        problems.append(
            f"{health.uniqueness:.2%} of semantic IDs are unique, below {min_unique:.2%} "
            f"(largest collision: {health.largest_collision} items)"
        )
        if not config.random_last:
            remedies.append("set sid_random_last to 1")
        elif config.random_mode != "unused_first":
            remedies.append("set sid_random_mode to unused_first")
        else:
            remedies.append("raise sid_codes or sid_levels")
    collapsed = [level for level, used in enumerate(health.used_codes, 1) if used < 2]
    if collapsed:
        problems.append(f"fewer than 2 codes in use on level {', '.join(map(str, collapsed))}")
        remedies += _against_collapse(health, collapsed[0], config)
    if problems:
        raise QualityCheckError(
            "; ".join(problems),
            where="tokenizer stage",
            why="a model cannot distinguish items with the same semantic ID, and a level with one code has no effect",
            do="; ".join(remedies),
        )


def _against_collapse(health: Health, level: int, config: SidConfig) -> list[str]:
    """Return what to do if a level uses one code. `level` is the first one, from 1."""
    if config.by_steps:
        off = [f"sid_{name}" for name in ("kmeans_init", "ema") if not getattr(config, name)]
        if off:
            return [f"set {' and '.join(off)} to True"]
    remedies = []
    if config.codes > fitting_codes(health.items):
        remedies.append(f"set sid_codes to {fitting_codes(health.items)}")
    if level > 2:
        remedies.append(f"set sid_levels to {level - 1}")
    if config.by_steps:
        remedies.append("raise sid_epochs or lower sid_batch_size")
    return [" or ".join(remedies or ["check whether the item texts differ"])]


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of `left` with the same row of `right`, (N,)."""
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return (left * right).sum(1) / np.maximum(lengths, 1e-8)


def _labels(values: Sequence[Hashable]) -> np.ndarray:
    """Return a number for each value. Equal values have equal numbers."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])


def _pairs(*columns: np.ndarray) -> int:
    """Count the pairs of rows that are equal in every column."""
    _, sizes = np.unique(np.column_stack(columns), axis=0, return_counts=True)
    return int((sizes * (sizes - 1) // 2).sum())


def _share(part: int, whole: int) -> float | None:
    """Return part / whole, or None if `whole` is 0."""
    return part / whole if whole else None
