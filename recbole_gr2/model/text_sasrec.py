"""CausalSASRec whose item embeddings are the sum of a learnt embedding and a linear map of the text embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from recbole_gr2.model.causal_sasrec import CausalSASRec
from recbole_gr2.model.dropout import Dropout

if TYPE_CHECKING:
    from recbole.config import Config
    from recbole.data.dataset import Dataset
    from recbole.data.interaction import Interaction
    from torch import Tensor


class TextSASRec(CausalSASRec):
    """CausalSASRec with the item table E + t W.

    E are embeddings of item ids and W is a linear map, both learnt. The text embeddings t are standardised over the
    items and have dropout in training. Input and output use the same table. Its dropout is drawn once in a step. W
    makes the score of an item without training interactions depend on its text.

    Args:
        config: RecBole's configuration with the options in properties/model/TextSASRec.yaml. In addition it has
            `text_embeddings`, the embeddings (N, D) of the items 1..N.
        dataset: RecBole's training data.
    """

    texts: Tensor

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.register_buffer("texts", standardised(torch.tensor(config["text_embeddings"])), persistent=False)
        self.text_dropout = Dropout(config["text_dropout"])
        self.text_map = torch.nn.Linear(self.texts.size(1), self.hidden_size, bias=False)
        # At the start both terms of the table have the same standard deviation.
        torch.nn.init.normal_(self.text_map.weight, std=self.initializer_range / self.texts.size(1) ** 0.5)

    def train(self, mode: bool = True) -> TextSASRec:
        """Set training or evaluation mode. The next call of `item_table` computes the table again."""
        self.table: Tensor | None = None
        return super().train(mode)

    def item_table(self) -> Tensor:
        """Return the embeddings of all items, (N + 1, D). In evaluation without gradients they are computed once."""
        constant = not self.training and not torch.is_grad_enabled()
        if constant and self.table is not None:
            return self.table
        table = self.item_embedding.weight + self.text_map(self.text_dropout(self.texts))
        self.table = table if constant else None
        return table

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Return the scores of all items, (B, N + 1) float32."""
        return self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]) @ self.item_table().T

    def predict(self, interaction: Interaction) -> Tensor:
        """Return the score of one item per row, (B,)."""
        last = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return (last * self.item_table()[interaction[self.ITEM_ID]]).sum(dim=1)


def standardised(embeddings: Tensor) -> Tensor:
    """Return the text embeddings of the items 0..N, (N + 1, D), each dimension with mean 0 and standard deviation 1.

    Item 0 is padding and has the embedding 0. A dimension with equal values stays 0.

    Args:
        embeddings: text embeddings of the items 1..N, (N, D).
    """
    values = embeddings.double()
    centred = values - values.mean(dim=0)
    deviations = centred.square().mean(dim=0).sqrt()
    scaled = centred / torch.where(deviations > 1e-8, deviations, torch.ones_like(deviations))
    return torch.cat([scaled.new_zeros(1, scaled.size(1)), scaled]).float()
