"""Run all stages with an extreme value of each setting, and report where the run ends.

    python benchmarks/settings.py [--seconds 120] [--folder DIR] [--only mid_ sft_]

The data set is that of `kills.py`. A number gets the smallest and the largest permitted value; without a bound 0.000001
or a million, and for sizes 100,000. A choice gets each value, a boolean the other one, and an optional setting none.
Each run uses the stages of a first run that the setting does not change.

A run passes if it ends with a result, or with one error of this package. The script prints each error that a stage
raises after the run has started, because an earlier one saves the user time. The exit code is 0 if all runs pass.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kills import SETTINGS, write_data

from recbole_gr2.config.declaration import Declaration, declarations
from recbole_gr2.errors import GR2Error
from recbole_gr2.quick_start import main

# Settings of the run that are no property of a stage, or that name a file or a program.
LEFT_OUT = ("dataset", "model", "preset", "data_path", "checkpoint_dir", "gpu_id", "load_col", "eval_args", "llm")
# Integers whose work grows with their value: the largest value is a few times the default.
WORK = re.compile(
    r"steps|tokens|tries|generations|iterations|per_step|samples|epochs|levels|codes|latent|resample|rank"
)
LARGE, SMALL = 1e6, 1e-6  # for numbers without a bound
SIZE = 100_000  # for integers without a bound, such as lengths and batch sizes
OPTIONAL = ("distilled", "onerec_think")  # methods that run for settings with this prefix only
SETTINGS = SETTINGS | {
    "models": [],
    "eval_rows": ["lambdamart", "midtrain", "sft", "rl"],
    "mid_tokens": 4000,
    "mid_embedding_tokens": 1000,
    "sft_steps": 6,
    "score_steps": 6,
    "rl_steps": 2,
    "distilled_steps": 2,
    "onerec_think_steps": 4,
    "onerec_think_rl_steps": 2,
}


def extremes(declared: Declaration) -> Iterator[Any]:
    """Yield the extreme permitted values of a setting."""
    kind, element = declared.type, declared.element
    if declared.optional and declared.default is not None:
        yield None
    if kind is bool:
        yield from [True, False] if declared.optional else [not declared.default]
    elif declared.choices:
        for choice in declared.choices:
            if ":" not in choice and choice != declared.default:
                yield [choice] if kind is list else choice
    elif int in (kind, element) or float in (kind, element):
        number = int if int in (kind, element) else float
        for value in bounds(declared, number):
            yield [value] if kind is list else {"a": value} if kind is dict else value
    elif kind in (list, dict):
        yield kind()


def bounds(declared: Declaration, number: type) -> Iterator[float]:
    """Yield the least and the largest number that a declaration permits."""
    if declared.low is None:
        yield number(-LARGE)
    else:
        step = (1 if number is int else SMALL) if declared.low_exclusive else 0
        yield number(declared.low + step)
    if declared.high is not None:
        yield number(declared.high - ((1 if number is int else SMALL) if declared.high_exclusive else 0))
    elif number is float:
        yield LARGE
    else:
        yield 4 * max(int(declared.default or 1), 2) if WORK.search(declared.key) else SIZE


def run(folder: Path, values: dict[str, Any], seconds: int) -> tuple[str, str]:
    """Run the command in a process of its own. Returns the outcome, and the message or the stage where it ended."""
    file = folder / "settings.yaml"
    file.write_text(json.dumps(values))
    read, write = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.close(read)
        code, stderr = 1, io.StringIO()
        try:
            signal.alarm(seconds)
            os.chdir(folder)
            with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
                code = main(["--config_files", str(file)])
        except BaseException:
            traceback.print_exc(file=stderr)
            code = 99
        finally:
            os.write(write, stderr.getvalue()[-50_000:].encode())
            os._exit(code)
    os.close(write)
    with os.fdopen(read, errors="replace") as handle:
        text = handle.read()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    started = re.findall(r"\] (\S+): (?:run|resume)", text)
    if code == -signal.SIGALRM:
        return "stopped", f"after {seconds} s"
    if code == 99 or (code == 1 and "Traceback" in text):
        return "failed", "\n".join(text.splitlines()[-12:])
    if code == 0:
        return "result", ""
    message = text[text.rindex("error: ") :] if "error: " in text else text[-2000:]
    return ("refused at the start", message) if not started else ("error of a stage", f"{started[-1]}: {message}")


def report() -> int:
    """Run every value, print the errors and the counts, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120, help="time limit of a run")
    parser.add_argument("--folder", type=Path, default=None, help="folder of the results; by default a temporary one")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PREFIX", help="prefixes of settings")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="settings-"))
    write_data(folder / "data")
    base = SETTINGS | {"data_path": str(folder / "data"), "checkpoint_dir": str(folder / "saved")}
    outcome, message = run(folder, base, 3600)
    if outcome != "result":
        raise GR2Error(f"the run without an extreme value ended with: {outcome}\n{message}")
    counts: Counter[str] = Counter()
    for declared in declarations().values():
        if declared.key in LEFT_OUT or not declared.key.startswith(tuple(options.only)):
            continue
        for value in extremes(declared):
            methods = [name for name in OPTIONAL if declared.key.startswith(name)]
            given = {"eval_rows": [*base["eval_rows"], *methods], declared.key: value}
            outcome, message = run(folder, base | given, options.seconds)
            counts[outcome] += 1
            if outcome != "result":
                print(f"{declared.key}: {value!r}: {outcome}" + (f"\n    {message}" if message else ""), flush=True)
    print(", ".join(f"{outcome} {count}" for outcome, count in counts.most_common()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(report())
