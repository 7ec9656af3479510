"""Teachers: how they are built, what they reply, and which labels they receive."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.sid.tokens import RANKING, added_tokens, label_tokens, sid_text
from recbole_gr2.teachers import RulesTeacher, TeacherReply, ask, build_teacher, find_teacher, phrases, true_statements
from recbole_gr2.types import Candidate, Item, Request

CATALOG = Catalog(
    Item(
        item_id=n,
        token=f"t{n}",
        title=f"Title{n}x",
        categories=f"Root > Kind{n % 3}",
        brand=f"Brand{n % 2}",
        sid=(n, n + 1),
    )
    for n in range(1, 31)
)
SETTINGS = {
    "trace_temperature": 1.0,
    "prompt_history": 8,
    "prompt_template": "rerank",
    "prompt_items": "text",
    "prompt_title_chars": 60,
    "prompt_shuffle": False,
    "seed": 2020,
    "trace_file": None,
}


def request_of(target: int = 11, history=(1, 2, 3), candidates=(10, 11, 12), **values) -> Request:
    return Request(
        request_id=values.pop("request_id", "train/u"),
        user_token="u",
        split="train",
        history=tuple(history),
        candidates=tuple(Candidate(item_id=i, score=-float(r), rank=r) for r, i in enumerate(candidates, start=1)),
        target=target,
        provider="p",
        **values,
    )


def build(name: str, **changes):
    catalog = changes.pop("catalog", CATALOG)
    return build_teacher(
        name,
        catalog=catalog,
        settings={**SETTINGS, **changes},
        seed=1,
        language_model=changes.pop("language_model", None),
    )


# --- the interface ---------------------------------------------------------------------------------------------------

TEACHER = """
from recbole_gr2.teachers import TeacherReply


class Mine:
    name = "mine"

    def __init__(self, *, catalog, settings, seed):
        self.catalog, self.length, self.seed = catalog, settings["prompt_title_chars"], seed

    def argue(self, requests, *, targeted, attempt):
        replies = []
        for request in requests:
            first = self.catalog.item(request.target or request.items[attempt])
            text = f"{first.title[: self.length]} {first.sid} {self.seed}"
            others = (item for item in request.items if item != first.item_id)
            replies.append(TeacherReply(reasoning=text, ranking=(first.item_id, *others)))
        return replies


def factory(**given):
    return Mine(**given)
"""


@pytest.mark.parametrize("attribute", ["Mine", "factory"])
def test_a_custom_teacher_receives_catalogue_settings_and_seed(tmp_path, monkeypatch, attribute):
    (tmp_path / "teacher_of_titles.py").write_text(TEACHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    teacher = build(f"teacher_of_titles:{attribute}", prompt_title_chars=7)
    assert ask(teacher, [request_of(12)], targeted=True, attempt=0) == [
        TeacherReply(reasoning="Title12 (12, 13) 1", ranking=(12, 10, 11))
    ]
    assert ask(teacher, [request_of(12)], targeted=False, attempt=1)[0].ranking == (11, 10, 12)  # no label


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rule", "did you mean rules"),
        ("nobody", "there is no 'nobody'"),
        ("my_missing_module:X", "cannot import"),
        ("json:Missing", "cannot import"),
        ("json:dmups", "the module has dumps"),
    ],
)
def test_teachers_that_do_not_exist(name, message):
    with pytest.raises(ConfigurationError, match=message):
        build(name)


@pytest.mark.parametrize("targeted", [True, False])
def test_only_targeted_requests_have_labels(targeted):
    received = []

    def argue(requests, *, targeted, attempt):
        received.extend(requests)
        return [TeacherReply(reasoning="", ranking=()) for _ in requests]

    request = request_of(11, grades=(0, 2, 1))
    ask(SimpleNamespace(name="spy", argue=argue), [request], targeted=targeted, attempt=0)
    assert received == [request if targeted else request.without_labels()]


def test_replies_of_another_number_or_type_are_refused():
    few = SimpleNamespace(name="few", argue=lambda requests, **given: [])
    with pytest.raises(GR2Error, match="0 replies to 1 requests"):
        ask(few, [request_of()], targeted=True, attempt=0)
    text = SimpleNamespace(name="text", argue=lambda requests, **given: ["because"])
    with pytest.raises(GR2Error, match="returned a str instead of a TeacherReply"):
        ask(text, [request_of()], targeted=True, attempt=0)


WRONG = """
from recbole_gr2.teachers import TeacherReply


