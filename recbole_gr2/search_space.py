"""The file of `recbole-gr2 tune`: what is optimised, and the settings that the search changes.

The file has these keys:

- `method`: the method whose metric is optimised.
- `metric`: a metric of the run such as `ndcg@10`.
- `scope`: `all_users` (default) or `hit_users`.
- `trials`: number of trials. A grid needs none.
- `sampler`: `tpe` (default), `random` or `grid`.
- `settings`: settings of all trials. Those of the user win over them.
- `space`: setting -> `{int: [low, high]}`, `{float: [low, high]}` or `{choice: [value, ...]}`. Numbers may have
  `log: true` or `step`. `cand_weights.TextEASE` names a part of a setting whose value is a mapping.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from recbole_gr2.config import Settings, declarations, load_settings, read_yaml_file
from recbole_gr2.config.recbole_options import recbole_metrics, smaller_is_better
from recbole_gr2.errors import ConfigurationError, nearest

KEYS = ("method", "metric", "scope", "trials", "sampler", "settings", "space")
KINDS = ("int", "float", "choice")
SCOPES = ("all_users", "hit_users")
SAMPLERS = ("tpe", "random", "grid")
ORDERS = ("base", "oracle", "prior")  # methods of every run; without features there is no prior
FIXED = ("dataset", "eval_split")  # settings that a study does not change


Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A setting, or a part of a setting, that the search changes.

    Attributes:
        name: name of the setting, and the keys of a part after full stops.
        distribution: what it can be. Optuna stores a value of a choice as JSON.
    """

    name: str
    distribution: BaseDistribution

    @property
    def key(self) -> str:
        """Name of the setting."""
        return self.name.partition(".")[0]

    def value(self, stored: Any) -> Any:
        """Return the value of the setting for a value of the distribution."""
        return json.loads(stored) if isinstance(self.distribution, CategoricalDistribution) else stored

    def extremes(self) -> list[Any]:
        """Return the values of the distribution that have to be valid, so that all others are: its ends or choices."""
        given: Any = self.distribution
        return list(given.choices) if isinstance(given, CategoricalDistribution) else [given.low, given.high]

    def points(self) -> list[Any]:
        """Return all values of the distribution. A float needs a step."""
        given: Any = self.distribution
        if isinstance(given, CategoricalDistribution):
            return list(given.choices)
        return [type(given.low)(value) for value in _steps(given.low, given.high, given.step)]


@dataclass(frozen=True, kw_only=True)
class Space:
    """The content of a space file, see the module. `trials` is None for a grid without a number of trials."""

    file: Path
    method: str
    metric: str
    scope: str
    trials: int | None
    sampler: str
    settings: dict[str, Any]
    parameters: tuple[Parameter, ...]

    @property
    def direction(self) -> Direction:
        """Whether a larger or a smaller value is better: maximize or minimize."""
        smaller = [name.lower() for name in smaller_is_better()]
        return "minimize" if self.metric.partition("@")[0] in smaller else "maximize"

    @property
    def users(self) -> str:
        """The users of the scope, in words."""
        return self.scope.replace("_", " ")

    def grid(self) -> list[dict[str, Any]]:
        """Return all combinations of the values of the parameters; the last parameter changes first."""
        names = [parameter.name for parameter in self.parameters]
        values = itertools.product(*(parameter.points() for parameter in self.parameters))
        return [dict(zip(names, each, strict=True)) for each in values]

    def count(self) -> int:
        """Return the number of trials."""
        if self.sampler != "grid":
            assert self.trials is not None
            return self.trials
        points = len(self.grid())
        return points if self.trials is None else min(points, self.trials)

    def settings_of(self, params: Mapping[str, Any], baseline: Settings) -> dict[str, Any]:
        """Return the settings that a trial changes.

        Args:
            params: value of the distribution of some parameters, by name.
            baseline: settings without the space. A part of a setting is changed in the value that they have.

        Raises:
            ConfigurationError: a name with full stops is not a part of a mapping.
        """
        changed: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.name not in params:
                continue
            value, (key, *path) = parameter.value(params[parameter.name]), parameter.name.split(".")
            if path:
                whole = part = changed.setdefault(key, copy.deepcopy(_value(baseline, key) or {}))
                for name in path[:-1]:
                    part = part.setdefault(name, {}) if isinstance(part, dict) else part
                if not isinstance(part, dict):
                    raise invalid(
                        f"{parameter.name!r} is no part of a mapping: {key} is {whole!r:.200}",
                        self.file,
                        f"space, {parameter.name}",
                        "only a mapping such as cand_weights has parts with names",
                        "name a whole setting, or a part of a mapping",
                    )
                part[path[-1]] = value
            else:
                changed[key] = value
        return changed


def _value(settings: Settings, key: str) -> Any:
    """The value of a setting or of an option of RecBole; None if it is not given or unknown."""
    return settings[key] if key in settings else settings.recbole.get(key.removeprefix("base_"))


def invalid(what: str, file: Path, place: str, why: str, do: str) -> ConfigurationError:
    """Return the error about a place in a space file."""
    return ConfigurationError(what, where=f"{file}: {place}", why=why, do=do)


