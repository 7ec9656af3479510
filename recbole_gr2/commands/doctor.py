"""`recbole-gr2 doctor`: exercise what a run needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from recbole_gr2.commands.output import AsJson, CheckpointDir, print_json
from recbole_gr2.errors import GR2Error

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

OK, WARNING, FAILED = "ok", "warning", "failed"
# Distributions whose module has another name. A hyphen in a name is an underscore in that of the module.
MODULES = {"pyyaml": "yaml", "scikit-learn": "sklearn", "markdown-it-py": "markdown_it"}
OPTIONAL = {
    "openai": "trace_teacher: openai_api needs it; pip install 'recbole-gr2[teacher]'",
    "vllm": "llm_engine: vllm needs it; pip install 'recbole-gr2[vllm]', see docs/gpu.md",
}
GIB = 2**30


class Finding(NamedTuple):
    """One line of the report: the part, its state, what was seen, and what to do if the state is not ok."""

    part: str
    state: str
    seen: str
    do: str = ""


def doctor(
    online: Annotated[bool, typer.Option("--online", help="Also ask the package index of pip.")] = False,
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Data set whose files are looked up.")] = "ml-100k",
    data_path: Annotated[str, typer.Option("--data_path", metavar="DIR", help="Folder of the data sets.")] = "dataset/",
    checkpoint_dir: CheckpointDir = "saved",
    as_json: AsJson = False,
) -> None:
    """Check the installation by using it: packages, RecBole, torch, threads, disk, data set and models.

    Each line is ok, a warning, or failed, with what to do. The exit code is 1 if something failed. Nothing is installed
    or downloaded; one file is written to --checkpoint_dir and removed.

    \b
    Examples:
      recbole-gr2 doctor
      recbole-gr2 doctor --online --dataset mine --data_path data --checkpoint_dir results
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "packages": packages,
        "RecBole": recbole,
        "torch": matrix_products,
        "threads": threads,
        "GGUF": gguf_files,
        "optional packages": optional_packages,
        "language models": models,
        "checkpoint_dir": lambda: folder_of_results(Path(checkpoint_dir)),
        "data set": lambda: data_set(dataset, data_path),
    }
    if online:
        checks["package index"] = package_index
    found = []
    for part, check in checks.items():
        for finding in _findings(part, check):
            found.append(finding)
            if not as_json:
                print(f"{finding.state:8s} {finding.part}: {finding.seen}", flush=True)
                if finding.do:
                    print(f"{'':8s}   {finding.do}", flush=True)
    if as_json:
        print_json([finding._asdict() for finding in found])
    if any(finding.state == FAILED for finding in found):
        raise typer.Exit(1)


