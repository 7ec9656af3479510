"""The order in which training reads its examples: a function of the seed and the pass alone.

The samplers of transformers and TRL draw later passes from a generator that a resumed run does not restore.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from recbole_gr2.seeding import derive_seed


class RoundSampler(Sampler[int]):
    """The indices of prompts of a whole run: the prompts of each round, each `generations` times, `repeats` times.

    The order depends only on the seed, for all epochs. The last, incomplete round of an epoch is left out.

    Args:
        size: Number of prompts.
        rounds: Number of rounds.
        prompts: Prompts per round, at most `size`.
        generations: Completions per prompt.
        repeats: Number of times that TRL reads the batch of a round.
        seed: Seed of the order.
    """

    def __init__(self, *, size: int, rounds: int, prompts: int, generations: int, repeats: int, seed: int) -> None:
        self.size, self.rounds, self.prompts = size, rounds, prompts
        self.generations, self.repeats, self.seed = generations, repeats, seed

    def __len__(self) -> int:
        return self.rounds * self.prompts * self.generations * self.repeats

    def __iter__(self) -> Iterator[int]:
        rounds_per_epoch = self.size // self.prompts
        order: list[int] = []
        for number in range(self.rounds):
            epoch, position = divmod(number, rounds_per_epoch)
            if position == 0:
                order = list(range(self.size))
                random.Random(derive_seed(self.seed, "epoch", epoch)).shuffle(order)
            chosen = order[position * self.prompts : (position + 1) * self.prompts]
            for _ in range(self.repeats):
                yield from (index for index in chosen for _ in range(self.generations))


class LengthSampler(Sampler[int]):
    """The indices of one pass over training texts. Texts of a batch have similar lengths, which saves padding.

    Args:
        lengths: Length of each text.
        batch_size: Texts per optimizer step.
        seed: Seed of the order.
        step: Returns the number of optimizer steps so far. It determines the pass.
        filler: Index that completes the last batch of a pass, so that several processes have equally many texts. None:
            the last batch may be smaller.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        step: Callable[[], int],
        filler: int | None = None,
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.step, self.filler = list(lengths), batch_size, seed, step, filler

    def __len__(self) -> int:
        return len(self.lengths) + self._missing

    @property
    def _missing(self) -> int:
        return 0 if self.filler is None else -len(self.lengths) % self.batch_size

    def __iter__(self) -> Iterator[int]:
        steps_per_pass = -(-len(self.lengths) // self.batch_size)
        generator = torch.Generator().manual_seed(self.seed + self.step() // steps_per_pass)
        # The data loader of torch draws one number from the global generator first. With one here, too, the first pass
        # has the order of transformers' LengthGroupedSampler after `set_seed(seed)`.
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        return iter([*order, *[self.filler] * self._missing])
