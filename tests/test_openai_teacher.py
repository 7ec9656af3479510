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
from hypothesis import given, settings
from hypothesis import strategies as st
from local_server import serve

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.prompts import PromptMaker
from recbole_gr2.teachers import TeacherReply, ask
from recbole_gr2.teachers.openai_api import (
    FORM,
    NO_LABEL,
    NO_OBJECT,
    NO_PERMUTATION,
    OpenAITeacher,
    StoredResponses,
    read_reply,
)
from recbole_gr2.types import Candidate, Item, Request

pytestmark = pytest.mark.slow  # Together they need many seconds.

pytest.importorskip("openai", reason="the extra recbole-gr2[teacher] is not installed")

CATALOG = Catalog(
    Item(item_id=n, token=f"t{n}", title=f"Title {n}", categories="A > B", sid=(n, 0)) for n in range(1, 8)
)
SETTINGS = {
    "trace_endpoint_model": "big",
    "trace_concurrency": 2,
    "trace_temperature": 0.7,
    "prompt_template": "rerank",
    "prompt_items": "text",
    "prompt_history": 5,
    "prompt_title_chars": 40,
    "prompt_shuffle": False,
}
MAKER = PromptMaker.of(SETTINGS, CATALOG)


LABELS = ["<|A|>", "<|B|>", "<|C|>", "<|D|>"]  # of the items 4, 5, 6, 7
CADB = ["<|C|>", "<|A|>", "<|D|>", "<|B|>"]
REPLY = '{"explanation": "x", "recommendations": ["<|B|>", "<|A|>", "<|C|>", "<|D|>"]}'


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
    endpoint.reply = "Sure! " + reply_text(CADB, "Nails go\n with polish.") + " Done."
    (reply,) = build(endpoint).argue([request_of()], targeted=False, attempt=0)
    assert reply == TeacherReply(reasoning="Nails go with polish.", ranking=(6, 4, 7, 5))
    assert endpoint.seen[0]["model"] == "big" and endpoint.seen[0]["temperature"] == 0.7


def test_only_a_targeted_prompt_names_the_target(endpoint):
    endpoint.reply = REPLY
    replies = [build(endpoint).argue([request_of(target)], targeted=False, attempt=0) for target in (4, 6)]
    assert endpoint.seen[0] == endpoint.seen[1] and replies[0] == replies[1]
    (targeted,) = build(endpoint).argue([request_of(6)], targeted=True, attempt=0)
    assert "The shopper took <|C|>" in endpoint.seen[2]["messages"][-1]["content"]
    assert targeted.ranking == (6, 5, 4, 7)


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
    with pytest.raises(GR2Error, match="the endpoint failed|no JSON object") as stopped:
        build(endpoint, replies=file, trace_concurrency=1).argue(SEVERAL, targeted=False, attempt=0)
    paid = endpoint.answered
    assert f"trace_endpoint: {endpoint.url}/, model big" in str(stopped.value)
    assert len(file.read_text().splitlines()) == paid and 2 <= paid <= 3  # at most one was under way
    assert len(endpoint.seen) == paid + 1
    again = build(endpoint, replies=file)
    assert len(again.argue(SEVERAL, targeted=False, attempt=0)) == 5
    assert endpoint.answered == 5 and again.usage["asked"] == 5 - paid and again.usage["prompt_tokens"] == 500


def test_responses_survive_a_killed_process(endpoint, tmp_path):
    endpoint.reply, file = REPLY, tmp_path / "replies.jsonl"
    first = build(endpoint, replies=file).argue(SEVERAL, targeted=False, attempt=0)
    whole = file.read_text()
    file.write_text(whole[:-20])  # the last line is incomplete
    endpoint.reply = REPLY.replace("x", "y")
    second = build(endpoint, replies=file).argue(SEVERAL, targeted=False, attempt=0)
    assert len(endpoint.seen) == 6 and sum(a == b for a, b in zip(first, second, strict=True)) == 4
    assert len(file.read_text().splitlines()) == 5
    changes = [
        ({"attempt": 1}, {}),
        ({"targeted": True}, {}),
        ({}, {"trace_temperature": 0.1}),
        ({}, {"trace_endpoint_model": "other"}),
    ]
    for number, (options, changed) in enumerate(changes, start=1):  # each one is another request
        teacher = build(endpoint, replies=file, **changed)
        teacher.argue(SEVERAL[:1], **{"targeted": False, "attempt": 0, **options})
        assert len(endpoint.seen) == 6 + number


