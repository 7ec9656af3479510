"""Rewards: every one against ten kinds of answers, by hand, and the hack that the conditional reward closes."""

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
    said, *expected = ANSWERS[kind]
    assert {name: REWARDS[name](request(), said) for name in NAMES} == dict(zip(NAMES, expected, strict=False))


def test_the_table_covers_every_reward():
    assert set(NAMES) == set(REWARDS) and len(ANSWERS) == 10


def graded(*grades: int) -> Request:
    return replace(request(), grades=grades)


@pytest.mark.parametrize(
    ("ranking", "auc", "ndcg", "moved"),
    [
        # grades of 10, 20, 30, 40: 0, 1, 2, 0. Five pairs have two grades; gains are 2^grade - 1: 0, 1, 3, 0.
        ((30, 20, 10, 40), 1.0, 1.0, 1),
        ((20, 30, 10, 40), 4 / 5, (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)), 1),
        ((10, 20, 30, 40), 2 / 5, (1 / math.log2(3) + 3 / 2) / (3 + 1 / math.log2(3)), 0),
        ((10, 40, 20, 30), 0.0, (1 / 2 + 3 / math.log2(5)) / (3 + 1 / math.log2(3)), 1),
    ],
)
def test_graded_lists_by_hand(ranking, auc, ndcg, moved):
    found = {name: REWARDS[name](graded(0, 1, 2, 0), answer(*ranking)) for name in ("auc", "ndcg", "moved")}
    assert found == pytest.approx({"auc": auc, "ndcg": ndcg, "moved": moved})


def test_lists_without_a_better_candidate_have_no_graded_reward():
    for grades in ((0, 0, 0, 0), (1, 1, 1, 1)):
        rewards = WeightedRewards({"ndcg": 1.0, "auc": 1.0})
        assert rewards.total(rewards.terms(graded(*grades), answer(*ITEMS))) is None
        assert not graded(*grades).teaches
    assert REWARDS["moved"](graded(2, 1, 1, 0), answer(*ITEMS)) == 1.0  # nothing could be better
    assert graded(0, 1, 2, 0).by_gain((40, 20, 10, 30)) == (30, 20, 40, 10)
    assert request().gains == (0, 0, 1, 0) and request().by_gain((40, 20, 10, 30)) == (30, 40, 20, 10)


def test_a_target_already_first_earns_the_format_by_staying_first():
    rewards = WeightedRewards(CONDITIONAL)
    said = [answer(10, 20, 30, 40), answer(20, 10, 30, 40), answer(10, 20, 30, 40, status="repaired", missing=1)]
    paid = [rewards.total(rewards.terms(request(10), each)) for each in said]
    assert paid == pytest.approx([0.2, -0.25, 0.0])
    assert REWARDS["moved"](request(10), said[0]) == 1  # nothing could be better


def test_without_its_target_a_request_has_no_reward():
    rewards = WeightedRewards(CONDITIONAL)
    terms = rewards.terms(request(99), answer(10, 20, 30, 40))
    assert terms == {**dict.fromkeys(NAMES), "format": 1, "unchanged": 1}
    assert rewards.total(terms) is None
    assert WeightedRewards(PLAIN).total(terms) == 0.2


def test_conditions_by_hand():
    """GR2-TR, de-hacked: a valid answer is paid its NDCG and its form, a copy its form alone."""
    rewards = WeightedRewards({"ndcg": {"weight": 2.0, "only_if": ["format", "moved"]}, "format": 0.2})
    paid = {kind: rewards.total(rewards.terms(request(), said)) for kind, (said, *_) in ANSWERS.items()}
    assert paid == pytest.approx(
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
    "paid",
    [
        {"format": {"only_if": "promoted"}},
        {"format": {"weight": 1, "if": "promoted"}},
        {"format": True},
        {"format": {"weight": 1, "only_if": 3}},
        {"format": "much"},
        {"format": None},
    ],
)
def test_another_form_of_payment_is_refused(paid):
    with pytest.raises(ConfigurationError, match="format is paid"):
        WeightedRewards(paid)


def test_a_reward_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def brief(request, answer):\n    return 1.0 - answer.output_tokens / 10\n\n"
        "def last_changed(request, answer):\n    return float(answer.ranking[-1] != request.items[-1])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = WeightedRewards({"my_rewards:brief": {"weight": 2, "only_if": "my_rewards:last_changed"}})
    said = [answer(10, 20, 30, 40, output_tokens=5), answer(40, 20, 30, 10, output_tokens=5)]
    assert [rewards.total(rewards.terms(request(), each)) for each in said] == [0.0, 1.0]
    for name, message in (("my_rewards:long", "cannot import"), ("no_such_module:x", "cannot import")):
        with pytest.raises(ConfigurationError, match=message):
            WeightedRewards({"rank_gain": {"weight": 1, "only_if": name}})


