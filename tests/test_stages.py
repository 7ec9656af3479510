"""The stages: nothing leaks, nothing is cut, and a run that was killed equals one that was not."""

import json
import math
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_gr2 import pipeline
from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.evaluator import evaluate_rows
from recbole_gr2.bridge.models import ListedBase
from recbole_gr2.config import Settings, load_settings
from recbole_gr2.console import Console
from recbole_gr2.errors import ConfigurationError, GateError, GR2Error, MissingFileError
from recbole_gr2.evidence import Observed, collect
from recbole_gr2.llm.constraint import Grammar
from recbole_gr2.llm.rollout import read_answer
from recbole_gr2.prompts import PromptMaker, kind, load_template, shorten, shuffled_order
from recbole_gr2.quick_start import main, run
from recbole_gr2.requests import read_requests, write_requests
from recbole_gr2.sid.tokens import is_code, sid_text
from recbole_gr2.stages import Context, evaluate, midtrain, traces
from recbole_gr2.stages.embeddings import item_text, load_embeddings
from recbole_gr2.stages.evidence import injected_requests, load_described, load_requests
from recbole_gr2.stages.midtrain import corpus, fitting, general_texts, load_stage_model, mixture, task_texts
from recbole_gr2.stages.rerank import lambdamart_rankings, likelihood_rankings, load_rankings, reported_lists
from recbole_gr2.stages.sft import answer_requests, taught_ranking, training_row
from recbole_gr2.stages.tokenizer import load_items
from recbole_gr2.stages.traces import answer_grammar
from recbole_gr2.teachers import RulesTeacher, true_statements
from recbole_gr2.types import Candidate, Item, Request, Trace


@pytest.fixture(scope="module")
def smoke(smoke_run) -> Context:
    """The smoke run's folders as a stage sees them; what it writes goes nowhere."""
    chosen = load_settings(config_files=[smoke_run.path.parent / "config.yaml"])
    return Context(
        stage="",
        settings=chosen,
        data=Data(chosen),
        folder=Path("nowhere"),
        inputs={},
        folders=smoke_run.stages,
        say=lambda text: None,
    )


@pytest.fixture(scope="module")
def items(smoke):
    return load_items(smoke.folders["tokenizer"], smoke.data.items)


@pytest.fixture(scope="module")
def student(smoke):
    """(model, tokenizer) of the sft stage."""
    return load_stage_model(smoke, "sft")


def other(context: Context, folder: Path, **changes) -> Context:
    """The same run with other settings, writing to `folder`."""
    return replace(context, folder=folder, settings={**dict(context.settings), **changes})


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- the target reaches nothing --------------------------------------------------------------------------------------


def test_scrambled_targets_give_the_same_rankings(smoke, items, student, tmp_path):
    file = smoke.folders["candidates"] / "test.jsonl"
    rng, scrambled = random.Random(0), []
    for line in lines(file)[:60]:
        scrambled.append({**line, "target": rng.choice(items).token})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scrambled))
    true = read_requests(file, items)[:60]
    false = read_requests(tmp_path / "test.jsonl", items)
    assert sum(a.target != b.target for a, b in zip(true, false, strict=True)) > 50
    assert [replace(r, target=0) for r in true] == [replace(r, target=0) for r in false]

    maker, (model, tokenizer) = PromptMaker.of(smoke.settings, items), student
    assert [maker.render(r) for r in true] == [maker.render(r) for r in false]
    assert likelihood_rankings(smoke, items, true) == likelihood_rankings(smoke, items, false)
    grammar = answer_grammar(tokenizer, smoke.settings)
    for orders in (None, {r.request_id: shuffled_order(r, 1) for r in true}):
        answers = [
            answer_requests(model, tokenizer, maker, grammar, requests, bf16=False, orders=orders)[0]
            for requests in (true, false)
        ]
        assert answers[0] == answers[1]
        assert len({answer.ranking for answer in answers[0]}) > 10  # a constant would pass too


