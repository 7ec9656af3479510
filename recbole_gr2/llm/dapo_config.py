"""The configuration of DAPO (arXiv 2503.14476) for TRL, in rounds."""

from __future__ import annotations

from trl import GRPOConfig

from recbole_gr2.batching import micro_batch_size as largest_micro_batch
from recbole_gr2.errors import ConfigurationError


def dapo_config(
    output_dir: str,
    *,
    steps: int,
    prompts_per_step: int,
    num_generations: int,
    num_iterations: int,
    learning_rate: float,
    seed: int,
    save_steps: int,
    minibatches: int = 1,
    micro_batch_size: int | None = None,
    processes: int = 1,
    temperature: float = 1.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    warmup_steps: int = 0,
    mask_truncated: bool = True,
    gradient_checkpointing: bool = False,
    bf16: bool = False,
    use_cpu: bool = False,
) -> GRPOConfig:
    """Return TRL's configuration of a run.

    A round generates prompts_per_step * num_generations completions, and makes num_iterations * minibatches optimizer
    steps with them. One line is logged per round.

    Args:
        output_dir: Folder of the checkpoints. Only the last one is kept.
        steps: Rounds.
        prompts_per_step: Prompts per round.
        num_generations: Completions per prompt, at least 2.
        num_iterations: Passes over the completions of a round. With 1 (and 1 minibatch) the ratio is always 1, and
            nothing is clipped.
        learning_rate: Learning rate, constant after the warm-up.
        seed: Seed of the run.
        save_steps: Rounds between checkpoints.
        minibatches: Optimizer steps per pass.
        micro_batch_size: Completions that pass through the model at once, at most. The largest divisor of a minibatch
            (the share of one process) that is not above this number is used. None: the whole minibatch. It changes
            speed and memory only.
        processes: Processes that share a round. Each has whole groups.
        temperature: Temperature of sampling, above 0.
        epsilon_low: The ratio is clipped to at least 1 - epsilon_low. DAPO uses 0.2.
        epsilon_high: The ratio is clipped to at most 1 + epsilon_high. DAPO uses 0.28.
        warmup_steps: Rounds in which the learning rate increases.
        mask_truncated: Exclude completions whose reasoning was truncated from the loss (overlong filtering of DAPO).
        gradient_checkpointing: Compute activations again in the backward pass instead of storing them.
        bf16: Train under bfloat16 autocast.
        use_cpu: Train on the CPU.

    Raises:
        ConfigurationError: The prompts or completions of a round do not divide evenly.
    """
    completions = prompts_per_step // processes * num_generations  # of one process
    minibatch = completions // minibatches
    if prompts_per_step % processes or not minibatch or minibatch * minibatches != completions:
        raise ConfigurationError(
            f"{prompts_per_step} prompts x {num_generations} completions do not divide into {minibatches} minibatches"
            + (f" on each of {processes} processes" if processes > 1 else ""),
            where="rl_prompts_per_step, rl_num_generations",
            why="each optimizer step must use the same number of completions, and each process whole groups",
            do="choose a number of prompts that the number of processes divides, and minibatches that divide "
            "prompts * generations / processes",
        )
    micro = largest_micro_batch(minibatch, micro_batch_size or minibatch)
    updates = num_iterations * minibatches
    return GRPOConfig(
        output_dir=str(output_dir),
        max_steps=steps * updates,
        save_strategy="steps",
        save_steps=save_steps * updates,
        logging_steps=updates,
        warmup_steps=warmup_steps * updates,
        lr_scheduler_type="constant_with_warmup",
        learning_rate=learning_rate,
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=minibatch // micro,
        steps_per_generation=completions // micro,
        num_generations=num_generations,
        num_iterations=num_iterations,
        temperature=temperature,
        loss_type="dapo",
        scale_rewards="group",
        beta=0.0,
        use_bias_correction_kl=False,  # the KL term of `onerec_trainer` is that of GRPO
        epsilon=epsilon_low,
        epsilon_high=epsilon_high,
        mask_truncated_completions=mask_truncated,
        disable_dropout=True,
        gradient_checkpointing=gradient_checkpointing,
        remove_unused_columns=False,
        bf16=bf16,
        use_cpu=use_cpu,
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
    )
