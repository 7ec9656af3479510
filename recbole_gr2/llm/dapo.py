"""DAPO (arXiv 2503.14476) for rankings: TRL's GRPOTrainer with constrained rollouts and dynamic sampling.

TRL keeps the loop, the optimizer, the clipped token-level loss and its metrics. This subclass replaces what happens
between two of its batches: which prompts are drawn, how rankings are generated and rewarded, which groups are kept,
and under which distribution a token's probability is taken. A *round* is one such generation, followed by
`num_iterations` passes over its completions.

Everything random is a function of (seed, step, request), so a run that is killed and resumed equals one that was not.

On several processes (`accelerate launch`) a round is still one round: each process generates for its share of the
prompts, the groups are gathered, all processes see the same ones and draw the same further prompts, and each learns
from its share of the batch. The rollouts are those of one process.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from recbole_gr2.errors import ConfigurationError, GateError
from recbole_gr2.llm.constraint import FREE, Grammar, constrained_log_probs
from recbole_gr2.llm.rollout import generate_rankings, left_pad, positions, prior_tensor, read_answer
from recbole_gr2.seeding import derive_seed
from recbole_gr2.types import Answer, Request

SPREAD = 1e-6  # rewards of a group that differ by less are equal: the group teaches nothing
SHAPING = ("overlong",)  # terms that make no group worth keeping: copies that differ in length alone teach length alone


class Rewards(Protocol):
    """What the trainer asks of rewards (`rewards.WeightedRewards`)."""

    def terms(self, request: Request, answer: Answer) -> dict[str, float | None]: ...

    def total(self, terms: Mapping[str, float | None]) -> float | None: ...


@dataclass
class Group:
    """One prompt's G completions, their rewards and what is learnt from them."""

    request_id: str
    attempt: int
    completions: list[list[int]]
    learnt: list[list[int]]  # 1 where a token counts in the loss
    answers: list[Answer]
    terms: list[dict[str, float | None]]
    rewards: list[float | None]
    verified: list[float | None]  # the rewards without their shaping terms
    kept: bool = False
    advantages: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.advantages = [0.0] * len(self.rewards)
        if self.alive:
            rewards = torch.tensor(self.rewards, dtype=torch.float64)
            self.advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()

    @property
    def alive(self) -> bool:
        """Whether the verified rewards differ (DAPO eq. 11) and some token is there to learn from."""
        if any(reward is None for reward in self.verified) or not any(map(any, self.learnt)):
            return False
        return max(self.verified) - min(self.verified) > SPREAD


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
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    mask_truncated: bool = True,
    bf16: bool = False,
    use_cpu: bool = False,
) -> GRPOConfig:
    """TRL's configuration for a run of `steps` rounds.

    A round generates prompts_per_step * num_generations completions and takes num_iterations * minibatches optimizer
    steps on them. `steps`, `save_steps` and `warmup_steps` count rounds; one line is logged per round.

    Args:
        num_iterations: passes over a round's completions. With 1 (and 1 minibatch) the ratio is always 1 and nothing
            is ever clipped.
        minibatches: optimizer steps of one pass.
        micro_batch_size: completions per forward pass (speed and memory only); all of a process's share of a minibatch
            by default.
        processes: how many processes share a round; each has whole groups.
        epsilon_low, epsilon_high: the ratio is clipped to [1 - low, 1 + high]. DAPO's 0.2 and 0.28.
        mask_truncated: leave completions whose reasoning was cut out of the loss. DAPO's overlong filtering.

    Raises:
        ConfigurationError: the completions of a round cannot be divided as asked.
    """
    completions = prompts_per_step // processes * num_generations  # of one process
    minibatch = completions // minibatches
    micro = min(micro_batch_size or minibatch, minibatch) or 1
    if prompts_per_step % processes or minibatch * minibatches != completions or minibatch % micro:
        raise ConfigurationError(
            f"{prompts_per_step} prompts x {num_generations} completions do not divide into {minibatches} minibatches "
            f"of {micro} completions at a time" + (f" on each of {processes} processes" if processes > 1 else ""),
            where="rl_prompts_per_step, rl_num_generations, rl_minibatches, rl_micro_batch_size",
            why="every optimizer step must see the same number of completions, and a process whole groups",
            do="choose prompts that divide by the processes, and a micro batch that divides prompts * generations / "
            "(processes * minibatches)",
        )
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
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=minibatch // micro,
        steps_per_generation=completions // micro,
        num_generations=num_generations,
        num_iterations=num_iterations,
        temperature=temperature,
        loss_type="dapo",
        scale_rewards="group",
        beta=0.0,
        epsilon=epsilon_low,
        epsilon_high=epsilon_high,
        mask_truncated_completions=mask_truncated,
        disable_dropout=True,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        bf16=bf16,
        use_cpu=use_cpu,
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
    )


