"""Forked processes: they give the results and the errors of one process."""

import os
import shutil
import signal
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_gr2.distributed import in_processes
from recbole_gr2.errors import ConfigurationError, GR2Error

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


@given(st.integers(0, 9), st.integers(1, 5))
def test_the_parts_are_all_things_in_their_order(size, processes):
    things = list(range(size))
    parts = list(in_processes(list, things, processes))
    assert [thing for part in parts for thing in part] == things
    assert len(parts) == max(1, min(size, processes))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_other_processes_compute_all_parts_but_the_first():
    own, *others = in_processes(lambda part: os.getpid(), [1, 2, 3], 3)
    assert own == os.getpid()
    assert len({own, *others}) == 3


def test_large_results_arrive():
    table = np.arange(4_000_000.0).reshape(4, -1)
    parts = list(in_processes(lambda part: table[part], [0, 1, 2, 3], 2))
    np.testing.assert_array_equal(np.concatenate(parts), table)


def test_an_error_is_that_of_the_process():
    def fail(part):
        if 3 in part:
            raise ConfigurationError("wrong", where="row 3", why="because", do="correct it")
        return part

    with pytest.raises(ConfigurationError) as caught:
        list(in_processes(fail, [1, 2, 3], 2))
    assert (caught.value.what, caught.value.where, caught.value.do) == ("wrong", "row 3", "correct it")
    assert str(caught.value).count("row 3") == 1


def test_a_killed_process_is_reported():
    own = os.getpid()

    def end(part):
        if os.getpid() != own:
            os.kill(os.getpid(), signal.SIGKILL)
        return part

    with pytest.raises(GR2Error, match="exit code -9 before its result"):
        list(in_processes(end, [1, 2], 2))


def test_no_process_is_left_if_the_first_part_fails(tmp_path):
    own = os.getpid()

    def compute(part):
        if os.getpid() == own:
            raise ValueError("first part")
        (tmp_path / "pid").write_text(str(os.getpid()))
        signal.pause()

    with pytest.raises(ValueError, match="first part"):
        list(in_processes(compute, [1, 2], 2))
    if (tmp_path / "pid").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


def test_features_of_several_processes_equal_those_of_one(finished, finished_copy, tiny_run, monkeypatch):
    forks, fork = [], os.fork
    monkeypatch.setattr("os.fork", lambda: forks.append(1) or fork())
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    root = finished_copy()
    shutil.rmtree(next(root.glob("**/stages/prior")))
    run = tiny_run(root, ["prior"])
    assert len(forks) == 2 * 3  # two more processes for each of three splits
    files = sorted(file.name for file in run.folders["prior"].glob("*.npy"))
    assert len(files) == 6
    for name in files:
        assert (run.folders["prior"] / name).read_bytes() == (finished.folders["prior"] / name).read_bytes()
