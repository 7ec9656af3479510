"""Evidence: short facts about each candidate of a list that a re-ranker needs and a language model cannot know.

A provider is a function `provider(observed) -> describe`, and `describe(request)` gives named facts: one number per
candidate, (K,), or one for each of the last R items of the history and each candidate, (R, K), oldest first. It sees
training interactions and item texts alone; the target of a list reaches none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recbole_gr2.errors import GR2Error
from recbole_gr2.extension import find
from recbole_gr2.types import Candidate, Item, Request

RECENT = 10  # items of a history that candidates are compared with, at most: R; ours
RIDGE, TEXT = 100.0, 30.0  # of the linear weights; ours, by the validation lists of Beauty (results/tried.md)
MOST_ITEMS = 20_000  # the most taken ones have linear weights: a dense matrix of 1.6 GB; ours
Facts = dict[str, np.ndarray]
Describe = Callable[[Request], Facts]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What evidence is computed from.

    Attributes:
        items: the catalogue; `items[item_id - 1]`.
        sequences: item ids of every user, oldest first, without the targets of the lists that are described.
        embeddings: text embedding of every item, (N, D), of length 1 (or 0 without a text).
    """

    items: Sequence[Item]
    sequences: Sequence[Sequence[int]]
    embeddings: np.ndarray


class Described(NamedTuple):
    """What is known of a list: F facts about each candidate, (K, F) float32, and P about each candidate and each of the
    last R items of the history, newest first, (K, R, P) float16."""

    facts: np.ndarray
    pairs: np.ndarray

    @property
    def padded(self) -> np.ndarray:
        """The pairs with 0 behind a shorter history, (K, RECENT, P)."""
        return np.pad(self.pairs, ((0, 0), (0, RECENT - self.pairs.shape[1]), (0, 0)))


def base(observed: Observed) -> Describe:
    """Where the base model puts a candidate: rank, score below the first one, log-softmax of the scores."""

    def describe(request: Request) -> Facts:
        scores = np.array([c.score for c in request.candidates])
        ranks = np.arange(1, len(scores) + 1)
        log_softmax = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        return {"rank": ranks, "1 / rank": 1 / ranks, "gap": scores.max() - scores, "log share": log_softmax}

    return describe


def popularity(observed: Observed) -> Describe:
    """How often a candidate was taken, log(1 + n)."""
    counts = np.zeros(len(observed.items) + 1)
    for sequence in observed.sequences:
        np.add.at(counts, list(sequence), 1)

    def describe(request: Request) -> Facts:
        return {"popularity": np.log1p(counts[list(request.items)])}

    return describe


def transition(observed: Observed) -> Describe:
    """How often a candidate was taken right after, or soon after (three steps), the last items of the history."""
    size = len(observed.items) + 1
    steps = [_steps(observed.sequences, step, size) for step in (1, 2, 3)]
    direct, soon = Counts(steps[0]), Counts(steps[0] + steps[1] + steps[2])
    followed = np.maximum(np.asarray(steps[0].sum(axis=1)).ravel(), 1)

    def describe(request: Request) -> Facts:
        recent, items = np.array(request.history[-RECENT:]), np.array(request.items)
        last = recent[-1]
        fade = 0.7 ** np.arange(len(recent))[::-1, None]
        later = soon.of(recent[:, None], items)
        return {
            "next": np.log1p(direct.of(last, items)),
            "share of next": direct.of(last, items) / followed[last],
            "soon after last": np.log1p(soon.of(last, items)),
            "soon after": np.log1p((fade * later).sum(axis=0)),
            "soon before last": np.log1p(soon.of(items, last)),
            "next after each": np.log1p(direct.of(recent[:, None], items)),
            "soon after each": np.log1p(later),
            "soon before each": np.log1p(soon.of(items, recent[:, None])),
        }

    return describe


def together(observed: Observed) -> Describe:
    """How many users took a candidate and an item of the history, as a cosine: n(a, b) / sqrt(n(a) n(b))."""
    rows = _taken(observed.sequences, len(observed.items) + 1)
    product = rows.T @ rows
    both, counts = Counts(product), np.maximum(product.diagonal(), 1)

    def describe(request: Request) -> Facts:
        recent, items = np.array(request.history[-RECENT:]), np.array(request.items)
        number = both.of(recent[:, None], items)
        cosine = number / np.sqrt(counts[recent][:, None] * counts[items])
        return {
            "together": cosine.sum(axis=0),
            "most together": cosine.max(axis=0),
            "together with last": cosine[-1],
            "users together": np.log1p(number.sum(axis=0)),
            "together with each": cosine,
            "users together with each": np.log1p(number),
        }

    return describe