class Teacher:
    name = "wrong"

    def __init__(self, *, catalog, settings, seed):
        pass

    def argue(self, requests, *, targeted, attempt):
        return [self.reply(request) for request in requests]


class Fails(Teacher):
    def reply(self, request):
        return request.nothing


class NoList(Teacher):
    def argue(self, requests, *, targeted, attempt):
        return None


class Unknown(Teacher):
    def reply(self, request):
        return TeacherReply(reasoning="x", ranking=(999, *request.items[1:]))


class Foreign(Teacher):
    def reply(self, request):
        return TeacherReply(reasoning="x", ranking=(1, *request.items[1:]))


class NotBuilt(Teacher):
    def __init__(self, *, catalog, settings, seed):
        raise RuntimeError("no key")


class Silent:
    name = "silent"

    def __init__(self, *, catalog, settings, seed):
        pass


class Unnamed(Teacher):
    name = None


class OldInit(Teacher):
    def __init__(self, catalog):
        pass


class OldArgue(Teacher):
    def argue(self, requests):
        return []


def factory(**given):
    return Silent(**given)
"""


def test_wrong_teachers_of_a_user(tmp_path, monkeypatch):
    (tmp_path / "wrong_teachers.py").write_text(WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))
    for attribute, message in (
        ("Fails", r"wrong_teachers:Fails' raised AttributeError: .*wrong_teachers.py:17\)"),
        ("NoList", "argue returned an object of the type NoneType"),
    ):
        with pytest.raises(GR2Error, match=message):
            ask(build(f"wrong_teachers:{attribute}"), [request_of(12)], targeted=True, attempt=0)
    for attribute in ("Unknown", "Foreign"):  # One such reply does not end a run of thousands.
        (reply,) = ask(build(f"wrong_teachers:{attribute}"), [request_of(12)], targeted=True, attempt=0)
        assert (reply.ranking, reply.problem) == ((), "the ranking contains items that are no candidates")
    with pytest.raises(GR2Error, match=r"wrong_teachers:NotBuilt' raised RuntimeError: no key"):
        build("wrong_teachers:NotBuilt")
    for attribute in ("Unnamed", "factory"):
        with pytest.raises(ConfigurationError, match="has no method argue, or its attribute `name` is no text"):
            build(f"wrong_teachers:{attribute}")
    for attribute, message in (
        ("Silent", "has no method argue"),
        ("OldInit", r"cannot be called as teacher\(catalog=..., settings=..., seed=...\)"),
        ("OldArgue", r"OldArgue.argue' cannot be called as argue\(requests, targeted=..., attempt=...\)"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            find_teacher(f"wrong_teachers:{attribute}")


# --- rules -----------------------------------------------------------------------------------------------------------


def test_the_first_attempt_has_the_highest_prior_first_and_later_ones_sample():
    teacher, requests = (
        build("rules"),
        [request_of(request_id=f"train/{n}", prior=(-2.0, -0.5, -1.5)) for n in range(200)],
    )
    assert {reply.ranking for reply in teacher.argue(requests, targeted=False, attempt=0)} == {(11, 12, 10)}
    firsts = [reply.ranking[0] for reply in teacher.argue(requests, targeted=False, attempt=1)]
    assert firsts.count(11) > firsts.count(12) > firsts.count(10) > 0
    assert firsts != [reply.ranking[0] for reply in teacher.argue(requests, targeted=False, attempt=2)]
    cold = build("rules", trace_temperature=0.01)
    assert {reply.ranking[0] for reply in cold.argue(requests, targeted=False, attempt=1)} == {11}


def test_without_labels_the_rules_teacher_says_the_same():
    teacher, requests = build("rules"), [request_of(target, request_id=f"train/{target}") for target in (10, 11, 12)]
    for attempt in (0, 1, 5):
        replies = teacher.argue(requests, targeted=False, attempt=attempt)
        assert replies == teacher.argue([r.without_labels() for r in requests], targeted=False, attempt=attempt)
    targeted = teacher.argue(requests, targeted=True, attempt=0)
    assert [reply.ranking[0] for reply in targeted] == [10, 11, 12]


def test_the_rules_teacher_looks_at_the_history_of_the_prompt():
    """The prompt contains items 2 and 3. Only item 1 has the brand and the category of candidate 13."""
    catalog = Catalog(
        replace(item, brand=f"Brand{item.item_id % 4}", categories=f"Root{item.item_id % 4} > Kind") for item in CATALOG
    )
    request = request_of(13, candidates=(13, 14))
    texts = {n: build("rules", catalog=catalog, prompt_history=n).text(request, 13) for n in (2, 3)}
    assert ", the same brand, Brand1. Best" in texts[3] and ", something new beside them. Best" in texts[2]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_statements_of_the_rules_teacher_are_true(data):
    """For any items, with and without categories and brands."""
    paths, brands = ["", "One", "Root > A", "Root > A and B", "Root > A > C, D"], ["", "X", "Y, Z. Q"]
    drawn = data.draw(st.lists(st.tuples(st.sampled_from(paths), st.sampled_from(brands)), min_size=8, max_size=8))
    catalog = Catalog(
        Item(item_id=n, token=f"t{n}", title=f"Title {n}", categories=path, brand=brand, sid=(n, 0))
        for n, (path, brand) in enumerate(drawn, start=1)
    )
    request = request_of(6, history=(1, 2, 3, 4, 5), candidates=(6, 7, 8))
    history, choice = data.draw(st.integers(0, 6)), data.draw(st.sampled_from(request.items))
    teacher = RulesTeacher(catalog=catalog, settings={**SETTINGS, "prompt_history": history}, seed=0)
    text = teacher.text(request, choice)
    assert true_statements(f" {text} ", request, catalog, history) == {"habit": True, "kind": True, "why": True}, text


def test_false_statements():
    """Candidate 12 is a Kind0 of Brand0. The history contains Kind1, Kind2, Kind0 of Brand1, Brand0, Brand1."""
    request, sid = request_of(11, history=(1, 2, 3)), sid_text((12, 13))

    def check(habit="Kind1 and Kind0", kind="Kind0", why="the same kind", cited=sid, history=8):
        text = f"The shopper takes {habit}. {cited}: {kind}, {why}. Best is {sid_text((10, 11))}"
        return "".join(str(int(true)) for true in true_statements(text, request, CATALOG, history).values())

    assert check() == "111" and check(habit="Kind2") == "111" and check(history=1) == "011"
    assert check(habit="Kind1 and Kind7") == "011" and check(habit="Kind1 or Kind0") == "011"
    assert check(kind="Kind1") == "101" and check(kind="Kind") == "101"
    assert check(why="the same brand, Brand0") == "111" and check(why="the same brand, Brand0", history=1) == "010"
    assert check(why="the same brand, Brand1") == "110"  # a brand of the history, but not of the candidate
    assert check(why="it goes with Kind1") == "111" and check(why="it goes with Kind5") == "110"
    assert check(why="something new beside them") == "110"
    assert check(cited=sid_text((1, 2))) == "000"  # not a candidate
    assert check(why="because") == "000" and set(true_statements("", request, CATALOG, 8).values()) == {False}


def test_statements_about_candidates_with_the_same_semantic_id():
    """A statement is about the candidate for which it is true, whatever the order of the list."""
    items = [Item(item_id=n, token=f"t{n}", title="T", sid=(n // 2, 0)) for n in (1, 2, 3)]
    cited = sid_text((1, 0))  # of items 2 and 3
    text = f"The shopper takes A. {cited}: A, the same kind. Best is {cited}"
    for b_is in (2, 3):
        catalog = Catalog(replace(i, categories="B" if i.item_id == b_is else "A") for i in items)
        for order in ((2, 3), (3, 2)):
            request = request_of(2, history=(1,), candidates=order)
            assert all(true_statements(text, request, catalog, 1).values())


def test_the_sentences_and_the_phrases_of_the_vocabulary():
    """Published results depend on these texts."""
    assert build("rules").text(request_of(), 12) == (
        f"The shopper takes Kind1 and Kind2. {sid_text((12, 13))}: Kind0, the same brand, Brand0. Best is "
        f"{sid_text((12, 13))}"
    )
    assert phrases() == [
        "The shopper takes A and B. <",
        ": A, the same brand, A. Best is <",
        ", the same kind.",
        ", it goes with A.",
        ", something new beside them.",
        " items like A",
        "The shopper took A. Say why, in one sentence.",
    ]


@pytest.mark.parametrize("temperature", [0.0, 1e-4, 1e4])
def test_the_rules_teacher_samples_at_every_temperature(temperature):
    teacher, request = build("rules", trace_temperature=temperature), request_of(prior=(-900.0, -1.0, -5.0))
    firsts = {teacher.argue([request], targeted=False, attempt=attempt)[0].ranking[0] for attempt in range(20)}
    assert firsts == ({10, 11, 12} if temperature > 1 else {11})


# --- recorded --------------------------------------------------------------------------------------------------------


def test_recorded_replies_are_used_by_attempt_and_completed_by_the_prior(tmp_path):
    file = tmp_path / "traces.jsonl"
    records = [
        {"request_id": "train/u", "reasoning": "First.", "ranking": ["t12"]},
        {"request_id": "train/u", "reasoning": "Second.", "ranking": ["t11", "t25", "t10", "t12"]},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    teacher, request = build("recorded", trace_file=str(file)), request_of(prior=(-3.0, -1.0, -2.0))
    replies = [teacher.argue([request], targeted=False, attempt=attempt)[0] for attempt in range(3)]
    assert replies == [
        TeacherReply(reasoning="First.", ranking=(12, 11, 10)),
        TeacherReply(reasoning="Second.", ranking=(11, 10, 12)),
        TeacherReply(reasoning="", ranking=(11, 12, 10)),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"request_id": "train/u", "reasoning": "x", "ranking": ["no such item"]}, "the line cannot be read: KeyError"),
        ({"request_id": "train/u", "ranking": ["t12"]}, "the line cannot be read: KeyError"),
        ({"request_id": "train/u", "reasoning": "x", "ranking": 3}, "the line cannot be read: TypeError"),
        ({"request_id": "train/u", "reasoning": 3, "ranking": ["t12"]}, "the line cannot be read: TypeError"),
        ({"request_id": "train/u", "reasoning": "x", "ranking": [["t12"]]}, "the line cannot be read: TypeError"),
        (["train/u", "x", ["t12"]], "the line cannot be read: TypeError"),
    ],
)
def test_a_wrong_record_is_refused(tmp_path, record, message):
    (tmp_path / "traces.jsonl").write_text("\n" + json.dumps(record) + "\n")
    with pytest.raises(GR2Error, match=rf"(?s){message}.*traces.jsonl:2"):
        build("recorded", trace_file=str(tmp_path / "traces.jsonl"))


@pytest.mark.parametrize("ranking", [[], ["t25"], ["t25", "t12"]])
def test_a_record_of_another_list_is_rejected(tmp_path, ranking):
    """It would otherwise become the order of the prior, with a reasoning for something else."""
    record = {"request_id": "train/u", "reasoning": "x", "ranking": ranking}
    (tmp_path / "traces.jsonl").write_text(json.dumps(record) + "\n")
    teacher = build("recorded", trace_file=str(tmp_path / "traces.jsonl"))
    (reply,) = teacher.argue([request_of()], targeted=False, attempt=0)
    assert (reply.ranking, reply.problem) == ((), "the first item of the line is no candidate")


def test_the_recorded_teacher_needs_a_file(tmp_path):
    with pytest.raises(ConfigurationError, match="the recorded teacher needs a file"):
        build("recorded")
    with pytest.raises(MissingFileError, match="gone.jsonl"):
        build("recorded", trace_file=str(tmp_path / "gone.jsonl"))


# --- a local language model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_model():
    """A tiny untrained model with its answer grammar."""
    from recbole_gr2.llm.grammar import Grammar
    from recbole_gr2.llm.model import load_language_model
    from recbole_gr2.prompts import PromptMaker

    texts = [m["content"] for m in PromptMaker.of(SETTINGS, CATALOG).render(request_of()).messages]
    model, tokenizer = load_language_model(
        "random",
        corpus=[*texts, *phrases()],
        extra_tokens=added_tokens(2, 32, 3),
        random_config={"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32},
    )
    grammar = Grammar.of(tokenizer, RANKING, label_tokens(3), 6)
    return SimpleNamespace(model=model, tokenizer=tokenizer, grammar=grammar, bf16=False, engine="transformers")


def test_a_local_language_model_replies_under_the_grammar(language_model):
    teacher = build_teacher(
        "local_llm", catalog=CATALOG, settings=SETTINGS, seed=1, language_model=lambda: language_model
    )
    requests = [request_of(target, request_id=f"train/{target}", prior=(-2.0, -0.5, -1.5)) for target in (10, 11, 12)]
    targeted = ask(teacher, requests, targeted=True, attempt=0)
    assert [reply.ranking for reply in targeted] == [(10, 11, 12), (11, 12, 10), (12, 11, 10)]
    greedy = ask(teacher, requests, targeted=False, attempt=0)
    assert greedy == ask(teacher, requests, targeted=False, attempt=0)
    assert all(sorted(reply.ranking) == [10, 11, 12] for reply in greedy)
    assert len({reply.reasoning for reply in greedy}) == 1  # the prompts differ only in labels, which it does not get
    sampled = ask(teacher, requests, targeted=False, attempt=1)
    assert sampled == ask(teacher, requests, targeted=False, attempt=1) != greedy
