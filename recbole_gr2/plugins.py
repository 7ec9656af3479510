"""Objects that settings name: a built-in one by its name, or one of the user as `module:attribute`."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Mapping
from typing import Any

from recbole_gr2.errors import ConfigurationError, nearest


def find(name: str, builtin: Mapping[str, Any], where: str) -> Any:
    """Return the object with this name.

    Args:
        name: A key of `builtin`, or `module:attribute` of an importable module.
        builtin: The built-in objects by name.
        where: The setting that contains the name, for the error message.

    Raises:
        ConfigurationError: There is no such built-in object, module or attribute.

    >>> find("two", {"one": 1, "two": 2}, where="x"), find("math:pi", {}, where="x")
    (2, 3.141592653589793)
    """
    if name in builtin:
        return builtin[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        names = nearest(name, builtin) or sorted(builtin)
        raise ConfigurationError(
            f"there is no {name!r}",
            where=where,
            why="the setting must name a built-in object or module:attribute",
            do=f"did you mean {', '.join(names)}? Write your own as module:attribute",
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the user's module may raise any class
        here = isinstance(error, ImportError | AttributeError)
        frames = traceback.extract_tb(error.__traceback__)
        place = "" if here else f" ({frames[-1].filename}:{frames[-1].lineno})"
        raise ConfigurationError(
            f"cannot import {name!r}: {'' if here else f'{type(error).__name__}: '}{error}{place}",
            where=where,
            why="the run needs this object",
            do="install the module, or add its folder to PYTHONPATH" if here else "correct the module",
        ) from error
