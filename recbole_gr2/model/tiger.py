"""TIGER: a T5 model that reads the semantic IDs of the history and generates the semantic ID of the next item.

Source: Rajput et al., NeurIPS 2023, arXiv 2305.05065. The encoder reads a user token, then the L codes of each history
item, oldest first. The decoder generates the L codes of the next item. A token represents one code of one level, so no
separator between items is necessary. All outputs have L codes, so there is no end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch

from recbole_gr2 import compat

compat.apply()  # Before RecBole's models are imported: one of them slows down every backward pass of the process.

from recbole.model.abstract_recommender import SequentialRecommender  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5ForConditionalGeneration  # noqa: E402

from recbole_gr2.llm.beam import Beams, SidTrie, item_scores, search, target_last  # noqa: E402
from recbole_gr2.llm.model import uses_bf16  # noqa: E402
from recbole_gr2.model.batching import by_length  # noqa: E402

if TYPE_CHECKING:
    from recbole.config import Config
    from recbole.data.dataset import Dataset
    from recbole.data.interaction import Interaction

PAD = 0  # Padding, and the start token of the decoder as in T5.
# Histories per forward pass, measured on a CPU. A search has cand_beams sequences per history. A GPU reads a training
# batch as a whole.
TRAIN_SLICE, SEARCH_SLICE, GPU_SLICE = 32, 8, 256


class TIGER(SequentialRecommender):
    """Generative retrieval with a T5 model.

    Scores are log-probabilities of beams. Items that no beam generated are far below them.

    Args:
        config: RecBole's configuration with the settings in properties/model/TIGER.yaml. In addition it has `sids`, the
            codes (N, L) of the items 1 to N, and `cand_beams`, the width of the beam search.
        dataset: RecBole's training data.
    """

    item_tokens: Tensor

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        codes = torch.as_tensor(config["sids"]).long()
        levels, count = codes.size(1), int(codes.max()) + 1
        tokens = 1 + torch.arange(levels * count).view(levels, count)  # token of each (level, code)
        item_tokens = torch.cat([codes.new_full((1, levels), PAD), tokens[torch.arange(levels), codes]])
        self.register_buffer("item_tokens", item_tokens, persistent=False)  # (N + 1, L)
        self.trie = SidTrie.build(codes.numpy(), tokens.numpy(), begin_id=PAD)
        self.history, self.beams = config["max_history"], config["cand_beams"]
        self.first_user, self.user_tokens = 1 + tokens.numel(), config["n_user_tokens"]
        self.bf16 = uses_bf16(config["bf16"], config["device"])
        options: dict[str, Any] = {
            "vocab_size": self.first_user + self.user_tokens,
            "d_model": config["hidden_size"],
            "d_ff": config["inner_size"],
            "d_kv": config["head_size"],
            "num_heads": config["n_heads"],
            "num_layers": config["n_layers"],
            "dropout_rate": config["dropout_prob"],
            "feed_forward_proj": config["hidden_act"],
            "layer_norm_epsilon": config["layer_norm_eps"],
            "pad_token_id": PAD,
            "decoder_start_token_id": PAD,
            "eos_token_id": None,
            "attn_implementation": "eager",  # The position bias of T5 prevents the fused kernels.
        }
        self.t5 = T5ForConditionalGeneration(T5Config(**options))

    def inputs(self, interaction: Interaction) -> Tensor:
        """Return the encoder tokens, (B, 1 + H * L): the user, then the last H items, oldest first.

        Shorter histories are padded at the end. Without user tokens (`n_user_tokens: 0`) the first column is missing.
        """
        items, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN].unsqueeze(1)
        positions = torch.arange(min(self.history, items.size(1)), device=items.device)
        recent = items.gather(1, positions + (lengths - self.history).clamp(min=0))
        tokens = self.item_tokens[recent.masked_fill(positions >= lengths, PAD)].flatten(1)
        if not self.user_tokens:
            return tokens
        user = self.first_user + interaction[self.USER_ID] % self.user_tokens  # Several users share a token.
        return torch.cat([user.unsqueeze(1), tokens], dim=1)

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Return the mean cross-entropy of the codes of the target, over the whole vocabulary."""
        targets = self.item_tokens[interaction[self.POS_ITEM_ID]]
        losses = []
        with torch.autocast(targets.device.type, torch.bfloat16, enabled=self.bf16):
            for positions, tokens in slices(self.inputs(interaction), TRAIN_SLICE):
                loss = self.t5(input_ids=tokens, attention_mask=tokens != PAD, labels=targets[positions]).loss
                losses.append(loss * (len(positions) / len(targets)))
        return sum(losses[1:], start=losses[0])

    @torch.no_grad()
    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Return the scores of all items, (B, N + 1) float64, see `recbole_gr2.llm.beam.item_scores`."""
        tokens, trie = self.inputs(interaction), self.trie.to(self.item_tokens.device)
        width = min(self.beams, trie.nodes(trie.levels))
        beams = Beams(torch.empty(len(tokens), width, dtype=torch.long), torch.empty(len(tokens), width))
        for positions, part in slices(tokens, SEARCH_SLICE):
            leaves, log_probs = self.search(part, trie)
            beams.leaves[positions], beams.log_probs[positions] = leaves.cpu(), log_probs.cpu()
        return item_scores(beams, self.trie)

    def search(self, tokens: Tensor, trie: SidTrie) -> Beams:
        """Return the most probable semantic IDs. Each history is encoded once.

        Args:
            tokens: encoder tokens, (B, P).
            trie: the semantic IDs of the catalogue, on the device of the tokens.
        """
        mask = tokens != PAD
        hidden = self.t5.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

        def read(tokens: Tensor) -> Tensor:
            """Return the logits after the next decoder token of each beam."""
            return self.t5(
                decoder_input_ids=tokens,
                encoder_outputs=(hidden,),
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]

        def step(rows: Tensor, tokens: Tensor) -> Tensor:
            """Continue the beams in these rows with one token each."""
            nonlocal hidden, mask
            indices = cast(torch.LongTensor, rows)
            cache.self_attention_cache.reorder_cache(indices)
            # The number of beams changes only at the start. After that the beams of a history are only permuted, and
            # they share its encoder states.
            if len(rows) != len(hidden):
                cache.cross_attention_cache.reorder_cache(indices)
                hidden, mask = hidden[rows], mask[rows]
            return read(tokens)

        return search(read(tokens.new_full((len(tokens), 1), PAD)), step, trie, self.beams, constrained=False)

    def break_ties(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return scores in which the target is below all items that it ties with, as RecBole's evaluator needs them.

        Items with the same semantic ID tie, and so do items that no beam generated. The target must not be a hit
        because of its position.

        Args:
            scores: scores of all items, (B, N + 1).
            targets: item id of each target, (B,).
        """
        return target_last(scores.double(), targets.to(scores.device))


def slices(tokens: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split encoder tokens (B, P) into slices of similar length.

    Args:
        tokens: encoder tokens, padded at the end, (B, P).
        size: histories per slice on a CPU. On a GPU it is `GPU_SLICE`.

    Yields:
        (positions in the batch, (S,); their tokens without padding after the longest one, (S, P')).
    """
    lengths = (tokens != PAD).sum(dim=1)
    for positions, longest in by_length(lengths, size if tokens.device.type == "cpu" else GPU_SLICE):
        yield positions, tokens[positions, :longest]
