"""Supervised training of token sequences with TRL's SFTTrainer: a weight for every part of a text, exact resume.

Parts exist because GR2 weighs the tokens of a trace and of its ranking differently (section 4:
-lambda_r * sum log p(trace) - lambda_o * sum log p(ranking)). Mid-training has a single part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from recbole_gr2.errors import ConfigurationError, GateError
from recbole_gr2.llm.beam import SidTrie
from recbole_gr2.llm.constraint import FREE, among

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training text: token ids (T,) and for each the 1-based number of its part, 0 for no loss.

    `choices` maps a position to the tokens that it is a choice among, with their log-prior: as in generation, the
    choice is not among the whole vocabulary there. At positions of `drawn` the token was drawn from that prior: what is
    learnt there is the prior, not the draw, which is the same on average and has no noise.
    """

    input_ids: list[int]
    parts: list[int]
    choices: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    drawn: frozenset[int] = frozenset()


class PartsTrainer(SFTTrainer):
    """SFTTrainer whose loss is a weighted sum over parts, with each part's mean loss in the log."""

    def __init__(
        self, *args, part_weights: Mapping[str, float], llm_weight: float = 1.0, trie: SidTrie | None = None, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        self.trie = trie and trie.to(self.model.device)
        self.llm_weight = llm_weight
        self.part_names = list(part_weights)
        self.part_weights = torch.tensor([0.0, *part_weights.values()])
        self._sums = torch.zeros(2, len(part_weights) + 1, dtype=torch.float64)  # loss and tokens of each part

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum over tokens of weight * -log p, divided by the tokens with a loss in the whole optimizer step.

        The vocabulary is projected only where there is a loss: on a prompt of 450 tokens that is most of the work.
        """
        if return_outputs:
            raise ValueError("PartsTrainer returns no outputs")
        decoder = self.accelerator.unwrap_model(model).get_decoder()
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        labels, parts = inputs["labels"][:, 1:], inputs["parts"][:, 1:]
        scored = labels != IGNORED
        with self.accelerator.autocast():
            hidden = decoder(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).last_hidden_state[:, :-1]
            logits = head(hidden[scored])
        losses = functional.cross_entropy(logits.float(), labels[scored], reduction="none")
        if "choices" in inputs:  # (B, T, M), FREE behind the last of them
            tokens, bias = (inputs[name][:, 1:][scored] for name in ("choices", "choice_prior"))
            chosen = tokens[:, 0] != FREE
            tokens, bias, drawn = tokens[chosen], bias[chosen], inputs["drawn"][:, 1:][scored][chosen]
            goal = (labels[scored][chosen].unsqueeze(-1) == tokens).float()
            prior = bias.masked_fill(tokens == FREE, -torch.inf).softmax(-1)
            goal = torch.where(drawn.unsqueeze(-1), prior, goal)
            log_probs = (self.llm_weight * among(logits[chosen], tokens) + bias).log_softmax(-1)
            own = -(goal * log_probs.masked_fill(tokens == FREE, 0.0)).sum(-1)
            losses = losses.masked_scatter(chosen, own)
        if self.trie:
            codes = self.trie.begins(labels[scored]).unsqueeze(1) + torch.arange(self.trie.levels, device=labels.device)
            losses = losses.index_put((codes,), -self.trie.log_probs(logits[codes], labels[scored][codes]))
        parts = parts[scored]
        count = num_items_in_batch if num_items_in_batch is not None else scored.sum()
        for number in range(1, len(self.part_weights)):
            here = parts == number
            self._sums[0, number] += losses.detach()[here].sum().double().cpu()
            self._sums[1, number] += here.sum().cpu()
        return (losses * self.part_weights.to(losses.device)[parts]).sum() / count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each part's mean loss since the last line."""
        if "loss" in logs:
            for number, name in enumerate(self.part_names, start=1):
                if self._sums[1, number] > 0:
                    logs[f"loss/{name}"] = float(self._sums[0, number] / self._sums[1, number])
            self._sums.zero_()
        super().log(logs, start_time)


def finetune(
    model,
    tokenizer,
    rows: Sequence[Row],
    folder: Path,
    *,
    part_weights: Mapping[str, float],
    steps: int | None = None,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: float,
    warmup_share: float,
    max_length: int,
    seed: int,
    bf16: bool,
    save_steps: int,
    llm_weight: float = 1.0,
    trie: SidTrie | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, float]]:
    """Train `model` in place on `rows`, going on from the last checkpoint in `folder` if there is one.

    Args:
        part_weights: weight of each part by name, in the order of `Row.parts`.
        steps: optimizer steps, over as many passes as that takes; None for one pass.
        batch_size: texts of an optimizer step; `micro_batch_size` of them go through the model at once.
        warmup_share: share of the steps in which the learning rate rises; it then falls linearly to 0.
        max_length: longest text in tokens; a longer one is an error, never cut.
        bf16: bfloat16 autocast.
        llm_weight: power of the model's probability in `Row.choices`, beside their prior.
        trie: where a semantic ID stands, each of its codes is a choice among those that lead on to an item, as it is in
            generation, not among the whole vocabulary; None: among the whole vocabulary.

    Returns:
        The log, one dict a line, `loss` and `loss/<part>` among its keys.

    Raises:
        ConfigurationError: no rows, a text longer than max_length, or a batch that does not divide.
        GateError: the loss is not finite.
    """
    longest = max((len(row.input_ids) for row in rows), default=0)
    if not rows or longest > max_length or batch_size % micro_batch_size:
        raise ConfigurationError(
            f"{len(rows)} texts of up to {longest} tokens do not fit max_length {max_length}, batches of {batch_size} "
            f"in steps of {micro_batch_size}",
            where=str(folder),
            why="texts are never cut silently",
            do="raise the stage's max_length or show less (prompt_history, prompt_title_chars)",
        )
    steps = steps or math.ceil(len(rows) / batch_size)
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=batch_size // micro_batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(warmup_share * steps),
        max_length=None,
        seed=seed,
        data_seed=seed,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=1,
        logging_steps=max(1, round(steps / 40)),
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    dataset = Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "parts": [row.parts for row in rows],
            "labels": [[t if p else IGNORED for t, p in zip(row.input_ids, row.parts, strict=True)] for row in rows],
            "length": [len(row.input_ids) for row in rows],
            "choice_at": [list(row.choices) for row in rows],
            "choices": [[list(shown) for shown in row.choices.values()] for row in rows],
            "choice_prior": [[list(shown.values()) for shown in row.choices.values()] for row in rows],
            "drawn": [[place in row.drawn for place in row.choices] for row in rows],
        }
    )
    trainer = PartsTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        part_weights=part_weights,
        llm_weight=llm_weight,
        trie=trie,
        callbacks=[ProgressLines(say)],
        data_collator=Collator(tokenizer.pad_token_id),
    )
    trainer.remove_callback(PrinterCallback)  # ProgressLines says it
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    log = [line for line in trainer.state.log_history if "loss" in line]
    if not log or not all(math.isfinite(line["loss"]) for line in log):
        raise GateError("the loss is not finite", where=str(folder), do="lower the stage's learning rate")
    return log


