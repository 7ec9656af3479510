"""Try every sequential and general model of RecBole as base model, and print docs/base-models.md's table.

    python benchmarks/base_models.py [SASRec NeuMF ...]

Each model is trained for one epoch on a small synthetic data set, in the two ways of the stage `base_model`. Then it
is loaded and scored twice. A model that lacks an option or a column is tried again with the options of `OPTIONS`.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

FEATURES = {"load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "brand"]}}
OPTIONS: dict[str, dict[str, Any]] = {
    "DGCF": {"base_train_batch_size": 200},
    "FDSA": {**FEATURES, "base_selected_features": ["brand"]},
    "GRU4RecCPR": {"base_reranker_CAN_NUM": 20},
    "GRU4RecF": {**FEATURES, "base_selected_features": ["brand"]},
    "RaCT": {"base_metrics_k": 20, "base_pretrain_epochs": 2},
    "S3Rec": {**FEATURES, "base_item_attribute": "brand", "base_pretrain_epochs": 2},
    "SASRecCPR": {"base_reranker_CAN_NUM": 20},
    "SASRecF": {**FEATURES, "base_selected_features": ["brand"]},
}


def names(package: str) -> list[str]:
    """Return the names of the models in a package of RecBole."""
    module = importlib.import_module(f"recbole.model.{package}")
    files = {each.name for each in pkgutil.iter_modules(module.__path__)}
    return [name for name in dir(module) if name.lower() in files and isinstance(getattr(module, name), type)]


def write_data(folder: Path, users: int = 200, items: int = 60) -> None:
    """Write the data set `plain`: users walk through the items in order, from a random start."""
    rng, lines = random.Random(1), ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(users):
        start = rng.randrange(items)
        lines += [f"u{user}\ti{(start + step) % items}\t{step}" for step in range(rng.randint(5, 12))]
    texts = [f"i{item}\tThing {item}\tb{item % 5}" for item in range(items)]
    (folder / "plain").mkdir()
    (folder / "plain" / "plain.inter").write_text("\n".join(lines) + "\n")
    (folder / "plain" / "plain.item").write_text("\n".join(["item_id:token\ttitle:token_seq\tbrand:token", *texts]))


def attempt(name: str, folder: Path, options: dict[str, Any]) -> str:
    """Return "works", the reason of a refusal, or the traceback's last line."""
    import torch

    from recbole_gr2.bridge.data import Data
    from recbole_gr2.bridge.training import load_model, train_model
    from recbole_gr2.config import load_settings
    from recbole_gr2.errors import ConfigurationError, DependencyError
    from recbole_gr2.recommenders import check_model, check_model_size

    base = {"preset": "smoke", "dataset": "plain", "data_path": str(folder), "base_model": name, "base_epochs": 1}
    try:
        settings = load_settings(config_dict={**base, "MAX_ITEM_LIST_LENGTH": 12, **options})
        check_model(name, settings, base=True)
        data = Data(settings)
        check_model_size(name, data, base=True)
        # FEARec prints.
        with tempfile.TemporaryDirectory() as models, contextlib.redirect_stdout(sys.stderr):
            train_model(data, Path(models) / "base")
            train_model(data, Path(models) / "hold_out", hold_out=True, epochs=1)
            model = load_model(data, Path(models) / "base")
            first, again = (torch.cat([scores for _, scores in model.scores("test")]) for _ in range(2))
        return "works" if torch.equal(first, again) and not first.isnan().any() else "FAILS: scores do not repeat"
    except (ConfigurationError, DependencyError) as error:
        return f"refused: {error.what}"
    except Exception as error:
        return f"FAILS: {type(error).__name__}: {error}"


def main() -> None:
    """Print one table row per model."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from recbole_gr2 import compat

    compat.apply()
    kinds = {name: kind for kind in ("general", "sequential") for name in names(f"{kind}_recommender")}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        print("| model | kind | result with RecBole's defaults | with other options |\n|---|---|---|---|")
        for name in sys.argv[1:] or kinds:
            result, other = attempt(name, Path(folder), {}), ""
            if result != "works" and name in OPTIONS:
                given = OPTIONS[name]
                other = f"{attempt(name, Path(folder), given)}: " + ", ".join(f"`{k}: {v}`" for k, v in given.items())
            print(f"| {name} | {kinds[name]} | {result} | {other} |", flush=True)


if __name__ == "__main__":
    main()
