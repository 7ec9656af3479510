"""Training of a model whose weights several processes share, with FSDP.

FSDP changes the model that it shards. The other steps of a stage need the whole model: they generate answers, compute
likelihoods and save the weights. So FSDP gets a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch

from recbole_gr2.distributed import uses_fsdp

ROWS = "trained_rows"  # attribute of an embedding or a head: 1 for each row of the weight that is trained, (V, 1)


@contextmanager
def trainable(model: Any) -> Iterator[Any]:
    """Yield the model to train within this context. Afterwards `model` has the trained weights in every process.

    Without FSDP this is `model` itself. With FSDP it is a copy, and `model` waits in the memory of the CPU.

    Args:
        model: the whole model.
    """
    if not uses_fsdp():
        yield model
        return
    place = next(model.parameters()).device
    sharded = deepcopy(model.to("cpu"))
    yield sharded
    weights = model.state_dict()
    for name, value in sharded.state_dict().items():  # One at a time, so that no process has two whole models.
        weights[name].copy_(_whole(value))
    model.train().to(place)


def _whole(value: torch.Tensor) -> torch.Tensor:
    """The whole tensor of which each process has a part. Every process has to call it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def mask_gradients(model: Any) -> None:
    """Set the gradients of all rows to 0 that `adapter.new_rows_alone` does not train.

    FSDP replaces the parameters of a model, and loses their hooks. Without FSDP the hooks have done this before.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    for module in model.modules():
        rows: torch.Tensor | None = getattr(module, ROWS, None)
        if rows is None or not isinstance(module.weight.grad, DTensor):
            continue
        gradient = module.weight.grad
        mask = rows.to(gradient.device, gradient.dtype)
        gradient.mul_(distribute_tensor(mask, gradient.device_mesh, gradient.placements))