class Collator:
    """Pads rows on the right."""

    def __init__(self, pad_id: int) -> None:
        self.fill = {"input_ids": pad_id, "parts": 0, "labels": IGNORED}

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Tensors (B, T), with an attention mask, since padding may equal another token."""
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
            for name, fill in self.fill.items()
        }
        most = max((len(tokens) for row in rows for tokens in row["choices"]), default=0)
        if most:
            batch["choices"] = torch.full((len(rows), width, most), FREE)
            batch["choice_prior"] = torch.zeros(len(rows), width, most)
            batch["drawn"] = torch.zeros(len(rows), width, dtype=torch.bool)
            for number, row in enumerate(rows):
                own = (row[name] for name in ("choice_at", "choices", "choice_prior", "drawn"))
                for place, tokens, prior, drawn in zip(*own, strict=True):
                    batch["choices"][number, place, : len(tokens)] = torch.tensor(tokens)
                    batch["choice_prior"][number, place, : len(tokens)] = torch.tensor(prior)
                    batch["drawn"][number, place] = drawn
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(width) < lengths.unsqueeze(1)).long()
        return batch


class ProgressLines(TrainerCallback):
    """Prints every logged line as `step 12/100  loss 1.234  ...`."""

    def __init__(self, say: Callable[[str], None], show: Sequence[str] = ()) -> None:
        self.say, self.show = say, show

    def on_log(self, args, state, control, logs=None, **kwargs):
        """One line a log entry."""
        names = [n for n in logs if n == "loss" or n.startswith("loss/") or n in self.show]
        if names and "train_runtime" not in logs:
            values = "  ".join(f"{name} {float(logs[name]):.4f}" for name in names)
            self.say(f"step {state.global_step}/{state.max_steps}  {values}")
