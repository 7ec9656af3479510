"""A language model behind an OpenAI-compatible endpoint as a teacher.

Such endpoints are vLLM, SGLang, Ollama, `transformers serve` and hosted models.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import GR2Error
from recbole_gr2.llm.endpoint import connect
from recbole_gr2.prompts import PromptMaker
from recbole_gr2.ranking import complete, promote
from recbole_gr2.store import read_lines
from recbole_gr2.teachers.base import TeacherReply
from recbole_gr2.types import Prompt, Request

FORM = (
    'Answer with one JSON object: {"explanation": "...", "recommendations": ["<label>", ...]}. The explanation has '
    "three steps: the pattern in the history, what goes with it, and which candidate matches; it cites items by their "
    "ID and has at most 60 words. The recommendations hold every label once, best first."
)
HINT = "The shopper took {label}. Explain why, without saying that you were told, and rank it first."


class OpenAITeacher:
    """Requests an explanation and a ranking as JSON from an endpoint.

    Each response is written to the file `replies` before it is used. The key of a response is a hash of the request
    and the attempt. A later run with the same request uses the stored response and does not pay for it again. Under
    targeted sampling the prompt names the target, and the ranking has the target in first place.

    Args:
        catalog: the items, with their semantic IDs.
        settings: settings of the run. The teacher reads trace_endpoint, trace_endpoint_model, trace_concurrency,
            trace_temperature and the prompt settings.
        seed: not used; endpoints do not reproduce their samples.
        replies: file of stored responses, as JSON lines; None keeps them in memory.
        timeout: time limit of one request, in seconds.

    Attributes:
        usage: counts of this process. `replies`: responses used; `asked`: responses that the endpoint computed now;
            `prompt_tokens` and `completion_tokens`: tokens of all responses used.

    Raises:
        DependencyError: the `openai` package is missing.
        ConfigurationError: OPENAI_API_KEY is not set.
    """

    name = "openai_api"

    def __init__(
        self,
        *,
        catalog: Catalog,
        settings: Mapping[str, Any],
        seed: int = 0,
        replies: Path | None = None,
        timeout: float = 120.0,
    ) -> None:
        self.client, self.error = connect(settings["trace_endpoint"], timeout=timeout, where="trace_teacher")
        self.maker = PromptMaker.of(settings, catalog)
        self.model, self.temperature = settings["trace_endpoint_model"], settings["trace_temperature"]
        self.concurrency = settings["trace_concurrency"]
        self.stored = StoredResponses(replies)
        self.usage = {"replies": 0, "asked": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def argue(self, requests: Sequence[Request], *, targeted: bool, attempt: int) -> list[TeacherReply]:
        """Reply to each request, see `Teacher.argue`. A response without the JSON object gives an empty reasoning.

        Raises:
            GR2Error: the endpoint still fails after the retries of the client. Responses so far are kept.
        """
        try:
            # After a failure the pool starts no further request and waits for those under way. It keeps their
            # responses.
            with ThreadPoolExecutor(self.concurrency) as pool:
                return list(pool.map(lambda request: self._argue(request, targeted, attempt), requests))
        except (self.error, json.JSONDecodeError) as error:
            raise GR2Error(
                f"the endpoint failed: {type(error).__name__}: {error}",
                where=f"trace_endpoint {self.client.base_url}",
                why=f"{len(self.stored)} responses are stored and will not be requested again",
                do="check the endpoint, then repeat the command",
            ) from error

    def _argue(self, request: Request, targeted: bool, attempt: int) -> TeacherReply:
        prompt = self.maker.render(request)
        *before, user = prompt.messages
        text = f"{user['content']}\n{FORM}"
        if targeted:
            label = prompt.labels[self.maker.label_items(request, prompt).index(request.target)]
            text += "\n" + HINT.format(label=label)
        body = {"model": self.model, "messages": [*before, {**user, "content": text}], "temperature": self.temperature}
        key = hashlib.sha256(json.dumps([body, attempt]).encode()).hexdigest()
        response = self.stored.get(key)
        new = response is None
        if response is None:
            response = self._request(body, request)
            self.stored.add(key, response)
        with self.stored.lock:
            self.usage["replies"] += 1
            self.usage["asked"] += new
            for count in ("prompt_tokens", "completion_tokens"):
                self.usage[count] += response[count]
        reply = read_reply(response["text"], request, prompt)
        if targeted:
            return TeacherReply(reasoning=reply.reasoning, ranking=promote(reply.ranking, request.target))
        return reply

    def _request(self, body: Mapping[str, Any], request: Request) -> dict[str, Any]:
        """Send one request and return the text of the response and its token counts."""
        response = self.client.chat.completions.create(**body)
        if not response.choices:
            raise GR2Error(
                "the endpoint returned no choice",
                where=f"request {request.request_id}",
                why="the text of a response is in its first choice",
                do="check the endpoint, then repeat the command",
            )
        usage = response.usage
        return {
            "text": response.choices[0].message.content or "",
            "prompt_tokens": usage.prompt_tokens if usage else 0,
            "completion_tokens": usage.completion_tokens if usage else 0,
        }


class StoredResponses:
    """Responses of an endpoint by key, in memory and as lines of a file. Several threads may use it.

    Args:
        file: the file; None keeps the responses in memory. If a killed process left an incomplete last line, the line
            is removed.
    """

    def __init__(self, file: Path | None) -> None:
        self.file, self.lock = file, threading.Lock()
        self._by_key: dict[str, dict[str, Any]] = {}
        if file is None or not file.is_file():
            return
        content = file.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with open(file, "r+b") as handle:
                handle.truncate(end)
        self._by_key = {line.pop("key"): line for line in read_lines(file)}

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the response with this key, or None."""
        return self._by_key.get(key)

    def add(self, key: str, response: Mapping[str, Any]) -> None:
        """Store a response in memory and in the file."""
        with self.lock:
            self._by_key[key] = dict(response)
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(self.file, "a", encoding="utf-8") as handle:
                    handle.write(json.dumps({"key": key, **response}) + "\n")


def read_reply(text: str, request: Request, prompt: Prompt) -> TeacherReply:
    """Read the JSON object in a response.

    Returns:
        The explanation, with single spaces, and the ranking. Unknown and repeated labels are dropped. Candidates
        without a label follow in the order of the prior. The reasoning is empty if the response has another form.
    """
    match = re.search(r"\{.*\}", text, flags=re.DOTALL)
    try:
        values = json.loads(match.group()) if match else {}
    except json.JSONDecodeError:
        values = {}  # an empty reasoning follows, which the traces stage rejects and counts
    item_of = {label: request.items[position] for label, position in zip(prompt.labels, prompt.order, strict=True)}
    labels, explanation = values.get("recommendations"), values.get("explanation")
    if not isinstance(labels, list):
        labels = []
    if not isinstance(explanation, str) or not labels:
        explanation = ""
    ranking = complete([item_of[label] for label in map(str, labels) if label in item_of], request.by_prior)
    return TeacherReply(reasoning=" ".join(explanation.split()), ranking=ranking)
