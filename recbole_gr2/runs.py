"""Runs in the folder of results: find them by name, and read their files.

A run is a folder `<checkpoint_dir>/gr2/<dataset>/runs/<name>/` with `run.json`, and `result.json`, the last file. The
paths in `run.json` are relative to the working directory of the run. They are read relative to the folder of the
run, so that it can be read from every directory, also after its `checkpoint_dir` was moved.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_gr2.config import read_yaml, read_yaml_file
from recbole_gr2.config.declaration import speed_settings
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError, nearest
from recbole_gr2.store import MANIFEST

if TYPE_CHECKING:
    from recbole_gr2.config import Settings

RESULT, RUN = "result.json", "run.json"
LATEST = "latest"  # stands for the newest run
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def check_run_name(name: str) -> None:
    """Check the name that a user gives to a run, which is the name of its folder.

    Raises:
        ConfigurationError: it contains other characters than letters, digits, `_`, `-` and `.`, begins with `-` or `.`,
            has more than 100 characters, or is `latest`.
    """
    if name == LATEST or not NAME.fullmatch(name):
        raise ConfigurationError(
            f"a run cannot have the name {name!r:.200}",
            where="--name",
            why=f"{LATEST!r} stands for the newest run"
            if name == LATEST
            else "the name is that of a folder, and commands find the run by it",
            do="use letters, digits, _, - and . only, begin with a letter, a digit or _, and use at most 100 of them",
        )


def run_folders(checkpoint_dir: str | Path = "saved") -> list[Path]:
    """Return the folders of all finished runs, the newest first.

    Args:
        checkpoint_dir: the folder of all results.
    """
    files = Path(checkpoint_dir).glob(f"gr2/*/runs/*/{RESULT}")
    return [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)]


def find_run(name: str | Path, checkpoint_dir: str | Path = "saved") -> Path:
    """Return the folder of a finished run.

    Args:
        name: path of the run's folder or of its result.json; or the name of a run in
            `<checkpoint_dir>/gr2/*/runs/`, alone or as `<dataset>/<name>`; or `latest` for the newest run.
        checkpoint_dir: the folder of all results, in which a name is looked up.

    Raises:
        MissingFileError: there is no such run. The error names the most similar ones.
        ConfigurationError: several data sets have a run of this name, or the path is that of an ablation.
    """
    path, folders = Path(name), run_folders(checkpoint_dir)
    folder = path.parent if path.name == RESULT else path
    if (folder / RESULT).is_file():
        if not (folder / RUN).is_file():
            raise ConfigurationError(
                f"{folder} is not the folder of a run",
                where=str(folder / RESULT),
                why=f"it has no {RUN}, so that it is for example the folder of an ablation",
                do="name a folder of .../runs/",
            )
        return folder
    if str(name) == LATEST and folders:
        return folders[0]
    found = _named(str(name), folders, "a run", checkpoint_dir)
    if found is not None:
        return found
    known = list(dict.fromkeys(each.name for each in folders))
    near = nearest(path.name, known) or known[:3]
    raise MissingFileError(
        f"there is no run {str(name)!r:.200}",
        where=str((Path(checkpoint_dir) / "gr2").absolute()),
        why="it is neither the path of a run nor the name of one" if known else "no run is finished there",
        do=(f"did you mean {' or '.join(near)}? " if near else "")
        + "recbole-gr2 runs lists all runs; --checkpoint_dir DIR names another folder of results",
    )


def find_ablation(name: str | Path, checkpoint_dir: str | Path = "saved") -> Path | None:
    """Return the folder of a finished ablation; None if the name is not that of an ablation.

    Args:
        name: path of its folder or of its result.json; or its name in `<checkpoint_dir>/gr2/*/ablations/`, alone or as
            `<dataset>/<name>`.
        checkpoint_dir: the folder of all results.

    Raises:
        ConfigurationError: several data sets have an ablation of this name.
    """
    path = Path(name)
    folder = path.parent if path.name == RESULT else path
    if (folder / RESULT).is_file():
        return None if (folder / RUN).is_file() else folder
    files = Path(checkpoint_dir).glob(f"gr2/*/ablations/*/{RESULT}")
    return _named(str(name), [file.parent for file in files], "an ablation", checkpoint_dir)


def _named(name: str, folders: Sequence[Path], what: str, checkpoint_dir: str | Path) -> Path | None:
    """The folder with a name, alone or as `<dataset>/<name>`; None if there is none.

    Raises:
        ConfigurationError: several data sets have a folder of this name.
    """
    full = {f"{each.parents[1].name}/{each.name}": each for each in folders}
    found = {path: each for path, each in full.items() if name in (path, each.name)}
    if len(found) > 1:
        raise ConfigurationError(
            f"{len(found)} data sets have {what} {name!r}",
            where=str(Path(checkpoint_dir) / "gr2"),
            why="the name does not tell which one is meant",
            do=f"write {' or '.join(found)}",
        )
    return next(iter(found.values()), None)


def read_ablation(folder: Path) -> dict[str, Any]:
    """Return the content of an ablation's result.json.

    Raises:
        GR2Error: the file is damaged, or is not the result of an ablation.
    """
    return _read(folder / RESULT, ("ablation", "dataset", "preset", "columns", "variants"))


def read_result(folder: Path) -> dict[str, Any]:
    """Return the content of a run's result.json. Results of versions without `eval_split` are those of the test split.

    Args:
        folder: the folder of the run.

    Raises:
        GR2Error: the file is damaged, or is not the result of a run.
    """
    return {"split": "test", **_read(folder / RESULT, ("dataset", "seeds", "methods", "settings"))}


def read_config(folder: Path) -> dict[str, Any]:
    """Return all settings of a run, as its config.yaml has them. A run of several seeds has those of its first seed.

    Raises:
        MissingFileError: the file does not exist.
        ConfigurationError: it is not valid YAML.
    """
    return read_yaml_file(folder / "config.yaml", where=str(folder), what="config file of the run")


def seed_runs(folder: Path) -> list[Path]:
    """Return the folders of the runs of each seed: those that a run of several seeds names, or the run itself.

    Raises:
        GR2Error: run.json is missing or damaged.
        MissingFileError: the run of a seed has been removed.
    """
    named = _read(folder / RUN, ()).get("runs")
    if named is None:
        return [folder]
    runs = [folder.parent / Path(path).parent.name for path in named]
    missing = [run.name for run in runs if not (run / RUN).is_file()]
    if missing:
        raise MissingFileError(
            f"the run {folder.name} reports over {', '.join(missing)}, which does not exist any more",
            where=str(folder / RUN),
            why="the files of each seed belong to its own run",
            do=f"repeat the run with its seeds, or remove the folder {folder}",
        )
    return runs


def stage_folders(folder: Path) -> dict[str, Path]:
    """Return the folder of each stage of a run, by name. A run of several seeds has no stages of its own.

    Raises:
        GR2Error: run.json is missing or damaged.
    """
    results = folder.absolute().parents[1]
    stages: Mapping[str, str] = _read(folder / RUN, ()).get("stages", {})
    return {stage: _below(results, Path(path)) for stage, path in stages.items()}


def finished_stages(folder: Path) -> dict[str, Path]:
    """Return the folder of each stage of a run of one seed, and check that every stage is still finished.

    Raises:
        MissingFileError: a stage has been removed.
        GR2Error: run.json is missing or damaged.
    """
    folders = stage_folders(folder)
    missing = [stage for stage, path in folders.items() if not (path / MANIFEST).is_file()]
    if missing:
        raise MissingFileError(
            f"the run {folder.name} has no finished {', '.join(missing)} any more",
            where=str(folders[missing[0]]),
            why="the files of these stages contain what the command needs",
            do=f"repeat the run: recbole-gr2 run --config_files {folder / 'config.yaml'}",
        )
    return folders


def one_seed(folder: Path) -> Path:
    """Return a run of one seed as it is.

    Raises:
        ConfigurationError: the run has several seeds. The error names the run of each seed.
    """
    runs = seed_runs(folder)
    if runs != [folder]:
        raise ConfigurationError(
            f"the run {folder.name} has {len(runs)} seeds",
            where=str(folder),
            why="the rankings of the seeds differ",
            do=f"name the run of one seed: {', '.join(run.name for run in runs)}",
        )
    return folder


def check_same_run(folder: Path, sources: Mapping[str, Any], config: str) -> None:
    """Check that a run can be written to the folder of its name.

    Args:
        folder: the folder. It need not exist.
        sources: `stages`, the folder of each stage of the run; or `runs`, the result.json of the run of each seed.
        config: all settings of the run, as a YAML text.

    Raises:
        ConfigurationError: the folder has a run whose stages, or seeds, are others.
        GR2Error: the run.json of the folder is damaged.
    """
    if not (folder / RUN).is_file():
        return
    recorded, other = _read(folder / RUN, ()), []
    if "runs" in sources:
        same = _names(recorded.get("runs", ())) == _names(sources["runs"])
    else:
        earlier = {stage: Path(path).name for stage, path in recorded.get("stages", {}).items()}
        other = [stage for stage, path in sources["stages"].items() if earlier.get(stage) != Path(path).name]
        same = not other
    if same:
        return
    changed = changed_settings(read_config(folder), read_yaml(config))
    differences = [f"{key} {before!r:.60} -> {now!r:.60}" for key, (before, now) in changed.items()]
    raise ConfigurationError(
        f"the run {folder.name!r} exists and is another one: "
        + (
            "; ".join(differences[:5])
            or "its seeds, data or code differ" + (f", in {', '.join(other)}" if other else "")
        ),
        where=str(folder),
        why="its report would be replaced by that of a different run",
        do=f"choose another --name, or remove the run: recbole-gr2 clean --runs {folder.name}",
    )


def changed_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the settings that can change a result and that differ, with both values. A missing one is None.

    Args:
        first, second: all settings of a run, as its config.yaml has them.

    >>> changed_settings({"rl_steps": 5, "seed": 1, "data_path": "a"}, {"rl_steps": 6, "seed": 1, "data_path": "b"})
    {'rl_steps': [5, 6]}
    """
    names = sorted({*first, *second} - speed_settings())
    return {name: [first.get(name), second.get(name)] for name in names if first.get(name) != second.get(name)}


def named_folder(settings: Settings, name: str) -> Path:
    """Return the folder of a run with this name on the data set of the settings."""
    return settings.results_folder / "runs" / name


def _names(paths: Sequence[str]) -> list[str]:
    return [Path(path).parent.name for path in paths]


def _below(results: Path, recorded: Path) -> Path:
    """The folder of a stage below the results of the run, from the recorded path `<results>/stages/<stage>/<key>`."""
    last = len(recorded.parts) - 1 - recorded.parts[::-1].index("stages")
    return results / Path(*recorded.parts[last:])


def _read(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    """The content of a JSON file of a run.

    Raises:
        GR2Error: the file is missing or damaged, or lacks a key.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        absent = [key for key in keys if key not in content]
    except (OSError, ValueError, TypeError) as error:
        problem = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        absent, content = [], None
    else:
        problem = f"it has no {', '.join(absent)}"
    if absent or not isinstance(content, dict):
        raise GR2Error(
            f"{file.name} of the run {file.parent.name} cannot be read: {problem}",
            where=str(file),
            why="it describes the run",
            do=f"repeat the run, or remove the folder {file.parent}",
        )
    return content
