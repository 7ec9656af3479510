"""The result store: one folder per stage and key, finished by a manifest that is written last.

`<checkpoint_dir>/gr2/<dataset>/stages/<stage>/<key>/` contains the files of one stage. The key is a hash of everything
that determines them. A folder without a manifest belongs to an interrupted stage, which continues from its files.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from recbole_gr2 import __version__
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.types import StageRecord

MANIFEST = "manifest.json"
SCHEMA = 2  # version of the form of a manifest
LOCK = ".lock"
TEMPORARY = ".*.tmp"  # pattern of files that are renamed when they are complete
SMALL = 2**20  # bytes up to which the content of a file is checked whenever its stage is planned
RECENT = 10**8  # nanoseconds in which a file may change again without another time, because clocks are coarse
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
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
    """Return the record of a finished stage, or None if the stage is not finished.

    A manifest of an earlier schema has no checksums, so that its stage counts as interrupted.

    Raises:
        GR2Error: the manifest is damaged, or a newer version of the package wrote it.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    again = f"repeat the command with --from_stage {folder.parent.name}, to compute the stage again"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        schema = int(values.pop("schema", 0))
        if schema < SCHEMA:
            return None
        unknown = set(values) - {field.name for field in fields(StageRecord)}
        if schema == SCHEMA and not unknown:
            return StageRecord(**values)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise GR2Error(
            f"the manifest is damaged: {error}",
            where=str(file),
            why="it lists the results of the stage and their checksums",
            do=again,
        ) from error
    raise GR2Error(
        f"a newer version of the package wrote the manifest: schema {schema}"
        + (f", unknown fields {', '.join(sorted(unknown))}" if unknown else ""),
        where=str(file),
        why=f"this version, {__version__}, reads schema {SCHEMA}",
        do=f"install the newer version, or {again}",
    )


def write_manifest(folder: Path, record: StageRecord) -> None:
    """Finish a stage."""
    write_json(folder / MANIFEST, {"schema": SCHEMA, **asdict(record)})


def other_records(folder: Path) -> list[StageRecord]:
    """Return the records of the same stage under other keys, see `records_of`."""
    return records_of(folder.parent, without=folder)


def records_of(stage: Path, *, without: Path | None = None) -> list[StageRecord]:
    """Return the records of a stage under all keys, newest first. Manifests that cannot be read are left out.

    They only explain a plan.

    Args:
        stage: the folder that contains the folders of all keys.
        without: the folder of a key that is left out.
    """
    records = []
    for file in sorted(stage.glob(f"*/{MANIFEST}"), key=lambda file: file.stat().st_mtime, reverse=True):
        if file.parent != without:
            with contextlib.suppress(GR2Error):
                records.append(read_manifest(file.parent))
    return [record for record in records if record is not None]


def describe_files(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return size and checksum of files, as a manifest contains them."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(files)
    }


