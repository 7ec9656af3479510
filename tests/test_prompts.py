"""Prompts: a prompt does not depend on labels, shows what it should, and an unsuitable template is refused."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.prompts import (
    FORMS,
    PromptMaker,
    built_in,
    encode_prompt,
    item_prompt,
    kind,
    load_template,
    prompt_values,
    recent,
    shorten,
    shuffled_order,
    template_of,
    templates_for,
)
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


def request_of(target: int = 11, history=(1, 2, 3), candidates=(10, 11, 12)) -> Request:
    return Request(
        request_id="train/u",
        user_token="u",
        split="train",
        history=tuple(history),
        candidates=tuple(Candidate(item_id=i, score=-float(r), rank=r) for r, i in enumerate(candidates, start=1)),
        target=target,
        provider="p",
    )


def maker_of(template: str = "rerank", history: int = 8, **options) -> PromptMaker:
    return PromptMaker(template=load_template(template), catalog=CATALOG, history=history, title_chars=60, **options)


@pytest.mark.parametrize("template", built_in())
def test_a_prompt_does_not_depend_on_the_labels(template):
    maker = maker_of(template)
    requests = [request_of(target) for target in (10, 12, 25)]
    prompts = [
        maker.render(r) for r in [*requests, requests[0].without_labels(), replace(requests[0], grades=(0, 1, 2))]
    ]
    assert all(prompt == prompts[0] for prompt in prompts)
    assert "Title25x" not in str(prompts[2]) and "Title12x" in str(prompts[2])


def test_the_whole_prompt():
    """The text is part of what the language model learns. A change invalidates published results."""
    prompt = maker_of(history=1).render(request_of(candidates=(10, 11)))
    assert prompt.messages == (
        {
            "role": "system",
            "content": "You are a recommendation expert. Items follow on each other: find what the history is about, "
            "what goes with it, and which of the 2 candidates fits. Cite items by ID, then rank every label once.",
        },
        {
            "role": "user",
            "content": "History:\n"
            "<|sid_begin|><s_a_3><s_b_4><|sid_end|> Title3x (Kind0)\n"
            "Candidates:\n"
            "<|sid_begin|><s_a_10><s_b_11><|sid_end|><|A|> Title10x (Kind1)\n"
            "<|sid_begin|><s_a_11><s_b_12><|sid_end|><|B|> Title11x (Kind2)",
        },
    )


def test_history_and_candidates_of_a_prompt():
    maker = maker_of(history=2)
    prompt = maker.render(request_of(11), order=(2, 0, 1))
    user = prompt.messages[1]["content"]
    assert "Title1x" not in user and user.index("Title2x") < user.index("Title3x")  # the last two, oldest first
    places = [
        user.index(f"<s_a_{n}><s_b_{n + 1}><|sid_end|><|{label}|> Title{n}x (Kind{n % 3})")
        for label, n in zip("ABC", (12, 10, 11), strict=True)
    ]
    assert places == sorted(places)
    assert prompt.labels == ("<|A|>", "<|B|>", "<|C|>") and prompt.order == (2, 0, 1)
    assert maker.label_items(request_of(11), prompt) == (12, 10, 11)


def test_candidates_are_shuffled_by_request():
    plain, maker = maker_of(), maker_of(shuffle_seed=3)
    requests = [replace(request_of(11), request_id=f"train/{n}", prior=(-1.0, -2.0, -3.0)) for n in range(30)]
    orders = {maker.render(r).order for r in requests}
    assert len(orders) == 6 and {plain.render(r).order for r in requests} == {(0, 1, 2)}
    for r in requests:
        prompt = maker.render(r)
        assert prompt == maker.render(replace(r, target=12)) and prompt.order == shuffled_order(r, 3)
        assert maker.label_items(r, prompt) == tuple((10, 11, 12)[p] for p in prompt.order)
        assert maker.label_prior(r, prompt) == [-1.0 - p for p in prompt.order]
    assert maker.render(requests[0], order=(2, 1, 0)).order == (2, 1, 0)
    assert [shuffled_order(r, 3) for r in requests] != [shuffled_order(r, 3, "shuffled") for r in requests]


def test_a_custom_template(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "system: Rank.\nuser: '{% for c in candidates %}{{ c.label }} {{ c.title }} {{ c.brand }};{% endfor %}'\n"
    )
    prompt = maker_of(str(file)).render(request_of(candidates=(10, 11)))
    assert [m["content"] for m in prompt.messages] == ["Rank.", "<|A|> Title10x Brand0;<|B|> Title11x Brand1;"]
    assert [template.name for template in templates_for(str(file))] == [*built_in(), "mine"]
    sha = load_template(str(file)).sha
    file.write_text(file.read_text() + "# changed\n")
    assert load_template(str(file)).sha != sha


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("system: a\nuser: '{% for c in candidates %}{{ c.facts }}{% endfor %}'\n", "prompt_evidence"),
        ("system: '{% if candidates[0].facts %}x{% endif %}'\nuser: b\n", "prompt_evidence"),
        ("system: a\nuser: '{{ target }}'\n", "'target' is undefined"),
        ("system: a\nuser: '{% for %}'\n", "cannot be rendered"),
        ("system: a\n", "needs the keys `system` and `user`"),
        ("just a text\n", "needs the keys `system` and `user`"),
        ("system: a\nuser: '<|{{ history[0].title }}|>'\n", r"the text '<\|\(text\)' of the user message"),
        ("system: a\nuser: '<|A{{ history[0].title }}'\n", "of the user message joins a text"),
        ("system: '{{ history[0].brand }}|>'\nuser: b\n", "of the system message joins a text"),
        ("system: a\nuser: '{{ history[0].title }}{{ history[0].brand }}'\n", "can form a semantic ID or a label"),
        ("system: a\nuser: '{% for c in candidates %}{{ c.title }}_{% endfor %}'\n", "joins a text"),
    ],
)
def test_an_unsuitable_template_is_refused_when_it_is_loaded(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        load_template(str(tmp_path / "mine.yaml"))


def test_texts_may_be_enclosed_by_other_characters(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "system: a\nuser: '{% for c in candidates %}{{ c.label }}{{ c.title }} ({{ c.brand }}), <{{ c.sid }}>"
        "{{ c.category|upper }}/{% endfor %}'\n"
    )
    load_template(str(tmp_path / "mine.yaml"))


def test_a_template_that_does_not_exist():
    with pytest.raises(MissingFileError, match="rerank-nokp"):
        load_template("no-such-template")


def test_recent_items():
    assert [recent((1, 2, 3), count) for count in (0, 2, 5)] == [(), (2, 3), (1, 2, 3)]


@given(st.text(alphabet="ab ,-", max_size=40), st.integers(1, 20))
def test_shorten(text, chars):
    short = shorten(text, chars)
    assert len(short) <= chars and text.startswith(short)
    assert short == text or len(text) > chars


def test_shorten_and_kind_by_hand():
    assert shorten("OPI Nail Lacquer, Red", 17) == "OPI Nail Lacquer"
    assert shorten("OPI Nail Lacquer", 16) == "OPI Nail Lacquer"
    assert shorten("Lacquer", 3) == "Lac"
    assert kind(CATALOG[0]) == "Kind1"
    assert kind(Item(item_id=1, token="t", title="x")) == ""


VECTOR_SETTINGS = {"prompt_items": "vector", "prompt_template": "rerank"}

# --- forms of items ---------------------------------------------------------------------------------------------------


def written(items: str, catalog: Catalog = CATALOG, **request) -> str:
    """The user message of a prompt in a form."""
    settings = {"prompt_template": "rerank", "prompt_items": items, "prompt_history": 8, "prompt_title_chars": 60}
    maker = PromptMaker.of({**settings, "prompt_shuffle": False, "seed": 1}, catalog)
    return maker.render(request_of(**request)).messages[1]["content"]


def test_items_as_semantic_ids():
    assert written("sid", history=(1, 2), candidates=(10, 11)) == (
        "Candidates: <|sid_begin|><s_a_10><s_b_11><|sid_end|><|A|><|sid_begin|><s_a_11><s_b_12><|sid_end|><|B|>\n"
        "History: <|sid_begin|><s_a_1><s_b_2><|sid_end|><|sid_begin|><s_a_2><s_b_3><|sid_end|>"
    )


def test_items_in_short():
    """A category is written once, and not if the title contains it. Candidates come first."""
    titles = {
        1: "Nail Kind1 Set",
        2: "A Fine Long Title Without Any Mark",
        10: "Toy Story (1995)",
        11: "Soap, Red, 2 oz",
    }
    catalog = Catalog(replace(item, title=titles.get(item.item_id, item.title)) for item in CATALOG)
    assert written("short", catalog, history=(1, 2, 3), candidates=(10, 11)) == (
        "Candidates:\n"
        "<|sid_begin|><s_a_10><s_b_11><|sid_end|><|A|> Toy Story (Kind1)\n"
        "<|sid_begin|><s_a_11><s_b_12><|sid_end|><|B|> Soap, Red (Kind2)\n"
        "History:\n"
        "<|sid_begin|><s_a_1><s_b_2><|sid_end|> Nail Kind1 Set\n"
        "<|sid_begin|><s_a_2><s_b_3><|sid_end|> A Fine Long Title\n"
        "<|sid_begin|><s_a_3><s_b_4><|sid_end|> Title3x (Kind0)"
    )


@pytest.mark.parametrize("items", FORMS)
def test_no_form_depends_on_the_labels(items):
    assert len({written(items, target=target) for target in (10, 11, 12, 25)}) == 1


def test_forms_enter_keys_only_if_they_are_not_the_default(tiny_settings, tmp_path):
    text, short = (tiny_settings(tmp_path, prompt_items=items) for items in ("text", "short"))
    assert prompt_values(text) == {"prompt_template": load_template("rerank").sha}
    assert prompt_values(short).keys() == {"prompt_template", "prompt_items"}
    assert prompt_values(short)["prompt_template"] != prompt_values(text)["prompt_template"]


def test_a_form_with_another_template_is_refused(tiny_settings, tmp_path):
    with pytest.raises(ConfigurationError, match="prompt_items is sid, which has its own template"):
        tiny_settings(tmp_path, prompt_items="sid", prompt_template="rerank-nokp")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_rows": ["score", "sft"]}, "eval_rows has sft, which generate answers"),
        ({"eval_rows": ["score"], "llm_lora_rank": 4}, "llm_lora_rank is 4; set it to 0"),
    ],
)
def test_vectors_are_for_scores_alone(tiny_settings, tmp_path, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        tiny_settings(tmp_path, prompt_items="vector", **changes)


def test_the_invariant_form_with_another_template_is_refused(tiny_settings, tmp_path):
    options = {"score_invariant": True, "prompt_template": "rerank-nokp"}
    with pytest.raises(ConfigurationError, match="score_invariant is True, and its prompts have their own template"):
        tiny_settings(tmp_path, eval_rows=["score"], **options)
    assert tiny_settings(tmp_path, eval_rows=["sft"], **options)["score_invariant"]  # without effect


@pytest.mark.parametrize(
    ("items", "first"),
    [
        ("text", "<|sid_begin|><s_a_11><s_b_12><|sid_end|> Title11x (Kind2)"),
        ("short", "<|sid_begin|><s_a_11><s_b_12><|sid_end|> Title11x"),  # the history has the category
        ("sid", "<|sid_begin|><s_a_11><s_b_12><|sid_end|>"),
    ],
)
def test_the_parts_of_a_prompt_without_input_order(items, first):
    settings = {"prompt_template": "rerank", "prompt_items": items, "prompt_history": 8, "prompt_title_chars": 60}
    maker = PromptMaker.of({**settings, "prompt_shuffle": False, "seed": 1}, CATALOG)
    request = request_of(history=(2,), candidates=(10, 11, 14))
    messages, texts = maker.render_parts(request, (1, 0, 2))
    assert texts[0] == first and texts == maker.render_parts(request, (1, 2, 0))[1][:1] + texts[1:]
    assert maker.render_parts(request, (2, 1, 0))[1] == [texts[2], texts[0], texts[1]]
    history = {"text": " Title2x (Kind2)", "short": " Title2x (Kind2)", "sid": ""}[items]
    expected = f"History:\n<|sid_begin|><s_a_2><s_b_3><|sid_end|>{history}\nCandidates:"
    assert messages[1]["content"] == expected


def test_an_item_as_one_position():
    from recbole_gr2.llm.model import load_language_model
    from recbole_gr2.sid.tokens import added_tokens

    _, tokenizer = load_language_model("random", corpus=["Candidates: History:"], extra_tokens=added_tokens(2, 40, 3))
    prompt = maker_of(history=2)
    prompt = replace(prompt, template=template_of(VECTOR_SETTINGS), items="vector").render(
        request_of(candidates=(10, 11))
    )
    ids, places = item_prompt("vector", 2, 2, 2, tokenizer, tokenizer.pad_token_id)
    whole = encode_prompt(prompt, tokenizer)
    a, b, pad = *tokenizer.convert_tokens_to_ids(["<|A|>", "<|B|>"]), tokenizer.pad_token_id
    assert [ids[place] for place in places] == [a, b, pad, pad]
    assert len(ids) == len(whole) - 4 * 3 - 2  # four semantic IDs of four tokens, and two labels
    start = whole.index(tokenizer.convert_tokens_to_ids("<|sid_begin|>"))
    assert list(places[:2]) == [start, start + 1] and list(ids[:start]) == whole[:start]
    assert places[3] == places[2] + 1 and list(ids[places[3] + 1 :]) == whole[-len(ids) + places[3] + 1 :]
    alone, places = item_prompt("invariant", 0, 2, 2, tokenizer, tokenizer.pad_token_id)
    assert len(places) == 2 and a not in alone


def test_the_texts_of_mid_training_do_not_depend_on_the_form(tiny_settings, tmp_path):
    from recbole_gr2.stages.midtrain import STAGE_NAME, stages
    from recbole_gr2.tasks import caption_texts, persona_texts, vocabulary_texts

    text, sid = (tiny_settings(tmp_path, prompt_items=items) for items in ("text", "sid"))
    assert vocabulary_texts(CATALOG, text) == vocabulary_texts(CATALOG, sid)
    assert list(caption_texts(CATALOG, text)) == list(caption_texts(CATALOG, sid))
    assert list(persona_texts(CATALOG, [(1, 2)], text)) == list(persona_texts(CATALOG, [(1, 2)], sid))
    (stage, *_) = stages(text)
    assert stage.name == STAGE_NAME and "prompt_items" not in text.results(stage.settings)


def test_the_preset_of_the_paper_writes_its_reasoning_freely(tiny_settings, tmp_path):
    settings = tiny_settings(tmp_path, preset="paper")
    assert settings["prompt_grounded"] is False and settings["prior_features"] == []
