"""Processes that run a stage together, as `accelerate launch` and `torchrun` start them, processes that a stage forks,
and threads of one process.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from recbole_gr2.errors import ConfigurationError, GR2Error

T = TypeVar("T")
R = TypeVar("R")
LONGEST_WAIT = timedelta(days=30)  # While one process runs a stage, the others wait. torch's default is 30 minutes.
BRIEFLY = "2000"  # rounds of the loop in which a thread of libgomp waits actively; our choice, see `choose_threads`
IDLE = 0.25  # share of the cores that other processes use at most on an idle machine; our choice
KERNELS = "64"  # kernels that oneDNN keeps; a training step uses about 15. Our choice, see `choose_threads`
others = 0  # cores that `choose_threads` has left to other processes
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


def in_processes(compute: Callable[[Sequence[T]], R], things: Sequence[T], processes: int) -> Iterator[R]:
    """Yield the results of `compute` for parts of `things` that follow one another, one for each process.

    This process computes the first part, and forked processes the others at the same time. They see everything that is
    in memory, so that only results are sent.

    Args:
        compute: returns the result for a part. It must not use torch, whose threads do not exist after a fork, nor
            depend on what it has computed before.
        things: what to compute results for.
        processes: number of processes. There are no more than things.

    Raises:
        GR2Error: a process was killed.

    >>> list(in_processes(sum, [1, 2, 3, 4, 5], 1)), list(in_processes(sum, [], 4))
    ([15], [0])
    """
    count = max(1, min(processes, len(things)))
    bounds = [len(things) * number // count for number in range(count + 1)]
    first, *others = [things[start:end] for start, end in itertools.pairwise(bounds)]
    fork, children = multiprocessing.get_context("fork"), []
    try:
        for part in others:
            receiver, sender = fork.Pipe(duplex=False)
            child = fork.Process(target=_send_result, args=(sender, compute, part), daemon=True)
            children.append((child, receiver))
            child.start()
            sender.close()  # so that the end of the process is seen here
        yield compute(first)
        for child, receiver in children:
            try:
                result, error = receiver.recv()
            except EOFError as end:
                child.join()
                raise GR2Error(
                    f"a process ended with the exit code {child.exitcode} before its result",
                    where=f"process {child.pid}",
                    why="probably the system killed it, because the memory was exhausted",
                    do="set OMP_NUM_THREADS=1, so that there is only one process, and repeat the command",
                ) from end
            if error is not None:
                raise error
            yield result
    finally:
        for child, receiver in children:
            if child.pid is not None:
                child.kill()
                child.join()
            receiver.close()


def _send_result(sender: Any, compute: Callable[[Sequence[T]], Any], part: Sequence[T]) -> None:
    """Send the result of `compute` for a part, or its exception, to the process that has forked this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the other process, which then ends this one
    message: tuple[Any, Exception | None]
    try:
        message = compute(part), None
    except Exception as error:
        message = None, error
    with contextlib.suppress(BrokenPipeError):  # the other process has ended
        sender.send(message)


def choose_threads() -> None:
    """Choose the OpenMP threads of this process, how they wait, and how many kernels oneDNN keeps.

    There is one thread for each usable core, but not more than other processes leave free, and at least one: beside one
    busy process on two cores, one thread is as fast as two or faster (docs/performance.md). Waiting threads sleep,
    because those that wait actively occupy the core of another process. On an idle machine they wait actively for some
    microseconds before, because waking them takes as long as many operations of small models: an epoch of CausalSASRec
    on two cores takes .6 of the time.

    oneDNN compiles a kernel for each number of rows of a matrix, of about one MB, and keeps the last 1,024. Texts of
    different lengths rarely have the same number of rows, so that a few kernels serve as well.

    Variables that the environment sets are kept. The libraries read them once, so that the function has no effect after
    torch is imported.
    """
    if "torch" in sys.modules:
        return
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get("OMP_NUM_THREADS") == "1":  # a single thread does not wait for others
        return
    all_cores, cores, busy = os.cpu_count() or 1, usable_cores(), busy_cores()
    if os.environ["OMP_WAIT_POLICY"].upper() == "PASSIVE" and busy is not None and busy < IDLE * all_cores:
        os.environ.setdefault("GOMP_SPINCOUNT", BRIEFLY)
    threads = max(1, min(cores, all_cores - round(busy or 0)))
    if threads < all_cores and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        global others
        others = cores - threads


@functools.cache  # `recbole-gr2 run` chooses the threads twice
def busy_cores(times: Path = Path("/proc/stat"), seconds: float = 0.2) -> float | None:
    """Return the number of cores that processes use while this one waits. None if the system does not tell it.

    Args:
        times: file whose first line is `cpu` with the seconds that all cores spent in each state, in hundredths.
        seconds: how long to wait.
    """

    def read() -> tuple[int, int]:
        name, *states = times.read_text().split("\n", 1)[0].split()
        numbers = [int(state) for state in states[:8]]  # the others are parts of the first two
        if name != "cpu" or len(numbers) < 5:
            raise ValueError(f"{times} has no times of all cores")
        return sum(numbers), numbers[3] + numbers[4]  # idle, and waiting for a disk

    try:
        before, idle_before = read()
        time.sleep(seconds)
        after, idle = read()
    except (OSError, ValueError):
        return None
    return (1 - (idle - idle_before) / max(after - before, 1)) * (os.cpu_count() or 1)


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
    used = f", {others} of them used by other processes" if others else ""
    return f"OpenMP threads: {torch.get_num_threads()} on {usable_cores()} usable cores{used}, {policy} waiting{after}"
