"""Fixtures of the test files. Tests run in one thread, without network, and in a temporary working folder."""

import contextlib
import fcntl
import gc
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not occupy a core

import pytest
import yaml
from hypothesis import settings

# `pytest --hypothesis-profile=long FILE` tries many examples in the tests of FILE that do not set their number.
settings.register_profile("long", max_examples=int(os.environ.get("RECBOLE_GR2_EXAMPLES", "20000")), deadline=None)
settings.register_profile("short", max_examples=25, deadline=None)
settings.load_profile("short")

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


# Files that take longest, longest first. They run first, so that two processes end at about the same time.
LONGEST = ["tuning", "resume", "onerec_think", "pipeline", "api", "commands", "evaluate", "docs", "splits", "train"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest. xdist keeps this order with --no-loadscope-reorder."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """Leave all imported modules out of garbage collections. Each training ends with one, which takes 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _working_folder(tmp_path_factory):
    """Tests run in an empty folder, in which the libraries must not leave their logs, and in one thread."""
    import torch  # not at the top: the process that distributes the tests does not need it

    torch.set_num_threads(1)  # two threads on a loaded machine are many times slower than one
    before, folder = Path.cwd(), tmp_path_factory.mktemp("cwd")
    os.chdir(folder)
    yield
    os.chdir(before)
    logs = {"log", "log_tensorboard", "lightning_logs", "runs", "tmp_trainer", "trainer_output", "wandb"}
    assert not logs & {path.name for path in folder.iterdir()}


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Callable[[str], contextlib.AbstractContextManager[Path]]:
    """shared(name): a folder of all processes of this test run. One process at a time is in the `with` block."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each worker has its own folder in that of the test run

    @contextlib.contextmanager
    def locked(name: str) -> Iterator[Path]:
        (folder / f"shared-{name}").mkdir(exist_ok=True)
        with open(folder / f"shared-{name}.lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield folder / f"shared-{name}"

    return locked


@dataclass(frozen=True)
class Trained:
    """A data set, and a base model on it with the mask off and on."""

    settings: object
    data: object
    open: object  # BaseModel, seen items allowed
    masked: object  # the same weights, seen items at -inf


MOVIE_USERS = 150


@pytest.fixture(scope="session")
def movies_folder(tmp_path_factory) -> Path:
    """The folder of the data set `movies`: the first 150 users of ml-100k, all movies, and the ratings."""
    import pandas as pd
    import recbole

    source = Path(recbole.__file__).parent / "dataset_example" / "ml-100k"
    folder = tmp_path_factory.mktemp("data") / "movies"
    folder.mkdir()
    frame = pd.read_csv(source / "ml-100k.inter", sep="\t", dtype=str)
    users = frame["user_id:token"].drop_duplicates()[:MOVIE_USERS]
    frame[frame["user_id:token"].isin(users)].to_csv(folder / "movies.inter", sep="\t", index=False)
    (folder / "movies.item").write_text((source / "ml-100k.item").read_text())
    return folder.parent


MOVIES = {"dataset": "movies", "text_title": "movie_title", "text_categories": "class"}


@pytest.fixture(scope="session")
def movies(shared, movies_folder):
    """movies(name): the data set `movies` and a base model, which is trained once in a test run."""
    from recbole_gr2.bridge.data import Data
    from recbole_gr2.bridge.training import train_or_load
    from recbole_gr2.config import load_settings

    built = {}
    options = {**EXACT, **MOVIES, "data_path": str(movies_folder), "cand_exclude_seen": False}
    options |= {"base_epochs": 5, "base_learning_rate": 0.01}

    def build(name: str) -> Trained:
        if name not in built:
            changes = {"base_epochs": 2} if name == "CausalSASRec" else {}  # of a second each
            settings = load_settings(config_dict={**options, "base_model": name, **changes})
            data = Data(settings)
            with shared(name) as folder:
                base = train_or_load(data, folder / "base")
            built[name] = Trained(settings, data, base, replace(base, exclude_seen=True))
        return built[name]

    return build


# --- a small synthetic data set ---------------------------------------------------------------------------------------

USERS, KINDS, PER_KIND = 150, 6, 10
TINY = {
    "dataset": "tiny",
    "preset": "smoke",
    "text_categories": "categories",
    "text_brand": "brand",
    "base_epochs": 3,
    "base_learning_rate": 0.01,
    "cand_num": 5,
    "sid_codes": 8,
    "sid_levels": 3,
    "sid_hidden": [32],
    "sid_epochs": 20,
    "sid_batch_size": 16,
    "sid_min_unique": 0.5,
    "prior_steps": 10,
    "mid_tokens": 4000,
    "mid_embedding_tokens": 1000,
    "mid_batch_size": 8,
    "llm_random": {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "prompt_max_reasoning": 16,
    "sft_steps": 4,
    "score_steps": 4,
    "sft_check_lists": 4,
    "rl_steps": 2,
    "rl_prompts_per_step": 2,
    "rl_overlong_buffer": 4,
    "distilled_steps": 2,
    "onerec_think_steps": 4,
    "onerec_think_samples": 1,
    "onerec_think_beams": 4,
    "eval_draws": 200,
}


@pytest.fixture(scope="session")
def tiny_data(shared) -> Path:
    """The folder of the data set `tiny`: 150 users, 60 items of 6 kinds, 2 brands.

    The next item of a user is mostly the successor of the last one in a circle of its kind, so that every split has
    lists that contain their target. No user has an item twice.
    """
    with shared("tiny") as folder:
        if not (folder / "tiny").exists():
            (folder / "tiny").mkdir()
            _write_tiny(folder / "tiny")
    return folder


def _write_tiny(folder: Path) -> None:
    rng = random.Random(7)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(USERS):
        kind = rng.randrange(KINDS)
        item, seen = rng.randrange(PER_KIND), []
        for time in range(rng.randint(6, 12)):
            while (kind, item) in seen:
                item = (item + 1) % PER_KIND
                if all((kind, other) in seen for other in range(PER_KIND)):
                    kind = (kind + 1) % KINDS
            seen.append((kind, item))
            lines.append(f"u{user}\ti{kind}{item}\t{1 + (user + 2 * time) % 5}\t{1000 * user + time}")
            if rng.random() < 0.15:
                kind = rng.randrange(KINDS)
            item = (item + 1) % PER_KIND
    (folder / "tiny.inter").write_text("\n".join(lines) + "\n")
    names = ["lamp", "chair", "brush", "novel", "kettle", "racket"]
    lines = ["item_id:token\ttitle:token_seq\tcategories:token_seq\tbrand:token"]
    for kind in range(KINDS):
        for item in range(PER_KIND):
            title = f"{names[kind].title()} number {item}"
            lines.append(f"i{kind}{item}\t{title}\tThings > {names[kind].title()}s\t{('Acme', 'Bolt')[item % 2]}")
    (folder / "tiny.item").write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Run:
    """A finished run of some stages."""

    settings: Any
    data: Any
    folders: dict[str, Path]  # stage -> its folder
    records: dict[str, Any]  # stage -> its manifest

    def context(self, stage: str = "", folder: Path = Path("nowhere"), **changes: Any) -> Any:
        """The context of a stage of the same run, with other settings and another folder."""
        from recbole_gr2.types import Context

        return Context(
            stage=stage,
            settings={**self.settings, **changes} if changes else self.settings,
            data=self.data,
            folder=folder,
            inputs=self.records,
            folders=self.folders,
            say=lambda text: None,
        )


@pytest.fixture(scope="session")
def tiny_settings(tiny_data) -> Callable[..., Any]:
    """tiny_settings(root, key=value, ...): settings of a run of a few seconds on the data set `tiny`."""
    from recbole_gr2.config import load_settings

    def settings(root: Path | str, **changes: Any) -> Any:
        return load_settings(config_dict={**TINY, "data_path": str(tiny_data), "checkpoint_dir": str(root), **changes})

    return settings


@pytest.fixture(scope="session")
def tiny_run(tiny_settings) -> Callable[..., Run]:
    """tiny_run(root, stages, key=value, ...): run stages on the data set `tiny`, in the folder `root`."""
    from recbole_gr2 import pipeline
    from recbole_gr2.bridge.data import Data
    from recbole_gr2.console import Console

    def run(root: Path | str, stages: Sequence[str] = (), *, data: Any = None, **changes: Any) -> Run:
        settings = tiny_settings(root, **changes)
        data = data or Data(settings)
        planned = pipeline.plan(settings, data, stages=stages)
        done = pipeline.execute(planned, settings, data, Console())
        return Run(
            settings,
            data,
            {entry.stage.name: entry.folder for entry in planned},
            {entry.stage.name: record for entry, (record, _) in zip(planned, done, strict=True)},
        )

    return run


def called(argv: Sequence[str | Path]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    from recbole_gr2.quick_start import main

    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main([str(word) for word in argv])
    return code, stdout.getvalue(), stderr.getvalue()


@dataclass(frozen=True)
class Command:
    """A finished run of the command on the data set `tiny`."""

    argv: list[str]  # ends with checkpoint_dir
    root: Path  # checkpoint_dir
    path: Path  # of result.json
    stdout: str

    @property
    def result(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    @property
    def stages(self) -> dict[str, Path]:
        run = json.loads((self.path.parent / "run.json").read_text())
        return {name: Path(folder) for name, folder in run["stages"].items()}

    def copy(self, root: Path) -> list[str]:
        """The same command on a copy of its finished stages in the new folder `root`."""
        shutil.copytree(self.root, root, ignore=shutil.ignore_patterns("runs"))
        return [*self.argv[:-1], str(root)]


@pytest.fixture(scope="session")
def finished_command(shared, tiny_settings) -> Command:
    """All default stages on the data set `tiny`, run by the command once in a test run. Do not write to its folders."""
    with shared("command") as folder:
        config, root, stdout = folder / "tiny.yaml", folder / "saved", folder / "stdout"
        argv = ["--config_files", str(config), "--checkpoint_dir", str(root)]
        if not stdout.exists():
            settings = tiny_settings(root)
            values = {key: entry["value"] for key, entry in settings.chosen().items()}
            values |= {"preset": "smoke", "dataset": settings["dataset"], "data_path": settings["data_path"]}
            config.write_text(yaml.safe_dump(values))
            code, printed, errors = called(argv)
            assert code == 0, errors
            stdout.write_text(printed)
        printed = stdout.read_text()
    return Command(argv, root, Path(printed.splitlines()[-1]), printed)


@pytest.fixture(scope="session")
def finished(finished_command, tiny_settings) -> Run:
    """The run of `finished_command`. Do not write to its folders."""
    from recbole_gr2.bridge.data import Data
    from recbole_gr2.store import read_manifest

    settings = tiny_settings(finished_command.root)
    records = {name: read_manifest(folder) for name, folder in finished_command.stages.items()}
    return Run(settings, Data(settings), finished_command.stages, records)


@pytest.fixture(scope="session")
def finished_copy(finished_command, tmp_path_factory) -> Callable[[], Path]:
    """finished_copy(): a new folder with the finished stages, which `tiny_run` does not run again in it."""

    def copied() -> Path:
        root = tmp_path_factory.mktemp("copy") / "saved"
        finished_command.copy(root)
        return root

    return copied


@pytest.fixture(scope="session")
def context(finished) -> Any:
    """The folders of the run `finished`, as a stage sees them."""
    return finished.context()


@pytest.fixture(scope="session")
def catalog(context) -> Any:
    """The catalogue of the run `finished`, with semantic IDs."""
    from recbole_gr2.artifacts import load_catalog

    return load_catalog(context)


@pytest.fixture(scope="session")
def beauty() -> Path:
    """The folder that holds amazon-beauty/."""
    folder = os.environ.get("RECBOLE_GR2_DATA")
    if not folder:
        pytest.skip("RECBOLE_GR2_DATA does not name the folder that holds amazon-beauty/")
    return Path(folder).resolve()
