"""Traces: targeted and rejected, recorded, and by teachers of the user."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError, QualityCheckError
from recbole_gr2.lists import training_requests
from recbole_gr2.policy import citations
from recbole_gr2.prompts import PromptMaker, load_template
from recbole_gr2.sid.tokens import sid_text
from recbole_gr2.stages import traces
from recbole_gr2.types import Candidate, Context, Item, Request, Trace


def changed(context: Context, folder: Path, **changes) -> Context:
    """The same run with other settings, writing to `folder`."""
    return replace(context, folder=folder, settings={**dict(context.settings), **changes})


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def toy_items(count: int = 30) -> Catalog:
    return Catalog(
        Item(
            item_id=n,
            token=f"t{n}",
            title=f"Title{n}x",
            categories=f"Root > Kind{n % 3}",
            brand=f"Brand{n % 2}",
            sid=(n, n + 1),
        )
        for n in range(1, count + 1)
    )


def toy_request(target: int, history=(1, 2, 3), candidates=(10, 11, 12), split="train") -> Request:
    listed = tuple(Candidate(item_id=i, score=-float(r), rank=r) for r, i in enumerate(candidates, start=1))
    return Request(
        request_id=f"{split}/u",
        user_token="u",
        split=split,
        history=tuple(history),
        candidates=listed,
        target=target,
        provider="p",
    )


def toy_maker(history: int = 8, chars: int = 60) -> PromptMaker:
    return PromptMaker(template=load_template("rerank"), catalog=toy_items(), history=history, title_chars=chars)


def test_targeted_traces(context, catalog, tmp_path):
    summary = traces.run(changed(context, tmp_path, trace_mode="targeted"))
    accepted = lines(tmp_path / "accepted.jsonl")
    requests = {r.request_id: r for r in training_requests(context)}
    assert summary["accepted_share"] == 1.0 and summary["accepted"] == len(accepted) == len(requests) > 30
    tokens = {item.item_id: item.token for item in catalog}
    for line in accepted:
        request = requests[line["request_id"]]
        assert line["ranking"][0] == tokens[request.target]
        assert sorted(line["ranking"]) == sorted(tokens[item] for item in request.items)
        assert line["mode"] == "targeted" and line["teacher"] == "rules" and line["reasoning"]
    assert summary["grounded"] == 1.0 and not lines(tmp_path / "rejected.jsonl")


def test_rejected_traces_are_kept_with_their_reasons(context, catalog, tmp_path):
    summary = traces.run(changed(context, tmp_path, trace_mode="rejection", trace_tries=4, trace_min_accepted=0.0))
    accepted, rejected = lines(tmp_path / "accepted.jsonl"), lines(tmp_path / "rejected.jsonl")
    targets = {r.request_id: catalog.item(r.target).token for r in training_requests(context)}
    assert accepted and rejected
    assert all(line["ranking"][0] == targets[line["request_id"]] for line in accepted)
    assert all(line["ranking"][0] != targets[line["request_id"]] for line in rejected)
    assert {line["reason"] for line in rejected} == {"top-1 is not the target"} == set(summary["rejected_for"])
    tries: dict[str, list[int]] = {}
    for line in rejected + accepted:
        tries.setdefault(line["request_id"], []).append(line["tries"])
    for request_id in targets:  # every try is on record, up to the accepted one
        last = max(tries[request_id])
        assert sorted(tries[request_id]) == list(range(1, last + 1))
        assert last == 4 or any(line["request_id"] == request_id for line in accepted)
    assert summary["tries_mean"] == sum(line["tries"] for line in accepted) / len(accepted)


def test_too_few_accepted_traces_stop_the_stage(context, tmp_path):
    with pytest.raises(QualityCheckError, match=r"requests have an accepted trace.*top-1 is not the target \(\d+\)"):
        traces.run(changed(context, tmp_path, trace_mode="rejection", trace_tries=1, trace_min_accepted=1.0))
    assert lines(tmp_path / "rejected.jsonl")  # to look at


def test_fewer_lists(context, catalog, tmp_path):
    assert traces.run(changed(context, tmp_path, trace_max_lists=7))["requests"] == 7
    drawn = training_requests(context, 7, "traces")
    assert {r.request_id for r in drawn} == {line["request_id"] for line in lines(tmp_path / "accepted.jsonl")}


def test_recorded_traces(context, catalog, tmp_path):
    """The tries of a run, accepted and rejected, say the same again; what no line says is rejected for that."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    whole = traces.run(changed(context, first, trace_mode="rejection", trace_tries=1, trace_min_accepted=0.0))
    tries = sorted(lines(first / "rejected.jsonl") + lines(first / "accepted.jsonl"), key=lambda line: line["tries"])
    file = tmp_path / "replies.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in tries))
    recorded = {
        "trace_teacher": "recorded",
        "trace_file": str(file),
        "trace_mode": "rejection",
        "trace_min_accepted": 0.0,
    }
    again = traces.run(changed(context, second, trace_tries=2, **recorded))
    own = [{**line, "teacher": "rules"} for line in lines(second / "accepted.jsonl")]
    assert own == lines(first / "accepted.jsonl") and again["rejected_for"].pop("no reasoning") > 0
    assert again == whole
    file.write_text(json.dumps({**tries[0], "ranking": ["no such item"]}) + "\n")
    with pytest.raises(GR2Error, match="the line cannot be read: KeyError"):
        traces.run(changed(context, second, **recorded))
    with pytest.raises(MissingFileError, match="gone.jsonl"):
        traces.run(changed(context, second, **{**recorded, "trace_file": str(tmp_path / "gone.jsonl")}))
    with pytest.raises(ConfigurationError, match="recorded"):
        traces.run(changed(context, second, **{**recorded, "trace_file": None}))


