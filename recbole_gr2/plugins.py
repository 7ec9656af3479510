"""Objects that settings name: a built-in one by its name, or one of the user as `module:attribute`.

A wrong object of the user ends in one error that names it, either when the names are checked (`find`, `check_call`,
`check_method`) or when the run calls the object (`calling`).
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recbole_gr2.errors import ConfigurationError, GR2Error, nearest

PACKAGE = Path(__file__).parent


def find(name: str, builtin: Mapping[str, Any], where: str) -> Any:
    """Return the object with this name.

    Args:
        name: A key of `builtin`, or `module:attribute` of an importable module.
        builtin: The built-in objects by name.
        where: The setting that contains the name, for the error message.

    Raises:
        ConfigurationError: There is no such built-in object, module or attribute, or the module raises an exception.

    >>> find("two", {"one": 1, "two": 2}, where="x"), find("math:pi", {}, where="x")
    (2, 3.141592653589793)
    """
    if name in builtin:
        return builtin[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        names = nearest(name, builtin) or sorted(builtin)
        raise ConfigurationError(
            f"there is no {name!r}",
            where=where,
            why="the setting must name a built-in object or module:attribute",
            do=f"did you mean {', '.join(names)}? Write your own as module:attribute",
        )
    try:
        module = importlib.import_module(module_name)
    except (GR2Error, MemoryError):
        raise
    except Exception as error:  # the user's module may raise any class
        missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
        if missing and f"{module_name}.".startswith(f"{missing}."):
            what, do = str(error), "install the module, or add its folder to PYTHONPATH"
        else:
            what = _shown(error, module_name)
            do = f"install the package {missing}, or correct the import" if missing else "correct the module"
        raise ConfigurationError(
            f"cannot import {name!r}: {what}", where=where, why="the run needs this object", do=do
        ) from error
    if not hasattr(module, attribute):
        public = [other for other in vars(module) if not other.startswith("_")]
        names = nearest(attribute, public) or sorted(public)[:10]
        raise ConfigurationError(
            f"cannot import {name!r}: the module {module_name} has no attribute {attribute!r}",
            where=where,
            why="the run needs this object",
            do=f"correct the attribute; the module has {', '.join(names) or 'no attributes'}",
        )
    return getattr(module, attribute)


def misfit(function: Any, *args: Any, **given: Any) -> str:
    """Return why a function does not accept these arguments; "" if it does, or if its signature cannot be read.

    >>> misfit(lambda request: 0, "request", "answer")
    'too many positional arguments'
    """
    if not callable(function):
        return f"it is a {type(function).__name__} and no function"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*args, **given)
    except TypeError as error:
        return str(error)
    return ""


def check_call(function: Any, form: str, *args: Any, name: str, where: str, **given: Any) -> None:
    """Check that an object of the user can be called with these arguments.

    Args:
        function: The object.
        form: The call as text, for example `reward(request, answer)`.
        args: Positional arguments. Only their number matters.
        name: Name of the object, for the error message.
        where: The setting that names it, for the error message.
        given: Keyword arguments. Only their names matter.

    Raises:
        ConfigurationError: The object cannot be called so. No error if its signature cannot be read.
    """
    if problem := misfit(function, *args, **given):
        raise ConfigurationError(
            f"{name!r} cannot be called as {form}: {problem}",
            where=where,
            why="the run calls it with these arguments",
            do=f"change it so that it accepts {form}",
        )


def check_method(kind: type, form: str, *args: Any, name: str, where: str, **given: Any) -> None:
    """Check that a class has the method that `form` begins with, see `check_call`.

    Raises:
        ConfigurationError: There is no such method, or it cannot be called so.
    """
    method = form.partition("(")[0]
    if not hasattr(kind, method):
        raise ConfigurationError(
            f"{name!r} has no method {method}", where=where, why="the run calls it", do=f"write the method {form}"
        )
    function = inspect.getattr_static(kind, method)
    if inspect.isfunction(function):  # other objects, such as static methods, are bound in another way
        check_call(function, form, None, *args, name=f"{name}.{method}", where=where, **given)


@contextmanager
def calling(name: str, *, where: str) -> Iterator[None]:
    """Replace an exception of an object of the user by an error that names the object and the line.

    Exceptions of built-in objects, errors of this package and `MemoryError` stay as they are.

    Args:
        name: `module:attribute` of the object, or a name without colon for a built-in one.
        where: What the object was called for, for example the request.

    Raises:
        GR2Error: The object raised an exception.
    """
    try:
        yield
    except (GR2Error, MemoryError):
        raise
    except Exception as error:  # the user's object may raise any class
        if ":" not in name:
            raise
        raise GR2Error(
            f"{name!r} raised {_shown(error, name.partition(':')[0])}",
            where=where,
            why="the run needs the result of this call",
            do="correct the object, and test it with recbole_gr2.testing (docs/extending.md)",
        ) from error


def name_of(kind: type) -> str:
    """Return `module:class` for a class of the user, and the name without module for one of this package.

    >>> name_of(ConfigurationError), name_of(Path)
    ('ConfigurationError', 'pathlib:Path')
    """
    own = kind.__module__.partition(".")[0] == __package__
    return kind.__qualname__ if own else f"{kind.__module__}:{kind.__qualname__}"


def _shown(error: Exception, module: str) -> str:
    """The class and the text of an exception with file and line.

    The line is the last one of the module in the traceback. Without such a line it is that of a syntax error, or the
    last line outside of this package.
    """
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    places = [place for place in frames if _is_file_of(module, place[0])]
    if not places and isinstance(error, SyntaxError) and error.filename:
        places = [(error.filename, error.lineno)]
    if not places:
        places = [(file, line) for file, line in frames if file[0] != "<" and PACKAGE not in Path(file).parents]
    text = f": {error.msg if isinstance(error, SyntaxError) else error}" if str(error) else ""
    return f"{type(error).__name__}{text}" + (f" ({places[-1][0]}:{places[-1][1]})" if places else "")


def _is_file_of(module: str, file: str) -> bool:
    """Whether the path of a source file ends with the name of a module."""
    path, parts = Path(file).with_suffix(""), tuple(module.split("."))
    path = path.parent if path.name == "__init__" else path
    return path.parts[-len(parts) :] == parts
