"""Declarations of settings: default, type, permitted values and documentation of each key.

A declaration has the form

    key: default  # (type[ rule][, optional][, speed]) sentence

The type is int, float, str, bool, interval, list or dict, or `list of` / `dict of` another type, which then applies
to each element. The rule limits the values: `str: targeted | rejection`, `int >= 1`, `float > 0`, `int 2..26`,
`float >= 0, < 1`. Numbers are finite. An interval has RecBole's form `[5,inf)`; several are joined by a semicolon.
`optional` permits an empty value (`~`). `speed` marks a setting that never changes a result, and therefore enters no
stage key. `properties/recbole.yaml` declares RecBole's options in the same form.
"""

from __future__ import annotations

import builtins
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from recbole_gr2.config.renamed import RENAMED_VALUES
from recbole_gr2.config.values import Interval, check_intervals, read_yaml
from recbole_gr2.errors import ConfigurationError, MissingFileError, nearest

PACKAGE = Path(__file__).resolve().parent.parent
TYPES: dict[str, type] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "interval": Interval,
    "list": list,
    "dict": dict,
}
LARGEST = 2**31 - 1  # bound of integers that have no other
CUSTOM = "module:attribute"  # a choice that stands for any value with a colon
SEPARATORS = ("field_separator", "seq_separator")  # options whose value may be a tab or a blank
DECLARATION = re.compile(r"^(?P<key>[A-Za-z_]\w*):(?P<value>.*?)#\s*\((?P<spec>[^()]+)\)\s*(?P<text>\S.*)$")
SPECIFICATION = re.compile(r"^(?:(?P<container>list|dict) of )?(?P<type>[a-z]+)(?P<rule>.*)$")
BOUND = re.compile(r"^(?P<operator>>=|<=|>|<)\s*(?P<number>\S+)$")
RANGE = re.compile(r"^(?P<low>\S+?)\.\.(?P<high>\S+)$")


def properties_folder() -> Path:
    """Return the folder of the property files: in the package of a wheel, next to the package in a checkout.

    Raises:
        MissingFileError: There is no such folder.
    """
    return _properties_of(PACKAGE)


@cache
def _properties_of(package: Path) -> Path:
    for folder in (package / "properties", package.parent / "properties"):
        if folder.is_dir():
            return folder
    raise MissingFileError(
        "the property files are missing",
        where=str(package),
        why="they hold the default of every setting",
        do="reinstall recbole-gr2",
    )


