"""Plans and executes the stages of a run. It works for any list of `Stage` declarations."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from recbole_gr2.config import Settings
from recbole_gr2.console import Console
from recbole_gr2.distributed import RANK, wait_for_all
from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.meter import CLOCK, peak_memory_mb, reset_peak_memory, seconds_of_earlier_starts
from recbole_gr2.stages import all_stages, check_name
from recbole_gr2.store import (
    LOCK,
    MANIFEST,
    TEMPORARY,
    check_files,
    code_version,
    describe_files,
    explained_disk_errors,
    locked,
    other_records,
    read_json,
    read_manifest,
    source_hash,
    stage_key,
    text_hash,
    write_json,
    write_manifest,
)
from recbole_gr2.tracking import Tracking
from recbole_gr2.types import Context, Stage, StageRecord

CACHED, OUTDATED, RESUME, RUN = "cached", "outdated", "resume", "run"
SHOWN = ("recbole_gr2.progress", "recbole_gr2.tracking")  # A change of these modules cannot change a result.
REQUESTED = "requested"  # why a stage runs although it may be finished
REQUESTS = "requests"  # folder with a file for each --from_stage and --force: the stages that it has not computed yet


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A stage with its key, its folder, and what will happen to it.

    Attributes:
        stage: the stage's declaration.
        key: name of its folder.
        folder: where its files are or will be.
        needs: keys of the stages that it reads, by name.
        settings: all values of the key.
        sources: hash of the package sources that the stage uses.
        action: `cached` (finished), `outdated` (finished, but by different code; its result is used), `resume`
            (interrupted), or `run`.
        why: the reason, or "".
        request: the file of the request, if --from_stage or --force computes this stage again.
    """

    stage: Stage
    key: str
    folder: Path
    needs: dict[str, str]
    settings: dict[str, Any]
    sources: str
    action: str
    why: str
    request: Path | None = None

    @property
    def name(self) -> str:
        """Stage and key."""
        return f"{self.stage.name}/{self.key}"

    @property
    def finished(self) -> bool:
        """Whether the result of an earlier run is used."""
        return self.action in (CACHED, OUTDATED)


def check(settings: Settings) -> None:
    """Check everything about the settings that can be checked before any data is loaded.

    Raises:
        ConfigurationError: several stages cannot run with these settings. It reports all problems together.
        GR2Error: one stage cannot run with these settings.
    """
    _all_problems(partial(each, settings) for each in dict.fromkeys(stage.check for stage in all_stages(settings)))


def check_data(planned: Iterable[Planned], settings: Settings, data: Any) -> None:
    """Check that the stages that a plan computes can run with the data and with what is installed.

    Raises:
        ConfigurationError: several stages cannot run. It reports all problems together.
        GR2Error: one stage cannot run.
    """
    checks = dict.fromkeys(entry.stage.check_data for entry in planned if not entry.finished)
    _all_problems(partial(each, settings, data) for each in checks)


def _all_problems(checks: Iterable[Callable[[], None]]) -> None:
    """Call all checks and raise their errors together."""
    problems: dict[str, GR2Error] = {}
    for check_one in checks:
        try:
            check_one()
        except GR2Error as error:
            problems.setdefault(str(error), error)
    if len(problems) == 1:
        raise next(iter(problems.values()))
    if problems:
        raise ConfigurationError(
            f"{len(problems)} problems in the settings:\n" + "\n".join(problems),
            do="correct all of them",
        )


def plan(
    settings: Settings, data: Any, *, stages: Sequence[str] = (), from_stage: str | None = None, force: bool = False
) -> list[Planned]:
    """Return what would happen to each stage, in the order of execution.

    Args:
        settings: settings of the run.
        data: the data set. Its `fingerprint` is part of every key.
        stages: names of the stages to compute, with all stages that they need; by default the last declared stage.
        from_stage: run this stage and all that depend on it again, even if they are finished. If such a command was
            stopped, the same command continues with the stages that it has not finished.
        force: run every stage again, in the same way.

    Raises:
        ConfigurationError: there is no stage of that name.
        GR2Error: a file of a finished stage is missing, truncated or changed, and the command does not compute the
            stage again.
    """
    declared = {stage.name: stage for stage in all_stages(settings)}
    for name in (*stages, *([from_stage] if from_stage else [])):
        check_name(name, declared)
    root = settings.results_folder / "stages"
    planned: list[Planned] = []
    keys: dict[str, str] = {}
    renewed: set[str] = set()
    for stage in _in_order(declared, stages or list(declared)[-1:]):
        values = {k: v for k, v in settings.results(stage.settings).items() if k not in stage.excluded}
        values |= stage.key_values(settings)
        needs = {name: keys[name] for name in stage.needs}
        key = keys[stage.name] = stage_key(stage.name, stage.version, values, needs, data.fingerprint)
        if force or stage.name == from_stage or renewed & set(needs):
            renewed.add(stage.name)
        planned.append(
            Planned(
                stage=stage,
                key=key,
                folder=root / stage.name / key,
                needs=needs,
                settings=values,
                sources=source_hash((stage.run.__module__, *stage.modules), (*stage.unused_modules, *SHOWN)),
                action=RUN,
                why="",
            )
        )
    names = " ".join(entry.name for entry in planned if entry.stage.name in renewed)
    request = settings.results_folder / REQUESTS / f"{text_hash(names)}.json"
    requests = _requests(settings)
    pending = {name for stages in requests.values() for name in stages}
    decided = []
    for entry in planned:
        requested = entry.stage.name in renewed
        again = requested and request not in requests
        again = again or (entry.name in pending and (entry.folder / MANIFEST).is_file())
        action, why = _decide(entry, again=again)
        decided.append(replace(entry, action=action, why=why, request=request if requested else None))
    return decided


