"""Candidate lists as files: exported, imported, and refused."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_gr2.artifacts import (
    read_recommendations,
    read_requests,
    write_requests,
)
from recbole_gr2.bridge.evaluator import evaluate_methods, from_lists
from recbole_gr2.errors import ConfigurationError, GR2Error, QualityCheckError
from recbole_gr2.rerankers.external import from_file, read_rankings
from recbole_gr2.stages import candidates
from recbole_gr2.types import Context

# `pytest --hypothesis-profile=long -k corrupted tests/test_candidate_files.py` tries more examples.
FILES = settings(suppress_health_check=list(HealthCheck))


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
        (lambda line: line.update(candidates="".join(line["candidates"])), "candidates has to be a list"),
        (lambda line: line.update(scores=[str(score) for score in line["scores"]]), "scores have to be finite numbers"),
        (lambda line: line["scores"].__setitem__(0, True), "scores have to be finite numbers"),
        (lambda line: line["scores"].__setitem__(0, float("nan")), "scores have to be finite numbers"),
        (lambda line: line.update(request_id=["a"]), "request_id has to be a text"),
        (lambda line: line.update(user_id=None), "user_id has to be a text"),
        (lambda line: line.clear(), "candidate"),
    ],
)
def test_wrong_lines_of_a_candidate_file(context, exported, tmp_path, change, text):
    wrong, *rest = lines(exported)
    change(wrong)
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [wrong, *rest[:5]]))
    imported = changed(context, tmp_path, cand_file=str(tmp_path / "lists.jsonl"))
    with pytest.raises(ConfigurationError, match=text) as error:
        candidates.run(imported)
    assert "lists.jsonl:1" in error.value.where


def test_errors_name_the_line_of_the_file(context, exported, tmp_path):
    """Blank lines count."""
    first, second, third, *_ = exported.read_text().splitlines()
    file = tmp_path / "lists.jsonl"
    imported = changed(context, tmp_path, cand_file=str(file))
    again = json.dumps({**json.loads(first), "request_id": "another name of the same request"})
    for text, problem in (
        (second[:-1], "not JSON"),
        ("[1]", "has to be a JSON object"),
        (again, "occurs twice"),
        (third.replace('"history":[', '"history":["i00",'), "does not belong to a row"),
        ("9" * 5000, "not JSON"),
        ("[" * 100_000, "not JSON"),
    ):
        file.write_text(f"\ufeff{first}\n\n \n{text}\n")
        with pytest.raises(GR2Error, match=problem) as error:
            candidates.run(imported)
        assert "lists.jsonl:4" in error.value.where
    file.write_bytes(first.encode() + b"\n\n" + second.encode("utf-16") + b"\n")
    with pytest.raises(GR2Error, match="not JSON") as error:
        candidates.run(imported)
    assert "lists.jsonl:3" in error.value.where


def test_a_prior_in_the_file_is_not_used(context, exported, tmp_path):
    """Lists of the prior stage have one. The run computes its own."""
    imported = changed(context, tmp_path, cand_file=str(tmp_path / "lists.jsonl"))
    with_prior = [{**line, "log_prior": [-1.0] * len(line["candidates"])} for line in lines(exported)]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in with_prior))
    candidates.run(imported)
    for split in ("train", "valid", "test"):
        expected = (context.folders["candidates"] / f"{split}.jsonl").read_text()
        assert (tmp_path / f"{split}.jsonl").read_text() == expected


def test_a_file_without_train_lists(context, exported, tmp_path):
    test = [line for line in lines(exported) if line["split"] == "test"]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in test))
    with pytest.raises(QualityCheckError, match="no train list contains its target"):
        candidates.run(changed(context, tmp_path, cand_file=str(tmp_path / "lists.jsonl")))


# --- corrupted files -------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["i00", "u1", 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "request_id",
    "user_id",
    "split",
    "history",
    "target",
    "candidates",
    "scores",
    "provider",
    "grades",
    "log_prior",
]


@st.composite
def corruptions(draw):
    """Changes of a file: of a field of a line, of the order of lines, or of bytes."""
    return draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("field"), st.integers(0), st.sampled_from([*FIELDS, "ranking"]), JSON),
                st.tuples(st.just("element"), st.integers(0), st.sampled_from([*FIELDS[3:7], "ranking"]), JSON),
                st.tuples(st.just("without"), st.integers(0), st.sampled_from([*FIELDS, "ranking"])),
                st.tuples(st.sampled_from(["twice", "gone", "blank", "swap"]), st.integers(0)),
                st.tuples(st.just("bytes"), st.integers(0), st.integers(0, 3), st.binary(max_size=4)),
                st.tuples(st.just("cut"), st.integers(0)),
            ),
            min_size=1,
            max_size=3,
        )
    )


def corrupt(text: str, changes) -> bytes:
    """The file after these changes."""
    parts = text.splitlines()
    late = []
    for what, place, *more in changes:
        number = place % len(parts) if parts else 0
        if not parts or what in ("bytes", "cut"):
            late.append((what, place, *more))
        elif what in ("field", "element", "without"):
            try:
                line = json.loads(parts[number])
                if what == "field":
                    line[more[0]] = more[1]
                elif what == "element":
                    line[more[0]][place % len(line[more[0]])] = more[1]
                else:
                    del line[more[0]]
                parts[number] = json.dumps(line)
            except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError):
                continue
        elif what == "twice":
            parts.append(parts[number])
        elif what == "gone":
            del parts[number]
        elif what == "blank":
            parts.insert(number, " ")
        else:
            parts[0], parts[number] = parts[number], parts[0]
    content = "".join(part + "\n" for part in parts).encode()
    for what, place, *more in late:
        start = place % (len(content) + 1)
        content = content[:start] if what == "cut" else content[:start] + more[1] + content[start + more[0] :]
    return content


@pytest.fixture(scope="module")
def short_file(context, exported) -> str:
    """The lists of eight users, four of which are hit users of all splits, as text."""
    by_user: dict[str, list[dict]] = {}
    for line in lines(exported):
        by_user.setdefault(line["user_id"], []).append(line)
    hits = [u for u, each in by_user.items() if len(each) == 3 and all(r["target"] in r["candidates"] for r in each)]
    users = [*hits[:4], *[user for user in by_user if user not in hits][:4]]
    return "".join(json.dumps(line) + "\n" for user in users for line in by_user[user])


@FILES
@given(corruptions())
def test_a_corrupted_candidate_file_is_an_error_or_gives_exact_metrics(context, short_file, tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    file = folder / "lists.jsonl"
    file.write_bytes(corrupt(short_file, changes))
    try:
        candidates.run(changed(context, folder, cand_file=str(file)))
    except QualityCheckError as error:
        assert "list contains its target" in str(error)
        return
    except GR2Error as error:
        number = re.search(r"lists\.jsonl:(\d+)", error.where)
        assert number and 1 <= int(number[1]) <= file.read_bytes().count(b"\n") + 1 and error.do
        return
    tests = [
        line for line in map(json.loads, filter(bytes.strip, file.read_bytes().split(b"\n"))) if line["split"] == "test"
    ]
    recommendations = read_recommendations(folder)
    users, data = context.data.user_tokens, context.data
    assert recommendations.users == tuple(str(line["user_id"]) for line in tests)
    ranks = []
    for line in tests:
        user = users.index(str(line["user_id"]))
        assert data.catalog.ids(line["history"]) == data.history(user, "test")
        assert data.catalog.id_of[line["target"]] == data.sequences[user][-1]
        tokens = line["candidates"] if "candidates" in line else line["candidate_item_ids"]
        ranks.append(tokens.index(line["target"]) + 1 if line["target"] in tokens else np.inf)
    found = evaluate_methods(data, recommendations, {"base": None}, {"all": None})["base"]["all"]
    for k in (1, 3, 5, 10):
        inside = np.array(ranks) <= k
        assert found[f"recall@{k}"] == pytest.approx(inside.mean(), abs=1e-4)
        assert found[f"mrr@{k}"] == pytest.approx(np.mean(inside / np.array(ranks)), abs=1e-4)
        assert found[f"ndcg@{k}"] == pytest.approx(np.mean(inside / np.log2(np.array(ranks) + 1)), abs=1e-4)


@FILES
@given(corruptions(), st.sampled_from(["json", "trec"]), st.integers(0, 2**32))
def test_a_corrupted_ranking_file_is_an_error_or_is_read_exactly(
    context, catalog, tmp_path_factory, changes, form, seed
):
    requests = read_requests(context.folders["candidates"] / "test.jsonl", catalog)[:8]
    rng = random.Random(seed)
    orders = {r.user_token: catalog.tokens(rng.sample(r.items, len(r.items))) for r in requests}
    if form == "json":
        text = "".join(json.dumps({"user_id": user, "ranking": list(order)}) + "\n" for user, order in orders.items())
    else:
        rows = [(user, item, -n) for user, order in orders.items() for n, item in enumerate(order)]
        text = "".join(f"{user} Q0 {item} 1 {score} run\n" for user, item, score in rng.sample(rows, len(rows)))
    file = tmp_path_factory.getbasetemp() / "rankings"
    file.write_bytes(corrupt(text, changes))
    try:
        read = read_rankings(file)
        reranker = from_file("mine", file)(context)
        answers = reranker.rank([request.without_labels() for request in requests])
    except GR2Error as error:
        whole = "ranks no candidate of any request" in str(error)
        number = re.search(r"rankings:(\d+)", error.where)
        assert whole or (number and 1 <= int(number[1]) <= file.read_bytes().count(b"\n") + 1)
        assert error.do
        return
    for request, answer in zip(requests, answers, strict=True):
        tokens = read.get(request.request_id, read.get(request.user_token, []))
        ids = [catalog.id_of[token] for token in dict.fromkeys(tokens) if token in catalog.id_of]
        ranked = [item for item in ids if item in request.items]
        assert answer.ranking == (*ranked, *(item for item in request.items if item not in ranked))
        if form == "json":
            given_lines = map(json.loads, filter(bytes.strip, file.read_bytes().split(b"\n")))
            own = [
                line for line in given_lines if str(line.get("request_id", line.get("user_id"))) == request.user_token
            ]
            assert not own or [str(token) for token in own[0]["ranking"]] == read[request.user_token]
    untouched = [r for r in requests if r.user_token in read and tuple(read[r.user_token]) == orders[r.user_token]]
    assert all(catalog.tokens(answers[requests.index(r)].ranking) == orders[r.user_token] for r in untouched)
