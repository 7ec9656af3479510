"""Measure how the tokenizers scale: time and memory of fitting, encoding and the quality measure by catalogue size.

    python benchmarks/tokenizer.py [--items 12000,100000,1000000]

The embeddings are synthetic: 384 dimensions around cluster centres, of length 1. Each table row is measured in a
process of its own, because it reports peak memory. "over" is the peak memory minus the memory before the fit, which
includes the embeddings. The columns "per item" are the time per item relative to the first catalogue size. They are 1
for linear scaling. Seconds are processor time over all threads, so other work on the machine does not matter. The fit
has three epochs, so that 12,000 items have more than the least number of steps. k-means uses 256 items per code, so the
fit of residual k-means has a constant cost above 65,536 items.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

DIM, CLUSTERS, EPOCHS = 384, 2000, 3
METHODS = ("rqvae", "rqkmeans")
HEADER = (
    "| tokenizer | items | fit s | per item | encode s | items/s | per item | health s | unique | embeddings MiB "
    "| over MiB |\n|" + "---|" * 11
)


def memory(field: str) -> float:
    """Return the memory of this process in MiB: VmRSS now, VmHWM at the peak since the last reset. Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(method: str, items: int) -> dict[str, float]:
    """Return the seconds and the MiB of a tokenizer for a number of items."""
    import numpy as np
    import torch

    from recbole_gr2.sid.quality import health
    from recbole_gr2.sid.quantizer import Quantizer, SidConfig, assign
    from recbole_gr2.sid.rqkmeans import fit_rqkmeans
    from recbole_gr2.sid.rqvae import RQVAEConfig, fit_rqvae

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLUSTERS, DIM)).astype(np.float32)
    embeddings = np.empty((items, DIM), dtype=np.float32)
    for start in range(0, items, 10_000):  # In blocks, so that there is no second copy of all embeddings.
        block = embeddings[start : start + 10_000]
        block[:] = centres[rng.integers(CLUSTERS, size=len(block))] + 0.5 * rng.normal(size=block.shape)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])  # The first optimizer imports torch's compiler, 4 s.
    Path("/proc/self/clear_refs").write_text("5")  # Reset the peak.
    before, times = memory("VmRSS"), [time.process_time()]
    model: Quantizer
    if method == "rqvae":
        model = fit_rqvae(embeddings, RQVAEConfig(epochs=EPOCHS, seed=0))
    else:
        model = fit_rqkmeans(embeddings, SidConfig(seed=0))
    times.append(time.process_time())
    codes = assign(model, embeddings, seed=0)
    times.append(time.process_time())
    unique = health(codes, model, embeddings).uniqueness
    times.append(time.process_time())
    fit, encode, quality = (after - earlier for earlier, after in itertools.pairwise(times))
    return {
        "fit": fit,
        "encode": encode,
        "health": quality,
        "unique": unique,
        "embeddings": embeddings.nbytes / 2**20,
        "over": memory("VmHWM") - before,
    }


def main() -> None:
    """Measure both tokenizers for each catalogue size and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", default="12000,100000", help="catalogue sizes, separated by commas")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    print(HEADER)
    first: dict[str, dict[str, float]] = {}
    for items in map(int, options.items.split(",")):
        for method in METHODS:
            done = subprocess.run(
                [sys.executable, __file__, "--one", method, str(items)], stdout=subprocess.PIPE, text=True, check=True
            )
            result = json.loads(done.stdout.splitlines()[-1])
            cost = {step: result[step] / items for step in ("fit", "encode")}
            ratio = {step: cost[step] / first.setdefault(method, cost)[step] for step in cost}
            print(
                f"| {method} | {items:,} | {result['fit']:.1f} | {ratio['fit']:.2f}x | {result['encode']:.1f} "
                f"| {items / result['encode']:,.0f} | {ratio['encode']:.2f}x | {result['health']:.1f} "
                f"| {result['unique']:.2%} | {result['embeddings']:,.0f} | {result['over']:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
