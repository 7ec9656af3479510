"""The threads of a process: waiting threads sleep, and there are no more threads than usable cores."""

import os
import subprocess
import sys

import pytest

from recbole_gr2.distributed import busy_cores, choose_threads, describe_threads, usable_cores


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
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("recbole_gr2.distributed.others", 0)
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "to be removed afterwards")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("usable", "busy", "threads", "spin"),
    [
        (4, 0.0, None, "2000"),
        (4, 0.9, "3", "2000"),
        (4, 1.1, "3", None),
        (4, 3.0, "1", None),
        (4, 4.0, "1", None),
        (4, None, None, None),
        (2, 1.9, "2", None),  # the busy cores can be those that this process may not use
        (2, 3.0, "1", None),
    ],
)
@pytest.mark.usefixtures("_without_torch")
def test_other_processes_keep_their_cores(monkeypatch, usable, busy, threads, spin):
    monkeypatch.setattr("recbole_gr2.distributed.usable_cores", lambda: usable)
    monkeypatch.setattr("recbole_gr2.distributed.busy_cores", lambda: busy)
    choose_threads()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert (os.environ.get("OMP_NUM_THREADS"), os.environ.get("GOMP_SPINCOUNT")) == (threads, spin)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    left = usable - int(threads or usable)
    assert (f", {left} of them used by other processes" in describe_threads()) == (left > 0)


@pytest.mark.usefixtures("_without_torch")
def test_the_environment_has_priority(monkeypatch):
    monkeypatch.setattr("recbole_gr2.distributed.busy_cores", lambda: 0.0)
    chosen = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    choose_threads()
    assert {name: os.environ[name] for name in chosen} == chosen
    assert "GOMP_SPINCOUNT" not in os.environ


def test_the_busy_cores_are_those_that_are_not_idle(tmp_path, monkeypatch):
    lines = iter(["cpu  100 0 50 800 50 0 0 0 7 7\ncpu0 1 2", "cpu  140 0 60 840 60 0 0 0 9 9\ncpu0 3 4"])
    times = tmp_path / "stat"
    times.write_text(next(lines))
    monkeypatch.setattr("time.sleep", lambda seconds: times.write_text(next(lines)))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert busy_cores(times) == pytest.approx(2.0)  # 50 of 100 hundredths of a second


@pytest.mark.parametrize("text", [None, "", "intr 1 2 3 4 5", "cpu 1 2 3", "cpu a b c d e"])
def test_busy_cores_are_unknown_on_other_systems(tmp_path, text):
    if text is not None:
        (tmp_path / "stat").write_text(text)
    assert busy_cores(tmp_path / "stat", seconds=0) is None


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="needs Linux")
def test_busy_cores_of_this_machine_are_a_number():
    assert 0 <= busy_cores() <= os.cpu_count()
