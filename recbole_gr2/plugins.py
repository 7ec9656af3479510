"""Objects that settings name: a built-in one by its name, or one of the user as `module:attribute`."""

from __future__ import annotations

import importlib
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
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"cannot import {name!r}: {error}",
            where=where,
            why="the run needs this object",
            do="install the module, or add its folder to PYTHONPATH",
        ) from error
