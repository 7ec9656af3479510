"""SFT: training examples by hand, and the rankings that they teach."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from recbole_gr2.artifacts import (
    read_traces,
)
from recbole_gr2.catalog import Catalog
from recbole_gr2.lists import training_requests
from recbole_gr2.llm.answers import read_answer
from recbole_gr2.llm.grammar import Grammar
from recbole_gr2.llm.model import load_language_model
from recbole_gr2.policy import answer_grammar, load_model
from recbole_gr2.prompts import PromptMaker, load_template
from recbole_gr2.sid.tokens import added_tokens, sid_text
from recbole_gr2.stages.sft import target_ranking, training_example
from recbole_gr2.types import Candidate, Context, Item, Request, Trace


@pytest.fixture(scope="module")
def student(context):
    """(model, tokenizer): a random model whose vocabulary has the codes of the toy items."""
    texts = [
        "The shopper takes comedies. Best is one or the other.",
        *(str(toy_maker().fields(n)) for n in range(1, 31)),
    ]
    shape = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1}
    return load_language_model("random", corpus=texts, extra_tokens=added_tokens(2, 64, 5), random_config=shape)


def changed(context: Context, folder: Path, **changes) -> Context:
    """The same run with other settings, writing to `folder`."""
    return replace(context, folder=folder, settings={**dict(context.settings), **changes})


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
    row = training_example(toy_maker(), request, prompt, trace, tokenizer, grammar)
    head = tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
    head = tokenizer(head, add_special_tokens=False)["input_ids"]
    reasoning = tokenizer("The shopper takes comedies.", add_special_tokens=False)["input_ids"]
    reasoning = reasoning[: max(longest - 1, 0)]  # one place is left for the mark to be chosen
    a, b, c = labels
    assert row.input_ids == [*head, *reasoning, grammar.ranking_id, c, b, a, grammar.eos_id]
    mark = 2 if longest else 0  # forced where there is no reasoning to end
    assert row.parts == [0] * len(head) + [1] * len(reasoning) + [mark, 2, 2, 0, 0]  # last label and end are forced
    assert not grammar.was_truncated(row.input_ids[len(head) :])
    start = len(head) + len(reasoning) + 1
    assert row.choices == {start: {a: 0, b: 0, c: 0}, start + 1: {a: 0, b: 0}}  # no evidence, and C is taken
    assert row.from_prior == set()
    request = replace(request, prior=(-1.0, -2.0, -3.0))
    with_prior = training_example(toy_maker(), request, prompt, trace, tokenizer, grammar)
    assert (with_prior.input_ids, with_prior.parts) == (row.input_ids, row.parts)
    assert with_prior.choices[start] == {a: -3.0, b: -1.0, c: -2.0}
    assert with_prior.from_prior == {start + 1}  # after the target
    graded = replace(request, grades=(1, 3, 1), split="train")
    assert training_example(toy_maker(), graded, prompt, trace, tokenizer, grammar).from_prior == {start + 1}
    graded = replace(request, grades=(1, 3, 0), split="train")
    assert not training_example(toy_maker(), graded, prompt, trace, tokenizer, grammar).from_prior


def test_a_grounded_training_row_by_hand(student):
    """What can be cited is a choice, what is forced or cannot be written has no loss, and no ID is cut in two."""
    _, tokenizer = student
    number, request = tokenizer.convert_tokens_to_ids, replace(toy_request(11), prior=(-1.0, -2.0, -3.0))
    prompt = toy_maker(history=1).render(request)  # shows items 3, 10, 11, 12: all first codes differ
    grammar = Grammar.of(tokenizer, "<|ranking|>", ["<|A|>", "<|B|>", "<|C|>"], 64, grounded=True)
    maker, reasoning = toy_maker(history=1), f"Best {sid_text((11, 12))} or {sid_text((5, 6))}."
    row = training_example(maker, request, prompt, toy_trace(request, (11, 10, 12), reasoning), tokenizer, grammar)
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
        cut = training_example(maker, request, prompt, toy_trace(request, (11, 10, 12), reasoning), tokenizer, short)
        assert cut.input_ids[head : head + one + 1] == [*row.input_ids[head : head + one], grammar.ranking_id]
        assert len(cut.choices) == 2
    answer = read_answer(request, row.input_ids[head:], maker.label_items(request, prompt), grammar, tokenizer)
    assert answer.reasoning.replace(" ", "") == reasoning.replace(" ", "")  # read back without the label
    twins = replace(maker, catalog=Catalog(replace(item, sid=(7, 7)) for item in maker.catalog))
    prompt, trace = twins.render(request), toy_trace(request, (11, 10, 12), f"Best is {sid_text((7, 7))}")
    row = training_example(twins, request, prompt, trace, tokenizer, grammar)
    assert tokenizer.decode(row.input_ids).endswith(
        "<|sid_end|><|B|><|ranking|><|B|><|A|><|C|><|im_end|>"
    )  # B is the best


def test_what_the_taught_ranking_has_behind_its_first():
    request, ranking = replace(toy_request(11), prior=(-1.0, -2.0, -3.0)), (11, 12, 10)

    assert target_ranking(replace(request, prior=()), ranking, 1) == ranking
    several = [target_ranking(replace(request, request_id=str(number)), ranking, 1) for number in range(4000)]
    assert set(several) == {(11, 10, 12), ranking}
    assert several.count((11, 10, 12)) / 4000 == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)  # of 10 and 12 alone
    assert target_ranking(request, ranking, 1) == target_ranking(request, ranking, 1)


def test_examples_of_a_run_fit(context, catalog):
    _, tokenizer = load_model(context.folders["sft"])
    maker, grammar = PromptMaker.of(context.settings, catalog), answer_grammar(tokenizer, context.settings)
    accepted = read_traces(context.folders["traces"] / "accepted.jsonl", catalog)
    requests = [r for r in training_requests(context) if r.request_id in accepted]
    rows = [training_example(maker, r, maker.render(r), accepted[r.request_id], tokenizer, grammar) for r in requests]
    assert len(rows) > 30
    for row in rows:
        assert len(row.input_ids) == len(row.parts) <= context.settings["sft_max_length"]
        assert row.parts.count(2) == context.settings["cand_num"]  # mark and nine labels, of all
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in row.input_ids
