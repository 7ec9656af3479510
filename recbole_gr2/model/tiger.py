"""TIGER (Rajput et al., NeurIPS 2023, arXiv 2305.05065): a T5 reads the history's semantic IDs and writes the next one.

Encoder input: a token of the user, then the L codes of every item, oldest first; decoder target: the L codes of the
next item. A token stands for one code of one level, so nothing has to mark where an item begins, and since every
answer is L codes long there is no end-of-sequence token either.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recbole_gr2 import compat

compat.apply()  # before RecBole's models are imported: one of them slows every backward pass of the process

from recbole.model.abstract_recommender import SequentialRecommender  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5ForConditionalGeneration  # noqa: E402

from recbole_gr2.llm.backbone import best_dtype  # noqa: E402
from recbole_gr2.llm.beam import Beams, SidTrie, item_scores, search, target_last  # noqa: E402

PAD = 0  # also what the decoder starts from, as in T5
# Rows of similar length that are read together. Measured on a CPU; smaller in a search, where each row is cand_beams
# sequences. A GPU takes a training batch whole.
TRAIN_SLICE, SEARCH_SLICE, GPU_SLICE = 32, 8, 256


class TIGER(SequentialRecommender):
    """Generative retrieval. Scores are log-probabilities of beams; items that no beam names are far below them.

    Beside its property file it reads `config["sids"]`, the codes (N, L) of items 1..N, and `config["cand_beams"]`, the
    width of the search.
    """

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        codes = torch.as_tensor(config["sids"]).long()
        levels, count = codes.size(1), int(codes.max()) + 1
        tokens = 1 + torch.arange(levels * count).view(levels, count)  # token of every (level, code)
        item_tokens = torch.cat([codes.new_full((1, levels), PAD), tokens[torch.arange(levels), codes]])
        self.register_buffer("item_tokens", item_tokens, persistent=False)  # (N + 1, L)
        self.trie = SidTrie.build(codes.numpy(), tokens.numpy(), begin_id=PAD)
        self.history, self.beams = config["max_history"], config["cand_beams"]
        self.first_user, self.user_tokens = 1 + tokens.numel(), config["n_user_tokens"]
        self.bf16 = best_dtype(config["device"]) == "bf16"
        self.t5 = T5ForConditionalGeneration(
            T5Config(
                vocab_size=self.first_user + self.user_tokens,
                d_model=config["hidden_size"],
                d_ff=config["inner_size"],
                d_kv=config["head_size"],
                num_heads=config["n_heads"],
                num_layers=config["n_layers"],
                dropout_rate=config["dropout_prob"],
                feed_forward_proj=config["hidden_act"],
                layer_norm_epsilon=config["layer_norm_eps"],
                pad_token_id=PAD,
                decoder_start_token_id=PAD,
                eos_token_id=None,
                attn_implementation="eager",  # its position bias keeps the fused kernels out
            )
        )

    def inputs(self, interaction) -> Tensor:
        """Encoder tokens (B, 1 + H * L), PAD behind the last code: the user, then the last H items, oldest first."""
        items, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN].unsqueeze(1)
        places = torch.arange(min(self.history, items.size(1)), device=items.device)
        recent = items.gather(1, places + (lengths - self.history).clamp(min=0))
        tokens = self.item_tokens[recent.masked_fill(places >= lengths, PAD)].flatten(1)
        if not self.user_tokens:
            return tokens
        user = self.first_user + interaction[self.USER_ID] % self.user_tokens  # the hashing trick
        return torch.cat([user.unsqueeze(1), tokens], dim=1)

    def calculate_loss(self, interaction) -> Tensor:
        """Mean cross-entropy of the target's codes, over the whole vocabulary."""
        targets, loss = self.item_tokens[interaction[self.POS_ITEM_ID]], 0
        with torch.autocast(targets.device.type, torch.bfloat16, enabled=self.bf16):
            for rows, tokens in slices(self.inputs(interaction), TRAIN_SLICE):
                part = self.t5(input_ids=tokens, attention_mask=tokens != PAD, labels=targets[rows]).loss
                loss = loss + part * (len(rows) / len(targets))
        return loss

    @torch.no_grad()
    def full_sort_predict(self, interaction) -> Tensor:
        """Scores (B, N + 1), float64, see `llm.beam.item_scores`."""
        tokens, trie = self.inputs(interaction), self.trie.to(self.item_tokens.device)
        width = min(self.beams, trie.nodes(trie.levels))
        found = Beams(torch.empty(len(tokens), width, dtype=torch.long), torch.empty(len(tokens), width))
        for rows, part in slices(tokens, SEARCH_SLICE):
            leaves, log_probs = self.search(part, trie)
            found.leaves[rows], found.log_probs[rows] = leaves.cpu(), log_probs.cpu()
        return item_scores(found, self.trie)

    def search(self, tokens: Tensor, trie: SidTrie) -> Beams:
        """The likeliest SIDs behind encoder tokens (B, P); each history is encoded once."""
        mask = tokens != PAD
        hidden = self.t5.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

        def read(tokens: Tensor) -> Tensor:
            return self.t5(
                decoder_input_ids=tokens,
                encoder_outputs=(hidden,),
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]

        def step(rows: Tensor, tokens: Tensor) -> Tensor:
            nonlocal hidden, mask
            cache.self_attention_cache.reorder_cache(rows)
            if len(rows) != len(hidden):  # more beams a history; later they change places within their history alone
                cache.cross_attention_cache.reorder_cache(rows)
                hidden, mask = hidden[rows], mask[rows]
            return read(tokens)

        return search(read(tokens.new_full((len(tokens), 1), PAD)), step, trie, self.beams, constrained=False)

    def judged(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Score rows as an evaluator gets them: an item that shares its SID, or was not generated, is no lucky hit."""
        return target_last(scores.double(), targets.to(scores.device))


def slices(tokens: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (S,) of similar length and their tokens (S, P), cut to the longest; padding would be most of the work."""
    lengths = (tokens != PAD).sum(dim=1)
    for rows in lengths.argsort().split(size if tokens.device.type == "cpu" else GPU_SLICE):
        yield rows, tokens[rows, : int(lengths[rows].max())]
