"""SASRec trained on whole sequences: one forward pass gives a loss at every position.

RecBole augments each sequence of n items into n - 1 rows and encodes every prefix again. A causal encoder gives the
same predictions for all prefixes at once (that is how the paper trains: Kang and McAuley, ICDM 2018, section III-E), so
an epoch costs about as many forward positions as there are interactions. Model, scores and hyper-parameters are
RecBole's.
"""

from __future__ import annotations

import numpy as np
import torch

from recbole_gr2 import compat

compat.apply()  # before RecBole's models are imported: one of them slows every backward pass of the process

from recbole.model.sequential_recommender.sasrec import SASRec  # noqa: E402
from torch import Tensor  # noqa: E402

SLICE = 32  # rows of similar length that are encoded together
BLOCK = 128  # positions whose scores over the catalogue are held at once


class CausalSASRec(SASRec):
    """RecBole's SASRec with cross-entropy over all items at every position of a sequence."""

    @staticmethod
    def training_rows(interactions, config) -> np.ndarray:
        """Which of RecBole's prefix rows to train on: those that end a block of MAX_ITEM_LIST_LENGTH targets.

        Counted from each user's last row backwards, so that every training interaction is a target exactly once.
        """
        users = interactions[config["USER_ID_FIELD"]].numpy()
        length = config["MAX_ITEM_LIST_LENGTH"]
        ends = np.flatnonzero(np.r_[users[1:] != users[:-1], True])
        starts = np.r_[0, ends[:-1] + 1]
        return np.concatenate([np.arange(end, start - 1, -length) for start, end in zip(starts, ends, strict=True)])

    def encode(self, item_seq: Tensor) -> Tensor:
        """Hidden state at every position: (B, T) -> (B, T, D). Same layers as RecBole's `forward`."""
        positions = torch.arange(item_seq.size(1), device=item_seq.device).expand_as(item_seq)
        hidden = self.dropout(self.LayerNorm(self.item_embedding(item_seq) + self.position_embedding(positions)))
        return self.trm_encoder(hidden, self.get_attention_mask(item_seq), output_all_encoded_layers=True)[-1]

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Hidden state at the last item, (B, D): RecBole's `forward`, in slices of similar length."""
        last = item_seq.new_empty(len(item_seq), self.hidden_size, dtype=self.item_embedding.weight.dtype)
        for rows in item_seq_len.argsort().split(8 * SLICE):
            lengths = item_seq_len[rows]
            last[rows] = self.gather_indexes(self.encode(item_seq[rows, : int(lengths.max())]), lengths - 1)
        return last

    def calculate_loss(self, interaction) -> Tensor:
        """Mean cross-entropy over all positions that hold an item.

        Rows go through the encoder in slices of similar length, each cut to its longest: most sequences are short, and
        padding all to the longest of the batch would be most of the work.
        """
        item_seq, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        targets = torch.zeros_like(item_seq)
        targets[:, :-1] = item_seq[:, 1:]
        targets.scatter_(1, (lengths - 1).unsqueeze(1), interaction[self.POS_ITEM_ID].unsqueeze(1))
        hidden, wanted = [], []
        for rows in lengths.argsort().split(SLICE):
            longest = int(lengths[rows].max())
            real = targets[rows, :longest] > 0
            hidden.append(self.encode(item_seq[rows, :longest])[real])
            wanted.append(targets[rows, :longest][real])
        return CatalogueCrossEntropy.apply(torch.cat(hidden), self.item_embedding.weight, torch.cat(wanted))


class CatalogueCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden states (P, D) against every item's embedding (N, D), a block of positions at a time.

    Equal to `cross_entropy(hidden @ weight.T, targets)`, but the (P, N) scores never exist as a whole: a block fits
    into the processor's cache, and its gradients are taken while it is there.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Loss, with both gradients kept for `backward`."""
        count, loss = len(hidden), hidden.new_zeros(())
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, count, BLOCK):
            block, wanted = hidden[start : start + BLOCK], targets[start : start + BLOCK].unsqueeze(1)
            scores = block @ weight.T
            total = scores.logsumexp(dim=1, keepdim=True)
            loss += (total - scores.gather(1, wanted)).sum()
            slope = scores.sub_(total).exp_()  # softmax; minus 1 at the target it is the gradient of the scores
            slope.scatter_add_(1, wanted, slope.new_full((1, 1), -1.0).expand_as(wanted))
            hidden_grad[start : start + BLOCK] = slope @ weight
            weight_grad.addmm_(slope.T, block)
        ctx.save_for_backward(hidden_grad / count, weight_grad / count)
        return loss / count

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Gradients of hidden states and item embeddings."""
        hidden_grad, weight_grad = ctx.saved_tensors
        return grad * hidden_grad, grad * weight_grad, None
