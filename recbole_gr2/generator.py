"""A language model as a recommender over the whole catalogue: it generates semantic IDs.

GR2 (section 4) re-ranks the lists of its own mid-trained model; here it is one more base model, `--base_model
GR2Generator`, and one more row, `--models GR2Generator`. OneRec-Think, `--models OneRecThink`, generates in the same
way behind traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recbole_gr2.bridge.models import BaseModel, mask_seen
from recbole_gr2.llm.beam import Beams, SidTrie, beam_items, item_scores, target_last
from recbole_gr2.types import Item

GENERATOR = "GR2Generator"
# OneRec-Think with traces and without: as a recommender, and its row as a re-ranker of the base model's lists.
ONEREC_THINK = {"OneRecThink": "onerec_think", "OneRecThink-no-think": "onerec_think-no-think"}


@dataclass(frozen=True, kw_only=True)
class Generator(BaseModel):
    """A `BaseModel` whose scores are log-probabilities of beams; items that no beam names are far below them.

    Attributes:
        items: the catalogue with semantic IDs.
        prompts: token ids behind which the next item is generated: B histories -> B * S prompts, the S of a history
            side by side. An item that several of them lead to counts with its best score.
        beams: width of the search behind each prompt.
        constrained: see `llm.beam.beam_items`.
    """

    items: Sequence[Item]
    tokenizer: object
    prompts: Callable[[Sequence[Sequence[int]]], list[list[int]]]
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
        prompts = self.prompts([self.data.history(user, split) for user in users])
        beams = beam_items(
            self.model,
            prompts,
            self.trie,
            beams=self.beams,
            constrained=self.constrained,
            batch_size=self.batch_size,
            pad_id=self.tokenizer.pad_token_id,
            bf16=self.bf16,
        )
        beams = Beams(*(part.reshape(len(users), -1) for part in beams))  # those of a user's prompts side by side
        scores = item_scores(beams, self.trie)
        if self.exclude_seen:
            mask_seen(scores, users, self.data, split)
        return scores

    def judged(self, scores, targets):
        """An item that shares its semantic ID with others, or that was not generated, is hit by no luck."""
        return target_last(scores, targets)