def toy_items(count: int = 30) -> tuple[Item, ...]:
    return tuple(
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
    return PromptMaker(template=load_template("rerank"), items=toy_items(), history=history, title_chars=chars)


def test_a_prompt_does_not_know_the_target():
    maker = toy_maker()
    prompts = [maker.render(toy_request(target)) for target in (10, 12, 25)]
    assert prompts[0] == prompts[1] == prompts[2]
    assert "Title25x" not in str(prompts[2]) and "Title12x" in str(prompts[2])


@pytest.mark.parametrize("grounded", [True, False])
def test_answers_cite_what_their_prompts_show(smoke, items, student, grounded):
    """A policy that begins an ID wherever it can, and has not learnt to end one."""
    (model, tokenizer), maker = student, PromptMaker.of(smoke.settings, items)
    requests = load_requests(smoke, "test", items)[:40]
    grammar = answer_grammar(tokenizer, {**dict(smoke.settings), "prompt_grounded": grounded})
    push = torch.zeros(len(tokenizer))
    push[tokenizer.convert_tokens_to_ids("<|sid_begin|>")] = 100.0
    codes = [number for token, number in tokenizer.get_vocab().items() if is_code(token)]
    push[codes] = 50.0 if not grounded else 0.0
    hook = model.get_output_embeddings().register_forward_hook(lambda head, given, logits: logits + push)
    try:
        answers, _ = answer_requests(model, tokenizer, maker, grammar, requests, bf16=False)
    finally:
        hook.remove()
    begun = [answer.reasoning.count("<|sid_begin|>") for answer in answers]
    found = traces.grounding(answers, requests, items, smoke.settings["prompt_history"])
    assert min(begun) > 3 and (found["cited"] > 100 and found["cited_in_prompt"] == 1.0) is grounded


def test_history_and_candidates_as_they_are_shown():
    maker = toy_maker(history=2)
    prompt = maker.render(toy_request(11), order=(2, 0, 1))
    user = prompt.messages[1]["content"]
    assert "Title1x" not in user and user.index("Title2x") < user.index("Title3x")  # the last two, oldest first
    places = [
        user.index(f"<s_a_{n}><s_b_{n + 1}><|sid_end|><|{label}|> Title{n}x (Kind{n % 3})")
        for label, n in zip("ABC", (12, 10, 11), strict=True)
    ]
    assert places == sorted(places)
    assert prompt.labels == ("<|A|>", "<|B|>", "<|C|>") and prompt.order == (2, 0, 1)
    assert maker.label_items(toy_request(11), prompt) == (12, 10, 11)


def test_facts_are_shown_behind_their_candidate():
    facts = ({"next": 7, "text": 0}, {"next": 2, "text": 9}, {"next": 0, "text": 3})
    request = replace(toy_request(11), facts=facts)
    user = toy_maker().render(request, order=(2, 0, 1)).messages[1]["content"]
    shown = [line.split(" Title")[1] for line in user.splitlines() if "[" in line]
    assert shown == ["12x (Kind0) [next 0 text 3]", "10x (Kind1) [next 7 text 0]", "11x (Kind2) [next 2 text 9]"]
    assert "In brackets" in toy_maker().render(request).messages[0]["content"]
    plain = toy_maker().render(toy_request(11))
    assert "[" not in plain.messages[1]["content"] and "In brackets" not in plain.messages[0]["content"]


def test_the_rules_teacher_says_in_which_facts_its_pick_is_first():
    facts = ({"next": 7, "text": 0}, {"next": 7, "text": 2}, {"next": 0, "text": 0})
    teacher = RulesTeacher(toy_items(), seed=0, temperature=1.0, history=8)
    request = replace(toy_request(11), facts=facts)
    assert teacher.text(request, 10).endswith(f"; first in next. Best is {sid_text((10, 11))}")
    assert teacher.text(request, 11).endswith(f"; first in next, text. Best is {sid_text((11, 12))}")
    assert "first in" not in teacher.text(request, 12)  # a fact that all lack makes no one first


def test_the_rules_teacher_cites_what_a_prompt_shows():
    """Items 2 and 3 are shown; item 1 alone has the brand and the kind of candidate 13."""
    items = [
        replace(item, brand=f"Brand{item.item_id % 4}", categories=f"Root{item.item_id % 4} > Kind")
        for item in toy_items()
    ]
    request = toy_request(13, candidates=(13, 14))
    said = {n: RulesTeacher(items, seed=0, temperature=1.0, history=n).text(request, 13) for n in (2, 3)}
    assert ", the same brand, Brand1. Best" in said[3] and ", something new beside them. Best" in said[2]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_rules_teacher_says_what_is_true(data):
    """Of any items, with and without kinds, brands and facts."""
    paths, brands = ["", "One", "Root > A", "Root > A and B", "Root > A > C, D"], ["", "X", "Y, Z. Q"]
    drawn = data.draw(st.lists(st.tuples(st.sampled_from(paths), st.sampled_from(brands)), min_size=8, max_size=8))
    items = [
        Item(item_id=n, token=f"t{n}", title=f"Title {n}", categories=path, brand=brand, sid=(n, 0))
        for n, (path, brand) in enumerate(drawn, start=1)
    ]
    levels = data.draw(st.lists(st.integers(0, 9), min_size=6, max_size=6))
    facts = tuple({"next": next_, "last text": text} for next_, text in zip(levels[::2], levels[1::2], strict=True))
    request = replace(
        toy_request(6, history=(1, 2, 3, 4, 5), candidates=(6, 7, 8)), facts=data.draw(st.sampled_from([(), facts]))
    )
    shown, pick = data.draw(st.integers(0, 6)), data.draw(st.sampled_from(request.items))
    said = RulesTeacher(items, seed=0, temperature=1.0, history=shown).text(request, pick)
    assert true_statements(f" {said} ", request, items, shown) == {"habit": True, "kind": True, "why": True}, said


def test_what_is_not_true():
    """Candidate 12 is a Kind0 of Brand0; the history holds Kind1, Kind2, Kind0 of Brand1, Brand0, Brand1."""
    request, sid = toy_request(11, history=(1, 2, 3)), sid_text((12, 13))

    def told(habit="Kind1 and Kind0", kind="Kind0", why="the same kind", cited=sid, shown=8, request=request):
        text = f"The shopper takes {habit}. {cited}: {kind}, {why}. Best is {sid_text((10, 11))}"
        return "".join(str(int(true)) for true in true_statements(text, request, toy_items(), shown).values())

    assert told() == "111" and told(habit="Kind2") == "111" and told(shown=1) == "011"
    assert told(habit="Kind1 and Kind7") == "011" and told(habit="Kind1 or Kind0") == "011"
    assert told(kind="Kind1") == "101" and told(kind="Kind") == "101"
    assert told(why="the same brand, Brand0") == "111" and told(why="the same brand, Brand0", shown=1) == "010"
    assert told(why="the same brand, Brand1") == "110"  # a brand of the history, and not the candidate's
    assert told(why="it goes with Kind1") == "111" and told(why="it goes with Kind5") == "110"
    assert told(why="something new beside them") == "110"
    assert told(why="the same kind; first in next") == "110"  # no facts are shown
    facts = replace(request, facts=({"next": 3}, {"next": 9}, {"next": 9}))
    assert told(why="the same kind; first in next", request=facts) == "111"
    assert told(why="the same kind; first in next, text", request=facts) == "110"
    assert told(cited=sid_text((1, 2))) == "000"  # no candidate
    assert told(why="because") == "000" and set(true_statements("", request, toy_items(), 8).values()) == {False}


def test_facts_of_a_run(smoke, items, tmp_path):
    """The levels are those of the evidence stage's facts, and prompts, traces and training rows hold them."""
    shown = other(smoke, tmp_path, prompt_evidence=["rank", "next"], trace_mode="targeted", trace_min_accepted=0.0)
    for split in ("train", "test"):
        requests = [r for r in load_requests(shown, split, items) if r.prior]
        tables = [each.facts for each in load_described(shown, split, requests)]
        assert len(requests) > 50
        for request, table in zip(requests, tables, strict=True):
            ranks = [facts["rank"] for facts in request.facts]
            assert ranks == sorted(ranks) and ranks[0] == 0 and ranks[-1] == 9 and len(ranks) == len(request.items)
            order = sorted(range(len(table)), key=lambda place: table[place, 5])
            assert [request.facts[place]["next"] for place in order] == sorted(f["next"] for f in request.facts)
    assert all(r.facts == () for r in load_requests(smoke, "train", items))
    traces.run(shown)
    assert any("; first in " in trace["reasoning"] for trace in lines(tmp_path / "accepted.jsonl"))
    with pytest.raises(ConfigurationError, match="there are no facts .'weather'. to show"):
        load_requests(other(smoke, tmp_path, prompt_evidence=["weather"]), "test", items)


def test_injected_lists(smoke, items):
    """They are train lists that lack their target, with it in place of one candidate, at any rank, at that one's score."""
    lacking = {
        r.request_id: r
        for r in read_requests(smoke.folders["candidates"] / "train.jsonl", items)
        if r.target_rank is None
    }
    assert injected_requests(smoke, items, 0) == []
    shown = other(smoke, Path("nowhere"), prompt_evidence=["next"])
    injected = injected_requests(shown, items, 200)
    assert len(injected) == 200 == len({r.request_id for r in injected})
    for request in injected:
        was = lacking[request.request_id]
        assert [a == b for a, b in zip(request.items, was.items, strict=True)].count(False) == 1
        assert request.target in request.items and request.history == was.history and request.teaches
        assert [(c.score, c.rank) for c in request.candidates] == [(c.score, c.rank) for c in was.candidates]
        assert sum(map(math.exp, request.prior)) == pytest.approx(1, abs=1e-5) and len(request.facts) == len(was.items)
    counts = Counter(r.target_rank for r in injected)
    assert set(counts) == set(range(1, 11)) and max(counts.values()) < 45
    assert injected_requests(shown, items, 200) == injected
    assert len(injected_requests(smoke, items, 10**6)) == len(lacking)
    plain = injected_requests(other(smoke, Path("nowhere"), evidence_providers=[]), items, 20)
    assert len(plain) == 20 and all(r.prior == () for r in plain)


def test_candidates_are_shuffled_by_request():
    plain, maker = toy_maker(), replace(toy_maker(), shuffle_seed=3)
    requests = [replace(toy_request(11), request_id=f"train/{n}", prior=(-1.0, -2.0, -3.0)) for n in range(30)]
    orders = {maker.render(r).order for r in requests}
    assert len(orders) == 6 and {plain.render(r).order for r in requests} == {(0, 1, 2)}
    for r in requests:
        prompt = maker.render(r)
        assert prompt == maker.render(replace(r, target=12)) and prompt.order == shuffled_order(r, 3)
        assert maker.label_items(r, prompt) == tuple((10, 11, 12)[p] for p in prompt.order)
        assert maker.label_prior(r, prompt) == [-1.0 - p for p in prompt.order]
    assert maker.render(requests[0], order=(2, 1, 0)).order == (2, 1, 0)
    assert [shuffled_order(r, 3) for r in requests] != [shuffled_order(r, 3, "shuffled") for r in requests]


@given(st.text(alphabet="ab ,-", max_size=40), st.integers(1, 20))
def test_shorten(text, chars):
    short = shorten(text, chars)
    assert len(short) <= chars and text.startswith(short)
    assert short == text or len(text) > chars


def test_shorten_and_kind_by_hand():
    assert shorten("OPI Nail Lacquer, Red", 17) == "OPI Nail Lacquer"
    assert shorten("OPI Nail Lacquer", 16) == "OPI Nail Lacquer"
    assert shorten("Lacquer", 3) == "Lac"
    assert kind(toy_items()[0]) == "Kind1"
    assert kind(Item(item_id=1, token="t", title="x")) == ""


def test_item_text():
    assert item_text(Item(item_id=1, token="t", title="A", categories="C", brand="B")) == "A | B | C"
    assert item_text(Item(item_id=1, token="t", title="A", description="D")) == "A | D"
    assert item_text(Item(item_id=1, token="t", title="")) == ""


# --- candidate files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(smoke, tmp_path_factory) -> Path:
    """All three splits of the smoke run in one file, as `--cand_file` takes them."""
    file = tmp_path_factory.mktemp("export") / "lists.jsonl"
    parts = [(smoke.folders["candidates"] / f"{split}.jsonl").read_text() for split in ("train", "valid", "test")]
    file.write_text("".join(parts))
    return file


def import_lists(file: Path, root: Path) -> Path:
    run(config_dict={"preset": "smoke", "cand_file": str(file), "checkpoint_dir": str(root)}, stages=["candidates"])
    (folder,) = (root / "gr2" / "ml-100k" / "stages" / "candidates").iterdir()
    return folder


def test_exported_lists_come_back_and_give_the_same_base_row(smoke, exported, items, tmp_path, smoke_run):
    folder = import_lists(exported, tmp_path)
    for split in ("train", "valid", "test"):
        assert (folder / f"{split}.jsonl").read_text() == (smoke.folders["candidates"] / f"{split}.jsonl").read_text()
    stats = json.loads((folder / "stats.json").read_text())
    assert stats == json.loads((smoke.folders["candidates"] / "stats.json").read_text())
    listed = ListedBase(data=smoke.data, requests=read_requests(folder / "test.jsonl", items))
    row = next(row for row in smoke_run.result["rows"] if (row["row"], row["scope"]) == ("base", "all"))
    assert evaluate_rows(smoke.data, listed, {"own": None}, split="test")["own"] == row["metrics"]


def test_requests_are_read_as_they_were_written(smoke, items, tmp_path):
    requests = read_requests(smoke.folders["candidates"] / "valid.jsonl", items)
    assert write_requests(tmp_path / "again.jsonl", requests, items) == len(requests) == 943
    assert read_requests(tmp_path / "again.jsonl", items) == requests
    users = smoke.data.user_tokens
    assert all(r.history == smoke.data.history(users.index(r.user_token), "valid") for r in requests[:50])


def test_lists_of_other_tools(smoke, items, tmp_path):
    line = lines(smoke.folders["candidates"] / "test.jsonl")[0]
    short = {k: line[k] for k in ("user_id", "split", "history", "target")} | {"candidate_item_ids": line["candidates"]}
    (tmp_path / "x.jsonl").write_text(json.dumps(short) + "\n")
    (request,) = read_requests(tmp_path / "x.jsonl", items)
    assert request.request_id == line["request_id"] and request.provider == "x.jsonl"
    assert [c.score for c in request.candidates] == [-float(n) for n in range(10)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda line: line["history"].append(line["target"]), "does not belong to a row"),
        (lambda line: line["history"].pop(0), "does not belong to a row"),
        (lambda line: line.update(target=line["candidates"][0]), "does not belong to a row"),
        (lambda line: line.update(split="dev"), "does not belong to a row"),
        (lambda line: line.update(user_id="nobody"), "does not belong to a row"),
        (lambda line: line.update(candidates=line["candidates"][:1], scores=[1.0]), "has 1 candidates"),
        (lambda line: line["candidates"].__setitem__(0, line["candidates"][1]), "named twice"),
        (lambda line: line["candidates"].__setitem__(0, "no such item"), "no such item"),
        (lambda line: line["scores"].pop(), "lists.jsonl:1"),
        (lambda line: line.pop("history"), "history"),
    ],
)
def test_wrong_lines_of_a_candidate_file(exported, tmp_path, change, text):
    wrong, *rest = lines(exported)
    change(wrong)
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [wrong, *rest[:5]]))
    context = context_of_candidates(tmp_path / "lists.jsonl", tmp_path)
    from recbole_gr2.stages import candidates

    with pytest.raises(ConfigurationError, match=text):
        candidates.run(context)


