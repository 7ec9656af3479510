"""Feature providers: functions that compute features of the candidates of a request from training data.

A provider is a function `provider(data) -> describe`. It gets `TrainingData` and returns a function of a request.
`describe(request)` returns named features: one number per candidate, (K,), or one number for each of the last R history
items, oldest first, and each candidate, (R, K).

A setting can name a provider of another package as `module:attribute`. A provider sees only training interactions and
item texts. It must not read `target` or `grades` of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from recbole_gr2.catalog import Catalog
from recbole_gr2.model.linear import EXACT_ITEMS, SparseLookup, inverse_gram, neighbour_weights
from recbole_gr2.types import RECENT, Item, Request

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# The weights of `linear`. Our choice, by the validation lists of Amazon Beauty (results/tried.md).
RIDGE, TEXT = 100.0, 30.0
SOON = 3  # Number of steps that count as "soon" in `transition`. Our choice.
# Periods of `time` before and after the last history item, as shares of all training interactions. Our choice.
PERIODS = ((-0.01, 0.01), (-0.03, 0.03), (-0.1, 0.1), (-0.03, 0.0), (0.0, 0.03), (0.0, 0.1))
FADE = 0.7  # Weight of a history item relative to the next newer one in `transition`. Our choice.


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data that features are computed from.

    Attributes:
        catalog: the items.
        sequences: internal item ids of each user, oldest first, without the targets of the requests to describe.
        times: time of each of these interactions.
        embeddings: text embedding of each item, (N, D), of length 1, or 0 for an item without text. Row n belongs to
            the item with the id n + 1.
    """

    catalog: Catalog
    sequences: Sequence[Sequence[int]]
    times: Sequence[Sequence[float] | np.ndarray]
    embeddings: np.ndarray


Features = dict[str, np.ndarray]
Describe = Callable[[Request], Features]
Provider = Callable[[TrainingData], Describe]


def base(data: TrainingData) -> Describe:
    """Features of the base model: rank, its inverse, distance to the highest score, and log-softmax of the scores."""

    def describe(request: Request) -> Features:
        scores = np.array([c.score for c in request.candidates])
        ranks = np.arange(1, len(scores) + 1)
        log_softmax = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        return {"rank": ranks, "1 / rank": 1 / ranks, "gap": scores.max() - scores, "log share": log_softmax}

    return describe


def sources(data: TrainingData) -> Describe:
    """Features of each of several base models: logarithm of its rank, and its standardised score.

    A list that one base model proposed has none of them; its rank and score are in `base`.
    """

    def describe(request: Request) -> Features:
        features: Features = {}
        for name, ranks, scores in request.sources:
            features |= {f"log rank by {name}": np.log(ranks), f"score by {name}": np.array(scores)}
        return features

    return describe


def popularity(data: TrainingData) -> Describe:
    """log(1 + n), where n is the number of interactions with a candidate."""
    counts = np.zeros(len(data.catalog) + 1)
    for sequence in data.sequences:
        np.add.at(counts, list(sequence), 1)

    def describe(request: Request) -> Features:
        return {"popularity": np.log1p(counts[list(request.items)])}

    return describe


