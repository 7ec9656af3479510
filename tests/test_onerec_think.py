"""OneRec-Think: its prompts and rows by hand, scores by brute force, a planted pattern, and a run that was killed."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import logged_keys

from recbole_gr2 import pipeline
from recbole_gr2.artifacts import load_requests
from recbole_gr2.catalog import Catalog
from recbole_gr2.config import ONEREC_THINK, load_settings
from recbole_gr2.llm.beam import SidTrie, beam_items
from recbole_gr2.llm.likelihood import continuation_log_likelihood
from recbole_gr2.llm.model import load_language_model, save_language_model
from recbole_gr2.llm.onerec_trainer import RolloutBeamTrainer, rollout_beam
from recbole_gr2.llm.vocabulary import add_tokens
from recbole_gr2.onerec_think import (
    candidate_scores,
    onerec_think_recommender,
    prompt_ids,
    prompt_maker,
    prompts_with_traces,
    reasons,
)
from recbole_gr2.policy import load_model, sid_trie
from recbole_gr2.prompts import PromptMaker
from recbole_gr2.recommenders import load_generator
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.tokens import added_tokens, sid_text
from recbole_gr2.stages import all_stages, onerec_think
from recbole_gr2.stages.onerec_think import most_similar, run, sentence, training_example, training_positions
from recbole_gr2.store import read_manifest, write_lines
from recbole_gr2.tasks import describe
from recbole_gr2.types import Candidate, Context, Item, Request

COUNT, LEVELS, CODES = 12, 2, 4
THINK, NO_THINK = ONEREC_THINK.values()  # the two stages
QUICK = "OneRecThink-no-think"  # a recommender that writes no traces
KINDS = ("Soap", "Brush", "Comb")
PLANTED = {
    "onerec_think_steps": 300,
    "onerec_think_batch_size": 16,
    "llm_micro_batch_size": 16,
    "onerec_think_learning_rate": 5e-3,
    "onerec_think_passes": 99.0,
    "onerec_think_max_trace": 8,
    "onerec_think_samples": 3,
    "onerec_think_beams": COUNT,
    "onerec_think_texts": 2,
    "llm_save_steps": 1000,
}


def toy_items() -> tuple[Item, ...]:
    return tuple(
        Item(
            item_id=n,
            token=f"t{n}",
            title=f"Thing {n}",
            categories=f"Root > {KINDS[n % 3]}",
            brand="",
            sid=(n % 3, n // 3),
        )
        for n in range(1, COUNT + 1)
    )


@dataclass
class ToyData:
    """Every shopper takes the items in a circle: item n + 1 follows item n."""

    users: int = 40
    uid: str = "user"

    def __post_init__(self):
        rng = random.Random(0)
        self.catalog, self.item_count = Catalog(toy_items()), COUNT
        starts = [rng.randrange(COUNT) for _ in range(self.users)]
        self.sequences = {u: np.array([(s + n) % COUNT + 1 for n in range(7)]) for u, s in enumerate(starts)}

    def train_sequences(self):
        return {user: items[:-2] for user, items in self.sequences.items()}

    def known_items(self, interactions):
        return [items[: -{"hold_out": 3, "train": 2}[interactions]].tolist() for items in self.sequences.values()]

    def history(self, user, split):
        return tuple(self.sequences[user][: -{"train": 3, "valid": 2, "test": 1}[split]].tolist())


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Context:
    """A toy catalogue with a random language model in the place of the mid-trained one; nothing is trained yet."""
    root, data = tmp_path_factory.mktemp("toy"), ToyData()
    corpus = [describe(PromptMaker.of(SETTINGS, data.catalog).fields(item.item_id)) for item in data.catalog]
    corpus += [sentence(item) for item in data.catalog] + ["A shopper took", "Taken in order: "]
    model, tokenizer = load_language_model(
        "random",
        corpus=corpus,
        extra_tokens=added_tokens(LEVELS, CODES + 1, 2),
        seed=1,
        random_config={"vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 2},
    )
    folders = {name: root / name for name in ("embeddings", "tokenizer", "midtrain_all", THINK, NO_THINK)}
    for folder in folders.values():
        folder.mkdir()
    save_language_model(model, tokenizer, folders["midtrain_all"] / "model")
    write_lines(folders["tokenizer"] / "sids.jsonl", ({"item_id": i.token, "sid": list(i.sid)} for i in data.catalog))
    return Context(
        stage=THINK,
        settings=SETTINGS,
        data=data,
        folder=folders[THINK],
        inputs={},
        folders=folders,
        say=lambda text: None,
    )


SETTINGS = {**load_settings(config_dict={"preset": "smoke"}), **PLANTED}


class Recorded(dict):
    """Settings that remember which of them were read."""

    def __init__(self, values) -> None:
        super().__init__(values)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


@pytest.fixture(scope="module")
def trained(toy):
    """The context `toy` when both models are trained."""
    for name in (THINK, NO_THINK):
        run(at(toy, name))
    return toy


@pytest.fixture(scope="module")
def untrained(toy):
    """(model, tokenizer, maker) with the marks of a trace."""
    model, tokenizer = load_model(toy.folders["midtrain_all"])
    add_tokens(model, tokenizer, ["<think>", "</think>"])
    return model, tokenizer, prompt_maker(SETTINGS, toy.data.catalog)


def changed(context: Context, **changes) -> Context:
    return replace(context, settings={**context.settings, **changes})


def at(context: Context, name: str, folder: Path | None = None, **changes) -> Context:
    """The same context as the stage `name` sees it, writing to `folder`, with other settings."""
    folder = folder or context.folders[name]
    return replace(changed(context, **changes), stage=name, folder=folder, folders={**context.folders, name: folder})


# --- prompts and rows ------------------------------------------------------------------------------------------------

TEXTS = (
    "A shopper took\n<|sid_begin|><s_a_2><s_b_0><|sid_end|>, its title is Thing 2, its category is Comb"
    "\n<|sid_begin|><s_a_0><s_b_1><|sid_end|>, its title is Thing 3, its category is Soap\n"
)
SHOWN = f"{TEXTS}Taken in order: <|sid_begin|><s_a_2><s_b_0><|sid_end|><|sid_begin|><s_a_0><s_b_1><|sid_end|>"
NEXT = "<|sid_begin|><s_a_1><s_b_1><|sid_end|>"


def test_a_prompt_is_the_texts_of_the_last_items_and_all_semantic_ids(untrained):
    _, tokenizer, maker = untrained
    assert tokenizer.decode(prompt_ids(maker, tokenizer, (2, 3))) == SHOWN
    longer = tokenizer.decode(prompt_ids(maker, tokenizer, (5, 2, 3)))  # onerec_think_texts is 2
    assert longer == SHOWN.replace("order: ", f"order: {sid_text(maker.catalog.item(5).sid)}")
    assert prompt_ids(maker, tokenizer, (7, *[1] * 28, 2, 3)) == prompt_ids(maker, tokenizer, (*[1] * 28, 2, 3))


def test_rows_by_hand(untrained):
    _, tokenizer, maker = untrained
    target, length = maker.catalog.item(4), len(prompt_ids(maker, tokenizer, (2, 3)))
    plain = training_example(maker, tokenizer, (2, 3), target, "", 8)
    assert tokenizer.decode(plain.input_ids) == SHOWN + NEXT
    assert plain.parts == [0] * length + [0, 2, 2, 0]

    trace = sentence(target)
    assert trace == " Next is Brush. "
    trace_ids = tokenizer(trace, add_special_tokens=False)["input_ids"]
    row = training_example(maker, tokenizer, (2, 3), target, trace, 20)
    assert tokenizer.decode(row.input_ids) == f"{SHOWN}<think> Next is Brush. </think>{NEXT}"
    assert row.parts == [0] * length + [0] + [1] * (len(trace_ids) + 1) + [0, 2, 2, 0]
    assert row.input_ids[:length] == plain.input_ids[:length]

    cut = training_example(maker, tokenizer, (2, 3), target, trace, 3)
    assert cut.input_ids[length:] == [*row.input_ids[length : length + 3], *row.input_ids[-5:]]
    assert training_example(maker, tokenizer, (2, 3), target, trace, 0) == plain


def test_a_sentence_without_category_or_title():
    assert sentence(Item(item_id=1, token="t", title="A fine thing")) == " Next is A fine thing. "
    assert sentence(Item(item_id=1, token="t", title="")) == " Next is t. "


@pytest.mark.parametrize("hold_out", [True, False])
def test_training_positions(hold_out):
    data = ToyData()
    learnt = data.known_items("hold_out" if hold_out else "train")
    found = training_positions(learnt, seed=3)
    assert len(found) == data.users * (4 - hold_out)
    assert len({history for history, _ in found}) <= len(found) and found != sorted(found)
    assert found == training_positions(learnt, seed=3)
    longest = max(len(history) for history, _ in found)
    # Of 7 items the last two are valid and test, and the one before is the target of the train list.
    assert longest == (3 if hold_out else 4)
    assert all(target == history[-1] % COUNT + 1 for history, target in found)


def test_steps_end_with_the_passes(toy, tmp_path):
    once = at(
        toy,
        NO_THINK,
        tmp_path,
        onerec_think_passes=1.0,
        onerec_think_steps=50,
        onerec_think_batch_size=40,
        llm_micro_batch_size=40,
    )
    summary = run(once)
    assert summary["texts"] == 160 and summary["steps"] == 4  # 40 users with 4 positions each


# --- traces and scores -----------------------------------------------------------------------------------------------

HISTORIES = [(1, 2, 3), (7,), (4, 5), (11, 12)]


def test_traces_end_and_depend_on_their_history_alone(untrained):
    model, tokenizer, maker = untrained
    heads = [prompt_ids(maker, tokenizer, history) for history in HISTORIES]
    think, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    found = prompts_with_traces(model, tokenizer, maker, SETTINGS, True, HISTORIES)
    traces = []
    for number, ids in enumerate(found):
        head = heads[number // 3]
        assert ids[: len(head) + 1] == [*head, think] and ids[-1] == end
        traces.append(tuple(ids[len(head) + 1 : -1]))
        assert len(traces[-1]) <= 8 and end not in traces[-1]
    assert len(set(traces)) > 8  # sampled, not the same words again
    for size in (1, 2, 64):
        chosen = {**SETTINGS, "eval_batch_lists": size}
        assert prompts_with_traces(model, tokenizer, maker, chosen, True, HISTORIES[::-1])[:3] == found[-3:]
    likeliest = prompts_with_traces(
        model, tokenizer, maker, {**SETTINGS, "onerec_think_temperature": 0.0}, True, HISTORIES
    )
    assert likeliest[0] == likeliest[1] == likeliest[2] and likeliest[0] != likeliest[3]


def test_a_trace_of_no_tokens_is_no_trace(untrained):
    model, tokenizer, maker = untrained
    plain = prompts_with_traces(model, tokenizer, maker, SETTINGS, False, HISTORIES)
    assert (
        prompts_with_traces(model, tokenizer, maker, {**SETTINGS, "onerec_think_max_trace": 0}, True, HISTORIES)
        == plain
    )


def brute_force(context: Context, name: str, histories) -> np.ndarray:
    """(B, N): every item's log-likelihood after every prompt of a stage, the best of each history's prompts."""
    model, tokenizer = load_model(context.folders[name])
    items, rows = context.data.catalog, []
    maker = prompt_maker(context.settings, items)
    begin = tokenizer.convert_tokens_to_ids("<|sid_begin|>")
    codes = [tokenizer(sid_text(i.sid), add_special_tokens=False)["input_ids"][1:-1] for i in items]
    for history in histories:
        found = [
            continuation_log_likelihood(
                model,
                [[*ids, begin]],
                [codes],
                pad_id=tokenizer.pad_token_id,
                trie=sid_trie(context.settings, tokenizer, items),
            )[0]
            for ids in prompts_with_traces(model, tokenizer, maker, context.settings, reasons(name), [history])
        ]
        rows.append(np.max(found, axis=0))
    return np.array(rows)


def score_rows(generator, users, split="test") -> torch.Tensor:
    return generator.score_rows(None, [generator.data.history(user, split) for user in users])


@pytest.mark.slow
@pytest.mark.parametrize("name", ONEREC_THINK)
def test_scores_are_those_of_a_brute_force(trained, name):
    context, row = changed(trained, cand_exclude_seen=False), ONEREC_THINK[name]
    users = list(range(12))
    histories = [context.data.history(user, "test") for user in users]
    expected = brute_force(context, row, histories)
    found = score_rows(onerec_think_recommender(context, name), users)
    assert found.dtype == torch.float64 and found.shape == (12, COUNT + 1) and torch.isneginf(found[:, 0]).all()
    np.testing.assert_allclose(found[:, 1:].numpy(), expected, atol=2e-4)

    lists = [request(user, history) for user, history in zip(users, histories, strict=True)]
    listed = candidate_scores(context, row, *load_model(context.folders[row]), lists)
    np.testing.assert_allclose(
        listed, [[own[i - 1] for i in r.items] for own, r in zip(expected, lists, strict=True)], atol=2e-4
    )
    false = [request(user, history, target=1) for user, history in zip(users, histories, strict=True)]
    assert candidate_scores(context, row, *load_model(context.folders[row]), false) == listed


def request(user: int, history, target: int = 12, candidates=(3, 9, 12, 1)) -> Request:
    listed = tuple(Candidate(item_id=i, score=-float(r), rank=r) for r, i in enumerate(candidates, start=1))
    return Request(
        request_id=f"test/{user}",
        user_token=str(user),
        split="test",
        history=tuple(history),
        candidates=listed,
        target=target,
        provider="p",
    )


@pytest.mark.slow
def test_several_traces_find_more_than_one(trained):
    """What the best of several adds is not nothing, or the comparison above would say little."""
    users = list(range(12))
    histories = [trained.data.history(user, "test") for user in users]
    hot = changed(trained, onerec_think_temperature=3.0)  # what it learnt leaves one trace to a history
    three = brute_force(hot, THINK, histories)
    one = brute_force(changed(hot, onerec_think_samples=1), THINK, histories)
    assert (three >= one - 1e-5).all() and (three > one + 1e-3).any()


class ToyRecent(ToyData):
    """Histories as long as those that were learnt: a model of this size reads no longer ones reliably."""

    def history(self, user, split):
        return super().history(user, split)[-3:]


@pytest.mark.slow
def test_it_learns_a_planted_pattern(trained):
    """Item n + 1 follows item n; nobody's valid and test items were learnt."""
    users, trained = list(range(40)), replace(trained, data=ToyRecent())
    targets = torch.tensor([int(trained.data.sequences[user][-1]) for user in users])
    for name in ONEREC_THINK:
        scores = score_rows(onerec_think_recommender(trained, name), users)
        seen = torch.tensor([list(trained.data.history(user, "test")) for user in users])
        assert torch.isneginf(scores.gather(1, seen)).all(), name
        assert (scores.argmax(1) == targets).float().mean() > 0.9, name
    model, tokenizer = load_model(trained.folders[THINK])
    maker = prompt_maker(trained.settings, trained.data.catalog)
    greedy = {**trained.settings, "onerec_think_temperature": 0.0, "onerec_think_samples": 1}
    (ids,) = prompts_with_traces(model, tokenizer, maker, greedy, True, [(2, 3)])
    assert tokenizer.decode(ids) == f"{SHOWN}<think> Next is Brush. </think>"


