"""How the tokenizer scales: fit and encode at several catalogue sizes, side by side in one run.

    python benchmarks/tokenizer.py --items 12000 100000 1000000

Embeddings are synthetic: 384 dimensions around cluster centres, of length 1. Each size runs in a process of its own, so
that its peak memory is its own; beside the embeddings' own size it shows what a size costs, not what it left behind.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

DIM, CLUSTERS, EPOCHS = 384, 2000, 1


def measure(items: int) -> dict:
    """Seconds and MiB for one size."""
    import resource

    import numpy as np

    from recbole_gr2.sid.rqvae import RQVAEConfig, assign, fit_rqvae

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLUSTERS, DIM)).astype(np.float32)
    embeddings = np.empty((items, DIM), dtype=np.float32)
    for start in range(0, items, 10_000):  # never a second copy of the whole
        block = embeddings[start : start + 10_000]
        block[:] = centres[rng.integers(CLUSTERS, size=len(block))] + 0.5 * rng.normal(size=block.shape)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    started = time.perf_counter()
    model = fit_rqvae(embeddings, RQVAEConfig(epochs=EPOCHS, seed=0))
    fitted = time.perf_counter()
    codes = assign(model, embeddings, seed=0)
    ended = time.perf_counter()
    return {
        "items": items,
        "fit_s": fitted - started,
        "encode_s": ended - fitted,
        "unique": len(np.unique(codes, axis=0)) / items,
        "embeddings_mib": embeddings.nbytes / 2**20,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Measure every size in its own process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[12_000, 100_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    print(f"{'items':>9} {'fit s/epoch':>11} {'per item':>9} {'encode s':>9} {'per item':>9} {'unique':>7} "
          f"{'embeddings MiB':>14} {'peak MiB':>9}")  # fmt: skip
    first = None
    for items in options.items:
        command = [sys.executable, __file__, "--one", str(items)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        costs = [found["fit_s"] / items, found["encode_s"] / items]
        first = first or costs
        ratios = [f"{cost / reference:.2f}x" for cost, reference in zip(costs, first, strict=True)]
        print(
            f"{items:>9,} {found['fit_s']:>11.1f} {ratios[0]:>9} {found['encode_s']:>9.1f} {ratios[1]:>9} "
            f"{found['unique']:>7.2%} {found['embeddings_mib']:>14,.0f} {found['peak_mib']:>9,.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
