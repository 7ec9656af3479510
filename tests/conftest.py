"""Fixtures of the test files. Tests run in one thread, without network, and in a temporary working folder."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not occupy a core

import pytest
import torch
from hypothesis import settings

# `pytest --hypothesis-profile=long FILE` tries many examples in the tests of FILE that do not set their number.
settings.register_profile("long", max_examples=int(os.environ.get("RECBOLE_GR2_EXAMPLES", "20000")), deadline=None)
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
    """Tests run in an empty folder, in which the libraries must not leave their logs."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("cwd")
    os.chdir(folder)
    yield
    os.chdir(before)
    logs = {"log", "log_tensorboard", "lightning_logs", "runs", "tmp_trainer", "trainer_output", "wandb"}
    assert not logs & {path.name for path in folder.iterdir()}


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
def movies(tmp_path_factory, movies_folder):
    """movies(name): the data set `movies` and a base model, trained once a session."""
    from recbole_gr2.bridge.data import Data
    from recbole_gr2.bridge.training import train_or_load
    from recbole_gr2.config import load_settings

    built = {}
    options = {**EXACT, **MOVIES, "data_path": str(movies_folder), "cand_exclude_seen": False}
    options |= {"base_epochs": 5, "base_learning_rate": 0.01}

    def build(name: str) -> Trained:
        if name not in built:
            settings = load_settings(config_dict={**options, "base_model": name})
            data = Data(settings)
            base = train_or_load(data, tmp_path_factory.mktemp(name) / "base")
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
    "prior_steps": 30,
    "mid_tokens": 4000,
    "mid_embedding_tokens": 1000,
    "mid_batch_size": 8,
    "llm_random": {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "prompt_max_reasoning": 16,
    "sft_steps": 4,
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
def tiny_data(tmp_path_factory) -> Path:
    """The folder of the data set `tiny`: 150 users, 60 items of 6 kinds, 2 brands.

    The next item of a user is mostly the successor of the last one in a circle of its kind, so that every split has
    lists that contain their target. No user has an item twice.
    """
    rng, folder = random.Random(7), tmp_path_factory.mktemp("data") / "tiny"
    folder.mkdir()
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
    return folder.parent


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


@pytest.fixture(scope="session")
def finished(tiny_run, tmp_path_factory) -> Run:
    """A run of all default stages on the data set `tiny`. Do not write to its folders."""
    return tiny_run(tmp_path_factory.mktemp("finished"))


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