# --- the paper's variant ---------------------------------------------------------------------------------------------

PAPER = {
    "onerec_think_variant": "paper",
    "onerec_think_steps": 10,
    "onerec_think_similar": 2,
    "onerec_think_rl_steps": 4,
    "onerec_think_rl_prompts_per_step": 4,
    "onerec_think_rl_num_generations": 4,
    "onerec_think_rl_beams": 1,
    "rl_save_steps": 1,
    "onerec_think_rl_learning_rate": 1e-2,
    "onerec_think_rl_kl": 0.1,
}


def test_rollout_beam_by_hand():
    target = torch.tensor([1, 2, 3, 4])
    for beams, reward in (
        ([[1, 2, 3, 4], [9, 9, 9, 9]], 4),  # the target itself, whatever stands beside it
        ([[1, 2, 9, 9], [9, 2, 3, 4]], 3),  # by position, not by prefix
        ([[1, 9, 9, 9], [9, 2, 9, 9], [9, 9, 3, 9]], 1),  # the best beam, not what all of them have together
        ([[4, 3, 2, 1]], 0),  # right codes in wrong places
        ([[9, 9, 9, 4]], 1),
    ):
        assert rollout_beam(torch.tensor(beams), target).item() == reward
    both = torch.tensor([[[1, 2, 3, 4]], [[9, 9, 9, 9]]])
    assert rollout_beam(both, target).tolist() == [4, 0]