def read_space(file: Path) -> Space:
    """Read a space file. Names of settings, methods and metrics are checked by `check_space`.

    Raises:
        ConfigurationError: the file has another form.
        MissingFileError: the file does not exist.
    """
    values = read_yaml_file(file, where="recbole-gr2 tune", what="space file")
    form = "docs/tuning.md describes the file"
    if not isinstance(values, dict) or not values:
        raise invalid("the file has no keys", file, "tune", f"the keys are {', '.join(KEYS)}", form)
    for key in values:
        if key not in KEYS:
            near = nearest(str(key), KEYS)
            do = f"did you mean {' or '.join(near)}? " if near else ""
            raise invalid(f"unknown key {key!r:.200}", file, str(key), "it would be ignored", do + form)
    values = {"scope": "all_users", "sampler": "tpe", "settings": {}, "trials": None, **values}
    for key, choices in (("scope", SCOPES), ("sampler", SAMPLERS)):
        if values[key] not in choices:
            near = nearest(str(values[key]), choices)
            why = f"the choices are {', '.join(choices)}"
            do = f"did you mean {near[0]}?" if near else form
            raise invalid(f"{key} is {values[key]!r:.200}", file, key, why, do)
    for key, kind in (("method", str), ("metric", str), ("settings", dict), ("space", dict)):
        if not isinstance(values.get(key), kind) or (not values[key] and key != "settings"):
            given = f"{key} is {values[key]!r:.200}" if key in values else f"{key} is missing"
            why = "it has to be a text" if kind is str else "it has to be a mapping of settings"
            raise invalid(given, file, key, why, form)
    trials, grid = values["trials"], values["sampler"] == "grid"
    if (type(trials) is not int or trials < 1) and not (grid and trials is None):
        why = "the search needs a number of trials of at least 1"
        raise invalid(f"trials is {trials!r:.200}", file, "trials", why, "write for example trials: 20")
    parameters = tuple(_parameter(str(name), spec, file, grid=grid) for name, spec in values["space"].items())
    names = [parameter.name for parameter in parameters]
    for parameter in parameters:
        whole = [name for name in names if parameter.name.startswith(f"{name}.")]
        if whole or (parameter.key in values["settings"] and parameter.key == parameter.name):
            other = f"{whole[0]!r} of the space" if whole else "settings"
            why = f"{other} sets it as well, and a trial has one value for each setting"
            raise invalid(
                f"{parameter.name!r} has two values", file, f"space, {parameter.name}", why, "keep one of them"
            )
    return Space(
        file=file,
        method=values["method"],
        metric=values["metric"].lower(),
        scope=values["scope"],
        trials=trials,
        sampler=values["sampler"],
        settings=values["settings"],
        parameters=parameters,
    )


def _parameter(name: str, spec: Any, file: Path, *, grid: bool) -> Parameter:
    """The parameter of an entry of the space."""
    place, do = (
        f"space, {name}",
        "write {int: [20, 400], log: true}, {float: [0.1, 4.0], step: 0.1} or {choice: [1, 2]}",
    )

    def refuse(why: str) -> ConfigurationError:
        return invalid(f"{name} is {spec!r:.200}", file, place, why, do)

    kinds = [kind for kind in KINDS if isinstance(spec, dict) and kind in spec]
    if len(kinds) != 1 or not all(name.split(".")):
        raise refuse(f"a setting has one of {', '.join(KINDS)}")
    kind, options = kinds[0], {key: value for key, value in spec.items() if key not in KINDS}
    if set(options) - ({"log", "step"} if kind != "choice" else set()):
        raise refuse(f"{kind} has no option {', '.join(map(str, options))}; numbers have log and step")
    given = spec[kind]
    if kind == "choice":
        choices = [json.dumps(value) for value in given] if isinstance(given, list) else []
        if not choices or len(set(choices)) < len(choices):
            raise refuse("a choice is a list of different values")
        return Parameter(name=name, distribution=CategoricalDistribution(tuple(choices)))
    number = int if kind == "int" else (int, float)
    pair = isinstance(given, list) and len(given) == 2
    if not pair or any(isinstance(value, bool) or not isinstance(value, number) for value in given):
        raise refuse(f"{kind} has two numbers of this type, the lowest and the highest")
    log, step = options.get("log", False), options.get("step")
    low, high = given
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise refuse("the lowest number comes first, and both are finite")
    if not isinstance(log, bool) or (log and (step is not None or low <= 0)):
        raise refuse("log is true or false; with true the numbers are above 0 and there is no step")
    if step is not None and (isinstance(step, bool) or not isinstance(step, number) or not 0 < step < math.inf):
        raise refuse("the step is a number above 0, and an integer if the setting is one")
    if step is not None and _steps(low, high, step)[-1] != Decimal(str(high)):
        raise refuse("the highest number is not the lowest one plus a number of steps")
    if grid and (log or (kind == "float" and step is None)):
        raise refuse("a grid needs a step for a float, and has no logarithmic scale")
    if kind == "int":
        return Parameter(name=name, distribution=IntDistribution(low, high, log=log, step=int(step or 1)))
    return Parameter(name=name, distribution=FloatDistribution(float(low), float(high), log=log, step=step))


