"""The client of an OpenAI-compatible endpoint."""

from __future__ import annotations

from typing import Any

from recbole_gr2.errors import ConfigurationError, DependencyError


def connect(base_url: str | None, *, timeout: float, where: str) -> tuple[Any, type[Exception]]:
    """(client, the class of its errors); it retries what passes, and reads its key from OPENAI_API_KEY.

    Args:
        base_url: the endpoint, e.g. `http://localhost:8000/v1`; None for the client's default.
        timeout: seconds until a request is tried again.
        where: the setting that asks for it, for errors.

    Raises:
        DependencyError: the `openai` package is missing.
        ConfigurationError: there is no key.
    """
    try:
        from openai import OpenAI, OpenAIError
    except ImportError as error:
        raise DependencyError(
            "an endpoint needs the openai package", where=where, do='pip install "recbole-gr2[teacher]"'
        ) from error
    try:
        return OpenAI(base_url=base_url, max_retries=5, timeout=timeout), OpenAIError
    except OpenAIError as error:
        raise ConfigurationError(
            str(error), where=where, do="set OPENAI_API_KEY; a server of your own takes any word"
        ) from error