def linear(observed: Observed) -> Describe:
    """What an item of the history says for a candidate, once all other items that a user took are known.

    The item-item weights of EASE (Steck, WWW 2019, arXiv 1905.03375, equation 8): each item is predicted from the
    others that a user took by ridge regression, in closed form B = -P / diag(P), P = (X^T X + RIDGE I)^-1. The rows of
    X are users and, weighted by TEXT, the dimensions of the items' text embeddings, so that items which few users took
    are near those of the same words (Jeunen, Van Balen and Goethals, RecSys 2020: collective EASE). Counts call two
    items close that are each close to a third one; these weights do not. Items beyond the MOST_ITEMS most taken have
    none.
    """
    import torch

    rows = _taken(observed.sequences, len(observed.items) + 1)
    counts = np.asarray(rows.sum(axis=0)).ravel()
    often = np.argsort(-counts, kind="stable")[: min(MOST_ITEMS, np.count_nonzero(counts))]
    place = np.full(len(counts), -1)
    place[often] = np.arange(len(often))
    rows = rows[:, often]
    inverse = torch.from_numpy((rows.T @ rows).toarray())
    texts = torch.from_numpy(np.asarray(observed.embeddings, dtype=np.float32)[often - 1])
    inverse.addmm_(texts, texts.T, alpha=TEXT).diagonal().add_(RIDGE)
    torch.linalg.cholesky(inverse, out=inverse)
    torch.cholesky_inverse(inverse, out=inverse)
    scale = inverse.diagonal().numpy()
    inverse = inverse.numpy()

    def describe(request: Request) -> Facts:
        past, asked = place[list(request.history)][:, None], place[list(request.items)]
        there = (past >= 0) & (asked >= 0) & (past != asked)
        each = np.where(there, -inverse[past, asked] / scale[asked], 0.0)
        return {"linear": each.sum(axis=0), "linear of last": each[-1], "linear of each": each[-RECENT:]}

    return describe


def text(observed: Observed) -> Describe:
    """Cosine of a candidate's text with those of the history: the last one, the closest, and their mean."""

    def describe(request: Request) -> Facts:
        recent = observed.embeddings[np.array(request.history[-RECENT:]) - 1]
        cosine = recent @ observed.embeddings[np.array(request.items) - 1].T
        return {
            "text of last": cosine[-1],
            "closest text": cosine.max(axis=0),
            "text": cosine.mean(axis=0),
            "text of each": cosine,
        }

    return describe


def brand(observed: Observed) -> Describe:
    """Whether a candidate's brand is that of the last item, and the share of the history with that brand."""

    def describe(request: Request) -> Facts:
        theirs = [observed.items[i - 1].brand for i in request.history]
        ours = [observed.items[i - 1].brand for i in request.items]
        return {
            "brand of last": np.array([float(b != "" and b == theirs[-1]) for b in ours]),
            "brand": np.array([theirs.count(b) / len(theirs) if b else 0.0 for b in ours]),
            "brand of each": np.array([[float(b != "" and b == past) for b in ours] for past in theirs[-RECENT:]]),
        }

    return describe


def category(observed: Observed) -> Describe:
    """Share of a candidate's category path that the last items have in common with it: the last one, and the mean."""

    def describe(request: Request) -> Facts:
        recent = [observed.items[i - 1] for i in request.history[-RECENT:]]
        shared = np.array([[overlap(observed.items[c - 1], past) for c in request.items] for past in recent])
        return {"category of last": shared[-1], "category": shared.mean(axis=0), "category of each": shared}

    return describe


PROVIDERS: Mapping[str, Callable[[Observed], Describe]] = {
    "base": base,
    "popularity": popularity,
    "transition": transition,
    "together": together,
    "linear": linear,
    "text": text,
    "brand": brand,
    "category": category,
}


