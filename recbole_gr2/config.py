"""Settings: declarations, sources, checks, and the settings that RecBole receives.

Sources, the strongest first: command line, `config_dict`, `--config_files`, property files (preset, then data set, then
`overall.yaml` and `stage/*.yaml`). There are three kinds of keys:

* Keys of this package. Each is declared once, on one line of `properties/overall.yaml` or `properties/stage/*.yaml`.
* RecBole options (`metrics`, `user_inter_num_interval`, ...). They are passed to RecBole unchanged.
* `base_<option>`: a RecBole option for the base model alone, for example `base_learning_rate`.

Any other key is an error that names the most similar keys. A declaration has the form

    key: default  # (type[ rule][, optional][, speed]) sentence

The type is int, float, str, bool, interval, list or dict, or `list of` / `dict of` one of the first five, which then
applies to each element. The rule limits the values: `str: targeted | rejection`, `int >= 1`, `float > 0`, `int 2..26`,
`float >= 0, < 1`. Numbers are finite. An interval has RecBole's form `[5,inf)`; several are joined by a semicolon.
`optional` permits an empty value (`~`). `speed` marks a setting that never changes a result, and therefore enters no
stage key. `properties/recbole.yaml` declares RecBole's options in the same form. `python -m recbole_gr2.config` prints
all declarations as `docs/settings.md`.
"""

from __future__ import annotations

import builtins
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recbole_gr2 import compat
from recbole_gr2.errors import ConfigurationError, MissingFileError, nearest

if TYPE_CHECKING:
    from recbole.config import Config


class Interval(str):
    """Type of a setting in RecBole's form of intervals, such as `[5,inf)` or `(0,1];[3,4)`."""


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
DECLARATION = re.compile(r"^(?P<key>[A-Za-z_]\w*):(?P<value>.*?)#\s*\((?P<spec>[^()]+)\)\s*(?P<text>\S.*)$")
SPECIFICATION = re.compile(r"^(?:(?P<container>list|dict) of )?(?P<type>[a-z]+)(?P<rule>.*)$")
BOUND = re.compile(r"^(?P<operator>>=|<=|>|<)\s*(?P<number>\S+)$")
MODEL_COMMENT = re.compile(r"^(\w+):.*#\s*\((\w+)[^)]*\)(.*)", flags=re.MULTILINE)  # in a property file of RecBole
RANGE = re.compile(r"^(?P<low>\S+?)\.\.(?P<high>\S+)$")

# RecBole options of the training of one model.
RECBOLE_TRAINING = {
    "epochs",
    "train_batch_size",
    "learner",
    "learning_rate",
    "train_neg_sample_args",
    "eval_step",
    "stopping_step",
    "clip_grad_norm",
    "weight_decay",
    "loss_decimal_place",
    "loss_type",
    "enable_amp",
    "enable_scaler",
    "require_pow",
}
PATHS = ("data_path", "checkpoint_dir", "prompt_template", "cand_file", "mid_general", "trace_file")
ACTIVATIONS = ("gelu", "relu", "swish", "tanh", "sigmoid")  # of RecBole's Transformer (layers.py:502)
SEPARATORS = ("field_separator", "seq_separator")  # options whose value may be a tab or a blank
SEQUENTIAL, GENERAL = "sequential", "general"  # kinds of RecBole's models that can propose candidates
GENERATOR = "GR2Generator"  # the mid-trained language model as a recommender
# Recommender -> its method as a re-ranker of the base model's lists, with and without reasoning traces.
ONEREC_THINK = {"OneRecThink": "onerec_think", "OneRecThink-no-think": "onerec_think-no-think"}
# RecBole options with one usable value. `repeatable` is required for sequential data. `normalize_all` would rescale
# the float columns; the exact time order does not depend on it.
RECBOLE_FIXED = {"repeatable": True, "normalize_all": False}