_data: list[Data] = []


def context_of_candidates(file: Path, folder: Path, **more) -> Context:
    chosen = load_settings(config_dict={"preset": "smoke", "cand_file": str(file), **more})
    if not _data:
        _data.append(Data(chosen))
    return Context(
        stage="", settings=chosen, data=_data[0], folder=folder, inputs={}, folders={}, say=lambda text: None
    )


def test_a_file_without_train_lists(exported, tmp_path):
    from recbole_gr2.stages import candidates

    test = [line for line in lines(exported) if line["split"] == "test"]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in test))
    with pytest.raises(GateError, match="no train list holds its target"):
        candidates.run(context_of_candidates(tmp_path / "lists.jsonl", tmp_path))


@pytest.mark.parametrize("count", [1, 27])
def test_list_lengths_without_labels(exported, tmp_path, count):
    from recbole_gr2.stages import candidates

    with pytest.raises(ConfigurationError, match=f"cand_num is {count}"):
        candidates.run(context_of_candidates(exported, tmp_path, cand_num=count))


def test_candidates_hold_no_seen_item_and_no_inserted_target(smoke, items):
    for split in ("train", "valid", "test"):
        requests = read_requests(smoke.folders["candidates"] / f"{split}.jsonl", items)
        assert len(requests) == 943
        assert not any(set(r.items) & set(r.history) for r in requests)
        scores = [[candidate.score for candidate in r.candidates] for r in requests]
        assert all(row == sorted(row, reverse=True) for row in scores)
        assert 0 < sum(r.target_rank is not None for r in requests) < 300
        assert all(r.provider == ("CausalSASRec hold-out" if split == "train" else "CausalSASRec") for r in requests)


# --- traces ----------------------------------------------------------------------------------------------------------


def test_targeted_traces(smoke, items, tmp_path):
    facts = traces.run(other(smoke, tmp_path, trace_mode="targeted"))
    accepted = lines(tmp_path / "accepted.jsonl")
    requests = {r.request_id: r for r in traces.training_requests(smoke, items, None, "x")}
    assert facts["accepted_share"] == 1.0 and facts["accepted"] == len(accepted) == len(requests) > 30
    tokens = {item.item_id: item.token for item in items}
    for line in accepted:
        request = requests[line["request_id"]]
        assert line["ranking"][0] == tokens[request.target]
        assert sorted(line["ranking"]) == sorted(tokens[item] for item in request.items)
        assert line["mode"] == "targeted" and line["teacher"] == "rules" and line["reasoning"]
    assert facts["grounded"] == 1.0 and not lines(tmp_path / "rejected.jsonl")


