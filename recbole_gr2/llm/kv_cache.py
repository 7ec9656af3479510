"""A key-value cache that allocates memory in advance."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS = 128  # tokens that fit into a layer before it is copied; not from a paper


class PreallocatedLayer(DynamicLayer):
    """The keys and values of one layer, stored in buffers that are longer than needed.

    A new token is written into the buffers. The layer of transformers copies all keys and values for every token.

    Keys are stored in the dtype of the values. Under autocast, rotary embeddings return float32 keys, and attention
    would convert the whole cache for every token.
    """

    buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, heads, tokens, D), and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.size(-2)
        buffers, keys, values = self.buffers, self.keys, self.values
        assert keys is not None and values is not None
        # The methods of transformers (crop, reorder_cache, ...) replace `keys`: then the buffers are stale.
        if buffers is None or after > buffers[0].size(-2) or keys.data_ptr() != buffers[0].data_ptr():
            shape = (*key_states.shape[:2], after + SPARE_TOKENS, key_states.size(-1))
            buffers = self.buffers = value_states.new_empty(shape), value_states.new_empty(shape)
            if before:
                buffers[0][:, :, :before], buffers[1][:, :, :before] = keys, values
        buffers[0][:, :, before:after], buffers[1][:, :, before:after] = key_states, value_states
        self.keys, self.values = buffers[0][:, :, :after], buffers[1][:, :, :after]
        return self.keys, self.values


def preallocated_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache for this model. Layers with a sliding window keep the class of transformers."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
