"""The result store: keys, manifests, hashes of sources and files, locks, and files that are never incomplete."""

import errno
import fcntl
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import recbole_gr2
from recbole_gr2 import store
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.llm.download import identity
from recbole_gr2.store import (
    LOCK,
    MANIFEST,
    SCHEMA,
    SMALL,
    check_files,
    code_version,
    describe_files,
    explained_disk_errors,
    file_hash,
    folder_hash,
    locked,
    module_hash,
    other_records,
    read_json,
    read_lines,
    read_manifest,
    source_hash,
    stage_key,
    write_json,
    write_lines,
    write_manifest,
)
from recbole_gr2.types import Candidate, StageRecord


def test_everything_that_determines_a_stage_is_in_its_key():
    settings = {"a": 1}
    keys = {
        stage_key("rl", 1, settings, {"sft": "x"}, "data"),
        stage_key("sft", 1, settings, {"sft": "x"}, "data"),
        stage_key("rl", 2, settings, {"sft": "x"}, "data"),
        stage_key("rl", 1, {"a": 2}, {"sft": "x"}, "data"),
        stage_key("rl", 1, settings, {"sft": "y"}, "data"),
        stage_key("rl", 1, settings, {"sft": "x"}, "other"),
    }
    assert len(keys) == 6
    assert stage_key("rl", 1, {"b": 2, "a": 1}, {}, "") == stage_key("rl", 1, {"a": 1, "b": 2}, {}, "")


