"""Scores of all candidates in one forward pass: losses by hand, exact resume, and the method on a run."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_gr2.artifacts import load_catalog, read_answers
from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.lists import training_requests
from recbole_gr2.llm.adapter import merged, with_lora
from recbole_gr2.llm.item_vectors import ItemEncoder, ItemInputs, ItemVectors, item_groups
from recbole_gr2.llm.scoring import (
    ListCollator,
    ListInput,
    list_scores,
    listwise_loss,
    pairwise_loss,
    score_lists,
    shared_length,
    train_lists,
)
from recbole_gr2.llm.train import Training
from recbole_gr2.policy import Policy, load_model
from recbole_gr2.prompts import shuffled_order
from recbole_gr2.scorer import Scorer
from recbole_gr2.stages.score import training_list
from recbole_gr2.types import Item

INF = math.inf


def tiny(seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=28,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.3,
            tie_word_embeddings=tied,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()


def list_of(number: int) -> ListInput:
    """A list of two or three candidates with the labels 20, 21 and 22. The token 3 + n % 5 says which one is best."""
    count, best = 2 + number % 2, number % 2
    ids = [2, 3 + best, *(8 + (number + t) % 9 for t in range(number % 7)), 19]
    return ListInput(
        input_ids=ids,
        places=[len(ids) - 1] * count,
        tokens=[20, 21, 22][:count],
        prior=[-0.5, -1.0, -2.0][:count],
        relevance=[float(place == best) for place in range(count)],
    )


LISTS = [list_of(number) for number in range(20)]


def train(model, tokenizer, folder, **changes):
    options = {
        "steps": 8,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_share": 0.0,
        "seed": 7,
        "bf16": False,
        "save_steps": 1,
    }
    lists = changes.pop("lists", LISTS)
    others = {"loss": "listwise", "llm_weight": 0.5}
    others |= {name: changes.pop(name) for name in ("loss", "llm_weight", "say") if name in changes}
    return train_lists(model, tokenizer, lists, folder, training=Training(**{**options, **changes}), **others)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{chr(ord("a") + n): n + 2 for n in range(26)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")), pad_token="<pad>", eos_token="<eos>"
    )


def test_losses_by_hand():
    scores = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)], [0.0, math.log(3.0), -INF]])
    relevance = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    # Shares 1/8, 2/8, 5/8 and 1/4, 3/4.
    assert listwise_loss(scores, relevance).tolist() == pytest.approx([math.log(4.0), math.log(4.0)])
    # The first list has the pairs of candidate 2 with 1 and 3: log(1 + 1/2) and log(1 + 5/2).
    expected = [(math.log(1.5) + math.log(3.5)) / 2, math.log(4.0)]
    assert pairwise_loss(scores, relevance).tolist() == pytest.approx(expected)
    graded = torch.tensor([[1.0, 3.0, 0.0]])
    assert listwise_loss(scores[:1], graded).item() == pytest.approx(0.25 * math.log(8.0) + 0.75 * math.log(4.0))
    expected = (math.log(1.5) + math.log(6.0) + math.log(3.5)) / 3  # 2 above 1, 1 above 3, 2 above 3
    assert pairwise_loss(scores[:1], graded).item() == pytest.approx(expected)
    for loss in (listwise_loss, pairwise_loss):
        part = scores.clone().requires_grad_()
        loss(part, relevance).sum().backward()
        assert part.grad.isfinite().all() and part.grad[1, 2] == 0


@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_those_of_all_logits(tied):
    model = tiny(tied=tied)
    scores = score_lists(model, LISTS, pad_id=0, llm_weight=0.5, batch_size=6)
    for each, row in zip(LISTS, scores, strict=True):
        logits = model(input_ids=torch.tensor([each.input_ids])).logits[0, -1, list(each.tokens)]
        expected = (0.5 * logits + torch.tensor(each.prior)).log_softmax(-1)
        assert row == pytest.approx(expected.tolist(), abs=1e-5)
        assert sum(map(math.exp, row)) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["text", "vector", "invariant"])
def test_the_shared_prefix_changes_no_score(kind):
    lists = {
        "text": [replace(each, input_ids=[2, 5, 9, *each.input_ids[3:]]) for each in LISTS if len(each.input_ids) > 5],
        "vector": VECTORS,
        "invariant": [separate("abc"), separate("ca")],
    }[kind]
    assert shared_length(lists) == {"text": 3, "vector": 1, "invariant": 3}[kind]
    assert shared_length([LISTS[0]] * 2) == LISTS[0].places[0]
    model = with_items(tiny(), encoder())
    scores = score_lists(model, lists, pad_id=0, llm_weight=1.0, batch_size=3)
    for each, row in zip(lists, scores, strict=True):
        whole = list_scores(model, ListCollator(0)([each]), 1.0).log_softmax(-1)[0]
        assert row == pytest.approx(whole.tolist(), abs=1e-5)


def test_scores_do_not_depend_on_the_batch():
    model = tiny()
    together = score_lists(model, LISTS, pad_id=0, llm_weight=0.5, batch_size=20)
    alone = score_lists(model, LISTS, pad_id=0, llm_weight=0.5, batch_size=1)
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_lists_that_do_not_fit_are_an_error(tokenizer, tmp_path):
    long = replace(LISTS[0], input_ids=[2] * 65)
    with pytest.raises(ConfigurationError, match="lists of up to 65 tokens do not fit the context of 64"):
        score_lists(tiny(), [long], pad_id=0, llm_weight=1.0, batch_size=1)
    with pytest.raises(ConfigurationError, match="0 lists"):
        train_lists(
            tiny(),
            tokenizer,
            [],
            tmp_path,
            training=Training(
                steps=1,
                batch_size=1,
                micro_batch_size=1,
                learning_rate=1.0,
                warmup_share=0.0,
                seed=0,
                bf16=False,
                save_steps=1,
            ),
            loss="listwise",
            llm_weight=1.0,
        )


def test_the_first_loss_is_the_mean_over_lists(tokenizer, tmp_path):
    log = train(tiny(), tokenizer, tmp_path, steps=1, batch_size=20, micro_batch_size=20)
    scores = list_scores(tiny(), ListCollator(0)(LISTS), 0.5)
    relevance = torch.nn.utils.rnn.pad_sequence([torch.tensor(each.relevance) for each in LISTS], batch_first=True)
    assert log[0]["loss"] == pytest.approx(listwise_loss(scores, relevance).mean().item(), rel=1e-4)
    smaller = train(tiny(), tokenizer, tmp_path / "parts", steps=1, batch_size=20, micro_batch_size=4)
    assert smaller[0]["loss"] == pytest.approx(log[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("loss", ["listwise", "pairwise"])
def test_training_finds_the_best_candidate(tokenizer, tmp_path, loss):
    model = tiny()
    train(model, tokenizer, tmp_path, loss=loss, steps=40, save_steps=100)
    scores = score_lists(model, LISTS, pad_id=0, llm_weight=0.5, batch_size=20)
    best = [int(np.argmax(row)) for row in scores]
    assert best == [list(each.relevance).index(1.0) for each in LISTS]


@pytest.mark.slow
def test_a_killed_training_ends_with_the_same_weights_and_log(tokenizer, tmp_path):
    whole = tiny()
    log = train(whole, tokenizer, tmp_path / "whole")

    def say(text):
        if text.startswith("step 5/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tokenizer, tmp_path / "killed", say=say)
    resumed, seen = tiny(seed=99), []  # other weights: those of the checkpoint replace them
    assert train(resumed, tokenizer, tmp_path / "killed", say=seen.append) == log
    assert seen[0].startswith("step 5/")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_lora_scores_equal_those_of_the_merged_model(tokenizer, tmp_path, tied):
    model = with_lora(tiny(tied=tied), 2, [19, 20, 21, 22])
    log = train(model, tokenizer, tmp_path, learning_rate=3e-2, steps=20, save_steps=100)
    assert log[-1]["loss"] < log[0]["loss"]
    model.eval()
    batch = ListCollator(0)(LISTS)
    with torch.no_grad():
        adapted = list_scores(model, batch, 0.5)
        assert torch.allclose(list_scores(merged(model), batch, 0.5), adapted, atol=1e-4)


# --- items as input embeddings ----------------------------------------------------------------------------------------

N_ITEMS, FEATURES = 9, 2


def encoder(seed: int = 0, features: int = FEATURES) -> ItemEncoder:
    """Items 1 to 9 with the codes 3 + n and 12 + n % 3."""
    rng = np.random.default_rng(seed)
    codes = np.array([[3 + n, 12 + n % 3] for n in range(N_ITEMS)])
    groups = np.array([[n % 3, n % 2] for n in range(N_ITEMS)])
    torch.manual_seed(seed)
    return ItemEncoder(rng.normal(size=(N_ITEMS, 5)).astype(np.float32), codes, groups, features, 16)


def vector_list(number: int) -> ListInput:
    """Two or three candidates and two history items. The best candidate has the history's first item number + 1."""
    count, best = 2 + number % 2, number % 2
    candidates = [1 + (number + 2 * n) % N_ITEMS for n in range(count)]
    history = [1 + candidates[best] % N_ITEMS, 1 + number % N_ITEMS]
    ids = [2, *[20, 21, 22][:count], 23, 0, 0, 19]
    return ListInput(
        input_ids=ids,
        places=[len(ids) - 1] * count,
        tokens=[20, 21, 22][:count],
        prior=[-0.5, -1.0, -2.0][:count],
        relevance=[float(place == best) for place in range(count)],
        items=[0, *candidates, 0, *history, 0],
        slots=list(range(1, count + 1)),
        features=[[float(number), float(place)] for place in range(count)],
    )


