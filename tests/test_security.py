"""Nothing is unpickled or executed that the run did not write itself."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import recbole_gr2
from recbole_gr2.config import values
from recbole_gr2.errors import MissingFileError
from recbole_gr2.llm.model import load_saved, random_model
from recbole_gr2.sid.embed import embed_texts

SOURCES = sorted(Path(recbole_gr2.__file__).parent.rglob("*.py"))
UNPICKLES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def unsafe_calls(source: str) -> list[str]:
    """Calls that execute code from a file or a text, in the order of the source."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            found += [f"import {name}" for name in sorted(UNPICKLES & modules)]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg}
        attribute = name.rsplit(".", 1)[-1]
        unsafe = (
            name in ("eval", "exec", "builtins.eval", "builtins.exec")
            or attribute == "read_pickle"
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False")
            or (
                name in ("yaml.load", "yaml.load_all")
                and given.get("Loader") not in ("SettingsLoader", "yaml.SafeLoader")
            )
            or attribute in ("unsafe_load", "full_load")
            or (attribute == "from_pretrained" and given.get("trust_remote_code") != "False")
            or (
                name.endswith(("Model.from_pretrained", "LM.from_pretrained"))
                and not {"use_safetensors", "gguf_file"} & set(given)
            )
            or given.get("trust_remote_code", "False") != "False"
            or given.get("allow_pickle", "False") != "False"
        )
        if unsafe:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(SOURCES[0].parent)))
def test_no_source_file_unpickles_or_evaluates(file):
    assert unsafe_calls(file.read_text(encoding="utf-8")) == []


def test_the_yaml_loader_is_safe():
    assert issubclass(values.SettingsLoader, yaml.SafeLoader)
    with pytest.raises(ValueError, match="could not determine a constructor"):
        values.read_yaml("!!python/object/apply:os.getcwd []")


@pytest.mark.parametrize(
    "call",
    [
        "import pickle",
        "from joblib import load",
        "pd.read_pickle(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "np.load(f)",
        "yaml.load(f, Loader=yaml.FullLoader)",
        "yaml.unsafe_load(f)",
        "AutoTokenizer.from_pretrained(f)",
        "AutoModel.from_pretrained(f, trust_remote_code=False)",
        "load(f, trust_remote_code=True)",
        "eval(text)",
        "exec(text)",
    ],
)
def test_each_unsafe_call_is_found(call):
    assert len(unsafe_calls(call)) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model with safetensors."""
    model, tokenizer = random_model(["a small text"], config={"vocab_size": 300, "hidden_size": 32})
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    "read", [load_saved, lambda path: embed_texts(["text"], path)], ids=["language model", "encoder"]
)
def test_weights_that_are_a_pickle_are_refused(folder, tmp_path, read):
    path, trap = copied(folder, tmp_path / "model"), tmp_path / "executed"
    (path / "model.safetensors").unlink()
    torch.save({"weight": Trap(trap)}, path / "pytorch_model.bin")
    with pytest.raises(MissingFileError, match="safetensors"):
        read(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "read", [load_saved, lambda path: embed_texts(["text"], path)], ids=["language model", "encoder"]
)
def test_code_in_a_model_folder_is_not_executed(folder, tmp_path, read):
    path, trap = copied(folder, tmp_path / "model"), tmp_path / "executed"
    settings = json.loads((path / "config.json").read_text())
    settings |= {
        "model_type": "unknown",
        "auto_map": {name: f"own.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")},
    }
    (path / "config.json").write_text(json.dumps(settings))
    (path / "own.py").write_text(f"open({str(trap)!r}, 'w')\n")
    with pytest.raises(MissingFileError):
        read(path)
    assert not trap.exists()


def test_arrays_of_objects_are_refused(tmp_path):
    from recbole_gr2.artifacts import read_embeddings

    trap = tmp_path / "executed"
    np.save(tmp_path / "embeddings.npy", np.array([Trap(trap)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_embeddings(tmp_path)
    assert not trap.exists()