def test_code_version(tmp_path):
    """The version only where the package is installed; in a checkout also the commit, with a mark on changed files."""
    package = tmp_path / "recbole_gr2"
    package.mkdir()
    (package / "__init__.py").write_text("one")
    assert code_version(package) == recbole_gr2.__version__
    (tmp_path / ".git").mkdir()  # git does not know this repository
    assert code_version(package) == f"{recbole_gr2.__version__} unknown commit"
    (tmp_path / ".git").rmdir()
    for words in (
        ["init", "-q"],
        ["add", "recbole_gr2"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"],
        ["tag", "v1"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = code_version(package)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    version, short = clean.split()
    assert version == recbole_gr2.__version__ and len(short) == 8 and head.startswith(short)
    (package / "__init__.py").write_text("two")
    assert code_version(package) == clean + "+"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(**sources): a package `sample` with these modules, and the hash of what `sample.main` uses."""
    monkeypatch.setattr(store, "PACKAGE", "sample")
    monkeypatch.syspath_prepend(str(tmp_path))

    def build(unused=(), **sources: str) -> str:
        folder = tmp_path / "sample"
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text("")
        for name, text in sources.items():
            (folder / f"{name}.py").write_text(text)
        for name in [name for name in sys.modules if name.partition(".")[0] == "sample"]:
            del sys.modules[name]
        store._source.cache_clear()
        return source_hash(["sample.main"], unused)

    yield build
    store._source.cache_clear()


def test_the_source_hash_follows_imports(package):
    main = "from sample import other\nfrom sample.third import f\n"
    first = package(main=main, other="A = 1\n", third="def f():\n    import sample.deep\n", deep="B = 1\n", alone="")
    assert package(alone="C = 2\n") == first
    assert (
        package(main=f'"""Docstring."""\n\n{main}# comment\n', third='def f():\n    "Doc."\n    import  sample.deep\n')
        == first
    )
    assert package(deep="B = 2\n") != first  # imported in a function
    assert package(deep="B = 1\n") == first
    assert package(other="A = 2\n") != first
    assert package(unused=("sample.other",)) == package(unused=("sample.other",), other="A = 3\n")


def test_file_and_module_hashes(tmp_path, monkeypatch):
    file = tmp_path / "my_module.py"
    file.write_text("raise RuntimeError('imported')")  # hashing does not import
    monkeypatch.syspath_prepend(str(tmp_path))
    first = module_hash("my_module", where="x")
    assert len(first) == 12
    file.write_text("changed")
    assert module_hash("my_module", where="x") != first
    with pytest.raises(ConfigurationError, match="no module 'no_such_module'"):
        module_hash("no_such_module", where="x")
    for name in ("", ".", "a..b"):
        with pytest.raises(ConfigurationError, match="there is no module"):
            module_hash(name, where="x")
    with pytest.raises(MissingFileError, match="gone") as error:
        file_hash(tmp_path / "gone", where="trace_file")
    assert error.value.where == "trace_file"


@pytest.fixture
def user_modules(tmp_path, monkeypatch):
    """user_modules({path: text, ...}, module): write modules, and return the hash of a module."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def build(texts=None, module="plugin") -> str:
        for name, text in (texts or {}).items():
            file = tmp_path / f"{name}.py"
            file.parent.mkdir(exist_ok=True, parents=True)
            file.write_text(text)
        importlib.invalidate_caches()
        return module_hash(module, where="rl_rewards")

    return build


def test_a_module_counts_with_what_it_imports_from_its_folder(user_modules):
    plugin = "import json\nfrom helper import f\ndef g():\n    import deep.part\n"
    user_modules({"plugin": plugin, "helper": "import second", "second": "A = 1", "alone": ""})
    before = user_modules({"deep/__init__": "", "deep/part": "B = 1", "deep/other": ""})
    assert user_modules({"alone": "C = 2", "deep/other": "C = 2"}) == before
    for name in ("second", "deep/part", "deep/__init__", "helper", "plugin"):
        after = user_modules({name: "A = 3"})
        assert after != before, name
        before = after
    with pytest.raises(ConfigurationError, match="syntax error") as error:
        user_modules({"plugin": "def"})
    assert "rl_rewards" in error.value.where and "plugin.py" in error.value.where


def test_relative_imports_are_followed(user_modules):
    texts = {"a": "from . import b\nfrom .sub.c import x\n", "b": "", "d": "", "other": "", "__init__": "fail(1)"}
    texts |= {"sub/__init__": "", "sub/c": "from ..d import y"}
    before = user_modules({f"pack/{name}": text for name, text in texts.items()}, "pack.a")
    assert user_modules({"pack/other": "changed = 1"}, "pack.a") == before
    for name in ("d", "sub/c", "sub/__init__", "b", "__init__", "a"):
        after = user_modules({f"pack/{name}": "changed = 1"}, "pack.a")
        assert after != before, name
        before = after


def test_a_package_counts_with_all_its_files(user_modules, tmp_path):
    hashes = [user_modules({"pack/__init__": "", "pack/a": "import helper", "helper": ""}, "pack")]
    hashes.append(user_modules({"pack/a": "import helper  # changed"}, "pack"))
    hashes.append(user_modules({"helper": "A = 1"}, "pack"))
    (tmp_path / "pack" / "weights.json").write_text("{}")
    hashes.append(user_modules({}, "pack"))
    assert len(set(hashes)) == 4
    (tmp_path / "pack" / "__pycache__").mkdir()
    (tmp_path / "pack" / "__pycache__" / "a.pyc").write_bytes(b"x")
    assert user_modules({}, "pack") == hashes[-1]


def test_a_folder_counts_with_its_visible_files(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "sub" / "config.json").write_text("{}")
    first = folder_hash(folder, where="llm")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "time").write_text("now")
    os.utime(folder / "model.safetensors", (1.0, 1.0))
    assert folder_hash(folder, where="llm") == first == folder_hash(folder.rename(tmp_path / "other"), where="llm")
    folder = tmp_path / "other"
    (folder / "model.safetensors").write_bytes(b"Weights")
    assert (second := folder_hash(folder, where="llm")) != first
    (folder / "sub" / "config.json").rename(folder / "config.json")
    assert folder_hash(folder, where="llm") != second
    with pytest.raises(MissingFileError, match="no files"):
        folder_hash(tmp_path / "nowhere", where="llm")


def test_what_identifies_a_model(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert identity("Qwen/Qwen3-0.6B", where="llm") == "Qwen/Qwen3-0.6B"
    assert identity("all-minilm-l6-v2", where="sid_encoder") == "all-minilm-l6-v2 0.1.0"
    before = identity(str(base), where="llm"), identity(str(adapter), where="llm")
    assert before[0].startswith("folder ") and before[0] in before[1] != before[0]
    (base / "model.safetensors").write_bytes(b"Weights")
    after = identity(str(base), where="llm"), identity(str(adapter), where="llm")
    assert before[0] != after[0] and before[1] != after[1]


@pytest.fixture
def finished(tmp_path):
    """A finished stage with a small and a large file: its folder and its record."""
    folder = tmp_path / "stages" / "prior" / "0123456789ab"
    folder.mkdir(parents=True)
    (folder / "small.json").write_text("{}")
    (folder / "large.npy").write_bytes(bytes(SMALL + 1))
    record = StageRecord(
        stage="prior",
        key=folder.name,
        version=1,
        needs={},
        settings={},
        seconds=1.0,
        peak_memory_mb=1.0,
        files=describe_files(folder, [folder / "small.json", folder / "large.npy"]),
    )
    write_manifest(folder, record)
    return folder, read_manifest(folder)


def test_a_manifest_has_a_checksum_for_each_file(finished):
    folder, record = finished
    values = json.loads((folder / MANIFEST).read_text())
    assert values["schema"] == SCHEMA and list(values["files"]) == ["large.npy", "small.json"]
    assert values["files"]["small.json"] == {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    check_files(folder, record, contents=True)


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "message", "contents"),
    [
        (lambda file: file.unlink(), "large.npy", "is missing", False),
        (lambda file: os.truncate(file, 7), "large.npy", "has 7 bytes instead of 1,048,577", False),
        (flip, "small.json", "has another content", False),
        (flip, "large.npy", "has another content", True),
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_repair(finished, damage, name, message, contents):
    folder, record = finished
    damage(folder / name)
    with pytest.raises(GR2Error, match=f"{name} of the finished stage prior {message}") as error:
        check_files(folder, record, contents=contents)
    assert error.value.where == str(folder / name) and "--from_stage prior" in error.value.do


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "the manifest is damaged"),
        (lambda text: text[: len(text) // 2], "the manifest is damaged"),
        (lambda text: "[1]", "the manifest is damaged"),
        (lambda text: text.replace('"key"', '"kee"'), "unknown fields kee"),
        (lambda text: text.replace(f'"schema": {SCHEMA}', '"schema": 99'), "newer version of the package"),
        (lambda text: text.replace('"stage"', '"inventions": 1, "stage"'), "unknown fields inventions"),
        (lambda text: text.replace(' "stage": "prior",', ""), "the manifest is damaged"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_one_error(finished, change, message):
    folder, _ = finished
    (folder / MANIFEST).write_text(change((folder / MANIFEST).read_text()))
    with pytest.raises(GR2Error, match=message) as error:
        read_manifest(folder)
    assert error.value.where == str(folder / MANIFEST) and "--from_stage prior" in error.value.do
    assert other_records(folder.with_name("other key")) == []  # it explains nothing, but it stops nothing


def test_a_stage_with_a_manifest_of_an_earlier_version_is_not_finished(finished):
    folder, _ = finished
    values = json.loads((folder / MANIFEST).read_text())
    del values["schema"]
    write_json(folder / MANIFEST, {**values, "files": list(values["files"])})
    assert read_manifest(folder) is None


def test_files_are_old_or_complete(tmp_path):
    file = tmp_path / "lines.jsonl"
    assert write_lines(file, ({"n": n} for n in range(3))) == 3
    assert list(read_lines(file)) == [{"n": 0}, {"n": 1}, {"n": 2}]
    with pytest.raises(ZeroDivisionError):
        write_lines(file, ({"n": 1 / n} for n in (1, 0)))
    assert len(list(read_lines(file))) == 3
    file.write_text('{"n": 1}\n\n{"n": \n')
    with pytest.raises(GR2Error, match="lines.jsonl:3"):
        list(read_lines(file))
    write_lines(file, [{"tuple": (1, 2.5, -1e-7), "none": None, "text": "null \u00fc"}])
    assert list(read_lines(file)) == [{"tuple": [1, 2.5, -1e-7], "none": None, "text": "null \u00fc"}]
    for record in ({"score": float("nan")}, {"score": float("inf"), "half of a pair": "\ud83d"}):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_lines(file, [record])
    assert len(list(read_lines(file))) == 1  # The file of an error stays as it was.
    odd = {"half of a pair": "\ud83d", "float64": np.float64(0.5), "large": 2**70, "named": Candidate(1, 0.5, 1)}
    write_lines(file, [odd])
    assert list(read_lines(file)) == [{**odd, "named": [1, 0.5, 1]}]
    write_json(tmp_path / "x.json", {"a": [1]})
    assert read_json(tmp_path / "x.json") == {"a": [1]}
    (tmp_path / "x.json").write_text("[")
    with pytest.raises(GR2Error, match="the file is damaged") as error:
        read_json(tmp_path / "x.json")
    assert error.value.where == str(tmp_path / "x.json")


def test_locks(tmp_path):
    folder = tmp_path / "stage"
    with locked(folder), pytest.raises(GR2Error, match="another process"), locked(folder):
        pass
    assert (folder / LOCK).exists()  # as after a kill: the file is no lock
    with locked(folder):
        pass
    with locked(folder, shared=True):
        with locked(folder, shared=True):
            pass
        with pytest.raises(GR2Error, match="or reads its files"), locked(folder):
            pass
    with locked(folder), pytest.raises(GR2Error, match="another process"), locked(folder, shared=True):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(GR2Error, match="does not lock files: No locks available") as error, locked(tmp_path):
        pass
    assert "local disk" in error.value.do


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # safetensors and tokenizers
    ],
)
def test_a_full_disk_is_one_error(tmp_path, error):
    with pytest.raises(GR2Error, match="the disk is full") as raised, explained_disk_errors(tmp_path / "not" / "yet"):
        raise error
    assert re.search(r"not/yet: [\d,]+ MiB free", raised.value.where) and "repeat the command" in raised.value.do


def test_libraries_hide_a_full_disk(tmp_path, monkeypatch):
    """torch and numpy raise errors without the reason of the system."""
    hidden = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    with pytest.raises(RuntimeError, match="PytorchStreamWriter"), explained_disk_errors(tmp_path):
        raise hidden
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(GR2Error, match="the disk is full"), explained_disk_errors(tmp_path):
        raise hidden
    with pytest.raises(ValueError, match="of another kind"), explained_disk_errors(tmp_path):
        raise ValueError("of another kind")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_one_error(tmp_path, number):
    with pytest.raises(GR2Error, match="cannot be written") as raised, explained_disk_errors(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "file"))
    assert raised.value.where == str(tmp_path / "file") and "checkpoint_dir" in raised.value.do


def test_a_folder_without_manifest(tmp_path):
    assert read_manifest(tmp_path) is None and other_records(tmp_path / "rl" / "key") == []
