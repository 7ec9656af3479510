"""How good a table of semantic IDs is: whether it tells items apart, and whether items that share codes are alike."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from recbole_gr2.errors import GateError
from recbole_gr2.sid.rqkmeans import RQKMeans
from recbole_gr2.sid.rqvae import CHUNK, RQVAE
from recbole_gr2.types import Health, Neighbourhood


def health(
    codes: np.ndarray, tokenizer: RQVAE | RQKMeans, embeddings: np.ndarray, categories: Sequence[str] = ()
) -> Health:
    """Measure a table of semantic IDs against what it was made from.

    Args:
        codes: the table, (N, L), as `assign` gave it.
        tokenizer: what made it.
        embeddings: (N, D).
        categories: N texts, "" where an item has none; none at all: the neighbourhood is not judged.
    """
    _, sharing = np.unique(codes, axis=0, return_counts=True)
    shares = [np.unique(column, return_counts=True)[1] / len(codes) for column in codes.T]
    nearest = tokenizer.encode(embeddings)
    chunks = [slice(start, start + CHUNK) for start in range(0, len(codes), CHUNK)]
    cosine = np.concatenate([_cosines(tokenizer.decode(nearest[chunk]), embeddings[chunk]) for chunk in chunks])
    return Health(
        items=len(codes),
        uniqueness=len(sharing) / len(codes),
        uniqueness_without_random_level=len(np.unique(nearest, axis=0)) / len(codes),
        largest_collision=int(sharing.max()),
        used_codes=tuple(len(share) for share in shares),
        entropy=tuple(float(-(share * np.log2(share)).sum()) + 0.0 for share in shares),
        reconstruction=float(cosine.mean()),
        neighbourhood=neighbourhood(codes[:, : codes.shape[1] - tokenizer.config.random_last], categories),
    )


def neighbourhood(codes: np.ndarray, categories: Sequence[str]) -> Neighbourhood | None:
    """Whether items that share a prefix share a category, over all pairs of items that have one; ours.

    Counted, not sampled: a group of n items holds n * (n - 1) / 2 pairs.

    Args:
        codes: the levels that were not drawn at random, (N, P).
        categories: N texts, "" where an item has none.

    Returns:
        None where fewer than two items have a category.
    """
    known = [row for row, text in enumerate(categories) if text]
    if len(known) < 2:
        return None
    paths = [category_path(categories[row]) for row in known]
    path, top = _labels(paths), _labels([parts[:2] for parts in paths])
    prefixes = [codes[known, :length] for length in range(1, codes.shape[1] + 1)]
    return Neighbourhood(
        items=len(known),
        pairs=tuple(_pairs(prefix) for prefix in prefixes),
        same_path=tuple(_share(_pairs(prefix, path), _pairs(prefix)) for prefix in prefixes),
        same_top=tuple(_share(_pairs(prefix, top), _pairs(prefix)) for prefix in prefixes),
        random_path=_share(_pairs(path), len(known) * (len(known) - 1) // 2),
        random_top=_share(_pairs(top), len(known) * (len(known) - 1) // 2),
    )


def category_path(categories: str) -> tuple[str, ...]:
    """A category as parts: items whose parts are equal are of the same category.

    A path has its parts in order. Plain words, such as the genres of ml-100k, are a set: each word once, in
    alphabetical order, so that "the first two" are no coarser meaning there, only a coarser grouping.

    >>> category_path("Beauty > Skin Care > Face"), category_path("Drama Comedy")
    (('Beauty', 'Skin Care', 'Face'), ('Comedy', 'Drama'))
    """
    return tuple(categories.split(" > ")) if " > " in categories else tuple(sorted(set(categories.split())))


def neighbourhood_line(found: Mapping | None) -> str:
    """The facts of a `Neighbourhood` in one line.

    >>> neighbourhood_line({"same_path": (0.25,), "same_top": (0.5,), "random_path": 0.02, "random_top": 0.2})
    'pairs that share 1 codes: same category path 25.0 % (all pairs 2.0 %), same first two parts 50.0 % (20.0 %)'
    """
    if not found:
        return "no categories, so neighbours by code are not judged"

    def percent(*shares: float | None) -> str:
        return ", ".join("-" if share is None else f"{100 * share:.1f} %" for share in shares)

    lengths = ", ".join(str(length) for length in range(1, len(found["same_path"]) + 1))
    return (
        f"pairs that share {lengths} codes: same category path {percent(*found['same_path'])} "
        f"(all pairs {percent(found['random_path'])}), "
        f"same first two parts {percent(*found['same_top'])} ({percent(found['random_top'])})"
    )


def check(health: Health, min_unique: float) -> None:
    """Stop a table that cannot carry the next stages.

    Raises:
        GateError: uniqueness below `min_unique` (0..1), or a level with fewer than 2 codes in use.
    """
    problems, remedies = [], []
    if health.uniqueness < min_unique:
        problems.append(
            f"{health.uniqueness:.2%} of semantic IDs are unique, below {min_unique:.2%} "
            f"(largest collision: {health.largest_collision} items)"
        )
        remedies.append("set sid_random_last to 1 or more with sid_random_mode unused_first, or raise sid_codes")
    collapsed = [level for level, used in enumerate(health.used_codes, 1) if used < 2]
    if collapsed:
        problems.append(f"fewer than 2 codes in use on level {', '.join(map(str, collapsed))}")
        remedies.append("turn sid_kmeans_init and sid_ema on, or lower sid_levels")
    if problems:
        raise GateError(
            "; ".join(problems),
            where="tokenizer stage",
            why="items that share a semantic ID cannot be told apart by a model, a level with one code says nothing",
            do="; ".join(remedies),
        )


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosine of each row of the one and of the other, (N,)."""
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return (left * right).sum(1) / np.maximum(lengths, 1e-8)


def _labels(values: Sequence[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])


def _pairs(*columns: np.ndarray) -> int:
    """Pairs of rows that are equal in every column."""
    _, sizes = np.unique(np.column_stack(columns), axis=0, return_counts=True)
    return int((sizes * (sizes - 1) // 2).sum())


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
