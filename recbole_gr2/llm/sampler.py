"""The order in which RL reads its prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch.utils.data import Sampler

from recbole_gr2.seeding import derive_seed


class RoundSampler(Sampler[int]):
    """The indices of prompts of a whole run: the prompts of each round, each `generations` times, `repeats` times.

    The order depends only on the seed, for all epochs. (The sampler of TRL keeps a generator between epochs: a run that
    is resumed in its second epoch would get the order of the first.) The last, incomplete round of an epoch is left
    out.

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
