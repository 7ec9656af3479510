"""Values in property files and on the command line: YAML and intervals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from recbole_gr2.errors import ConfigurationError, MissingFileError, nearest


class SettingsLoader(yaml.SafeLoader):
    """Safe YAML that reads `1e-4` as a float, like RecBole's loader, keeps dates as text and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} occurs twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)?$|^[-+]?\d[\d_]*\.\d*([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)
SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in SettingsLoader.yaml_implicit_resolvers.items()
}
_END = r"\s*[-+]?(?:\d+\.?\d*|\.\d+|inf)(?:[eE][-+]?\d+)?\s*"
_INTERVALS = rf"[\[(]{_END},{_END}[\])](?:\s*;\s*[\[(]{_END},{_END}[\])])*"
INTERVALS = re.compile(_INTERVALS)
SEPARATOR = re.compile(r"\s+|[:;,|&#]+|[^\w~]")  # texts that YAML would read as something else, or not at all
UNQUOTED_INTERVALS = re.compile(rf":\s*({_INTERVALS})")


class Interval(str):
    """Type of a setting in RecBole's form of intervals, such as `[5,inf)` or `(0,1];[3,4)`."""


def read_yaml(text: str) -> Any:
    """Parse YAML without evaluating any expression. Intervals such as `[5,inf)` need no quotation marks.

    Raises:
        ValueError: The text is not valid YAML. The message names line and column.

    >>> read_yaml("{rate: 1e-4, split: {LS: valid_and_test}, list: [1, 2]}")
    {'rate': 0.0001, 'split': {'LS': 'valid_and_test'}, 'list': [1, 2]}
    >>> read_yaml("user_inter_num_interval: [5,inf)")
    {'user_inter_num_interval': '[5,inf)'}
    """
    try:
        return _parse(text)
    except ValueError:
        quoted = UNQUOTED_INTERVALS.sub(r": '\1'", text)
        if quoted == text:
            raise
        return _parse(quoted)


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, Loader=SettingsLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        hint = "; indent with blanks" if "\t" in str(error.problem) else ""
        raise ValueError(f"{place}{error.problem or error.context}{hint}") from error
    except RecursionError as error:
        raise ValueError("brackets are nested too deeply") from error
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML raises the last ones for values that do not have the form of their tag, such as `!!int one`.
        raise ValueError(" ".join(str(error).split())) from error


def read_value(text: str) -> Any:
    """Return a value of the command line: YAML, or else the text itself, whose type the declaration then checks.

    >>> read_value("[1, 2]"), read_value("[7,inf)"), read_value(","), read_value("~")
    ([1, 2], '[7,inf)', ',', None)
    """
    if SEPARATOR.fullmatch(text):
        return text
    try:
        return read_yaml(text)
    except ValueError:
        return text


def check_intervals(value: Any) -> str:
    """Return an interval, or several, in RecBole's form. A list of two numbers is a closed interval.

    Raises:
        ValueError: The value has another form, or a lower end is above its upper end.

    >>> check_intervals([5, 10]), check_intervals("(0,1];[3,4)")
    ('[5,10]', '(0,1];[3,4)')
    """
    if isinstance(value, list) and len(value) == 2:
        value = f"[{value[0]},{value[1]}]"
    if not isinstance(value, str) or not INTERVALS.fullmatch(value.strip()):
        raise ValueError("write for example [5,inf)")
    for part in value.split(";"):
        low, high = map(float, part.strip()[1:-1].split(","))
        if low > high:
            raise ValueError(f"in {part.strip()} the lower end is above the upper end")
    return value.strip()


def is_file(path: str | Path) -> bool:
    """Return whether there is a file of this name. Names that no file can have give False."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def read_yaml_file(file: str | Path, *, where: str, what: str) -> Any:
    """Return the content of a YAML file.

    Args:
        file: The file.
        where: The setting or option that names it.
        what: What the file is, for the error message, such as `config file`.

    Raises:
        MissingFileError: There is no such file. The error names similar files of the folder.
        ConfigurationError: The file cannot be read, or is not valid YAML. The error names the line.
    """
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        folder = file.parent
        names = [entry.name for entry in folder.glob("*.y*ml")] if folder.is_dir() else []
        similar = [str(folder / name) for name in nearest(file.name, names)]
        raise MissingFileError(
            f"there is no {what} {file}",
            where=where,
            why="its content would be missing in the run",
            do=f"did you mean {', '.join(similar)}?" if similar else "check the path",
        ) from error
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigurationError(
            f"the {what} is not encoded in UTF-8",
            where=f"{file}:{line}",
            why=f"the byte {error.object[error.start]:#x} cannot be read",
            do="save the file in UTF-8",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise ConfigurationError(
            f"the {what} {str(file)!r} cannot be read: {getattr(error, 'strerror', None) or error}",
            where=where,
            do="name a file that can be read",
        ) from error
    try:
        return read_yaml(text)
    except ValueError as error:
        raise ConfigurationError(
            f"the {what} is not valid YAML: {error}",
            where=str(file),
            why="its content cannot be read",
            do="correct the line; write a text with special characters in quotation marks",
        ) from error