def test_rejected_traces_are_kept_with_their_reasons(smoke, items, tmp_path):
    facts = traces.run(other(smoke, tmp_path, trace_mode="rejection", trace_tries=4, trace_min_accepted=0.0))
    accepted, rejected = lines(tmp_path / "accepted.jsonl"), lines(tmp_path / "rejected.jsonl")
    targets = {r.request_id: items[r.target - 1].token for r in traces.training_requests(smoke, items, None, "x")}
    assert accepted and rejected
    assert all(line["ranking"][0] == targets[line["request_id"]] for line in accepted)
    assert all(line["ranking"][0] != targets[line["request_id"]] for line in rejected)
    assert {line["reason"] for line in rejected} == {"top-1 is not the target"} == set(facts["rejected_for"])
    tries: dict[str, list[int]] = {}
    for line in rejected + accepted:
        tries.setdefault(line["request_id"], []).append(line["tries"])
    for request_id in targets:  # every try is on record, up to the accepted one
        last = max(tries[request_id])
        assert sorted(tries[request_id]) == list(range(1, last + 1))
        assert last == 4 or any(line["request_id"] == request_id for line in accepted)
    assert facts["tries_mean"] == sum(line["tries"] for line in accepted) / len(accepted)


def test_a_rejecting_teacher_does_not_see_the_target(smoke, items):
    requests = traces.training_requests(smoke, items, 20, "x")
    false = [replace(r, target=r.items[0]) for r in requests]
    teacher = traces.RulesTeacher(items, seed=1, temperature=1.0, history=8)
    for attempt in (0, 1, 5):
        said = [teacher.argue(given, targeted=False, attempt=attempt) for given in (requests, false)]
        assert said[0] == said[1]
    assert teacher.argue(requests, targeted=True, attempt=0) != teacher.argue(false, targeted=True, attempt=0)


def test_too_few_accepted_traces_stop_the_stage(smoke, tmp_path):
    with pytest.raises(GateError, match="requests have an accepted trace"):
        traces.run(other(smoke, tmp_path, trace_mode="rejection", trace_tries=1, trace_min_accepted=0.99))
    assert lines(tmp_path / "rejected.jsonl")  # to look at


def test_fewer_lists(smoke, items, tmp_path):
    assert traces.run(other(smoke, tmp_path, trace_max_lists=7))["requests"] == 7
    drawn = traces.training_requests(smoke, items, 7, "traces")
    assert {r.request_id for r in drawn} == {line["request_id"] for line in lines(tmp_path / "accepted.jsonl")}


def test_recorded_traces(smoke, items, tmp_path):
    """The tries of a run, accepted and rejected, say the same again; what no line says is rejected for that."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    whole = traces.run(other(smoke, first, trace_mode="rejection", trace_tries=1, trace_min_accepted=0.0))
    tries = sorted(lines(first / "rejected.jsonl") + lines(first / "accepted.jsonl"), key=lambda line: line["tries"])
    file = tmp_path / "said.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in tries))
    recorded = {
        "trace_teacher": "recorded",
        "trace_file": str(file),
        "trace_mode": "rejection",
        "trace_min_accepted": 0.0,
    }
    again = traces.run(other(smoke, second, trace_tries=2, **recorded))
    own = [{**line, "teacher": "rules"} for line in lines(second / "accepted.jsonl")]
    assert own == lines(first / "accepted.jsonl") and again["rejected_for"].pop("no reasoning") > 0
    assert again == whole
    file.write_text(json.dumps({**tries[0], "ranking": ["no such item"]}) + "\n")
    with pytest.raises(GR2Error, match="record 1 cannot be read: KeyError"):
        traces.run(other(smoke, second, **recorded))
    with pytest.raises(MissingFileError, match="gone.jsonl"):
        traces.run(other(smoke, second, **{**recorded, "trace_file": str(tmp_path / "gone.jsonl")}))
    with pytest.raises(ConfigurationError, match="the recorded teacher reads a file"):
        traces.run(other(smoke, second, **{**recorded, "trace_file": None}))


def test_grounding_by_hand():
    items = [Item(item_id=n, token=f"t{n}", title="", sid=(n, 0)) for n in range(1, 8)]
    request = Request(
        request_id="r",
        user_token="u",
        split="train",
        history=(1, 2, 3),
        target=5,
        provider="",
        candidates=tuple(Candidate(item_id=i, score=0.0, rank=r) for r, i in enumerate((4, 5), start=1)),
    )
    said = ["no ID", f"{sid_text((3, 0))} so {sid_text((5, 0))}", f"{sid_text((1, 0))} or {sid_text((7, 0))}"]
    kept = [
        Trace(request_id="r", teacher="", mode="", reasoning=text, ranking=(5, 4), accepted=True, reason="")
        for text in said
    ]
    assert traces.grounding(kept, [request], items, 2) == {"grounded": 1 / 3, "cited": 4, "cited_in_prompt": 0.5}
    assert traces.grounding(kept, [request], items, 3)["cited_in_prompt"] == 0.75
    assert traces.grounding(kept[:1], [request], items, 2) == {"grounded": 0.0, "cited": 0, "cited_in_prompt": None}


TEACHER = """
from recbole_gr2.teachers import Argument


class Mine:
    name = "mine"

    def argue(self, requests, *, targeted, attempt):
        first = [r.items.index(r.target) for r in requests]
        rankings = [(*r.items[n:], *r.items[:n]) for r, n in zip(requests, first)]
        return [Argument(reasoning=f"try {attempt}", ranking=ranking) for ranking in rankings]