def test_without_a_key(endpoint, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        build(endpoint)


def read(text: str) -> TeacherReply:
    return read_reply(text, request_of(), MAKER.render(request_of()))


def reply_text(recommendations: object, explanation: object = "x") -> str:
    return json.dumps({"explanation": explanation, "recommendations": recommendations})


@pytest.mark.parametrize(
    "named",
    [
        CADB,
        ["C", "A", "D", "B"],
        ["c", "a", "d", "b"],
        ["<|c|>", "<|a|>", "<|d|>", "<|b|>"],
        [" C ", "A.", "(D)", "**B**"],
        [{"label": "<|C|>"}, {"id": "A", "reason": "<|B|> is like it"}, {"label": "d", "rank": 3}, {"label": " B"}],
        ["<|C|> Title 6", "<|sid_begin|><s_a_4><s_b_0><|sid_end|><|A|>", "<| D |>", "B"],
    ],
)
def test_forms_of_labels(named):
    assert read(reply_text(named)) == TeacherReply(reasoning="x", ranking=(6, 4, 7, 5))


GOOD = reply_text(CADB)


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{GOOD}\n```",
        f"{{not json}} {GOOD} {{}} and {{more: text}}",
        json.dumps({"answer": [{"result": json.loads(GOOD)}]}),
        f"{reply_text(LABELS, 'a draft')}\n{GOOD}",  # the last one counts
        f"<think>Let me see.</think>{GOOD}",
        f'<think>I answer {{"explanation": ...}}</think>{GOOD}',
        f"<think>{reply_text(LABELS, 'a draft')}</think>{GOOD}",
        f"<think>one</think>\n<think>{{two}}</think>\n{GOOD}",
        f"<think>a <think>b</think> {{c</think> {GOOD}",
        f"{reply_text(LABELS, 'a draft')}</think>{GOOD}",  # the server wrote the first mark into the prompt
        f"{GOOD}<think>{reply_text(LABELS, 'another')}",
        f"<THINKING>{reply_text(LABELS, 'a draft')}</THINKING>{GOOD}",
    ],
)
def test_texts_around_the_object(text):
    assert read(text) == TeacherReply(reasoning="x", ranking=(6, 4, 7, 5))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", NO_OBJECT),
        ("no json", NO_OBJECT),
        ('{"explanation": "x"}', NO_OBJECT),
        (reply_text(CADB, 3), NO_OBJECT),
        (reply_text(CADB, None), NO_OBJECT),
        (json.dumps({"recommendations": CADB}), NO_OBJECT),
        (reply_text("A"), NO_OBJECT),
        (reply_text({"1": "A"}), NO_OBJECT),
        ("{broken}", NO_OBJECT),
        (f"<think>{GOOD}", NO_OBJECT),  # the thoughts reached the length limit
        (GOOD[:-4], NO_OBJECT),
        ("[" * 100_000, NO_OBJECT),
        ('{"a":' * 3_000, NO_OBJECT),
        (reply_text(["<|Z|>", *CADB]), NO_LABEL),
        (reply_text([3, 1, 4, 2]), NO_LABEL),
        (reply_text(["Title 6", "Title 4", "Title 7", "Title 5"]), NO_LABEL),
        (reply_text(["<|C|> or <|A|>", *CADB]), NO_LABEL),
        (reply_text([None, True, [], {}]), NO_LABEL),
        (reply_text([]), NO_PERMUTATION),
        (reply_text(CADB[:1]), NO_PERMUTATION),
        (reply_text(CADB[:3]), NO_PERMUTATION),
        (reply_text([*CADB[:3], "C"]), NO_PERMUTATION),
        (reply_text([*CADB, "C"]), NO_PERMUTATION),
    ],
)
def test_a_reply_that_cannot_be_read_is_rejected_with_a_reason(text, problem):
    reply = read(text)
    assert (reply.ranking, reply.problem) == ((), problem)


def test_a_rejected_reply_is_not_repaired_under_targeted_sampling(endpoint):
    endpoint.reply = reply_text(["<|C|>"])
    (reply,) = build(endpoint).argue([request_of()], targeted=True, attempt=0)
    assert reply == TeacherReply(reasoning="x", ranking=(), problem=NO_PERMUTATION)


MARKS = ["<think>", "</think>", "{", "}", "[", "]", '"', ",", ":", "\\", "\\ud800", "<|A|>", "b", "<|Z|>", " "]
KEYS = [
    '"explanation"',
    '"recommendations"',
    '"label"',
    '"x"',
    "1",
    "null",
    GOOD,
    GOOD[:-4],
    "```json",
    "\ud800",
    "\x00",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([*LABELS, "a", "B", "c "]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["explanation", "recommendations", "label", "id", "x"]), inner)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(
    st.one_of(
        st.text(),
        st.lists(st.sampled_from([*MARKS, *KEYS]), max_size=30).map("".join),
        JSON.map(json.dumps),
        st.lists(JSON, max_size=6).map(reply_text),
        st.permutations(LABELS).map(reply_text),
    ),
    st.sampled_from(["", "<think>{", "<think>a</think>", "Here: ", "```json\n"]),
)
def test_any_reply_is_a_permutation_or_rejected(text, before):
    reply = read(before + text)
    (checked,) = ask(
        SimpleNamespace(name="t", argue=lambda *_, **__: [reply]), [request_of()], targeted=False, attempt=0
    )
    checked.reasoning.encode()
    assert sorted(reply.ranking) == [4, 5, 6, 7] if not reply.problem else reply.ranking == ()


