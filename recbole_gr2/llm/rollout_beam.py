"""GRPO with OneRec-Think's Rollout-Beam reward (arXiv 2510.11639, section 3.3): a trace is worth what a beam search
behind it finds.

Of all its beams the one that is nearest to the target counts, so a trace earns something long before the target is the
likeliest item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from recbole_gr2.llm.beam import SidTrie, beam_items
from recbole_gr2.llm.dapo import DAPOTrainer, Group
from recbole_gr2.types import Answer


def rollout_beam(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Rewards (...), 0..L: the most positions in which any of W beams agrees with the target's semantic ID.

    Positions are compared one by one, as the paper does: a code counts even where those before it differ.

    Args:
        found: codes of the beams (..., W, L).
        target: codes of the target (L,).

    >>> rollout_beam(torch.tensor([[[1, 2, 3], [9, 8, 3]], [[9, 9, 9], [1, 9, 7]]]), torch.tensor([1, 8, 3]))
    tensor([2, 1])
    """
    return (found == target).sum(-1).amax(-1)


class RolloutBeamTrainer(DAPOTrainer):
    """Trains traces by their Rollout-Beam reward, near a reference model.

    Each of `rows` has a prompt that ends in `<think>` and one label, `<|sid_begin|>`, which stands for the target of
    its request: a completion is a trace, `</think>`, that label and eos. The loss is `DAPOTrainer`'s mean over tokens,
    plus the KL estimate of GRPO.

    Args:
        trie: the catalogue's semantic IDs; `codes` (N, L) are the same, row i being item id i + 1.
        beams: width of the search that a trace is judged by. The paper: 32.
        constrained: see `llm.beam.beam_items`.
        reference: the model as it was; it is not trained.
        kl: weight of the KL divergence to it, beta. The paper: 0.001.
    """

    keeps_dead = True  # as GRPO does; they stay near the reference

    def __init__(
        self,
        *args: Any,
        trie: SidTrie,
        codes: torch.Tensor,
        beams: int,
        constrained: bool,
        reference: Any,
        kl: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, rewards=_Paid(), **kwargs)
        # TRL would load a reference by the model's name, and what mid-training wrote has none.
        self.beta, self.reference = kl, reference.requires_grad_(False).eval()
        self.trie, self.beams, self.constrained, self.codes = trie, beams, constrained, codes
        self.leaf_codes = codes[trie.items[trie.starts[-1][:-1]] - 1]  # (leaves, L)

    def _terms(self, row: Mapping, completions: Sequence[Sequence[int]], answers: Sequence[Answer]) -> list[dict]:
        found = beam_items(
            self.model,
            [[*row["prompt_ids"], *ids[:-2]] for ids in completions],
            self.trie,
            beams=self.beams,
            constrained=self.constrained,
            batch_size=len(completions),
            pad_id=self.grammar.pad_id,
            bf16=self.args.bf16,
        )
        target = self.codes[self.requests[row["request_id"]].target - 1]
        return [{_Paid.name: float(paid)} for paid in rollout_beam(self.leaf_codes[found.leaves], target)]

    def _tensors(self, batch: list[Group]) -> dict[str, torch.Tensor]:
        tensors = super()._tensors(batch)
        tensors["ref_per_token_logps"] = self.log_probs_under(self.reference, tensors)
        return tensors


class _Paid:
    """The one term is the reward."""

    name = "rollout_beam"

    def total(self, terms: Mapping[str, float | None]) -> float | None:
        return terms[self.name]