@given(st.data())
@settings(deadline=None)
def test_rollout_beam_never_falls_with_more_beams(data):
    codes = st.lists(st.integers(0, 2), min_size=3, max_size=3)
    beams, more, target = data.draw(st.lists(codes, min_size=1)), data.draw(st.lists(codes)), data.draw(codes)
    reward = rollout_beam(torch.tensor(beams), torch.tensor(target)).item()
    assert reward == max(sum(a == b for a, b in zip(beam, target, strict=True)) for beam in beams)
    assert reward <= rollout_beam(torch.tensor(beams + more), torch.tensor(target)).item() <= 3


def test_most_similar_items_stay_in_time_order():
    embeddings = np.eye(4)[[0, 1, 0, 2, 0]] * [[1], [1], [9], [1], [1]]  # items 1, 3 and 5 point the same way
    assert most_similar((3, 2, 4, 1), 5, embeddings, 2) == (3, 1)
    assert most_similar((4, 2, 3), 5, embeddings, 1) == (3,)
    assert most_similar((4, 2), 5, embeddings, 10) == (4, 2)
    assert most_similar((2, 4), 5, np.zeros((5, 3)), 1) == (2,)  # items without a text have no direction


@pytest.fixture(scope="module")
def papered(toy, tmp_path_factory):
    """(context, summary) of the paper's variant."""
    np.save(toy.folders["embeddings"] / "embeddings.npy", np.random.default_rng(0).normal(size=(COUNT, 4)))
    context = at(toy, THINK, tmp_path_factory.mktemp("paper"), **PAPER)
    context = replace(context, settings=Recorded(context.settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onerec_think, "write_model_card", lambda *args, **options: None)  # it reads every setting
        return context, run(context)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_a_rationale_knows_the_target_and_the_prompt_does_not(papered, untrained):
    context, _ = papered
    _, tokenizer, maker = untrained
    prompt = tokenizer.decode(onerec_think.rationale_prompt(maker, tokenizer, (2, 3), 4))
    assert f"{TEXTS}Next the shopper took {NEXT}, its title is Thing 4" in prompt
    written = lines(context.folder / "rationales.jsonl")
    drawn = training_positions(context.data.known_items("train"), seed=derive_seed(SETTINGS["seed"], "onerec_think"))
    examples = [(tuple(line["history"]), line["target"]) for line in written]
    assert examples == drawn[: len(examples)] and len(examples) > 100
    sample = (context.folder / "sample.txt").read_text().rstrip("\n")
    head = tokenizer.decode(prompt_ids(maker, tokenizer, drawn[0][0]))
    named = sid_text(maker.catalog.item(drawn[0][1]).sid)
    assert sample.startswith(f"{head}<think> ") and sample.endswith(f"</think>{named}")


@pytest.mark.slow
def test_logged_values_are_documented(papered):
    context, _ = papered
    log = json.loads((context.folder / "log.json").read_text())
    logged = {name for line in [*log["sft"], *log["rl"]] for name in line}
    assert logged - logged_keys() == set() and {"kl", "reward/rollout_beam", "loss/trace", "loss/item"} <= logged


@pytest.mark.slow
def test_rollouts_are_paid_by_their_beams(papered):
    context, summary = papered
    rolled = lines(context.folder / "checkpoints" / "rl" / "rollouts.jsonl")
    assert len(rolled) == 4 * 4 * 4 and {line["step"] for line in rolled} == {0, 1, 2, 3}
    rewards = [line["reward"] for line in rolled]
    assert rewards == [line["terms"]["rollout_beam"] for line in rolled]
    assert set(rewards) <= {0.0, 1.0, 2.0} and len(set(rewards)) > 1
    assert summary["rl_first"]["reward"] == pytest.approx(np.mean(rewards[:16]))


@pytest.mark.slow
def test_rl_moves_the_model_away_from_its_reference(toy, tmp_path):
    """From a half-trained public model, whose traces differ and lead to different items."""
    half = at(
        toy,
        THINK,
        tmp_path,
        **{
            **PAPER,
            "onerec_think_variant": "public",
            "onerec_think_steps": 35,
            "onerec_think_learning_rate": 4e-3,
            "onerec_think_max_trace": 12,
        },
    )
    run(half)
    model, tokenizer = load_model(half.folders[THINK])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    drawn = training_positions(half.data.known_items("hold_out"), seed=1)
    maker = prompt_maker(half.settings, half.data.catalog)
    after, log = onerec_think.reinforce(half, model, tokenizer, maker, drawn)
    assert any(line["frac_groups_kept"] > 0 for line in log)
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-6) and log[-1]["kl"] > 1e-4
    assert any(not torch.equal(before[name], weight) for name, weight in after.state_dict().items())