class DAPOTrainer(GRPOTrainer):
    """Trains a language model to rank by DAPO.

    Args:
        rows: one dict per request: `request_id`, `prompt_ids` (token ids up to the assistant turn), `label_items`
            (item id of label A, B, ..) and `label_prior` (their log-priors). The target is in none of them.
        requests: request by id, for the rewards.
        rewards: measures and pays answers (`rewards.WeightedRewards`).
        max_refill: how often a round draws further prompts in place of groups whose rewards are all equal.
        max_dead: rounds in a row without any usable group after which training stops.
        decode_batch: completions generated side by side (speed only).

    Writes `rollouts.jsonl` beside the checkpoints, one line per completion that was generated.

    Raises:
        ConfigurationError: settings that cannot give an exact run, see `_check`.
        GateError: `max_dead` rounds in a row had no group with different rewards.
    """

    keeps_dead = False  # whether a group with equal rewards has something else to learn from, a reference or a teacher

    def __init__(
        self,
        model: PreTrainedModel,
        args: GRPOConfig,
        rows: Sequence[Mapping],
        *,
        requests: Mapping[str, Request],
        rewards: Rewards,
        grammar: Grammar,
        tokenizer: PreTrainedTokenizerBase,
        max_refill: int = 2,
        max_dead: int = 5,
        decode_batch: int = 64,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.rows = {row["request_id"]: row for row in rows}
        self.requests, self.rewards, self.grammar = requests, rewards, grammar
        self.max_refill, self.max_dead, self.decode_batch = max_refill, max_dead, decode_batch
        self.prompts_per_step = args.generation_batch_size // args.num_generations
        self.updates_per_round = args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps
        self._check(args, rows)
        super().__init__(
            model=model,
            reward_funcs=[_paid_elsewhere],
            args=args,
            train_dataset=Dataset.from_dict({"request_id": list(self.rows)}),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # stdout belongs to the console; lines are in state.log_history
        for module in self.model.modules():  # TRL switches off nn.Dropout, but attention keeps its rate as a number
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        self._rollouts: Path | None = None  # opened by the first round, which knows the step it resumes at
        self._dead_rounds = 0

    def _check(self, args: GRPOConfig, rows: Sequence[Mapping]) -> None:
        """Refuse what this trainer would otherwise do wrongly or not at all."""
        wrong = [
            f"{name} is {getattr(args, name)!r}, must be {value!r}"
            for name, value in {
                "loss_type": "dapo",
                "beta": 0.0,
                "scale_rewards": "group",
                "entropy_coef": 0.0,
                "use_vllm": False,
                "use_adaptive_entropy": False,
                "use_transformers_continuous_batching": False,
                "use_liger_kernel": False,
            }.items()
            if getattr(args, name) != value
        ]
        for name in ("max_steps", "save_steps"):
            steps = getattr(args, name)
            if steps % self.updates_per_round or steps <= 0:
                wrong.append(f"{name} is {steps}, must be a multiple of the {self.updates_per_round} steps of a round")
        if args.steps_per_generation % args.gradient_accumulation_steps:
            wrong.append("steps_per_generation must be a multiple of gradient_accumulation_steps")
        if len(self.rows) < len(rows):
            wrong.append(f"{len(rows) - len(self.rows)} request ids appear twice")
        if len(self.rows) < self.prompts_per_step:
            wrong.append(f"{len(self.rows)} requests are fewer than the {self.prompts_per_step} of one round")
        if absent := [request_id for request_id in self.rows if request_id not in self.requests]:
            wrong.append(f"{len(absent)} prompts have no request, e.g. {absent[0]}")
        if wrong:
            raise ConfigurationError(
                "; ".join(wrong),
                where="DAPOTrainer",
                why="a checkpoint inside a round cannot be resumed exactly, and groups are told apart by request id",
                do="build the arguments with dapo_config, from one row per request",
            )

    # --- prompts ---------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return Rounds(
            size=len(self.rows),
            rounds=self.args.max_steps // self.updates_per_round,
            prompts=self.prompts_per_step,
            generations=self.num_generations,
            repeats=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed,
        )

    def _further_prompts(self, drawn: Sequence[str], attempt: int, count: int) -> list[str]:
        """`count` request ids that this round has not drawn yet; fewer if there are no more."""
        rest = sorted(set(self.rows) - set(drawn))
        shuffler = random.Random(derive_seed(self.args.seed, "refill", self.state.global_step, attempt))
        return shuffler.sample(rest, min(count, len(rest)))

    # --- one round -------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: list[dict]) -> dict[str, torch.Tensor]:
        """TRL's, without its shuffle: groups stay together, so that a micro batch reads each prompt once."""
        pieces = self.args.steps_per_generation
        if self._step % (pieces * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = split_tensor_dict(self._generate_and_score_completions(generation_batch), pieces)
        return self._buffered_inputs[self._step % pieces]

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, torch.Tensor]:
        """Generate a round: sample groups, draw further prompts for dead ones, and build the batch of the loss."""
        inputs = gather_object(inputs)  # of all processes, in their order
        drawn = list(dict.fromkeys(row["request_id"] for row in inputs))
        assert len(inputs) == len(drawn) * self.num_generations == self.prompts_per_step * self.num_generations
        sampled = batch = self._sample(drawn, attempt=0)
        refills = 0
        while refills < self.max_refill and not all(map(self._teaches, batch)):
            dead = [position for position, group in enumerate(batch) if not self._teaches(group)]
            further = self._further_prompts(drawn, refills + 1, len(dead))
            if not further:
                break
            refills += 1
            drawn += further
            fresh = self._sample(further, attempt=refills)
            sampled, batch = sampled + fresh, list(batch)
            for position, group in zip(dead, filter(self._teaches, fresh), strict=False):
                batch[position] = group
        assert len({group.request_id for group in batch}) == len(batch), "two groups share a request"
        for group in batch:
            group.kept = self._teaches(group)
        self._record(sampled, batch, refills)
        return self._tensors(batch)

    def _teaches(self, group: Group) -> bool:
        """Whether a group stays in the batch."""
        return group.alive or (self.keeps_dead and any(map(any, group.learnt)))

    def _sample(self, request_ids: list[str], attempt: int) -> list[Group]:
        """Groups of the requests, in their order: each process generates some, and all get all."""
        place, processes = self.accelerator.process_index, self.accelerator.num_processes
        groups = gather_object(self._own_sample(request_ids[place::processes], attempt))
        by_id = {group.request_id: group for group in groups}
        return [by_id[request_id] for request_id in request_ids]

    def _own_sample(self, request_ids: list[str], attempt: int) -> list[Group]:
        """Generate, read and reward G completions of each request."""
        size = self.num_generations
        rows = [self.rows[request_id] for request_id in request_ids]
        completions = generate_rankings(
            self.model,
            [row["prompt_ids"] for row in rows],
            [row["label_prior"] for row in rows],
            grammar=self.grammar,
            num_generations=size,
            temperature=self.temperature,
            batch_size=self.decode_batch,
            seed=derive_seed(self.args.seed, "rollout", self.state.global_step, attempt),
            bf16=self.args.bf16,
        )
        groups = []
        for index, row in enumerate(rows):
            request = self.requests[row["request_id"]]
            own = completions[index * size : (index + 1) * size]
            answers = [
                read_answer(request, ids, row["label_items"], self.grammar, self.processing_class) for ids in own
            ]
            terms = self._terms(row, own, answers)
            rewards = [self.rewards.total(term) for term in terms]
            learnt = [self._learnt(row, ids) for ids in own]
            unshaped = [{name: None if name in SHAPING else value for name, value in term.items()} for term in terms]
            verified = [self.rewards.total(term) for term in unshaped]
            groups.append(Group(row["request_id"], attempt, own, learnt, answers, terms, rewards, verified))
        return groups

    def _terms(self, row: Mapping, completions: Sequence[Sequence[int]], answers: Sequence[Answer]) -> list[dict]:
        """What the completions of one request earn, term by term."""
        return [self.rewards.terms(self.requests[row["request_id"]], answer) for answer in answers]

    def _learnt(self, row: Mapping, completion_ids: list[int]) -> list[int]:
        """1 where a token counts in the loss: it was chosen, and not by a policy that was cut short."""
        if self.mask_truncated_completions and self.grammar.was_truncated(completion_ids):
            return [0] * len(completion_ids)
        prior = prior_tensor([row["label_prior"]], self.grammar, torch.device("cpu"))
        cited = self.grammar.cited(torch.tensor([row["prompt_ids"]]), prior)
        phases = self.grammar.phases(torch.tensor([completion_ids]), torch.tensor([len(row["label_items"])]), cited)
        return (phases.only[0] == FREE).int().tolist()

    def _tensors(self, batch: list[Group]) -> dict[str, torch.Tensor]:
        """The batch that TRL's `_compute_loss` reads: of B groups this process's share, B * G / processes rows.

        `tool_mask` is TRL's name for tokens that count.
        """
        device, pad = self.accelerator.device, self.grammar.pad_id
        # Dead groups stay in the batch with advantage 0; they must not dilute the mean over tokens either.
        counted = sum(map(sum, (mask for group in batch if group.kept for mask in group.learnt)))
        # Every so-manieth group, so that a minibatch is the same groups however many processes share it.
        batch = batch[self.accelerator.process_index :: self.accelerator.num_processes]
        prompts = [self.rows[group.request_id]["prompt_ids"] for group in batch for _ in group.completions]
        prompt_ids, prompt_mask = left_pad(prompts, pad, device)
        completions = [torch.tensor(ids) for group in batch for ids in group.completions]
        completion_ids = pad_sequence(completions, batch_first=True, padding_value=pad).to(device)
        real = [torch.ones_like(ids) for ids in completions]
        learnt = [torch.tensor(mask) for group in batch for mask in group.learnt]
        tensors = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": pad_sequence(real, batch_first=True).to(device),
            "tool_mask": pad_sequence(learnt, batch_first=True).to(device),
            "label_prior": prior_tensor(
                [self.rows[group.request_id]["label_prior"] for group in batch for _ in group.completions],
                self.grammar,
                device,
            ),
            "advantages": torch.tensor([a for group in batch for a in group.advantages], device=device),
            "num_items_in_batch": torch.tensor(counted, device=device),  # of all processes, as TRL's
        }
        tensors["old_per_token_logps"] = self.log_probs_under(self.model, tensors)
        return tensors

    @torch.no_grad()
    def log_probs_under(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities (B, O) of a batch's completions under a model, by the grammar."""
        self._label_prior = tensors["label_prior"]
        log_probs, _, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], dim=1),
            torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], dim=1),
            tensors["completion_ids"].size(1),
            batch_size=self.args.per_device_train_batch_size,  # the loss's own pieces: the first ratio is exactly 1
        )
        return log_probs

    def _compute_loss(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """TRL's; what it hands to the method below does not say whose prior a row has."""
        self._label_prior = inputs["label_prior"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **multimodal,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """TRL's, under the grammar: log-probabilities and entropies (B, O) of the distribution that was sampled."""
        if compute_aux_loss or any(value is not None for value in multimodal.values()):
            raise ConfigurationError(
                "DAPO of rankings takes text-only models without a mixture-of-experts loss",
                where=type(model).__name__,
                do="set router_aux_loss_coef=0, or choose another model",
            )
        # Checkpointing and a key-value cache exclude each other; DistributedDataParallel wants one forward a backward.
        share_prompts = not self.args.gradient_checkpointing and self.accelerator.num_processes == 1
        log_probs, entropies = [], []
        size = batch_size or len(input_ids)
        for ids, mask, prior in zip(
            input_ids.split(size), attention_mask.split(size), self._label_prior.split(size), strict=True
        ):
            completion_ids = ids[:, -logits_to_keep:]
            with self.accelerator.autocast():
                logits = completion_logits(model, ids, mask, logits_to_keep, share_prompts)
            log_prob, entropy, _ = constrained_log_probs(
                logits,
                completion_ids,
                prior,
                self.grammar,
                self.temperature,
                self.grammar.cited(ids[:, :-logits_to_keep], prior),
            )
            log_probs.append(log_prob)
            entropies.append(entropy)
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None

    # --- what is written down --------------------------------------------------------------------------------------

    def _record(self, sampled: list[Group], batch: list[Group], refills: int) -> None:
        """Metrics and rollout lines of a round, over everything the policy said; then the gate on dead rounds."""
        metrics = self._metrics["train"]
        for name in sampled[0].terms[0]:
            if values := [term[name] for group in sampled for term in group.terms if term[name] is not None]:
                metrics[f"reward/{name}"].append(_mean(values))
        if values := [reward for group in sampled for reward in group.rewards if reward is not None]:
            metrics["reward"].append(_mean(values))
        answers = [answer for group in sampled for answer in group.answers]
        copies = [answer.ranking == self.requests[answer.request_id].items for answer in answers]
        metrics["unchanged"].append(_mean(copies))
        metrics["truncated"].append(_mean([answer.status == "truncated" for answer in answers]))
        metrics["completions/mean_length"].append(_mean([answer.output_tokens for answer in answers]))
        metrics["frac_groups_kept"].append(_mean([group.kept for group in batch]))
        metrics["refill_rounds"].append(refills)

        if self._rollouts is None:
            with self.accelerator.main_process_first():
                self._open_rollouts()
        if self.accelerator.is_main_process:
            with self._rollouts.open("a", encoding="utf-8") as file:
                for group in sampled:
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines(group))

        self._dead_rounds = 0 if any(group.kept for group in batch) else self._dead_rounds + 1
        if self._dead_rounds >= self.max_dead:
            truncated = sum(answer.status == "truncated" for answer in answers)
            raise GateError(
                f"no group had two different rewards to learn from in {self._dead_rounds} rounds in a row",
                where=f"rl, step {self.state.global_step}, {self._rollouts}",
                why=f"answers worth the same teach nothing, nor do cut ones ({truncated} of the last {len(answers)})",
                do="look at the rollouts; if most were cut, raise prompt_max_reasoning, else rl_temperature or "
                "rl_num_generations; or train the sft stage longer",
            )

    def _lines(self, group: Group) -> Iterator[dict]:
        items = self.rows[group.request_id]["label_items"]
        for sample, answer in enumerate(group.answers):
            yield {
                "step": self.state.global_step,
                "attempt": group.attempt,
                "request_id": group.request_id,
                "sample": sample,
                "ranking": [chr(ord("A") + items.index(item)) for item in answer.ranking],
                "status": answer.status,
                "reasoning": answer.reasoning,
                "terms": group.terms[sample],
                "reward": group.rewards[sample],
                "advantage": group.advantages[sample],
                "kept": group.kept,
            }

    def _open_rollouts(self) -> None:
        """Drop the lines a killed run wrote after the checkpoint we continue from, and count its dead rounds."""
        self._rollouts = Path(self.args.output_dir) / "rollouts.jsonl"
        self._rollouts.parent.mkdir(parents=True, exist_ok=True)
        lines, alive = [], {}
        if self._rollouts.exists():
            for line in self._rollouts.read_text(encoding="utf-8").splitlines(keepends=True):
                # A line cut short by the kill is the last one, and belongs to a step after the checkpoint.
                row = json.loads(line) if line.endswith("}\n") else {"step": self.state.global_step}
                if row["step"] >= self.state.global_step:
                    break
                lines.append(line)
                alive[row["step"]] = alive.get(row["step"], False) or row["kept"]
        if self.accelerator.is_main_process:
            self._rollouts.write_text("".join(lines), encoding="utf-8")
        for step in sorted(alive):
            self._dead_rounds = 0 if alive[step] else self._dead_rounds + 1


class Rounds(Sampler):
    """Row numbers for a whole run: every round's prompts, each G times, as often as TRL asks for the batch again.

    The order is a function of the seed alone, for all epochs. (TRL's sampler keeps a generator between epochs, so a
    run resumed in its second epoch would get the order of the first.) An epoch's last, incomplete round is left out.
    """

    def __init__(self, *, size: int, rounds: int, prompts: int, generations: int, repeats: int, seed: int) -> None:
        self.size, self.rounds, self.prompts = size, rounds, prompts
        self.generations, self.repeats, self.seed = generations, repeats, seed

    def __len__(self) -> int:
        return self.rounds * self.prompts * self.generations * self.repeats

    def __iter__(self) -> Iterator[int]:
        rounds_per_epoch = self.size // self.prompts
        for number in range(self.rounds):
            epoch, position = divmod(number, rounds_per_epoch)
            if position == 0:
                order = list(range(self.size))
                random.Random(derive_seed(self.seed, "epoch", epoch)).shuffle(order)
            chosen = order[position * self.prompts : (position + 1) * self.prompts]
            for _ in range(self.repeats):
                yield from (row for row in chosen for _ in range(self.generations))


def completion_logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
    share_prompts: bool,
) -> torch.Tensor:
    """Logits (B, O, V) that predict the last O tokens of input_ids (B, P + O).

    With `share_prompts` equal prompts are read once and their keys and values serve all their completions, with
    gradient: a group of G costs P + G * O tokens instead of G * (P + O).
    """
    place = positions(attention_mask)
    if not share_prompts:
        return model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=place,
            use_cache=False,
            logits_to_keep=completion_length + 1,
        ).logits[:, :-1]
    prompt_length = input_ids.size(1) - completion_length
    prompts = torch.cat([input_ids[:, :prompt_length], attention_mask[:, :prompt_length]], dim=1)
    unique, of_row = prompts.unique(dim=0, return_inverse=True)
    prompt_ids, prompt_mask = unique.chunk(2, dim=1)
    head = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        position_ids=positions(prompt_mask),
        use_cache=True,
        logits_to_keep=1,
    )
    head.past_key_values.batch_select_indices(of_row)
    tail = model(
        input_ids=input_ids[:, prompt_length:-1],
        attention_mask=attention_mask[:, :-1],
        position_ids=place[:, prompt_length:-1],
        past_key_values=head.past_key_values,
        use_cache=True,
    )
    return torch.cat([head.logits[of_row], tail.logits], dim=1)


def _paid_elsewhere(**columns) -> list[float]:
    """TRL asks for a reward function. Ours need the answer, so `_sample` pays them and this is never called."""
    raise NotImplementedError("rewards are paid by DAPOTrainer._sample")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
