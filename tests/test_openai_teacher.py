"""The endpoint teacher against HTTP servers on this machine: its form, its faults, and what a reply is read as."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from local_server import serve

from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.llm.backbone import load_backbone, save_backbone
from recbole_gr2.prompts import PromptMaker, load_template
from recbole_gr2.teachers.openai_api import FORM, OpenAITeacher, read_argument
from recbole_gr2.types import Candidate, Item, Request

pytest.importorskip("openai", reason="the extra recbole-gr2[teacher] is not installed")

ITEMS = tuple(Item(item_id=n, token=f"t{n}", title=f"Title {n}", categories="A > B", sid=(n, 0)) for n in range(1, 8))
MAKER = PromptMaker(template=load_template("rerank"), items=ITEMS, history=5, title_chars=40)


def listed(target: int = 6, history: tuple[int, ...] = (1, 2)) -> Request:
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
    """A server that fails as often as `faults` says, then answers with `reply`; `seen` holds what it was asked."""
    monkeypatch.setenv("OPENAI_API_KEY", "test")

    def answer(asked, fault):
        message = {"role": "assistant", "content": server.reply}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": asked["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
        }

    with serve(answer) as server:
        yield server


def teacher(endpoint, **given) -> OpenAITeacher:
    return OpenAITeacher(
        MAKER,
        **{"model": "big", "base_url": endpoint.url, "concurrency": 2, "temperature": 0.7, "timeout": 1.0, **given},
    )


def test_a_reply_becomes_an_argument(endpoint):
    endpoint.reply = 'Sure! {"explanation": "Nails go\\n with polish.", "recommendations": ["<|C|>", "<|A|>"]} Done.'
    (argument,) = teacher(endpoint).argue([listed()], targeted=False, attempt=0)
    assert argument.reasoning == "Nails go with polish."
    assert argument.ranking == (6, 4, 5, 7)
    assert endpoint.seen[0]["model"] == "big" and endpoint.seen[0]["temperature"] == 0.7


def test_only_a_targeted_prompt_names_the_target(endpoint):
    endpoint.reply = '{"explanation": "x", "recommendations": ["<|A|>"]}'
    blind = [teacher(endpoint).argue([listed(target)], targeted=False, attempt=0) for target in (4, 6)]
    assert endpoint.seen[0] == endpoint.seen[1] and blind[0] == blind[1]
    (told,) = teacher(endpoint).argue([listed(6)], targeted=True, attempt=0)
    assert "The shopper took <|C|>" in endpoint.seen[2]["messages"][-1]["content"]
    assert told.ranking == (6, 4, 5, 7)


REPLY = '{"explanation": "x", "recommendations": ["<|B|>"]}'
SEVERAL = [listed(history=(n,)) for n in range(1, 6)]  # five prompts


@pytest.mark.parametrize("fault", [408, 429, 500, "dropped", "slow"])
def test_what_passes_is_tried_again(endpoint, fault):
    endpoint.faults, endpoint.reply = [fault, fault], REPLY
    asking = teacher(endpoint)
    assert [a.ranking[0] for a in asking.argue(SEVERAL, targeted=False, attempt=0)] == [5] * 5
    assert len(endpoint.seen) == 7 and endpoint.answered == 5
    assert asking.usage == {"replies": 5, "asked": 5, "prompt_tokens": 500, "completion_tokens": 35}


@pytest.mark.parametrize("fault", [400, 401, "broken"])
def test_what_does_not_pass_ends_the_run_and_nothing_is_asked_twice(endpoint, tmp_path, fault):
    endpoint.faults, endpoint.reply = [None, None, fault], REPLY
    file = tmp_path / "gr2" / "replies.jsonl"
    with pytest.raises(GR2Error, match="the endpoint failed") as stopped:
        teacher(endpoint, replies=file, concurrency=1).argue(SEVERAL, targeted=False, attempt=0)
    paid = endpoint.answered
    assert f"{paid} replies are kept" in str(stopped.value) and 2 <= paid <= 3  # at most one under way is finished
    assert len(endpoint.seen) == paid + 1
    again = teacher(endpoint, replies=file)
    assert len(again.argue(SEVERAL, targeted=False, attempt=0)) == 5
    assert endpoint.answered == 5 and again.usage["asked"] == 5 - paid and again.usage["prompt_tokens"] == 500


def test_replies_outlive_a_killed_process(endpoint, tmp_path):
    endpoint.reply, file = REPLY, tmp_path / "replies.jsonl"
    first = teacher(endpoint, replies=file).argue(SEVERAL, targeted=False, attempt=0)
    whole = file.read_text()
    file.write_text(whole[:-20])  # the last line was being written
    endpoint.reply = '{"explanation": "y", "recommendations": ["<|D|>"]}'
    second = teacher(endpoint, replies=file).argue(SEVERAL, targeted=False, attempt=0)
    assert len(endpoint.seen) == 6 and sum(a == b for a, b in zip(first, second, strict=True)) == 4
    assert len(file.read_text().splitlines()) == 5
    other = [{"attempt": 1}, {"targeted": True}, {"temperature": 0.1}, {"model": "other"}]
    for number, change in enumerate(other, start=1):  # another question
        asked = {"targeted": False, "attempt": 0, **{k: v for k, v in change.items() if k in ("attempt", "targeted")}}
        given = {k: v for k, v in change.items() if k not in asked}
        teacher(endpoint, replies=file, **given).argue(SEVERAL[:1], **asked)
        assert len(endpoint.seen) == 6 + number


def test_without_a_key(endpoint, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        teacher(endpoint)


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
def test_what_is_no_answer_has_no_reasoning_and_keeps_the_base_order_or_its_labels(text):
    argument = read_argument(text, listed(), MAKER.render(listed()))
    assert argument.reasoning == ""
    assert sorted(argument.ranking) == [4, 5, 6, 7]


def test_foreign_and_repeated_labels_are_dropped():
    text = '{"explanation": "x", "recommendations": ["<|Z|>", "<|D|>", "<|D|>", 7]}'
    assert read_argument(text, listed(), MAKER.render(listed())).ranking == (7, 4, 5, 6)


@pytest.fixture(scope="module", params=["random", "smollm2-135m-instruct"])
def served(request, tmp_path_factory):
    """(URL, model) of `transformers serve` with a tiny untrained model, and with SmolLM2."""
    pytest.importorskip("fastapi", reason="transformers serve needs it")
    folder = tmp_path_factory.mktemp("served")
    tiny = (
        {
            "corpus": [*(message["content"] for message in MAKER.render(listed()).messages), FORM],
            "random_config": {"vocab_size": 400},
        }
        if request.param == "random"
        else {}
    )
    try:
        model, tokenizer = load_backbone(request.param, **tiny)
    except MissingFileError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")
    save_backbone(model, tokenizer, folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [
                Path(sys.executable).with_name("transformers"),
                "serve",
                folder / "model",
                "--port",
                str(port),
                "--device",
                "cpu",
            ],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(folder / "model")
    finally:
        server.terminate()
        server.wait()


def test_a_server_of_transformers(served, tmp_path, monkeypatch):
    """Not a server of ours: what a model says that cannot answer in our form is no answer, and is paid once."""
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    url, model = served
    asking = OpenAITeacher(
        MAKER,
        model=model,
        base_url=url,
        concurrency=1,
        temperature=1.0,
        timeout=600.0,
        replies=tmp_path / "replies.jsonl",
    )
    (argument,) = asking.argue(SEVERAL[:1], targeted=False, attempt=0)
    assert (argument.reasoning, argument.ranking) == ("", SEVERAL[0].items)
    assert asking.usage["asked"] == 1 and asking.usage["prompt_tokens"] > 100 and asking.usage["completion_tokens"] > 0
    (line,) = (json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines())
    assert set(line) == {"key", "text", "prompt_tokens", "completion_tokens"}
    again = OpenAITeacher(
        MAKER,
        model=model,
        base_url="http://127.0.0.1:9/v1",
        concurrency=1,
        temperature=1.0,
        replies=tmp_path / "replies.jsonl",
    )
    assert again.argue(SEVERAL[:1], targeted=False, attempt=0) == [argument] and again.usage["asked"] == 0
