"""SASRec that is trained on whole sequences: one forward pass gives a loss at every position.

RecBole expands a sequence of n items to n - 1 training rows and encodes each prefix separately. A causal encoder gives
the same predictions for all prefixes in one pass, as in the paper (Kang and McAuley, ICDM 2018, section III-E). Then an
epoch costs about one forward position per interaction. Architecture, scores and hyper-parameters are those of RecBole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recbole_gr2 import compat

compat.apply()  # Before RecBole's models are imported: one of them slows down every backward pass of the process.

from recbole.model.sequential_recommender.sasrec import SASRec  # noqa: E402
from torch import Tensor  # noqa: E402

from recbole_gr2.llm.model import uses_bf16  # noqa: E402
from recbole_gr2.model.dropout import use_fast_dropout  # noqa: E402

if TYPE_CHECKING:
    from recbole.config import Config
    from recbole.data.dataset import Dataset
    from recbole.data.interaction import Interaction

SLICE, GPU_SLICE = 32, 256  # Sequences that are padded to the same length in the attention, on a CPU and a GPU.
MASKED = -10_000.0  # Added to the scores of masked positions in the attention, as by RecBole.
BLOCK = 128  # Positions whose scores over the catalogue are in memory at the same time.


class CausalSASRec(SASRec):
    """RecBole's SASRec with cross-entropy over all items at every position of a sequence.

    Args:
        config: RecBole's configuration with the options in properties/model/CausalSASRec.yaml.
        dataset: RecBole's training data.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        use_fast_dropout(self)
        if self.hidden_act == "gelu":  # RecBole's function consists of five operations.
            for layer in self.trm_encoder.layer:
                layer.feed_forward.intermediate_act_fn = torch.nn.functional.gelu
        self.bf16 = uses_bf16(config["bf16"], config["device"])

    @staticmethod
    def training_rows(interactions: Interaction, config: Config) -> np.ndarray:
        """Return the positions of the training rows to use: those that end a block of MAX_ITEM_LIST_LENGTH targets.

        Blocks are counted backwards from the last row of each user, so that each training interaction is a target
        exactly once.

        Args:
            interactions: RecBole's training rows, one per prefix, sorted by user and length.
            config: RecBole's configuration.
        """
        users = interactions[config["USER_ID_FIELD"]].numpy()
        length = config["MAX_ITEM_LIST_LENGTH"]
        ends = np.flatnonzero(np.r_[users[1:] != users[:-1], True])
        starts = np.r_[0, ends[:-1] + 1]
        return np.concatenate([np.arange(end, start - 1, -length) for start, end in zip(starts, ends, strict=True)])

    def item_table(self) -> Tensor:
        """Return the embeddings of all items, (N + 1, D), for the input and the output."""
        return self.item_embedding.weight

    def encode(self, item_seq: Tensor, lengths: Tensor, table: Tensor | None = None) -> Tensor:
        """Return the hidden states at all items of all sequences, (P, D), one sequence after another.

        The layers are those of RecBole's `forward`. Only the attention reads padding.

        Args:
            item_seq: item ids, padded at the end, (B, T). The shortest sequences come first.
            lengths: number of items of each sequence, (B,).
            table: result of `item_table`, which is called by default.
        """
        table = self.item_table() if table is None else table
        is_item = torch.arange(item_seq.size(1), device=item_seq.device) < lengths.unsqueeze(1)
        items = torch.nn.functional.embedding(item_seq[is_item], table, padding_idx=0)
        positions = self.position_embedding(is_item.nonzero(as_tuple=True)[1])
        hidden = self.dropout(self.LayerNorm(items + positions))
        size, slices = SLICE if item_seq.device.type == "cpu" else GPU_SLICE, []
        for part, own in zip(is_item.split(size), lengths.split(size), strict=True):
            mask = part[:, : int(own[-1])]
            slices.append((mask.size(0), mask.size(1), mask.flatten().nonzero().squeeze(1)))
        for layer in self.trm_encoder.layer:
            hidden = layer.feed_forward(_attend(layer.multi_head_attention, hidden, slices))
        return hidden

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Return the hidden state at the last item, (B, D), as RecBole's `forward` does.

        Args:
            item_seq: item ids, padded at the end, (B, T).
            item_seq_len: number of items, (B,).
        """
        order = item_seq_len.argsort()
        hidden = self.encode(item_seq[order], item_seq_len[order])
        last = hidden[item_seq_len[order].cumsum(0) - 1]
        return last[order.argsort()]

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Return the mean cross-entropy over all positions that have an item."""
        order = interaction[self.ITEM_SEQ_LEN].argsort()
        item_seq, lengths = interaction[self.ITEM_SEQ][order], interaction[self.ITEM_SEQ_LEN][order]
        targets = torch.zeros_like(item_seq)
        targets[:, :-1] = item_seq[:, 1:]
        targets.scatter_(1, (lengths - 1).unsqueeze(1), interaction[self.POS_ITEM_ID][order].unsqueeze(1))
        table = self.item_table()  # Once per step.
        hidden = self.encode(item_seq, lengths, table)
        return CatalogueCrossEntropy.apply(hidden, table, targets[targets > 0], self.bf16)