VECTORS = [vector_list(number) for number in range(20)]


def with_items(model: LlamaForCausalLM, items: ItemInputs) -> LlamaForCausalLM:
    model.item_inputs = items
    return model


def test_input_embeddings_by_hand():
    model, items = tiny(), encoder()
    tokens = model.get_input_embeddings()
    with torch.no_grad():
        items.project.weight.normal_()
        items.metadata[0].weight.normal_()
        items.mean, items.scale = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 4.0])
        batch = ListCollator(0)(VECTORS[:2])  # of two and three candidates
        embedded = items(batch, tokens)
        each = VECTORS[0]
        for place, (token, item) in enumerate(zip(each.input_ids, each.items, strict=True)):
            expected = torch.zeros(16)
            if item:
                codes = torch.tensor([3 + item - 1, 12 + (item - 1) % 3])
                expected = tokens(codes).sum(0) / math.sqrt(2) + items.metadata[0].weight[(item - 1) % 3]
            if not item or token:
                expected = expected + tokens.weight[token]
            if place in each.slots:
                # Over the training lists (0 - 1) / 2 and (0 or 1 - 1) / 4; over the list 0, and -1 or 1.
                first = place == 1
                values = torch.tensor([-0.5, -0.25 if first else 0.0, 0.0, -1.0 if first else 1.0])
                expected = expected + items.project.weight @ values
            assert torch.allclose(embedded[0, place], expected, atol=1e-5), place


