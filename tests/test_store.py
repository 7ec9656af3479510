"""The result store: keys, manifests, hashes of sources and files, locks, and files that are never incomplete."""

import json
import subprocess
import sys

import pytest

import recbole_gr2
from recbole_gr2 import store
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.store import (
    code_version,
    file_hash,
    locked,
    module_hash,
    other_records,
    read_lines,
    read_manifest,
    source_hash,
    stage_key,
    write_json,
    write_lines,
)


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
    assert first == file_hash(file, where="x") and len(first) == 12
    file.write_text("changed")
    assert module_hash("my_module", where="x") != first
    with pytest.raises(ConfigurationError, match="no module 'no_such_module'"):
        module_hash("no_such_module", where="x")
    with pytest.raises(MissingFileError, match="gone") as error:
        file_hash(tmp_path / "gone", where="trace_file")
    assert error.value.where == "trace_file"


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
    write_json(tmp_path / "x.json", {"a": [1]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1]}


def test_locks(tmp_path):
    with locked(tmp_path / "stage"), pytest.raises(GR2Error, match="another process"), locked(tmp_path / "stage"):
        pass
    with locked(tmp_path / "stage"):
        pass


def test_a_folder_without_manifest(tmp_path):
    assert read_manifest(tmp_path) is None and other_records(tmp_path / "rl" / "key") == []