def test_a_reward_is_that_of_the_own_search(untrained):
    model, tokenizer, maker = untrained
    codes = torch.tensor([item.sid for item in maker.catalog])
    trie = SidTrie.of(tokenizer, codes.numpy())
    trainer = SimpleNamespace(
        policy=model,
        trie=trie,
        beams=3,
        constrained=True,
        codes=codes,
        leaf_codes=codes[trie.items[trie.starts[-1][:-1]] - 1],
        grammar=SimpleNamespace(pad_id=tokenizer.pad_token_id),
        settings=SimpleNamespace(bf16=False),
        requests={"r": request(0, (2, 3), target=4)},
    )
    begin = tokenizer.convert_tokens_to_ids("<|sid_begin|>")
    heads = prompts_with_traces(model, tokenizer, maker, {**SETTINGS, "onerec_think_samples": 8}, True, [(2, 3)])
    size = len(prompt_ids(maker, tokenizer, (2, 3))) + 1  # with <think>
    row = {"request_id": "r", "prompt_ids": heads[0][:size]}
    completions = [[*ids[size:], begin, tokenizer.eos_token_id] for ids in heads]
    found = [terms["rollout_beam"] for terms in RolloutBeamTrainer.reward_terms(trainer, row, completions, [])]
    expected = []
    for ids in heads:
        (leaves,) = beam_items(model, [ids], trie, beams=3, batch_size=1, pad_id=tokenizer.pad_token_id).leaves
        sids = [maker.catalog.item(int(trie.items[trie.starts[-1][leaf]])).sid for leaf in leaves]
        expected.append(max(sum(a == b for a, b in zip(sid, (1, 1), strict=True)) for sid in sids))
    assert found == expected


