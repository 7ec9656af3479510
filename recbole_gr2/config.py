"""Settings: declarations, sources, checks, and the settings that RecBole receives.

Sources, the strongest first: command line, `config_dict`, `--config_files`, property files (preset, then data set, then
`overall.yaml` and `stage/*.yaml`). There are three kinds of keys:

* Keys of this package. Each is declared once, on one line of `properties/overall.yaml` or `properties/stage/*.yaml`.
* RecBole options (`metrics`, `user_inter_num_interval`, ...). They are passed to RecBole unchanged.
* `base_<option>`: a RecBole option for the base model alone, for example `base_learning_rate`.

Any other key is an error that names the most similar keys. A declaration has the form

    key: default  # (type[ rule][, optional][, speed]) sentence

The type is int, float, str, bool, list or dict, or `list of` / `dict of` one of the first four, which then applies to
each element. The rule limits the values: `str: targeted | rejection`, `int >= 1`, `float > 0`, `int 2..26`,
`float >= 0, < 1`. `optional` permits an empty value (`~`). `speed` marks a setting that never changes a result, and
therefore enters no stage key. `python -m recbole_gr2.config` prints all declarations as `docs/settings.md`.
"""

from __future__ import annotations

import builtins
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recbole_gr2 import compat
from recbole_gr2.errors import ConfigurationError, MissingFileError, nearest

if TYPE_CHECKING:
    from recbole.config import Config

TYPES: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
CUSTOM = "module:attribute"  # a choice that stands for any value with a colon
DECLARATION = re.compile(r"^(?P<key>[A-Za-z_]\w*):(?P<value>.*?)#\s*\((?P<spec>[^()]+)\)\s*(?P<text>\S.*)$")
SPECIFICATION = re.compile(r"^(?:(?P<container>list|dict) of )?(?P<type>[a-z]+)(?P<rule>.*)$")
BOUND = re.compile(r"^(?P<operator>>=|<=|>|<)\s*(?P<number>\S+)$")
RANGE = re.compile(r"^(?P<low>\S+?)\.\.(?P<high>\S+)$")

