"""A teacher behind any OpenAI-compatible endpoint (vLLM, SGLang, Ollama, `transformers serve`, a hosted model)."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recbole_gr2.errors import GR2Error
from recbole_gr2.llm.endpoint import connect
from recbole_gr2.prompts import PromptMaker
from recbole_gr2.ranking import complete, promote
from recbole_gr2.store import read_lines
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

    Every reply is on disk before it is used, by a hash of what was asked: a run that was stopped, or one with other
    settings, asks nothing twice. The key is read from OPENAI_API_KEY by the client, which also retries time-outs, lost
    connections, rate limits and server errors, each time after a longer wait, or that which the server asks for.

    Args:
        model: the endpoint's name of the model.
        base_url: the endpoint, e.g. `http://localhost:8000/v1`; None for the client's default.
        concurrency: requests under way at once.
        temperature: of every try.
        replies: the file of replies; None keeps them in memory.
        timeout: seconds until a request is tried again.

    Raises:
        DependencyError: the `openai` package is missing.
        ConfigurationError: there is no key.
    """

    name = "openai_api"

    def __init__(
        self,
        maker: PromptMaker,
        *,
        model: str,
        base_url: str | None,
        concurrency: int,
        temperature: float,
        replies: Path | None = None,
        timeout: float = 120.0,
    ) -> None:
        self.client, self.error = connect(base_url, timeout=timeout, where="trace_teacher")
        self.maker, self.model, self.concurrency, self.temperature = maker, model, concurrency, temperature
        self.replies = Replies(replies)
        self.usage = {"replies": 0, "asked": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def argue(self, requests: Sequence[Request], *, targeted: bool, attempt: int) -> list[Argument]:
        """See `Teacher`. An answer that is no such JSON gives an empty argument, which is rejected and counted.

        Raises:
            GR2Error: the endpoint still fails after the client's retries. Replies so far are kept.
        """
        try:
            # Behind a failure `map` asks for nothing more, and the pool waits for what is under way: it is kept, too.
            with ThreadPoolExecutor(self.concurrency) as pool:
                return list(pool.map(lambda request: self._ask(request, targeted, attempt), requests))
        except (self.error, json.JSONDecodeError) as error:
            raise GR2Error(
                f"the endpoint failed: {type(error).__name__}: {error}",
                where=f"trace_endpoint {self.client.base_url}",
                why=f"{len(self.replies)} replies are kept and will not be asked for again",
                do="see to the endpoint, then repeat the command",
            ) from error

    def _ask(self, request: Request, targeted: bool, attempt: int) -> Argument:
        prompt = self.maker.render(request)
        *before, user = prompt.messages
        text = f"{user['content']}\n{FORM}"
        if targeted:
            text += "\n" + HINT.format(label=prompt.labels[prompt.order.index(request.target_rank - 1)])
        asked = {"model": self.model, "messages": [*before, {**user, "content": text}], "temperature": self.temperature}
        key = hashlib.sha256(json.dumps([asked, attempt]).encode()).hexdigest()
        reply, fresh = self.replies.get(key), 0
        if reply is None:
            reply, fresh = self._fetch(asked, request), 1
            self.replies.add(key, reply)
        with self.replies.lock:
            self.usage["replies"] += 1
            self.usage["asked"] += fresh
            for kind in ("prompt_tokens", "completion_tokens"):
                self.usage[kind] += reply[kind]
        argument = read_argument(reply["text"], request, prompt)
        if targeted:
            return Argument(reasoning=argument.reasoning, ranking=promote(argument.ranking, request.target))
        return argument

    def _fetch(self, asked: Mapping[str, Any], request: Request) -> dict:
        said = self.client.chat.completions.create(**asked)
        if not said.choices:
            raise GR2Error("the endpoint answered without a choice", where=f"request {request.request_id}")
        usage = said.usage
        return {
            "text": said.choices[0].message.content or "",
            "prompt_tokens": usage.prompt_tokens if usage else 0,
            "completion_tokens": usage.completion_tokens if usage else 0,
        }


class Replies:
    """An endpoint's replies by key, in memory and as lines of a file. Several threads may add."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.known, self.lock = file, {}, threading.Lock()
        if file is None or not file.is_file():
            return
        whole = file.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):  # a line that was being written when the process was killed
            with open(file, "r+b") as handle:
                handle.truncate(end)
        self.known = {line.pop("key"): line for line in read_lines(file)}

    def __len__(self) -> int:
        return len(self.known)

    def get(self, key: str) -> dict | None:
        """The reply, or None."""
        return self.known.get(key)

    def add(self, key: str, reply: Mapping[str, Any]) -> None:
        """Keep a reply."""
        with self.lock:
            self.known[key] = dict(reply)
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(self.file, "a", encoding="utf-8") as handle:
                    handle.write(json.dumps({"key": key, **reply}) + "\n")


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
