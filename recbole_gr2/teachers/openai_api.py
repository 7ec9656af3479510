"""A language model behind an OpenAI-compatible endpoint as a teacher.

Such endpoints are vLLM, SGLang, Ollama, `transformers serve` and hosted models.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import threading
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import GR2Error
from recbole_gr2.llm.endpoint import Endpoint
from recbole_gr2.progress import Loop
from recbole_gr2.prompts import PromptMaker
from recbole_gr2.ranking import promote
from recbole_gr2.store import numbered_lines
from recbole_gr2.teachers.base import TeacherReply
from recbole_gr2.types import Prompt, Request

FORM = (
    'Answer with one JSON object: {"explanation": "...", "recommendations": ["<label>", ...]}. The explanation has '
    "three steps: the pattern in the history, what goes with it, and which candidate matches; it cites items by their "
    "ID and has at most 60 words. The recommendations hold every label once, best first."
)
HINT = "The shopper took {label}. Explain why, without saying that you were told, and rank it first."
THOUGHT = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)  # the first or the last mark of a thought
MARKED = re.compile(r"<\|\s*(\w+)\s*\|>")  # a label with its marks
BARE = re.compile(r"\W*(\w+)\W*")  # a label without them, or with others, such as "B." or "[b]"
COUNTS = ("prompt_tokens", "completion_tokens")
# Why a reply is rejected. The traces stage counts these reasons.
NO_OBJECT = "no JSON object with explanation and recommendations"
NO_LABEL = "a recommendation is no label"
NO_PERMUTATION = "the recommendations do not hold every label once"


class OpenAITeacher:
    """Requests an explanation and a ranking as JSON from an endpoint.

    Each response is written to the file `replies` before it is used. The key of a response is a hash of the request
    to an endpoint and of the attempt. A later run with the same request to the same endpoint uses the stored response
    and does not pay for it again. Under targeted sampling the prompt names the target, and the ranking has the target
    in first place.

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
        ConfigurationError: OPENAI_API_KEY is not set, or trace_endpoint is no address.
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
        self.endpoint = Endpoint(
            settings["trace_endpoint"], settings["trace_endpoint_model"], timeout=timeout, where="trace_endpoint"
        )
        self.maker = PromptMaker.of(settings, catalog)
        self.temperature, self.concurrency = settings["trace_temperature"], settings["trace_concurrency"]
        self.stored = StoredResponses(replies)
        self.usage = {"replies": 0, "asked": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def argue(self, requests: Sequence[Request], *, targeted: bool, attempt: int) -> list[TeacherReply]:
        """Reply to each request, see `Teacher.argue`. The reply to an unreadable response says what is wrong with it.

        Raises:
            GR2Error: the endpoint still fails after the retries of the client. Responses so far are kept.
        """
        # After a failure the pool starts no further request and waits for those under way. It keeps their responses.
        with Loop("replies, request", len(requests)) as loop, ThreadPoolExecutor(self.concurrency) as pool:
            replies = []
            for reply in pool.map(lambda request: self._argue(request, targeted, attempt), requests):
                replies.append(reply)
                loop.advance()
            return replies

    def _argue(self, request: Request, targeted: bool, attempt: int) -> TeacherReply:
        prompt = self.maker.render(request)
        *before, user = prompt.messages
        text = f"{user['content']}\n{FORM}"
        if targeted:
            label = prompt.labels[self.maker.label_items(request, prompt).index(request.target)]
            text += "\n" + HINT.format(label=label)
        body = {"messages": [*before, {**user, "content": text}], "temperature": self.temperature}
        of_endpoint = [self.endpoint.url, self.endpoint.model]
        key = hashlib.sha256(json.dumps([*of_endpoint, body, attempt]).encode()).hexdigest()
        response = self.stored.get(key)
        new = response is None
        if response is None:
            response = self._request(body)
            self.stored.add(key, response)
        with self.stored.lock:
            self.usage["replies"] += 1
            self.usage["asked"] += new
            for count in COUNTS:
                self.usage[count] += response[count]
        reply = read_reply(response["text"], request, prompt)
        if targeted and not reply.problem:
            return TeacherReply(reasoning=reply.reasoning, ranking=promote(reply.ranking, request.target))
        return reply

    def _request(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and return the text of the response and its token counts."""
        response = self.endpoint.chat(**body)
        message = response["choices"][0].get("message")
        # A server that separates the thoughts of a model gives no content if the thoughts reach the length limit.
        content = message.get("content") if isinstance(message, dict) else 0
        if not isinstance(content, str | None):
            raise self.endpoint.failure("the endpoint returned a choice without a message in the form of a text")
        usage = response.get("usage")
        counts = {name: usage.get(name) if isinstance(usage, dict) else 0 for name in COUNTS}
        return {"text": content or "", **{name: n if isinstance(n, int) else 0 for name, n in counts.items()}}


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
        if not file.read_bytes().endswith(b"\n"):
            with open(file, "r+b") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)  # another run may be writing this line
                handle.truncate(handle.read().rfind(b"\n") + 1)
        for number, line in numbered_lines(file):
            if not isinstance(line, dict) or not isinstance(line.get("text"), str) or not {"key", *COUNTS} <= set(line):
                raise GR2Error(
                    "a stored response has another form",
                    where=f"{file}:{number}",
                    why="the responses in this file replace requests to the endpoint",
                    do="remove the line; the response is then requested again",
                )
            self._by_key[line.pop("key")] = line

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
                    fcntl.flock(handle, fcntl.LOCK_EX)  # runs of the same data set share the file
                    handle.write(json.dumps({"key": key, **response}) + "\n")


def read_reply(text: str, request: Request, prompt: Prompt) -> TeacherReply:
    """Read the JSON object in a response.

    Thoughts in `<think>` blocks are not part of a reply. The object may be in a code block or within another object. Of
    several objects the last one counts. A label may lack its marks, be in lower case, stand beside a text, or be the
    `label` or `id` of an object.

    Returns:
        The explanation, with single spaces, and the ranking. A reply that does not rank every candidate once has the
        ranking () and a `problem`: a completed ranking would not be the one that the explanation supports.
    """
    values = _last_object(without_thoughts(text))
    if values is None:
        return TeacherReply(reasoning="", ranking=(), problem=NO_OBJECT)
    reasoning = " ".join(values["explanation"].split())
    item_of = {_name(label): request.items[place] for label, place in zip(prompt.labels, prompt.order, strict=True)}
    names = [_named(entry, item_of) for entry in values["recommendations"]]
    if None in names:
        return TeacherReply(reasoning=reasoning, ranking=(), problem=NO_LABEL)
    ranking = tuple(item_of[name] for name in names if name is not None)
    if len(ranking) != len(item_of) or len(set(ranking)) != len(item_of):
        return TeacherReply(reasoning=reasoning, ranking=(), problem=NO_PERMUTATION)
    return TeacherReply(reasoning=reasoning, ranking=ranking)


def without_thoughts(text: str) -> str:
    """Return a response without its thoughts, whose first or last mark may be missing.

    Some servers write the first mark into the prompt. The last one is missing if the thoughts reach the length limit.

    >>> without_thoughts("<think>a</think>b"), without_thoughts("a</think>b"), without_thoughts("b<think>a")
    ('b', 'b', 'b')
    """
    kept: list[str] = []
    start, inside = 0, False
    for mark in THOUGHT.finditer(text):
        if mark[1] and not inside:  # all text so far is a thought
            kept.clear()
        elif not mark[1] and not inside:
            kept.append(text[start : mark.start()])
        inside, start = not mark[1], mark.end()
    return "".join(kept if inside else [*kept, text[start:]])


def _last_object(text: str) -> dict[str, Any] | None:
    """Return the last JSON object in a text, at any depth, with an explanation and a list of recommendations."""
    decoder, found, start = json.JSONDecoder(), None, text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):  # no object begins here
            end = start + 1
        else:
            found = _with_keys(value) or found
        start = text.find("{", end)
    return found


def _with_keys(value: Any) -> dict[str, Any] | None:
    """Return a dictionary in a JSON value that has an explanation and a list of recommendations."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if isinstance(value.get("explanation"), str) and isinstance(value.get("recommendations"), list):
                return value
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return None


def _name(label: str) -> str:
    """Return the name of a label: "<|B|>" gives "b"."""
    return label.strip("<|>").lower()


def _named(entry: Any, names: Container[str]) -> str | None:
    """Return the name of the label that an entry of the recommendations means, or None if it is not clear."""
    if isinstance(entry, dict):
        entry = entry.get("label", entry.get("id"))
    if not isinstance(entry, str):
        return None
    marked = {name for name in map(str.lower, MARKED.findall(entry)) if name in names}
    if marked:
        return marked.pop() if len(marked) == 1 else None
    bare = BARE.fullmatch(entry)
    return bare[1].lower() if bare and bare[1].lower() in names else None