@pytest.mark.slow
def test_a_killed_rl_ends_as_one_that_was_not(papered, tmp_path):
    context, _ = papered
    rounds = 0

    def kill(line):
        nonlocal rounds
        rounds += "frac_groups_kept" in line
        if rounds == 3:
            raise Killed

    again = replace(at(context, THINK, tmp_path), say=kill)
    with pytest.raises(Killed):
        run(again)
    printed = []
    run(replace(again, say=printed.append))
    assert sum("frac_groups_kept" in line for line in printed) < 4
    assert_same_model(context, again)
    rolled = Path("checkpoints/rl/rollouts.jsonl")
    assert (tmp_path / rolled).read_text() == (context.folder / rolled).read_text()


def test_without_traces_the_variants_are_one(toy, tmp_path):
    models = [
        at(toy, NO_THINK, tmp_path / name, **{**PAPER, "onerec_think_variant": name, "onerec_think_steps": 2})
        for name in ("public", "paper")
    ]
    for context in models:
        run(context)
    assert_same_model(*models)
    assert not (tmp_path / "paper" / "rationales.jsonl").exists()


# --- the stage -------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def assert_same_model(one: Context, two: Context) -> None:
    left, right = (load_model(context.folders[context.stage])[0].state_dict() for context in (one, two))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
