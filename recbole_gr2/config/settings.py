"""The settings of a run: sources, checks, and the settings that RecBole receives."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recbole_gr2 import compat
from recbole_gr2.config.declaration import (
    Declaration,
    check_option,
    declarations,
    properties_folder,
    recbole_declarations,
    speed_settings,
)
from recbole_gr2.config.recbole_options import (
    RECBOLE_FIXED,
    RECBOLE_TRAINING,
    base_model_properties,
    model_declarations,
    model_file,
    recbole_options,
)
from recbole_gr2.config.renamed import REMOVED, RENAMED
from recbole_gr2.config.rules import COMBINATIONS, RULES
from recbole_gr2.config.values import read_yaml_file
from recbole_gr2.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from recbole.config import Config


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
        return yaml.safe_dump(self.all_values(), sort_keys=True)

    def all_values(self) -> dict[str, Any]:
        """Return every setting and option of RecBole that was given or has a default, by the key that sets it."""
        base = {f"base_{k}": self.recbole[k] for k in self.base_options}
        shared = {k: v for k, v in self.recbole.items() if k not in self.base_options and k not in RECBOLE_FIXED}
        return {**self._values, **shared, **base}

    def options_of(self, model: str, *, base: bool) -> dict[str, Any]:
        """Return the RecBole options of one model that are given, without its defaults.

        Args:
            model: Name of the model.
            base: Whether it is a base model, whose options are `base_<option>` and `base_options`; else it is one of
                `models`, whose options are `models_options`.
        """
        if base:
            return {**self.recbole, **self["base_options"].get(model, {})}
        return {**self.shared_options, **self["models_options"]}

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
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    machine: bool = True,
) -> Settings:
    """Merge all sources, check every key and value, and report all problems together.

    The properties of a data set are those of the file `<data_path>/<dataset>/<dataset>.yaml`, or, if it does not exist,
    of `properties/dataset/<dataset>.yaml`.

    torch is imported only if no source names a preset, and only after the check of all given settings. Combinations of
    settings are checked last, because they depend on the preset.

    Args:
        command_line: Settings of the command line, the strongest source.
        config_dict: Settings of the Python API.
        config_files: YAML files; a later file overrides an earlier one.
        layers: Settings by source, weaker than the three above and stronger than the property files; a later source
            overrides an earlier one.
        overrides: Settings by source, stronger than all others.
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
        *(overrides or {}).items(),
    ]

    def given_value(key: str) -> Any:
        return next((values[key] for _, values in reversed(given) if key in values), declared[key].default)

    folder = properties_folder()
    weaker: list[tuple[str, Mapping[str, Any]]] = [
        ("properties", {key: entry.default for key, entry in declared.items()})
    ]
    dataset = str(given_value("dataset"))
    own_file = Path(str(given_value("data_path"))) / dataset / f"{dataset}.yaml"
    datasets = {file.stem: file for file in (folder / "dataset").glob("*.yaml")}
    if os.path.isfile(own_file):  # False for a name that is too long; Path.is_file would raise an error.
        weaker.append((str(own_file), _read_file(own_file)))
    elif dataset in datasets:
        weaker.append((f"dataset/{dataset}.yaml", _read_file(datasets[dataset])))
    preset = given_value("preset")
    if preset is None:
        without_preset = _check_all(_merge([*weaker, *given]), declared, combinations=False)
        if not machine:
            return without_preset
        preset = default_preset()
    presets = {file.stem: file for file in (folder / "preset").glob("*.yaml")}
    if str(preset) not in presets:
        near = nearest(str(preset), presets)
        raise ConfigurationError(
            f"there is no preset named {preset!r:.200}",
            where="preset",
            why="a preset defines the sizes of the models and of the training",
            do=(f"did you mean {' or '.join(near)}? " if near else "") + f"Choose from {', '.join(sorted(presets))}",
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
    shared = {**recbole_declarations(), **declared}
    given = merged["base_model"][0]
    own = [model_declarations(str(name)) for name in (given if isinstance(given, list) else [given])]
    base_options = (RECBOLE_TRAINING | options) & set(shared) | {option for entries in own for option in entries}
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
                for entry in [entries[name] for entries in own if name in entries] or [shared[name]]:
                    recbole[name] = check_option(replace(entry, key=key), value)
            elif key in options:
                checked = check_option(next((each[key] for each in own if key in each), shared[key]), value)
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


def recbole_config(settings: Settings, model: type | str, *, base: bool = True, **overrides: Any) -> Config:
    """Build RecBole's Config for one model.

    RecBole reads `sys.argv` and evaluates strings in every Config (configurator.py:122, 165). Both are disabled here,
    because the settings are parsed and checked already.

    Args:
        settings: Settings of the run.
        model: A RecBole model class, or the name of one.
        base: Whether it is a base model, see `Settings.options_of`.
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

    name = model if isinstance(model, str) else model.__name__
    options = settings.options_of(name, base=base)
    if model_file(properties_folder(), name):
        options = {**base_model_properties(name), **options}
    gpu = options.get("gpu_id", "0")
    # RecBole would return the parts of a ready-made split as they are.
    options["ready_made"] = options.pop("benchmark_filename", None)
    # RecBole calls its method of this split, see `bridge.splits`.
    if "LS" not in options["eval_args"]["split"] or options["ready_made"]:
        options["eval_args"] = {**options["eval_args"], "split": {"RS": [8, 1, 1]}, "group_by": "none"}
    return IsolatedConfig(model=model, dataset=settings["dataset"], config_dict={**options, "gpu_id": gpu, **overrides})