def overlap(one: Item, other: Item) -> float:
    """Share of their category paths, from the root, that two items have in common; of their words without a path."""
    if not one.categories or not other.categories:
        return 0.0
    if " > " in one.categories or " > " in other.categories:
        a, b = one.categories.split(" > "), other.categories.split(" > ")
        depth = next((d for d, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return depth / max(len(a), len(b))
    a, b = set(one.categories.split()), set(other.categories.split())
    return len(a & b) / len(a | b)


def find_providers(names: Sequence[str]) -> list[Callable[[Observed], Describe]]:
    """Providers by name: built-in ones, or `module:attribute`.

    Raises:
        ConfigurationError: neither.
    """
    return [find(name, PROVIDERS, where="evidence_providers") for name in names]


def collect(requests: Sequence[Request], names: Sequence[str], observed: Observed) -> tuple[list[str], list[Described]]:
    """Names of the F facts about candidates, and what is known of each request.

    Raises:
        GR2Error: a provider gave something else than finite numbers of one of the two forms, or a name twice.
    """
    describes = [provider(observed) for provider in find_providers(names)]
    labels: list[str] = []
    rows = []
    for request in requests:
        found = [pair for describe in describes for pair in describe(request).items()]
        size, recent = len(request.items), min(len(request.history), RECENT)
        values = [np.asarray(value, dtype=np.float16 if np.ndim(value) == 2 else np.float32) for _, value in found]
        wrong = [
            name
            for (name, _), value in zip(found, values, strict=True)
            if value.shape not in ((size,), (recent, size)) or not np.isfinite(value).all()
        ]
        if wrong:
            raise GR2Error(
                f"the fact {wrong[0]!r} is not one finite number per candidate, nor one per item and candidate",
                where=request.request_id,
                do=f"mend its provider, one of evidence_providers {list(names)}",
            )
        every = [name for name, _ in found]
        if len(set(every)) < len(every):
            raise GR2Error(f"two facts have one name: {every}", where="evidence_providers", do="rename one of them")
        labels = [name for name, value in zip(every, values, strict=True) if value.ndim == 1]
        facts = [value for value in values if value.ndim == 1]
        pairs = [value[::-1].T for value in values if value.ndim == 2]
        rows.append(
            Described(
                np.stack(facts, axis=1) if facts else np.zeros((size, 0), np.float32),
                np.stack(pairs, axis=2) if pairs else np.zeros((size, recent, 0), np.float16),
            )
        )
    return labels, rows


def fact_names(names: Sequence[str]) -> list[str]:
    """What these providers count, asked about a list of a made-up catalogue.

    >>> fact_names(["popularity", "text"])
    ['popularity', 'text of last', 'closest text', 'text']
    """
    items = [Item(item_id=number, token="", title="") for number in (1, 2, 3)]
    candidates = tuple(Candidate(item_id=item, score=0.0, rank=item - 1) for item in (2, 3))
    request = Request(
        request_id="", user_token="", split="", history=(1,), candidates=candidates, target=2, provider=""
    )
    return collect([request], names, Observed(items=items, sequences=[[1, 2, 3]], embeddings=np.eye(3)))[0]


class Counts:
    """Look-up of many entries of a sparse matrix at once, many times faster than its own indexing."""

    def __init__(self, matrix) -> None:
        matrix = matrix.tocsr()
        matrix.sum_duplicates()  # sorts, too
        self.size = matrix.shape[1]
        rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
        self.keys, self.values = rows * self.size + matrix.indices, matrix.data

    def of(self, rows, columns) -> np.ndarray:
        """Entries at (rows, columns), which are broadcast against each other; 0 where there is none."""
        wanted = np.asarray(rows, dtype=np.int64) * self.size + columns
        if not len(self.keys):
            return np.zeros(wanted.shape, dtype=np.float32)
        place = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == wanted, self.values[place], 0.0)


def _taken(sequences: Sequence[Sequence[int]], size: int):
    """Sparse (U, size), 1 where a user took an item, however often."""
    from scipy.sparse import csr_matrix

    users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    taken = np.concatenate([np.asarray(sequence, dtype=int) for sequence in sequences])
    rows = csr_matrix((np.ones(len(taken), dtype=np.float32), (users, taken)), shape=(len(sequences), size))
    rows.data[:] = 1.0
    return rows


def _steps(sequences: Sequence[Sequence[int]], step: int, size: int):
    """Sparse (size, size): how often item b stands `step` places behind item a."""
    from scipy.sparse import csr_matrix

    before = np.concatenate([np.asarray(sequence[:-step], dtype=int) for sequence in sequences])
    behind = np.concatenate([np.asarray(sequence[step:], dtype=int) for sequence in sequences])
    return csr_matrix((np.ones(len(before), dtype=np.float32), (before, behind)), shape=(size, size))