@pytest.mark.parametrize("name", [THINK, NO_THINK])
def test_a_killed_stage_ends_as_one_that_was_not(toy, tmp_path, name):
    def kill(line):
        if line.startswith("step 5/6"):
            raise Killed

    whole, again = (
        at(toy, name, tmp_path / folder, onerec_think_steps=6, llm_save_steps=3) for folder in ("whole", "again")
    )
    printed = []
    run(whole)
    with pytest.raises(Killed):
        run(replace(again, say=kill))
    summary = run(replace(again, say=printed.append))
    assert next(line for line in printed if line.startswith("step ")).startswith("step 4/")  # after the checkpoint at 3
    assert summary["steps"] == 6 and (again.folder / "sample.txt").is_file()
    assert_same_model(whole, again)


def test_the_stages_are_planned_only_where_they_are_named(tmp_path):
    data = SimpleNamespace(fingerprint="x")

    def plan(**given):
        chosen = load_settings(config_dict={"preset": "smoke", "checkpoint_dir": str(tmp_path), **given})
        return {entry.stage.name: entry for entry in pipeline.plan(chosen, data)}

    name, other = ONEREC_THINK
    rows = ["lambdamart", "midtrain", "sft", "rl", "shuffled"]
    without, with_it, both = plan(), plan(models=[name]), plan(models=[other, name])
    lists = plan(eval_rows=[*rows, THINK])
    rank, other_rank = f"rerank_{THINK}", f"rerank_{NO_THINK}"
    assert "midtrain" in without and "midtrain_all" not in without
    # The lists alone: nobody searches the catalogue.
    assert set(lists) - set(without) == {"midtrain_all", THINK, rank}
    only = plan(eval_rows=["lambdamart", THINK])
    assert "midtrain" not in only and only[THINK].key == lists[THINK].key
    assert "midtrain_all" not in plan(models=[name], mid_hold_out=False)
    assert set(with_it) - set(lists) == {name} and set(lists) < set(with_it)
    assert set(both) - set(with_it) == {other, NO_THINK, other_rank}
    assert plan(models=[name], eval_rows=[*rows, THINK]).keys() == with_it.keys()
    assert lists[THINK].key == with_it[THINK].key == both[THINK].key != both[NO_THINK].key
    assert with_it["evaluate"].needs[rank] == with_it[rank].key == lists[rank].key == both[rank].key
    assert with_it["evaluate"].needs[name] == with_it[name].key == both[name].key != both[other].key
    changed_keys = plan(models=[name], onerec_think_samples=1)
    assert all(changed_keys[stage].key != with_it[stage].key for stage in (THINK, rank, name, "evaluate"))
    wider = plan(models=[name], onerec_think_beams=30)
    assert wider[THINK].key == with_it[THINK].key and wider[name].key != with_it[name].key
    assert plan(models=[name], topk=[30])[name].key == wider[name].key
    assert plan(models=[name], topk=[5])[name].key == with_it[name].key
    assert plan(models=[name], llm_save_steps=1)["evaluate"].key == with_it["evaluate"].key


