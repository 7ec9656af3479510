"""Tuning: a search over settings on the validation split, see `search_space` for its file.

Each trial is a plan of the pipeline with `eval_split: valid`. Stages that trials share run once. The study is in the
folder `<results>/tuning/<key>/`, whose key is a hash of the space and of all other settings of the trials. `study.db`
is Optuna's SQLite storage, because a transaction of SQLite is written as a whole or not at all. A trial enters it when
it is finished. The parameters of a trial depend only on the seed of the run and on the finished trials, so that a trial
that was killed is started again with the same parameters.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState, create_trial

from recbole_gr2 import pipeline, preflight
from recbole_gr2.config import Settings, load_settings
from recbole_gr2.console import Console, quiet_libraries
from recbole_gr2.errors import ConfigurationError, GR2Error, QualityCheckError
from recbole_gr2.search_space import Direction, Space, check_method, check_space, invalid, load_trial, read_space
from recbole_gr2.seeding import derive_seed
from recbole_gr2.store import explained_disk_errors, locked, text_hash, write_json, write_text

if TYPE_CHECKING:
    from recbole_gr2.bridge.data import Data

STUDY = "tuning"  # name of the study in its file, and of the folder of all studies


def tune(
    file: Path, given: Mapping[str, Any], *, command: str, console: Console, test: bool = True, dry_run: bool = False
) -> Path | None:
    """Run the trials of a space file, and evaluate the best configuration on the test split.

    A finished trial is never run again. A trial whose quality check fails is recorded with the reason, and the search
    goes on. Every other error stops the search; the same command continues it.

    Args:
        file: the space file, see the module.
        given: `command_line`, `config_dict` and `config_files` of `load_settings`.
        command: the command line, for the report.
        console: where progress is printed.
        test: whether to evaluate the best configuration on the test split. This is done once for each configuration.
        dry_run: whether to check everything, print the plan of the next trial, and stop.

    Returns:
        The path of the study's result.json; beside it are report.md, best.yaml and study.db. None for a dry run.

    Raises:
        ConfigurationError: the file or the settings are not valid. All checks come before the first trial.
        QualityCheckError: no trial has a value, or a language model left every list of the test split unchanged.
        GR2Error: a stage failed.
    """
    space = read_space(file)
    baseline = check_space(space, given)
    preflight.check(baseline)
    from recbole_gr2.ablation import data_for  # These modules import torch.
    from recbole_gr2.report.study import trials_table
    from recbole_gr2.rerankers.registry import chosen

    def load(params: Mapping[str, Any], number: int | None = None) -> Settings:
        changes = space.settings_of(params, baseline)
        place = "space" if number is None else f"trial {number + 1}"
        settings = load_trial(space, given, {**changes, "eval_split": "valid"}, place=place)
        pipeline.check(settings)
        return settings

    for params in space.grid() if space.sampler == "grid" else _one_at_a_time(space):
        load(params)
    settings = load({})
    check_method(space, settings, [method.name for method in chosen(settings)])
    quiet_libraries()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console.say(
        f"tuning {space.method} on {settings['dataset']}: {space.count()} trials, {space.metric} of the validation "
        f"split, {space.users}, sampler {space.sampler}, preset {settings['preset']}, seed {settings['seed']}"
    )
    data = data_for(settings)
    console.say(data.summary().text())
    folder = settings.results_folder / STUDY / _study_key(space, pipeline.plan(settings, data))
    if dry_run:
        study = _open(folder, space.direction) if (folder / "study.db").is_file() else None
        done = study.trials if study else []
        console.say(f"trials: {len(done)} finished, {max(space.count() - len(done), 0)} left: {folder}")
        if len(done) < space.count():
            settings = load(params := suggest(space, done, settings["seed"]), len(done))
            console.say(f"trial {len(done) + 1} of {space.count()}: {_described(params)}")
            _plan(settings, data_for(settings, data), console, dry_run=True)
        return None
    with explained_disk_errors(folder), locked(folder, what="study"):
        study = _open(folder, space.direction)
        while (number := len(study.trials)) < space.count():
            params = suggest(space, study.trials, settings["seed"])
            console.say(f"trial {number + 1} of {space.count()}: {_described(params)}")
            trial = load(params, number)
            data = data_for(trial, data)
            study.add_trial(_run_trial(space, trial, data, params, study.trials, console))
        best = _best(study.trials, space.direction)
        result = _result(space, study, settings, command)
        if best is None:
            _write(folder, result)
            raise QualityCheckError(
                f"none of {len(study.trials)} trials has a value",
                where=str(folder / "report.md"),
                why="every trial ended with a failed quality check; the report has the reasons",
                do="change the space or the settings",
            )
        write_text(folder / "best.yaml", best_yaml(load(best.params, best.number), space, best))
        _write(folder, result)
        if test and best.number not in [each["trial"] for each in _tests(study)]:
            console.say(f"evaluation of trial {best.number + 1}, the best one, on the test split")
            evaluated = load_settings(config_files=[folder / "best.yaml"])
            data = data_for(evaluated, data)
            path = _evaluate(evaluated, data, f"recbole-gr2 run --config_files {folder / 'best.yaml'}", console)
            study.set_user_attr("tests", [*_tests(study), {"trial": best.number, "result": str(path)}])
            _write(folder, _result(space, study, settings, command))
    console.print(f"\n{trials_table(_result(space, study, settings, command), console.render)}")
    console.say(f"report: {folder / 'report.md'}")
    return folder / "result.json"


def _one_at_a_time(space: Space) -> Iterator[dict[str, Any]]:
    """The ends or choices of each parameter, without the other parameters."""
    return ({parameter.name: value} for parameter in space.parameters for value in parameter.extremes())


def _study_key(space: Space, planned: Sequence[pipeline.Planned]) -> str:
    """The name of a study's folder: a hash of the space and of the plan without it, but not of the number of trials.

    The key of the last stage of the plan depends on all settings, the data, the user's own modules and the code.
    """
    parameters = {each.name: repr(each.distribution) for each in space.parameters}
    values = [space.method, space.metric, space.scope, space.sampler, parameters, planned[-1].key]
    return text_hash(json.dumps(values))


def _open(folder: Path, direction: Direction) -> optuna.Study:
    """The study in a folder.

    Raises:
        GR2Error: another program or version of Optuna wrote the file, or it is damaged.
    """
    from sqlalchemy.engine import URL
    from sqlalchemy.exc import SQLAlchemyError

    file = folder / "study.db"
    try:
        url = URL.create("sqlite", database=str(file.absolute())).render_as_string()
        storage = optuna.storages.RDBStorage(url)
        return optuna.create_study(storage=storage, study_name=STUDY, direction=direction, load_if_exists=True)
    except (SQLAlchemyError, RuntimeError, optuna.exceptions.StorageInternalError) as error:
        raise GR2Error(
            f"the study cannot be read: {str(error).splitlines()[0]}",
            where=str(file),
            why="it contains the finished trials",
            do="use the version of Optuna that wrote it, or remove the file to start the study again",
        ) from error


def suggest(space: Space, trials: Sequence[FrozenTrial], seed: int) -> dict[str, Any]:
    """Return the parameters of the next trial: a function of the space, the finished trials and the seed.

    Args:
        space: the space.
        trials: the finished trials.
        seed: seed of the run.
    """
    number = len(trials)
    if space.sampler == "grid":
        return space.grid()[number]
    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    sampler = samplers[space.sampler](seed=derive_seed(seed, "tuning", number))
    study = optuna.create_study(sampler=sampler, direction=space.direction)
    study.add_trials(trials)
    return dict(study.ask({each.name: each.distribution for each in space.parameters}).params)


def _run_trial(
    space: Space,
    settings: Settings,
    data: Data,
    params: Mapping[str, Any],
    before: Sequence[FrozenTrial],
    console: Console,
) -> FrozenTrial:
    """Run a trial. A failed quality check is its result; another error is raised."""
    planned = _plan(settings, data, console)
    started, value = time.monotonic(), None
    attributes: dict[str, Any] = {}
    try:
        done = pipeline.execute(planned, settings, data, console)
    except QualityCheckError as error:
        console.say(f"the trial failed: {error}")
        attributes["failed"] = str(error)
    else:
        value, attributes["users"] = _figures(space, done[-1][0].summary)
        console.say(f"{space.metric} of {space.method}: {value:.4f}")
        users = {each.user_attrs["users"] for each in before if "users" in each.user_attrs}
        if users - {attributes["users"]}:
            raise ConfigurationError(
                f"the trial was evaluated on {attributes['users']:,} users, and earlier ones on {users.pop():,}",
                where=f"{space.file}: space",
                why="values of different users cannot be compared",
                do="remove the setting that changes the data or the reported lists from the space",
            )
    return create_trial(
        state=TrialState.FAIL if value is None else TrialState.COMPLETE,
        value=value,
        params=dict(params),
        distributions={each.name: each.distribution for each in space.parameters},
        user_attrs={**attributes, "seconds": round(time.monotonic() - started, 1)},
    )


def _plan(settings: Settings, data: Data, console: Console, *, dry_run: bool = False) -> list[pipeline.Planned]:
    """The checked plan of a run, which is printed."""
    planned = pipeline.plan(settings, data)
    pipeline.check_data(planned, settings, data)
    preflight.check_resources(planned, settings, console.say, dry_run=dry_run)
    waiting = [
        [p.stage.name, p.key, p.action, preflight.expected_time(p, planned), p.why] for p in planned if not p.finished
    ]
    if waiting:
        console.table(["stage", "key", "plan", "time", "why"], waiting)
    return planned


def _figures(space: Space, summary: Mapping[str, Any]) -> tuple[float, int]:
    """The metric of the method, and the number of all users, in the summary of the stage `evaluate`."""
    entries = {(entry["method"], entry["scope"]): entry for entry in summary["methods"]}
    entry = entries.get((space.method, space.scope), {"metrics": {}})
    if space.metric not in entry["metrics"]:
        methods = dict.fromkeys(method for method, _ in entries)
        raise invalid(
            f"the trial has no {space.metric} of {space.method}, {space.users}",
            space.file,
            "method, metric",
            f"its methods are {', '.join(methods)}; metrics of the recommended items need lists of their cut-off",
            "correct the method, the metric or the space",
        )
    return entry["metrics"][space.metric], entries["base", "all_users"]["n"]


def _evaluate(settings: Settings, data: Data, command: str, console: Console) -> Path:
    """Run a configuration on the test split and write its folder in `runs/`. Returns the path of its result.json."""
    from recbole_gr2.report import write_run

    planned = _plan(settings, data, console)
    return write_run(planned, pipeline.execute(planned, settings, data, console), settings, command, console)


def best_yaml(settings: Settings, space: Space, trial: FrozenTrial) -> str:
    """Return a config file with the settings of a trial that differ from the defaults of its data set and preset.

    Args:
        settings: settings of the trial.
        space: the space.
        trial: the trial.
    """
    common = {key: settings[key] for key in ("dataset", "preset", "seed")}
    default = load_settings(config_dict=common).all_values()
    values = {key: value for key, value in settings.all_values().items() if key not in default or default[key] != value}
    del values["eval_split"]
    return (
        f"# {space.metric} of {space.method} on the validation split, {space.users}: {trial.value:.4f} "
        f"(trial {trial.number + 1})\n" + yaml.safe_dump({**common, **values}, sort_keys=True)
    )


def _best(trials: Sequence[FrozenTrial], direction: str) -> FrozenTrial | None:
    """The trial with the best value, the earliest of several; None if no trial has a value."""
    finished = [trial for trial in trials if trial.value is not None]
    sign = 1 if direction == "minimize" else -1
    return min(finished, key=lambda trial: sign * trial.values[0]) if finished else None


def _tests(study: optuna.Study) -> list[dict[str, Any]]:
    """The evaluations on the test split: number of the trial, and path of result.json."""
    return list(study.user_attrs.get("tests", []))


def _result(space: Space, study: optuna.Study, settings: Settings, command: str) -> dict[str, Any]:
    """Return the content of result.json."""
    from recbole_gr2.report.result import SCHEMA

    trials, best = study.trials, _best(study.trials, space.direction)
    by_name = {parameter.name: parameter for parameter in space.parameters}
    return {
        "schema": SCHEMA,
        "tuning": space.file.stem,
        "dataset": settings["dataset"],
        "split": "valid",
        "preset": settings["preset"],
        "seeds": [settings["seed"]],
        "command": command,
        "method": space.method,
        "metric": space.metric,
        "scope": space.scope,
        "direction": space.direction,
        "sampler": space.sampler,
        "trials": [
            {
                "trial": trial.number + 1,
                "state": "failed" if trial.value is None else "finished",
                "value": trial.value,
                "settings": {name: by_name[name].value(stored) for name, stored in trial.params.items()},
                "seconds": trial.user_attrs["seconds"],
                "failed": trial.user_attrs.get("failed", ""),
            }
            for trial in trials
        ],
        "best": None if best is None else best.number + 1,
        "importance": _importance(study, settings["seed"]),
        "tests": [
            {"trial": each["trial"] + 1, "result": each["result"], "value": _test_value(space, Path(each["result"]))}
            for each in _tests(study)
        ],
    }


def _importance(study: optuna.Study, seed: int) -> dict[str, float]:
    """The share of the variance of the values that each parameter explains (fANOVA), the largest first.

    It is empty if fewer than two different values are known, and lacks parameters with one value.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    if len({trial.value for trial in study.trials if trial.value is not None}) < 2:
        return {}
    evaluator = FanovaImportanceEvaluator(seed=derive_seed(seed, "importance"))
    return {name: float(share) for name, share in get_param_importances(study, evaluator=evaluator).items()}


def _test_value(space: Space, path: Path) -> float | None:
    """The metric of the method in the result.json of a run; None if the folder was removed."""
    if not path.is_file():
        return None
    for entry in json.loads(path.read_text(encoding="utf-8"))["methods"]:
        if (entry["method"], entry["scope"]) == (space.method, space.scope):
            return entry["metrics"][space.metric]["mean"]
    return None


def _write(folder: Path, result: Mapping[str, Any]) -> None:
    from recbole_gr2.report.study import render_study

    write_text(folder / "report.md", render_study(result, folder))
    write_json(folder / "result.json", result)


def _described(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in params.items())
