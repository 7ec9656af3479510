"""API keys reach no log, error, manifest, report or stored response."""

import json
import logging
from pathlib import Path

import pytest
from local_server import serve

from recbole_gr2 import pipeline
from recbole_gr2.errors import ConfigurationError, DependencyError, GR2Error
from recbole_gr2.llm.endpoint import Endpoint, check_endpoint, check_url

KEY = "sk-fake-0123456789abcdef"
NAMES = [f"<|{letter}|>" for letter in "ABCDE"]


def answer(body, fault):
    """A response that repeats the key, as some servers do in their errors."""
    text = json.dumps({"explanation": f"It fits. {KEY}", "recommendations": NAMES})
    return {
        "error": {"message": f"Incorrect API key provided: {KEY}"},
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
    }


def everything(folder: Path) -> bytes:
    """The contents of all files in a folder, and their names."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"\n".join([str(path).encode() + path.read_bytes() for path in files])


@pytest.fixture
def endpoint(monkeypatch):
    pytest.importorskip("openai", reason="the extra recbole-gr2[teacher] is not installed")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve(answer) as server:
        yield server


@pytest.fixture(scope="module")
def root(finished_copy):
    """A folder of results for all runs, in which the stages before the traces are finished."""
    return finished_copy()


@pytest.mark.parametrize("fault", [401, "html", None])
def test_a_run_writes_no_key(tiny_run, endpoint, root, capfd, caplog, fault):
    """A run whose endpoint refuses the key, one that works, and one with a page that shows the key."""
    options = {
        "trace_teacher": "openai_api",
        "trace_endpoint": endpoint.url,
        "trace_max_lists": 4,
        "trace_min_accepted": 0.0,
        "trace_concurrency": 1,
    }
    caplog.set_level(logging.DEBUG)
    endpoint.faults += [fault] if isinstance(fault, int) else []
    endpoint.raw = (200, "text/html", f"<p>{KEY}</p>".encode()) if fault == "html" else None
    if fault is None:
        run = tiny_run(root, ["traces"], **options)
        assert run.records["traces"].summary["accepted"] > 0
    else:
        with pytest.raises(GR2Error, match="<key>") as stopped:
            tiny_run(root, ["traces"], **options)
        assert KEY not in str(stopped.value) and stopped.value.__cause__ is None
    printed = capfd.readouterr()
    for text in (printed.out, printed.err, caplog.text):
        assert KEY not in text
    written = everything(root)
    assert KEY.encode() not in written and len(written) > 1000
    assert b"manifest.json" in written and (fault is not None or b"replies.jsonl" in written)


URLS = [f"https://user:{KEY}@host/v1", f"https://{KEY}@host/v1", f"https://host/v1?key={KEY}", f"https://host/#{KEY}"]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("name", ["trace_endpoint", "distilled_teacher"])
def test_an_address_with_a_key_is_refused_before_anything_is_written(tiny_settings, tmp_path, name, url):
    with pytest.raises(ConfigurationError, match="contains a user name, a password") as stopped:
        pipeline.check(tiny_settings(tmp_path, **{name: url}))
    assert name in str(stopped.value) and KEY not in str(stopped.value)
    assert not list(tmp_path.iterdir())


def test_a_key_as_a_setting_is_refused_without_its_value(tiny_settings, tmp_path):
    for name in ("openai_api_key", "OPENAI_API_KEY", "trace_endpoint_key"):
        with pytest.raises(ConfigurationError, match=name) as stopped:
            tiny_settings(tmp_path, **{name: KEY})
        assert KEY not in str(stopped.value)


@pytest.mark.parametrize(
    "url", ["host:8000/v1", "ftp://host/v1", "http://", "http://[::1", "http://host:a/v1", "http://a b/"]
)
def test_a_text_that_is_no_address_is_refused(url):
    with pytest.raises(ConfigurationError, match="is not the address of an endpoint"):
        check_url(url, where="trace_endpoint")


def test_valid_addresses():
    for url in (None, "http://localhost:8000/v1", "https://api.example.com/v1/", "http://[::1]:8000/v1"):
        check_url(url, where="trace_endpoint")


def test_what_an_endpoint_needs_is_checked_without_a_connection(monkeypatch):
    pytest.importorskip("openai", reason="the extra recbole-gr2[teacher] is not installed")
    url = "http://127.0.0.1:9/v1"
    for key in ("", "two words", f"{KEY}\n", "schlüssel"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ConfigurationError, match="OPENAI_API_KEY") as stopped:
            check_endpoint(url, where="trace_endpoint")
        assert not key or key not in str(stopped.value)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    check_endpoint(url, where="trace_endpoint")
    monkeypatch.setenv("OPENAI_BASE_URL", URLS[0])
    with pytest.raises(ConfigurationError, match="OPENAI_BASE_URL") as stopped:
        Endpoint(None, "m", timeout=1.0, where="trace_endpoint")
    assert KEY not in str(stopped.value)
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(DependencyError, match="the openai package is not installed"):
        check_endpoint(url, where="trace_endpoint")
