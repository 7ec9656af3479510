"""The client of an OpenAI-compatible endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recbole_gr2.errors import ConfigurationError, DependencyError

if TYPE_CHECKING:
    from openai import OpenAI


def connect(base_url: str | None, *, timeout: float, where: str) -> tuple[OpenAI, type[Exception]]:
    """Return a client of the endpoint, and the base class of its errors.

    The client repeats a request up to five times after a time-out, a lost connection, a rate limit or a server error.
    It reads its key from the environment variable OPENAI_API_KEY.

    Args:
        base_url: URL of the endpoint, e.g. `http://localhost:8000/v1`; None for the default of the client.
        timeout: time limit of one request, in seconds.
        where: the setting that uses the endpoint, for error messages.

    Raises:
        DependencyError: the `openai` package is missing.
        ConfigurationError: OPENAI_API_KEY is not set.
    """
    try:
        from openai import OpenAI, OpenAIError
    except ImportError as error:
        raise DependencyError(
            "the openai package is not installed",
            where=where,
            why="it is the client of the endpoint",
            do='pip install "recbole-gr2[teacher]"',
        ) from error
    try:
        return OpenAI(base_url=base_url, max_retries=5, timeout=timeout), OpenAIError
    except OpenAIError as error:
        raise ConfigurationError(
            f"the client cannot be created: {error}",
            where=where,
            why="the client needs a key, even if the server does not check it",
            do="set OPENAI_API_KEY; a local server accepts any value",
        ) from error
