"""Rewards: each one by hand for ten kinds of answers, and copying under the plain and the conditional form."""

import math
from dataclasses import replace

import pytest

from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.rewards import REWARDS, WeightedRewards, overlong
from recbole_gr2.types import Answer, Candidate, Request

ITEMS = (10, 20, 30, 40)


def request(target: int = 30) -> Request:
    candidates = tuple(Candidate(item_id=item, score=-rank, rank=rank) for rank, item in enumerate(ITEMS, 1))
    return Request(
        request_id="r1",
        user_token="u",
        split="train",
        history=(1, 2),
        candidates=candidates,
        target=target,
        provider="p",
    )


def answer(*ranking: int, status: str = "ok", **counts: int) -> Answer:
    return Answer(request_id="r1", ranking=ranking, status=status, **counts)


# The target is item 30, at rank 3 of 4. Columns: rank_gain, auc, ndcg, format, promoted, moved, unchanged.
ANSWERS = {
    "empty": (answer(10, 20, 30, 40, status="unreadable", missing=4), 0.0, 1 / 3, 1 / 2, 0, 0, 0, 1),
    "junk": (answer(10, 20, 30, 40, status="unreadable", missing=4, foreign=9), 0.0, 1 / 3, 1 / 2, 0, 0, 0, 1),
    "copy": (answer(10, 20, 30, 40), 0.0, 1 / 3, 1 / 2, 1, 0, 0, 1),
    "reversed": (answer(40, 30, 20, 10), 1 / 4, 2 / 3, 1 / math.log2(3), 1, 1, 1, 0),
    "missing": (answer(30, 10, 20, 40, status="repaired", missing=3), 2 / 4, 1, 1.0, 0, 1, 1, 0),
    "repeated": (answer(20, 30, 10, 40, status="repaired", repeated=1), 1 / 4, 2 / 3, 1 / math.log2(3), 0, 1, 1, 0),
    "foreign": (answer(40, 10, 20, 30, status="repaired", foreign=1), -1 / 4, 0, 1 / math.log2(5), 0, 0, 1, 0),
    "truncated": (answer(30, 10, 20, 40, status="truncated"), 2 / 4, 1, 1.0, 0, 1, 1, 0),
    "worse": (answer(10, 20, 40, 30), -1 / 4, 0, 1 / math.log2(5), 1, 0, 1, 0),
    "perfect": (answer(30, 10, 20, 40), 2 / 4, 1, 1.0, 1, 1, 1, 0),
}
NAMES = ("rank_gain", "auc", "ndcg", "format", "promoted", "moved", "unchanged")
PLAIN = {"rank_gain": 1.0, "format": 0.2}
CONDITIONAL = {"rank_gain": 1.0, "format": {"weight": 0.2, "only_if": "promoted"}}


@pytest.mark.parametrize("kind", ANSWERS)
def test_each_reward_by_hand(kind):
    given, *expected = ANSWERS[kind]
    assert {name: REWARDS[name](request(), given) for name in NAMES} == dict(zip(NAMES, expected, strict=False))


def test_the_table_contains_every_reward():
    assert set(NAMES) == set(REWARDS) and len(ANSWERS) == 10


def graded(*grades: int) -> Request:
    return replace(request(), grades=grades)


@pytest.mark.parametrize(
    ("ranking", "auc", "ndcg", "moved"),
    [
        # grades of 10, 20, 30, 40: 0, 1, 2, 0. Five pairs differ in grade; 2^grade - 1 is 0, 1, 3, 0.
        ((30, 20, 10, 40), 1.0, 1.0, 1),
        ((20, 30, 10, 40), 4 / 5, (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)), 1),
        ((10, 20, 30, 40), 2 / 5, (1 / math.log2(3) + 3 / 2) / (3 + 1 / math.log2(3)), 0),
        ((10, 40, 20, 30), 0.0, (1 / 2 + 3 / math.log2(5)) / (3 + 1 / math.log2(3)), 1),
    ],
)
def test_graded_lists_by_hand(ranking, auc, ndcg, moved):
    rewards = {name: REWARDS[name](graded(0, 1, 2, 0), answer(*ranking)) for name in ("auc", "ndcg", "moved")}
    assert rewards == pytest.approx({"auc": auc, "ndcg": ndcg, "moved": moved})


def test_graded_rewards_do_not_apply_to_lists_of_equal_relevance():
    for grades in ((0, 0, 0, 0), (1, 1, 1, 1)):
        rewards = WeightedRewards({"ndcg": 1.0, "auc": 1.0})
        assert rewards.total(rewards.terms(graded(*grades), answer(*ITEMS))) is None
        assert not graded(*grades).has_signal
    assert REWARDS["moved"](graded(2, 1, 1, 0), answer(*ITEMS)) == 1.0  # the base order is optimal
    assert graded(0, 1, 2, 0).sorted_by_grade((40, 20, 10, 30)) == (30, 20, 40, 10)
    assert request().relevance == (0, 0, 1, 0) and request().sorted_by_grade((40, 20, 10, 30)) == (30, 40, 20, 10)