@pytest.mark.parametrize("name", ONEREC_THINK)
def test_it_is_no_base_model(capsys, tmp_path, name):
    from recbole_gr2.quick_start import main

    assert main(["--preset=smoke", f"--base_model={name}", f"--checkpoint_dir={tmp_path}"]) == 2
    assert f"{name} cannot be the base_model" in capsys.readouterr().err and not list(Path(tmp_path).iterdir())


@pytest.fixture(scope="module")
def tabled(tiny_run, finished_copy):
    """A run on the data set `tiny` with both as re-rankers, and with the faster one as a recommender."""
    return tiny_run(finished_copy(), models=[QUICK], eval_rows=[THINK])


@pytest.mark.slow
def test_methods_of_the_table(tabled):
    entries = tabled.records["evaluate"].summary["methods"]
    methods = {(entry["method"], entry["scope"]): entry for entry in entries}
    lists = ("base", "oracle", "prior", *ONEREC_THINK.values())
    expected = {(method, scope) for method in lists for scope in ("all_users", "hit_users")} | {(QUICK, "all_users")}
    assert methods.keys() == expected
    assert methods[QUICK, "all_users"]["unchanged"] is None and methods[QUICK, "all_users"]["n"] == 150
    for method in ONEREC_THINK.values():
        assert 0 <= methods[method, "hit_users"]["unchanged"] < 1 and methods[method, "all_users"]["n"] == 150
        record = read_manifest(tabled.folders[method])
        assert record.summary["steps"] == 4
        assert {"model/model.safetensors", "log.json", "sample.txt"} < set(record.files)


