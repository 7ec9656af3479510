"""The endpoint teacher against local HTTP servers: requests, faults, stored responses and the form of a response."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from local_server import serve

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.prompts import PromptMaker
from recbole_gr2.teachers.openai_api import FORM, OpenAITeacher, read_reply
from recbole_gr2.types import Candidate, Item, Request

pytest.importorskip("openai", reason="the extra recbole-gr2[teacher] is not installed")

CATALOG = Catalog(
    Item(item_id=n, token=f"t{n}", title=f"Title {n}", categories="A > B", sid=(n, 0)) for n in range(1, 8)
)
SETTINGS = {
    "trace_endpoint_model": "big",
    "trace_concurrency": 2,
    "trace_temperature": 0.7,
    "prompt_template": "rerank",
    "prompt_history": 5,
    "prompt_title_chars": 40,
    "prompt_shuffle": False,
}
MAKER = PromptMaker.of(SETTINGS, CATALOG)


def request_of(target: int = 6, history: tuple[int, ...] = (1, 2)) -> Request:
    return Request(
        request_id="train/u",
        user_token="u",
        split="train",
        history=history,
        target=target,
        provider="test",
        candidates=tuple(Candidate(item_id=i, score=-i, rank=r) for r, i in enumerate((4, 5, 6, 7), start=1)),
    )


@pytest.fixture
def endpoint(monkeypatch):
    """A stub server of chat completions that responds with `reply`, see `local_server.serve`."""
    monkeypatch.setenv("OPENAI_API_KEY", "test")

    def answer(body, fault):
        message = {"role": "assistant", "content": server.reply}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
        }

    with serve(answer) as server:
        yield server


def build(endpoint, replies=None, timeout=1.0, **changes) -> OpenAITeacher:
    settings = {**SETTINGS, "trace_endpoint": endpoint.url, **changes}
    return OpenAITeacher(catalog=CATALOG, settings=settings, seed=1, replies=replies, timeout=timeout)


def test_a_response_becomes_a_reply(endpoint):
    endpoint.reply = 'Sure! {"explanation": "Nails go\\n with polish.", "recommendations": ["<|C|>", "<|A|>"]} Done.'
    (reply,) = build(endpoint).argue([request_of()], targeted=False, attempt=0)
    assert reply.reasoning == "Nails go with polish."
    assert reply.ranking == (6, 4, 5, 7)
    assert endpoint.seen[0]["model"] == "big" and endpoint.seen[0]["temperature"] == 0.7


def test_only_a_targeted_prompt_names_the_target(endpoint):
    endpoint.reply = '{"explanation": "x", "recommendations": ["<|A|>"]}'
    replies = [build(endpoint).argue([request_of(target)], targeted=False, attempt=0) for target in (4, 6)]
    assert endpoint.seen[0] == endpoint.seen[1] and replies[0] == replies[1]
    (targeted,) = build(endpoint).argue([request_of(6)], targeted=True, attempt=0)
    assert "The shopper took <|C|>" in endpoint.seen[2]["messages"][-1]["content"]
    assert targeted.ranking == (6, 4, 5, 7)


REPLY = '{"explanation": "x", "recommendations": ["<|B|>"]}'
SEVERAL = [request_of(history=(n,)) for n in range(1, 6)]  # five prompts


@pytest.mark.parametrize("fault", [408, 429, 500, "dropped", "slow"])
def test_a_temporary_fault_is_retried(endpoint, fault):
    endpoint.faults, endpoint.reply = [fault, fault], REPLY
    teacher = build(endpoint)
    assert [reply.ranking[0] for reply in teacher.argue(SEVERAL, targeted=False, attempt=0)] == [5] * 5
    assert len(endpoint.seen) == 7 and endpoint.answered == 5
    assert teacher.usage == {"replies": 5, "asked": 5, "prompt_tokens": 500, "completion_tokens": 35}


@pytest.mark.parametrize("fault", [400, 401, "broken"])
def test_a_permanent_fault_ends_the_run_and_stored_responses_are_used_later(endpoint, tmp_path, fault):
    endpoint.faults, endpoint.reply = [None, None, fault], REPLY
    file = tmp_path / "gr2" / "replies.jsonl"
    with pytest.raises(GR2Error, match="the endpoint failed") as stopped:
        build(endpoint, replies=file, trace_concurrency=1).argue(SEVERAL, targeted=False, attempt=0)
    paid = endpoint.answered
    assert f"{paid} responses are stored" in str(stopped.value) and 2 <= paid <= 3  # at most one was under way
    assert len(endpoint.seen) == paid + 1
    again = build(endpoint, replies=file)
    assert len(again.argue(SEVERAL, targeted=False, attempt=0)) == 5
    assert endpoint.answered == 5 and again.usage["asked"] == 5 - paid and again.usage["prompt_tokens"] == 500


def test_responses_survive_a_killed_process(endpoint, tmp_path):
    endpoint.reply, file = REPLY, tmp_path / "replies.jsonl"
    first = build(endpoint, replies=file).argue(SEVERAL, targeted=False, attempt=0)
    whole = file.read_text()
    file.write_text(whole[:-20])  # the last line is incomplete
    endpoint.reply = '{"explanation": "y", "recommendations": ["<|D|>"]}'
    second = build(endpoint, replies=file).argue(SEVERAL, targeted=False, attempt=0)
    assert len(endpoint.seen) == 6 and sum(a == b for a, b in zip(first, second, strict=True)) == 4
    assert len(file.read_text().splitlines()) == 5
    changes = [
        ({"attempt": 1}, {}),
        ({"targeted": True}, {}),
        ({}, {"trace_temperature": 0.1}),
        ({}, {"trace_endpoint_model": "other"}),
    ]
    for number, (asked, settings) in enumerate(changes, start=1):  # each one is another request
        teacher = build(endpoint, replies=file, **settings)
        teacher.argue(SEVERAL[:1], **{"targeted": False, "attempt": 0, **asked})
        assert len(endpoint.seen) == 6 + number


def test_without_a_key(endpoint, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        build(endpoint)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        '{"explanation": "x"}',
        '{"explanation": 3, "recommendations": ["<|A|>"]}',
        '{"recommendations": ["<|A|>"]}',
        '{"explanation": "x", "recommendations": "A"}',
        "{broken}",
    ],
)
def test_a_response_of_another_form_has_an_empty_reasoning(text):
    reply = read_reply(text, request_of(), MAKER.render(request_of()))
    assert reply.reasoning == ""
    assert sorted(reply.ranking) == [4, 5, 6, 7]


def test_unknown_and_repeated_labels_are_dropped():
    text = '{"explanation": "x", "recommendations": ["<|Z|>", "<|D|>", "<|D|>", 7]}'
    assert read_reply(text, request_of(), MAKER.render(request_of())).ranking == (7, 4, 5, 6)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """URL and model name of `transformers serve` with a tiny untrained model."""
    pytest.importorskip("fastapi", reason="transformers serve needs it")
    from recbole_gr2.llm.model import load_language_model, save_language_model

    folder = tmp_path_factory.mktemp("served")
    corpus = [*(message["content"] for message in MAKER.render(request_of()).messages), FORM]
    model, tokenizer = load_language_model("random", corpus=corpus, random_config={"vocab_size": 400})
    save_language_model(model, tokenizer, folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [Path(sys.executable).with_name("transformers"), "serve", folder / "model", "--port", port]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [*command, "--device", "cpu"], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}/v1", model=str(folder / "model"))
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_transformers_serve(served, tmp_path, monkeypatch):
    """A server that is not part of the tests. An untrained model gives a response of another form, which is stored."""
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    file, settings = tmp_path / "replies.jsonl", {"trace_endpoint_model": served.model, "trace_temperature": 1.0}
    teacher = build(served, replies=file, timeout=600.0, **settings)
    (reply,) = teacher.argue(SEVERAL[:1], targeted=False, attempt=0)
    assert (reply.reasoning, reply.ranking) == ("", SEVERAL[0].items)
    usage = teacher.usage
    assert usage["asked"] == 1 and usage["prompt_tokens"] > 100 and usage["completion_tokens"] > 0
    (line,) = (json.loads(line) for line in file.read_text().splitlines())
    assert set(line) == {"key", "text", "prompt_tokens", "completion_tokens"}
    again = build(SimpleNamespace(url="http://127.0.0.1:9/v1"), replies=file, **settings)  # nothing listens there
    assert again.argue(SEVERAL[:1], targeted=False, attempt=0) == [reply] and again.usage["asked"] == 0
