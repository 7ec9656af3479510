"""The attention of language models on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

FLOAT32 = "recbole_gr2_float32"  # name of `attend_in_float32` in transformers


def attend_in_float32(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of torch in float32, also under autocast, with a result of the type of `value`.

    It replaces the attention of transformers, see `use_float32`.

    torch's kernels for CPUs are slower in bfloat16: for a single new token about ten times, because they prepare all
    keys and values for a product of matrices, and in the backward pass for texts of 45 tokens 3.5 times
    (docs/performance.md).
    """
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        attended, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
    return attended.to(value.dtype), None


AttentionInterface.register(FLOAT32, attend_in_float32)
AttentionMaskInterface.register(FLOAT32, sdpa_mask)


def use_float32(model: Any) -> None:
    """Let a model that uses the attention of torch attend in float32."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(FLOAT32)
