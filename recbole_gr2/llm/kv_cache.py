"""The keys and values of tokens that were read before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS = 128  # tokens that fit into a layer before it is copied; not from a paper


class PreallocatedLayer(DynamicLayer):
    """The keys and values of one layer, stored in buffers that are longer than needed.

    A new token is written into the buffers. The layer of transformers copies all keys and values for every token.

    Keys are stored in the dtype of the values. Under autocast, rotary embeddings return float32 keys, and attention
    would convert the whole cache for every token. On a CPU both are stored in float32, see
    `attention.attend_in_float32`.
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
            dtype = torch.float32 if value_states.device.type == "cpu" else value_states.dtype
            buffers = value_states.new_empty(shape, dtype=dtype), value_states.new_empty(shape, dtype=dtype)
            self.buffers = buffers
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


class Prefix(NamedTuple):
    """Tokens with which several texts begin, as the keys and values of each layer.

    Attributes:
        length: number of tokens, at least 1.
        layers: keys and values of each layer, (1, heads, length, D).
    """

    length: int
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def read(cls, model: Any, ids: Sequence[int]) -> Prefix | None:
        """Read tokens. None if there are none, or if the model has a sliding window."""
        if not ids or getattr(model.config, "sliding_window", None):
            return None
        cache: Any = preallocated_cache(model)
        model.get_decoder()(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
        return cls(len(ids), [(layer.keys, layer.values) for layer in cache.layers])

    def cache(self, model: Any, batch_size: int) -> DynamicCache:
        """Return a cache of the model with the prefix of each text of a batch."""
        cache = preallocated_cache(model)
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys.expand(batch_size, -1, -1, -1), values.expand(batch_size, -1, -1, -1), number)
        return cache
