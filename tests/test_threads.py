"""The threads of a process: waiting threads sleep, and there are no more threads than usable cores."""

import os
import subprocess
import sys

import pytest

from recbole_gr2.distributed import choose_threads, usable_cores


@pytest.mark.parametrize(
    ("text", "limit"), [("max 100000", None), ("100000 100000", 1), ("50000 100000", 1), ("unreadable", None)]
)
def test_the_quota_of_a_container_limits_the_cores(tmp_path, text, limit):
    (tmp_path / "cpu.max").write_text(text)
    cores = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path / "cpu.max") == (limit or cores)
    assert usable_cores(tmp_path / "missing") == cores


@pytest.mark.slow
def test_the_affinity_of_the_process_limits_the_threads():
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from recbole_gr2.distributed import choose_threads, describe_threads\n"
        "choose_threads(); print(describe_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    printed = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
    assert printed.strip() == "OpenMP threads: 1 on 1 usable cores, passive waiting"


def test_the_environment_has_priority(monkeypatch):
    monkeypatch.setattr("sys.modules", {name: module for name, module in sys.modules.items() if name != "torch"})
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    choose_threads()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"]) == ("ACTIVE", "7")