def test_a_target_in_first_place_gets_the_format_reward_if_it_stays_there():
    rewards = WeightedRewards(CONDITIONAL)
    answers = [answer(10, 20, 30, 40), answer(20, 10, 30, 40), answer(10, 20, 30, 40, status="repaired", missing=1)]
    totals = [rewards.total(rewards.terms(request(10), each)) for each in answers]
    assert totals == pytest.approx([0.2, -0.25, 0.0])
    assert REWARDS["moved"](request(10), answers[0]) == 1  # the base order is optimal


def test_rank_rewards_do_not_apply_to_a_list_without_its_target():
    rewards = WeightedRewards(CONDITIONAL)
    terms = rewards.terms(request(99), answer(10, 20, 30, 40))
    assert terms == {**dict.fromkeys(NAMES), "format": 1, "unchanged": 1}
    assert rewards.total(terms) is None
    assert WeightedRewards(PLAIN).total(terms) == 0.2


def test_conditions_by_hand():
    """GR2-TR, de-hacked: a valid answer gets NDCG and format, a copy of the base order only format."""
    rewards = WeightedRewards({"ndcg": {"weight": 2.0, "only_if": ["format", "moved"]}, "format": 0.2})
    totals = {kind: rewards.total(rewards.terms(request(), given)) for kind, (given, *_) in ANSWERS.items()}
    assert totals == pytest.approx(
        {
            "empty": 0,
            "junk": 0,
            "copy": 0.2,
            "reversed": 2 / math.log2(3) + 0.2,
            "missing": 0,
            "repeated": 0,
            "foreign": 0,
            "truncated": 0,
            "worse": 2 / math.log2(5) + 0.2,
            "perfect": 2.2,
        }
    )


@pytest.mark.parametrize(
    "weights",
    [
        {"format": {"only_if": "promoted"}},
        {"format": {"weight": 1, "if": "promoted"}},
        {"format": True},
        {"format": {"weight": 1, "only_if": 3}},
        {"format": "much"},
        {"format": None},
    ],
)
def test_an_entry_of_another_form_is_refused(weights):
    with pytest.raises(ConfigurationError, match="the reward format has the entry"):
        WeightedRewards(weights)


