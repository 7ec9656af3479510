"""The mid-trained language model as a recommender over the whole catalogue: it generates semantic IDs.

GR2 (section 4) re-ranks the lists of its own mid-trained model; here it is one more base model, `--base_model
GR2Generator`, and one more row, `--models GR2Generator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recbole_gr2.bridge import BaseModel, mask_seen
from recbole_gr2.llm.beam import SidTrie, beam_items, item_scores, target_last
from recbole_gr2.prompts import history_ids
from recbole_gr2.types import Item

GENERATOR = "GR2Generator"


@dataclass(frozen=True, kw_only=True)
class Generator(BaseModel):
    """A `BaseModel` whose scores are log-probabilities of beams; items that no beam names are far below them.

    Attributes:
        items: the catalogue with semantic IDs.
        longest: tokens that a prompt and one more semantic ID may have.
        beams: width of the search.
        constrained: see `llm.beam.beam_items`.
    """

    items: Sequence[Item]
    tokenizer: object
    longest: int
    beams: int
    constrained: bool
    batch_size: int
    bf16: bool

    @cached_property
    def trie(self) -> SidTrie:
        """The catalogue's semantic IDs."""
        return SidTrie.of(self.tokenizer, np.array([item.sid for item in self.items]))

    def score_rows(self, rows, split: str):
        """Masked scores (B, N + 1), float64."""
        users = rows[self.data.uid].tolist()
        prompts = [history_ids(self.data.history(u, split), self.items, self.tokenizer, self.longest) for u in users]
        beams = beam_items(self.model, prompts, self.trie, beams=self.beams, constrained=self.constrained,
                           batch_size=self.batch_size, pad_id=self.tokenizer.pad_token_id, bf16=self.bf16)  # fmt: skip
        scores = item_scores(beams, self.trie)
        if self.exclude_seen:
            mask_seen(scores, users, self.data, split)
        return scores

    def judged(self, scores, targets):
        """An item that shares its semantic ID with others, or that was not generated, is hit by no luck."""
        return target_last(scores, targets)
