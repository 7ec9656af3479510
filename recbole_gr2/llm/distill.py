"""On-policy distillation (OPD, GR2-TR): the student answers, and a frozen teacher says how likely each token was to it.

The loss is DAPO's clipped surrogate on the verifiable reward, plus beta * KL(student || teacher) at every token. The
teacher gives log-probabilities of the student's own tokens and nothing else, so the divergence is paid as a token's
part of the advantage: A_t = A_answer - beta * (log p_student(t) - log p_teacher(t)). Under the student's samples its
policy gradient is that of the divergence (of TRL's own estimate in the loss, `beta`, it is not).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.llm.dapo import DAPOTrainer, Group
from recbole_gr2.llm.endpoint import connect

Teacher = Callable[["DistillTrainer", dict[str, torch.Tensor]], torch.Tensor]


class DistillTrainer(DAPOTrainer):
    """DAPO near a teacher. Groups with equal rewards stay: their tokens still have the teacher to learn from.

    Args:
        teacher: gives log-probabilities (B, O) of a batch's completions, nan where it has nothing to say.
        kl: weight of the divergence, beta. GR2-TR's value is unpublished.
    """

    keeps_dead = True

    def __init__(self, *args: Any, teacher: Teacher, kl: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.kl = teacher, kl

    def _tensors(self, batch: list[Group]) -> dict[str, torch.Tensor]:
        """DAPO's, with advantages (B, O) of tokens."""
        tensors = super()._tensors(batch)
        gap = tensors["old_per_token_logps"] - self.teacher(self, tensors)
        said = ~gap.isnan() & tensors["tool_mask"].bool()
        gap = gap.masked_fill(~said, 0.0)
        sums = self.accelerator.gather(torch.stack([gap.sum(), said.sum().to(gap.dtype)]).unsqueeze(0)).sum(0)
        self._metrics["train"]["teacher_kl"].append((sums[0] / sums[1].clamp(min=1.0)).item())
        tensors["advantages"] = tensors["advantages"].unsqueeze(1) - self.kl * gap
        return tensors


class LocalTeacher:
    """A model of the student's own vocabulary, asked under the same grammar and prior as the student."""

    def __init__(self, model: Any, tokenizer: Any, student_tokenizer: Any) -> None:
        if tokenizer.get_vocab() != student_tokenizer.get_vocab():
            raise ConfigurationError(
                f"the teacher knows {len(tokenizer):,} tokens, the student {len(student_tokenizer):,}, and they differ",
                where="distill_teacher",
                why="it is asked about the student's tokens",
                do="take a model that was mid-trained on the same semantic IDs and texts, e.g. with more llm_layers",
            )
        self.model = model.requires_grad_(False).eval()

    def __call__(self, trainer: DistillTrainer, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities (B, O)."""
        return trainer.log_probs_under(self.model, tensors)


class EndpointTeacher:
    """A model behind an endpoint that gives log-probabilities of a prompt's tokens (`echo` of `/completions`: vLLM).

    It is sent token ids, so it has to serve the student's vocabulary. It knows neither grammar nor prior, so it is
    asked about the trace alone; labels learn from the reward.

    Args:
        url: the endpoint, e.g. `http://localhost:8000/v1`.
        model: the endpoint's name of the model.
        concurrency: requests under way at once.

    Raises:
        DependencyError: the `openai` package is missing.
        ConfigurationError: there is no key.
    """

    def __init__(self, url: str, model: str, *, concurrency: int, timeout: float = 120.0) -> None:
        self.client, self.error = connect(url, timeout=timeout, where="distill_teacher")
        self.model, self.concurrency = model, concurrency

    def __call__(self, trainer: DistillTrainer, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities (B, O), nan at labels, marks and padding.

        Raises:
            GR2Error: the endpoint fails after the client's retries, or gives no log-probability for each token.
        """
        log_probs = torch.full(tensors["completion_ids"].shape, torch.nan)
        rows = []
        for prompt, mask, ids, real in zip(
            *(tensors[name].cpu() for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")),
            strict=True,
        ):
            rows.append((prompt[mask.bool()].tolist(), ids[real.bool()].tolist()))
        with ThreadPoolExecutor(self.concurrency) as pool:
            for number, own in enumerate(pool.map(self._ask, rows)):
                log_probs[number, : len(own)] = torch.tensor(own)
        log_probs = log_probs.to(tensors["completion_ids"].device)
        counts = tensors["label_prior"].isfinite().sum(-1)
        cited = trainer.grammar.cited(tensors["prompt_ids"], tensors["label_prior"])
        traces = trainer.grammar.phases(tensors["completion_ids"], counts, cited).reasoning
        return log_probs.masked_fill(~traces, torch.nan)

    def _ask(self, row: tuple[list[int], list[int]]) -> list[float]:
        prompt, completion = row
        where = f"distill_teacher {self.client.base_url}"
        try:
            said = self.client.completions.create(
                model=self.model, prompt=prompt + completion, max_tokens=1, temperature=0.0, echo=True, logprobs=0
            )
        except self.error as error:
            raise GR2Error(
                f"the endpoint failed: {type(error).__name__}: {error}",
                where=where,
                do="see to the endpoint, then repeat the command",
            ) from error
        given = said.choices[0].logprobs.token_logprobs if said.choices and said.choices[0].logprobs else []
        own = given[len(prompt) : len(prompt) + len(completion)]
        if len(own) < len(completion) or None in own:
            raise GR2Error(
                f"{len(prompt) + len(completion)} tokens were sent, and {len(given)} log-probabilities came back",
                where=where,
                do="use a server with echo and logprobs, e.g. vLLM",
            )
        return own
