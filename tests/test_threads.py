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
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    printed = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
    assert printed.startswith("OpenMP threads: 1 on 1 usable cores, passive waiting")


@pytest.fixture
def _without_torch(monkeypatch):
    monkeypatch.setattr("sys.modules", {name: module for name, module in sys.modules.items() if name != "torch"})
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "to be removed afterwards")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("load", "spin"), [(0.1, "2000"), (1.0, None), (None, None)])
@pytest.mark.usefixtures("_without_torch")
def test_threads_wait_actively_only_on_an_idle_machine(monkeypatch, load, spin):
    def loads():
        if load is None:
            raise OSError
        return load, 9.0, 9.0

    monkeypatch.setattr("os.getloadavg", loads)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    choose_threads()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT")) == ("PASSIVE", spin)


@pytest.mark.usefixtures("_without_torch")
def test_the_environment_has_priority(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    choose_threads()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"]) == ("ACTIVE", "7")
    assert "GOMP_SPINCOUNT" not in os.environ
