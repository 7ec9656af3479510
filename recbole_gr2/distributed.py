"""Processes that run a stage together, as `accelerate launch` and `torchrun` start them, and threads of one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_all() -> None:
    """Go on when every process is here; the first call also chooses each one's GPU."""
    if WORLD_SIZE > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


def choose_threads() -> None:
    """Let waiting OpenMP threads sleep, and start no more threads than there are usable cores.

    Threads that wait actively occupy the core of another busy process. A training step on two cores beside one busy
    process takes 9 to 10 s with active and 2.1 s with passive waiting (docs/performance.md). Variables that the
    environment sets are kept. OpenMP reads them once, so that the function has no effect after torch is imported.
    """
    if "torch" in sys.modules:
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    cores = usable_cores()
    if cores < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


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
    return f"OpenMP threads: {torch.get_num_threads()} on {usable_cores()} usable cores, {policy} waiting"
