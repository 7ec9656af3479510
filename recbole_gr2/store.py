"""The result store: one folder per stage and key, finished by a manifest that is written last.

`<checkpoint_dir>/gr2/<dataset>/stages/<stage>/<key>/` contains the files of one stage. The key is a hash of everything
that determines them. A folder without a manifest belongs to an interrupted stage, which continues from its files.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from recbole_gr2 import __version__
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.types import StageRecord

MANIFEST = "manifest.json"
LOCK = ".lock"
PACKAGE = __name__.partition(".")[0]


def stage_key(stage: str, version: int, settings: Mapping[str, Any], needs: Mapping[str, str], data: str) -> str:
    """Return the name of a stage's folder, 12 hexadecimal digits.

    Args:
        stage: name of the stage.
        version: version of its code.
        settings: all values that can change its output.
        needs: keys of the stages that it reads, by name.
        data: fingerprint of the data set.
    """
    text = json.dumps([stage, version, settings, needs, data], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_manifest(folder: Path) -> StageRecord | None:
    """Return the record of a finished stage, or None if the stage is not finished."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    return StageRecord(**{**values, "files": tuple(values["files"])})


def write_manifest(folder: Path, record: StageRecord) -> None:
    """Finish a stage."""
    write_json(folder / MANIFEST, asdict(record))


def other_records(folder: Path) -> list[StageRecord]:
    """Return the records of the same stage under other keys, newest first."""
    manifests = sorted(folder.parent.glob(f"*/{MANIFEST}"), key=lambda file: file.stat().st_mtime, reverse=True)
    records = [read_manifest(file.parent) for file in manifests if file.parent != folder]
    return [record for record in records if record is not None]


def code_version(package: Path = Path(__file__).parent) -> str:
    """Return the package's version and, in a checkout, its commit. A + marks changed tracked files."""
    if not (package.parent / ".git").exists():
        return __version__
    ask = ["git", "-C", str(package), "describe", "--always", "--exclude=*", "--abbrev=8", "--dirty=+"]
    try:
        return f"{__version__} {subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):  # git is missing or refuses the folder
        return f"{__version__} unknown commit"


def source_hash(modules: Sequence[str], unused: Sequence[str] = ()) -> str:
    """Return a hash of the package's modules that these modules use, directly or indirectly, 12 hexadecimal digits.

    Comments, docstrings and formatting do not change the hash.

    Args:
        modules: full names of modules of this package.
        unused: modules that are left out together with what only they import.
    """
    pending, digests = list(modules), {}
    while pending:
        module = pending.pop()
        if module not in digests and module not in unused:
            digests[module], imported = _source(module)
            pending += imported
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]


@cache
def _source(module: str) -> tuple[str, tuple[str, ...]]:
    """The hash of a module's syntax tree, and the modules of this package that it imports."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"there is no module {module!r}")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            imported += [node.module, *(name for name in members if _is_module(name))]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    own = tuple(name for name in dict.fromkeys(imported) if name.split(".")[0] == PACKAGE)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), own


def _is_module(name: str) -> bool:
    if not name.startswith(f"{PACKAGE}."):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module and no package
        return False


def file_hash(file: str | Path, *, where: str) -> str:
    """Return the hash of a file's content, 12 hexadecimal digits.

    Args:
        where: the setting that names the file.

    Raises:
        MissingFileError: the file cannot be read.
    """
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise MissingFileError(
            f"the file {file} cannot be read: {error}", where=where, do="correct the path in this setting"
        ) from error


def module_hash(module: str, *, where: str) -> str:
    """Return the hash of a user's module, without importing it.

    Args:
        where: the setting that names the module.

    Raises:
        ConfigurationError: there is no such module.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # a parent package is missing
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f"there is no module {module!r}", where=where, do="install it, or add its folder to PYTHONPATH"
        )
    return file_hash(spec.origin, where=where)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a stage's folder, so that two runs never write the same stage.

    Raises:
        GR2Error: another process holds the lock.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise GR2Error(
                "another process is working on this stage",
                where=str(folder),
                do="wait for it or stop it; the lock ends with its process",
            ) from error
        yield


def write_json(file: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it, so that the file is never incomplete."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write JSON lines under a temporary name, rename the file, and return the number of lines."""
    temporary, count = file.with_name(f".{file.name}.tmp"), 0
    with open(temporary, "w", encoding="utf-8") as handle:
        for record in records:
            handle.write(json.dumps(record) + "\n")
            count += 1
    os.replace(temporary, file)
    return count


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON lines file, see `numbered_lines`."""
    for _, record in numbered_lines(file):
        yield record


def numbered_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1, and the record of each line of a JSON lines file. Blank lines are left out.

    Raises:
        GR2Error: a line is not JSON, or not encoded in UTF-8. The error names the line.
    """
    with open(file, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # ValueError: also a number with thousands of digits
                raise GR2Error(
                    f"the line is not JSON: {error}", where=f"{file}:{number}", do="remove or correct the line"
                ) from error
            yield number, record
