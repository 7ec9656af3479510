"""What the test files share: one thread, no network, a working folder of its own, and things that are built once."""

import contextlib
import io
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # two threads on a loaded machine are many times slower than one

# Ranking metrics that RecBole 1.2.1 has, in more digits than it prints, so that "equal" means equal.
METRICS = [
    "Recall",
    "MRR",
    "NDCG",
    "Hit",
    "Precision",
    "MAP",
    "GAUC",
    "ItemCoverage",
    "AveragePopularity",
    "ShannonEntropy",
    "GiniIndex",
    "TailPercentage",
]
EXACT = {"preset": "smoke", "metrics": METRICS, "topk": [1, 5, 10, 20], "metric_decimal_place": 12, "base_epochs": 1}


@pytest.fixture(scope="session", autouse=True)
def _working_folder(tmp_path_factory):
    """RecBole writes log_tensorboard/ wherever it is started."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@dataclass(frozen=True)
class Trained:
    """A data set, and a base model on it with the mask off and on."""

    settings: object
    data: object
    open: object  # BaseModel, seen items allowed
    masked: object  # the same weights, seen items at -inf


@pytest.fixture(scope="session")
def ml100k(tmp_path_factory):
    """ml100k(name): ml-100k and a base model trained for one epoch, once a session."""
    from recbole_gr2.bridge.data import Data
    from recbole_gr2.bridge.models import train_base
    from recbole_gr2.config import load_settings

    built = {}

    def build(name: str) -> Trained:
        if name not in built:
            settings = load_settings(config_dict={**EXACT, "base_model": name, "cand_exclude_seen": False})
            data = Data(settings)
            base = train_base(data, tmp_path_factory.mktemp(name) / "base", hold_out=False)
            built[name] = Trained(settings, data, base, replace(base, exclude_seen=True))
        return built[name]

    return build


@dataclass(frozen=True)
class SmokeRun:
    """A finished smoke run."""

    argv: list[str]
    root: Path  # its --checkpoint_dir
    path: Path  # of result.json
    stdout: str
    result: dict

    @property
    def stages(self) -> dict[str, Path]:
        """Stage name -> its folder."""
        run = json.loads((self.path.parent / "run.json").read_text())
        return {name: Path(folder) for name, folder in run["stages"].items()}


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> SmokeRun:
    """The command with `--preset smoke`, once a session. Do not write to its folders: copy `root` first."""
    from recbole_gr2.quick_start import main

    root = tmp_path_factory.mktemp("smoke")
    argv, stdout = ["--preset", "smoke", "--checkpoint_dir", str(root)], io.StringIO()
    with contextlib.redirect_stdout(stdout):
        code = main(argv)
    assert code == 0
    path = Path(stdout.getvalue().splitlines()[-1])
    return SmokeRun(argv, root, path, stdout.getvalue(), json.loads(path.read_text()))


@pytest.fixture(scope="session")
def beauty() -> Path:
    """The folder that holds amazon-beauty/."""
    folder = os.environ.get("RECBOLE_GR2_DATA")
    if not folder:
        pytest.skip("RECBOLE_GR2_DATA does not name the folder that holds amazon-beauty/")
    return Path(folder).resolve()
