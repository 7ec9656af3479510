"""The client of an OpenAI-compatible endpoint."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from recbole_gr2.errors import ConfigurationError, DependencyError, GR2Error

KEY, URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"  # environment variables that the client reads
EXCERPT = 200  # characters of a response that an error shows
SECRET = 8  # characters of the shortest key that must not be written anywhere


def check_url(url: str | None, *, where: str) -> None:
    """Check the address of an endpoint. It is written to manifests and reports, so that it must contain no key.

    Args:
        url: the address; None for the default of the client.
        where: the setting that names the endpoint, for error messages.

    Raises:
        ConfigurationError: the address is no HTTP address, or it contains a user name, a password or a query.
    """
    if url is None:
        return
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # brackets without an IPv6 address, or a port that is no number
        valid = False
    if valid and "@" not in parts.netloc and not parts.query and not parts.fragment and not any(map(str.isspace, url)):
        return
    secret = bool({"@", "?", "#"} & set(url))
    raise ConfigurationError(
        "the address of the endpoint contains a user name, a password or a query"
        if secret
        else f"{url!r} is not the address of an endpoint",
        where=where,
        why="manifests and reports contain the address, and would publish a key in it" if secret else "",
        do=f"write the address as http://localhost:8000/v1, and the key into the environment variable {KEY}",
    )


def check_endpoint(url: str | None, *, where: str) -> None:
    """Check all that the client of an endpoint needs, without a connection.

    Args:
        url: the address of the endpoint; None for the default of the client.
        where: the setting that names the endpoint, for error messages.

    Raises:
        DependencyError: the `openai` package is missing.
        ConfigurationError: the environment variable OPENAI_API_KEY is not set or is no key, or the address is wrong.
    """
    check_url(url, where=where)
    if url is None:
        check_url(os.environ.get(URL) or None, where=f"the environment variable {URL}")
    if importlib.util.find_spec("openai") is None:
        raise DependencyError(
            "the openai package is not installed",
            where=where,
            why="it is the client of the endpoint",
            do='pip install "recbole-gr2[teacher]"',
        )
    key = os.environ.get(KEY, "")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            f"the environment variable {KEY} " + ("contains characters that no key has" if key else "is not set"),
            where=where,
            why="the client needs a key, even if the server does not check it",
            do=f"set {KEY}; a local server accepts any value",
        )


class Endpoint:
    """An endpoint and the model that it serves.

    A request is repeated up to five times after a time-out, a lost connection, a rate limit or a server error. The key
    comes from the environment variable OPENAI_API_KEY. No error contains it.

    Args:
        url: address of the endpoint, e.g. `http://localhost:8000/v1`; None for the default of the client.
        model: name of the model at the endpoint.
        timeout: time limit of one request, in seconds.
        where: the setting that names the endpoint, for error messages.

    Attributes:
        url: address of the endpoint.

    Raises:
        DependencyError: see `check_endpoint`.
        ConfigurationError: see `check_endpoint`.
    """

    def __init__(self, url: str | None, model: str, *, timeout: float, where: str) -> None:
        check_endpoint(url, where=where)
        from openai import OpenAI

        self.client = OpenAI(base_url=url, max_retries=5, timeout=timeout)
        self.url, self.model, self.where = str(self.client.base_url), model, where

    def chat(self, **body: Any) -> dict[str, Any]:
        """Return the response to a request of `/chat/completions`, see `_send`."""
        return self._send(self.client.chat.completions, body)

    def complete(self, **body: Any) -> dict[str, Any]:
        """Return the response to a request of `/completions`, see `_send`."""
        return self._send(self.client.completions, body)

    def _send(self, resource: Any, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON object of a response. Its `choices` is a list of at least one object.

        Raises:
            GR2Error: the endpoint fails after all attempts, or returns something else.
        """
        from openai import OpenAIError

        try:
            text = self._without_key(resource.with_raw_response.create(model=self.model, **body).text)
        except OpenAIError as error:
            # `error` may contain the key: some servers repeat it. So it does not become the cause.
            raise self.failure(f"the endpoint failed: {type(error).__name__}: {self._excerpt(str(error))}") from None
        try:
            response = json.loads(text)
        except (ValueError, RecursionError):
            response = None
        choices = response.get("choices") if isinstance(response, dict) else None
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            return response
        kind = "no choice" if isinstance(response, dict) else "no JSON object"
        raise self.failure(f"the endpoint returned {kind}: {self._excerpt(text)}")

    def failure(self, what: str) -> GR2Error:
        """Return an error that names the endpoint and the model."""
        return GR2Error(
            what,
            where=f"{self.where}: {self.url}, model {self.model}",
            why="responses so far are kept, and further ones are needed",
            do="check the address, which often ends with /v1, the name of the model and the key; then repeat the "
            "command",
        )

    def _excerpt(self, text: str) -> str:
        """Return the beginning of a text as one line, without the key."""
        text = " ".join(self._without_key(text).split())
        return text if len(text) <= EXCERPT else text[:EXCERPT] + " ..."

    def _without_key(self, text: str) -> str:
        """Return a text without the key. A key of a few characters is a placeholder and no secret."""
        key = self.client.api_key
        return text.replace(key, "<key>") if len(key) >= SECRET else text
