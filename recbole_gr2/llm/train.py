"""Supervised training on token sequences with TRL's SFTTrainer, with a weight per part of a text, and exact resume.

GR2 (section 4) weights the tokens of a trace and those of its ranking differently:
-lambda_r * sum log p(trace) - lambda_o * sum log p(ranking). So an example has parts. Mid-training uses one part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig, SFTTrainer

from recbole_gr2.batching import micro_batch_size as largest_micro_batch
from recbole_gr2.distributed import WORLD_SIZE, check_shares, uses_deepspeed
from recbole_gr2.errors import ConfigurationError, QualityCheckError
from recbole_gr2.llm.beam import SidTrie
from recbole_gr2.llm.checkpoints import CompleteCheckpoints, last_checkpoint, step_of
from recbole_gr2.llm.grammar import FREE, among
from recbole_gr2.llm.inputs import bf16_autocast
from recbole_gr2.llm.model import device
from recbole_gr2.llm.sampler import LengthSampler
from recbole_gr2.llm.sharding import mask_gradients, trainable
from recbole_gr2.progress import Loop, show_values
from recbole_gr2.tracking import track

IGNORED = -100
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training text.

    Attributes:
        input_ids: Token ids, (T,).
        parts: Number of the part of each token, (T,), starting with 1. 0 excludes the token from the loss.
        choices: For positions at which the token is chosen among a few tokens, as in generation: these tokens with
            their log-priors. At all other positions the token is chosen among the whole vocabulary.
        from_prior: Positions whose token was drawn from this prior. The loss is the cross-entropy to the prior. It has
            the same expectation and less variance.
    """

    input_ids: list[int]
    parts: list[int]
    choices: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    from_prior: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained on examples.

    Attributes:
        steps: Optimizer steps, over as many passes as needed. None for one pass.
        batch_size: Examples of an optimizer step.
        micro_batch_size: Examples that pass through the model at once, at most. The largest divisor of `batch_size`
            that is not above this number is used.
        learning_rate: Highest learning rate.
        warmup_share: Share of the steps in which the learning rate increases. Then it decreases linearly to 0.
        seed: Seed of the order of the examples. The order of a pass depends on the seed and the number of the pass.
        bf16: Train under bfloat16 autocast.
        save_steps: Steps between checkpoints, at least. A checkpoint is written only together with a line of the log,
            so that a resumed run logs the same means.
        gradient_checkpointing: Compute the activations of a layer again in the backward pass instead of storing them.
    """

    steps: int | None = None
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    warmup_share: float
    seed: int
    bf16: bool
    save_steps: int
    gradient_checkpointing: bool = False


class PartsTrainer(SFTTrainer):
    """An SFTTrainer whose loss is a weighted sum over parts. It logs the mean loss of each part.

    The order of the texts is a function of the seed and the pass, see `LengthSampler`.

    Args:
        part_weights: Weight of each part by name.
        bf16: Train under bfloat16 autocast.
        llm_weight: Power of the model's probability in `Example.choices`.
        trie: Normalize each code of a semantic ID over the codes that the trie admits.
    """

    def __init__(
        self,
        *args: Any,
        part_weights: Mapping[str, float],
        bf16: bool,
        llm_weight: float = 1.0,
        trie: SidTrie | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.autocast = bf16
        self.trie = trie and trie.to(self.accelerator.device)
        self.llm_weight = llm_weight
        self.part_names = list(part_weights)
        self.part_weights = torch.tensor([0.0, *part_weights.values()])
        self._sums = torch.zeros(2, len(part_weights) + 1, dtype=torch.float64)  # loss and tokens of each part

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthSampler:
        texts: Any = self.train_dataset
        return length_sampler(self, texts["length"])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the sum over tokens of weight * -log p, divided by the number of scored tokens of the optimizer step.

        Logits are computed only for scored tokens. With a prompt of 450 tokens this saves most of the work.
        """
        if return_outputs:
            raise ValueError("PartsTrainer returns no outputs")
        labels, parts = inputs["labels"][:, 1:], inputs["parts"][:, 1:]
        scored = labels != IGNORED
        logits = through(self.accelerator, model, partial(_logits, scored=scored), inputs, self.autocast)
        losses = functional.cross_entropy(logits.float(), labels[scored], reduction="none")
        if "choices" in inputs:  # (B, T, M), FREE after the last choice
            tokens, bias = (inputs[name][:, 1:][scored] for name in ("choices", "choice_prior"))
            chosen = tokens[:, 0] != FREE
            tokens, bias, from_prior = tokens[chosen], bias[chosen], inputs["from_prior"][:, 1:][scored][chosen]
            target = (labels[scored][chosen].unsqueeze(-1) == tokens).float()
            prior = bias.masked_fill(tokens == FREE, -torch.inf).softmax(-1)
            target = torch.where(from_prior.unsqueeze(-1), prior, target)
            log_probs = (self.llm_weight * among(logits[chosen], tokens) + bias).log_softmax(-1)
            choice_losses = -(target * log_probs.masked_fill(tokens == FREE, 0.0)).sum(-1)
            losses = losses.masked_scatter(chosen, choice_losses)
        if self.trie:
            codes = self.trie.begins(labels[scored]).unsqueeze(1) + torch.arange(self.trie.levels, device=labels.device)
            losses = losses.index_put((codes,), -self.trie.log_probs(logits[codes], labels[scored][codes]))
        parts = parts[scored]
        count = num_items_in_batch if num_items_in_batch is not None else scored.sum()
        for number in range(1, len(self.part_weights)):
            here = parts == number
            self._sums[0, number] += losses.detach()[here].sum().double().cpu()
            self._sums[1, number] += here.sum().cpu()
        # DDP, FSDP and DeepSpeed average the gradients of the processes, and `count` is that of all of them.
        return (losses * self.part_weights.to(losses.device)[parts]).sum() / count * self.accelerator.num_processes

    def _clip_grad_norm(self, model: Any) -> Any:
        mask_gradients(model)
        return super()._clip_grad_norm(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the values, and the mean loss of each part since the previous line."""
        if "loss" in logs:
            sums: Any = self._sums
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum")
            for number, name in enumerate(self.part_names, start=1):
                if sums[1, number] > 0:
                    logs[f"loss/{name}"] = float(sums[0, number] / sums[1, number])
            self._sums.zero_()
        super().log(logs, start_time)


def _logits(model: Any, inputs: Mapping[str, torch.Tensor], scored: torch.Tensor) -> torch.Tensor:
    """Logits (M, V) of the M positions of `scored` (B, T - 1)."""
    hidden = model.get_decoder()(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    ).last_hidden_state[:, :-1]
    return model.get_output_embeddings()(hidden[scored])


def through(accelerator: Any, model: Any, compute: Callable[[Any, Any], T], inputs: Any, bf16: bool) -> T:
    """Return `compute(whole model, inputs)`, called so that several processes share its gradients.

    DistributedDataParallel and DeepSpeed share the gradients of what their own `forward` computes, which calls that of
    the whole model. FSDP does so in hooks around the `forward` of the model.

    Args:
        accelerator: the accelerator of the trainer.
        model: the model as the trainer passes it, which may be wrapped.
        compute: the computation. It must use all weights that are trained.
        inputs: its input.
        bf16: compute under bfloat16 autocast. DeepSpeed ends an autocast around its own `forward`.
    """
    whole = accelerator.unwrap_model(model)
    forward = vars(whole).get("forward")

    def restore() -> None:
        if forward:
            whole.forward = forward
        else:
            vars(whole).pop("forward", None)

    def computed(inputs: Any) -> Any:
        restore()  # so that the computation can call the whole model
        with bf16_autocast(accelerator.device, bf16):
            return compute(whole, inputs)

    whole.forward = computed
    try:
        return model(inputs)
    finally:
        restore()


def finetune(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    folder: Path,
    *,
    part_weights: Mapping[str, float],
    training: Training,
    max_length: int,
    llm_weight: float = 1.0,
    trie: SidTrie | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, float]]:
    """Train `model` in place on `examples`. Continue from the last checkpoint in `folder` if there is one.

    Several processes share the texts of each optimizer step. The sums of the losses are those of one process, and the
    weights differ in their last digits.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        examples: Training texts.
        folder: Folder of the checkpoints.
        part_weights: Weight of each part by name, in the order of `Example.parts`.
        training: How the model is trained.
        max_length: Longest text in tokens. A longer text is an error; texts are never cut.
        llm_weight: Power of the model's probability in `Example.choices`, beside their prior.
        trie: Normalize each code of a semantic ID over the codes that lead to an item, as in generation. None: over the
            whole vocabulary.
        say: Prints progress.

    Returns:
        The log, one dict per line, with the keys `loss` and `loss/<part>`.

    Raises:
        ConfigurationError: There are no examples, a text is longer than `max_length`, or the processes cannot share
            `batch_size` equally.
        QualityCheckError: The loss or a gradient is not finite.
    """
    longest = max((len(example.input_ids) for example in examples), default=0)
    if not examples or longest > max_length:
        raise ConfigurationError(
            f"{len(examples)} texts of up to {longest} tokens do not fit max_length {max_length}",
            where=str(folder),
            why="training needs at least one text, and texts are never cut",
            do="raise the max_length of the stage, or shorten prompts (prompt_history, prompt_title_chars)",
        )
    steps = training.steps or math.ceil(len(examples) / training.batch_size)
    if WORLD_SIZE > 1:  # A text without loss completes the last batch.
        examples = [*examples, Example(input_ids=[tokenizer.eos_token_id], parts=[0])]
    config = SFTConfig(
        **training_options(folder, replace(training, steps=steps)),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    dataset = Dataset.from_dict(
        {
            "input_ids": [e.input_ids for e in examples],
            "parts": [e.parts for e in examples],
            "labels": [[t if p else IGNORED for t, p in zip(e.input_ids, e.parts, strict=True)] for e in examples],
            "length": [len(e.input_ids) for e in examples],
            "choice_at": [list(e.choices) for e in examples],
            "choices": [[list(prior) for prior in e.choices.values()] for e in examples],
            "choice_prior": [[list(prior.values()) for prior in e.choices.values()] for e in examples],
            "from_prior": [[position in e.from_prior for position in e.choices] for e in examples],
        }
    )
    with trainable(model) as trained:
        trainer = PartsTrainer(
            model=trained,
            args=config,
            train_dataset=dataset,
            processing_class=tokenizer,
            part_weights=part_weights,
            bf16=training.bf16,
            llm_weight=llm_weight,
            trie=trie,
            callbacks=[ProgressLines(say), FiniteLoss(), CompleteCheckpoints()],
            data_collator=Collator(tokenizer.pad_token_id),
        )
        return train_from_checkpoint(trainer, folder)


def training_options(folder: Path, training: Training) -> dict[str, Any]:
    """Return the arguments of transformers' TrainingArguments that all supervised trainings share.

    Args:
        folder: folder of the checkpoints.
        training: how the model is trained, with a number of steps.
    """
    steps = training.steps
    assert steps is not None
    check_shares("batch_size", training.batch_size)
    share = training.batch_size // WORLD_SIZE
    micro = largest_micro_batch(share, training.micro_batch_size)
    logging_steps = max(1, round(steps / 40))
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": round(training.warmup_share * steps),
        "seed": training.seed,
        "data_seed": training.seed,
        "bf16": training.bf16 and not uses_deepspeed(),  # DeepSpeed would store the weights in bfloat16
        "use_cpu": device() == "cpu",
        "gradient_checkpointing": training.gradient_checkpointing,
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_steps": math.ceil(training.save_steps / logging_steps) * logging_steps,
        "logging_steps": logging_steps,
        "report_to": "none",
        "disable_tqdm": True,
    }


def train_from_checkpoint(trainer: Trainer, folder: Path) -> list[dict[str, float]]:
    """Train up to the last step, from the last checkpoint in `folder` if there is one, and return the log."""
    trainer.remove_callback(PrinterCallback)  # ProgressLines prints the log
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin:  # Weights and sums of gradients stay in float32, as without FSDP. Autocast computes in bfloat16.
        plugin.mixed_precision_policy = None
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        check_sharding(Path(checkpoint), "FSDP" if plugin else "DeepSpeed" if trainer.is_deepspeed_enabled else "DDP")
    # transformers would train one more step if the last one is within a pass.
    if checkpoint and step_of(checkpoint) >= trainer.args.max_steps:
        if plugin:  # It loads the weights into a model that it has sharded.
            trainer._prepare_for_training(trainer.args.max_steps, trainer.get_train_dataloader(), checkpoint)
        else:
            trainer._load_from_checkpoint(checkpoint)
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        model: Any = trainer.model
        model.train()
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    return [line for line in trainer.state.log_history if "loss" in line]


def check_sharding(checkpoint: Path, current: str) -> None:
    """Check that a checkpoint was written with the parallelism of this run.

    Args:
        checkpoint: folder of the checkpoint.
        current: FSDP, DeepSpeed or DDP. DDP includes one process.

    Raises:
        ConfigurationError: it was written with another one.
    """
    names = {file.name for file in checkpoint.iterdir()}
    writer = "FSDP" if any("_fsdp" in name for name in names) else "DeepSpeed" if "latest" in names else "DDP"
    if writer != current:
        raise ConfigurationError(
            f"the checkpoint was written with {writer}, and this run uses {current}",
            where=str(checkpoint),
            why="each of them stores the state of the optimizer in its own form",
            do=f"continue with {writer} (properties/accelerate/{writer.lower()}.yaml), or delete the checkpoint",
        )


def length_sampler(trainer: Trainer, lengths: Sequence[int]) -> LengthSampler:
    """Return the order of the texts of a trainer, see `LengthSampler`.

    Args:
        trainer: the trainer.
        lengths: length of each text. With several processes the last text has no loss, and completes the last batch of
            a pass.
    """
    args: Any = trainer.args
    filler = len(lengths) - 1 if WORLD_SIZE > 1 else None
    return LengthSampler(
        lengths[:filler],
        batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * WORLD_SIZE,
        seed=args.seed,
        step=lambda: trainer.state.global_step,
        filler=filler,
    )


class Collator:
    """Pad texts on the right to one batch.

    Args:
        pad_id: Id of the padding token.
    """

    def __init__(self, pad_id: int) -> None:
        self.fill = {"input_ids": pad_id, "parts": 0, "labels": IGNORED}

    def __call__(self, texts: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return tensors (B, T) and their attention mask. The mask is needed because pad may be a real token, too."""
        width = max(len(text["input_ids"]) for text in texts)
        batch = {
            name: torch.tensor([text[name] + [fill] * (width - len(text[name])) for text in texts])
            for name, fill in self.fill.items()
        }
        most = max((len(tokens) for text in texts for tokens in text["choices"]), default=0)
        if most:
            batch["choices"] = torch.full((len(texts), width, most), FREE)
            batch["choice_prior"] = torch.zeros(len(texts), width, most)
            batch["from_prior"] = torch.zeros(len(texts), width, dtype=torch.bool)
            for number, text in enumerate(texts):
                columns = (text[name] for name in ("choice_at", "choices", "choice_prior", "from_prior"))
                for position, tokens, prior, from_prior in zip(*columns, strict=True):
                    batch["choices"][number, position, : len(tokens)] = torch.tensor(tokens)
                    batch["choice_prior"][number, position, : len(tokens)] = torch.tensor(prior)
                    batch["from_prior"][number, position] = from_prior
        lengths = torch.tensor([len(text["input_ids"]) for text in texts])
        batch["attention_mask"] = (torch.arange(width) < lengths.unsqueeze(1)).long()
        return batch


class ProgressLines(TrainerCallback):
    """Show the steps of a training, and the values of its log as `step 12/100  loss 1.234  ...`.

    Args:
        say: Prints a line. On a terminal only the last values are printed, see `recbole_gr2.progress.show_values`.
        names: Logged values to show beside `loss` and `loss/<part>`.
    """

    def __init__(self, say: Callable[[str], None], names: Sequence[str] = ()) -> None:
        self.say, self.names = say, names
        self.loop: Loop | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to show the steps. A resumed training begins after the steps of its checkpoint."""
        self.loop = Loop("step", state.max_steps, first=state.global_step).open()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the number of finished steps."""
        if self.loop:
            self.loop.at(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End to show the steps."""
        if self.loop:
            self.loop.close()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Show the values of one entry of the log, and report them to the trackers."""
        logs = logs or {}
        names = [n for n in logs if n == "loss" or n.startswith("loss/") or n in self.names]
        if names and "train_runtime" not in logs:
            # TRL logs None instead of a value that is not a number.
            values = "  ".join(f"{name} {float(logs[name]):.4f}" for name in names if logs[name] is not None)
            show_values(f"step {state.global_step}/{state.max_steps}  {values}", self.say)
            track(logs, state.global_step)


class FiniteLoss(TrainerCallback):
    """Stop training at the first loss or gradient that is not finite."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Raise a QualityCheckError if the logged loss or norm of the gradients is not finite."""
        for name, words in (("loss", "the loss"), ("grad_norm", "the norm of the gradients")):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(float(value)):
                raise QualityCheckError(
                    f"{words} is {float(value)} at step {state.global_step}",
                    where=str(args.output_dir),
                    why="the next step makes all weights of the model unusable",
                    do="lower the learning rate of the stage, or of the stage whose model it starts from",
                )
