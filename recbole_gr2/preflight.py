"""Checks before a run, cheap ones first, and an estimate of its costs.

`check` needs neither torch nor the data: names, the data set, folders. `check_resources` follows the plan and compares
the memory of the GPU and the free disk space with what the language model needs. `expected_time` estimates the time of
a stage from earlier runs.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from recbole_gr2.config import Settings, first_comment, properties_folder, read_yaml, recbole_properties
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError, nearest
from recbole_gr2.pipeline import Planned, changed_settings
from recbole_gr2.rewards import WeightedRewards
from recbole_gr2.stages import check_names
from recbole_gr2.store import existing_folder, other_records, read_manifest, records_of
from recbole_gr2.tracking import check_trackers
from recbole_gr2.types import StageRecord

LEAST_FREE = 50 * 2**20  # bytes; a smaller disk cannot even hold the lists and features of a small data set
LLM = "llm"
LANGUAGE_MODEL = (LLM, "llm_layers", "llm_random")  # settings of its size, in the key of the stage that loads it first
TRAINS = "llm_lora_rank"  # a stage with this setting in its key trains a language model
GPU_PRESETS = ("gpu", "paper")
OPERATIONS = 6  # for each weight and token of a training: 2 forward, 4 backward
USED = 0.2  # share of the speed of matrix products that training reached. Measured: 16 to 26 % on two CPU cores.
GIB = 2**30
PACKAGED_DATASET = "ml-100k"  # part of the RecBole package


def check(settings: Settings, stages: Sequence[str] = ()) -> None:
    """Check names, the data set and the folders of a run, without an import of torch.

    Args:
        settings: settings of the run.
        stages: names of stages that the command contains.

    Raises:
        ConfigurationError: a name does not exist, or `checkpoint_dir` cannot be written to.
        DependencyError: the package of a tracker is missing.
        MissingFileError: there is no such data set.
    """
    check_names(stages, settings)
    WeightedRewards(settings["rl_rewards"])
    check_trackers(settings["report_to"])
    check_dataset(settings)
    check_folder(settings.results_folder, where=f"checkpoint_dir {settings['checkpoint_dir']}")


def check_dataset(settings: Settings) -> None:
    """Check that a data set is in `data_path`, part of RecBole, or can be downloaded by RecBole.

    Raises:
        MissingFileError: it is none of these. The error names similar data sets.
    """
    name, root = settings["dataset"], Path(settings["data_path"])
    downloads = read_yaml((recbole_properties() / "dataset" / "url.yaml").read_text(encoding="utf-8"))
    try:
        here = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError:
        here = []
    if name in here or name in downloads or name == PACKAGED_DATASET:
        return
    near = nearest(name, [*here, *downloads, PACKAGED_DATASET], cutoff=0.6)
    raise MissingFileError(
        f"there is no data set {name!r}",
        where=str(root.absolute()),
        why="the folder is not there, and RecBole has no data set of this name to download",
        do=(f"did you mean {', '.join(near)}? " if near else "")
        + f"Put {name}.inter and {name}.item (RecBole atomic files) into {root / name}, or name the folder that holds "
        f"{name}/ with --data_path DIR. recbole-gr2 data convert makes these files of CSV, JSON lines or Parquet",
    )


def check_folder(folder: Path, *, where: str) -> None:
    """Check that a folder, or the nearest existing folder above it, can be written to and has some free space.

    Nothing is left in the folder.

    Args:
        folder: the folder. It need not exist.
        where: the setting that names it, for the error message.

    Raises:
        ConfigurationError: the folder cannot be written to, or the disk is full.
    """
    try:
        existing = existing_folder(folder)
        with tempfile.TemporaryDirectory(prefix=".check-", dir=existing) as scratch:
            (Path(scratch) / folder.absolute().relative_to(existing)).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise ConfigurationError(
            f"the folder {folder} cannot be written to: {error.strerror or error}",
            where=where,
            why="all results are stored there",
            do="name a folder that you can write to, for example --checkpoint_dir DIR",
        ) from error
    if free < LEAST_FREE:
        raise ConfigurationError(
            f"{free / 2**20:.0f} MiB are free on the disk of {folder}, and a run needs at least "
            f"{LEAST_FREE / 2**20:.0f} MiB",
            where=where,
            why="a stage would stop while it writes its results",
            do="remove files, or name a folder on another disk",
        )


def check_resources(
    planned: Sequence[Planned], settings: Settings, say: Callable[[str], None], *, dry_run: bool = False
) -> None:
    """Check that the language model fits the GPU and that its checkpoints fit the disk.

    The size of the model follows from its configuration; its weights are not loaded. Both bounds are lower bounds:
    activations and other files need more. Training times of stages without an earlier run follow from the number of
    weights and tokens and from the speed of a matrix product.

    Args:
        planned: the plan.
        settings: settings of the run.
        say: prints a line.
        dry_run: whether nothing will run. Then a packaged model that is not on this machine yet is not fetched.

    Raises:
        ConfigurationError: the GPU or the disk is too small, or a layer of `llm_layers` does not exist.
        MissingFileError: there is no such model.
    """
    training = [entry.stage.name for entry in planned if not entry.finished and TRAINS in entry.settings]
    if not training:
        return
    if settings["preset"] in GPU_PRESETS and gpu_memory() is None:
        say(f"there is no GPU: the preset {settings['preset']} is made for one, and training on the CPU can take days")
    from recbole_gr2.llm.download import PACKAGED, is_cached
    from recbole_gr2.llm.model import device, uses_bf16
    from recbole_gr2.llm.size import Size, model_size

    if dry_run and settings["llm"] in PACKAGED and not is_cached(settings["llm"]):
        say(f"memory and disk space of {settings['llm']} are not checked: the first run downloads it")
        return
    size: Size = model_size(settings)
    lora = bool(settings[TRAINS])
    memory, disk = size.training_bytes(lora=lora), size.disk_bytes(len(training), lora=lora)
    say(
        f"{settings['llm']}: {size.parameters / 1e6:,.1f} M parameters; training needs more than {_gib(memory)} of "
        f"memory and {_gib(disk)} of disk space"
    )
    new = {e.stage.name: e.stage.tokens(settings) for e in planned if e.stage.tokens and _never_ran(e, planned)}
    if new:
        speed = matrix_speed(bf16=uses_bf16(settings["llm_bf16"], device()))
        times = (f"{name} {duration(OPERATIONS * size.least * count / USED / speed)}" for name, count in new.items())
        say(
            f"training times by arithmetic, at most about: {', '.join(times)} ({OPERATIONS} operations for each weight "
            f"and token, at {USED:.0%} of the speed of this machine's matrix products, {speed / 1e9:,.0f} GFLOP/s)"
        )
    free_memory, free_disk = gpu_memory(), shutil.disk_usage(existing_folder(settings.results_folder)).free
    if free_memory is not None and free_memory < memory:
        raise ConfigurationError(
            f"the GPU has {_gib(free_memory)} of free memory, and training {settings['llm']} needs more than "
            f"{_gib(memory)}",
            where="llm",
            why=f"the stages {', '.join(training)} would stop without memory",
            do="choose a smaller model, " + ("" if lora else "llm_lora_rank: 16, ") + "llm_layers, or another GPU",
        )
    if free_disk < disk:
        raise ConfigurationError(
            f"{_gib(free_disk)} are free on the disk of {settings.results_folder}, and the models and checkpoints of "
            f"{', '.join(training)} need more than {_gib(disk)}",
            where=f"checkpoint_dir {settings['checkpoint_dir']}",
            why="a stage would stop while it writes its results",
            do="remove files, or name a folder on another disk",
        )


def _never_ran(entry: Planned, planned: Sequence[Planned]) -> bool:
    return not entry.finished and _earlier(entry, planned)[0] is None


@cache
def matrix_speed(*, bf16: bool) -> float:
    """Return the operations per second of a product of two matrices on the device of the language model.

    Args:
        bf16: whether the matrices are in bfloat16.
    """
    import time

    import torch

    from recbole_gr2.llm.model import device

    size, seconds = (8192 if device() == "cuda" else 1024), []
    matrix = torch.ones(size, size, dtype=torch.bfloat16 if bf16 else torch.float32, device=device())
    for _ in range(4):  # the first product loads the library
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def gpu_memory() -> int | None:
    """Return the free memory of the GPU in bytes, or None without a GPU."""
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def _gib(count: float) -> str:
    return f"{count / GIB:,.1f} GiB"


def expected_time(entry: Planned, planned: Sequence[Planned] = ()) -> str:
    """Return the time that a planned stage will take, in words, from earlier runs on the same data set.

    The earlier run is the one with the fewest other settings; of several, the one with the nearest amount of work; of
    these, the newest. Its time is scaled by the setting that the time of the stage is proportional to, such as the
    number of steps. Runs with another language model do not count.

    Args:
        entry: the stage.
        planned: the whole plan, which tells the language model.

    Returns:
        For example `about 70 min`, and "" if the stage is finished. If it has never run on this data set,
        `unknown` with the time on another one: `unknown; 12 min on ml-100k`.
    """
    if entry.finished:
        return ""
    seconds, same = _earlier(entry, planned)
    if seconds is None:
        other = _on_other_data(entry, planned)
        return f"unknown; {duration(other[1])} on {other[0]}" if other else "unknown"
    return f"about {duration(seconds)}" + ("" if same else " (other settings)")


def expected_total(planned: Sequence[Planned]) -> str:
    """Return the sum of `expected_time`, in words. It names the stages without an estimate."""
    known = [(entry.stage.name, _earlier(entry, planned)[0]) for entry in planned if not entry.finished]
    if not known:
        return "none, every stage is finished"
    seconds = [value for _, value in known if value is not None]
    unknown = dict.fromkeys(name for name, value in known if value is None)
    if not seconds:
        return "unknown, because no stage of the plan has run on this data set before"
    total = f"about {duration(sum(seconds))}, from the times of earlier runs on this data set"
    return total + (f"; without {', '.join(unknown)}, which never ran" if unknown else "")


def is_first_run(planned: Sequence[Planned]) -> bool:
    """Return whether no stage of a plan has run on its data set before."""
    return all(_never_ran(entry, planned) for entry in planned)


def preset_purpose(settings: Settings) -> str:
    """Return the name and the purpose of the preset of a run. For `quick` it contains the time of a first run."""
    preset = settings["preset"]
    return f"preset {preset}: {first_comment(properties_folder() / 'preset' / f'{preset}.yaml')}"


def _earlier(entry: Planned, planned: Sequence[Planned]) -> tuple[float | None, bool]:
    """Seconds of the nearest earlier run of a stage, and whether it had the same settings."""
    try:
        own = read_manifest(entry.folder)
    except GR2Error:  # its file is damaged; the plan reports that
        own = None
    records = [*([own] if own else []), *other_records(entry.folder)]
    records = [record for record in records if _has_same_model(record, entry.folder.parents[1], planned)]
    if not records:
        return None, False

    nearest_record = min(records, key=lambda record: _distance(entry, record))
    return nearest_record.seconds * _share(entry, nearest_record), not _distance(entry, nearest_record)[0]


def _distance(entry: Planned, record: StageRecord) -> tuple[int, float]:
    """Number of other settings of an earlier run, and how far its amount of work is from that of a planned stage."""
    share = _share(entry, record)
    return len(changed_settings(record.settings, entry.settings)), abs(math.log(share)) if share else math.inf


def _share(entry: Planned, record: StageRecord) -> float:
    """Amount of work of a planned stage divided by that of an earlier run; 1 for a stage without such a setting."""
    earlier = record.settings.get(entry.stage.amount)
    return entry.settings[entry.stage.amount] / earlier if earlier else 1.0


def _has_same_model(record: StageRecord, stages: Path, planned: Sequence[Planned]) -> bool:
    """Whether an earlier run of a stage had the language model of a plan, or has none.

    Args:
        record: manifest of the earlier run.
        stages: the folder that contains the folders of all its stages.
        planned: the plan.
    """
    model = next((entry.settings for entry in planned if LLM in entry.settings), None)
    pending = [record]
    while model is not None and pending:
        earlier = pending.pop()
        if LLM in earlier.settings:
            return not set(LANGUAGE_MODEL) & set(changed_settings(earlier.settings, model))
        for name, key in earlier.needs.items():
            with contextlib.suppress(GR2Error):  # of a damaged manifest, which another check reports
                pending += filter(None, [read_manifest(stages / name / key)])
    return True


def _on_other_data(entry: Planned, planned: Sequence[Planned]) -> tuple[str, float] | None:
    """Data set and seconds of the nearest run of a stage on another data set, or None."""
    dataset = entry.folder.parents[2]
    runs = [
        (_distance(entry, record), other.name, record.seconds * _share(entry, record))
        for other in sorted(dataset.parent.iterdir() if dataset.parent.is_dir() else ())
        if other != dataset
        for record in records_of(other / entry.folder.parent.relative_to(dataset))
        if _has_same_model(record, other / "stages", planned)
    ]
    return min(runs, key=lambda run: run[0])[1:] if runs else None


def duration(seconds: float) -> str:
    """Return a time in words, rounded to two digits.

    >>> duration(4200), duration(42), duration(36_000), duration(0.2)
    ('70 min', '42 s', '10 h', '1 s')
    """
    if seconds < 100:
        return f"{max(round(seconds), 1)} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.2g} h" if seconds < 100 * 3600 else f"{round(seconds / 86400)} d"