def _attend(attention: Any, hidden: Tensor, slices: Sequence[tuple[int, int, Tensor]]) -> Tensor:
    """Return the result of a layer of causal attention, with its residual connection and layer norm, (P, D).

    The sequences are padded in slices of similar length. Later positions are masked as by RecBole.

    Args:
        attention: RecBole's MultiHeadAttention.
        hidden: hidden states at all items, (P, D).
        slices: for each slice the number S of sequences, their largest length L, and the places of the items among the
            S * L positions.
    """
    size, heads = hidden.size(1), attention.num_attention_heads
    queries = attention.query(hidden) / attention.sqrt_attention_head_size
    inputs = torch.cat([queries, attention.key(hidden), attention.value(hidden)], dim=1)
    start, attended = 0, []
    for count, length, places in slices:
        padded = inputs.new_zeros(count * length, 3 * size)
        padded = padded.index_copy(0, places, inputs[start : start + len(places)])
        start += len(places)
        query, key, value = padded.view(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        later = inputs.new_full((length, length), MASKED).triu(1)
        weights = attention.attn_dropout(torch.softmax(query @ key.transpose(2, 3) + later, dim=-1))
        attended.append((weights @ value).transpose(1, 2).reshape(-1, size).index_select(0, places))
    return attention.LayerNorm(attention.out_dropout(attention.dense(torch.cat(attended))) + hidden)


class CatalogueCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden states (P, D) against the embeddings of all items (N, D), in blocks of positions.

    The result equals `cross_entropy(hidden @ weight.T, targets)`, but the scores (P, N) are never in memory as a whole.
    A block fits into the cache of the processor, and its gradients are computed while it is there.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bf16: bool = False) -> Tensor:
        """Return the loss. Both gradients are computed here and stored for `backward`.

        Args:
            ctx: context of autograd.
            hidden: hidden states, (P, D).
            weight: item embeddings, (N, D).
            targets: row of the target item in `weight`, (P,).
            bf16: whether the matrix products have operands in bfloat16. Sums over items and over blocks have the
                type of `hidden`.
        """
        count, loss = len(hidden), hidden.new_zeros(())
        operand = torch.bfloat16 if bf16 else hidden.dtype
        table = weight.to(operand)
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, count, BLOCK):
            block, labels = hidden[start : start + BLOCK], targets[start : start + BLOCK].unsqueeze(1)
            scores = block.to(operand) @ table.T
            target, top = scores.gather(1, labels).to(hidden.dtype), scores.amax(dim=1, keepdim=True)
            shares = scores.sub_(top).exp_()  # The softmax times `total`.
            total = shares.sum(dim=1, keepdim=True, dtype=hidden.dtype)
            loss += (total.log() + top - target).sum()
            hidden_grad[start : start + BLOCK] = (shares @ table) / total
            weight_grad += shares.T @ (block / total).to(operand)
        # The gradient of the scores is the softmax, minus 1 at the target.
        hidden_grad -= weight[targets]
        weight_grad.index_add_(0, targets, hidden, alpha=-1)
        ctx.save_for_backward(hidden_grad / count, weight_grad / count)
        return loss / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of hidden states and item embeddings."""
        (grad,) = grads
        hidden_grad, weight_grad = ctx.saved_tensors
        return grad * hidden_grad, grad * weight_grad, None, None
