"""Processes that run a stage together, as `accelerate launch` and `torchrun` start them, and threads of one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from recbole_gr2.errors import ConfigurationError

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=30)  # While one process runs a stage, the others wait. torch's default is 30 minutes.
BRIEFLY = "2000"  # rounds of the loop in which a thread of libgomp waits actively; our choice, see `choose_threads`
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_all() -> None:
    """Go on when every process is here; the first call also chooses each one's GPU."""
    if WORLD_SIZE > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT).wait_for_everyone()


def share(things: Sequence[T], compute: Callable[[Sequence[T]], Sequence[Any]]) -> list[Any]:
    """Return the results of `compute`, of which each process computes a part. Every process gets all results.

    Every process calls the function with the same sequence.

    Args:
        things: what to compute results for.
        compute: returns one result for each element of a part of `things`, in the same order.

    >>> share([1, 2, 3], lambda part: [2 * number for number in part])
    [2, 4, 6]
    """
    if WORLD_SIZE == 1:
        return list(compute(things))
    from accelerate.utils import gather_object

    mine = things[RANK::WORLD_SIZE]
    parts = gather_object([list(compute(mine)) if mine else []])
    results: list[Any] = [None] * len(things)
    for rank, part in enumerate(parts):
        results[rank::WORLD_SIZE] = part
    return results


def uses_fsdp() -> bool:
    """Return whether the configuration of `accelerate launch` shards the weights with FSDP."""
    return _is_true("ACCELERATE_USE_FSDP")


def uses_deepspeed() -> bool:
    """Return whether the configuration of `accelerate launch` uses DeepSpeed."""
    return _is_true("ACCELERATE_USE_DEEPSPEED")


def _is_true(variable: str) -> bool:
    """Whether `accelerate launch` has set a variable to true."""
    return os.environ.get(variable, "").lower() in ("1", "true")


def check_launch() -> None:
    """Check that this package supports the configuration of `accelerate launch`.

    Raises:
        ConfigurationError: it has FSDP 1, FSDP with one loading process, or ZeRO-3.
    """
    fsdp, zero = os.environ.get("FSDP_VERSION", "1"), os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if uses_fsdp() and fsdp != "2":
        raise ConfigurationError(
            f"version {fsdp} of FSDP is not supported",
            where="fsdp_version, in the configuration of accelerate",
            why="the weights are collected after training, which differs between the versions",
            do="set fsdp_version: 2, as in properties/accelerate/fsdp.yaml",
        )
    if uses_fsdp() and _is_true("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ConfigurationError(
            "only the first process would load a language model",
            where="fsdp_cpu_ram_efficient_loading, in the configuration of accelerate",
            why="every process also answers prompts, and needs the whole model for that",
            do="set fsdp_cpu_ram_efficient_loading: false, as in properties/accelerate/fsdp.yaml",
        )
    if uses_deepspeed() and zero == "3":
        raise ConfigurationError(
            "stage 3 of ZeRO is not supported",
            where="zero_stage, in the configuration of accelerate",
            why="it shards the weights, and they are not collected after training",
            do="set zero_stage: 2, as in properties/accelerate/deepspeed.yaml, or use FSDP",
        )


def check_replicas(what: str) -> None:
    """Check that every process trains its own copy of the weights.

    Args:
        what: what needs it, with its stage.

    Raises:
        ConfigurationError: the configuration of `accelerate launch` uses FSDP or DeepSpeed.
    """
    if uses_fsdp() or uses_deepspeed():
        raise ConfigurationError(
            f"{what} does not support {'FSDP' if uses_fsdp() else 'DeepSpeed'}",
            where="the configuration of accelerate",
            why="the model generates answers between two steps, which was not made for sharded training",
            do="compute the other stages with this configuration (--stages sft), and then repeat the command with "
            "properties/accelerate/ddp.yaml. Finished stages are not computed again",
        )


def check_shares(name: str, number: int) -> None:
    """Check that the processes can share what a setting counts.

    Args:
        name: name of the setting, such as a batch size.
        number: its value.

    Raises:
        ConfigurationError: the number is no multiple of the number of processes.
    """
    if number % WORLD_SIZE:
        raise ConfigurationError(
            f"{WORLD_SIZE} processes cannot share {number} equally",
            where=name,
            why="a step waits for every process, and each has equally many texts or groups of answers",
            do=f"choose a multiple of {WORLD_SIZE}, or another number of processes",
        )


def choose_threads() -> None:
    """Let waiting OpenMP threads sleep, and start no more threads than there are usable cores.

    Threads that wait actively occupy the core of another busy process. A training step on two cores beside one busy
    process takes 9 to 10 s with active and 2.1 s with passive waiting. On an idle machine threads wait actively for
    some microseconds before they sleep, because waking them takes as long as many operations of small models: an epoch
    of CausalSASRec on two cores takes .6 of the time (docs/performance.md). Variables that the environment sets are
    kept. OpenMP reads them once, so that the function has no effect after torch is imported.
    """
    if "torch" in sys.modules:
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ["OMP_WAIT_POLICY"].upper() == "PASSIVE" and is_idle():
        os.environ.setdefault("GOMP_SPINCOUNT", BRIEFLY)
    cores = usable_cores()
    if cores < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def is_idle() -> bool:
    """Return whether other processes have used less than a quarter of the cores of the machine in the last minute."""
    try:
        return os.getloadavg()[0] < 0.25 * (os.cpu_count() or 1)
    except (OSError, AttributeError):  # the system does not tell its load
        return False


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return the number of cores that this process may use: those of its affinity, within the quota of its container.

    Args:
        quota: file with the quota and the period of a container in microseconds, or `max` without a quota.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        allowed, period = quota.read_text().split()
        cores = min(cores, int(allowed) // int(period))
    except (OSError, ValueError):  # no container, or no quota
        pass
    return max(cores, 1)


def describe_threads() -> str:
    """Return the threads of this process in words."""
    import torch

    policy = os.environ.get("OMP_WAIT_POLICY", "").lower() or "default"
    after = " after a brief active wait" if os.environ.get("GOMP_SPINCOUNT") == BRIEFLY else ""
    return f"OpenMP threads: {torch.get_num_threads()} on {usable_cores()} usable cores, {policy} waiting{after}"
