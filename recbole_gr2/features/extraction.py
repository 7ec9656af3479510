"""Extraction: computes the features of candidate lists with the feature providers that a setting names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import GR2Error
from recbole_gr2.features.providers import PROVIDERS, Provider, TrainingData
from recbole_gr2.plugins import find
from recbole_gr2.types import RECENT, Candidate, CandidateFeatures, Item, Request

__all__ = ["TrainingData", "extract_features", "feature_names", "find_providers"]


def find_providers(names: Sequence[str]) -> list[Provider]:
    """Return feature providers by name: built-in ones, or `module:attribute`.

    Raises:
        ConfigurationError: a name is neither.
    """
    return [find(name, PROVIDERS, where="prior_features") for name in names]


def extract_features(
    requests: Sequence[Request], names: Sequence[str], data: TrainingData
) -> tuple[list[str], list[CandidateFeatures]]:
    """Compute the features of requests.

    Args:
        requests: the requests.
        names: names of the feature providers, see `find_providers`.
        data: the data that the features are computed from.

    Returns:
        The names of the F features of a candidate, and the features of each request.

    Raises:
        ConfigurationError: there is no such provider.
        GR2Error: a provider returned an array of a wrong shape, a number that is not finite, or a repeated name.
    """
    describes = [provider(data) for provider in find_providers(names)]
    labels: list[str] = []
    extracted = []
    for request in requests:
        named = [pair for describe in describes for pair in describe(request).items()]
        labels, features = _stack(request, named, names)
        extracted.append(features)
    return labels, extracted


def feature_names(names: Sequence[str]) -> list[str]:
    """Return the names of the features of a candidate that these providers compute.

    The providers are called with a catalogue of three items.

    >>> feature_names(["popularity", "text"])
    ['popularity', 'text of last', 'closest text', 'text']
    """
    catalog = Catalog(Item(item_id=number, token="", title="") for number in (1, 2, 3))
    candidates = tuple(Candidate(item_id=item, score=0.0, rank=item - 1) for item in (2, 3))
    request = Request(
        request_id="", user_token="", split="", history=(1,), candidates=candidates, target=2, provider=""
    )
    data = TrainingData(catalog=catalog, sequences=[[1, 2, 3]], times=[[1.0, 2.0, 3.0]], embeddings=np.eye(3))
    return extract_features([request], names, data)[0]


def _stack(
    request: Request, named: Sequence[tuple[str, np.ndarray]], providers: Sequence[str]
) -> tuple[list[str], CandidateFeatures]:
    """Return the names of the features of a candidate, and all features of a request as two arrays.

    Raises:
        GR2Error: a feature has a wrong shape, is not finite, or has the name of another one.
    """
    size, recent = len(request.items), min(len(request.history), RECENT)
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise GR2Error(
            f"two features have the same name: {names}",
            where=f"prior_features {list(providers)}",
            why="features are stored and read by name",
            do="rename one of them, or remove its provider from prior_features",
        )
    with np.errstate(over="ignore"):  # A number beyond float16 becomes infinite, which the next check reports.
        values = [np.asarray(value, dtype=np.float16 if np.ndim(value) == 2 else np.float32) for _, value in named]
    for name, value in zip(names, values, strict=True):
        if value.shape not in ((size,), (recent, size)) or not np.isfinite(value).all():
            raise GR2Error(
                f"the feature {name!r} has the shape {value.shape} or is not finite; it must have one finite number "
                f"per candidate, ({size},), or one per history item and candidate, ({recent}, {size})",
                where=f"{request.request_id}, prior_features {list(providers)}",
                why="the prior cannot be fitted to it",
                do="correct the provider of this feature, or remove it from prior_features",
            )
    labels = [name for name, value in zip(names, values, strict=True) if value.ndim == 1]
    candidates = [value for value in values if value.ndim == 1]
    pairs = [value[::-1].T for value in values if value.ndim == 2]  # The newest history item comes first.
    return labels, CandidateFeatures(
        np.stack(candidates, axis=1) if candidates else np.zeros((size, 0), np.float32),
        np.stack(pairs, axis=2) if pairs else np.zeros((size, recent, 0), np.float16),
    )