def time(data: TrainingData) -> Describe:
    """When a candidate was popular relative to the last history item, and the age of each history item.

    The time of an interaction is the share of all training interactions before it, from 0 to 1. So the features depend
    neither on the unit of the times nor on how many interactions a period has. A history without times has the time 1.

    The features are log(1 + n) with the number n of interactions with the candidate in each of the `PERIODS`, the share
    of its interactions that are earlier, the logarithms of the distances to the next and to the previous one, and the
    distance of their median. Under leave-one-out the training interactions of other users can be later. The age of a
    history item is the logarithm of its distance to the last one.
    """
    times = np.concatenate([np.asarray(each, dtype=np.float64) for each in data.times])
    items = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in data.sequences])
    ordered, count = np.sort(times), len(times) + 1
    ranks = np.searchsorted(ordered, times)  # Number of training interactions before each interaction.
    # The interactions sorted by item and rank. An item i has keys from i * count on.
    keys = np.sort(items * count + ranks)
    starts = np.searchsorted(keys, np.arange(len(data.catalog) + 2) * count)
    sizes = np.maximum(np.diff(starts), 1)
    padded = np.append(keys, 0)
    medians = padded[starts[:-1] + np.diff(starts) // 2] % count
    edges = np.array(PERIODS) * count  # (periods, 2)

    def describe(request: Request) -> Features:
        times = request.times or (np.inf,) * len(request.history)
        history = np.searchsorted(ordered, times[-RECENT:])
        now = history[-1]
        ids = np.array(request.items)
        base, first, end = ids * count, starts[ids], starts[ids + 1]
        bounds = np.ceil(now + edges).clip(0, count).astype(np.int64)
        low, high = np.moveaxis(np.searchsorted(keys, base[:, None, None] + bounds), 2, 0)  # (K, periods)
        place = np.searchsorted(keys, base + now)
        following = np.where(place < end, (padded[place] - base - now) / count, 1.0)
        previous = np.where(place > first, (now - padded[place - 1] + base) / count, 1.0)
        features = {
            f"interactions from {start:+g} to {stop:+g}": np.log1p(high[:, number] - low[:, number])
            for number, (start, stop) in enumerate(PERIODS)
        }
        return features | {
            "share of earlier": (place - first) / sizes[ids],
            "time to next": np.log(following.clip(1e-4)),
            "time from previous": np.log(previous.clip(1e-4)),
            "time of median": np.where(end > first, (medians[ids] - now) / count, 0.0),
            "age of each": np.repeat(np.log(((now - history) / count).clip(1e-4))[:, None], len(ids), axis=1),
        }

    return describe


def transition(data: TrainingData) -> Describe:
    """How often a candidate followed the last history items, directly (next) or within `SOON` steps (soon)."""
    size = len(data.catalog) + 1
    steps = [_transitions(data.sequences, step, size) for step in range(1, SOON + 1)]
    within = sum(steps[1:], start=steps[0])
    direct, after, before = SparseLookup(steps[0]), SparseLookup(within), SparseLookup(within.T)
    followers = np.maximum(np.asarray(steps[0].sum(axis=1)).ravel(), 1)

    def describe(request: Request) -> Features:
        recent, items = request.history[-RECENT:], np.array(request.items)
        fade = FADE ** np.arange(len(recent))[::-1, None]
        follows, soon_after, soon_before = (each.rows(recent, items) for each in (direct, after, before))
        return {
            "next": np.log1p(follows[-1]),
            "share of next": follows[-1] / followers[recent[-1]],
            "soon after last": np.log1p(soon_after[-1]),
            "soon after": np.log1p((fade * soon_after).sum(axis=0)),
            "soon before last": np.log1p(soon_before[-1]),
            "next after each": np.log1p(follows),
            "soon after each": np.log1p(soon_after),
            "soon before each": np.log1p(soon_before),
        }

    return describe


def together(data: TrainingData) -> Describe:
    """Co-occurrence of a candidate and a history item: the number of users who interacted with both, n(a, b).

    The features are log(1 + n(a, b)) and the cosine n(a, b) / sqrt(n(a) n(b)).
    """
    interactions = _interactions(data.sequences, len(data.catalog) + 1)
    product = interactions.T.tocsr() @ interactions
    co_occurrence, counts = SparseLookup(product), np.maximum(product.diagonal(), 1)

    def describe(request: Request) -> Features:
        recent, items = list(request.history[-RECENT:]), np.array(request.items)
        users = co_occurrence.rows(recent, items)
        cosine = users / np.sqrt(counts[recent][:, None] * counts[items])
        return {
            "together": cosine.sum(axis=0),
            "most together": cosine.max(axis=0),
            "together with last": cosine[-1],
            "users together": np.log1p(users.sum(axis=0)),
            "together with each": cosine,
            "users together with each": np.log1p(users),
        }

    return describe


def linear(data: TrainingData) -> Describe:
    """Item-item weights of a linear model: the contribution of a history item to a candidate, given all other items.

    The weights are those of EASE (Steck, WWW 2019, arXiv 1905.03375, equation 8). A ridge regression predicts each item
    from the other items of the user, in closed form B = -P / diag(P) with P = (X^T X + RIDGE I)^-1. The rows of X are
    the users and, weighted by TEXT, the dimensions of the text embeddings. Items with few interactions thus get weights
    to items with similar texts (collective EASE; Jeunen, Van Balen and Goethals, RecSys 2020). In contrast to counts,
    a weight is small if a third item explains the co-occurrence.

    An item without interactions has no weights. If more than `EXACT_ITEMS` items have interactions, the weights
    are sparse: a ridge regression of each item on a few neighbours, see `recbole_gr2.model.linear.neighbour_weights`.
    """
    interactions = _interactions(data.sequences, len(data.catalog) + 1)
    counts = np.asarray(interactions.sum(axis=0)).ravel()
    known = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    index = np.full(len(counts), -1)  # Row of each item id in the matrix of weights, or -1.
    weights_at: Callable[[np.ndarray, np.ndarray], np.ndarray]
    if len(known) > EXACT_ITEMS:
        index[known] = known - 1
        weights = neighbour_weights(interactions[:, 1:], data.embeddings, ridge=RIDGE, text_weight=TEXT)
        weights_at = SparseLookup(weights).values_at
    else:
        index[known] = np.arange(len(known))
        inverse = inverse_gram(interactions[:, known], data.embeddings[known - 1], ridge=RIDGE, text_weight=TEXT)
        scale = inverse.diagonal()

        def weights_at(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
            return -inverse[rows, columns] / scale[columns]

    def describe(request: Request) -> Features:
        past, items = index[list(request.history)][:, None], index[list(request.items)]
        has_weight = (past >= 0) & (items >= 0) & (past != items)
        each = np.where(has_weight, weights_at(past, items), 0.0)
        return {"linear": each.sum(axis=0), "linear of last": each[-1], "linear of each": each[-RECENT:]}

    return describe


def text(data: TrainingData) -> Describe:
    """Cosine of the text embedding of a candidate with those of the history items: the last, the largest, the mean."""

    def describe(request: Request) -> Features:
        recent = data.embeddings[np.array(request.history[-RECENT:]) - 1]
        cosine = recent @ data.embeddings[np.array(request.items) - 1].T
        return {
            "text of last": cosine[-1],
            "closest text": cosine.max(axis=0),
            "text": cosine.mean(axis=0),
            "text of each": cosine,
        }

    return describe


def brand(data: TrainingData) -> Describe:
    """Whether a candidate has the brand of the last history item, and the share of the history with its brand."""
    codes, names = _codes(item.brand for item in data.catalog)
    missing = names.index("") if "" in names else -1

    def describe(request: Request) -> Features:
        history, candidates = codes[list(request.history)], codes[list(request.items)]
        same = (history[:, None] == candidates) & (candidates != missing)
        return {
            "brand of last": same[-1].astype(float),
            "brand": same.sum(axis=0) / len(history),
            "brand of each": same[-RECENT:].astype(float),
        }

    return describe


def category(data: TrainingData) -> Describe:
    """Overlap of the category path of a candidate with those of the last history items: the last one, and the mean."""
    codes, names = _codes(item.categories for item in data.catalog)

    @cache
    def overlap_of(pair: int) -> float:
        one, other = divmod(pair, len(names))
        return category_overlap(names[one], names[other])

    def describe(request: Request) -> Features:
        recent, items = codes[list(request.history[-RECENT:])], codes[list(request.items)]
        pairs, places = np.unique(recent[:, None] * len(names) + items, return_inverse=True)
        shared = np.array([overlap_of(pair) for pair in pairs.tolist()])[places].reshape(len(recent), len(items))
        return {"category of last": shared[-1], "category": shared.mean(axis=0), "category of each": shared}

    return describe


PROVIDERS: Mapping[str, Provider] = {
    "base": base,
    "sources": sources,
    "popularity": popularity,
    "time": time,
    "transition": transition,
    "together": together,
    "linear": linear,
    "text": text,
    "brand": brand,
    "category": category,
}


def overlap(one: Item, other: Item) -> float:
    """Return the overlap of the categories of two items, see `category_overlap`."""
    return category_overlap(one.categories, other.categories)


def category_overlap(one: str, other: str) -> float:
    """Return the overlap of two categories, 0 to 1.

    For paths it is the number of common parts from the root, divided by the length of the longer path. For plain words
    it is the Jaccard index. An empty category has the overlap 0.

    >>> category_overlap("Beauty > Bath", "Beauty > Hair"), category_overlap("Comedy Drama", "Drama Romance Thriller")
    (0.5, 0.25)
    """
    if not one or not other:
        return 0.0
    if " > " in one or " > " in other:
        path, other_path = one.split(" > "), other.split(" > ")
        shorter = min(len(path), len(other_path))
        depth = next((d for d, (a, b) in enumerate(zip(path, other_path, strict=False)) if a != b), shorter)
        return depth / max(len(path), len(other_path))
    words, other_words = set(one.split()), set(other.split())
    return len(words & other_words) / len(words | other_words)


def _codes(texts: Iterable[str]) -> tuple[np.ndarray, list[str]]:
    """Code of the text of each item by internal id, (N + 1,), and the text of each code. Item 0 has the code 0."""
    position: dict[str, int] = {}
    codes = [position.setdefault(text, len(position)) for text in texts]
    return np.array([0, *codes]), list(position)


def _interactions(sequences: Sequence[Sequence[int]], size: int) -> csr_matrix:
    """Return a matrix (U, size) with 1 where a user interacted with an item, regardless of how often."""
    from scipy.sparse import csr_matrix

    users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    items = np.concatenate([np.asarray(sequence, dtype=int) for sequence in sequences])
    matrix = csr_matrix((np.ones(len(items), dtype=np.float32), (users, items)), shape=(len(sequences), size))
    matrix.data[:] = 1.0
    return matrix


def _transitions(sequences: Sequence[Sequence[int]], step: int, size: int) -> csr_matrix:
    """Count how often the second item follows the first item after `step` positions, (size, size)."""
    from scipy.sparse import csr_matrix

    before = np.concatenate([np.asarray(sequence[:-step], dtype=int) for sequence in sequences])
    after = np.concatenate([np.asarray(sequence[step:], dtype=int) for sequence in sequences])
    return csr_matrix((np.ones(len(before), dtype=np.float32), (before, after)), shape=(size, size))
