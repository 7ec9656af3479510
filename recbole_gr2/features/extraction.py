"""Extraction: computes the features of candidate lists with the feature providers that a setting names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.features.providers import PROVIDERS, Describe, Provider, TrainingData
from recbole_gr2.plugins import calling, check_call, find, misfit
from recbole_gr2.progress import progress
from recbole_gr2.types import RECENT, Candidate, CandidateFeatures, Item, Request

__all__ = ["TrainingData", "extract_features", "feature_names", "find_providers"]


def find_providers(names: Sequence[str]) -> list[Provider]:
    """Return feature providers by name: built-in ones, or `module:attribute`.

    Raises:
        ConfigurationError: a name is neither, or a provider cannot be called with training data.
    """
    providers = [find(name, PROVIDERS, where="prior_features") for name in names]
    for name, provider in zip(names, providers, strict=True):
        if ":" in name:
            check_call(provider, "provider(data)", None, name=name, where="prior_features")
    return providers


def make_describes(names: Sequence[str], data: TrainingData) -> list[Describe]:
    """Return the function of each feature provider that computes the features of a request.

    Args:
        names: names of the feature providers, see `find_providers`.
        data: the data that the features are computed from.

    Raises:
        ConfigurationError: there is no such provider.
        GR2Error: a provider of the user raised an exception.
    """
    describes = []
    for name, provider in zip(names, find_providers(names), strict=True):
        with calling(name, where="prior_features"):
            describes.append(provider(data))
        if problem := misfit(describes[-1], None):
            raise ConfigurationError(
                f"the result of the feature provider {name!r} cannot be called as describe(request): {problem}",
                where="prior_features",
                why="a provider returns a function that computes the features of a request",
                do="return a function describe(request) from the provider",
            )
    return describes


def extract_features(
    requests: Sequence[Request], names: Sequence[str], data: TrainingData | Sequence[Describe]
) -> tuple[list[str], list[CandidateFeatures]]:
    """Compute the features of requests. The providers get the requests without labels.

    Args:
        requests: the requests.
        names: names of the feature providers, see `find_providers`.
        data: the data that the features are computed from, or what `make_describes` returned for it.

    Returns:
        The names of the F features of a candidate, and the features of each request.

    Raises:
        ConfigurationError: there is no such provider.
        GR2Error: a provider returned an array of a wrong shape, a number that is not finite, a repeated name, or other
            names than for the first request; or a provider of the user raised an exception.
    """
    describes = make_describes(names, data) if isinstance(data, TrainingData) else data
    labels: list[str] = []
    extracted = []
    expected: list[str] | None = None
    for request in progress(requests, "features, request"):
        visible = request.without_labels()
        named = [
            pair
            for name, describe in zip(names, describes, strict=True)
            for pair in _described(visible, name, describe).items()
        ]
        found = [name for name, _ in named]
        expected = found if expected is None else expected
        if found != expected:
            raise GR2Error(
                f"the request {request.request_id} has the features {found}, and {requests[0].request_id} has "
                f"{expected}",
                where=f"prior_features {list(names)}",
                why="the columns of the features must mean the same for every request",
                do="return the same names in the same order for each request; use 0 where a feature does not apply",
            )
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


def _described(request: Request, name: str, describe: Describe) -> Mapping[str, Any]:
    """Return the named features of a request by one provider.

    Raises:
        GR2Error: they are no dictionary with texts as keys, or a provider of the user raised an exception.
    """
    with calling(name, where=f"request {request.request_id}, prior_features"):
        features = describe(request)
    if not isinstance(features, Mapping) or not all(isinstance(key, str) for key in features):
        raise GR2Error(
            f"the feature provider {name!r} returned no dictionary of named features: {features!r:.200}",
            where=f"request {request.request_id}, prior_features",
            why="features are stored and read by name",
            do="return a dictionary from describe(request): a name and an array for each feature",
        )
    return features


def _stack(
    request: Request, named: Sequence[tuple[str, Any]], providers: Sequence[str]
) -> tuple[list[str], CandidateFeatures]:
    """Return the names of the features of a candidate, and all features of a request as two arrays.

    Raises:
        GR2Error: a feature is no array of numbers, has a wrong shape, is not finite, or has the name of another one.
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
    values = []
    for name, value in named:
        try:
            with np.errstate(over="ignore"):  # A number beyond float16 becomes infinite, which is reported below.
                values.append(np.asarray(value, dtype=np.float16 if np.ndim(value) == 2 else np.float32))
        except (TypeError, ValueError) as error:
            raise _unusable(request, name, f"is no array of numbers: {error}", providers) from error
        if values[-1].shape not in ((size,), (recent, size)):
            raise _unusable(request, name, f"has the shape {values[-1].shape}", providers)
    labels = [name for name, value in zip(names, values, strict=True) if value.ndim == 1]
    candidates = [value for value in values if value.ndim == 1]
    pairs = [value[::-1].T for value in values if value.ndim == 2]  # The newest history item comes first.
    features = CandidateFeatures(
        np.stack(candidates, axis=1) if candidates else np.zeros((size, 0), np.float32),
        np.stack(pairs, axis=2) if pairs else np.zeros((size, recent, 0), np.float16),
    )
    if not all(np.isfinite(part).all() for part in features):
        name, value = next((n, v) for n, v in zip(names, values, strict=True) if not np.isfinite(v).all())
        count = np.sum(~np.isfinite(value))
        raise _unusable(request, name, f"has {count} values that are not finite as {value.dtype}", providers)
    return labels, features


def _unusable(request: Request, name: str, problem: str, providers: Sequence[str]) -> GR2Error:
    """Return the error of a feature that cannot be used."""
    size, recent = len(request.items), min(len(request.history), RECENT)
    return GR2Error(
        f"the feature {name!r} {problem}",
        where=f"request {request.request_id}, prior_features {list(providers)}",
        why=f"it must have one finite number per candidate, shape ({size},), or one per history item and "
        f"candidate, shape ({recent}, {size})",
        do="correct the provider of this feature, or remove it from prior_features",
    )
