"""Several processes that run a stage together, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import os

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_all() -> None:
    """Go on when every process is here; the first call also chooses each one's GPU."""
    if WORLD_SIZE > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
