"""The endpoint teacher against a real HTTP server on this machine: its form, its faults, and what a reply is read as."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from recbole_gr2.prompts import PromptMaker, load_template
from recbole_gr2.teachers.openai_api import OpenAITeacher, read_argument
from recbole_gr2.types import Candidate, Item, Request

pytest.importorskip("openai", reason="the extra recbole-gr2[teacher] is not installed")

ITEMS = tuple(Item(item_id=n, token=f"t{n}", title=f"Title {n}", categories="A > B", sid=(n, 0)) for n in range(1, 8))
MAKER = PromptMaker(template=load_template("rerank"), items=ITEMS, history=5, title_chars=40)


def request(target: int = 6) -> Request:
    return Request(
        request_id="train/u", user_token="u", split="train", history=(1, 2), target=target, provider="test",
        candidates=tuple(Candidate(item_id=i, score=-i, rank=r) for r, i in enumerate((4, 5, 6, 7), start=1)),
    )  # fmt: skip


@pytest.fixture
def endpoint(monkeypatch):
    """A server that fails as often as `faults` says, then answers with `reply`; `seen` holds what it was asked."""
    monkeypatch.setenv("OPENAI_API_KEY", "test")

    class Handler(BaseHTTPRequestHandler):
        faults, reply, seen = [], "", []

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Handler.seen.append(asked)
            status = Handler.faults.pop(0) if Handler.faults else 200
            message = {"role": "assistant", "content": Handler.reply}
            body = json.dumps({
                "id": "1", "object": "chat.completion", "created": 1, "model": asked["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            }).encode()  # fmt: skip
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield Handler
    server.shutdown()
    server.server_close()


def teacher(endpoint) -> OpenAITeacher:
    return OpenAITeacher(MAKER, model="big", base_url=endpoint.url, concurrency=2, temperature=0.7)


def test_a_reply_becomes_an_argument(endpoint):
    endpoint.reply = 'Sure! {"explanation": "Nails go\\n with polish.", "recommendations": ["<|C|>", "<|A|>"]} Done.'
    (argument,) = teacher(endpoint).argue([request()], targeted=False, attempt=0)
    assert argument.reasoning == "Nails go with polish."
    assert argument.ranking == (6, 4, 5, 7)
    assert endpoint.seen[0]["model"] == "big" and endpoint.seen[0]["temperature"] == 0.7


def test_only_a_targeted_prompt_names_the_target(endpoint):
    endpoint.reply = '{"explanation": "x", "recommendations": ["<|A|>"]}'
    blind = [teacher(endpoint).argue([request(target)], targeted=False, attempt=0) for target in (4, 6)]
    assert endpoint.seen[0] == endpoint.seen[1] and blind[0] == blind[1]
    (told,) = teacher(endpoint).argue([request(6)], targeted=True, attempt=0)
    assert "The shopper took <|C|>" in endpoint.seen[2]["messages"][-1]["content"]
    assert told.ranking == (6, 4, 5, 7)


def test_rate_limits_and_server_errors_are_retried(endpoint):
    endpoint.faults, endpoint.reply = [429, 500], '{"explanation": "x", "recommendations": ["<|B|>"]}'
    (argument,) = teacher(endpoint).argue([request()], targeted=False, attempt=0)
    assert argument.ranking[0] == 5 and len(endpoint.seen) == 3


@pytest.mark.parametrize("text", ["", "no json", '{"explanation": "x"}', '{"explanation": 3, "recommendations": ["<|A|>"]}',
                                  '{"recommendations": ["<|A|>"]}', '{"explanation": "x", "recommendations": "A"}', "{broken}"])  # fmt: skip
def test_what_is_no_answer_has_no_reasoning_and_keeps_the_base_order_or_its_labels(text):
    argument = read_argument(text, request(), MAKER.render(request()))
    assert argument.reasoning == ""
    assert sorted(argument.ranking) == [4, 5, 6, 7]


def test_foreign_and_repeated_labels_are_dropped():
    text = '{"explanation": "x", "recommendations": ["<|Z|>", "<|D|>", "<|D|>", 7]}'
    assert read_argument(text, request(), MAKER.render(request())).ranking == (7, 4, 5, 6)
