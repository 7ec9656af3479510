"""Seeds that are derived from names, so that a result does not depend on the order of computations."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: object) -> int:
    """Return the seed of one purpose, for example `derive_seed(2020, "traces", request_id)`.

    Args:
        seed: Seed of the run.
        *names: Names of the purpose. Equal names give equal seeds.

    Returns:
        A number from 0 to 2**32 - 1.

    >>> derive_seed(2020, "a") == derive_seed(2020, "a"), derive_seed(2020, "a") == derive_seed(2020, "b")
    (True, False)
    """
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
