"""`recbole-gr2 clean`: remove the stages that no run uses."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from recbole_gr2.commands.output import CheckpointDir, names, print_table
from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.runs import RESULT, find_run, run_folders, seed_runs, stage_folders
from recbole_gr2.store import LOCK, MANIFEST, locked, read_json, read_manifest

REMOVED = ".removed-"  # start of the name of a folder while it is removed
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True, kw_only=True)
class Unused:
    """A folder that can be removed.

    Attributes:
        folder: the folder of a stage or of a run.
        what: `finished` or `unfinished` for a stage, `run` for the folder of a run.
        size: bytes of its files.
        changed: time of its newest file, in seconds since 1970.
    """

    folder: Path
    what: str
    size: int
    changed: float


def clean(
    runs: Annotated[
        str | None, typer.Option("--runs", metavar="A,B", help="Also remove these runs, and the stages only they use.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without a question.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="List the folders and stop.")] = False,
    checkpoint_dir: CheckpointDir = "saved",
) -> None:
    """Remove the folders of stages that no run or ablation uses.

    The folders are listed with sizes and ages, and removed after a confirmation. Stages of an interrupted run belong to
    them: the same command would continue that run. So do stages of the trials of `tune`, whose values the study keeps.
    Stages that a kept run uses stay. While a process works on a data
    set, nothing of this data set is removed. Do not start a run while folders are removed.

    \b
    Examples:
      recbole-gr2 clean --dry_run
      recbole-gr2 clean --yes --checkpoint_dir results
      recbole-gr2 clean --runs first,20250301-101500
    """
    root = Path(checkpoint_dir)
    removed = [find_run(name, root) for name in names(runs)]
    for folder in removed:
        _check_removable(folder, removed, root)
    unused = [*(_described(folder, "run") for folder in removed), *unused_stages(root, without=removed)]
    busy = {dataset: stage for dataset in _datasets(unused) if (stage := _working(dataset))}
    for dataset, stage in busy.items():
        print(f"{dataset.name} is left as it is: a process works on {stage}")
    unused = [each for each in unused if _dataset(each.folder) not in busy]
    if not unused:
        print(f"nothing to remove in {root / 'gr2'}")
        return
    total = _size_text(sum(each.size for each in unused))
    print_table(
        ["folder", "state", "size", "last change"],
        [[str(e.folder.relative_to(root)), e.what, _size_text(e.size), f"{_age(e.changed)} ago"] for e in unused],
    )
    print(f"\n{len(unused)} folders, {total}")
    if dry_run:
        return
    if not yes:
        typer.confirm("Remove them?", abort=True)
    for each in unused:
        remove(each.folder, root)
    print(f"removed {len(unused)} folders, {total}")


def unused_stages(root: Path, *, without: Sequence[Path] = ()) -> list[Unused]:
    """Return the folders of stages that no run and no ablation uses, directly or as the input of another stage.

    Links, and folders that are outside of `root` because of a link, are left out.

    Args:
        root: the folder of all results.
        without: folders of runs that do not count.

    Raises:
        GR2Error: a file of a run or a stage is damaged, so that what it uses is unknown.
    """
    left_out = {folder.resolve() for folder in without}
    kept = [folder for folder in run_folders(root) if folder.resolve() not in left_out]
    used = {path.resolve() for folder in kept for run in seed_runs(folder) for path in stage_folders(run).values()}
    for file in root.glob(f"gr2/*/ablations/*/{RESULT}"):
        for variant in read_json(file)["variants"]:
            for stage in variant["stages"]:
                used |= {(file.parents[2] / "stages" / stage["stage"] / key).resolve() for key in stage["key"]}
    used = _with_inputs(used)
    folders = sorted(path for path in root.glob("gr2/*/stages/*/*") if path.is_dir() and not path.is_symlink())
    return [
        _described(folder, "finished" if (folder / MANIFEST).is_file() and not _is_removed(folder) else "unfinished")
        for folder in folders
        if folder.resolve() not in used and folder.resolve().is_relative_to(root.resolve())
    ]


def remove(folder: Path, root: Path) -> None:
    """Remove a folder of results.

    It is renamed first, so that an interruption leaves no incomplete stage under its name.

    Args:
        folder: the folder of a stage or a run.
        root: the folder of all results.

    Raises:
        ConfigurationError: the folder is not in `root`.
        GR2Error: another process works on the stage, or reads it.
    """
    if folder.is_symlink() or not folder.resolve().is_relative_to(root.resolve()):
        raise ConfigurationError(
            f"{folder} is not a folder of {root}",
            where=str(folder.resolve()),
            why="only folders of checkpoint_dir are removed",
            do="remove it yourself",
        )
    with locked(folder):
        hidden = folder if _is_removed(folder) else folder.rename(folder.with_name(REMOVED + folder.name))
        shutil.rmtree(hidden)


def _check_removable(folder: Path, removed: Sequence[Path], root: Path) -> None:
    """Check that a run is in `root`, and that no kept run of several seeds reports over it.

    Raises:
        ConfigurationError: it is not.
    """
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ConfigurationError(
            f"the run {folder} is not in {root}",
            where="--runs",
            why="only folders of checkpoint_dir are removed",
            do=f"name its folder of results, for example --checkpoint_dir {folder.absolute().parents[3]}",
        )
    for other in run_folders(root):
        kept = other.resolve() not in {each.resolve() for each in removed}
        if kept and folder.resolve() in {run.resolve() for run in seed_runs(other)}:
            raise ConfigurationError(
                f"the run {other.name} of several seeds reports over {folder.name}",
                where="--runs",
                why="it would name a run that does not exist",
                do=f"remove both: --runs {other.name},{folder.name}",
            )


def _with_inputs(used: Iterable[Path]) -> set[Path]:
    """Folders of stages, and of all stages that they were computed from."""
    pending, found = list(used), set()
    while pending:
        folder = pending.pop()
        if folder not in found:
            found.add(folder)
            record = read_manifest(folder)
            pending += [folder.parents[1] / name / key for name, key in (record.needs if record else {}).items()]
    return found


def _is_removed(folder: Path) -> bool:
    """Whether a removal of the folder was interrupted."""
    return folder.name.startswith(REMOVED)


def _described(folder: Path, what: str) -> Unused:
    # The time of a lock file is that of the last attempt to lock it.
    files = [file.lstat() for file in folder.rglob("*") if file.name != LOCK and not file.is_dir()]
    changed = max((status.st_mtime for status in files), default=folder.stat().st_mtime)
    return Unused(folder=folder, what=what, size=sum(status.st_size for status in files), changed=changed)


def _dataset(folder: Path) -> Path:
    """The folder of results of a data set, from that of a stage or of a run."""
    return folder.parents[2] if folder.parents[1].name == "stages" else folder.parents[1]


def _datasets(unused: Iterable[Unused]) -> list[Path]:
    return list(dict.fromkeys(_dataset(each.folder) for each in unused))


def _working(dataset: Path) -> str:
    """The stage of a data set that a process computes or reads, "" if there is none."""
    for lock in sorted(dataset.glob(f"stages/*/*/{LOCK}")):
        try:
            with locked(lock.parent):
                pass
        except GR2Error:
            return f"{lock.parent.parent.name}/{lock.parent.name}"
    return ""


def _size_text(count: int) -> str:
    for unit, name in UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def _age(changed: float) -> str:
    from recbole_gr2.preflight import duration

    return duration(max(time.time() - changed, 1))
