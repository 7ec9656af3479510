"""GRPO with the Rollout-Beam reward of OneRec-Think (arXiv 2510.11639, section 3.3).

The reward of a trace is the best match between the target and the results of a beam search after the trace. So a trace
has a positive reward long before the target is the most likely item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from recbole_gr2.llm.beam import SidTrie, beam_items
from recbole_gr2.llm.dapo import DAPOTrainer
from recbole_gr2.llm.rounds import Group
from recbole_gr2.types import Answer, Request

ROLLOUT_BEAM = "rollout_beam"  # the name of the reward


def rollout_beam(beams: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return rewards (...), 0..L: the largest number of positions in which one of W beams equals the target.

    Positions are compared one by one, as in the paper: a code counts even if the codes before it differ.

    Args:
        beams: Codes of the beams, (..., W, L).
        target: Codes of the target, (L,).

    >>> rollout_beam(torch.tensor([[[1, 2, 3], [9, 8, 3]], [[9, 9, 9], [1, 9, 7]]]), torch.tensor([1, 8, 3]))
    tensor([2, 1])
    """
    return (beams == target).sum(-1).amax(-1)


class RolloutBeamTrainer(DAPOTrainer):
    """Train traces with the Rollout-Beam reward and a KL divergence to a reference model.

    Each prompt ends with `<think>` and has one label, `<|sid_begin|>`, which stands for the target of its request. So
    a completion is a trace, `</think>`, this label and eos. The loss is the mean over tokens of `DAPOTrainer`, plus
    `kl` times the estimate of GRPO (arXiv 2402.03300, eq. 4), p_ref / p - log(p_ref / p) - 1, without TRL's correction
    by the ratio of the new to the sampling probabilities. Zero-variance groups take part in the loss, as in GRPO: the
    reference is their signal.

    Args:
        trie: The semantic IDs of the catalog.
        codes: The same as a matrix (N, L). Row i belongs to item id i + 1.
        beams: Width of the beam search after a trace. The paper uses 32.
        constrained: See `llm.beam.beam_items`.
        reference: The model before RL. It is not trained.
        kl: Weight of the KL divergence, beta. The paper uses 0.001.
        args: As of `DAPOTrainer`.
        kwargs: As of `DAPOTrainer`.
    """

    keep_zero_variance = True

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
        super().__init__(*args, rewards=_SingleReward(), **kwargs)
        # TRL would load a reference by the name of the model, and a mid-trained model has no name.
        self.beta, self.reference = kl, reference.requires_grad_(False).eval()
        self.trie, self.beams, self.constrained, self.codes = trie, beams, constrained, codes
        self.leaf_codes = codes[trie.items[trie.starts[-1][:-1]] - 1]  # (leaves, L)

    def reward_terms(
        self, prompt: Mapping[str, Any], completions: Sequence[Sequence[int]], answers: Sequence[Answer]
    ) -> list[dict[str, float | None]]:
        """Return the Rollout-Beam reward of each completion of one prompt. `answers` is not used."""
        beams = beam_items(
            self.policy,
            [[*prompt["prompt_ids"], *ids[:-2]] for ids in completions],  # without the label and eos
            self.trie,
            beams=self.beams,
            constrained=self.constrained,
            batch_size=len(completions),
            pad_id=self.grammar.pad_id,
            bf16=self.settings.bf16,
        )
        request = self.requests[prompt["request_id"]]
        assert request.target is not None, "RL uses training requests"
        rewards = rollout_beam(self.leaf_codes[beams.leaves], self.codes[request.target - 1])
        return [{ROLLOUT_BEAM: float(reward)} for reward in rewards]

    def loss_inputs(self, batch: list[Group]) -> dict[str, torch.Tensor]:
        """Return the tensors of DAPO, and the log-probabilities of the reference model."""
        tensors = super().loss_inputs(batch)
        tensors["ref_per_token_logps"] = self.log_probs_under(self.reference, tensors)
        return tensors


class _SingleReward:
    """The total reward is the Rollout-Beam reward."""

    def terms(self, request: Request, answer: Answer) -> dict[str, float | None]:
        raise NotImplementedError("rewards are computed by RolloutBeamTrainer.reward_terms")

    def total(self, terms: Mapping[str, float | None]) -> float | None:
        return terms[ROLLOUT_BEAM]
