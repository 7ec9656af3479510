"""On-policy distillation (OPD, GR2-TR): the student samples answers, and a frozen teacher scores each of their tokens.

The loss is DAPO's clipped surrogate of the verifiable reward, plus beta * KL(student || teacher) of every token. The
teacher returns only the log-probabilities of the student's tokens. So the divergence is part of the advantage of a
token: A_t = A_answer - beta * (log p_student(t) - log p_teacher(t)). Under samples of the student, its policy gradient
is the gradient of the divergence. (The gradient of TRL's estimate in the loss, `beta`, is not.)
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.llm.dapo import DAPOTrainer
from recbole_gr2.llm.endpoint import connect
from recbole_gr2.llm.rounds import Group

Teacher = Callable[["DistillTrainer", dict[str, torch.Tensor]], torch.Tensor]


class DistillTrainer(DAPOTrainer):
    """DAPO with a teacher. Zero-variance groups take part in the loss: their tokens have the signal of the teacher.

    Args:
        teacher: Returns the log-probabilities (B, O) of the completions of a batch, nan where it has none.
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
        gap = tensors["old_per_token_logps"] - self.teacher(self, tensors)
        scored = ~gap.isnan() & tensors["tool_mask"].bool()
        gap = gap.masked_fill(~scored, 0.0)
        sums = self.accelerator.gather(torch.stack([gap.sum(), scored.sum().to(gap.dtype)]).unsqueeze(0)).sum(0)
        self._metrics["train"]["teacher_kl"].append((sums[0] / sums[1].clamp(min=1.0)).item())
        tensors["advantages"] = tensors["advantages"].unsqueeze(1) - self.kl * gap
        return tensors


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
        """Return log-probabilities (B, O)."""
        return trainer.log_probs_under(self.model, tensors)


class EndpointTeacher:
    """A model behind an endpoint that returns log-probabilities of prompt tokens (`echo` of `/completions`: vLLM).

    The endpoint gets token ids, so it has to serve a model with the vocabulary of the student. It applies neither
    grammar nor prior, so it scores only the trace. Labels get only the reward.

    Args:
        url: Address of the endpoint, e.g. `http://localhost:8000/v1`.
        model: Name of the model at the endpoint.
        concurrency: Number of parallel requests.
        timeout: Seconds after which a request is repeated.

    Raises:
        DependencyError: The package `openai` is missing.
        ConfigurationError: There is no key.
    """

    def __init__(self, url: str, model: str, *, concurrency: int, timeout: float = 120.0) -> None:
        self.client, self.error = connect(url, timeout=timeout, where="distilled_teacher")
        self.model, self.concurrency = model, concurrency

    def __call__(self, trainer: DistillTrainer, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return log-probabilities (B, O), nan for labels, marks and padding.

        Raises:
            GR2Error: The endpoint fails after several attempts, or returns too few log-probabilities.
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
        return log_probs.masked_fill(~traces, torch.nan)

    def _score(self, text: tuple[list[int], list[int]]) -> list[float]:
        """Return the log-probability of each token of a completion, for (prompt, completion)."""
        prompt, completion = text
        where = f"distilled_teacher {self.client.base_url}"
        try:
            reply = self.client.completions.create(
                model=self.model, prompt=prompt + completion, max_tokens=1, temperature=0.0, echo=True, logprobs=0
            )
        except self.error as error:
            raise GR2Error(
                f"the endpoint failed: {type(error).__name__}: {error}",
                where=where,
                why="the loss needs the log-probabilities of the teacher",
                do="check the endpoint, then repeat the command",
            ) from error
        logprobs = reply.choices[0].logprobs if reply.choices else None
        values = (logprobs.token_logprobs if logprobs else None) or []
        scored = values[len(prompt) : len(prompt) + len(completion)]
        if len(scored) < len(completion) or None in scored:
            raise GR2Error(
                f"{len(prompt) + len(completion)} tokens were sent, and {len(values)} log-probabilities came back",
                where=where,
                why="the loss needs one log-probability per token",
                do="use a server with echo and logprobs, e.g. vLLM",
            )
        return scored
