"""Run the property-based tests of all inputs with new random examples for a given time, and count them.

    python benchmarks/fuzz.py [--minutes 60] [--seed 1]

Inputs are settings and property files, data files, candidate and ranking files, replies of teachers, and answers of
language models. Each kind has the same share of the time. A test fails if an input raises an error that is not one of
this package, or is read wrongly; Hypothesis then prints the smallest such input.

The script prints one line per kind of input. The exit code is 0 if no test fails.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Kind of input: file of tests and the expression that selects them. Each test has `EXAMPLES` examples per round.
KINDS = {
    "settings, command lines and property files": ("test_command_line.py", "test_any"),
    "data files": ("test_data_files.py", "test_random"),
    "candidate and ranking files": ("test_candidate_files.py", "corrupted"),
    "replies of teachers": ("test_openai_teacher.py", "any_reply"),
    "texts and answers of language models": (
        "test_plain_text.py",
        "plain_text or other or control or title or any",
    ),
}
EXAMPLES = 400
COUNTS = re.compile(r"- (\d+) passing, (\d+) failing, and (\d+) invalid (?:test cases|examples)")


def fuzz(file: str, expression: str, seconds: float, seeds: random.Random) -> tuple[int, int, int]:
    """Run tests until the time is over, at least once.

    Returns:
        Number of accepted examples (a reading or an error of this package), of rounds, and of failed rounds.
    """
    examples = rounds = failures = 0
    end = time.monotonic() + seconds
    while not rounds or time.monotonic() < end:
        command = [sys.executable, "-m", "pytest", f"tests/{file}", "-k", expression, "--hypothesis-profile=long"]
        command += [f"--hypothesis-seed={seeds.randrange(2**32)}", "--hypothesis-show-statistics", "-p", "no:xdist"]
        environment = os.environ | {"RECBOLE_GR2_EXAMPLES": str(EXAMPLES)}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        counts = COUNTS.findall(run.stdout)
        if run.returncode or not counts:
            failures += 1
            # The lines of pytest that contain the error and the smallest example.
            lines = [line[:500] for line in run.stdout.splitlines() if line.startswith(("E ", "FAILED"))]
            print(" ".join(command), *lines, run.stderr[-5_000:], sep="\n", flush=True)
        examples += sum(int(passing) for passing, _, _ in counts)
        rounds += 1
    return examples, rounds, failures


def main() -> int:
    """Read the arguments, run every kind of input, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    seeds, failed = random.Random(options.seed), 0
    for kind, (file, expression) in KINDS.items():
        start = time.monotonic()
        examples, rounds, failures = fuzz(file, expression, options.minutes * 60 / len(KINDS), seeds)
        minutes = (time.monotonic() - start) / 60
        print(f"{kind}: {examples:,} examples, {rounds} rounds, {minutes:.1f} min, {failures} failures", flush=True)
        failed += failures
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