def _steps(low: float, high: float, step: float) -> list[Decimal]:
    first, width = Decimal(str(low)), Decimal(str(step))
    return [first + width * number for number in range(int((Decimal(str(high)) - first) // width) + 1)]


def check_space(space: Space, given: Mapping[str, Any]) -> Settings:
    """Check a space against the settings of the user, without an import of torch and without the data.

    Args:
        space: the space.
        given: `command_line`, `config_dict` and `config_files` of `load_settings`.

    Returns:
        The settings of the user with those of the file, without those of the space.

    Raises:
        ConfigurationError: a setting does not exist, is fixed or has a value that is not permitted, or the run has no
            such method or metric.
    """
    baseline = load_trial(space, given, {}, machine=False)
    named = {**(given.get("config_dict") or {}), **(given.get("command_line") or {})}
    if "eval_split" in {**named, **space.settings} or baseline["eval_split"] != "test":
        raise invalid(
            "eval_split is given",
            space.file,
            "eval_split",
            "trials are evaluated on the validation split, and the best configuration once on the test split",
            "remove eval_split; --no_test leaves out the evaluation on the test split",
        )
    declared = declarations()
    for parameter in space.parameters:
        place, key = f"space, {parameter.name}", parameter.key
        if key in FIXED or (key in declared and declared[key].speed):
            why = "it never changes a result" if key not in FIXED else "values of different data cannot be compared"
            raise invalid(f"{key} cannot be searched", space.file, place, why, "remove it from the space")
        if key in named and key == parameter.name:
            why = "the space sets it as well, and a trial has one value for each setting"
            raise invalid(f"{key} is also given on the command line", space.file, place, why, "keep one of them")
        for stored in parameter.extremes():
            load_trial(space, given, space.settings_of({parameter.name: stored}, baseline), machine=False, place=place)
    _check_metric(space, baseline)
    if not any(":" in row for row in baseline["eval_rows"]):  # A class of the user has a name of its own.
        check_method(space, baseline, baseline["eval_rows"])
    return baseline


def load_trial(
    space: Space, given: Mapping[str, Any], changes: Mapping[str, Any], *, machine: bool = True, place: str = "trial"
) -> Settings:
    """Return the settings of the user, with those of the file below and some changes above them.

    Args:
        space: the space.
        given: `command_line`, `config_dict` and `config_files` of `load_settings`.
        changes: the settings that win over all others.
        machine: see `load_settings`.
        place: the source of the changes, for error messages.
    """
    layers = {f"{space.file}: settings": space.settings}
    return load_settings(**given, layers=layers, overrides={f"{space.file}: {place}": changes}, machine=machine)


def _check_metric(space: Space, settings: Settings) -> None:
    """Check that the metric is one of the run."""
    known = [name.lower() for name in settings["metrics"]]
    name, _, cutoff = space.metric.partition("@")
    metrics = [f"{metric}@{k}" if metric != "gauc" else metric for metric in known for k in settings["topk"]]
    if space.metric in metrics:
        return
    near = nearest(space.metric, metrics)
    do = f"did you mean {' or '.join(near)}?" if near else "choose one of them"
    if name in (metric.lower() for metric in recbole_metrics()):
        wanted = [*settings["metrics"], *([name] if name not in known else [])]
        cuts = {*settings["topk"], *([int(cutoff)] if re.fullmatch(r"[1-9]\d{0,3}", cutoff) else [])}
        do = f"set metrics: [{', '.join(wanted)}] and topk: {sorted(cuts)}"
    raise invalid(
        f"the run has no metric {space.metric!r:.200}",
        space.file,
        "metric",
        f"its metrics are {', '.join(settings['metrics'])} at {', '.join(map(str, settings['topk']))}",
        do,
    )


def check_method(space: Space, settings: Settings, rows: Sequence[str]) -> None:
    """Check that the method is one of the run.

    Args:
        space: the space.
        settings: settings without the space.
        rows: names of the re-rankers of `eval_rows`.
    """
    alone = settings["base_model"] if len(settings["base_model"]) > 1 and not settings["cand_file"] else []
    others = [*settings["models"], *alone]
    methods = [*(name for name in ORDERS if name != "prior" or settings["prior_features"]), *rows, *others]
    if space.method in others and space.scope == "hit_users":
        why = "it recommends items of the whole catalogue, and has no figure for users whose list contains the target"
        raise invalid(f"{space.method} is no re-ranker", space.file, "scope", why, "set scope: all_users")
    if space.method not in methods:
        near = nearest(space.method, methods)
        raise invalid(
            f"the run has no method {space.method!r:.200}",
            space.file,
            "method",
            f"its methods are {', '.join(methods)}",
            (f"did you mean {' or '.join(near)}? " if near else "") + "Add the method to eval_rows or models",
        )
