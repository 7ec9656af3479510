"""Wall time and peak memory of a stage."""

from __future__ import annotations

import time
from pathlib import Path

from recbole_gr2.store import LOCK, read_json, write_json

CLOCK = "clock.json"  # in an unfinished stage's folder: when its last start began, and the seconds of earlier starts


def seconds_of_earlier_starts(folder: Path) -> float:
    """Return the wall time of a stage's interrupted starts, in seconds, and record that a new start begins.

    A start counts up to the last file that it wrote. Work after that file was lost and is repeated.
    """
    clock, before = folder / CLOCK, 0.0
    if clock.is_file():
        last = read_json(clock)
        written = [f.stat().st_mtime for f in folder.rglob("*") if f.is_file() and f.name != LOCK]
        before = last["before"] + max(0.0, max(written) - last["started"])
    write_json(clock, {"started": time.time(), "before": before})
    return before


def reset_peak_memory() -> None:
    """Reset the peak of the resident memory. Only Linux supports this."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # 5 resets VmHWM, see proc(5)


def peak_memory_mb() -> float:
    """Largest resident memory of this process since the last reset, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
