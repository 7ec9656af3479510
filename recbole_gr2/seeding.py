"""Seeds derived from names, so that a result does not depend on the order in which things happen."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: object) -> int:
    """A 32-bit seed for one purpose, e.g. `derive_seed(2020, "traces", request_id)`.

    >>> derive_seed(2020, "a") == derive_seed(2020, "a"), derive_seed(2020, "a") == derive_seed(2020, "b")
    (True, False)
    """
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
