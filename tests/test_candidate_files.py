"""Candidate lists as files: exported, imported, and refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from recbole_gr2.artifacts import (
    read_requests,
    write_requests,
)
from recbole_gr2.bridge.evaluator import evaluate_methods, from_lists
from recbole_gr2.errors import ConfigurationError, QualityCheckError
from recbole_gr2.stages import candidates
from recbole_gr2.types import Context


def changed(context: Context, folder: Path, **changes) -> Context:
    """The same run with other settings, writing to `folder`."""
    return replace(context, folder=folder, settings={**dict(context.settings), **changes})


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def exported(context, tmp_path_factory) -> Path:
    """All three splits of the finished run in one file, as `--cand_file` accepts them."""
    file = tmp_path_factory.mktemp("export") / "lists.jsonl"
    parts = [(context.folders["candidates"] / f"{split}.jsonl").read_text() for split in ("train", "valid", "test")]
    file.write_text("".join(parts))
    return file


def test_exported_lists_come_back_with_the_same_metrics(context, exported, catalog, tmp_path, finished, tiny_run):
    imported = tiny_run(tmp_path, ["candidates"], data=finished.data, cand_file=str(exported))
    assert list(imported.folders) == ["candidates"]
    folder = imported.folders["candidates"]
    for split in ("train", "valid", "test"):
        assert (folder / f"{split}.jsonl").read_text() == (context.folders["candidates"] / f"{split}.jsonl").read_text()
    stats = json.loads((folder / "stats.json").read_text())
    assert stats == json.loads((context.folders["candidates"] / "stats.json").read_text())
    listed = from_lists(context.data, read_requests(folder / "test.jsonl", catalog))
    entry = finished.records["evaluate"].summary["methods"][0]
    metrics = evaluate_methods(context.data, listed, {"base": None}, {"all": None})["base"]["all"]
    assert (entry["method"], entry["scope"]) == ("base", "all_users")
    for name, value in metrics.items():  # no item outside of an imported list is a hit
        assert value == entry["metrics"][name] if int(name.split("@")[1]) <= 5 else value <= entry["metrics"][name]


def test_requests_are_read_as_they_were_written(context, catalog, tmp_path):
    requests = read_requests(context.folders["candidates"] / "valid.jsonl", catalog)
    assert write_requests(tmp_path / "again.jsonl", requests, catalog) == len(requests) == 150
    assert read_requests(tmp_path / "again.jsonl", catalog) == requests
    users = context.data.user_tokens
    assert all(r.history == context.data.history(users.index(r.user_token), "valid") for r in requests[:50])


def test_lists_of_other_tools(context, catalog, tmp_path):
    line = lines(context.folders["candidates"] / "test.jsonl")[0]
    short = {k: line[k] for k in ("user_id", "split", "history", "target")} | {"candidate_item_ids": line["candidates"]}
    (tmp_path / "x.jsonl").write_text(json.dumps(short) + "\n")
    (request,) = read_requests(tmp_path / "x.jsonl", catalog)
    assert request.request_id == line["request_id"] and request.provider == "x.jsonl"
    assert [c.score for c in request.candidates] == [-float(n) for n in range(5)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda line: line["history"].append(line["target"]), "does not belong to a row"),
        (lambda line: line["history"].pop(0), "does not belong to a row"),
        (lambda line: line.update(target=line["candidates"][0]), "does not belong to a row"),
        (lambda line: line.update(split="dev"), "does not belong to a row"),
        (lambda line: line.update(user_id="nobody"), "does not belong to a row"),
        (lambda line: line.update(candidates=line["candidates"][:1], scores=[1.0]), "has 1 candidates"),
        (lambda line: line["candidates"].__setitem__(0, line["candidates"][1]), "occurs twice"),
        (lambda line: line["candidates"].__setitem__(0, "no such item"), "no such item"),
        (lambda line: line["scores"].pop(), "lists.jsonl:1"),
        (lambda line: line.pop("history"), "history"),
    ],
)
def test_wrong_lines_of_a_candidate_file(context, exported, tmp_path, change, text):
    wrong, *rest = lines(exported)
    change(wrong)
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [wrong, *rest[:5]]))
    imported = changed(context, tmp_path, cand_file=str(tmp_path / "lists.jsonl"))
    with pytest.raises(ConfigurationError, match=text):
        candidates.run(imported)


def test_a_file_without_train_lists(context, exported, tmp_path):
    test = [line for line in lines(exported) if line["split"] == "test"]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in test))
    with pytest.raises(QualityCheckError, match="no train list contains its target"):
        candidates.run(changed(context, tmp_path, cand_file=str(tmp_path / "lists.jsonl")))