# RecBole options that cannot change a number. All others enter the key of the candidates stage.
RECBOLE_SPEED = {
    "gpu_id",
    "worker",
    "use_gpu",
    "state",
    "data_path",
    "checkpoint_dir",
    "show_progress",
    "save_dataset",
    "dataset_save_path",
    "save_dataloaders",
    "dataloaders_save_path",
    "log_wandb",
    "wandb_project",
    "eval_batch_size",
}
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
    """Safe YAML that also reads `1e-4` as a float, as RecBole's loader does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.\d*([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)


def read_yaml(text: str) -> Any:
    """Parse YAML without evaluating any expression.

    >>> read_yaml("{rate: 1e-4, split: {LS: valid_and_test}, list: [1, 2]}")
    {'rate': 0.0001, 'split': {'LS': 'valid_and_test'}, 'list': [1, 2]}
    """
    return yaml.load(text, Loader=_Loader)


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
        try:
            if self.element is None:
                return self._convert(value, self.type)
            values = self._convert(value, self.type, limited=False)
            if isinstance(values, dict):
                return {key: self._convert(item, self.element) for key, item in values.items()}
            return [self._convert(item, self.element) for item in values]
        except ValueError:
            expected = self.allowed if self.choices and not self.element else f"{self.type_name} {self.allowed}".strip()
            message = f"{self.key} is {value!r}, expected {expected}{' or nothing (~)' if self.optional else ''}"
            renamed = RENAMED_VALUES.get((self.key, value)) if isinstance(value, str) else None
            similar = [renamed] if renamed else nearest(str(value), self.choices)
            raise ValueError(message + (f"; did you mean {', '.join(similar)}?" if similar else "")) from None

    def _convert(self, value: Any, kind: builtins.type, *, limited: bool = True) -> Any:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
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
        if isinstance(value, float) and math.isnan(value):
            return False
        above = operator.gt if self.low_exclusive else operator.ge
        below = operator.lt if self.high_exclusive else operator.le
        return (self.low is None or above(value, self.low)) and (self.high is None or below(value, self.high))


def declarations() -> dict[str, Declaration]:
    """Return the declarations of all keys of this package, read from the property files.

    Raises:
        ConfigurationError: A line of a property file is not a valid declaration.
    """
    return {key: entry for file in _declaring_files() for key, entry in read_declarations(file).items()}


def _declaring_files() -> list[Path]:
    folder = properties_folder()
    return [folder / "overall.yaml", *sorted((folder / "stage").glob("*.yaml"))]


def read_declarations(file: Path) -> dict[str, Declaration]:
    """Return the declarations in a property file.

    Raises:
        ConfigurationError: A key has no documentation, an invalid type or an invalid rule.
    """
    text, declared = file.read_text(encoding="utf-8"), {}
    values = read_yaml(text) or {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = DECLARATION.match(line)
        if match and match["key"] in values:
            declared[match["key"]] = Declaration(
                key=match["key"],
                default=values[match["key"]],
                text=match["text"],
                file=file.name if file.name == "overall.yaml" else f"{file.parent.name}/{file.name}",
                line=number,
                **_specification(match["spec"], where=f"{file.name}:{number}"),
            )
    undocumented = set(values) - set(declared)
    if undocumented:
        raise ConfigurationError(
            f"keys without a documented line: {sorted(undocumented)}",
            where=file.name,
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
        speed = {key for key, entry in self.declared.items() if entry.speed}
        excluded = {"seed", "preset", "dataset", *RECBOLE_SPEED, *speed}
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
        return {k: v for k, v in sorted(options.items()) if k not in RECBOLE_SPEED}

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
) -> Settings:
    """Merge all sources, check every key and value, and report all problems together.

    torch is imported only if no source names a preset, and only after the check of all given settings.

    Args:
        command_line: Settings of the command line, the strongest source.
        config_dict: Settings of the Python API.
        config_files: YAML files; a later file overrides an earlier one.
        layers: Settings by source, weaker than the three above and stronger than the property files; a later source
            overrides an earlier one.

    Raises:
        ConfigurationError: A key does not exist, or a value has a wrong type or is not permitted.
        MissingFileError: A config file does not exist.
    """
    declared = declarations()
    given: list[tuple[str, Mapping[str, Any]]] = [
        *(layers or {}).items(),
        *((str(file), _read_file(Path(file))) for file in config_files),
        ("config_dict", dict(config_dict or {})),
        ("command line", dict(command_line or {})),
    ]

    def given_value(key: str) -> Any:
        return next((values[key] for _, values in reversed(given) if key in values), declared[key].default)

    folder = properties_folder()
    weaker: list[tuple[str, Mapping[str, Any]]] = [
        ("properties", {key: entry.default for key, entry in declared.items()})
    ]
    dataset_file = folder / "dataset" / f"{given_value('dataset')}.yaml"
    if dataset_file.is_file():
        weaker.append((f"dataset/{dataset_file.name}", _read_file(dataset_file)))
    preset = given_value("preset")
    if preset is None:
        _check_all(_merge([*weaker, *given]), declared)
        preset = default_preset()
    presets = {file.stem: file for file in (folder / "preset").glob("*.yaml")}
    if str(preset) not in presets:
        raise ConfigurationError(
            f"there is no preset named {preset!r}",
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


def _read_file(file: Path) -> dict[str, Any]:
    if not file.is_file():
        folder = file.parent
        names = [entry.name for entry in folder.glob("*.y*ml")] if folder.is_dir() else []
        similar = [str(folder / name) for name in nearest(file.name, names)]
        raise MissingFileError(
            f"there is no config file {file}",
            where="--config_files",
            why="its settings would be missing in the run",
            do=f"did you mean {', '.join(similar)}?" if similar else "check the path",
        )
    values = read_yaml(file.read_text(encoding="utf-8"))
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


def _check_all(merged: Mapping[str, tuple[Any, str]], declared: dict[str, Declaration]) -> Settings:
    """Check every key and value, and separate the keys of this package from the options of RecBole."""
    options = recbole_options()
    base_model = str(merged["base_model"][0])
    base_options = (RECBOLE_TRAINING | base_model_options(base_model) | options) - set(RECBOLE_FIXED)
    base_declared = base_model_declarations(base_model)
    values: dict[str, Any] = {}
    recbole: dict[str, Any] = {}
    problems = []
    for key, (value, source) in merged.items():
        name = key.removeprefix("base_")
        try:
            if key in declared:
                values[key] = declared[key].check(value)
            elif name in REMOVED and (key in REMOVED or name in RECBOLE_FIXED):
                fixed, reason = REMOVED[name]
                raise ValueError(f"{key} was removed; its value is now always {fixed}. {reason}")
            elif key in RENAMED:
                raise ValueError(f"{key} is now named {RENAMED[key]}")
            elif key != name and name in base_options:
                entry = base_declared.get(name)
                recbole[name] = replace(entry, key=key).check(value) if entry else value
            elif key in options:
                recbole.setdefault(key, value)  # base_<option> has precedence for the base model
            elif key in RECBOLE_TRAINING:
                stages = [other for other in declared if other.endswith(f"_{key}")]
                alternatives = f", or the key of a stage: {', '.join(stages)}" if stages else ""
                raise ValueError(f"{key} is ambiguous: use base_{key} for the base model{alternatives}")
            else:
                everything = [*declared, *options, *(f"base_{option}" for option in base_options)]
                similar = nearest(key, everything, cutoff=0.6)
                raise ValueError(f"unknown key {key!r}" + (f"; nearest: {', '.join(similar)}" if similar else ""))
        except ValueError as error:
            problems.append(f"{source}: {error}")
    for key, rule in RULES.items():
        try:
            rule(values, declared)
        except ValueError as error:
            problems.append(f"{merged[key][1]}: {error}")
        except KeyError:  # the check needs a value that is among the problems already
            pass
    if problems:
        raise ConfigurationError(
            "settings that cannot be used:\n    " + "\n    ".join(problems),
            why="the run would fail later, or would not be the requested one",
            do="correct them; docs/settings.md lists every key with its permitted values",
        )
    for key in declared:  # RecBole options that this package declares are passed to RecBole too
        if key in options:
            recbole.setdefault(key, values[key])
    origin = {key: source for key, (_, source) in merged.items()}
    return Settings(values, {**recbole, **RECBOLE_FIXED}, declared, origin)


def _check_mix(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    mix, tasks = values["mid_mix"], declared["mid_mix"].default
    if set(mix) - set(tasks):
        raise ValueError(f"mid_mix has unknown tasks {sorted(set(mix) - set(tasks))}, expected {', '.join(tasks)}")
    if not sum(mix.values()) > 0:
        raise ValueError(f"mid_mix is {mix!r}, expected at least one share > 0")


def _check_metrics(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    names = recbole_metrics()
    for name in values["metrics"]:
        if name.lower() not in map(str.lower, names):
            similar = ", ".join(nearest(name, names) or names)
            raise ValueError(f"metrics has an unknown metric {name!r}; nearest: {similar}")
    if not values["metrics"] or not values["topk"] or any(not isinstance(k, int) or k < 1 for k in values["topk"]):
        raise ValueError(
            f"metrics is {values['metrics']} and topk is {values['topk']}, expected at least one metric "
            "and cut-offs >= 1"
        )
    name, at, cutoff = values["valid_metric"].partition("@")
    if name.lower() not in map(str.lower, names) or (at and (not cutoff.isdecimal() or int(cutoff) < 1)):
        raise ValueError(f"valid_metric is {values['valid_metric']!r}, expected a metric and a cut-off such as NDCG@10")


def _check_price(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    unknown = set(values["trace_price"]) - {"prompt", "completion"}
    if unknown:
        raise ValueError(f"trace_price has unknown keys {sorted(unknown)}, expected prompt, completion")


def _check_template(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    name = values["prompt_template"]
    names = sorted(file.stem for file in (properties_folder() / "prompt").glob("*.yaml"))
    exists = Path(name).is_file() if name.endswith((".yaml", ".yml")) else name in names
    if not exists:
        similar = ", ".join(nearest(name, names) or names)
        raise ValueError(f"there is no prompt template {name!r}; nearest: {similar}, or the path of a YAML file")


def _check_random_levels(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    if values["sid_random_last"] >= values["sid_levels"]:
        raise ValueError(
            f"sid_random_last is {values['sid_random_last']}, expected less than sid_levels ({values['sid_levels']})"
        )


def _check_buffer(values: Mapping[str, Any], declared: Mapping[str, Declaration]) -> None:
    buffer, longest = values["rl_overlong_buffer"], values["prompt_max_reasoning"]
    if 0 < longest < buffer:
        raise ValueError(f"rl_overlong_buffer is {buffer}, expected at most prompt_max_reasoning ({longest})")


# Checks that a declaration cannot express. A check raises ValueError; the key names the source in the message.
RULES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Declaration]], None]] = {
    "valid_metric": _check_metrics,
    "mid_mix": _check_mix,
    "prompt_template": _check_template,
    "trace_price": _check_price,
    "sid_random_last": _check_random_levels,
    "rl_overlong_buffer": _check_buffer,
}


def recbole_options() -> set[str]:
    """Return the options of RecBole's Config that do not belong to one model or to its training."""
    folder = recbole_properties()
    options = {"eval_args"}
    for file in (folder / "overall.yaml", folder / "dataset" / "sample.yaml"):
        options |= set(read_yaml(file.read_text(encoding="utf-8")))
    return options - RECBOLE_TRAINING - set(RECBOLE_FIXED)