# Keys of earlier versions; docs/migration.md lists both tables.
_ONEREC_THINK = (
    "variant",
    "texts",
    "steps",
    "passes",
    "batch_size",
    "learning_rate",
    "max_trace",
    "samples",
    "temperature",
    "beams",
    "similar",
    "rl_steps",
    "rl_prompts_per_step",
    "rl_num_generations",
    "rl_beams",
    "rl_learning_rate",
    "rl_kl",
)
RENAMED: dict[str, str] = {
    "distill_endpoint_model": "distilled_endpoint_model",
    "distill_kl": "distilled_kl",
    "distill_steps": "distilled_steps",
    "distill_teacher": "distilled_teacher",
    "evidence_fits": "prior_fits",
    "evidence_providers": "prior_features",
    "evidence_steps": "prior_steps",
    "mid_micro_batch_size": "llm_micro_batch_size",
    "mid_save_steps": "llm_save_steps",
    "models_words": "models_options",
    **{f"ort_{name}": f"onerec_think_{name}" for name in _ONEREC_THINK},
    "ort_micro_batch_size": "llm_micro_batch_size",
    "ort_rl_micro_batch_size": "llm_micro_batch_size",
    "ort_rl_save_steps": "rl_save_steps",
    "ort_save_steps": "llm_save_steps",
    "rl_max_refill": "rl_max_resample",
    "rl_micro_batch_size": "llm_micro_batch_size",
    "sft_micro_batch_size": "llm_micro_batch_size",
    "sft_save_steps": "llm_save_steps",
}
_CONSTANT = "It is now a constant."
REMOVED: dict[str, tuple[str, str]] = {  # key: (fixed value, reason)
    "evidence_dropout": ("0.2", _CONSTANT),
    "evidence_folds": ("5", _CONSTANT),
    "evidence_hidden": ("32", _CONSTANT),
    "evidence_learning_rate": ("0.003", _CONSTANT),
    "evidence_weight_decay": ("0.01", _CONSTANT),
    "mid_warmup_share": ("0.05", _CONSTANT),
    "normalize_all": ("False", "The time order is exact for either value."),
    "ort_trace_weight": ("1.0", "OneRec-Think defines one loss over trace and item."),
    "ort_warmup_share": ("0.1", "OneRec-Think's released code defines it."),
    "prompt_evidence": ("[]", "Features in the prompt gave no improvement (results/tried.md)."),
    "repeatable": ("True", "RecBole requires it for sequential data."),
    "rl_injected": ("0", "No base model makes lists with an inserted target."),
    "rl_max_dead": ("5", _CONSTANT),
    "rl_minibatches": ("1", _CONSTANT),
    "rl_overlong_weight": ("0.1", _CONSTANT),
    "rl_warmup_steps": ("2", _CONSTANT),
    "sft_others": ("prior", "It was the best choice (results/tried.md)."),
    "sft_ranking_weight": ("1.0", "Only its ratio to sft_reasoning_weight matters."),
    "sft_warmup_share": ("0.05", _CONSTANT),
}
RENAMED_VALUES: dict[tuple[str, str], str] = {
    ("eval_scope", "all"): "all_users",
    ("eval_scope", "in_list"): "hit_users",
    ("rl_start", "distill"): "distilled",
}


