"""Run the command on synthetic data of growing size, and record the CPU time and the memory of every stage.

    python benchmarks/scale.py WORK --items 10000 30000 100000 1000000 --plot scale.svg

WORK gets the data, the results of each run and `scale.json`, which has one line for each stage and size. A size that
`scale.json` contains is not run again. The data have ten interactions for each item and one user for ten interactions.
Items belong to clusters of 50, which share words, a brand and a category, and users mostly stay in two clusters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

INTERACTIONS, CLUSTER, STEPS = 10, 50, 40  # interactions per item; items of a cluster; longest sequence
POPULARITY = 0.7  # exponent of the popularity of items and clusters
WORDS = 20_000
SETTINGS = """\
preset: smoke
text_brand: brand
text_categories: categories
MAX_ITEM_LIST_LENGTH: 20
base_model: [PairCounts, TextEASE]
cand_pool: 50
sid_codes: 256
sid_hidden: [128]
sid_epochs: 2
sid_batch_size: 1024
eval_rows: [lambdamart, sft]
max_requests: 1000
mid_tokens: 20000
prior_steps: 50
prior_fits: 1
sft_steps: 8
"""


def write_data(folder: Path, items: int, seed: int = 1) -> None:
    """Write the data set `folder.name`: a .inter file with `INTERACTIONS` lines per item, and a .item file."""
    rng = np.random.default_rng(seed)
    users, clusters = items, max(items // CLUSTER, 2)
    order = rng.permutation(items)  # of popularity
    item_at = np.argsort(order, kind="stable")
    share = np.cumsum((1 + np.arange(items)) ** -POPULARITY)
    cluster_share = np.cumsum((1 + np.arange(clusters)) ** -POPULARITY)

    def draw(cumulative: np.ndarray, count: int) -> np.ndarray:
        return np.searchsorted(cumulative, rng.random(count) * cumulative[-1]).clip(max=len(cumulative) - 1)

    lengths = np.minimum(5 + rng.geometric(1 / (INTERACTIONS - 4), users) - 1, STEPS)
    home, start = draw(cluster_share, 2 * users).reshape(2, users), rng.random(users) * 1000
    inside = (rng.random(users) ** 2 * CLUSTER).astype(int)
    place, rows = np.where(rng.random(users) < 0.5, home[0], home[1]), []
    for step in range(STEPS):
        kind = rng.random(users)
        # Half of the steps go to one of the next three items of the cluster, a quarter to another one of the clusters.
        place = np.where(kind < 0.75, place, np.where(rng.random(users) < 0.5, home[0], home[1]))
        jump = (rng.random(users) ** 2 * CLUSTER).astype(int)
        inside = np.where(kind < 0.5, (inside + 1 + rng.integers(3, size=users)) % CLUSTER, jump)
        item = np.minimum(place * CLUSTER + inside, items - 1)
        item = np.where(kind < 0.85, item, item_at[draw(share, users)])
        active = np.flatnonzero(step < lengths)
        rows.append(np.stack([active, item[active], np.full(len(active), step)], axis=1))
    table = np.concatenate(rows)
    _, first = np.unique(table[:, 0] * items + table[:, 1], return_index=True)  # no repeated items
    table = table[np.sort(first)]
    times = (1e9 + 86400 * (start[table[:, 0]] + table[:, 2])).astype(int)
    folder.mkdir(parents=True)
    name = folder / folder.name
    with open(f"{name}.inter", "w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, item, moment in zip(table[:, 0].tolist(), table[:, 1].tolist(), times.tolist(), strict=True):
            file.write(f"u{user}\ti{item}\t{moment}\n")
    syllables = ["ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "wo", "zu"]
    words = np.array(["".join(rng.choice(syllables, 2 + word % 3)) for word in range(WORDS)])
    of_cluster, of_item = rng.integers(WORDS, size=(clusters + 1, 6)), rng.integers(WORDS, size=(items, 2))
    chosen = rng.integers(6, size=(items, 3))
    with open(f"{name}.item", "w") as file:
        file.write("item_id:token\ttitle:token_seq\tbrand:token\tcategories:token_seq\n")
        for item in range(items):
            cluster = item // CLUSTER
            title = " ".join([*words[of_cluster[cluster][chosen[item]]], *words[of_item[item]]])
            path = f"Shop > Part {cluster % 30} > Shelf {cluster % 1000}"
            file.write(f"i{item}\t{title}\tbrand {cluster // 3}\t{path}\n")


class Watch:
    """Peak of the resident memory of a process in MiB, also before its first stage, and its CPU time at any moment."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.peak, self.process = 0.0, process
        self.moments: list[float] = [time.time()]
        self.cpu: list[float] = [0.0]
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        folder, ticks = Path(f"/proc/{self.process.pid}"), os.sysconf("SC_CLK_TCK")
        while self.process.poll() is None:
            try:
                lines = (folder / "status").read_text().splitlines()
                self.peak = max(
                    [self.peak, *(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))]
                )
                user, system = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
                self.cpu.append((int(user) + int(system)) / ticks)
                self.moments.append(time.time())
            except (OSError, ValueError):
                pass
            time.sleep(0.2)

    def cpu_at(self, moment: float) -> float:
        """CPU seconds of the process up to a time."""
        return float(np.interp(moment, self.moments, self.cpu))