@pytest.mark.parametrize(("reasoning", "expected"), [(0, 0), (12, 0), (13, -0.25), (14, -0.5), (16, -1), (20, -1)])
def test_overlong_is_linear_over_the_buffer(reasoning, expected):
    said = answer(10, 20, 30, 40, output_tokens=reasoning + 1 + 4 + 1)  # mark, labels, eos
    assert overlong(max_reasoning=16, buffer=4)(request(), said) == expected


def test_overlong_refuses_a_buffer_that_does_not_fit():
    with pytest.raises(ConfigurationError, match="overlong buffer of 17"):
        overlong(max_reasoning=16, buffer=17)


# Policies, asked about three requests whose target is at ranks 1, 3 and 4.
POLICIES = {
    "oracle": lambda r: answer(r.target, *(item for item in ITEMS if item != r.target)),
    "honest": lambda r: answer(30, 10, 20, 40),  # finds one of the three
    "copy-cat": lambda r: answer(*ITEMS),
    "junk": lambda r: answer(*ITEMS, status="unreadable", missing=4),
}


def earned(rewards: WeightedRewards, policy: str) -> float:
    return sum(rewards.total(rewards.terms(r, POLICIES[policy](r))) for r in map(request, (10, 30, 40)))


def test_the_conditional_reward_orders_the_policies():
    rewards = WeightedRewards(CONDITIONAL)
    scores = {name: earned(rewards, name) for name in POLICIES}
    # honest: demotes 10 by one (-1/4), promotes 30 by two (1/2 + 0.2), leaves 40 last (0)
    assert scores == pytest.approx({"oracle": 1.25 + 0.6, "honest": 0.45, "copy-cat": 0.2, "junk": 0.0})
    assert scores["oracle"] > scores["honest"] > scores["copy-cat"] >= scores["junk"]


def test_the_plain_reward_is_hacked_by_copying():
    plain, conditional = WeightedRewards(PLAIN), WeightedRewards(CONDITIONAL)
    r, copy = request(30), answer(*ITEMS)
    assert plain.total(plain.terms(r, copy)) == 0.2  # alpha, for nothing
    assert conditional.total(conditional.terms(r, copy)) == 0.0
    assert earned(plain, "copy-cat") == pytest.approx(0.6)  # more than twice the honest policy's gain in rank (0.25)


@pytest.mark.parametrize("form", [PLAIN, CONDITIONAL])
def test_promoting_a_fixed_slot_earns_no_more_than_copying(form):
    """Targets stand where those of a base model do, more of them at the top: 10, 10, 20 and 40."""
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
    gains = {name: sum(each["rank_gain"] for each in found) for name, found in terms.items()}
    # second: -1/4 twice, +1/4; last: -1/4 three times, +3/4
    assert gains == {"oracle": 1.0, "honest": 0.25, "copy-cat": 0.0, "second slot": -0.25, "last slot": 0.0}
    scores = {name: sum(map(rewards.total, found)) for name, found in terms.items()}
    if form is CONDITIONAL:
        assert scores == pytest.approx(
            {"oracle": 1.8, "honest": 0.85, "copy-cat": 0.4, "second slot": -0.05, "last slot": 0.2}
        )
        assert scores["oracle"] > scores["honest"] > scores["copy-cat"] > scores["last slot"] > scores["second slot"]
    else:  # paid for its form alone a slot is worth as much as a copy: rank gain alone tells them apart
        assert scores["last slot"] == scores["copy-cat"] == pytest.approx(0.8)


def test_weights():
    rewards = WeightedRewards({"rank_gain": 2, "ndcg": 0})
    assert rewards.total(rewards.terms(request(), answer(30, 10, 20, 40))) == 1.0
    with pytest.raises(ConfigurationError, match="did you mean rank_gain"):
        WeightedRewards({"rank_gian": 1})
    with pytest.raises(ConfigurationError, match="no reward has a weight"):
        WeightedRewards({"ndcg": 0})


def test_a_failing_reward_stops_everything():
    def broken(request, answer):
        raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        WeightedRewards({"broken": 1}, {"broken": broken}).terms(request(), answer(*ITEMS))
    with pytest.raises(GR2Error, match="'endless' is inf"):
        WeightedRewards({"endless": 1}, {"endless": lambda r, a: math.inf}).terms(request(), answer(*ITEMS))
