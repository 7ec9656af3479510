"""DAPO (arXiv 2503.14476) for rankings: TRL's GRPOTrainer with the grammar and dynamic sampling.

TRL provides the loop, the optimizer, the clipped loss per token and its metrics. This subclass replaces the steps
between two batches of TRL: which prompts are drawn, how rankings are generated and rewarded, which groups are kept, and
the distribution under which the probability of a token is computed. A *round* is one such generation, followed by
`num_iterations` passes over its completions.

All randomness is a function of (seed, step, request). So an interrupted and resumed run equals an uninterrupted one.

With several processes (`accelerate launch`) a round is still one round: each process generates for its share of the
prompts, all processes gather all groups and draw the same further prompts, and each trains on its share of the batch.
The rollouts equal those of one process.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from recbole_gr2.errors import ConfigurationError, QualityCheckError
from recbole_gr2.llm.answers import read_answer
from recbole_gr2.llm.checkpoints import CompleteCheckpoints
from recbole_gr2.llm.generation import TRANSFORMERS, generate_rankings
from recbole_gr2.llm.grammar import FREE, Grammar, prior_tensor
from recbole_gr2.llm.inputs import left_pad
from recbole_gr2.llm.losses import completion_log_probs
from recbole_gr2.llm.rounds import SHAPING, Group, Rewards, RolloutFile, Round
from recbole_gr2.llm.sampler import RoundSampler
from recbole_gr2.llm.train import through
from recbole_gr2.seeding import derive_seed
from recbole_gr2.types import Answer, Request


class DAPOTrainer(GRPOTrainer):
    """Train a language model to rank, with DAPO.

    It writes `rollouts.jsonl` to the folder of the checkpoints, with one line per generated completion.

    Args:
        model: The language model.
        args: The result of `dapo_config`.
        prompts: One dict per request: `request_id`, `prompt_ids` (token ids up to the assistant turn), `label_items`
            (item id of label A, B, ..) and `label_prior` (their log-priors). None of them contains the target.
        requests: Requests by id, for the rewards.
        rewards: The rewards of answers (`rewards.WeightedRewards`).
        grammar: The grammar of completions.
        tokenizer: The tokenizer of the model.
        max_resample: Largest number of times that a round replaces zero-variance groups by those of further prompts.
        max_empty_rounds: Rounds in a row without a usable group after which training stops.
        callbacks: Callbacks of transformers.
        engine: What runs the model to generate completions, a name in `generation.ENGINES`. The loss always uses the
            log-probabilities of the model that is trained.

    Raises:
        ConfigurationError: The settings would not give an exact run.
        QualityCheckError: `max_empty_rounds` rounds in a row had no group with different rewards.
    """

    # Whether zero-variance groups take part in the loss, because their tokens have another signal (a teacher or a
    # reference model).
    keep_zero_variance = False

    num_generations: int  # of GRPOTrainer
    processing_class: Any

    def __init__(
        self,
        model: Any,
        args: GRPOConfig,
        prompts: Sequence[Mapping[str, Any]],
        *,
        requests: Mapping[str, Request],
        rewards: Rewards,
        grammar: Grammar,
        tokenizer: PreTrainedTokenizerBase,
        max_resample: int = 2,
        max_empty_rounds: int = 5,
        callbacks: list[TrainerCallback] | None = None,
        engine: str = TRANSFORMERS,
    ) -> None:
        self.prompts = {prompt["request_id"]: prompt for prompt in prompts}
        self.requests, self.rewards, self.grammar = requests, rewards, grammar
        self.max_resample, self.max_empty_rounds, self.engine = max_resample, max_empty_rounds, engine
        self.settings = cast(Any, args)  # `self.args` is declared without the fields of GRPOConfig
        self.prompts_per_step = self.settings.generation_batch_size // self.settings.num_generations
        steps = self.settings.num_iterations * self.settings.steps_per_generation
        self.updates_per_round = steps // self.settings.gradient_accumulation_steps
        self._check(len(prompts))
        super().__init__(
            model=model,
            reward_funcs=[_unused_reward],
            args=args,
            train_dataset=Dataset.from_dict({"request_id": list(self.prompts)}),
            processing_class=tokenizer,
            callbacks=[*(callbacks or []), CompleteCheckpoints()],
        )
        self.remove_callback(PrinterCallback)  # it would print to stdout; the lines are in state.log_history
        for module in self.policy.modules():  # TRL disables nn.Dropout, but attention stores its rate as a number
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0  # type: ignore[assignment]
        self._rollouts: RolloutFile | None = None  # created in the first round, when the step is known

    @property
    def policy(self) -> PreTrainedModel:
        """The trained model."""
        return self.model  # type: ignore[return-value]

    def _check(self, count: int) -> None:
        """Raise an error if this trainer does not support a setting. `count` is the number of prompts."""
        args = self.settings
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
        if len(self.prompts) < count:
            wrong.append(f"{count - len(self.prompts)} request ids appear twice")
        if len(self.prompts) < self.prompts_per_step:
            wrong.append(f"{len(self.prompts)} requests are fewer than the {self.prompts_per_step} of one round")
        if absent := [request_id for request_id in self.prompts if request_id not in self.requests]:
            wrong.append(f"{len(absent)} prompts have no request, e.g. {absent[0]}")
        if wrong:
            raise ConfigurationError(
                "; ".join(wrong),
                where="DAPOTrainer",
                why="a checkpoint within a round cannot be resumed exactly, and groups are identified by request id",
                do="build the arguments with dapo_config, and pass one prompt per request",
            )

    # --- prompts ---------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        return RoundSampler(
            size=len(self.prompts),
            rounds=self.settings.max_steps // self.updates_per_round,
            prompts=self.prompts_per_step,
            generations=self.num_generations,
            repeats=self.num_iterations * self.settings.steps_per_generation,
            seed=self.settings.seed,
        )

    def _further_prompts(self, used: Sequence[str], attempt: int, count: int) -> list[str]:
        """Return `count` request ids that this round has not used, or fewer if there are no more."""
        rest = sorted(set(self.prompts) - set(used))
        # The name "refill" is part of the seed: another name would change the order.
        shuffler = random.Random(derive_seed(self.settings.seed, "refill", self.state.global_step, attempt))
        return shuffler.sample(rest, min(count, len(rest)))

    # --- one round -------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """Return the next part of the batch, as TRL does, but without its shuffle.

        Groups stay together, so that a micro batch reads each prompt once.
        """
        parts = self.settings.steps_per_generation
        if self._step % (parts * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch: dict[str, Any] = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs: Any = split_tensor_dict(batch, parts)
        return self._buffered_inputs[self._step % parts]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Generate a round, record it, and return the batch of the loss."""
        inputs = gather_object(inputs)  # of all processes, in their order
        request_ids = list(dict.fromkeys(example["request_id"] for example in inputs))
        assert len(inputs) == len(request_ids) * self.num_generations == self.prompts_per_step * self.num_generations
        finished = self.sample_round(request_ids)
        self._record(finished)
        return self.loss_inputs(finished.batch)

    def sample_round(self, request_ids: Sequence[str]) -> Round:
        """Return the groups of a round: sample groups, and replace zero-variance groups by those of further prompts.

        The first useful groups of further prompts take the places of groups that are not kept. All other groups keep
        their places.
        """
        used = list(request_ids)
        sampled = self._sample(used, attempt=0)
        batch, resamples = list(sampled), 0
        while resamples < self.max_resample and not all(map(self._keeps, batch)):
            rejected = [position for position, group in enumerate(batch) if not self._keeps(group)]
            further = self._further_prompts(used, resamples + 1, len(rejected))
            if not further:
                break
            resamples += 1
            used += further
            fresh = self._sample(further, attempt=resamples)
            sampled = sampled + fresh
            for position, group in zip(rejected, filter(self._keeps, fresh), strict=False):
                batch[position] = group
        assert len({group.request_id for group in batch}) == len(batch), "two groups share a request"
        for group in batch:
            group.kept = self._keeps(group)
        return Round(sampled, batch, resamples)

    def _keeps(self, group: Group) -> bool:
        """Return whether a group takes part in the loss."""
        return group.has_signal or (self.keep_zero_variance and group.has_tokens)

    def _sample(self, request_ids: list[str], attempt: int) -> list[Group]:
        """Return the groups of requests, in their order. Each process generates its share, and gathers all."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        groups = gather_object(self._sample_locally(request_ids[rank::processes], attempt))
        by_id = {group.request_id: group for group in groups}
        return [by_id[request_id] for request_id in request_ids]

    def _sample_locally(self, request_ids: list[str], attempt: int) -> list[Group]:
        """Generate, read and reward G completions of each request, on this process."""
        size = self.num_generations
        prompts = [self.prompts[request_id] for request_id in request_ids]
        completions = generate_rankings(
            self.policy,
            [prompt["prompt_ids"] for prompt in prompts],
            [prompt["label_prior"] for prompt in prompts],
            grammar=self.grammar,
            num_generations=size,
            temperature=self.temperature,
            seed=derive_seed(self.settings.seed, "rollout", self.state.global_step, attempt),
            bf16=self.settings.bf16,
            engine=self.engine,
        )
        groups = []
        for index, prompt in enumerate(prompts):
            request = self.requests[prompt["request_id"]]
            sampled = completions[index * size : (index + 1) * size]
            answers = [
                read_answer(request, ids, prompt["label_items"], self.grammar, self.processing_class) for ids in sampled
            ]
            terms = self.reward_terms(prompt, sampled, answers)
            rewards = [self.rewards.total(term) for term in terms]
            masks = [self._loss_mask(prompt, ids) for ids in sampled]
            unshaped = [{name: None if name in SHAPING else value for name, value in term.items()} for term in terms]
            verified = [self.rewards.total(term) for term in unshaped]
            groups.append(Group(prompt["request_id"], attempt, sampled, masks, answers, terms, rewards, verified))
        return groups

    def reward_terms(
        self, prompt: Mapping[str, Any], completions: Sequence[Sequence[int]], answers: Sequence[Answer]
    ) -> list[dict[str, float | None]]:
        """Return the rewards by name of each completion of one prompt."""
        return [self.rewards.terms(self.requests[prompt["request_id"]], answer) for answer in answers]

    def _loss_mask(self, prompt: Mapping[str, Any], completion_ids: list[int]) -> list[int]:
        """Return 1 for each token of a completion that takes part in the loss: it is not forced, nor truncated."""
        if self.mask_truncated_completions and self.grammar.was_truncated(completion_ids):
            return [0] * len(completion_ids)
        prior = prior_tensor([prompt["label_prior"]], self.grammar, torch.device("cpu"))
        cited = self.grammar.cited(torch.tensor([prompt["prompt_ids"]]), prior)
        phases = self.grammar.phases(torch.tensor([completion_ids]), torch.tensor([len(prompt["label_items"])]), cited)
        return (phases.only[0] == FREE).int().tolist()

    def _record(self, finished: Round) -> None:
        """Log the metrics and the rollouts of a round, and check that rounds have usable groups."""
        for name, value in finished.metrics(self.requests).items():
            self._metrics["train"][name].append(value)
        if self._rollouts is None:
            with self.accelerator.main_process_first():
                self._rollouts = RolloutFile(
                    Path(self.settings.output_dir) / "rollouts.jsonl",
                    self.state.global_step,
                    write=self.accelerator.is_main_process,
                )
        label_items = {request_id: prompt["label_items"] for request_id, prompt in self.prompts.items()}
        self._rollouts.add(self.state.global_step, finished, label_items)
        if self._rollouts.empty_rounds >= self.max_empty_rounds:
            answers = finished.answers
            truncated = sum(answer.status == "truncated" for answer in answers)
            raise QualityCheckError(
                f"no group had two different rewards in {self._rollouts.empty_rounds} rounds in a row",
                where=f"rl, step {self.state.global_step}, {self._rollouts.path}",
                why="equal rewards give no gradient, nor do truncated answers "
                f"({truncated} of the last {len(answers)})",
                do="read the rollouts; if most were truncated, raise prompt_max_reasoning, otherwise rl_temperature or "
                "rl_num_generations; or train the sft stage longer",
            )

    # --- the loss --------------------------------------------------------------------------------------------------

    def loss_inputs(self, batch: list[Group]) -> dict[str, torch.Tensor]:
        """Return the tensors that the loss of TRL reads: of B groups the share of this process, B * G / processes rows.

        `tool_mask` is TRL's name of the tokens that take part in the loss.
        """
        device, pad = self.accelerator.device, self.grammar.pad_id
        # Groups that are not kept have advantage 0. They must not take part in the mean over tokens, either.
        counted = sum(sum(mask) for group in batch if group.kept for mask in group.loss_masks)
        # Every n-th group, so that a minibatch consists of the same groups for any number of processes.
        batch = batch[self.accelerator.process_index :: self.accelerator.num_processes]
        prompts = [self.prompts[group.request_id] for group in batch for _ in group.completions]
        prompt_ids, prompt_mask = left_pad([prompt["prompt_ids"] for prompt in prompts], pad, device)
        completions = [torch.tensor(ids) for group in batch for ids in group.completions]
        masks = [torch.tensor(mask) for group in batch for mask in group.loss_masks]
        real = [torch.ones_like(ids) for ids in completions]
        tensors = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": pad_sequence(completions, batch_first=True, padding_value=pad).to(device),
            "completion_mask": pad_sequence(real, batch_first=True).to(device),
            "tool_mask": pad_sequence(masks, batch_first=True).to(device),
            "label_prior": prior_tensor([prompt["label_prior"] for prompt in prompts], self.grammar, device),
            "advantages": torch.tensor([a for group in batch for a in group.advantages], device=device),
            "num_items_in_batch": torch.tensor(counted, device=device),  # of all processes, as in TRL
        }
        tensors["old_per_token_logps"] = self.log_probs_under(self.policy, tensors)
        return tensors

    @torch.no_grad()
    def log_probs_under(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the log-probabilities (B, O) of the completions of `loss_inputs` under a model and the grammar."""
        self._label_prior = tensors["label_prior"]
        log_probs, _, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], dim=1),
            torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], dim=1),
            tensors["completion_ids"].size(1),
            batch_size=self.settings.per_device_train_batch_size,  # as in the loss: then the first ratio is exactly 1
        )
        return log_probs

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of TRL, which does not pass the priors to the method below."""
        self._label_prior = inputs["label_prior"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Return log-probabilities and entropies (B, O) of the sampled distribution. Replaces TRL's method."""
        if compute_aux_loss or any(value is not None for value in multimodal.values()):
            raise ConfigurationError(
                "DAPO of rankings supports only text models without a mixture-of-experts loss",
                where=type(model).__name__,
                why="the grammar is applied to the logits of text tokens",
                do="set router_aux_loss_coef=0, or choose another model",
            )

        def compute(whole: Any, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            return completion_log_probs(
                whole,
                *inputs,
                logits_to_keep,
                self._label_prior,
                self.grammar,
                self.temperature,
                share_prompts=not self.settings.gradient_checkpointing,  # it excludes a key-value cache
                micro_batch_size=batch_size,
                autocast=self.accelerator.autocast,
            )

        inputs = input_ids, attention_mask
        log_probs, entropies = through(self.accelerator, model, compute, inputs, bf16=False)
        return log_probs, entropies if compute_entropy else None, None


def _unused_reward(**columns: Any) -> list[float | None]:
    """TRL requires a reward function. Rewards need the answer and are computed in `DAPOTrainer.sample_round`."""
    raise NotImplementedError("rewards are computed by DAPOTrainer.sample_round")
