"""The rounds of RL: groups of rewarded completions, their metrics, and the file that records them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from recbole_gr2.store import write_text
from recbole_gr2.types import Answer, Request

MIN_SPREAD = 1e-6  # rewards of a group that differ by at most this are equal
# Terms that do not make a group useful: copies of the input that differ only in length would teach only length.
SHAPING = ("overlong",)


class Rewards(Protocol):
    """The rewards of answers (`rewards.WeightedRewards`)."""

    def terms(self, request: Request, answer: Answer) -> dict[str, float | None]:
        """Return the value of each reward by name. None: the reward does not apply."""
        ...

    def total(self, terms: Mapping[str, float | None]) -> float | None:
        """Return the weighted sum of the terms, or None if no term applies."""
        ...


@dataclass
class Group:
    """The G completions of one prompt and their rewards.

    Attributes:
        request_id: The request.
        attempt: 0 for the first prompts of a round, n for those of the n-th resampling.
        completions: Token ids.
        loss_masks: 1 for each token that takes part in the loss.
        answers: The answers that the completions contain.
        terms: The rewards of each answer by name.
        rewards: The total reward of each answer.
        verified: The total reward of each answer without the terms in `SHAPING`.
        kept: Whether the group takes part in the loss.
        advantages: (reward - mean) / std of each answer, or 0 if the group has no signal (DAPO, eq. 9).
    """

    request_id: str
    attempt: int
    completions: list[list[int]]
    loss_masks: list[list[int]]
    answers: list[Answer]
    terms: list[dict[str, float | None]]
    rewards: list[float | None]
    verified: list[float | None]
    kept: bool = False
    advantages: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.advantages = [0.0] * len(self.rewards)
        if self.has_signal:
            rewards = torch.tensor(self.rewards, dtype=torch.float64)
            self.advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()

    @property
    def has_tokens(self) -> bool:
        """Whether any token takes part in the loss."""
        return any(map(any, self.loss_masks))

    @property
    def has_signal(self) -> bool:
        """Whether the verified rewards differ (DAPO, eq. 11), and any token takes part in the loss."""
        verified = [reward for reward in self.verified if reward is not None]
        if len(verified) < len(self.verified) or not self.has_tokens:
            return False
        return max(verified) - min(verified) > MIN_SPREAD


@dataclass
class Round:
    """The completions of one round.

    Attributes:
        sampled: All groups, in the order in which they were sampled.
        batch: The groups of the batch, one per prompt.
        resamples: Number of times that further prompts were drawn.
    """

    sampled: list[Group]
    batch: list[Group]
    resamples: int

    @property
    def answers(self) -> list[Answer]:
        """All answers of the round."""
        return [answer for group in self.sampled for answer in group.answers]

    def metrics(self, requests: Mapping[str, Request]) -> dict[str, float]:
        """Return means over all completions of the round, and the share of kept groups in the batch.

        A reward that applies to no completion is left out.
        """
        values: dict[str, list[float]] = {}
        for name in self.sampled[0].terms[0]:
            terms = (term[name] for group in self.sampled for term in group.terms)
            values[f"reward/{name}"] = [term for term in terms if term is not None]
        values["reward"] = [reward for group in self.sampled for reward in group.rewards if reward is not None]
        answers = self.answers
        values["unchanged"] = [answer.ranking == requests[answer.request_id].items for answer in answers]
        values["truncated"] = [answer.status == "truncated" for answer in answers]
        values["completions/mean_length"] = [answer.output_tokens for answer in answers]
        values["frac_groups_kept"] = [group.kept for group in self.batch]
        values["refill_rounds"] = [self.resamples]
        return {name: sum(numbers) / len(numbers) for name, numbers in values.items() if numbers}


class RolloutFile:
    """The file `rollouts.jsonl` with one line per completion. It also counts rounds without a kept group.

    Lines that an interrupted run wrote after its last checkpoint are removed.

    Args:
        path: The file.
        step: Optimizer step at which the run starts or resumes.
        write: Whether this process writes the file. All processes read it.

    Attributes:
        empty_rounds: Number of rounds in a row, up to now, without a kept group.
    """

    def __init__(self, path: Path, step: int, *, write: bool) -> None:
        self.path, self.write, self.empty_rounds = path, write, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        kept: dict[int, bool] = {}  # whether the round of a step kept a group
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                # An incomplete line is the last one of an interrupted run, and belongs to a step after the checkpoint.
                entry = json.loads(line) if line.endswith("}\n") else {"step": step, "kept": False}
                if entry["step"] >= step:
                    break
                lines.append(line)
                kept[entry["step"]] = kept.get(entry["step"], False) or bool(entry["kept"])
        if write:
            write_text(path, "".join(lines))
        for number in sorted(kept):
            self._count(kept[number])

    def add(self, step: int, finished: Round, label_items: Mapping[str, Sequence[int]]) -> None:
        """Append the completions of a round that starts at an optimizer step.

        Args:
            step: The optimizer step.
            finished: The round.
            label_items: Item id of each label, by request id.
        """
        if self.write:
            with self.path.open("a", encoding="utf-8") as file:
                for group in finished.sampled:
                    for sample in range(len(group.answers)):
                        line = _line(step, group, sample, label_items[group.request_id])
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._count(any(group.kept for group in finished.batch))

    def _count(self, kept: bool) -> None:
        self.empty_rounds = 0 if kept else self.empty_rounds + 1


def _line(step: int, group: Group, sample: int, label_items: Sequence[int]) -> dict[str, Any]:
    answer = group.answers[sample]
    return {
        "step": step,
        "attempt": group.attempt,
        "request_id": group.request_id,
        "sample": sample,
        "ranking": [chr(ord("A") + label_items.index(item)) for item in answer.ranking],
        "status": answer.status,
        "reasoning": answer.reasoning,
        "terms": group.terms[sample],
        "reward": group.rewards[sample],
        "advantage": group.advantages[sample],
        "kept": group.kept,
    }
