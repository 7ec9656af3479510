"""Run on disks of several sizes that are too small, then with enough space, and compare with a run on a large disk.

    sudo python benchmarks/full_disk.py [--disks 6] [--seed 1] [--folder DIR]

Each disk is a tmpfs of a random size below that of the results, so that it is full in some stage. The command has to
end with one error that says so. Then the disk gets larger, and the same command has to end with the results of a run
on a large disk, bit by bit. The run is that of kills.py. Linux, as root. A disk takes about a minute.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from kills import Run, undisturbed, write_data


def main() -> None:
    """Print one line per disk and the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--disks", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="a new folder; by default a temporary one")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="full-disk-"))
    write_data(folder / "data")
    rng = random.Random(options.seed)
    whole, _, _ = undisturbed(folder / "data", folder / "whole", {})
    size = sum(file.stat().st_size for file in whole.saved.rglob("*") if file.is_file()) // 1024
    clear = same = 0
    for number in range(options.disks):
        run = Run(folder / "data", folder / f"disk-{number}", {})
        run.saved.mkdir()
        kilobytes = round(size * rng.uniform(0.0, 0.95)) + 64
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(run.saved)], check=True)
        try:
            run.start()
            code, _ = run.to_the_end()
            errors = [line for line in run.errors if line.startswith("error:")]
            reported = code == 1 and len(errors) == 1 and "the disk is full" in errors[0]
            reported = reported and not any("Traceback" in line for line in run.errors)
            clear += reported
            print(f"{kilobytes:,} of {size:,} kB, exit code {code}: {errors or run.errors[-5:]}", flush=True)
            subprocess.run(["mount", "-o", "remount,size=1g", str(run.saved)], check=True)
            run.start()
            code, _ = run.to_the_end()
            equal = code == 0 and run.checksums() == whole.checksums()
            same += equal
            if not equal:
                print("DIFFERENT", code, run.errors[-5:], flush=True)
        finally:
            subprocess.run(["umount", str(run.saved)], check=True)
    print(f"{clear} of {options.disks} full disks are reported by one error; {same} runs end as on a large disk")
    sys.exit(clear < options.disks or same < options.disks)


if __name__ == "__main__":
    main()