"""


def test_a_teacher_of_the_users_own(smoke, tmp_path, monkeypatch):
    (tmp_path / "my_teacher.py").write_text(TEACHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    facts = traces.run(other(smoke, tmp_path, trace_teacher="my_teacher:Mine", trace_mode="rejection"))
    assert facts["accepted_share"] == 1.0 and facts["grounded"] == 0.0
    assert {line["teacher"] for line in lines(tmp_path / "accepted.jsonl")} == {"mine"}
    # Its source is part of the stage's key.
    chosen = load_settings(config_dict={"preset": "smoke", "trace_teacher": "my_teacher:Mine"})
    keys = [pipeline.plan(chosen, smoke.data, stages=["traces"])[-1].key]
    (tmp_path / "my_teacher.py").write_text(TEACHER + "\n# changed\n")
    keys.append(pipeline.plan(chosen, smoke.data, stages=["traces"])[-1].key)
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("name", "text"),
    [("nobody", "there is no 'nobody'"), ("my_missing_module:X", "cannot import"), ("json:Missing", "cannot import")],
)
def test_teachers_that_do_not_exist(smoke, tmp_path, name, text):
    with pytest.raises(ConfigurationError, match=text):
        traces.run(other(smoke, tmp_path, trace_teacher=name))


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


def test_a_local_llm_teaches(smoke, tmp_path):
    facts = traces.run(other(smoke, tmp_path, trace_teacher="local_llm", trace_max_lists=6, trace_min_accepted=0.0))
    assert facts["requests"] == 6
    everything = lines(tmp_path / "accepted.jsonl") + lines(tmp_path / "rejected.jsonl")
    assert len(everything) == 6 and {line["teacher"] for line in everything} == {"local_llm"}


# --- sft -------------------------------------------------------------------------------------------------------------


def toy_trace(request: Request, ranking: tuple[int, ...], reasoning: str) -> Trace:
    return Trace(
        request_id=request.request_id,
        teacher="t",
        mode="targeted",
        reasoning=reasoning,
        ranking=ranking,
        accepted=True,
        reason="",
    )


@pytest.mark.parametrize("longest", [48, 3, 1, 0])
def test_a_training_row_by_hand(student, longest):
    _, tokenizer = student
    request = toy_request(11)
    prompt = toy_maker().render(request, order=(2, 0, 1))  # A is 12, B is 10, C is 11
    labels = tuple(tokenizer.convert_tokens_to_ids(f"<|{letter}|>") for letter in "ABC")
    grammar = Grammar(
        ranking_id=tokenizer.convert_tokens_to_ids("<|ranking|>"),
        label_ids=labels,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        max_reasoning=longest,
    )
    trace = toy_trace(request, (11, 10, 12), "The shopper takes comedies.")
    row = training_row(toy_maker(), request, prompt, trace, tokenizer, grammar)
    head = tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
    head = tokenizer(head, add_special_tokens=False)["input_ids"]
    said = tokenizer("The shopper takes comedies.", add_special_tokens=False)["input_ids"]
    said = said[: max(longest - 1, 0)]  # one place is left for the mark to be chosen
    a, b, c = labels
    assert row.input_ids == [*head, *said, grammar.ranking_id, c, b, a, grammar.eos_id]
    mark = 2 if longest else 0  # forced where there is no reasoning to end
    assert row.parts == [0] * len(head) + [1] * len(said) + [mark, 2, 2, 0, 0]  # last label and end are forced
    assert not grammar.was_truncated(row.input_ids[len(head) :])
    start = len(head) + len(said) + 1
    assert row.choices == {start: {a: 0, b: 0, c: 0}, start + 1: {a: 0, b: 0}}  # no evidence, and C is taken
    known = training_row(toy_maker(), replace(request, prior=(-1.0, -2.0, -3.0)), prompt, trace, tokenizer, grammar)
    assert (known.input_ids, known.parts) == (row.input_ids, row.parts)
    assert known.choices[start] == {a: -3.0, b: -1.0, c: -2.0} and known.drawn == set()
    drawn = training_row(toy_maker(), request, prompt, trace, tokenizer, grammar, drawn=True)
    assert drawn.drawn == {start + 1}  # behind the target
    graded = replace(request, grades=(1, 3, 1), split="train")
    drawn = training_row(toy_maker(), graded, prompt, trace, tokenizer, grammar, drawn=True)
    assert drawn.drawn == {start + 1}
    graded = replace(request, grades=(1, 3, 0), split="train")
    assert not training_row(toy_maker(), graded, prompt, trace, tokenizer, grammar, drawn=True).drawn


def test_a_grounded_training_row_by_hand(student):
    """What can be cited is a choice, what is forced or cannot be said has no loss, and no ID is cut in two."""
    _, tokenizer = student
    number, request = tokenizer.convert_tokens_to_ids, replace(toy_request(11), prior=(-1.0, -2.0, -3.0))
    prompt = toy_maker(history=1).render(request)  # shows items 3, 10, 11, 12: all first codes differ
    grammar = Grammar.of(tokenizer, "<|ranking|>", ["<|A|>", "<|B|>", "<|C|>"], 40, grounded=True)
    maker, said = toy_maker(history=1), f"Best {sid_text((11, 12))} or {sid_text((5, 6))}."
    row = training_row(maker, request, prompt, toy_trace(request, (11, 10, 12), said), tokenizer, grammar)
    head = row.parts.index(1)
    words = tokenizer.convert_ids_to_tokens(row.input_ids[head:])
    one, two = (place for place, word in enumerate(words) if word == "<|sid_begin|>")
    parts = row.parts[head:]
    assert [parts[one + step] for step in range(6)] == [1, 1, 0, 0, 0, 1]  # begin, codes, end, label, next word
    assert words[one + 3 : one + 5] == ["<|sid_end|>", "<|B|>"]
    assert [parts[two + step] for step in range(5)] == [1, 0, 0, 0, 1]  # it is not shown
    priors = {3: -3.0, 10: -1.0, 11: -2.0, 12: -3.0}  # item 3 is of the history
    assert row.choices[head + one + 1] == pytest.approx({number(f"<s_a_{n}>"): own for n, own in priors.items()})
    assert min(row.choices) == head + one + 1 and len(row.choices) == 3  # beside the first two of three labels
    for longest in range(one + 2, one + 6):  # the limit stands in the first citation
        short = replace(grammar, max_reasoning=longest)
        cut = training_row(maker, request, prompt, toy_trace(request, (11, 10, 12), said), tokenizer, short)
        assert cut.input_ids[head : head + one + 1] == [*row.input_ids[head : head + one], grammar.ranking_id]
        assert len(cut.choices) == 2
    answer = read_answer(request, row.input_ids[head:], maker.label_items(request, prompt), grammar, tokenizer)
    assert answer.reasoning.replace(" ", "") == said.replace(" ", "")  # read back without the label
    twins = replace(maker, items=[replace(item, sid=(7, 7)) for item in maker.items])
    prompt, trace = twins.render(request), toy_trace(request, (11, 10, 12), f"Best is {sid_text((7, 7))}")
    row = training_row(twins, request, prompt, trace, tokenizer, grammar)
    assert tokenizer.decode(row.input_ids).endswith(
        "<|sid_end|><|B|><|ranking|><|B|><|A|><|C|><|im_end|>"
    )  # B is the best


def test_what_the_taught_ranking_has_behind_its_first():
    request, ranking = replace(toy_request(11), prior=(-1.0, -2.0, -3.0)), (11, 12, 10)

    def taught(request: Request, others: str) -> tuple[int, ...]:
        return taught_ranking(request, ranking, others, seed=1)

    assert taught(request, "teacher") == ranking
    assert taught(request, "base") == (11, 10, 12)
    assert taught(replace(request, prior=()), "prior") == ranking
    several = [taught(replace(request, request_id=str(number)), "prior") for number in range(4000)]
    assert set(several) == {(11, 10, 12), ranking}
    assert several.count((11, 10, 12)) / 4000 == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)  # of 10 and 12 alone
    assert taught(request, "prior") == taught(request, "prior")


def test_sft_rows_of_the_run_fit(smoke, items, student):
    _, tokenizer = student
    maker, grammar = PromptMaker.of(smoke.settings, items), answer_grammar(tokenizer, smoke.settings)
    accepted = traces.accepted_traces(smoke, items)
    requests = [r for r in traces.training_requests(smoke, items, None, "sft") if r.request_id in accepted]
    rows = [training_row(maker, r, maker.render(r), accepted[r.request_id], tokenizer, grammar) for r in requests]
    assert len(rows) > 30
    for row in rows:
        assert len(row.input_ids) == len(row.parts) <= smoke.settings["sft_max_length"]
        assert row.parts.count(2) == smoke.settings["cand_num"]  # mark and nine labels, of all
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in row.input_ids


# --- midtrain --------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose tokens are letters; 0 ends a text."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


@settings(deadline=None)
@given(st.lists(st.text("abcdef", min_size=1, max_size=9), max_size=12), st.integers(3, 4), st.integers(12, 30))
def test_fitting_loses_no_piece_and_is_never_too_long(pieces, head, longest):
    texts = list(fitting(["H" * head, *pieces], Letters(), longest))
    whole = []
    for ids in texts:
        assert len(ids) <= longest
        assert ids[:head] == [ord("H")] * head and ids[-1] == 0
        whole += ids[head:-1]
    room = longest - head - 1
    assert whole == [ord(letter) for piece in pieces for letter in piece[:room]]
    cuts, borders = [0], {sum(len(piece[:room]) for piece in pieces[:n]) for n in range(len(pieces) + 1)}
    for ids in texts:
        cuts.append(cuts[-1] + len(ids) - head - 1)
    assert set(cuts) <= borders  # texts end between pieces
    assert len(texts) <= max(1, len(pieces))


def captured_histories(smoke, tmp_path, monkeypatch, **changes) -> dict:
    caught = {}

    def stop(items, histories, *args):
        caught["histories"] = histories
        raise StopIteration

    monkeypatch.setattr(midtrain, "task_texts", stop)
    with pytest.raises(StopIteration):
        midtrain.run(other(smoke, tmp_path, **changes))
    return dict(zip(smoke.data.train_sequences(), caught["histories"], strict=True))


def test_midtrain_leaves_the_targets_of_the_train_lists_out(smoke, tmp_path, monkeypatch):
    held = captured_histories(smoke, tmp_path, monkeypatch)
    whole = captured_histories(smoke, tmp_path, monkeypatch, mid_hold_out=False)
    for user, sequence in smoke.data.sequences.items():
        assert held[user] == sequence[:-3].tolist() and whole[user] == sequence[:-2].tolist()
        assert not set(smoke.data.targets(user, "train")) & set(held[user])


def test_mixture_fills_each_share(smoke, items):
    _, tokenizer = load_stage_model(smoke, "midtrain")
    histories = [tuple(s[:-3]) for s in smoke.data.train_sequences().values()]
    learnt, _ = general_texts(None, 2000, seed=1)
    texts, mix = task_texts(items, histories, learnt, smoke.settings), smoke.settings["mid_mix"]
    rows, longest = mixture(texts, tokenizer, mix, 6000, 256, seed=1), 256
    assert list(rows) == ["caption", "general", "persona", "sequential"]  # whatever the order of the setting
    assert rows == mixture(texts, tokenizer, dict(reversed(mix.items())), 6000, 256, seed=1)
    for part, (task, share) in enumerate(sorted(mix.items()), start=1):
        count = sum(len(row.input_ids) for row in rows[task])
        assert share * 6000 <= count < share * 6000 + 40 * longest, task
        assert all(len(row.input_ids) <= longest and set(row.parts) == {part} for row in rows[task])
    assert rows == mixture(texts, tokenizer, mix, 6000, 256, seed=1)
    assert rows != mixture(texts, tokenizer, mix, 6000, 256, seed=2)
    assert mixture(texts, tokenizer, {"persona": 1.0}, 0, 256, seed=1) == {"persona": []}
    few = mixture({"caption": texts["caption"][:3]}, tokenizer, {"caption": 1.0}, 500, 256, seed=1)["caption"]
    times = Counter(tuple(row.input_ids) for row in few)  # in passes: each text once before any comes again
    assert len(times) == 3 and max(times.values()) - min(times.values()) <= 1 < min(times.values())
    with pytest.raises(ConfigurationError, match="unknown tasks"):
        task_texts(items, histories, (), {**dict(smoke.settings), "mid_mix": {"poems": 1.0}})


def test_general_texts(tmp_path):
    learnt, held = general_texts(None, 500, seed=1)
    assert len(held) == midtrain.HELD_OUT and not set(held) & set(learnt) and 2000 <= sum(map(len, learnt)) < 12000
    assert general_texts(None, 500, seed=1) == (learnt, held) != general_texts(None, 500, seed=2)
    assert general_texts(None, 0, seed=1) == ([], held)
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Paragraph {letter} is " + "long " * 40 for letter in "ABC") + "\n\nshort\n\n")
    learnt, held = general_texts(str(file), 1000, seed=1)
    assert len(learnt) == 1 and len(held) == 2 and all(part.startswith("Paragraph ") for part in learnt + held)
    file.write_text("short\n")
    with pytest.raises(ConfigurationError, match="no paragraph"):
        general_texts(str(file), 1000, seed=1)
    with pytest.raises(MissingFileError, match="there is no text file"):
        general_texts(str(tmp_path / "absent.txt"), 1000, seed=1)


def test_midtrain_trains_the_embeddings_first(uninterrupted):
    """Two logs in one: the first phase knows one task, the second logs each task's loss by itself."""
    folder = uninterrupted[1]["midtrain"]
    log, facts = json.loads((folder / "log.json").read_text()), pipeline.read_manifest(folder).facts
    assert "loss/persona" in log[0] and not {"loss/sequential", "loss/general"} & set(log[0])
    assert {f"loss/{task}" for task in ("sequential", "persona", "caption", "general")} <= set().union(*log)
    assert facts["embedding_tokens"] >= 1500 and facts["tokens"]["general"] > 0
    assert facts["perplexity"]["after"] > 1 and 1 < facts["perplexity"]["before"] < 1e6
    assert not list((folder / "checkpoints").rglob("checkpoint-*"))


