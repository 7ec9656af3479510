"""Labels reach no prompt, feature or score, and candidates contain no seen item."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recbole_gr2.artifacts import (
    load_requests,
    read_requests,
)
from recbole_gr2.lists import training_requests
from recbole_gr2.policy import Policy, citations, load_model
from recbole_gr2.prompts import shuffled_order
from recbole_gr2.rerankers.base import Reranker
from recbole_gr2.rerankers.lambdamart import LambdaMART
from recbole_gr2.rerankers.likelihood import Midtrain
from recbole_gr2.sid.tokens import is_code
from recbole_gr2.stages import rerank
from recbole_gr2.types import Context


@pytest.fixture(scope="module")
def student(context):
    """(model, tokenizer) of the sft stage."""
    return load_model(context.folders["sft"])


def changed(context: Context, folder: Path, **changes) -> Context:
    """The same run with other settings, writing to `folder`."""
    return replace(context, folder=folder, settings={**dict(context.settings), **changes})


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_scrambled_targets_give_the_same_rankings(context, catalog, student, tmp_path):
    file = context.folders["prior"] / "test.jsonl"
    rng, scrambled = random.Random(0), []
    for line in lines(file)[:60]:
        scrambled.append({**line, "target": rng.choice(catalog).token})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scrambled))
    true = load_requests(context, "test")[:60]
    false = read_requests(tmp_path / "test.jsonl", catalog)
    false = [replace(r, features=t.features) for r, t in zip(false, true, strict=True)]
    assert sum(a.target != b.target for a, b in zip(true, false, strict=True)) > 50
    assert [replace(r, target=0) for r in true] == [replace(r, target=0) for r in false]

    policy = Policy.of(*student, context)
    maker = policy.maker
    assert [maker.render(r) for r in true] == [maker.render(r) for r in false]
    assert Midtrain(context).rank(true) == Midtrain(context).rank(false)
    trees = LambdaMART(context)
    trees.fit(training_requests(context), [r for r in load_requests(context, "valid") if r.has_signal])
    assert trees.rank(true) == trees.rank(false)
    for orders in (None, {r.request_id: shuffled_order(r, 1) for r in true}):
        answers = [policy.answer(requests, orders)[0] for requests in (true, false)]
        assert answers[0] == answers[1]
        assert len({answer.ranking for answer in answers[0]}) > 10  # a constant would pass too


@pytest.mark.parametrize("grounded", [True, False])
def test_answers_cite_what_their_prompts_show(context, catalog, student, grounded):
    """A policy that begins an ID wherever it can, and has not learnt to end one."""
    model, tokenizer = student
    longer = {"prompt_grounded": grounded, "prompt_max_reasoning": 48}
    policy = Policy.of(model, tokenizer, replace(context, settings={**dict(context.settings), **longer}))
    requests = load_requests(context, "test")[:40]
    push = torch.zeros(len(tokenizer))
    push[tokenizer.convert_tokens_to_ids("<|sid_begin|>")] = 100.0
    codes = [number for token, number in tokenizer.get_vocab().items() if is_code(token)]
    push[codes] = 50.0 if not grounded else 0.0
    hook = model.get_output_embeddings().register_forward_hook(lambda head, given, logits: logits + push)
    try:
        answers, _ = policy.answer(requests)
    finally:
        hook.remove()
    begun = [answer.reasoning.count("<|sid_begin|>") for answer in answers]
    found = citations(answers, requests, catalog, context.settings["prompt_history"])
    assert min(begun) > 3 and (found["cited"] > 100 and found["cited_in_prompt"] == 1.0) is grounded


def test_candidates_hold_no_seen_item_and_no_inserted_target(context, catalog):
    for split in ("train", "valid", "test"):
        requests = read_requests(context.folders["candidates"] / f"{split}.jsonl", catalog)
        assert len(requests) == 150
        assert not any(set(r.items) & set(r.history) for r in requests)
        scores = [[candidate.score for candidate in r.candidates] for r in requests]
        assert all(row == sorted(row, reverse=True) for row in scores)
        assert 0 < sum(r.target_rank is not None for r in requests) < 150
        assert all(r.provider == ("CausalSASRec hold-out" if split == "train" else "CausalSASRec") for r in requests)


def test_the_rerank_stage_withholds_the_labels(context, tmp_path):
    """`fit` gets requests with labels, `rank` gets them without."""
    seen = {}

    class Spy(Reranker):
        name = "spy"

        def fit(self, train, valid):
            seen["fit"] = [request.has_signal for request in (*train, *valid)]

        def rank(self, requests):
            seen["rank"] = {(request.target, request.grades) for request in requests}
            return [request.items for request in requests]

    rerank.run(replace(context, folder=tmp_path, parameters={"reranker": Spy}))
    assert all(seen["fit"]) and len(seen["fit"]) > 50
    assert seen["rank"] == {(0, ())}