def check_files(folder: Path, record: StageRecord, *, contents: bool = False) -> None:
    """Check that the files of a finished stage are those that the stage wrote.

    Args:
        folder: the folder of the stage.
        record: its manifest.
        contents: whether to compare the checksums of all files. Otherwise those of large files are not computed.

    Raises:
        GR2Error: a file is missing, truncated or changed.
    """
    for name, expected in record.files.items():
        file = folder / name
        if not file.is_file():
            problem = "is missing"
        elif file.stat().st_size != expected["bytes"]:
            problem = f"has {file.stat().st_size:,} bytes instead of {expected['bytes']:,}"
        elif (contents or expected["bytes"] <= SMALL) and sha256(file) != expected["sha256"]:
            problem = "has another content than the stage wrote"
        else:
            continue
        raise GR2Error(
            f"{name} of the finished stage {record.stage} {problem}",
            where=str(file),
            why="the results of all later stages would be wrong",
            do=f"repeat the command with --from_stage {record.stage}, to compute this stage and the next ones again",
        )


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content. It is computed again if the size or the time of the file changes."""
    status = file.stat()
    if time.time_ns() - status.st_mtime_ns < RECENT:
        return _sha256.__wrapped__(file)
    return _sha256(file, status.st_size, status.st_mtime_ns, status.st_ino)


@cache
def _sha256(file: Path, *version: int) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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
        return sha256(Path(file))[:12]
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise _unreadable(file, error, where) from error


def _unreadable(file: str | Path, error: Exception, where: str) -> MissingFileError:
    return MissingFileError(
        f"the file {file} cannot be read: {error}", where=where, do="correct the path in this setting"
    )


def check_text(file: str | Path, *, where: str) -> None:
    """Check that a file is a text in UTF-8.

    Args:
        where: the setting that names the file.

    Raises:
        MissingFileError: the file cannot be read.
        ConfigurationError: it is empty, or not encoded in UTF-8.
    """
    count = 0  # lines read so far
    try:
        with open(file, encoding="utf-8") as lines:
            for count, _ in enumerate(lines, start=1):  # noqa: B007
                pass
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"the file {file} is not encoded in UTF-8", where=f"{where}, after line {count}", do="save it in UTF-8"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise _unreadable(file, error, where) from error
    if not count:
        raise ConfigurationError(f"the file {file} is empty", where=where, do="correct the path in this setting")


def folder_hash(folder: str | Path, *, where: str) -> str:
    """Return the hash of the files of a folder, their names included, 12 hexadecimal digits. Hidden files do not count.

    Args:
        where: the setting that names the folder.

    Raises:
        MissingFileError: the folder or one of its files cannot be read.
    """
    folder = Path(folder)
    files = _visible(folder)
    if not files:
        raise MissingFileError(
            f"there are no files in the folder {folder}", where=where, do="correct the path in this setting"
        )
    return _hash_of({file.relative_to(folder).as_posix(): file_hash(file, where=where) for file in files})


def _visible(folder: Path) -> list[Path]:
    """All files of a folder but hidden ones and Python's caches."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc")
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def text_hash(text: str) -> str:
    """Return the hash of a text, 12 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _hash_of(values: Mapping[str, str]) -> str:
    return text_hash(json.dumps(values, sort_keys=True))


def module_hash(module: str, *, where: str) -> str:
    """Return the hash of a user's module and of the modules that it imports, directly or indirectly.

    Modules of the same folder, or of the same package if it is installed, count. A package counts with all its files.
    Nothing is imported.

    Args:
        where: the setting that names the module.

    Raises:
        ConfigurationError: there is no such module, or one of the modules has a syntax error.
    """
    unknown = ConfigurationError(
        f"there is no module {module!r}", where=where, do="install it, or add its folder to PYTHONPATH"
    )
    if not all(module.split(".")):
        raise unknown
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)  # imports nothing, because the name has no parent
    except (ImportError, ValueError):  # not the name of a module
        spec = None
    places = [*(spec.submodule_search_locations or ()), spec.origin] if spec else []
    root = Path(places[0]).parent if places and places[0] else Path()
    file = Path(str(spec.origin)) if spec and module == top and spec.origin else _module_file(root, module)
    package = root.joinpath(*module.split("."))
    if not file.is_file() and not package.is_dir():
        raise unknown
    files = {module: file} if file.is_file() else {}
    pending = [module, *_parents(module)]
    if package.is_dir():
        files |= {str(each.relative_to(root)): each for each in _visible(package)}
        pending += [".".join(each.relative_to(root).with_suffix("").parts) for each in package.rglob("*.py")]
    installed = {"site-packages", "dist-packages"} & set(root.parts)
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        here = file if name == module else _module_file(root, name)
        other = installed and name.partition(".")[0] != top
        if name in seen or other or name.partition(".")[0] == PACKAGE or not here.is_file():
            continue
        seen.add(name)
        files[name] = here
        if here.suffix == ".py":
            pending += _imports(here, name, where)
    return _hash_of({name: file_hash(each, where=where) for name, each in files.items()})


def _module_file(root: Path, module: str) -> Path:
    """The file of a module below a folder of sys.path. It need not exist."""
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if (path / "__init__.py").is_file() else path.with_name(f"{path.name}.py")


def _parents(module: str) -> list[str]:
    """The packages that contain a module, which Python imports before it."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _imports(file: Path, module: str, where: str) -> list[str]:
    """The names that may be modules which a module imports, with their packages."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ConfigurationError(
            f"the module {module} has a syntax error: {error}",
            where=f"{where}: {file}",
            why="the run imports this module",
            do="correct the module",
        ) from error
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # The package that a relative import starts from. A module of a package is one level deeper.
            parts = module.split(".")[: None if file.name == "__init__.py" else -1]
            parts = parts[: len(parts) - (node.level - 1)] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [name for full in names if full for name in (*_parents(full), full)]


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False, what: str = "stage") -> Iterator[None]:
    """Hold the lock of a stage's folder, so that no run writes a stage that another one writes or reads.

    The lock ends with its process. A lock file that a killed process left is no lock.

    Args:
        folder: the folder of the stage.
        shared: whether to read the folder only. Several processes may do this at the same time.
        what: what the folder belongs to, for the error message.

    Raises:
        GR2Error: another process holds the lock, or the file system has no locks.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as handle:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise GR2Error(
                f"another process is working on this {what}{'' if shared else ', or reads its files'}",
                where=str(folder),
                why="its files could change while they are read",
                do="wait for it or stop it; the lock ends with its process",
            ) from error
        except OSError as error:
            raise GR2Error(
                f"the file system does not lock files: {error.strerror}",
                where=str(folder),
                why="two runs could write the same stage at the same time",
                do="set checkpoint_dir to a folder on a local disk",
            ) from error
        yield