def test_the_corpus_depends_on_nothing_outside_midtrains_key(smoke):
    texts = [corpus(smoke.data.items[:30], {**dict(smoke.settings), "prompt_history": n}) for n in (2, 9)]
    assert texts[0] == texts[1]


# --- likelihood ------------------------------------------------------------------------------------------------------


def test_continuation_log_likelihood_is_that_of_a_plain_forward(student):
    from recbole_gr2.llm.likelihood import continuation_log_likelihood

    model, tokenizer = student
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 400) for _ in range(length)] for length in (7, 1, 30, 7, 12)]
    continuations = [[[rng.randrange(5, 400) for _ in range(6)] for _ in range(count)] for count in (3, 3, 3, 2, 5)]
    for batch_size in (1, 2, 16):
        scores = continuation_log_likelihood(
            model, prompts, continuations, pad_id=tokenizer.pad_token_id, batch_size=batch_size
        )
        for prompt, options, row in zip(prompts, continuations, scores, strict=True):
            assert len(row) == len(options)
            for option, score in zip(options, row, strict=True):
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + option])).logits[0].log_softmax(-1)
                plain = sum(logits[len(prompt) - 1 + n, token].item() for n, token in enumerate(option))
                assert score == pytest.approx(plain, abs=1e-3)


def test_perplexity_is_that_of_a_plain_forward(student):
    from recbole_gr2.llm.likelihood import perplexity

    model, tokenizer = student
    texts = [[5, 9, 30, 31], [7, 8], [40, 41, 42, 43, 44, 45, 46]]
    total, count = 0.0, 0
    for ids in texts:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logits[n - 1, ids[n]].item() for n in range(1, len(ids)))
        count += len(ids) - 1
    for batch_size in (1, 2, 8):
        found = perplexity(model, texts, pad_id=tokenizer.pad_token_id, batch_size=batch_size)
        assert found == pytest.approx(math.exp(total / count), rel=1e-4)


# --- a run that was killed -------------------------------------------------------------------------------------------

TINY = {
    "preset": "smoke",
    "base_epochs": 1,
    "mid_tokens": 9000,
    "mid_embedding_tokens": 1500,
    "mid_batch_size": 8,
    "mid_micro_batch_size": 8,
    "mid_save_steps": 2,
    "sft_steps": 11,
    "sft_save_steps": 2,
    "sft_check_lists": 4,
    "models": ["BPR", "Pop"],
    "models_words": {"epochs": 1},
    "eval_rows": list(pipeline.RERANKERS),
    "rl_steps": 3,
    "distill_steps": 3,
    "rl_save_steps": 1,
    "prompt_max_reasoning": 12,
    "rl_overlong_buffer": 4,
    "ort_steps": 11,
    "ort_save_steps": 2,
    "eval_draws": 200,
}
# Twice the speed settings: same keys, same results.
FASTER = {
    "mid_save_steps": 4,
    "sft_save_steps": 4,
    "rl_save_steps": 2,
    "ort_save_steps": 4,
    "eval_batch_lists": 128,
    "eval_batch_size": 2048,
}
# Stage -> what its console line says when the process is killed. Steps are behind a checkpoint but not at one. Of the
# re-rankers, which all start again and write one file, one stands for all.
KILLS = {
    "embeddings": "texts embedded",
    "tokenizer": "uniqueness",
    "midtrain": "  step 5/",
    "candidates": "hold-out base: 1 epochs",
    "evidence": "test: 23 facts",
    "traces": "try 1:",
    "sft": "  step 7/11",
    "distill": "step 4/6",
    "rl": "step 4/6",
    "internalise": "step 4/6",
    "onerec_think": "  step 7/11",
    "onerec_think-no-think": "  step 7/11",
    "BPR": "BPR epoch 1",
    "Pop": "Pop: ",
    "rerank_sft": "  sft: ",
    "evaluate": "hold their target",
}


