"""A language model as a recommender for the whole catalogue: it generates semantic IDs by beam search.

GR2 (section 4) re-ranks lists of its own mid-trained model. Here the mid-trained model is one of several base models
(`--base_model GR2Generator`), and one of the other recommenders (`--models GR2Generator`). OneRec-Think
(`--models OneRecThink`) generates in the same way after reasoning traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from recbole_gr2.bridge.models import BaseModel, Histories, mask_seen, seen_items
from recbole_gr2.catalog import Catalog
from recbole_gr2.llm.beam import Beams, SidTrie, beam_items, item_scores, target_last

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Generator(BaseModel):
    """A `BaseModel` whose scores are log-probabilities of beams. Items without a beam have the score UNREACHED.

    Attributes:
        catalog: the catalogue with semantic IDs.
        tokenizer: tokenizer of the language model.
        prompts: maps B histories to B * S prompts as token ids, with the S prompts of a history side by side. The next
            item is generated after each prompt. An item gets its best score over the S prompts.
        beams: number of beams for each prompt. Seen items do not count, see `score_rows`.
        constrained: see `llm.beam.beam_items`.
        batch_size: number of prompts in a batch.
        bf16: whether the language model computes in bfloat16.
    """

    catalog: Catalog
    tokenizer: Any
    prompts: Callable[[Sequence[Sequence[int]]], list[list[int]]]
    beams: int
    constrained: bool
    batch_size: int
    bf16: bool

    @cached_property
    def trie(self) -> SidTrie:
        """The prefix trie of the catalogue's semantic IDs."""
        return SidTrie.of(self.tokenizer, self.catalog.sids)

    def score_rows(self, rows: Any, histories: Histories) -> Tensor:
        """Scores of the catalogue for each row, (B, N + 1) float64. Padding and masked items have -inf.

        The search leaves out masked items, so each row has at least `beams` items with a beam, or all unmasked items.
        """
        import torch

        prompts, count = self.prompts(histories), len(histories)
        excluded: Tensor | None = None
        if self.exclude_seen:
            row, item = seen_items(histories)
            excluded = torch.zeros(count, self.data.item_count, dtype=torch.bool)
            excluded[torch.from_numpy(row), torch.from_numpy(item) - 1] = True
            excluded = excluded.repeat_interleave(len(prompts) // count, dim=0)
        beams = beam_items(
            self.model,
            prompts,
            self.trie,
            beams=self.beams,
            constrained=self.constrained,
            batch_size=self.batch_size,
            pad_id=self.tokenizer.pad_token_id,
            bf16=self.bf16,
            excluded=excluded,
        )
        beams = Beams(*(part.reshape(count, -1) for part in beams))  # the beams of a user's prompts in one row
        scores = item_scores(beams, self.trie)
        if self.exclude_seen:
            mask_seen(scores, histories)
        return scores

    def break_ties(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Scores with each target behind its ties: items with the same semantic ID, and items that have no beam."""
        return target_last(scores, targets)
