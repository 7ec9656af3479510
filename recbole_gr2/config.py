"""Settings: property files, their documentation, their types, and RecBole's Config without its traps.

Precedence, as every RecBole user knows it: command line > config_dict > `--config_files` > property files
(preset > dataset > stage files and overall.yaml). Three kinds of key, told apart by name:

* ours: declared once in `properties/overall.yaml` or `properties/stage/*.yaml`, one line a key, as
  `key: default  # (type[, optional][, speed]) sentence`. That line is the declaration: type checks, the documentation
  test and stage keys read it. `speed` marks a setting that never changes a result and so enters no stage key.
* RecBole's words (`seed`, `metrics`, `user_inter_num_interval`, ...): handed to RecBole as they are.
* `base_<word>`: `<word>` for the base model alone, e.g. `--base_learning_rate=0.003`.

Anything else is an error that names the nearest known keys.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recbole_gr2 import compat
from recbole_gr2.errors import ConfigurationError, MissingFileError

TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
DECLARATION = re.compile(r"^(?P<key>[A-Za-z_]\w*):(?P<value>.*?)#\s*\((?P<type>[a-z, ]+)\)\s*(?P<text>\S.*)$")

# RecBole words without an effect on any number; the others enter the key of the candidates stage.
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


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads `1e-4` as a float, as RecBole's loader does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.\d*([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)


def read_yaml(text: str) -> Any:
    """Parse YAML safely; nothing is ever evaluated.

    >>> read_yaml("{rate: 1e-4, split: {LS: valid_and_test}, list: [1, 2]}")
    {'rate': 0.0001, 'split': {'LS': 'valid_and_test'}, 'list': [1, 2]}
    """
    return yaml.load(text, Loader=_Loader)


def properties_folder() -> Path:
    """The property files: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "properties", package.parent / "properties"):
        if folder.is_dir():
            return folder
    raise MissingFileError("the property files are missing", where=str(package), do="reinstall recbole-gr2")


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """One documented key of ours."""

    key: str
    default: Any
    type: type
    optional: bool
    speed: bool
    text: str
    file: str
    line: int

    def check(self, value: Any) -> Any:
        """`value` as this key's type.

        Raises:
            ValueError: it is not.
        """
        if value is None and self.optional:
            return None
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if self.type is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, self.type) or (self.type is not bool and isinstance(value, bool)):
            optional = " or nothing (~)" if self.optional else ""
            raise ValueError(f"{self.key} is {value!r}, expected {self.type.__name__}{optional}")
        return value


def declarations() -> dict[str, Declaration]:
    """Every key of ours, read from the property files."""
    folder, found = properties_folder(), {}
    for file in (folder / "overall.yaml", *sorted((folder / "stage").glob("*.yaml"))):
        values = read_yaml(file.read_text(encoding="utf-8")) or {}
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            match = DECLARATION.match(line)
            if not match or match["key"] not in values:
                continue
            kind, *marks = [word.strip() for word in match["type"].split(",")]
            if kind not in TYPES or set(marks) - {"optional", "speed"}:
                raise ConfigurationError(f"unreadable type ({match['type']})", where=f"{file.name}:{number}")
            found[match["key"]] = Declaration(
                key=match["key"],
                default=values[match["key"]],
                type=TYPES[kind],
                optional="optional" in marks,
                speed="speed" in marks,
                text=match["text"],
                file=file.name,
                line=number,
            )
        undocumented = set(values) - set(found)
        if undocumented:
            raise ConfigurationError(f"keys without a documented line: {sorted(undocumented)}", where=file.name)
    return found


