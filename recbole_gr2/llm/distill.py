"""On-policy distillation (OPD, GR2-TR): the student samples answers, and a frozen teacher scores each of their tokens.

The loss is DAPO's clipped surrogate of the verifiable reward, plus beta * KL(student || teacher) of every token. The
teacher returns only the log-probabilities of the student's tokens. So the divergence is part of the advantage of a
token: A_t = A_answer - beta * (log p_student(t) - log p_teacher(t)). Under samples of the student, its policy gradient
is the gradient of the divergence. The gradient of GRPO's estimate, which is part of the loss in `onerec_trainer`, is
that of KL(teacher || student) instead.

Both log-probabilities are of one distribution. A local teacher has that of the samples: under the grammar and the
prior, at the temperature of sampling. An endpoint knows neither, so that both are over the whole vocabulary at
temperature 1. The samples still follow the first one. So the policy gradient is that of the divergence only as far as
the two agree: at `rl_temperature` 1, for tokens of the reasoning, whose grammar forbids only labels and the like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.dapo import DAPOTrainer
from recbole_gr2.llm.endpoint import Endpoint
from recbole_gr2.llm.losses import vocabulary_log_probs
from recbole_gr2.llm.rounds import Group

# Returns log p_student - log p_teacher of each token of a batch, (B, O); nan where the teacher has no probability.
Teacher = Callable[["DistillTrainer", dict[str, torch.Tensor]], torch.Tensor]


class DistillTrainer(DAPOTrainer):
    """DAPO with a teacher. Zero-variance groups take part in the loss: their tokens have the signal of the teacher.

    Args:
        teacher: Compares student and teacher, see `Teacher`.
        kl: Weight of the divergence, beta. The value of GR2-TR is not published.
        args: As of `DAPOTrainer`.
        kwargs: As of `DAPOTrainer`.
    """

    keep_zero_variance = True

    def __init__(self, *args: Any, teacher: Teacher, kl: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.kl = teacher, kl

    def loss_inputs(self, batch: list[Group]) -> dict[str, torch.Tensor]:
        """Return the tensors of DAPO, with an advantage per token (B, O). Logs the mean divergence, `teacher_kl`."""
        tensors = super().loss_inputs(batch)
        gap = self.teacher(self, tensors)
        scored = ~gap.isnan() & tensors["tool_mask"].bool()
        gap = gap.masked_fill(~scored, 0.0)
        sums = self.accelerator.gather(torch.stack([gap.sum(), scored.sum().to(gap.dtype)]).unsqueeze(0)).sum(0)
        self._metrics["train"]["teacher_kl"].append((sums[0] / sums[1].clamp(min=1.0)).item())
        tensors["advantages"] = tensors["advantages"].unsqueeze(1) - self.kl * gap
        return tensors

    @torch.no_grad()
    def free_log_probs(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the log-probabilities (B, O) of the completions under the student, without grammar and temperature."""
        return vocabulary_log_probs(
            self.policy,
            torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], dim=1),
            torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], dim=1),
            tensors["completion_ids"].size(1),
            micro_batch_size=self.settings.per_device_train_batch_size,
            autocast=self.accelerator.autocast,
        )


class LocalTeacher:
    """A model with the vocabulary of the student, evaluated with the same grammar and prior as the student.

    Args:
        model: The teacher. Its parameters are frozen.
        tokenizer: The tokenizer of the teacher.
        student_tokenizer: The tokenizer of the student.

    Raises:
        ConfigurationError: The vocabularies differ.
    """

    def __init__(self, model: Any, tokenizer: Any, student_tokenizer: Any) -> None:
        if tokenizer.get_vocab() != student_tokenizer.get_vocab():
            raise ConfigurationError(
                f"the teacher has {len(tokenizer):,} tokens, the student {len(student_tokenizer):,}, and they differ",
                where="distilled_teacher",
                why="the teacher scores the tokens of the student",
                do="use a model that was mid-trained on the same semantic IDs and texts, e.g. with more llm_layers",
            )
        self.model = model.requires_grad_(False).eval()

    def __call__(self, trainer: DistillTrainer, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return log p_student - log p_teacher, (B, O)."""
        return tensors["old_per_token_logps"] - trainer.log_probs_under(self.model, tensors)


class EndpointTeacher:
    """A model behind an endpoint that returns log-probabilities of prompt tokens (`echo` of `/completions`: vLLM).

    The endpoint gets token ids, so it has to serve a model with the vocabulary of the student. It applies neither
    grammar nor prior, so it scores only tokens of the trace that the grammar does not restrict to a few tokens. The
    student's log-probabilities of these tokens are computed like those of the endpoint: over the whole vocabulary, at
    temperature 1. Labels, the tokens of cited semantic IDs and forced tokens get only the reward.

    Args:
        url: Address of the endpoint, e.g. `http://localhost:8000/v1`.
        model: Name of the model at the endpoint.
        concurrency: Number of parallel requests.
        timeout: Seconds after which a request is repeated.

    Raises:
        DependencyError: The package `openai` is missing.
        ConfigurationError: There is no key, or the address is wrong.
    """

    def __init__(self, url: str, model: str, *, concurrency: int, timeout: float = 120.0) -> None:
        self.endpoint = Endpoint(url, model, timeout=timeout, where="distilled_teacher")
        self.concurrency = concurrency

    def __call__(self, trainer: DistillTrainer, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return log p_student - log p_teacher, (B, O), nan where the grammar allows only some tokens.

        Raises:
            GR2Error: The endpoint fails after several attempts, or does not return one log-probability per token.
        """
        log_probs = torch.full(tensors["completion_ids"].shape, torch.nan)
        texts = []
        for prompt, mask, ids, real in zip(
            *(tensors[name].cpu() for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")),
            strict=True,
        ):
            texts.append((prompt[mask.bool()].tolist(), ids[real.bool()].tolist()))
        with ThreadPoolExecutor(self.concurrency) as pool:
            for number, values in enumerate(pool.map(self._score, texts)):
                log_probs[number, : len(values)] = torch.tensor(values)
        log_probs = log_probs.to(tensors["completion_ids"].device)
        counts = tensors["label_prior"].isfinite().sum(-1)
        cited = trainer.grammar.cited(tensors["prompt_ids"], tensors["label_prior"])
        traces = trainer.grammar.phases(tensors["completion_ids"], counts, cited).reasoning
        return (trainer.free_log_probs(tensors) - log_probs).masked_fill(~traces, torch.nan)

    def _score(self, text: tuple[list[int], list[int]]) -> list[float]:
        """Return the log-probability of each token of a completion, for (prompt, completion)."""
        prompt, completion = text
        sent = len(prompt) + len(completion)
        response = self.endpoint.complete(
            prompt=prompt + completion, max_tokens=1, temperature=0.0, echo=True, logprobs=0
        )
        logprobs = response["choices"][0].get("logprobs")
        values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        values = values if isinstance(values, list) else []
        scored = values[len(prompt) : sent]
        # Some servers leave out the generated token.
        if len(values) not in (sent, sent + 1) or not all(map(_is_log_prob, scored)):
            raise self.endpoint.failure(
                f"{sent} tokens were sent, and {sum(map(_is_log_prob, values))} log-probabilities came back. The loss "
                "needs one per token, from a server with echo and logprobs such as vLLM"
            )
        return scored


def _is_log_prob(value: object) -> bool:
    return isinstance(value, int | float) and -1e9 < value < 1e-3