@contextlib.contextmanager
def explained_disk_errors(folder: Path) -> Iterator[None]:
    """Within this context, report a full disk and a folder that cannot be written as an error of this package.

    Args:
        folder: where results are written.

    Raises:
        GR2Error: the disk is full, or a folder is not writable.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if isinstance(error, GR2Error):
            raise
        if number in NO_SPACE or _says_no_space(error, folder):
            raise GR2Error(
                f"the disk is full: {error}",
                where=f"{folder}: {_free(folder)} free",
                why="results cannot be written; finished stages and the last checkpoint are kept",
                do="free disk space, then repeat the command; checkpoint_dir chooses another folder",
            ) from error
        if isinstance(error, OSError) and number in NOT_WRITABLE:
            raise GR2Error(
                f"results cannot be written: {error.strerror}",
                where=str(error.filename or folder),
                why="a stage writes its files to its folder",
                do="make the folder writable, or choose another one with checkpoint_dir",
            ) from error
        raise


def _says_no_space(error: BaseException, folder: Path) -> bool:
    """Whether an error without errno comes from a full disk: libraries raise errors of their own.

    Those of safetensors and tokenizers contain the text of the system, those of torch and numpy do not.
    """
    if os.strerror(errno.ENOSPC) in str(error):
        return True
    return isinstance(error, OSError | RuntimeError) and shutil.disk_usage(existing_folder(folder)).free < SMALL


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(existing_folder(folder)).free / 2**20:,.0f} MiB"


def existing_folder(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists. A link exists even if its target does not."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))


def write_text(file: Path, text: str) -> None:
    """Write a text under a temporary name and rename it, so that the file is never incomplete."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def write_json(file: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    write_text(file, json.dumps(value, indent=1, default=str) + "\n")


def read_json(file: Path) -> Any:
    """Read a JSON file that the package wrote.

    Raises:
        GR2Error: the file is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GR2Error(
            f"the file is damaged: {error}",
            where=str(file),
            why="it records what an interrupted command has left to do",
            do="remove the file and repeat the command",
        ) from error


def write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write JSON lines under a temporary name, rename the file, and return the number of lines.

    Raises:
        ValueError: a number is not finite.
        TypeError: a value has no form in JSON.
    """
    temporary, count = file.with_name(f".{file.name}.tmp"), 0
    with open(temporary, "wb") as handle:
        for record in records:
            handle.write(_to_json(record) + b"\n")
            count += 1
    os.replace(temporary, file)
    return count


def _to_json(record: Mapping[str, Any]) -> bytes:
    """Return a record as JSON. It tries orjson, which takes a tenth of the time, and then the standard library.

    Raises:
        ValueError: a number is not finite.
        TypeError: a value has no form in JSON.
    """
    try:
        line = orjson.dumps(record)
    except TypeError:  # For example half of a surrogate pair, or a key that is no text.
        return json.dumps(record, allow_nan=False).encode()
    if b"null" in line:  # orjson writes null for a number that is not finite, which the standard library refuses here.
        json.dumps(record, allow_nan=False)
    return line


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
                record = _from_json(line)
            except (ValueError, RecursionError) as error:  # ValueError: also a number with thousands of digits
                raise GR2Error(
                    f"the line is not JSON: {error}",
                    where=f"{file}:{number}",
                    why="each line of the file is one JSON value",
                    do="remove or correct the line",
                ) from error
            yield number, record


def _from_json(line: bytes) -> Any:
    """Return the value of a line. It tries orjson, which takes a quarter of the time, and then the standard library.

    Raises:
        ValueError: the line is not JSON, or not encoded in UTF-8.
        RecursionError: its lists or objects are nested too deep.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:  # For example a byte order mark, or half of a surrogate pair, which teachers return.
        return json.loads(line.decode("utf-8-sig"))