class Settings(Mapping):
    """All settings of a run, frozen. `settings[key]` is a key of ours; RecBole's share is in `recbole`.

    Attributes:
        recbole: words for RecBole's Config, those of the base model (`base_*`, prefix removed) included.
        origin: key -> where its value came from.
    """

    def __init__(self, values: dict, recbole: dict, known: dict[str, Declaration], origin: dict[str, str]) -> None:
        self._values, self.recbole, self._known, self.origin = values, recbole, known, origin

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def results(self, prefixes: Iterable[str]) -> dict:
        """Settings of ours with one of these prefixes that can change a result."""
        prefixes = tuple(prefixes)
        return {k: v for k, v in sorted(self._values.items()) if k.startswith(prefixes) and not self._known[k].speed}

    def chosen(self) -> dict[str, dict]:
        """What can change a result and is not as overall.yaml and stage/ have it: key -> its value and where from.

        The seed, which every report names apart, is left out.
        """
        quiet = {"seed", "preset", "dataset", *RECBOLE_SPEED, *(k for k, entry in self._known.items() if entry.speed)}
        words = {**self.recbole, **{f"base_{k}": self.recbole[k] for k in self.base_words}, **self._values}
        return {
            key: {"value": words[key], "from": origin}
            for key, origin in sorted(self.origin.items())
            if origin != "properties"
            and key not in quiet
            and not (key in self._known and words[key] == self._known[key].default)
        }

    def recbole_results(self, base: bool = True) -> dict:
        """RecBole's words that can change a result, those of the base model alone included or not."""
        words = self.recbole if base else self.shared_words
        return {k: v for k, v in sorted(words.items()) if k not in RECBOLE_SPEED}

    def as_yaml(self) -> str:
        """A config file that reproduces these settings with `--config_files`."""
        plain = {k: v for k, v in self.recbole.items() if k not in self.base_words}
        return yaml.safe_dump(
            {**self._values, **plain, **{f"base_{k}": self.recbole[k] for k in self.base_words}}, sort_keys=True
        )

    @property
    def shared_words(self) -> dict:
        """RecBole's words without those of the base model alone."""
        base = set(self.base_words)
        return {k: self._values.get(k, v) for k, v in self.recbole.items() if k not in base or k in self._values}

    @property
    def base_words(self) -> list[str]:
        """RecBole words that were given for the base model alone."""
        return sorted(k for k in self.recbole if f"base_{k}" in self.origin)


def load_settings(
    *,
    command_line: Mapping[str, Any] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    config_files: Iterable[str | Path] = (),
    layers: Mapping[str, Mapping[str, Any]] | None = None,
) -> Settings:
    """Merge all sources, check every key and value, and report all problems together.

    Args:
        command_line, config_dict, config_files: what the user gives, the strongest first.
        layers: source -> settings, above the property files and beneath what the user gives; the last is the strongest.

    Raises:
        ConfigurationError: unknown keys or values of the wrong type.
        MissingFileError: a config file, preset or dataset file that was asked for does not exist.
    """
    known = declarations()
    outer: list[tuple[str, Mapping[str, Any]]] = [
        *(layers or {}).items(),
        *((str(file), _read_file(Path(file))) for file in config_files),
        ("config_dict", dict(config_dict or {})),
        ("command line", dict(command_line or {})),
    ]

    def chosen(key: str) -> Any:
        return next((values[key] for _, values in reversed(outer) if key in values), known[key].default)

    dataset, preset = chosen("dataset"), chosen("preset") or default_preset()
    folder = properties_folder()
    layers = [("properties", {key: entry.default for key, entry in known.items()})]
    dataset_file = folder / "dataset" / f"{dataset}.yaml"
    if dataset_file.is_file():
        layers.append((f"dataset/{dataset}.yaml", _read_file(dataset_file)))
    presets = {file.stem: file for file in (folder / "preset").glob("*.yaml")}
    if preset not in presets:
        raise ConfigurationError(
            f"there is no preset named {preset!r}", where="preset", do=f"choose one of {sorted(presets)}"
        )
    layers.append((f"preset/{preset}.yaml", _read_file(presets[preset])))
    layers += outer

    merged, origin = {}, {}
    for source, values in layers:
        for key, value in values.items():
            merged[key], origin[key] = value, source
    merged["preset"] = preset
    return _split(merged, origin, known)


def default_preset() -> str:
    """`gpu` where torch sees one, else `laptop`."""
    import torch

    return "gpu" if torch.cuda.is_available() else "laptop"


def _read_file(file: Path) -> dict:
    if not file.is_file():
        raise MissingFileError(f"there is no config file {file}", do="check --config_files")
    values = read_yaml(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict | None):
        raise ConfigurationError("a config file holds key: value lines", where=str(file))
    return values or {}