def test_scores_of_vectors_do_not_depend_on_the_batch_or_on_stored_vectors(tmp_path):
    items = encoder()
    with torch.no_grad():
        items.project.weight.normal_()
        items.text[2].weight.normal_()
    model = with_items(tiny(), items)
    options = {"pad_id": 0, "llm_weight": 0.5}
    together = score_lists(model, VECTORS, batch_size=20, **options)
    alone = score_lists(model, VECTORS, batch_size=1, **options)
    items.catalogue(model.get_input_embeddings()).save(tmp_path)
    stored = score_lists(with_items(model, ItemVectors.load(tmp_path)), VECTORS, batch_size=20, **options)
    for one, two, three in zip(together, alone, stored, strict=True):
        assert one == pytest.approx(two, abs=1e-5) and one == pytest.approx(three, abs=1e-5)


def test_items_without_features(tmp_path):
    items = encoder(features=0)
    lists = [replace(each, features=[[]] * len(each.prior)) for each in VECTORS]
    scores = score_lists(with_items(tiny(), items), lists, pad_id=0, llm_weight=1.0, batch_size=7)
    items.catalogue(tiny().get_input_embeddings()).save(tmp_path)
    stored = with_items(tiny(), ItemVectors.load(tmp_path))
    assert np.allclose(scores[3], score_lists(stored, lists[3:4], pad_id=0, llm_weight=1.0, batch_size=1)[0], atol=1e-5)


@pytest.mark.slow
def test_the_encoder_is_trained_and_resumed(tokenizer, tmp_path):
    whole = with_items(tiny(), encoder())
    before = {name: value.clone() for name, value in whole.item_inputs.state_dict().items()}
    log = train(whole, tokenizer, tmp_path / "whole", lists=VECTORS)

    def say(text):
        if text.startswith("step 5/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(with_items(tiny(), encoder()), tokenizer, tmp_path / "killed", lists=VECTORS, say=say)
    other = encoder()
    for parameter in other.parameters():  # other weights: those of the checkpoint replace them
        torch.nn.init.normal_(parameter)
    resumed = with_items(tiny(seed=9), other)
    assert train(resumed, tokenizer, tmp_path / "killed", lists=VECTORS) == log
    after = resumed.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in whole.state_dict().items())
    trained = whole.item_inputs.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, trained[name])}
    assert changed == set(before) - {"mean", "scale"}