def recbole_metrics() -> list[str]:
    """Return the names of the metrics in RecBole's source, without an import of RecBole."""
    source = (recbole_properties().parent / "evaluator" / "metrics.py").read_text(encoding="utf-8")
    return re.findall(r"^class (\w+)\((?:TopkMetric|LossMetric|AbstractMetric)\)", source, flags=re.MULTILINE)


def base_model_options(model: str) -> set[str]:
    """Return the hyper-parameters of a base model: the keys of its property file."""
    return set(base_model_properties(model))


def base_model_declarations(model: str) -> dict[str, Declaration]:
    """Return the declarations of a base model that this package brings; empty for a model of RecBole."""
    file = properties_folder() / "model" / f"{model}.yaml"
    return read_declarations(file) if file.is_file() else {}


def base_model_properties(model: str) -> dict[str, Any]:
    """Return the defaults of a base model: those of this package if it has any, else those of RecBole."""
    for folder in (properties_folder(), recbole_properties()):
        file = folder / "model" / f"{model}.yaml"
        if file.is_file():
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
    if (properties_folder() / "model" / f"{name}.yaml").is_file():
        options = {**base_model_properties(name), **options}
    gpu = options.get("gpu_id", "0")
    return IsolatedConfig(model=model, dataset=settings["dataset"], config_dict={**options, "gpu_id": gpu, **overrides})


