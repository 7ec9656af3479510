"""Where results live: content-addressed stage folders, finished by a manifest that is written last.

`<checkpoint_dir>/gr2/<dataset>/stages/<stage>/<key>/` holds one stage's files; its key hashes everything that can
change them. A folder without a manifest belongs to a run that was stopped: the stage goes on from what it finds
there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recbole_gr2 import __version__
from recbole_gr2.errors import GR2Error
from recbole_gr2.types import StageRecord

MANIFEST = "manifest.json"


def stage_key(stage: str, version: int, settings: Mapping[str, Any], needs: Mapping[str, str], data: str) -> str:
    """Name of a stage's folder: a hash of its version, result settings, inputs' keys and data fingerprint."""
    text = json.dumps([stage, version, settings, needs, data], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_manifest(folder: Path) -> StageRecord | None:
    """The record of a finished stage, or None if it is not finished."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    return StageRecord(**{**values, "files": tuple(values["files"])})


def code_version(package: Path = Path(__file__).parent) -> str:
    """The package's version and, in a checkout, its commit, with a + where tracked files differ from it."""
    if not (package.parent / ".git").exists():
        return __version__
    ask = ["git", "-C", str(package), "describe", "--always", "--exclude=*", "--abbrev=8", "--dirty=+"]
    try:
        return f"{__version__} {subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):  # no git here, or it refuses the folder
        return f"{__version__} unknown commit"


def write_manifest(folder: Path, record: StageRecord) -> None:
    """Finish a stage."""
    write_json(folder / MANIFEST, asdict(record))


def other_records(folder: Path) -> list[StageRecord]:
    """Finished records of the same stage under other keys, newest first."""
    manifests = sorted(folder.parent.glob(f"*/{MANIFEST}"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [read_manifest(file.parent) for file in manifests if file.parent != folder]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file; two runs never write one stage.

    Raises:
        GR2Error: another process holds it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise GR2Error(
                "another process is working on this stage",
                where=str(folder),
                do="wait for it, or stop it; the lock goes with its process",
            ) from error
        yield


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that the file is either old or whole."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write JSON lines so that the file is either old or whole. Returns their number."""
    temporary, count = file.with_name(f".{file.name}.tmp"), 0
    with open(temporary, "w", encoding="utf-8") as handle:
        for record in records:
            handle.write(json.dumps(record) + "\n")
            count += 1
    os.replace(temporary, file)
    return count


def read_lines(file: Path) -> Iterator[dict]:
    """Records of a JSON lines file.

    Raises:
        GR2Error: a line is not JSON; says which.
    """
    with open(file, encoding="utf-8") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise GR2Error(f"not a JSON line: {error}", where=f"{file}:{number}", do="remove or mend it") from error
