"""A teacher behind any OpenAI-compatible endpoint (vLLM, SGLang, Ollama, `transformers serve`, a hosted model)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from recbole_gr2.errors import DependencyError, GR2Error
from recbole_gr2.prompts import PromptMaker
from recbole_gr2.ranking import complete, promote
from recbole_gr2.teachers import Argument
from recbole_gr2.types import Prompt, Request

FORM = (
    'Answer with one JSON object: {"explanation": "...", "recommendations": ["<label>", ...]}. The explanation has '
    "three steps: the pattern in the history, what goes with it, and which candidate matches; it cites items by their "
    "ID and has at most 60 words. The recommendations hold every label once, best first."
)
HINT = "The shopper took {label}. Explain why, without saying that you were told, and rank it first."


class OpenAITeacher:
    """Asks an endpoint for an explanation and a ranking as JSON.

    Args:
        model: the endpoint's name of the model.
        base_url: the endpoint, e.g. `http://localhost:8000/v1`; None for the client's default.
        concurrency: requests under way at once.
        temperature: of every try.

    The key is read from OPENAI_API_KEY by the client, which also retries time-outs, rate limits and server errors.

    Raises:
        DependencyError: the `openai` package is missing.
    """

    name = "openai_api"

    def __init__(self, maker: PromptMaker, *, model: str, base_url: str | None, concurrency: int, temperature: float):
        try:
            from openai import OpenAI
        except ImportError as error:
            raise DependencyError(
                "the openai_api teacher needs the openai package",
                where="trace_teacher",
                do='pip install "recbole-gr2[teacher]"',
            ) from error
        self.client = OpenAI(base_url=base_url, max_retries=5, timeout=120.0)
        self.maker, self.model, self.concurrency, self.temperature = maker, model, concurrency, temperature

    def argue(self, requests: Sequence[Request], *, targeted: bool, attempt: int) -> list[Argument]:
        """See `Teacher`. An answer that is no such JSON gives an empty argument, which is rejected and counted."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda request: self._ask(request, targeted), requests))

    def _ask(self, request: Request, targeted: bool) -> Argument:
        prompt = self.maker.render(request)
        *before, user = prompt.messages
        text = f"{user['content']}\n{FORM}"
        if targeted:
            text += "\n" + HINT.format(label=prompt.labels[prompt.order.index(request.target_rank - 1)])
        reply = self.client.chat.completions.create(
            model=self.model, messages=[*before, {**user, "content": text}], temperature=self.temperature
        )
        if not reply.choices:
            raise GR2Error("the endpoint answered without a choice", where=f"request {request.request_id}")
        argument = read_argument(reply.choices[0].message.content or "", request, prompt)
        if targeted:
            return Argument(reasoning=argument.reasoning, ranking=promote(argument.ranking, request.target))
        return argument


def read_argument(text: str, request: Request, prompt: Prompt) -> Argument:
    """The JSON object in a reply: reasoning, and the ranking completed in the prior's order; empty if there is none."""
    found = re.search(r"\{.*\}", text, flags=re.DOTALL)
    try:
        said = json.loads(found.group()) if found else {}
    except json.JSONDecodeError:
        said = {}  # not an answer: an argument without reasoning is rejected with that reason
    item_of = {label: request.items[position] for label, position in zip(prompt.labels, prompt.order, strict=True)}
    named = said.get("recommendations") if isinstance(said.get("recommendations"), list) else []
    explanation = said.get("explanation") if isinstance(said.get("explanation"), str) and named else ""
    ranking = complete([item_of[label] for label in map(str, named) if label in item_of], request.by_prior)
    return Argument(reasoning=" ".join(explanation.split()), ranking=ranking)