def _findings(part: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check. An exception of what the check exercises is a finding too."""
    try:
        yield from check()
    except GR2Error as error:
        yield Finding(part, FAILED, error.what, f"{error.where}: {error.do}" if error.where else error.do)
    except Exception as error:  # of a broken library, which may raise any class
        yield Finding(part, FAILED, f"{type(error).__name__}: {error}", "reinstall the packages of constraints.txt")


def packages() -> Iterator[Finding]:
    """Import each required package, and compare its version with the bounds of setup.cfg."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires("recbole-gr2") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("recbole-gr2", FAILED, "it is not installed", "pip install -c constraints.txt -e .")
        return
    for text in required:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def _package(requirement: Requirement) -> Finding:
    install = f"pip install -c constraints.txt '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(requirement.name)
        importlib.import_module(MODULES.get(requirement.name, requirement.name.replace("-", "_")))
    except Exception as error:  # a package that is missing or broken
        return Finding(requirement.name, FAILED, f"{type(error).__name__}: {error}", install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(
            requirement.name, FAILED, f"{version} is installed, {requirement.specifier} is required", install
        )
    return Finding(requirement.name, OK, f"{version} {requirement.specifier}".strip())


def recbole() -> Iterator[Finding]:
    """Patch RecBole, and build the configuration and the data set class that a run uses."""
    import numpy

    from recbole_gr2.bridge.data import exact_time_dataset
    from recbole_gr2.config import load_settings, recbole_config

    model = "SASRec"
    config = recbole_config(load_settings(command_line={"preset": "smoke"}), model)
    dataset = exact_time_dataset(sequential=True)
    if not hasattr(numpy, "float_"):  # RecBole uses this name, which NumPy 2 removed.
        yield Finding("RecBole", FAILED, "the patch of NumPy has no effect", "install the packages of constraints.txt")
    else:
        yield Finding("RecBole", OK, f"patched; {config['model']} and {dataset.__mro__[1].__name__} load")


def matrix_products() -> Iterator[Finding]:
    """Multiply matrices in float32 and bfloat16 on the CPU, and on the GPU if torch finds one."""
    import torch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for kind in (torch.float32, torch.bfloat16):
            yield _matrix_product(device, kind)
    if len(devices) == 1:
        yield Finding(
            "GPU", WARNING, "torch finds none", "the preset is laptop; install a CUDA build of torch for a GPU"
        )


def _matrix_product(device: str, kind: torch.dtype) -> Finding:
    """Compare the product of two matrices of small integers, which both types represent, with the exact one."""
    import time

    import torch

    part = f"torch on {torch.cuda.get_device_name() if device == 'cuda' else 'the CPU'}"
    left = torch.arange(256 * 256).reshape(256, 256) % 3 - 1
    right = torch.arange(256 * 256).reshape(256, 256) % 5 - 2
    started = time.perf_counter()
    product = (left.to(device, kind) @ right.to(device, kind)).float().cpu()
    seconds, name = time.perf_counter() - started, str(kind).removeprefix("torch.")
    exact = (left.double() @ right.double()).float()
    error = float(((product - exact).abs() / exact.abs().clamp(min=1)).max())
    if error > torch.finfo(kind).eps:
        return Finding(part, FAILED, f"a product in {name} has the relative error {error:.2g}", "install another torch")
    return Finding(part, OK, f"a product in {name} is right, {seconds * 1000:.1f} ms")


def threads() -> Iterator[Finding]:
    """Report the threads of a run."""
    import torch

    from recbole_gr2.distributed import describe_threads, usable_cores

    if torch.get_num_threads() > usable_cores():
        do = f"set OMP_NUM_THREADS={usable_cores()}"
        yield Finding("threads", WARNING, f"{describe_threads()}; more threads than cores are slow", do)
    else:
        yield Finding("threads", OK, describe_threads())


def gguf_files() -> Iterator[Finding]:
    """Write and read a GGUF file, the format of the packaged language model."""
    import numpy
    from gguf import GGUFReader, GGUFWriter

    values = numpy.arange(6, dtype=numpy.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "check.gguf"
        writer = GGUFWriter(file, "llama")
        writer.add_tensor("check", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        read = numpy.array(GGUFReader(file).tensors[0].data)
    if numpy.array_equal(read, values):
        yield Finding("GGUF", OK, "a file is written and read")
    else:
        yield Finding("GGUF", FAILED, f"{read} was read instead of {values}", "install gguf of constraints.txt")


def optional_packages() -> Iterator[Finding]:
    """Import the packages that only some settings need."""
    for name, need in OPTIONAL.items():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            yield Finding(name, WARNING, "not installed", need)
        else:
            yield Finding(name, OK, importlib.metadata.version(name))


def models() -> Iterator[Finding]:
    """Report which of the packaged language models are on this machine."""
    from recbole_gr2.llm.download import PACKAGED, is_cached

    for name in PACKAGED:
        if is_cached(name):
            yield Finding(name, OK, "the model is on this machine")
        else:
            do = "a run that needs it downloads it once with pip; --preset smoke needs no model"
            yield Finding(name, WARNING, "the model is not on this machine yet", do)


def folder_of_results(folder: Path) -> Iterator[Finding]:
    """Write a file to `checkpoint_dir` and remove it, and report the free disk space."""
    from recbole_gr2.preflight import check_folder
    from recbole_gr2.store import existing_folder

    check_folder(folder, where="checkpoint_dir")
    existing = existing_folder(folder)
    with tempfile.NamedTemporaryFile(dir=existing, prefix=".doctor-") as file:
        file.write(b"check")
        file.flush()
        written = Path(file.name).read_bytes() == b"check"
    free = shutil.disk_usage(existing).free
    part = f"checkpoint_dir {folder}"
    if not written or Path(file.name).exists():
        yield Finding(part, FAILED, f"a file in {existing} is not written and removed", "name another --checkpoint_dir")
    elif free < 2 * GIB:
        do = "the models of a run with the preset laptop need more than 2 GiB; free disk space"
        yield Finding(part, WARNING, f"{free / GIB:.1f} GiB are free", do)
    else:
        yield Finding(part, OK, f"a file was written and removed; {free / GIB:,.1f} GiB are free")


def data_set(dataset: str, data_path: str) -> Iterator[Finding]:
    """Look up the files of the data set."""
    from recbole_gr2.config import load_settings
    from recbole_gr2.preflight import PACKAGED_DATASET, check_dataset

    given = {"dataset": dataset, "data_path": data_path}
    check_dataset(load_settings(command_line=given, machine=False))
    files = sorted((Path(data_path) / dataset).glob(f"{dataset}.*"))
    part = f"data set {dataset}"
    if files:
        yield Finding(part, OK, ", ".join(file.name for file in files))
    elif dataset == PACKAGED_DATASET:
        yield Finding(part, OK, "part of RecBole")
    else:
        yield Finding(part, WARNING, "not on this machine", "a run lets RecBole download it")


def package_index() -> Iterator[Finding]:
    """Ask the package index of pip for the distributions of the packaged language models."""
    from recbole_gr2.llm.download import PACKAGED

    for name, packaged in PACKAGED.items():
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions"]
        done = subprocess.run([*command, packaged.distribution], capture_output=True, text=True, errors="replace")
        if done.returncode == 0 and packaged.version in done.stdout:
            yield Finding("package index", OK, f"it has {packaged.distribution} {packaged.version}, the model {name}")
        else:
            last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message of pip"])[-1]
            do = f"check the connection and the settings of pip, or give a folder with a model in place of {name}"
            yield Finding("package index", FAILED, f"{packaged.distribution} {packaged.version}: {last}", do)