PAGE = """# Settings

`python -m recbole_gr2.config > docs/settings.md` generates this page from the declarations in `properties/`. Do not
edit it by hand.

Set a value with `--key=value` on the command line, in a YAML file for `--config_files`, or in `config_dict`. A preset
(`properties/preset/`) and a data set file (`properties/dataset/`) override the defaults below. "Optional" settings
accept an empty value, written `~`. "Speed" settings never change a result, so a change of one repeats no stage.
Any other RecBole option is passed to RecBole; `base_<option>` sets it for the base model alone.
[migration.md](migration.md) lists the keys of earlier versions.
"""


def settings_page() -> str:
    """Return the text of docs/settings.md: one table for each property file that declares settings."""
    models = sorted((properties_folder() / "model").glob("*.yaml"))
    parts = [PAGE, *(_table(file) for file in _declaring_files())]
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
    title = file.name if file.name == "overall.yaml" else f"{file.parent.name}/{file.name}"
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
    return f"## {title}\n\n" + "\n".join(introduction) + f"\n\n{table}\n"


def _escaped(text: str) -> str:
    """Return `text` with the characters escaped that Markdown would read as markup."""
    return re.sub(r"([<*])", r"\\\1", text)


if __name__ == "__main__":
    print(settings_page(), end="")