def test_grounding_by_hand():
    items = Catalog(Item(item_id=n, token=f"t{n}", title="", sid=(n, 0)) for n in range(1, 8))
    request = Request(
        request_id="r",
        user_token="u",
        split="train",
        history=(1, 2, 3),
        target=5,
        provider="",
        candidates=tuple(Candidate(item_id=i, score=0.0, rank=r) for r, i in enumerate((4, 5), start=1)),
    )
    texts = ["no ID", f"{sid_text((3, 0))} so {sid_text((5, 0))}", f"{sid_text((1, 0))} or {sid_text((7, 0))}"]
    kept = [
        Trace(request_id="r", teacher="", mode="", reasoning=text, ranking=(5, 4), accepted=True, reason="")
        for text in texts
    ]
    assert citations(kept, [request], items, 2) == {"grounded": 1 / 3, "cited": 4, "cited_in_prompt": 0.5}
    assert citations(kept, [request], items, 3)["cited_in_prompt"] == 0.75
    assert citations(kept[:1], [request], items, 2) == {"grounded": 0.0, "cited": 0, "cited_in_prompt": None}


def test_a_teacher_of_the_users_own(context, tmp_path, monkeypatch):
    (tmp_path / "teacher_of_traces.py").write_text(TEACHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    summary = traces.run(changed(context, tmp_path, trace_teacher="teacher_of_traces:Mine", trace_mode="targeted"))
    assert summary["accepted_share"] == 1.0 and summary["grounded"] == 0.0
    assert {line["teacher"] for line in lines(tmp_path / "accepted.jsonl")} == {"mine"}
    with pytest.raises(GR2Error, match="replies"):
        (tmp_path / "short_teacher.py").write_text(
            TEACHER.replace("for ranking in rankings", "for ranking in rankings[1:]")
        )
        traces.run(changed(context, tmp_path, trace_teacher="short_teacher:Mine", trace_mode="targeted"))


@pytest.mark.parametrize(
    ("name", "text"),
    [("nobody", "there is no 'nobody'"), ("my_missing_module:X", "cannot import"), ("json:Missing", "cannot import")],
)
def test_teachers_that_do_not_exist(context, tmp_path, name, text):
    with pytest.raises(ConfigurationError, match=text):
        traces.run(changed(context, tmp_path, trace_teacher=name))


@pytest.mark.parametrize(
    ("ranking", "reasoning", "reason"),
    [
        ((11, 10, 12), "because", ""),
        ((10, 11, 12), "because", "top-1 is not the target"),
        ((11, 10), "because", "not a permutation of the candidates"),
        ((11, 10, 10), "because", "not a permutation of the candidates"),
        ((11, 10, 13), "because", "not a permutation of the candidates"),
        ((), "because", "not a permutation of the candidates"),
        ((11, 10, 12), " \n", "no reasoning"),
    ],
)
def test_objections(ranking, reasoning, reason):
    assert traces.objection(toy_request(11), ranking, reasoning) == reason


def test_a_local_llm_teaches(context, tmp_path):
    summary = traces.run(
        changed(context, tmp_path, trace_teacher="local_llm", trace_max_lists=6, trace_min_accepted=0.0)
    )
    assert summary["requests"] == 6
    everything = lines(tmp_path / "accepted.jsonl") + lines(tmp_path / "rejected.jsonl")
    assert len(everything) == 6 and {line["teacher"] for line in everything} == {"local_llm"}


TEACHER = """
from recbole_gr2.teachers import TeacherReply


class Mine:
    name = "mine"

    def __init__(self, *, catalog, settings, seed):
        assert settings["trace_teacher"].endswith(":Mine") and isinstance(seed, int)
        self.titles = {item.item_id: item.title for item in catalog}

    def argue(self, requests, *, targeted, attempt):
        first = [r.items.index(r.target) for r in requests]
        rankings = [(*r.items[n:], *r.items[:n]) for r, n in zip(requests, first)]
        return [TeacherReply(reasoning=f"{self.titles[ranking[0]]}", ranking=ranking) for ranking in rankings]
"""
