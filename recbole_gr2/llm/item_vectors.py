"""Items as input embeddings of a language model: each item of a prompt is one position.

`ItemEncoder` computes the vector of an item from its text embedding, its category and brand, and its semantic ID. It is
trained together with the language model. `ItemVectors` contains the vectors of the whole catalogue after training, so
that inference only looks them up. Features of a candidate are projected and added to its vector.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from recbole_gr2.catalog import Catalog
from recbole_gr2.prompts import kind

Batch = Mapping[str, torch.Tensor]
FILE = "items.safetensors"
HIDDEN = 512  # hidden units of the network that reads the text embedding. Our choice.
LEAST_ITEMS = 5  # a category or brand of fewer items has no embedding of its own. Our choice.


class ItemInputs(nn.Module):
    """Input embeddings of prompts in which an item is one position. Subclasses have the vectors of the items.

    Args:
        features: F, number of features of a candidate; 0 for none.
        width: D, size of an input embedding.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.project: nn.Module = nn.Identity()
        if features:
            self.project = nn.Linear(2 * features, width, bias=False)
            nn.init.zeros_(self.project.weight)  # before training, features have no effect

    def vectors_of(self, items: torch.Tensor, tokens: nn.Embedding) -> torch.Tensor:
        """Return the vectors of item ids (n,), (n, D)."""
        raise NotImplementedError

    def forward(self, batch: Batch, tokens: nn.Embedding) -> torch.Tensor:
        """Return the input embeddings, (B, T, D).

        A position without item has the embedding of its token. A position with an item has the vector of the item. For
        a candidate the embedding of its label, which is the token of this position, and its projected features are
        added.

        Args:
            batch: input_ids and items (B, T), slots (B, K), features (B, K, F) and prior (B, K), -inf for padding.
            tokens: the token embeddings of the language model.
        """
        ids, items = batch["input_ids"], batch["items"]
        is_item, slots = items > 0, batch["slots"].unsqueeze(-1)
        is_candidate = torch.zeros_like(is_item).scatter(1, batch["slots"], batch["prior"] > -torch.inf) & is_item
        embeddings = tokens(ids).masked_fill((is_item & ~is_candidate).unsqueeze(-1), 0.0)
        vectors = self.vectors_of(items[is_item], tokens).to(embeddings.dtype)
        embeddings = embeddings.index_put(is_item.nonzero(as_tuple=True), vectors, accumulate=True)
        if not len(self.mean):
            return embeddings
        projected = self.project(self._scaled(batch["features"], batch["prior"] > -torch.inf))
        return embeddings.scatter_add(1, slots.expand_as(projected), projected.to(embeddings.dtype))

    def _scaled(self, features: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Features with mean 0 and deviation 1 over the training lists, and over their own list, (B, K, 2F)."""
        features, real = (features - self.mean) / self.scale, real.unsqueeze(-1)
        count = real.sum(1, keepdim=True)
        mean = features.masked_fill(~real, 0.0).sum(1, keepdim=True) / count
        deviation = (features - mean).masked_fill(~real, 0.0)
        scale = (deviation.square().sum(1, keepdim=True) / count).sqrt().clamp(min=1e-3)
        return torch.cat([features, deviation / scale], dim=-1).masked_fill(~real, 0.0)


class ItemEncoder(ItemInputs):
    """Computes the vectors of items: codes + network(text) + category + brand.

    The first term is the sum of the token embeddings of the semantic ID's codes, divided by the root of their number.
    Mid-training has learned these embeddings. The other terms are 0 at the start.

    Args:
        texts: text embeddings of the items 1..N, (N, T).
        codes: token ids of the codes of the items, (N, L).
        groups: number of the category and of the brand of each item, (N, 2), 0 for none.
        features: F, number of features of a candidate.
        width: D, size of an input embedding.
    """

    texts: torch.Tensor
    codes: torch.Tensor
    groups: torch.Tensor

    def __init__(self, texts: np.ndarray, codes: np.ndarray, groups: np.ndarray, features: int, width: int) -> None:
        super().__init__(features, width)
        standard = (texts - texts.mean(0)) / np.maximum(texts.std(0), 1e-6)
        self.register_buffer("texts", torch.from_numpy(standard.astype(np.float32)), persistent=False)
        self.register_buffer("codes", torch.from_numpy(codes.astype(np.int64)), persistent=False)
        self.register_buffer("groups", torch.from_numpy(groups.astype(np.int64)), persistent=False)
        self.text = nn.Sequential(nn.Linear(texts.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, width))
        self.metadata = nn.ModuleList(nn.Embedding(int(numbers.max()) + 1, width) for numbers in groups.T)
        for parameter in (*self.text[2].parameters(), *self.metadata.parameters()):
            nn.init.zeros_(parameter)

    def vectors_of(self, items: torch.Tensor, tokens: nn.Embedding) -> torch.Tensor:
        """Return the vectors of item ids (n,), (n, D). An item that occurs several times is computed once."""
        unique, place = items.unique(return_inverse=True)
        rows = unique - 1
        codes = self.codes[rows]
        vectors = tokens(codes).sum(1) / math.sqrt(codes.size(1)) + self.text(self.texts[rows])
        for number, table in enumerate(self.metadata):
            vectors = vectors + table(self.groups[rows, number])
        return vectors[place]

    @torch.no_grad()
    def catalogue(self, tokens: nn.Embedding) -> ItemVectors:
        """Return the vectors of all items."""
        items = torch.arange(1, len(self.texts) + 1, device=tokens.weight.device)
        vectors = torch.cat([self.vectors_of(part, tokens) for part in items.split(4096)])
        result = ItemVectors(vectors, len(self.mean))
        result.project, result.mean, result.scale = self.project, self.mean, self.scale
        return result.eval()


class ItemVectors(ItemInputs):
    """The vectors of all items of a catalogue.

    Args:
        vectors: vectors of the items 1..N, (N, D).
        features: F, number of features of a candidate.
    """

    vectors: torch.Tensor

    def __init__(self, vectors: torch.Tensor, features: int) -> None:
        super().__init__(features, vectors.size(1))
        self.register_buffer("vectors", vectors)

    def vectors_of(self, items: torch.Tensor, tokens: nn.Embedding) -> torch.Tensor:
        """Return the vectors of item ids (n,), (n, D)."""
        return self.vectors[items - 1]

    def save(self, folder: Path) -> None:
        """Write items.safetensors."""
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> ItemVectors:
        """Read items.safetensors."""
        weights = load_file(folder / FILE)
        result = cls(weights["vectors"], len(weights["mean"]))
        result.load_state_dict(weights)
        return result.eval()


def item_groups(catalog: Catalog) -> np.ndarray:
    """Return the number of the category and of the brand of each item, (N, 2).

    The category is the last part of the path. Numbers start at 1. Categories and brands of few items have 0.
    """
    columns = []
    for values in ([kind(item) for item in catalog], [item.brand for item in catalog]):
        counts = Counter(values)
        frequent = sorted(value for value, count in counts.items() if value and count >= LEAST_ITEMS)
        number = {value: place for place, value in enumerate(frequent, start=1)}
        columns.append([number.get(value, 0) for value in values])
    return np.array(columns, dtype=np.int64).T


def feature_scale(features: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each feature over the candidates of lists, each (F,)."""
    rows = torch.from_numpy(np.concatenate(features).astype(np.float32))
    return rows.mean(0), rows.std(0).clamp(min=1e-6)