def test_groups_of_items():
    items = [Item(item_id=n + 1, token=str(n), title="t", categories=f"Root > K{n // 6}", brand="B") for n in range(13)]
    assert item_groups(Catalog(items)).tolist() == [[1, 1]] * 6 + [[2, 1]] * 6 + [[0, 1]]  # one item has K2


# --- candidates that do not see each other ----------------------------------------------------------------------------

CONTEXT = [2, 5, 7]
CANDIDATES = {"a": [11, 12, 19], "b": [13, 19], "c": [14, 15, 16, 19]}


def separate(names: str, vectors: bool = False) -> ListInput:
    """A list of candidates in this order, each with a token that ends it. With vectors each is one position."""
    ids, segments, positions, ends = list(CONTEXT), [0] * 3, [0, 1, 2], []
    for number, name in enumerate(names, start=1):
        part = [19] if vectors else CANDIDATES[name]
        ids, segments = ids + part, segments + [number] * len(part)
        positions, ends = [*positions, *range(3, 3 + len(part))], [*ends, len(ids) - 1]
    places = "abc".index
    items = {
        "items": [0, 0, 4, *(1 + places(name) for name in names)],
        "slots": ends,
        "features": [[float(places(name)), 1.0] for name in names],
    }
    return ListInput(
        input_ids=ids,
        places=ends,
        tokens=[20] * len(names),
        prior=[-1.0] * len(names),
        segments=segments,
        positions=positions,
        **(items if vectors else {}),
    )


@pytest.mark.parametrize("vectors", [False, True])
def test_input_order_does_not_matter_if_candidates_do_not_see_each_other(vectors):
    items = encoder()
    with torch.no_grad():
        items.project.weight.normal_()
    model = with_items(tiny(), items)
    orders = ["abc", "cab", "bca", "cba"]
    lists = [separate(names, vectors) for names in orders]
    by_name = [
        dict(zip(names, row, strict=True))
        for names, row in zip(orders, score_lists(model, lists, pad_id=0, llm_weight=1.0, batch_size=3), strict=True)
    ]
    for scores in by_name:
        assert scores == pytest.approx(by_name[0], abs=1e-5)
    assert len({round(score, 3) for score in by_name[0].values()}) == 3


def test_a_candidate_is_scored_as_if_it_were_alone():
    model = tiny()
    scores = list_scores(model, ListCollator(0)([separate("abc"), separate("ba")]), 1.0)
    for row, name, place in [(0, "a", 0), (0, "b", 1), (0, "c", 2), (1, "b", 0), (1, "a", 1)]:
        logits = model(input_ids=torch.tensor([[*CONTEXT, *CANDIDATES[name]]])).logits[0, -1]
        assert scores[row, place].item() == pytest.approx(logits[20].item() - 1.0, abs=1e-5)
    assert scores[1, 2] == -INF


# --- on a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(context) -> Scorer:
    return Scorer.load(context, "sft")  # any model of the run


def test_a_list_contains_no_label(scorer, context):
    request = training_requests(context)[0]
    other = replace(request, target=request.items[-1], grades=tuple(range(len(request.items))))
    assert scorer.list_input(request) == scorer.list_input(other) == scorer.list_input(request.without_labels())
    order = scorer.maker.order(request)
    assert training_list(scorer, request).relevance == [float(request.items[p] == request.target) for p in order]


def test_a_score_is_the_probability_of_the_first_label_of_an_answer_without_reasoning(scorer, context):
    requests = training_requests(context)[:8]
    model, tokenizer = load_model(context.folders["sft"])
    generated, _ = Policy.of(model, tokenizer, context, reasoning=False).answer(requests)
    scored = scorer.answer(requests)
    for one, other, request in zip(generated, scored, requests, strict=True):
        assert one.first_choice == pytest.approx(other.first_choice, abs=1e-5)
        assert sorted(other.ranking) == sorted(request.items)
        chances = dict(zip(request.items, other.first_choice, strict=True))
        assert [chances[item] for item in other.ranking] == sorted(other.first_choice, reverse=True)