class _Loader(yaml.SafeLoader):
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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)?$|^[-+]?\d[\d_]*\.\d*([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_END = r"\s*[-+]?(?:\d+\.?\d*|\.\d+|inf)(?:[eE][-+]?\d+)?\s*"
_INTERVALS = rf"[\[(]{_END},{_END}[\])](?:\s*;\s*[\[(]{_END},{_END}[\])])*"
INTERVALS = re.compile(_INTERVALS)
SEPARATOR = re.compile(r"\s+|[:;,|&#]+|[^\w~]")  # texts that YAML would read as something else, or not at all
UNQUOTED_INTERVALS = re.compile(rf":\s*({_INTERVALS})")


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
        return yaml.load(text, Loader=_Loader)
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


def properties_folder() -> Path:
    """Return the folder of the property files: in the package of a wheel, next to the package in a checkout.

    Raises:
        MissingFileError: There is no such folder.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "properties", package.parent / "properties"):
        if folder.is_dir():
            return folder
    raise MissingFileError(
        "the property files are missing",
        where=str(package),
        why="they hold the default of every setting",
        do="reinstall recbole-gr2",
    )


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

        An int becomes a float, and a number becomes a string, where the declaration requires it.

        Raises:
            ValueError: The value has another type, is not a choice, or is out of range.
        """
        if value is None and self.optional:
            return None
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


def declarations() -> dict[str, Declaration]:
    """Return the declarations of all keys of this package, read from the property files.

    Raises:
        ConfigurationError: A line of a property file is not a valid declaration.
    """
    return {key: entry for file in _declaring_files() for key, entry in read_declarations(file).items()}


def recbole_declarations() -> dict[str, Declaration]:
    """Return the declarations of RecBole's options that `declarations` does not contain."""
    return read_declarations(properties_folder() / "recbole.yaml")


def speed_settings() -> set[str]:
    """Return the keys of this package and the options of RecBole that never change a result."""
    return {key for key, entry in {**recbole_declarations(), **declarations()}.items() if entry.speed}


def _declaring_files() -> list[Path]:
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


class Settings(Mapping[str, Any]):
    """All settings of a run, frozen. `settings[key]` is the value of a key of this package.

    Attributes:
        recbole: Options for RecBole's Config, with those of the base model (`base_<option>`, prefix removed).
        declared: Declarations of the keys of this package.
        origin: Source of each value, by key.
    """

    def __init__(
        self,
        values: dict[str, Any],
        recbole: dict[str, Any],
        declared: dict[str, Declaration],
        origin: dict[str, str],
    ) -> None:
        self._values, self.recbole, self.declared, self.origin = values, recbole, declared, origin

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def results(self, prefixes: Iterable[str]) -> dict[str, Any]:
        """Return the keys of this package that start with one of `prefixes` and can change a result."""
        prefixes = tuple(prefixes)
        return {k: v for k, v in sorted(self._values.items()) if k.startswith(prefixes) and not self.declared[k].speed}

    def chosen(self) -> dict[str, dict[str, Any]]:
        """Return the settings that can change a result and differ from their defaults, each with value and source.

        The seed, the preset and the data set are not included, because every report names them.
        """
        excluded = {"seed", "preset", "dataset", *speed_settings()}
        values = {**self.recbole, **{f"base_{k}": self.recbole[k] for k in self.base_options}, **self._values}
        return {
            key: {"value": values[key], "from": source}
            for key, source in sorted(self.origin.items())
            if source != "properties"
            and key not in excluded
            and not (key in self.declared and values[key] == self.declared[key].default)
        }

    @property
    def results_folder(self) -> Path:
        """The folder of all results of the data set, `<checkpoint_dir>/gr2/<dataset>`."""
        return Path(self["checkpoint_dir"]) / "gr2" / self["dataset"]

    def recbole_results(self, base: bool = True) -> dict[str, Any]:
        """Return the RecBole options that can change a result.

        Args:
            base: Whether to include the options of the base model alone.
        """
        options = self.recbole if base else self.shared_options
        speed = speed_settings()
        return {k: v for k, v in sorted(options.items()) if k not in speed}

    def as_yaml(self) -> str:
        """Return the text of a config file that reproduces these settings with `--config_files`."""
        base = {f"base_{k}": self.recbole[k] for k in self.base_options}
        shared = {k: v for k, v in self.recbole.items() if k not in self.base_options and k not in RECBOLE_FIXED}
        return yaml.safe_dump({**self._values, **shared, **base}, sort_keys=True)

    @property
    def shared_options(self) -> dict[str, Any]:
        """RecBole options without those of the base model alone."""
        base = set(self.base_options)
        return {k: self._values.get(k, v) for k, v in self.recbole.items() if k not in base or k in self._values}

    @property
    def base_options(self) -> list[str]:
        """Names of the RecBole options that were given for the base model alone."""
        return sorted(k for k in self.recbole if f"base_{k}" in self.origin)


def load_settings(
    *,
    command_line: Mapping[str, Any] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    config_files: Iterable[str | Path] = (),
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    machine: bool = True,
) -> Settings:
    """Merge all sources, check every key and value, and report all problems together.

    torch is imported only if no source names a preset, and only after the check of all given settings. Combinations of
    settings are checked last, because they depend on the preset.

    Args:
        command_line: Settings of the command line, the strongest source.
        config_dict: Settings of the Python API.
        config_files: YAML files; a later file overrides an earlier one.
        layers: Settings by source, weaker than the three above and stronger than the property files; a later source
            overrides an earlier one.
        machine: Whether the machine chooses the preset if no source names one. If not, torch is never imported; then
            no preset is applied, and combinations of settings are not checked.

    Raises:
        ConfigurationError: A key does not exist, or a value has a wrong type or is not permitted.
        MissingFileError: A config file does not exist.
    """
    declared = declarations()
    given: list[tuple[str, Mapping[str, Any]]] = [
        *(layers or {}).items(),
        *((str(file), _read_file(file)) for file in _paths(config_files)),
        ("config_dict", _mapping(config_dict, "config_dict")),
        ("command line", _mapping(command_line, "command line")),
    ]

    def given_value(key: str) -> Any:
        return next((values[key] for _, values in reversed(given) if key in values), declared[key].default)

    folder = properties_folder()
    weaker: list[tuple[str, Mapping[str, Any]]] = [
        ("properties", {key: entry.default for key, entry in declared.items()})
    ]
    datasets = {file.stem: file for file in (folder / "dataset").glob("*.yaml")}
    if dataset_file := datasets.get(str(given_value("dataset"))):
        weaker.append((f"dataset/{dataset_file.name}", _read_file(dataset_file)))
    preset = given_value("preset")
    if preset is None:
        without_preset = _check_all(_merge([*weaker, *given]), declared, combinations=False)
        if not machine:
            return without_preset
        preset = default_preset()
    presets = {file.stem: file for file in (folder / "preset").glob("*.yaml")}
    if str(preset) not in presets:
        raise ConfigurationError(
            f"there is no preset named {preset!r:.200}",
            where="preset",
            why="a preset defines the sizes of the models and of the training",
            do=f"choose from {', '.join(nearest(str(preset), presets) or sorted(presets))}",
        )
    weaker.append((f"preset/{preset}.yaml", _read_file(presets[str(preset)])))
    merged = _merge([*weaker, *given])
    merged["preset"] = (str(preset), merged["preset"][1])
    return _check_all(merged, declared)


def default_preset() -> str:
    """Return `gpu` if torch finds a GPU, else `laptop`."""
    import torch

    return "gpu" if torch.cuda.is_available() else "laptop"


def _paths(config_files: Iterable[str | Path]) -> list[str | Path]:
    if isinstance(config_files, str | Path):
        raise ConfigurationError(
            f"config_files is {str(config_files)!r}, expected a list",
            where="config_files",
            do=f"write config_files=[{str(config_files)!r}]",
        )
    return list(config_files)


def _mapping(values: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping | None):
        raise ConfigurationError(
            f"the settings are {values!r:.200}, expected a mapping", where=where, do="give each value with its key"
        )
    return dict(values or {})


def _read_file(file: str | Path) -> dict[str, Any]:
    values = read_yaml_file(file, where="--config_files", what="config file")
    if not isinstance(values, dict | None):
        raise ConfigurationError(
            "a config file must contain a mapping",
            where=str(file),
            why="each setting needs a name",
            do="write one key: value per line",
        )
    return values or {}


def _merge(sources: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, tuple[Any, str]]:
    """Return value and source of each key; later sources override earlier ones."""
    return {key: (value, source) for source, values in sources for key, value in values.items()}


def _check_all(
    merged: Mapping[Any, tuple[Any, str]], declared: dict[str, Declaration], *, combinations: bool = True
) -> Settings:
    """Check every key and value, and separate the keys of this package from the options of RecBole."""
    options = recbole_options()
    base_model = str(merged["base_model"][0])
    base_declared = {**recbole_declarations(), **declared, **model_declarations(base_model)}
    base_options = (RECBOLE_TRAINING | base_model_options(base_model) | options) & set(base_declared)
    base_options -= set(RECBOLE_FIXED)
    values: dict[str, Any] = {}
    recbole: dict[str, Any] = {}
    problems = []
    for key, (value, source) in merged.items():
        try:
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r:.200} is no text")
            name = key.removeprefix("base_")
            if key in declared:
                values[key] = declared[key].check(value)
            elif name in REMOVED and (key in REMOVED or name in RECBOLE_FIXED):
                fixed, reason = REMOVED[name]
                raise ValueError(f"{key} was removed; its value is now always {fixed}. {reason}")
            elif key in RENAMED:
                raise ValueError(f"{key} is now named {RENAMED[key]}")
            elif key != name and name in base_options:
                recbole[name] = _check_option(replace(base_declared[name], key=key), value)
            elif key in options:
                checked = _check_option(base_declared[key], value)
                recbole.setdefault(key, checked)  # base_<option> has precedence for the base model
            elif key in RECBOLE_TRAINING:
                stages = [other for other in declared if other.endswith(f"_{key}")]
                alternatives = f", or the key of a stage: {', '.join(stages)}" if stages else ""
                raise ValueError(f"{key} is ambiguous: use base_{key} for the base model{alternatives}")
            else:
                everything = [*declared, *options, *(f"base_{option}" for option in base_options)]
                similar = nearest(key, everything, cutoff=0.6)
                raise ValueError(f"unknown key {key!r:.200}" + (f"; nearest: {', '.join(similar)}" if similar else ""))
        except ValueError as error:
            problems.append(f"{source}: {error}")
    effective = _Values({**values, **recbole})
    for key, rule in [*RULES.items(), *(COMBINATIONS.items() if combinations else ())]:
        try:
            rule(effective, declared)
        except ValueError as error:
            names = (name for first in (str(error).partition(" ")[0], key) for name in (first, f"base_{first}"))
            place = next((name for name in names if name in merged), None)
            problems.append(f"{merged[place][1] if place else 'settings'}: {error}")
        except _MissingValue:  # an option that is not given, or a value that is among the problems already
            pass
    if problems:
        raise ConfigurationError(
            "settings that cannot be used:\n    " + "\n    ".join(dict.fromkeys(problems)),
            why="the run would fail later, or would not be the requested one",
            do="correct them; docs/settings.md lists every key with its permitted values",
        )
    for key in declared:  # RecBole options that this package declares are passed to RecBole too
        if key in options:
            recbole.setdefault(key, values[key])
    origin = {key: source for key, (_, source) in merged.items()}
    return Settings(values, {**recbole, **RECBOLE_FIXED}, declared, origin)


class _MissingValue(Exception):
    """A rule reads a value that does not exist."""


class _Values(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        raise _MissingValue(key)


def _check_option(entry: Declaration, value: Any) -> Any:
    """Return the value of a RecBole option, converted to its type."""
    if entry.separates and value == "\\t":
        return "\t"
    if entry.type is Interval and value is None:
        return entry.default
    return entry.check(value)


# --- rules of single settings ----------------------------------------------------------------------------------------


def _check_texts(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for key, value in values.items():
        if isinstance(value, str) and not value and key != "gpu_id":
            raise ValueError(f"{key} is empty")
        if key in PATHS and isinstance(value, str) and value.startswith("~"):
            raise ValueError(f"{key} is {value!r:.200}, in which ~ would be the name of a folder; write the whole path")
        if isinstance(value, list) and any(isinstance(item, str) and not item.strip() for item in value):
            raise ValueError(f"{key} is {value!r:.200}, expected no empty text")


def _check_repeats(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for key, value in values.items():
        if isinstance(value, list) and key in declared and key != "sid_hidden":
            repeated = [item for position, item in enumerate(value) if item in value[:position]]
            if repeated:
                raise ValueError(f"{key} has {repeated[0]!r:.200} twice")


def _check_dataset(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    name = values["dataset"]
    if not re.fullmatch(r"[^/\\]{1,200}", name) or name in (".", ".."):
        raise ValueError(f"dataset is {name!r:.200}, expected the name of a folder in data_path")


def _check_reranker(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if values["model"] != "GR2":
        raise ValueError(
            f"model is {values['model']!r:.200}, expected GR2, the only re-ranker; a model that proposes candidates is "
            f"--base_model {values['model']:.200}"
        )


def _check_base_model(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    name = values["base_model"]
    if name in ONEREC_THINK:
        raise ValueError(
            f"{name} cannot be the base_model: it proposes no candidates of train requests; name it in models"
        )
    _check_model(name, [*candidate_models(), GENERATOR])


def _check_models(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for name in values["models"]:
        _check_model(name, [*candidate_models(), GENERATOR, *ONEREC_THINK])
    known = {**recbole_declarations(), **declared}
    known = {name: known[name] for name in (recbole_options() | RECBOLE_TRAINING) - set(RECBOLE_FIXED) if name in known}
    own = [model_declarations(model) for model in values["models"]]
    for option, value in values["models_options"].items():
        entries = [each[option] for each in [*own, known] if option in each]
        if not entries:
            similar = nearest(str(option), {*known, *(name for entries in own for name in entries)}, cutoff=0.6)
            raise ValueError(
                f"models_options has the unknown option {option!r:.200} of {', '.join(values['models']) or 'no model'}"
                + (f"; nearest: {', '.join(similar)}" if similar else "")
            )
        for entry in entries:
            _check_option(replace(entry, key=f"models_options.{option}"), value)
    _check_negatives(values["models_options"], declared)


def _check_model(name: str, names: Iterable[str]) -> None:
    kind = recbole_models().get(name, "")
    if name in names:
        return
    if kind:
        raise ValueError(
            f"{name} is a {kind} model, but candidates need scores for the whole catalogue from a user and a history "
            "alone; choose a sequential or a general model such as SASRec, GRU4Rec, BPR or ItemKNN"
        )
    similar = nearest(name, names, cutoff=0.6) or list(names)
    raise ValueError(f"there is no model named {name!r:.200}; nearest: {', '.join(similar)}")


def _check_metrics(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    names = recbole_metrics()
    for name in values["metrics"]:
        if name.lower() not in map(str.lower, names):
            similar = ", ".join(nearest(name, names) or names)
            raise ValueError(f"metrics has an unknown metric {name!r:.200}; nearest: {similar}")
    if not values["metrics"] or not values["topk"] or any(not isinstance(k, int) or k < 1 for k in values["topk"]):
        raise ValueError(
            f"metrics is {values['metrics']} and topk is {values['topk']}, expected at least one metric "
            "and cut-offs >= 1"
        )
    name, at, cutoff = values["valid_metric"].partition("@")
    whole = name.lower() == "gauc"  # RecBole's only ranking metric without a cut-off
    form = not at if whole else re.fullmatch(r"[1-9][0-9]{0,8}", cutoff)
    if name.lower() not in map(str.lower, names) or not form:
        raise ValueError(
            f"valid_metric is {values['valid_metric']!r:.200}, expected a metric and a cut-off such as NDCG@10"
        )


def _check_protocol(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    protocol, default = values["eval_args"], declared["eval_args"].default
    if unknown := set(protocol) - set(default):
        raise ValueError(f"eval_args has the unknown keys {sorted(map(str, unknown))}, expected {', '.join(default)}")
    full = ("full", {"valid": "full", "test": "full"}, {"valid": "full"}, {"test": "full"})
    if (
        protocol.get("split") != default["split"]
        or protocol.get("order") != default["order"]
        or protocol.get("group_by", "user") != "user"
        or protocol.get("mode", "full") not in full
    ):
        raise ValueError(
            f"eval_args is {protocol!r:.200}, expected {{split: {{LS: valid_and_test}}, order: TO, mode: full}}: "
            "candidates without leakage are defined for leave-one-out in time order over all items"
        )


def _check_benchmark(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if values["benchmark_filename"] is not None:
        raise ValueError(
            f"benchmark_filename names ready-made splits {values['benchmark_filename']!r:.200}; candidates without "
            "leakage are defined for leave-one-out in time order, so give one .inter file with all interactions"
        )


def _check_columns(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    defaults = recbole_declarations()
    needed = [values.get(key, defaults[key].default) for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]
    if len(set(needed)) < len(needed):
        raise ValueError(f"USER_ID_FIELD, ITEM_ID_FIELD and TIME_FIELD are {', '.join(needed)}, expected three columns")
    for key in ("load_col", "unload_col", "unused_col"):
        for file, columns in (values.get(key) or {}).items():
            texts = isinstance(columns, list) and all(isinstance(column, str) for column in columns)
            if not isinstance(file, str) or not (texts or (columns == "*" and key == "load_col")):
                raise ValueError(f"{key} has {file!r}: {columns!r:.200}, expected a list of columns")
    unused = values.get("unused_col") or {}
    if foreign := set(unused) - set(values["load_col"]):
        raise ValueError(f"unused_col names the files {sorted(foreign)}, of which load_col loads nothing")
    if ids := [column for column in needed[:2] if column in unused.get("inter", [])]:
        raise ValueError(f"unused_col has {', '.join(ids)}, which the run needs")


def _check_value_intervals(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for column, interval in (values["val_interval"] or {}).items():
        tokens = isinstance(interval, list) and all(isinstance(token, str | int | float) for token in interval)
        try:
            if not tokens:
                check_intervals(interval)
        except ValueError as error:
            raise ValueError(f"val_interval has {column}: {interval!r:.200}, expected an interval ({error})") from None


def _check_grades(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if values["train_grades"] is None:
        return
    (column, thresholds), *more = list(values["train_grades"].items()) or [("", [])]
    numbers = isinstance(thresholds, list) and all(
        isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        for number in thresholds
    )
    if more or not numbers or not thresholds or thresholds != sorted(set(thresholds)):
        raise ValueError(
            f"train_grades is {values['train_grades']!r:.200}, expected one column and its rising thresholds, "
            "{rating: [3, 5]}"
        )
    loaded = values["load_col"]["inter"]
    if loaded != "*" and column not in loaded:
        raise ValueError(f"train_grades names the column {column!r:.200}, which load_col does not load")


def _check_negatives(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    chosen, default = values.get("train_neg_sample_args"), recbole_declarations()["train_neg_sample_args"].default
    if chosen is None:
        return
    if unknown := set(chosen) - set(default):
        raise ValueError(
            f"train_neg_sample_args has the unknown keys {sorted(map(str, unknown))}, expected {', '.join(default)}"
        )
    merged = {**default, **chosen}
    numbers = {"sample_num": 1, "candidate_num": 1 if merged["dynamic"] else 0, "alpha": 0}
    if (
        merged["distribution"] not in ("uniform", "popularity")
        or not isinstance(merged["dynamic"], bool)
        or any(
            isinstance(merged[name], bool)
            or not isinstance(merged[name], int | float if name == "alpha" else int)
            or not least <= merged[name] <= LARGEST
            for name, least in numbers.items()
        )
    ):
        raise ValueError(
            f"train_neg_sample_args is {chosen!r:.200}, expected distribution uniform or popularity, sample_num >= 1, "
            "alpha >= 0, dynamic True or False, and candidate_num >= 1 if dynamic is True"
        )


def _check_gradients(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    chosen = values["clip_grad_norm"]
    if chosen is not None and (set(chosen) - {"max_norm", "norm_type"} or not chosen.get("max_norm", 0) > 0):
        raise ValueError(f"clip_grad_norm is {chosen!r:.200}, expected for example {{max_norm: 5, norm_type: 2}}")


def _check_gpu(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if not re.fullmatch(r"|-1|(\d+|(GPU|MIG)-[\w/-]+)(,\s*(\d+|(GPU|MIG)-[\w/-]+))*,?", values["gpu_id"]):
        raise ValueError(f"gpu_id is {values['gpu_id']!r:.200}, expected numbers of GPUs such as 0 or 0,1")


def _check_storage(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    for key in ("save_dataset", "save_dataloaders"):
        if values.get(key):
            raise ValueError(f"{key} is True, but this package stores no data sets of RecBole")


def _check_mix(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    mix, tasks = values["mid_mix"], declared["mid_mix"].default
    if set(mix) - set(tasks):
        raise ValueError(f"mid_mix has unknown tasks {sorted(set(mix) - set(tasks))}, expected {', '.join(tasks)}")
    if not sum(mix.values()) > 0:
        raise ValueError(f"mid_mix is {mix!r}, expected at least one share > 0")


def _check_price(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    unknown = set(values["trace_price"]) - {"prompt", "completion"}
    if unknown:
        raise ValueError(f"trace_price has unknown keys {sorted(unknown)}, expected prompt, completion")


def _check_template(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    name = values["prompt_template"]
    names = sorted(file.stem for file in (properties_folder() / "prompt").glob("*.yaml"))
    if name not in names and not (name.endswith((".yaml", ".yml")) and is_file(name)):
        similar = ", ".join(nearest(name, names) or names)
        raise ValueError(f"there is no prompt template {name!r:.200}; nearest: {similar}, or the path of a YAML file")


def _check_endpoint(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    url = values["trace_endpoint"]
    if url is not None and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
        raise ValueError(f"trace_endpoint is {url!r:.200}, expected a URL such as http://localhost:8000/v1")


# Checks that a declaration cannot express. A check raises ValueError; the key names the source in the message.
Rule = Callable[[Mapping[str, Any], Mapping[str, Declaration]], None]
RULES: dict[str, Rule] = {
    "texts": _check_texts,
    "repeats": _check_repeats,
    "dataset": _check_dataset,
    "model": _check_reranker,
    "base_model": _check_base_model,
    "models": _check_models,
    "valid_metric": _check_metrics,
    "eval_args": _check_protocol,
    "benchmark_filename": _check_benchmark,
    "load_col": _check_columns,
    "val_interval": _check_value_intervals,
    "train_grades": _check_grades,
    "train_neg_sample_args": _check_negatives,
    "clip_grad_norm": _check_gradients,
    "gpu_id": _check_gpu,
    "save_dataset": _check_storage,
    "mid_mix": _check_mix,
    "prompt_template": _check_template,
    "trace_price": _check_price,
    "trace_endpoint": _check_endpoint,
}


# --- rules of several settings ---------------------------------------------------------------------------------------


def _check_random_levels(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if values["sid_random_last"] >= values["sid_levels"]:
        raise ValueError(
            f"sid_random_last is {values['sid_random_last']}, expected less than sid_levels ({values['sid_levels']})"
        )


def _check_buffer(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    buffer, longest = values["rl_overlong_buffer"], values["prompt_max_reasoning"]
    if 0 < longest < buffer:
        raise ValueError(f"rl_overlong_buffer is {buffer}, expected at most prompt_max_reasoning ({longest})")


def _check_attempts(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    sampled = values["trace_teacher"] in ("rules", "local_llm", "openai_api")
    if (
        sampled
        and values["trace_mode"] == "rejection"
        and values["trace_tries"] > 1
        and not values["trace_temperature"]
    ):
        raise ValueError(
            f"trace_temperature is 0, and trace_tries is {values['trace_tries']}: all attempts would give the same "
            "reply; set trace_tries to 1, or trace_temperature above 0"
        )


def _check_recorded(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if values["trace_teacher"] == "recorded" and values["trace_file"] is None:
        raise ValueError("trace_teacher is recorded, but trace_file names no file with its traces")


def _check_heads(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    options = {**base_model_properties(values["base_model"]), **values}
    if "n_heads" in options and "hidden_size" in options and "head_size" not in options:
        width, heads = options["hidden_size"], options["n_heads"]
        if not heads or width % heads:
            raise ValueError(f"base_hidden_size is {width}, expected a multiple of base_n_heads ({heads})")


def _check_precision(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if values["enable_amp"] and _model_file(properties_folder(), values["base_model"]):
        raise ValueError(f"base_enable_amp is True, but {values['base_model']} has no mixed precision")


def _check_loss(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    name = values["base_model"]
    own = _model_file(properties_folder(), name)
    if values["train_neg_sample_args"] is None or not (own or recbole_models().get(name) == SEQUENTIAL):
        return
    if values.get("loss_type", base_model_properties(name).get("loss_type")) == "CE":
        raise ValueError(
            f"base_train_neg_sample_args is given, but the loss of {name} is CE, over all items; leave it out"
            + ("" if own else ", or set base_loss_type to BPR")
        )


COMBINATIONS: dict[str, Rule] = {
    "sid_random_last": _check_random_levels,
    "rl_overlong_buffer": _check_buffer,
    "trace_temperature": _check_attempts,
    "trace_file": _check_recorded,
    "train_neg_sample_args": _check_loss,
    "hidden_size": _check_heads,
    "enable_amp": _check_precision,
}


def recbole_options() -> set[str]:
    """Return the options of RecBole's Config that do not belong to one model or to its training."""
    folder = recbole_properties()
    options = {"eval_args"}
    for file in (folder / "overall.yaml", folder / "dataset" / "sample.yaml"):
        options |= set(read_yaml(file.read_text(encoding="utf-8")))
    return options - RECBOLE_TRAINING - set(RECBOLE_FIXED)


def recbole_metrics() -> list[str]:
    """Return the names of the ranking metrics in RecBole's source, without an import of RecBole."""
    source = (recbole_properties().parent / "evaluator" / "metrics.py").read_text(encoding="utf-8")
    return re.findall(r"^class (\w+)\((?:TopkMetric|AbstractMetric)\)", source, flags=re.MULTILINE)


def recbole_models() -> dict[str, str]:
    """Return the models in RecBole's source by name, each with its kind, without an import of RecBole.

    The kind is sequential, general, context-aware, knowledge-aware or external.
    """
    return _models_in(recbole_properties().parent / "model")


@cache
def _models_in(folder: Path) -> dict[str, str]:
    kinds = {"context_aware": "context-aware", "knowledge_aware": "knowledge-aware", "exlib": "external"}
    found = {}
    for file in sorted(folder.glob("*_recommender/*.py")):
        kind = file.parent.name.removesuffix("_recommender")
        for name in re.findall(r"^class (\w+)\(", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if name.lower() == file.stem:  # RecBole looks a model up in the file of this name
                found[name] = kinds.get(kind, kind)
    return found


def candidate_models() -> list[str]:
    """Return the names of the models that RecBole trains and that can propose candidates."""
    own = [file.stem for file in (properties_folder() / "model").glob("*.yaml")]
    return sorted({*own, *(name for name, kind in recbole_models().items() if kind in (SEQUENTIAL, GENERAL))})


def base_model_options(model: str) -> set[str]:
    """Return the hyper-parameters of a base model: the keys of its property file."""
    return set(base_model_properties(model))


def model_declarations(model: str) -> dict[str, Declaration]:
    """Return the declarations of a model's options.

    Those of a model of RecBole are derived from its property file: the type is that of the comment or of the default,
    and a number is not negative unless the default is.
    """
    own, theirs = (_model_file(folder, model) for folder in (properties_folder(), recbole_properties()))
    if own:
        return read_declarations(own)
    return dict(_derived_declarations(theirs.read_text(encoding="utf-8"))) if theirs else {}


@cache
def _derived_declarations(text: str) -> Mapping[str, Declaration]:
    comments = {key: (kind, rest) for key, kind, rest in MODEL_COMMENT.findall(text)}
    declared = {}
    for key, default in (read_yaml(text) or {}).items():
        name, comment = comments.get(key, ("", ""))
        kind = TYPES.get(name, type(default))
        if not isinstance(default, kind):
            kind = float if kind is int and isinstance(default, float) else object
        choices = re.search(r"[Rr]ange in \[([^\]]+)\]", comment)
        number = kind in (int, float) and isinstance(default, int | float)
        share = key.endswith(("_prob", "dropout")) and kind is float
        size = key.endswith(("size", "n_heads")) and number and default >= 1
        names = re.findall(r"\w+", choices[1]) if choices else ACTIVATIONS if key == "hidden_act" else ()
        declared[key] = Declaration(
            key=key,
            default=default,
            type=float if name == "float" and number else kind,
            choices=tuple(dict.fromkeys([*names, default])) if names and kind is str else (),
            low=1 if size else 0 if number and default >= 0 else None,
            high=1 if share else None,
            optional=default is None,
        )
    return declared


def _model_file(folder: Path, model: str) -> Path | None:
    """The property file of a model. Names are compared and form no path, because they come from the user."""
    return next((file for file in (folder / "model").glob("*.yaml") if file.stem == model), None)


def base_model_properties(model: str) -> dict[str, Any]:
    """Return the defaults of a base model: those of this package if it has any, else those of RecBole."""
    for folder in (properties_folder(), recbole_properties()):
        if file := _model_file(folder, model):
            return read_yaml(file.read_text(encoding="utf-8")) or {}
    return {}


def recbole_properties() -> Path:
    """Return the folder of RecBole's property files, without an import of RecBole.

    Raises:
        DependencyError: RecBole is not installed.
    """
    import importlib.util

    spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        raise compat.missing_recbole()
    return Path(spec.submodule_search_locations[0]) / "properties"


def recbole_config(settings: Settings, model: type | str, *, base: bool = True, **overrides: Any) -> Config:
    """Build RecBole's Config for one model.

    RecBole reads `sys.argv` and evaluates strings in every Config (configurator.py:122, 165). Both are disabled here,
    because the settings are parsed and checked already.

    Args:
        settings: Settings of the run.
        model: A RecBole model class, or the name of one.
        base: Whether the model is the base model, which receives the options `base_<option>`.
        **overrides: RecBole options that override the settings.
    """
    compat.apply()
    from recbole.config import Config
    from recbole.utils.enum_type import ModelType

    class IsolatedConfig(Config):
        def _load_cmd_line(self) -> dict[str, Any]:
            return {}

        def _convert_config_dict(self, config_dict: dict[str, Any]) -> dict[str, Any]:
            return config_dict

        def _get_final_config_dict(self) -> dict[str, Any]:
            final = super()._get_final_config_dict()
            given = "train_neg_sample_args" in self.external_config_dict
            if final["MODEL_TYPE"] == ModelType.SEQUENTIAL and final.get("loss_type") == "CE" and not given:
                final["train_neg_sample_args"] = None  # RecBole refuses its default together with cross-entropy
            return final

    options = dict(settings.recbole) if base else settings.shared_options
    name = model if isinstance(model, str) else model.__name__
    if _model_file(properties_folder(), name):
        options = {**base_model_properties(name), **options}
    gpu = options.get("gpu_id", "0")
    return IsolatedConfig(model=model, dataset=settings["dataset"], config_dict={**options, "gpu_id": gpu, **overrides})


PAGE = """# Settings

`python -m recbole_gr2.config > docs/settings.md` generates this page from the declarations in `properties/`. Do not
edit it by hand.

Set a value with `--key=value` on the command line, in a YAML file for `--config_files`, or in `config_dict`. A preset
(`properties/preset/`) and a data set file (`properties/dataset/`) override the defaults below. "Optional" settings
accept an empty value, written `~`. "Speed" settings never change a result, so a change of one repeats no stage.
RecBole's own options are listed under recbole.yaml; `base_<option>` sets one, or an option of the base model, for the
base model alone.
[migration.md](migration.md) lists the keys of earlier versions.
"""


def settings_page() -> str:
    """Return the text of docs/settings.md: one table for each property file that declares settings."""
    models = sorted((properties_folder() / "model").glob("*.yaml"))
    parts = [PAGE, *(_table(file) for file in [*_declaring_files(), properties_folder() / "recbole.yaml"])]
    parts += [_table(file, prefix="base_") for file in models]
    return "\n".join(parts)


def _table(file: Path, prefix: str = "") -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    introduction = []
    for line in lines:
        if not line.startswith("#"):
            break
        introduction.append(line.removeprefix("#").strip())
    cells = [("Setting", "Type", "Allowed", "Default", "Optional", "Speed", "Meaning"), ("---",) * 7]
    for entry in read_declarations(file).values():
        default = yaml.safe_dump(entry.default, default_flow_style=True, width=10**6, sort_keys=False).split("\n")[0]
        cells.append(
            (
                f"`{prefix}{entry.key}`",
                entry.type_name,
                _escaped(entry.allowed),
                "" if entry.default is None else f"`{default}`",
                "yes" if entry.optional else "",
                "yes" if entry.speed else "",
                _escaped(entry.text),
            )
        )
    title = file.name if file.parent == properties_folder() else f"{file.parent.name}/{file.name}"
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
    return f"## {title}\n\n" + "\n".join(introduction) + f"\n\n{table}\n"


def _escaped(text: str) -> str:
    """Return `text` with the characters escaped that Markdown would read as markup."""
    return re.sub(r"([<*])", r"\\\1", text)


if __name__ == "__main__":
    print(settings_page(), end="")