def test_a_custom_reward(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_a_user.py").write_text(
        "def brief(request, answer):\n    return 1.0 - answer.output_tokens / 10\n\n"
        "def last_changed(request, answer):\n    return float(answer.ranking[-1] != request.items[-1])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = WeightedRewards({"rewards_of_a_user:brief": {"weight": 2, "only_if": "rewards_of_a_user:last_changed"}})
    answers = [answer(10, 20, 30, 40, output_tokens=5), answer(40, 20, 30, 10, output_tokens=5)]
    assert [rewards.total(rewards.terms(request(), each)) for each in answers] == [0.0, 1.0]
    for name, message in (("rewards_of_a_user:long", "cannot import"), ("no_such_module:x", "cannot import")):
        with pytest.raises(ConfigurationError, match=message):
            WeightedRewards({"rank_gain": {"weight": 1, "only_if": name}})


@pytest.mark.parametrize(("reasoning", "expected"), [(0, 0), (12, 0), (13, -0.25), (14, -0.5), (16, -1), (20, -1)])
def test_overlong_is_linear_over_the_buffer(reasoning, expected):
    given = answer(10, 20, 30, 40, output_tokens=reasoning + 1 + 4 + 1)  # ranking mark, labels, eos
    assert overlong(max_reasoning=16, buffer=4)(request(), given) == expected


def test_overlong_refuses_a_buffer_that_does_not_fit():
    with pytest.raises(ConfigurationError, match="overlong buffer of 17"):
        overlong(max_reasoning=16, buffer=17)


# Policies, for three requests whose target is at ranks 1, 3 and 4.
POLICIES = {
    "oracle": lambda r: answer(r.target, *(item for item in ITEMS if item != r.target)),
    "honest": lambda r: answer(30, 10, 20, 40),  # right for one of the three
    "copy-cat": lambda r: answer(*ITEMS),
    "junk": lambda r: answer(*ITEMS, status="unreadable", missing=4),
}


def total_reward(rewards: WeightedRewards, policy: str) -> float:
    return sum(rewards.total(rewards.terms(r, POLICIES[policy](r))) for r in map(request, (10, 30, 40)))


def test_the_conditional_reward_orders_the_policies():
    rewards = WeightedRewards(CONDITIONAL)
    scores = {name: total_reward(rewards, name) for name in POLICIES}
    # honest: demotes 10 by one (-1/4), promotes 30 by two (1/2 + 0.2), leaves 40 last (0)
    assert scores == pytest.approx({"oracle": 1.25 + 0.6, "honest": 0.45, "copy-cat": 0.2, "junk": 0.0})
    assert scores["oracle"] > scores["honest"] > scores["copy-cat"] >= scores["junk"]


def test_the_plain_form_rewards_copying():
    plain, conditional = WeightedRewards(PLAIN), WeightedRewards(CONDITIONAL)
    r, copy = request(30), answer(*ITEMS)
    assert plain.total(plain.terms(r, copy)) == 0.2  # the weight of format
    assert conditional.total(conditional.terms(r, copy)) == 0.0
    assert total_reward(plain, "copy-cat") == pytest.approx(
        0.6
    )  # more than twice the rank gain of the honest policy, 0.25


@pytest.mark.parametrize("form", [PLAIN, CONDITIONAL])
def test_promoting_a_fixed_position_is_not_better_than_copying(form):
    """As in lists of a base model, more targets are at the top: 10, 10, 20 and 40."""
    rewards = WeightedRewards(form)
    policies = {
        "oracle": POLICIES["oracle"],
        "honest": lambda r: answer(20, 10, 30, 40) if r.target == 20 else answer(*ITEMS),
        "copy-cat": POLICIES["copy-cat"],
        "second slot": lambda r: answer(20, 10, 30, 40),
        "last slot": lambda r: answer(40, 10, 20, 30),
    }
    terms = {
        name: [rewards.terms(r, policy(r)) for r in map(request, (10, 10, 20, 40))] for name, policy in policies.items()
    }
    rank_gains = {name: sum(each["rank_gain"] for each in each_terms) for name, each_terms in terms.items()}
    # second: -1/4 twice, +1/4; last: -1/4 three times, +3/4
    assert rank_gains == {"oracle": 1.0, "honest": 0.25, "copy-cat": 0.0, "second slot": -0.25, "last slot": 0.0}
    scores = {name: sum(map(rewards.total, each_terms)) for name, each_terms in terms.items()}
    if form is CONDITIONAL:
        assert scores == pytest.approx(
            {"oracle": 1.8, "honest": 0.85, "copy-cat": 0.4, "second slot": -0.05, "last slot": 0.2}
        )
        assert scores["oracle"] > scores["honest"] > scores["copy-cat"] > scores["last slot"] > scores["second slot"]
    else:  # a fixed position and a copy both get the format reward
        assert scores["last slot"] == scores["copy-cat"] == pytest.approx(0.8)


def test_weights():
    rewards = WeightedRewards({"rank_gain": 2, "ndcg": 0})
    assert rewards.total(rewards.terms(request(), answer(30, 10, 20, 40))) == 1.0
    with pytest.raises(ConfigurationError, match="did you mean rank_gain"):
        WeightedRewards({"rank_gian": 1})
    with pytest.raises(ConfigurationError, match="no reward has a weight"):
        WeightedRewards({"ndcg": 0})


def test_an_exception_or_an_infinite_value_of_a_reward_is_not_hidden():
    def broken(request, answer):
        raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):  # as a built-in reward
        WeightedRewards({"broken": 1}, {"broken": broken}).terms(request(), answer(*ITEMS))
    with pytest.raises(GR2Error, match="'endless' is inf"):
        WeightedRewards({"endless": 1}, {"endless": lambda r, a: math.inf}).terms(request(), answer(*ITEMS))


WRONG = """
import numpy as np

def fails(request, answer):
    return 1 / 0

def out_of_memory(request, answer):
    raise MemoryError

def listed(request, answer):
    return [1.0]

def array(request, answer):
    return np.ones(2)

def text(request, answer):
    return "good"

def number(request, answer):
    return np.float32(0.5)

def alone(answer):
    return 1.0

constant = 1.0
"""


def test_wrong_rewards_of_a_user(tmp_path, monkeypatch):
    (tmp_path / "wrong_rewards.py").write_text(WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))

    def terms(name):
        return WeightedRewards({f"wrong_rewards:{name}": 1}).terms(request(), answer(*ITEMS))

    with pytest.raises(GR2Error) as error:
        terms("fails")
    assert f"'wrong_rewards:fails' raised ZeroDivisionError: division by zero ({tmp_path}" in error.value.what
    assert "wrong_rewards.py:5)" in error.value.what and request().request_id in error.value.where
    with pytest.raises(MemoryError):
        terms("out_of_memory")
    for name, value in (("listed", r"\[1.0\]"), ("array", "array"), ("text", "'good'")):
        with pytest.raises(GR2Error, match=f"the reward 'wrong_rewards:{name}' is {value}"):
            terms(name)
    assert terms("number")["wrong_rewards:number"] == 0.5
    for name, message in (("alone", "too many positional arguments"), ("constant", "is a float and no function")):
        with pytest.raises(ConfigurationError, match=message):
            WeightedRewards({f"wrong_rewards:{name}": 1})