def _requests(settings: Settings) -> dict[Path, list[str]]:
    """The stages that each unfinished --from_stage or --force has not computed yet."""
    files = sorted((settings.results_folder / REQUESTS).glob("*.json"))
    return {file: read_json(file) for file in files}


def _in_order(declared: Mapping[str, Stage], wanted: Iterable[str]) -> list[Stage]:
    """The wanted stages and all that they need, in the declared order, but always after those that they need."""
    for stage in declared.values():
        unknown = set(stage.needs) - set(declared)
        if unknown:
            raise ConfigurationError(
                f"the stage {stage.name} needs the unknown stages {sorted(unknown)}",
                where=stage.run.__module__,
                do=f"choose from {', '.join(declared)}",
            )
    needed: set[str] = set()
    pending = list(wanted)
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += declared[name].needs
    ordered: dict[str, Stage] = {}

    def add(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise ValueError(f"stages need each other: {' -> '.join((*path, name))}")
        for need in declared[name].needs:
            add(need, (*path, name))
        ordered.setdefault(name, declared[name])

    for name in declared:
        if name in needed:
            add(name, ())
    return list(ordered.values())


def _decide(entry: Planned, *, again: bool) -> tuple[str, str]:
    """The action of a stage and its reason."""
    folder = entry.folder
    if again:
        return RUN, REQUESTED
    record = read_manifest(folder)
    if record is not None:
        if (record.stage, record.key, record.version) != (entry.stage.name, entry.key, entry.stage.version):
            raise GR2Error(
                f"the manifest belongs to {record.stage}/{record.key}, version {record.version}",
                where=str(folder / MANIFEST),
                why=f"the folder is that of {entry.name}, version {entry.stage.version}",
                do=f"repeat the command with --from_stage {entry.stage.name}, to compute the stage again",
            )
        check_files(folder, record)
        if record.sources == entry.sources:
            return CACHED, ""
        return OUTDATED, f"made by {record.code or 'an unknown version'}"
    if folder.is_dir():
        return RESUME, "interrupted before it was finished"
    others = other_records(folder)
    if not others:
        return RUN, "first time"
    changes = min((_changes(entry, other) for other in others), key=len)  # Of equal ones the newest.
    return RUN, "; ".join(changes[:3]) or "data or code changed"


def _changes(entry: Planned, earlier: StageRecord) -> list[str]:
    """What differs between a planned stage and an earlier run of it, in words."""
    settings = changed_settings(earlier.settings, entry.settings)
    changes = [f"{name} {earlier.settings.get(name)} -> {entry.settings.get(name)}" for name in settings]
    return changes + [f"new {name}" for name in entry.needs if earlier.needs.get(name) != entry.needs[name]]


def changed_settings(earlier: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that have another value, or that one of them lacks.

    Args:
        earlier: settings in the manifest of an earlier run.
        current: settings in the key of a planned stage. Tuples equal the lists that JSON makes of them.
    """

    def as_json(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return [name for name in sorted({*earlier, *current}) if as_json(earlier.get(name)) != as_json(current.get(name))]


def execute(
    planned: Sequence[Planned], settings: Settings, data: Any, console: Console
) -> list[tuple[StageRecord, bool]]:
    """Run a plan. Returns each stage's record and whether its result existed before.

    Of several processes only the first one runs the stages that are not `distributed`. The others wait.

    Raises:
        GR2Error: another process works on a stage, a file of a finished stage was changed, the disk is full, or a
            folder cannot be written.
    """
    with explained_disk_errors(settings.results_folder):
        _write_request(planned)
    records: dict[str, StageRecord] = {}
    folders: dict[str, Path] = {}
    done = []
    for number, entry in enumerate(planned, start=1):
        name, label = entry.stage.name, f"stage {number} of {len(planned)}: {entry.stage.name}"
        with explained_disk_errors(entry.folder):
            record, finished = _record(entry, label, settings, data, console, records, folders)
        records[name], folders[name] = record, entry.folder
        done.append((record, finished))
        result = entry.action if entry.finished else CACHED
        console.say(f"{label} {result if finished else f'done in {record.seconds:.0f} s  {entry.folder}'}")
    return done


def _write_request(planned: Sequence[Planned]) -> None:
    """Record which stages the command computes again, so that it can continue after a stop."""
    requested = [entry for entry in planned if entry.request]
    if not requested:
        return
    wait_for_all()  # the plans of all processes are made
    file = requested[0].request
    assert file is not None
    if RANK == 0 and not file.exists():
        for entry in requested:
            with locked(entry.folder):
                if not (entry.folder / MANIFEST).exists():  # what an earlier command left
                    _empty(entry.folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, [entry.name for entry in requested])


def _fulfil(entry: Planned, settings: Settings) -> None:
    """Remove a finished stage from all requests."""
    for file, names in _requests(settings).items():
        left = [name for name in names if name != entry.name]
        if not left:
            file.unlink()
        elif left != names:
            write_json(file, left)


def _record(
    entry: Planned,
    label: str,
    settings: Settings,
    data: Any,
    console: Console,
    records: Mapping[str, StageRecord],
    folders: Mapping[str, Path],
) -> tuple[StageRecord, bool]:
    """The record of a stage, and whether its result existed before. A stage that is not finished is run."""
    requested = entry.why == REQUESTED
    record = None if requested else read_manifest(entry.folder)
    if record is not None:
        if RANK == 0 and (entry.folder / CLOCK).exists():  # killed after the manifest was written
            with contextlib.suppress(GR2Error), locked(entry.folder):  # or another process is removing them
                _remove_intermediate(entry.folder)
        return record, True
    with contextlib.ExitStack() as locks:
        if RANK == 0:
            locks.enter_context(locked(entry.folder))
            for name in entry.needs:
                locks.enter_context(locked(folders[name], shared=True))
        # Another run may have finished the stage since the plan was made.
        record = None if requested else read_manifest(entry.folder)
        if record is not None:
            return record, True
        return _run(entry, label, settings, data, console, records, folders), False


def _run(
    entry: Planned,
    label: str,
    settings: Settings,
    data: Any,
    console: Console,
    records: Mapping[str, StageRecord],
    folders: Mapping[str, Path],
) -> StageRecord:
    """Run one stage and write its manifest."""
    if RANK == 0:
        for name in entry.needs:
            check_files(folders[name], records[name], contents=True)
        if entry.why == REQUESTED:
            _empty(entry.folder)
    console.say(f"{label}, {entry.action}" + (f" ({entry.why})" if entry.why else ""))
    context = Context(
        stage=entry.stage.name,
        settings=settings,
        data=data,
        folder=entry.folder,
        say=lambda text: console.say(f"  {text}"),
        inputs={name: records[name] for name in entry.needs},
        folders={name: folders[name] for name in entry.needs},
        parameters=entry.stage.parameters,
    )
    earlier = seconds_of_earlier_starts(entry.folder) if RANK == 0 else 0.0
    wait_for_all()
    reset_peak_memory()
    code, started = code_version(), time.monotonic()
    with console.stage(label), Tracking.of(settings, entry.stage.name, entry.key):
        summary = entry.stage.run(context) if RANK == 0 or entry.stage.distributed else {}
    if RANK == 0:
        _finish(entry, summary, earlier + time.monotonic() - started, code)
        _fulfil(entry, settings)
        _remove_intermediate(entry.folder)
    wait_for_all()
    record = read_manifest(entry.folder)  # as a later run reads it: JSON turns tuples into lists
    assert record is not None
    return record


def _finish(entry: Planned, summary: dict[str, Any], seconds: float, code: str) -> None:
    """Write the manifest of a stage."""
    for file in entry.folder.rglob(TEMPORARY):  # of a killed start
        file.unlink()
    checkpoints = _checkpoints(entry.folder)
    internal = {entry.folder / name for name in (CLOCK, LOCK)}
    files = [
        file
        for file in entry.folder.rglob("*")
        if file.is_file() and file not in internal and not any(path in file.parents for path in checkpoints)
    ]
    record = StageRecord(
        stage=entry.stage.name,
        key=entry.key,
        version=entry.stage.version,
        needs=entry.needs,
        settings=entry.settings,
        seconds=round(seconds, 3),
        peak_memory_mb=round(peak_memory_mb()),
        summary=summary,
        files=describe_files(entry.folder, files),
        code=code,
        sources=entry.sources,
    )
    write_manifest(entry.folder, record)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoints/**/checkpoint-*") if path.is_dir()]


def _remove_intermediate(folder: Path) -> None:
    """Remove the files that only an interrupted stage needs: its checkpoints and, after them, its clock."""
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)
    (folder / CLOCK).unlink(missing_ok=True)


def _empty(folder: Path) -> None:
    """Remove the files of a stage that is computed again, the manifest last: without it the stage would continue."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