def _split(merged: dict, origin: dict[str, str], known: dict[str, Declaration]) -> Settings:
    """Check every key and deal it to us or to RecBole."""
    words = recbole_words()
    base_words = RECBOLE_TRAINING | base_model_words(str(merged["base_model"]))
    values, recbole, problems = {}, {}, []
    for key, value in merged.items():
        if key in known:
            try:
                values[key] = known[key].check(value)
            except ValueError as error:
                problems.append(f"{origin[key]}: {error}")
        elif key.startswith("base_") and key[5:] in base_words | words:
            recbole[key[5:]] = value
        elif key in words:
            recbole.setdefault(key, value)  # base_<word> is the more particular of the two
        elif key in RECBOLE_TRAINING:
            problems.append(
                f"{origin[key]}: {key} is ambiguous here: use base_{key} for the base model, "
                f"or a stage's own key, e.g. sft_{key}"
            )
        else:
            everything = [*known, *words, *(f"base_{word}" for word in base_words)]
            near = difflib.get_close_matches(key, everything, n=3)
            problems.append(f"{origin[key]}: unknown key {key!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
    if problems:
        raise ConfigurationError(
            "settings that cannot be used:\n    " + "\n    ".join(problems),
            why="RecBole would ignore a misspelt key without a word, and the run would not be the one you asked for",
            do="correct them; properties/overall.yaml and properties/stage/*.yaml list every key",
        )
    for key in known:  # RecBole's words that we give a default are documented with ours and read by both
        if key in words:
            recbole.setdefault(key, values[key])
    return Settings(values, recbole, known, origin)


def recbole_words() -> set[str]:
    """Keys that RecBole's own Config knows and that do not belong to one model."""
    folder = recbole_properties()
    words = {"eval_args"}
    for file in (folder / "overall.yaml", folder / "dataset" / "sample.yaml"):
        words |= set(read_yaml(file.read_text(encoding="utf-8")))
    return words - RECBOLE_TRAINING


def base_model_words(model: str) -> set[str]:
    """Hyper-parameters of a base model: the keys of its property file, ours or RecBole's."""
    return set(base_model_properties(model))


def base_model_properties(model: str) -> dict:
    """Defaults of a base model that the plugin brings, else RecBole's own."""
    for folder in (properties_folder(), recbole_properties()):
        file = folder / "model" / f"{model}.yaml"
        if file.is_file():
            return read_yaml(file.read_text(encoding="utf-8")) or {}
    return {}


def recbole_properties() -> Path:
    """RecBole's property files, found without importing RecBole."""
    import importlib.util

    spec = importlib.util.find_spec("recbole")
    if spec is None:
        compat.apply()  # raises the error that explains how to install it
    return Path(spec.submodule_search_locations[0]) / "properties"


def recbole_config(settings: Settings, model: type | str, *, base: bool = True, **overrides: Any):
    """RecBole's Config for one model, isolated from argv and from `eval`.

    RecBole reads `sys.argv` and evaluates strings in every Config it builds (configurator.py:122, 165); here both are
    off, because values have been parsed and checked already.

    Args:
        settings: the run's settings.
        model: a RecBole model class, or the name of one.
        base: whether it is the base model, so that `base_<word>` is meant for it.
        **overrides: RecBole words on top of the settings.
    """
    compat.apply()
    from recbole.config import Config
    from recbole.utils.enum_type import ModelType

    class IsolatedConfig(Config):
        def _load_cmd_line(self):
            return {}

        def _convert_config_dict(self, config_dict):
            return config_dict

        def _get_final_config_dict(self):
            final = super()._get_final_config_dict()
            asked = "train_neg_sample_args" in self.external_config_dict
            if final["MODEL_TYPE"] == ModelType.SEQUENTIAL and final.get("loss_type") == "CE" and not asked:
                final["train_neg_sample_args"] = None  # RecBole refuses its own default beside CE
            return final

    words = dict(settings.recbole) if base else settings.shared_words
    name = model if isinstance(model, str) else model.__name__
    ours = properties_folder() / "model" / f"{name}.yaml"
    if ours.is_file():
        words = {**base_model_properties(name), **words}
    gpu = words.get("gpu_id", "0")
    return IsolatedConfig(model=model, dataset=settings["dataset"], config_dict={**words, "gpu_id": gpu, **overrides})