def test_equal_scores_keep_the_base_order(scorer, context):
    request = training_requests(context)[0]
    model, _ = load_model(context.folders["sft"])
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    equal = replace(scorer, model=model)
    (answer,) = equal.answer([replace(request, prior=())], {request.request_id: (3, 1, 4, 0, 2)})
    assert answer.ranking == request.items and sum(answer.first_choice) == pytest.approx(1.0)


@pytest.mark.slow
def test_the_method_in_a_run(tiny_run, finished_copy):
    run = tiny_run(finished_copy(), eval_rows=["score"], score_steps=4, score_loss="pairwise")
    assert "sft" not in run.folders and "traces" not in run.folders
    summary = run.records["score"].summary
    assert summary["lists"] > 30 and summary["valid"]["lists"] > 0
    assert 0 <= summary["valid"]["first_changed"] <= summary["valid"]["changed"] <= 1
    answers = read_answers(run.folders["rerank_score"], load_catalog(run.context()))
    assert all(len(set(answer.ranking)) == 5 for answer in answers.values())
    figures = run.records["rerank_score"].summary
    assert figures["statuses"] == {"ok": len(answers)} and sum(figures["promoted_from_slot"].values()) == len(answers)
    methods = {(m["method"], m["scope"]) for m in run.records["evaluate"].summary["methods"]}
    assert ("score", "hit_users") in methods


@pytest.mark.slow
def test_short_prompts_in_a_run(tiny_run, finished_copy, finished):
    """The stages before the prompt keep their keys. Generated answers work with the short forms, too."""
    root = finished_copy()
    for items in ("short", "sid"):
        run = tiny_run(root, eval_rows=["sft", "score"], prompt_items=items, score_steps=2)
        for stage in ("midtrain", "prior"):
            assert run.records[stage].key == finished.records[stage].key
        assert run.records["sft"].key != finished.records["sft"].key
        for stage in ("sft", "score"):
            tokens = run.records[stage].summary["prompt_tokens"]
            assert tokens["sid"] < tokens["short"] < tokens["text"]
        mean = run.records["score"].summary["tokens_mean"]
        assert mean == pytest.approx(tokens[items] + 1, abs=0.1)  # and the ranking mark


@pytest.mark.slow
def test_vectors_in_a_run(tiny_run, finished_copy):
    run = tiny_run(finished_copy(), eval_rows=["score"], prompt_items="vector", score_steps=4)
    summary = run.records["score"].summary
    assert summary["tokens_max"] <= 60 and summary["prompt_tokens"]["vector"] < summary["prompt_tokens"]["sid"]
    assert "items.safetensors" in run.records["score"].files
    scorer = Scorer.load(run.context(), "score")
    requests = training_requests(run.context())[:6]
    orders = {request.request_id: range(5) for request in requests}
    for invariant in (False, True):
        read = replace(scorer, invariant=invariant).list_input(requests[0])
        layout = replace(scorer, invariant=invariant).layout(requests[0])
        assert [read.items[slot] for slot in read.slots] == [requests[0].items[place] for place in layout]
        assert len(read.items) == len(read.input_ids)
        shown = [item for item in read.items if item not in requests[0].items and item]
        assert shown == list(requests[0].history[-run.settings["prompt_history"] :])
        assert np.allclose(read.features, requests[0].features.candidates[list(layout)])
    rows = scorer.log_probs(requests, orders)
    assert all(sum(map(math.exp, row)) == pytest.approx(1.0) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("items", ["text", "short", "vector"])
def test_shuffled_input_gives_the_same_order_in_the_invariant_form(tiny_run, finished_copy, items):
    options = {
        "prompt_items": items,
        "score_invariant": True,
        "score_steps": 2,
        "prior_features": ["base", "popularity"],
    }
    run = tiny_run(finished_copy(), ["rerank_score"], eval_rows=["score"], **options)
    assert run.records["score"].summary["valid"]["changed"] == 0
    scorer = Scorer.load(run.context(), "score")
    requests = training_requests(run.context())[:8]
    base = scorer.answer(requests)
    for seed in range(3):
        orders = {request.request_id: shuffled_order(request, seed) for request in requests}
        assert scorer.answer(requests, orders) == base
    other = replace(scorer, invariant=False) if items == "text" else None
    if other:  # the usual form depends on the order
        orders = [{r.request_id: shuffled_order(r, seed) for r in requests} for seed in range(2)]
        assert other.log_probs(requests, orders[0]) != other.log_probs(requests, orders[1])