def run(work: Path, items: int, extra: list[str]) -> list[dict[str, Any]]:
    """Run all stages on a data set of this size in a process. Returns one record for each stage, and for the rest."""
    name = f"scale-{items}"
    if not (work / "data" / name).is_dir():
        write_data(work / "data" / name, items)
    Path(work / "data" / name / f"{name}.yaml").write_text(SETTINGS)
    saved = work / "saved"
    command = [
        sys.executable,
        "run_recbole_gr2.py",
        "--dataset",
        name,
        "--name",
        "scale",
        f"--data_path={work / 'data'}",
    ]
    command += [f"--checkpoint_dir={saved}", "--config_files", str(work / "data" / name / f"{name}.yaml"), *extra]
    started = time.time()
    with open(work / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        watch = Watch(process)
        code = process.wait()
    records: list[dict[str, Any]] = []
    files = [file for file in saved.glob(f"gr2/{name}/stages/*/*/manifest.json") if file.stat().st_mtime > started]
    for file in sorted(files, key=lambda each: each.stat().st_mtime):
        stage, end = json.loads(file.read_text()), file.stat().st_mtime
        cpu = watch.cpu_at(end) - watch.cpu_at(end - stage["seconds"])
        records.append(
            {"stage": stage["stage"], "seconds": stage["seconds"], "cpu": cpu, "mib": stage["peak_memory_mb"]}
        )
    whole = {"seconds": time.time() - started, "cpu": watch.cpu[-1]}
    rest = {key: value - sum(each[key] for each in records) for key, value in whole.items()}
    records += [
        {"stage": "start, data and report", **rest, "mib": None},
        {"stage": "whole run", **whole, "mib": round(watch.peak), "exit code": code},
    ]
    return [{"items": items, **record} for record in records]


def table(records: list[dict[str, Any]]) -> str:
    """Return CPU seconds and MiB of each stage, a column for each size, as a table in Markdown."""
    sizes, stages = [list(dict.fromkeys(each[key] for each in records)) for key in ("items", "stage")]
    cells = {(each["stage"], each["items"]): each for each in records}
    lines = ["| stage | " + " | ".join(f"{size:,} items" for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for stage in stages:
        texts = []
        for size in sizes:
            each = cells.get((stage, size))
            memory = f", {each['mib']:,} MiB" if each and each["mib"] else ""
            texts.append(f"{each['cpu']:,.0f} s{memory}" if each else "")
        lines.append(f"| {stage} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], file: Path) -> None:
    """Draw the CPU time of each stage and the peak memory of the run against the number of items."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    whole = [each for each in records if each["stage"] == "whole run"]
    sizes = np.array([each["items"] for each in whole], dtype=float)
    largest = {each["stage"]: each["cpu"] for each in records if each["items"] == sizes.max()}
    for stage in sorted(largest, key=lambda name: -largest[name])[:9]:
        points = [(each["items"], each["cpu"]) for each in records if each["stage"] == stage]
        left.plot(*zip(*points, strict=True), marker="o", markersize=3, label=stage)
    left.plot(sizes, whole[-1]["cpu"] * sizes / sizes[-1], "k:", linewidth=1, label="proportional to the items")
    left.set(xscale="log", yscale="log", xlabel="items", ylabel="CPU seconds")
    right.plot(sizes, [each["mib"] / 1024 for each in whole], marker="o", markersize=3)
    right.set(xscale="log", xlabel="items", ylabel="peak memory of the run, GiB", ylim=(0, None))
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize="small")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run the sizes that have no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--plot", type=Path)
    options, extra = parser.parse_known_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / "scale.json"
    records = json.loads(results.read_text()) if results.is_file() else []
    for items in options.items:
        if not any(each["items"] == items for each in records):
            records += run(options.work, items, extra)
            results.write_text(json.dumps(records, indent=1))
    records.sort(key=lambda each: each["items"])
    print(table(records))
    if options.plot:
        plot(records, options.plot)


if __name__ == "__main__":
    main()
