"""Kill a run at random times, repeat its command, and compare the results with those of a run without kills.

    python benchmarks/kills.py [--kills 100] [--seed 1] [--folder DIR]

The run has all stages on a synthetic data set of 150 users. Half of the runs train with LoRA. A round repeats the
command until it ends. `kill -9` stops the process, most often in the next unfinished stage: at a uniformly random
time of the stage, or shortly after a file of a checkpoint appears. Some kills hit the start or the report.

The script prints one line per kill, and at the end: how often the files of the killed stage are equal to those of the
run without kills, bit by bit, how often the metrics are, and how often a repeated command failed. The exit code is 0
if nothing differs and nothing failed.

Each start is a process of its own. It is forked from one that has imported the libraries, which saves ten seconds.
100 kills take about 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import queue
import random
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from recbole_gr2.quick_start import main

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("llm.dapo", "llm.distill", "llm.onerec_trainer", "pipeline", "report"):  # what all starts import
    importlib.import_module(f"recbole_gr2.{name}")

METHODS = [
    "lambdamart",
    "midtrain",
    "sft",
    "rl",
    "shuffled",
    "distilled",
    "internalised",
    "score",
    "onerec_think",
    "onerec_think-no-think",
]
SETTINGS = {
    "dataset": "circles",
    "preset": "smoke",
    "text_categories": "categories",
    "base_epochs": 3,
    "base_learning_rate": 0.01,
    "cand_num": 5,
    "models": ["BPR", "OneRecThink", "GR2Generator"],
    "models_options": {"epochs": 1},
    "eval_rows": METHODS,
    "eval_draws": 200,
    "sid_codes": 8,
    "sid_levels": 3,
    "sid_hidden": [32],
    "sid_epochs": 20,
    "sid_batch_size": 16,
    "sid_min_unique": 0.5,
    "prior_steps": 30,
    "llm_random": {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "llm_save_steps": 2,
    "mid_tokens": 8000,
    "mid_embedding_tokens": 3000,
    "mid_batch_size": 8,
    "prompt_max_reasoning": 16,
    "score_steps": 40,
    "sft_steps": 40,  # three passes
    "sft_check_lists": 4,
    "rl_steps": 4,
    "rl_save_steps": 1,
    "rl_prompts_per_step": 2,
    "rl_overlong_buffer": 4,
    "distilled_steps": 3,
    "onerec_think_variant": "paper",
    "onerec_think_steps": 12,
    "onerec_think_batch_size": 64,
    "onerec_think_passes": 3.0,
    "onerec_think_samples": 1,
    "onerec_think_beams": 4,
}
VARIANTS = [{}, {"llm_lora_rank": 4}]
MOST = 2  # kills of a stage in a round
STARTED = re.compile(r"\] (\S+): (?:run|resume)")
FINISHED = re.compile(r"\] (\S+) (?:cached|outdated|done in)")


def write_data(folder: Path) -> None:
    """Write the data set `circles`: the next item is mostly the successor of the last one in a circle of ten items."""
    rng, data = random.Random(7), folder / "circles"
    data.mkdir(parents=True, exist_ok=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(150):
        circle, place = rng.randrange(6), rng.randrange(10)
        for event in range(rng.randint(6, 10)):
            lines.append(f"u{user}\ti{10 * circle + place}\t{1000 * user + event}")
            place = (place + 1) % 10
    (data / "circles.inter").write_text("\n".join(lines) + "\n")
    lines = ["item_id:token\ttitle:token_seq\tcategories:token_seq"]
    for item in range(60):
        kind = ["lamp", "chair", "brush", "novel", "kettle", "racket"][item // 10]
        lines.append(f"i{item}\t{kind.title()} number {item % 10}\tThings > {kind.title()}s")
    (data / "circles.item").write_text("\n".join(lines) + "\n")


class Run:
    """A run in a folder of its own, whose command can be started again and again."""

    def __init__(self, data: Path, folder: Path, variant: dict[str, object]) -> None:
        self.saved = folder / "saved"  # the results
        self.stages = self.saved / "gr2" / "circles" / "stages"
        self.folder = folder
        self.finished: list[str] = []
        self.errors: list[str] = []
        folder.mkdir(parents=True)
        settings = {
            **SETTINGS,
            **variant,
            "data_path": str(data.absolute()),
            "checkpoint_dir": str(self.saved.absolute()),
        }
        (folder / "settings.yaml").write_text(json.dumps(settings))
        self.log = open(folder / "log.txt", "a", buffering=1)  # noqa: SIM115 (open until the process ends)

    def start(self) -> None:
        """Start the command."""
        self.log.write("\n--- start\n")
        stderr, child_stderr = os.pipe()
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            os.chdir(self.folder)
            os.dup2(child_stderr, 2)
            os.dup2(os.open("path.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            code = 1
            try:
                code = main(["--config_files", "settings.yaml"])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(child_stderr)
        self.stderr = os.fdopen(stderr)
        self.code: int | None = None
        self.events: queue.Queue[tuple[float, str]] = queue.Queue()
        self.errors = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.stderr:
            self.log.write(line)
            self.errors.append(line.rstrip())
            self.events.put((time.monotonic(), line))

    def ended(self) -> bool:
        """Whether the process has ended."""
        if self.code is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if process else None
        return self.code is not None

    def wait_for(self, stage: str) -> bool:
        """Return True when a stage starts, or False if the command ends before."""
        while not self.ended() or not self.events.empty():
            try:
                _, line = self.events.get(timeout=0.05)
            except queue.Empty:
                continue
            if (found := FINISHED.search(line)) and found[1] not in self.finished:
                self.finished.append(found[1])
            if (found := STARTED.search(line)) and found[1] == stage:
                return True
        return False

    def kill(self) -> str:
        """Kill the process. Returns the stage that it worked on, or where else it was."""
        os.kill(self.process, signal.SIGKILL)
        self._join()
        where = "start"
        for line in self.errors:
            if found := FINISHED.search(line):
                where = "report" if found[1] == "evaluate" else f"after {found[1]}"
                if found[1] not in self.finished:
                    self.finished.append(found[1])
            if found := STARTED.search(line):
                where = found[1]
        return where

    def to_the_end(self) -> tuple[int, str]:
        """Let the command end. Returns the exit code and the path of result.json."""
        self._join()
        return self.code or 0, (self.folder / "path.txt").read_text().strip()

    def _join(self) -> None:
        self.reader.join()  # ends with the process
        while not self.ended():
            time.sleep(0.01)
        self.stderr.close()

    def checksums(self) -> dict[str, dict[str, str]]:
        """The checksums of the files of every finished stage, from the manifests. log.json counts without times."""
        found: dict[str, dict[str, str]] = {}
        for file in self.stages.glob("*/*/manifest.json"):
            files = {name: entry["sha256"] for name, entry in json.loads(file.read_text())["files"].items()}
            if "log.json" in files:
                logged = json.loads((file.parent / "log.json").read_text(), object_hook=without_times)
                files["log.json"] = json.dumps(logged, sort_keys=True)
            found[file.parents[1].name] = files
        return found


def without_times(line: dict[str, object]) -> dict[str, object]:
    """A line of a log without the seconds of its steps."""
    return {name: value for name, value in line.items() if name != "step_time"}


def metrics(result: str) -> list[object]:
    """What result.json says about the methods."""
    values = json.loads(Path(result).read_text())
    return [values["methods"], values["comparisons"], values["curves"]]


def undisturbed(data: Path, folder: Path, variant: dict[str, object]) -> tuple[Run, dict[str, float], list[object]]:
    """Run without kills. Returns the run, the seconds of each stage in their order, and the metrics."""
    run = Run(data, folder, variant)
    run.start()
    code, result = run.to_the_end()
    if code:
        raise SystemExit("\n".join(run.errors[-20:]))
    seconds: dict[str, float] = {}
    begin = 0.0
    while not run.events.empty():
        when, line = run.events.get()
        if found := STARTED.search(line):
            begin = when
        elif found := FINISHED.search(line):
            seconds[found[1]] = when - begin
    return run, seconds, metrics(result)


def report() -> None:
    """Print one line per kill and the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="a new folder; by default a temporary one")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    write_data(folder / "data")
    rng = random.Random(options.seed)
    whole = [undisturbed(folder / "data", folder / f"whole-{number}", each) for number, each in enumerate(VARIANTS)]
    for _, seconds, _ in whole:
        print(", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()), flush=True)
    kills = same = failures = rounds = same_metrics = 0
    places: collections.Counter[str] = collections.Counter()
    while kills < options.kills:
        reference, seconds, expected = whole[rounds % len(VARIANTS)]
        rounds += 1
        run = Run(folder / "data", folder / f"round-{rounds}", VARIANTS[(rounds - 1) % len(VARIANTS)])
        killed: list[str] = []
        code, result = None, ""
        while code is None:
            run.start()
            if kills + len(killed) < options.kills:
                often = [stage for stage in seconds if killed.count(stage) >= MOST or stage in run.finished]
                left = [stage for stage in seconds if stage not in often]
                where = kill_somewhere(run, left, seconds, rng) if left else ""
                if where:
                    killed.append(where)
                    print(f"kill {kills + len(killed)}: round {rounds}, {where}", flush=True)
                    continue
            code, result = run.to_the_end()
            if code:
                failures += 1
                print("FAILED\n  " + "\n  ".join(run.errors[-6:]), flush=True)
        kills += len(killed)
        places.update(killed)
        if code:
            continue
        found, wanted = run.checksums(), reference.checksums()
        for stage in wanted:
            for name in sorted(wanted[stage].keys() | found.get(stage, {}).keys()):
                if wanted[stage].get(name) != found.get(stage, {}).get(name):
                    print(f"DIFFERENT {stage}/{name}", flush=True)
        equal = {stage for stage in wanted if wanted[stage] == found.get(stage)}
        same += sum(where in equal or (where not in wanted and len(equal) == len(wanted)) for where in killed)
        same_metrics += metrics(result) == expected
    print("kills: " + ", ".join(f"{stage} {count}" for stage, count in places.most_common()))
    print(f"{kills} kills in {rounds} rounds; after {same} kills all files of the stage are bit-identical")
    print(f"metrics and curves are equal in {same_metrics} of {rounds} rounds; {failures} commands failed")
    sys.exit(failures > 0 or same < kills or same_metrics < rounds)


def kill_somewhere(run: Run, left: list[str], seconds: dict[str, float], rng: random.Random) -> str:
    """Kill a started run at a random time in one of the stages that are left, the next ones.

    Returns where it was, or "" if it ended before.
    """
    if rng.random() < 0.06:  # in the start, the plan, or the report
        deadline = time.monotonic() + rng.uniform(0, 3)
        while time.monotonic() < deadline and not run.ended():
            time.sleep(0.002)
        return "" if run.ended() else run.kill()
    stage = left[0] if rng.random() < 0.8 else rng.choice(left[:4])
    if not run.wait_for(stage):
        return ""
    checkpoints = set(run.stages.glob(f"{stage}/*/checkpoints/**/checkpoint-*/*"))
    deadline = time.monotonic() + rng.uniform(0, 1.05 * seconds[stage])
    if rng.random() < 0.4 and "midtrain sft score rl distilled internalised onerec".find(stage.partition("_")[0]) >= 0:
        deadline = time.monotonic() + seconds[stage]
        skipped = rng.randrange(3)
        while time.monotonic() < deadline and not run.ended():
            new = set(run.stages.glob(f"{stage}/*/checkpoints/**/checkpoint-*/*")) - checkpoints
            if new:
                checkpoints |= new
                skipped -= 1
                if skipped < 0:
                    deadline = time.monotonic() + rng.uniform(0, 0.06)
                    break
            time.sleep(0.002)
    while time.monotonic() < deadline and not run.ended():
        time.sleep(0.002)
    return "" if run.ended() else run.kill()


if __name__ == "__main__":
    report()
