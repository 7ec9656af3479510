"""Compare the training time of RecBole's sequential models in length buckets and with padding.

    python benchmarks/by_length.py [--dataset amazon-beauty --data_path DIR] [--batches 8] [--train_batch_size 256]

Seconds are processor time for the loss and its gradients on the same batches. The ratio is padding / by length.
"""

from __future__ import annotations

import argparse
import time

MODELS = ("SASRec", "GRU4Rec", "BERT4Rec")


def main() -> None:
    """Print one table row per model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", default="dataset/")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--train_batch_size", type=int, default=256)
    options = parser.parse_args()

    from recbole_gr2.bridge.data import Data
    from recbole_gr2.bridge.models import find_model
    from recbole_gr2.bridge.training import BucketedLoss
    from recbole_gr2.config import load_settings, recbole_config

    settings = load_settings(config_dict={"dataset": options.dataset, "data_path": options.data_path})
    data = Data(settings)
    from recbole.data.utils import get_dataloader
    from recbole.utils import init_seed

    print("| model | batches | padding s | by length s | ratio |\n|---|---|---|---|---|")
    for name in MODELS:
        config = recbole_config(settings, find_model(name), base=False, train_batch_size=options.train_batch_size)
        init_seed(settings["seed"], True)
        loader = iter(get_dataloader(config, "train")(config, data.built[0], None, shuffle=True))
        batches = [next(loader) for _ in range(options.batches + 1)]
        model = find_model(name)(config, data.built[0]).train()
        loss = BucketedLoss(model, print)
        seconds = {}
        for how in (loss.whole, loss):
            how(batches[0]).backward()  # The first call is slower.
            started = time.process_time()
            for batch in batches[1:]:
                model.zero_grad()
                how(batch).backward()
            seconds[how] = time.process_time() - started
        whole, parts = seconds.values()
        print(
            f"| {name} | {options.batches} of {options.train_batch_size} rows | {whole:.1f} | {parts:.1f} "
            f"| {whole / parts:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