def first_comment(file: Path) -> str:
    """Return the first sentence of the comment with which a property file begins, "" without one."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    sentence = " ".join(lines).partition(". ")[0]
    return sentence.removesuffix(".") + ("." if lines else "")


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """A documented key: its default, type and permitted values.

    Attributes:
        key: Name of the setting.
        default: Value if no source sets the key.
        type: Python type of the value.
        element: Type of each element of a list or each value of a dict; None if any is permitted.
        choices: Permitted strings; empty if any is permitted. They apply to the elements of a container.
        low, high: Bounds of a number; None for no bound. They apply to the elements of a container.
        low_exclusive, high_exclusive: Whether the bound itself is not permitted.
        optional: Whether None is permitted.
        speed: Whether the setting can never change a result.
        text: One sentence for the documentation.
        file, line: Place of the declaration; the file is relative to `properties/`.
    """

    key: str
    default: Any
    type: builtins.type
    element: builtins.type | None = None
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    low_exclusive: bool = False
    high_exclusive: bool = False
    optional: bool = False
    speed: bool = False
    text: str = ""
    file: str = ""
    line: int = 0

    @property
    def type_name(self) -> str:
        """The type as written in the declaration, for example `list of int`."""
        return f"{self.type.__name__} of {self.element.__name__}" if self.element else self.type.__name__

    @property
    def allowed(self) -> str:
        """The permitted choices or range in words, for example `>= 1`; empty if the type is the only limit."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.low is not None and self.high is not None and not self.low_exclusive and not self.high_exclusive:
            return f"{self.low:g} to {self.high:g}"
        bounds = [(">", self.low, self.low_exclusive), ("<", self.high, self.high_exclusive)]
        return ", ".join(f"{sign}{'' if exclusive else '='} {n:g}" for sign, n, exclusive in bounds if n is not None)

    def check(self, value: Any) -> Any:
        """Return `value` converted to the declared type.

        An int becomes a float, a number becomes a string, and one text becomes a list of texts, where the declaration
        requires it.

        Raises:
            ValueError: The value has another type, is not a choice, or is out of range.
        """
        if value is None and self.optional:
            return None
        if self.element is str and self.type is list and isinstance(value, str):
            value = [value]
        values = self._checked(value, self.type, limited=self.element is None)
        if self.element is None:
            return values
        if isinstance(values, dict):
            if wrong := [key for key in values if not isinstance(key, str)]:
                raise ValueError(f"{self.key} has the key {wrong[0]!r}, expected text")
            return {key: self._checked(item, self.element, value) for key, item in values.items()}
        return [self._checked(item, self.element, value) for item in values]

    def _checked(self, item: Any, kind: builtins.type, container: Any = None, *, limited: bool = True) -> Any:
        """Return a value, or an element of a container, converted to its type, or raise the ValueError of `check`."""
        try:
            return self._convert(item, kind, limited=limited)
        except ValueError as error:
            expected = self.allowed if self.choices else f"{self.type_name} {self.allowed}".strip()
            if self.choices and container is not None:
                given = f"{self.key} has {item!r:.200}"
            else:
                given = f"{self.key} is {(item if container is None else container)!r:.200}"
            message = f"{given}, expected {expected}{' or nothing (~)' if self.optional else ''}"
            renamed = RENAMED_VALUES.get((self.key, item)) if isinstance(item, str) else None
            similar = [renamed] if renamed else nearest(str(item), [c for c in self.choices if c != CUSTOM])
            reason = f" ({error})" if str(error) else ""
            raise ValueError(message + reason + (f"; did you mean {', '.join(similar)}?" if similar else "")) from None

    def _convert(self, value: Any, kind: builtins.type, *, limited: bool = True) -> Any:
        if kind is Interval:
            return check_intervals(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**63 else math.inf
        if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise ValueError
        if limited and not self._permits(value):
            raise ValueError
        return value

    def _permits(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices or (CUSTOM in self.choices and ":" in value)
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if isinstance(value, str) and not self.separates:
            return value.isprintable()
        above = operator.gt if self.low_exclusive else operator.ge
        below = operator.lt if self.high_exclusive else operator.le
        high = LARGEST if self.high is None and isinstance(value, int) else self.high
        return (self.low is None or above(value, self.low)) and (high is None or below(value, high))

    @property
    def separates(self) -> bool:
        """Whether the value may be a control character."""
        return self.key.removeprefix("base_") in SEPARATORS


def check_option(entry: Declaration, value: Any) -> Any:
    """Return the value of a RecBole option, converted to its type."""
    if entry.separates and value == "\\t":
        return "\t"
    if entry.type is Interval and value is None:
        return entry.default
    return entry.check(value)


def declarations() -> dict[str, Declaration]:
    """Return the declarations of all keys of this package, read from the property files.

    Raises:
        ConfigurationError: A line of a property file is not a valid declaration.
    """
    return {key: entry for file in declaring_files() for key, entry in read_declarations(file).items()}


def recbole_declarations() -> dict[str, Declaration]:
    """Return the declarations of RecBole's options that `declarations` does not contain."""
    return read_declarations(properties_folder() / "recbole.yaml")


def speed_settings() -> set[str]:
    """Return the keys of this package and the options of RecBole that never change a result."""
    return {key for key, entry in {**recbole_declarations(), **declarations()}.items() if entry.speed}


def declaring_files() -> list[Path]:
    folder = properties_folder()
    return [folder / "overall.yaml", *sorted((folder / "stage").glob("*.yaml"))]


def read_declarations(file: Path) -> dict[str, Declaration]:
    """Return the declarations in a property file.

    Raises:
        ConfigurationError: A key has no documentation, an invalid type or an invalid rule.
    """
    place = file.name if file.parent == properties_folder() else f"{file.parent.name}/{file.name}"
    return dict(_declarations_in(file.read_text(encoding="utf-8"), place))


@cache
def _declarations_in(text: str, place: str) -> Mapping[str, Declaration]:
    """The declarations in the text of a property file. `place` is its path in `properties/`."""
    declared = {}
    values = read_yaml(text) or {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = DECLARATION.match(line)
        if match and match["key"] in values:
            declared[match["key"]] = Declaration(
                key=match["key"],
                default=values[match["key"]],
                text=match["text"],
                file=place,
                line=number,
                **_specification(match["spec"], where=f"{place}:{number}"),
            )
    undocumented = set(values) - set(declared)
    if undocumented:
        raise ConfigurationError(
            f"keys without a documented line: {sorted(undocumented)}",
            where=place,
            why="the declaration defines type, permitted values and documentation of a setting",
            do="write key: default  # (type) Sentence.",
        )
    return declared


def _specification(spec: str, *, where: str) -> dict[str, Any]:
    """Parse the part of a declaration in parentheses into fields of `Declaration`."""
    invalid = ConfigurationError(
        f"unreadable type ({spec})",
        where=where,
        why="the value of this setting could not be checked",
        do="write for example (int >= 1), (float 0..1, optional) or (str: one | other, speed)",
    )
    first, *others = [part.strip() for part in spec.split(",")]
    match = SPECIFICATION.match(first)
    if not match or match["type"] not in TYPES:
        raise invalid
    kind = TYPES[match["type"]]
    fields: dict[str, Any] = {"type": kind}
    if match["container"]:
        fields = {"type": TYPES[match["container"]], "element": kind}
    rule = match["rule"].strip()
    for part in filter(None, (rule, *others)):
        if part in ("optional", "speed"):
            fields[part] = True
        elif part.startswith(":") and part == rule and kind is str:
            fields["choices"] = tuple(choice.strip() for choice in part[1:].split("|"))
        elif kind in (int, float):
            fields |= _bounds(part, invalid)
        else:
            raise invalid
    return fields


def _bounds(rule: str, invalid: ConfigurationError) -> dict[str, Any]:
    try:
        if match := RANGE.match(rule):
            return {"low": float(match["low"]), "high": float(match["high"])}
        if match := BOUND.match(rule):
            side = "low" if match["operator"].startswith(">") else "high"
            return {side: float(match["number"]), f"{side}_exclusive": "=" not in match["operator"]}
    except ValueError:
        pass
    raise invalid