# --- wrong endpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>please log in</html>", "no JSON object: <html>please log in</html>"),
        ("", "no JSON object: "),
        ('"text"', 'no JSON object: "text"'),
        ("[]", "no JSON object: []"),
        ("null", "no JSON object: null"),
        ("data: {}", "no JSON object: data: {}"),
        (b"\xff\xfe", "no JSON object"),
        ('{"error": {"message": "no such model"}}', 'no choice: {"error": {"message": "no such model"}}'),
        ('{"choices": []}', "no choice"),
        ('{"choices": null}', "no choice"),
        ('{"choices": ["text"]}', "no choice"),
        ('{"choices": [{}]}', "a choice without a message"),
        ('{"choices": [{"message": "text"}]}', "a choice without a message"),
        ('{"choices": [{"message": {"content": ["text"]}}]}', "a choice without a message"),
    ],
)
@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_a_response_of_another_service_is_an_error_that_names_the_endpoint(endpoint, tmp_path, body, message, kind):
    endpoint.raw = (200, kind, body if isinstance(body, bytes) else body.encode())
    with pytest.raises(GR2Error) as stopped:
        build(endpoint, replies=tmp_path / "replies.jsonl").argue([request_of()], targeted=False, attempt=0)
    assert message in stopped.value.what and f"{endpoint.url}/, model big" in stopped.value.where
    assert not (tmp_path / "replies.jsonl").exists()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_an_error_page_is_an_error_that_names_the_endpoint(endpoint, status):
    endpoint.raw = (status, "text/html", b"<html>" + b"long " * 1000 + b"</html>")
    with pytest.raises(GR2Error) as stopped:
        build(endpoint).argue([request_of()], targeted=False, attempt=0)
    assert "the endpoint failed" in stopped.value.what and len(str(stopped.value)) < 700
    assert f"{endpoint.url}/, model big" in stopped.value.where


def test_an_unreachable_endpoint_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0.0)
    with pytest.raises(GR2Error, match=r"(?s)the endpoint failed.*http://127.0.0.1:9/v1/, model big"):
        build(SimpleNamespace(url="http://127.0.0.1:9/v1")).argue([request_of()], targeted=False, attempt=0)


@pytest.mark.parametrize("message", [{"content": None}, {}, {"content": "", "reasoning_content": "thoughts"}])
def test_a_message_without_content_is_a_rejected_reply(endpoint, message):
    body = {"choices": [{"message": {"role": "assistant", **message}}], "usage": {"prompt_tokens": None}}
    endpoint.raw = (200, "application/json", json.dumps(body).encode())
    teacher = build(endpoint)
    (reply,) = teacher.argue([request_of()], targeted=False, attempt=0)
    assert reply.problem == NO_OBJECT
    assert teacher.usage == {"replies": 1, "asked": 1, "prompt_tokens": 0, "completion_tokens": 0}


def test_thoughts_in_a_field_of_their_own_are_not_read(endpoint):
    message = {"content": GOOD, "reasoning_content": reply_text(LABELS, "thoughts")}
    endpoint.raw = (200, "application/json", json.dumps({"choices": [{"message": message}]}).encode())
    (reply,) = build(endpoint).argue([request_of()], targeted=False, attempt=0)
    assert reply == TeacherReply(reasoning="x", ranking=(6, 4, 7, 5))


def test_responses_of_one_endpoint_are_not_those_of_another(endpoint, tmp_path):
    file = tmp_path / "replies.jsonl"
    endpoint.reply = REPLY
    build(endpoint, replies=file).argue([request_of()], targeted=False, attempt=0)
    other = SimpleNamespace(url=endpoint.url.replace("127.0.0.1", "localhost"))
    endpoint.reply = GOOD
    (reply,) = build(other, replies=file).argue([request_of()], targeted=False, attempt=0)
    assert reply.ranking == (6, 4, 7, 5) and len(endpoint.seen) == 2
    build(SimpleNamespace(url=f"{endpoint.url}/"), replies=file).argue([request_of()], targeted=False, attempt=0)
    assert len(endpoint.seen) == 2  # the same address


@pytest.mark.parametrize("line", ['{"text": "x"}', "[]", '{"key": "k", "text": 3}', '{"key": "k", "text": "x"}'])
def test_a_stored_response_of_another_form_is_an_error(tmp_path, line):
    (tmp_path / "replies.jsonl").write_text(f"{line}\n")
    with pytest.raises(GR2Error, match="replies.jsonl:1"):
        StoredResponses(tmp_path / "replies.jsonl")


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
    assert reply == TeacherReply(reasoning="", ranking=(), problem=NO_OBJECT)
    usage = teacher.usage
    assert usage["asked"] == 1 and usage["prompt_tokens"] > 100 and usage["completion_tokens"] > 0
    (line,) = (json.loads(line) for line in file.read_text().splitlines())
    assert set(line) == {"key", "text", "prompt_tokens", "completion_tokens"}
    again = build(served, replies=file, **settings)
    assert again.argue(SEVERAL[:1], targeted=False, attempt=0) == [reply] and again.usage["asked"] == 0
