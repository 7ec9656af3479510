"""How the tokenizers scale: fit, encode and judge at several catalogue sizes, side by side in one run.

    python benchmarks/tokenizer.py [--items 12000,100000,1000000]

Embeddings are synthetic: 384 dimensions around cluster centres, of length 1. Every line runs in a process of its own,
so that its peak memory is its own; "over" is the peak beyond what the process held before, embeddings included. Ratios
are costs per item over those of the first size: 1 is linear. Seconds are those of the processor, over all threads, so
that other work on the machine does not count. The fit is one epoch; k-means looks at 256 items a code, so that above
65,536 items residual k-means costs the same to fit at every size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

DIM, CLUSTERS, EPOCHS = 384, 2000, 1
METHODS = ("rqvae", "rqkmeans")
HEADER = (
    "| tokenizer | items | fit s | per item | encode s | items/s | per item | health s | unique | embeddings MiB "
    "| over MiB |\n|" + "---|" * 11
)


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its peak since the last reset. Linux alone."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(method: str, items: int) -> dict:
    """Seconds and MiB of one tokenizer for one size."""
    import numpy as np
    import torch

    from recbole_gr2.sid.quality import health
    from recbole_gr2.sid.rqkmeans import fit_rqkmeans
    from recbole_gr2.sid.rqvae import RQVAEConfig, SidConfig, assign, fit_rqvae

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLUSTERS, DIM)).astype(np.float32)
    embeddings = np.empty((items, DIM), dtype=np.float32)
    for start in range(0, items, 10_000):  # never a second copy of the whole
        block = embeddings[start : start + 10_000]
        block[:] = centres[rng.integers(CLUSTERS, size=len(block))] + 0.5 * rng.normal(size=block.shape)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])  # the first one imports torch's compiler, 4 s
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, times = memory("VmRSS"), [time.process_time()]
    if method == "rqvae":
        model = fit_rqvae(embeddings, RQVAEConfig(epochs=EPOCHS, seed=0))
    else:
        model = fit_rqkmeans(embeddings, SidConfig(seed=0))
    times.append(time.process_time())
    codes = assign(model, embeddings, seed=0)
    times.append(time.process_time())
    unique = health(codes, model, embeddings).uniqueness
    times.append(time.process_time())
    fit, encode, judge = (after - earlier for earlier, after in itertools.pairwise(times))
    return {
        "fit": fit,
        "encode": encode,
        "health": judge,
        "unique": unique,
        "embeddings": embeddings.nbytes / 2**20,
        "over": memory("VmHWM") - before,
    }


def main() -> None:
    """Measure both tokenizers at every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", default="12000,100000", help="sizes, with commas between them")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    print(HEADER)
    first: dict[str, dict] = {}
    for items in map(int, options.items.split(",")):
        for method in METHODS:
            done = subprocess.run(
                [sys.executable, __file__, "--one", method, str(items)], stdout=subprocess.PIPE, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            cost = {step: found[step] / items for step in ("fit", "encode")}
            ratio = {step: cost[step] / first.setdefault(method, cost)[step] for step in cost}
            print(
                f"| {method} | {items:,} | {found['fit']:.1f} | {ratio['fit']:.2f}x | {found['encode']:.1f} "
                f"| {items / found['encode']:,.0f} | {ratio['encode']:.2f}x | {found['health']:.1f} "
                f"| {found['unique']:.2%} | {found['embeddings']:,.0f} | {found['over']:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