@pytest.mark.slow
def test_every_setting_that_is_read_is_in_the_key(tabled, papered):
    """Otherwise a changed setting would be answered from the cache."""
    context, _ = papered
    reading = replace(tabled.context(THINK), settings=Recorded(tabled.settings))
    loaded = load_model(reading.folders[THINK])
    candidate_scores(reading, THINK, *loaded, load_requests(tabled.context(), "test")[:2])
    onerec_think_recommender(replace(reading, folders=tabled.folders), QUICK)
    read = context.settings.read | reading.settings.read
    stages = {stage.name: stage for stage in all_stages(tabled.settings)}
    speed = {key for key, entry in tabled.settings.declared.items() if entry.speed}
    own = {key for key in tabled.settings if key.startswith("onerec_think_")}
    assert own <= read
    read -= {"onerec_think_beams", "topk"}  # the key has their maximum
    needs = (QUICK, *stages[QUICK].needs, *stages[THINK].needs, "tokenizer", "embeddings")
    prefixes = [prefix for need in needs for prefix in stages[need].settings]
    assert read - speed <= tabled.settings.results(prefixes).keys()


def test_the_mid_trained_generator_has_one_prompt_a_history(toy):
    """GR2Generator shares its class: SIDs alone, one prompt a history, all items scored by their own likelihood."""
    from recbole_gr2.prompts import history_ids

    context = changed(toy, cand_beams=COUNT, cand_exclude_seen=False, mid_max_length=64)
    generator = load_generator(context)
    model, tokenizer = load_model(toy.folders["midtrain_all"])
    begin, items = tokenizer.convert_tokens_to_ids("<|sid_begin|>"), toy.data.catalog
    codes = [tokenizer(sid_text(i.sid), add_special_tokens=False)["input_ids"][1:-1] for i in items]
    heads = [[*history_ids(toy.data.history(user, "test"), items, tokenizer, 64), begin] for user in range(4)]
    expected = continuation_log_likelihood(
        model, heads, [codes] * 4, pad_id=tokenizer.pad_token_id, trie=sid_trie(toy.settings, tokenizer, items)
    )
    np.testing.assert_allclose(score_rows(generator, range(4))[:, 1:].numpy(), expected, atol=2e-4)


@pytest.mark.slow
def test_the_mid_trained_generator_learns_a_planted_pattern(toy, tmp_path):
    """Mid-training itself learns that item n + 1 follows item n, without valid and test items.

    Prompts are no longer than what was learnt: a model of this size knows no other position.
    """
    from recbole_gr2.stages import midtrain

    context = at(
        toy,
        "midtrain_all",
        tmp_path / "midtrain_all",
        sid_levels=LEVELS,
        sid_codes=CODES + 1,
        mid_codebooks=False,
        llm_random={"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2},
        mid_tokens=120000,
        mid_mix={"sequential": 0.9, "caption": 0.1},
        mid_learning_rate=3e-3,
        cand_beams=COUNT,
    )
    summary = midtrain.run(context)
    longest = summary["tokens"]["sequential"] // summary["texts"]["sequential"]
    context = changed(context, mid_max_length=longest)
    users = list(range(40))
    targets = torch.tensor([int(toy.data.sequences[user][-1]) for user in users])
    for mask in (False, True):
        generator = load_generator(changed(context, cand_exclude_seen=mask))
        assert (score_rows(generator, users).argmax(1) == targets).float().mean() > 0.9
