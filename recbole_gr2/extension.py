"""What a setting names: something built in, or `module:attribute` of the user's own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from recbole_gr2.errors import ConfigurationError


def find(name: str, known: Mapping[str, Any], where: str) -> Any:
    """`known[name]`, or the attribute of a module.

    Args:
        where: the setting that names it.

    Raises:
        ConfigurationError: neither.

    >>> find("two", {"one": 1, "two": 2}, where="x"), find("math:pi", {}, where="x")
    (2, 3.141592653589793)
    """
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        near = get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
        raise ConfigurationError(
            f"there is no {name!r}", where=where, do=f"did you mean {', '.join(near)}? Your own is module:attribute"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"cannot import {name!r}: {error}", where=where, do="install it, or add its folder to PYTHONPATH"
        ) from error