class Recorded(Settings):
    """Settings that remember which of them were read, stage by stage."""

    def __init__(self, of: Settings) -> None:
        super().__init__(of._values, of.recbole, of._known, of.origin)
        self.stage, self.read = "", {}

    def __getitem__(self, key):
        value = super().__getitem__(key)
        self.read.setdefault(self.stage, set()).add(key)
        return value


class Watching(Console):
    """A console that tells `Recorded` which stage is running."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self.recorded, self.stages = recorded, {stage.name for stage in pipeline.stage_table(recorded)}

    def say(self, text):
        super().say(text)
        name, _, rest = text.partition(":")
        if name in self.stages and rest.startswith(" run"):
            self.recorded.stage = name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(settings as read, stage -> folder) of a tiny run nobody stopped, with other speed settings."""
    root = tmp_path_factory.mktemp("whole")
    chosen = Recorded(load_settings(config_dict={**TINY, **FASTER, "checkpoint_dir": str(root)}))
    data = Data(chosen)
    planned = pipeline.plan(chosen, data)
    assert {entry.action for entry in planned} == {"run"}
    pipeline.execute(planned, chosen, data, Watching(chosen))
    return chosen, {entry.stage.name: entry.folder for entry in planned}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(exit code and lines said of every start, stage -> folder) of the same run, killed once in each of its stages."""
    root, starts = tmp_path_factory.mktemp("killed"), []
    argv = [*(f"--{key}={value}" for key, value in TINY.items()), f"--checkpoint_dir={root}"]
    say = Console.say
    for stage, text in (*KILLS.items(), ("none", "nothing that is ever said")):
        said = []

        def kill(self, line, stage=stage, text=text, said=said):
            say(self, line)
            said.append(line)
            now = [name for name, _, rest in (each.partition(": ") for each in said) if rest[:3] in ("run", "res")]
            if text in line and now[-1:] == [stage]:  # rl and internalise say the same
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Console, "say", kill)
            starts.append((main(argv), said))
    stages = root / "gr2" / "ml-100k" / "stages"
    return starts, {folder.name: next(folder.iterdir()) for folder in stages.iterdir()}


def test_it_was_killed_once_in_every_stage(killed):
    starts, folders = killed
    table = [stage.name for stage in pipeline.stage_table(load_settings(config_dict=TINY))]
    rows = {f"rerank_{row}" for row in pipeline.RERANKERS}
    assert folders.keys() == set(table) and list(KILLS) == [name for name in table if name in KILLS or name not in rows]
    assert [code for code, _ in starts] == [130] * len(KILLS) + [0]
    for (_, said), text in zip(starts, KILLS.values(), strict=False):
        assert text in said[-1]
    for name, folder in folders.items():
        assert len(list(folder.parent.iterdir())) == 1 and not (folder / pipeline.CLOCK).exists(), name


def same_files(one: Path, two: Path) -> int:
    from safetensors.torch import load_file

    if one.suffix == ".safetensors":
        left, right = load_file(one), load_file(two)
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), f"{one} {name}"
    else:
        assert one.read_bytes() == two.read_bytes(), one
    return 1


@pytest.mark.parametrize(
    ("stage", "files"),
    [
        (
            "candidates",
            [
                "train.jsonl",
                "valid.jsonl",
                "test.jsonl",
                "stats.json",
                "base/model.safetensors",
                "hold_out_base/model.safetensors",
            ],
        ),
        ("embeddings", ["embeddings.npy"]),
        ("tokenizer", ["rqvae.safetensors", "sids.jsonl", "health.json"]),
        ("evidence", ["prior.safetensors", "train.jsonl", "valid.jsonl", "test.jsonl", "facts.json"]),
        ("midtrain", ["model/model.safetensors", "model/tokenizer.json", "samples.json"]),
        ("traces", ["accepted.jsonl", "rejected.jsonl"]),
        ("sft", ["model/model.safetensors", "samples.json"]),
        ("rl", ["model/model.safetensors", "checkpoints/rollouts.jsonl"]),
        ("distill", ["model/model.safetensors", "checkpoints/rollouts.jsonl"]),
        ("internalise", ["model/model.safetensors", "checkpoints/rollouts.jsonl"]),
        ("onerec_think", ["model/model.safetensors", "sample.txt"]),
        ("onerec_think-no-think", ["model/model.safetensors", "sample.txt"]),
        ("BPR", ["model/model.safetensors", "test.json"]),
        ("Pop", ["model/model.safetensors", "test.json"]),
        *((f"rerank_{row}", ["rankings.jsonl"]) for row in pipeline.RERANKERS),
        ("evaluate", ["rows.json", "per_user.csv"]),
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(uninterrupted, killed, stage, files):
    whole, again = uninterrupted[1][stage], killed[1][stage]
    assert whole.name == again.name  # the key
    assert sum(same_files(whole / file, again / file) for file in files) == len(files)


def test_baselines_have_rows_over_all_users(uninterrupted):
    folders = uninterrupted[1]
    rows = {(row["row"], row["scope"]): row for row in json.loads((folders["evaluate"] / "rows.json").read_text())}
    base = rows["base", "all"]
    for name in ("BPR", "Pop"):
        assert (name, "in_list") not in rows
        row, test = rows[name, "all"], json.loads((folders[name] / "test.json").read_text())
        assert row["n"] == len(test["ranks"]) == len(set(test["users"])) == base["n"] and row["unchanged"] is None
        for k in (1, 5, 10):  # RecBole's metrics and our ranks say the same
            hits = sum(rank <= k for rank in test["ranks"]) / row["n"]
            assert row["metrics"][f"recall@{k}"] == pytest.approx(hits, abs=6e-5)
        difference = row["metrics"]["recall@5"] - base["metrics"]["recall@5"]
        assert row["vs_base"]["recall@5"]["diff"] == pytest.approx(difference, abs=1.1e-4)
        assert row["vs_base"]["recall@5"]["p_holm"] >= row["vs_base"]["recall@5"]["p"]


def test_lambdamart_learns_from_the_lists_of_gr2(smoke, items):
    test = load_requests(smoke, "test", items)[:50]
    rankings, how = lambdamart_rankings(smoke, items, test)
    assert all(sorted(rankings[r.request_id]) == sorted(r.items) for r in test) and how["trees"] >= 1
    false = [replace(r, target=r.items[0]) for r in test]
    assert lambdamart_rankings(smoke, items, false)[0] == rankings
    known = load_described(smoke, "test", test[::-1])
    facts = [each.facts for each in known]
    assert [len(table) for table in facts] == [len(r.items) for r in test[::-1]]
    assert [each.pairs.shape[:2] for each in known] == [(len(r.items), min(len(r.history), 10)) for r in test[::-1]]
    training = [sequence.tolist() for sequence in smoke.data.train_sequences().values()]
    observed = Observed(items=smoke.data.items, sequences=training, embeddings=load_embeddings(smoke))
    _, again = collect(test[::-1], smoke.settings["evidence_providers"], observed)
    assert all(
        np.array_equal(*parts) for one, two in zip(known, again, strict=True) for parts in zip(one, two, strict=False)
    )
    names = json.loads((smoke.folders["evidence"] / "facts.json").read_text())
    assert [row.tolist() for row in facts[0][:, [names.index("rank")]].T] == [list(range(1, len(facts[0]) + 1))]


def test_an_internalised_answer_is_a_ranking_alone(uninterrupted):
    chosen, folders = uninterrupted
    answers = lines(folders["rerank_internalised"] / "rankings.jsonl")
    assert {line["output_tokens"] for line in answers} == {1 + chosen["cand_num"] + 1}  # mark, labels, end
    assert {(line["reasoning"], line["status"]) for line in answers} == {("", "ok")}
    assert {line["ranking"][0] for line in answers} != {line["ranking"][0] for line in answers[:1]}


@pytest.mark.parametrize("row", load_settings(config_dict={})["eval_rows"])
def test_rankings_are_those_the_table_is_made_of(smoke, smoke_run, items, row):
    import pandas as pd

    rankings = load_rankings(smoke_run.stages[f"rerank_{row}"], items)
    _, in_list = reported_lists(smoke, items)
    assert all(sorted(rankings[r.request_id]) == sorted(r.items) for r in in_list) and len(rankings) == len(in_list)
    table = pd.read_csv(smoke_run.stages["evaluate"] / "per_user.csv", dtype={"user": str}).set_index("user")[row]
    assert {r.user_token: rankings[r.request_id].index(r.target) + 1 for r in in_list} == table.to_dict()


def test_checkpoints_were_used(killed):
    """A run that starts from the beginning again would pass the comparison, too."""
    starts, _ = killed
    for stage, first in (
        ("midtrain", "  step 5/"),
        ("sft", "  step 7/"),
        ("distill", "  step 4/"),
        ("rl", "  step 4/"),
        ("internalise", "  step 4/"),
        ("onerec_think", "  step 7/"),
    ):
        _, said = starts[list(KILLS).index(stage) + 1]
        assert any(line.startswith(f"{stage}: resume") for line in said)
        assert next(line for line in said if line.startswith("  step ")).startswith(first)
    first = pipeline.NAMES.index("candidates")  # the base of that start is loaded by the next one, not trained again
    assert [sum("epoch 1: " in line for line in starts[n][1]) for n in (first, first + 1)] == [1, 0]


ALWAYS = {"dataset", "checkpoint_dir", "data_path", "preset"}  # in the folder's path, or without an effect
# Read by PromptMaker.of, without a trace in what midtrain writes; each of `models` is among what evaluate needs.
KNOWN = {("midtrain", "prompt_history"), ("midtrain", "prompt_shuffle"), ("evaluate", "models")}


def test_every_setting_a_stage_reads_is_in_its_key(uninterrupted):
    """Else a changed setting would be answered from the cache."""
    chosen, _ = uninterrupted
    stages = {stage.name: stage for stage in pipeline.stage_table(chosen)}
    covered: dict[str, set[str]] = {}
    for name, stage in stages.items():
        covered[name] = set(chosen.results(stage.settings)) | ALWAYS
        covered[name] |= set(chosen.recbole_results()) if stage.recbole else set()
        covered[name].update(*(covered[need] for need in stage.needs))
    speed = {key for key, entry in chosen._known.items() if entry.speed}
    assert set(chosen.read) >= set(stages) and sum(map(len, chosen.read.values())) > 60
    for name in stages:
        missing = chosen.read[name] - covered[name] - speed
        assert {(name, key) for key in missing} <= KNOWN


def test_a_stage_folder_can_be_moved(killed, tmp_path):
    """Nothing in a folder names an absolute path of the run that wrote it, but checkpoints."""
    _, folders = killed
    moved = shutil.copytree(folders["sft"] / "model", tmp_path / "model")
    from recbole_gr2.llm.backbone import load_saved

    model, tokenizer = load_saved(moved)
    assert model.get_input_embeddings().weight.size(0) == len(tokenizer)


# --- the generator ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """(settings, stage -> folder) of a run whose base model is the mid-trained language model."""
    root = tmp_path_factory.mktemp("generator")
    chosen = load_settings(
        config_dict={
            **TINY,
            "base_model": "GR2Generator",
            "models": ["GR2Generator", "Pop"],
            "evidence_steps": 50,
            "checkpoint_dir": str(root),
        }
    )
    data = Data(chosen)
    planned = pipeline.plan(chosen, data, stages=["GR2Generator", "Pop", "evidence"])
    pipeline.execute(planned, chosen, data, Console())
    return chosen, data, {entry.stage.name: entry.folder for entry in planned}


def test_the_generator_is_a_base_model(generated):
    _chosen, data, folders = generated
    items = load_items(folders["tokenizer"], data.items)
    for split in ("train", "valid", "test"):
        requests = read_requests(folders["candidates"] / f"{split}.jsonl", items)
        assert len(requests) > 900
        for request in requests[:100]:
            assert 2 <= len(set(request.items)) == len(request.items) <= 10
            assert not set(request.items) & set(request.history)
            scores = [candidate.score for candidate in request.candidates]
            assert scores == sorted(scores, reverse=True) and scores[-1] > -1e3 and scores[0] < 0


def test_the_generators_row_is_that_of_its_lists(generated):
    """Recall@10 as a recommender is the share of its own lists that hold the target."""
    _, data, folders = generated
    facts = pipeline.read_manifest(folders["GR2Generator"]).facts
    stats = json.loads((folders["candidates"] / "stats.json").read_text())["test"]
    assert facts["metrics"]["recall@10"] == pytest.approx(stats["recall@10"], abs=6e-5)
    assert facts["metrics"]["recall@1"] == pytest.approx(stats["recall@1"], abs=6e-5)


def test_a_generator_that_saw_the_targets_proposes_no_train_lists(smoke, tmp_path):
    from recbole_gr2.stages.candidates import recommender

    context = other(smoke, tmp_path, base_model="GR2Generator", mid_hold_out=False)
    with pytest.raises(ConfigurationError, match="has seen their targets"):
        recommender(context, tmp_path, hold_out=True)


def test_examples_show_where_the_target_went():
    """Up from 3 to 1, up from 2 to 1, unmoved, down from 1 to 2: no list that did not move is shown."""
    items = [replace(item, title=f"Thing {item.item_id}") for item in toy_items()]
    moves = {"a": (12, (12, 10, 11)), "b": (11, (11, 10, 12)), "c": (10, (10, 12, 11)), "d": (10, (11, 10, 12))}
    requests = [replace(toy_request(target), request_id=name) for name, (target, _) in moves.items()]
    said = {name: f" Best is {sid_text((12, 13))}, {sid_text((99, 99))}" for name in moves}
    rankings = {name: ranking for name, (_, ranking) in moves.items()}
    text = evaluate.examples(requests, "rl", rankings, said, items, 2)
    assert [line for line in text.splitlines() if "target from" in line] == [
        "a, target from 3 to 1. History:",
        "b, target from 2 to 1. History:",
        "d, target from 1 to 2. History:",
    ]
    first = text.split("b, target")[0].splitlines()
    assert "- Thing 1 (Kind1)" not in first and "- Thing 2 (Kind2)" in first and "- Thing 3 (Kind0)" in first
    table = [line.split() for line in first if line.endswith("(Kind0)") and "Thing 12" in line]
    assert table == [["3", "1", "taken", "Thing", "12", "(Kind0)"]]
    assert f"> Best is [Thing 12], {sid_text((99, 99))}" in first  # an ID of no item stays as it is
