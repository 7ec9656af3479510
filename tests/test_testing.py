"""The contract tests of recbole_gr2.testing: on built-in extensions, and on good and bad examples of each kind."""

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from recbole_gr2 import rewards
from recbole_gr2.features.providers import PROVIDERS
from recbole_gr2.rerankers.base import Reranker, by_score
from recbole_gr2.rerankers.lambdamart import LambdaMART
from recbole_gr2.rerankers.orders import BaseOrder, PriorOrder
from recbole_gr2.rewards import REWARDS
from recbole_gr2.teachers import RulesTeacher, TeacherReply
from recbole_gr2.teachers.recorded import RecordedTeacher
from recbole_gr2.testing import (
    FeatureProviderTests,
    RerankerTests,
    RewardTests,
    TeacherTests,
    synthetic_catalog,
    synthetic_request,
    synthetic_requests,
)
from recbole_gr2.types import Answer


def failures(tests: type) -> dict[str, str]:
    """Run the tests of a class and return the message of each one that fails."""
    messages = {}
    for name in dir(tests):
        if name.startswith("test_"):
            try:
                getattr(tests(), name)()
            except AssertionError as error:
                messages[name] = str(error)
    return messages


def derived(base: type, **attributes) -> type:
    return type("TestDerived", (base,), attributes)


# --- re-rankers ------------------------------------------------------------------------------------------------------


def by_prior(request, catalog):
    """A function re-ranker: the order of the prior."""
    return request.by_prior


class Popular(Reranker):
    """A trained re-ranker: frequent targets first."""

    name, trained, needs_features = "popular", True, True

    def fit(self, train, valid):
        self.counts = np.zeros(len(self.catalog) + 1)
        for request in train:
            self.counts[request.target] += 1

    def rank(self, requests):
        orders = [by_score(request, [self.counts[item] for item in request.items]) for request in requests]
        return [Answer(request_id=r.request_id, ranking=order) for r, order in zip(requests, orders, strict=True)]


class TestFunction(RerankerTests):
    reranker = by_prior


class TestTrained(RerankerTests):
    reranker = Popular


class TestBaseOrder(RerankerTests):
    reranker = BaseOrder


class TestPriorOrder(RerankerTests):
    reranker = PriorOrder


class TestLambdaMART(RerankerTests):
    reranker = LambdaMART


class Base(Reranker):
    """A base class of bad re-rankers."""

    def rank(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        return request.items


class Incomplete(Base):
    def one(self, request):
        return request.items[:-1]


class Foreign(Base):
    def one(self, request):
        return (99, *request.items[1:])


class ReadsLabels(Base):
    def one(self, request):
        return sorted(request.items, key=lambda item: item != request.target)


class Random(Base):
    def one(self, request):
        return random.sample(request.items, len(request.items))


class DependsOnTheBatch(Base):
    def rank(self, requests):
        return [request.items[::-1] if number % 2 else request.items for number, request in enumerate(requests)]


class SortsTheRequests(Base):
    def rank(self, requests):
        ordered = sorted(requests, key=lambda request: len(request.history), reverse=True)
        return [Answer(request_id=request.request_id, ranking=request.items) for request in ordered]


class WritesFeatures(Base):
    def one(self, request):
        if request.features is not None:
            request.features.candidates[:] = 0
        return request.items


class NeedsFeatures(Base):
    def one(self, request):
        assert request.features is not None, "no features"
        return request.items


class ReturnsNone(Base):
    def rank(self, requests):
        return None


class ReturnsTokens(Base):
    def one(self, request):
        return [f"item{item}" for item in request.items]


class WithoutRank(Reranker):
    pass


class WrongArity(Base):
    def rank(self, request, catalog):
        return request.items


class FitWrites(Base):
    def fit(self, train, valid):
        train[0].features.candidates[:] = 0


class FitSorts(Base):
    def fit(self, train, valid):
        train.reverse()


class WritesCatalog(Base):
    def one(self, request):
        self.catalog.sids[0] = 0
        return request.items


class DropsRequests(Base):
    def rank(self, requests):
        return [request.items for request in requests[1:]]


@pytest.mark.parametrize(
    ("reranker", "test", "message"),
    [
        (Incomplete, "test_it_returns_a_permutation_of_each_list", "not a permutation of its 10 candidates"),
        (Foreign, "test_it_returns_a_permutation_of_each_list", "not candidates: [99]"),
        (ReadsLabels, "test_it_does_not_read_labels", "it reads labels"),
        (Random, "test_it_is_deterministic", "in a second call"),
        (DependsOnTheBatch, "test_a_ranking_does_not_depend_on_the_batch", "if the requests are reversed"),
        (SortsTheRequests, "test_it_returns_a_permutation_of_each_list", "in the order of the requests"),
        (WritesFeatures, "test_it_does_not_change_the_requests", "rank changes the request test/user0"),
        (NeedsFeatures, "test_it_supports_requests_without_prior_and_features", "no features"),
        (DropsRequests, "test_it_returns_a_permutation_of_each_list", "11 results for 12 requests"),
        (ReturnsNone, "test_it_returns_a_permutation_of_each_list", "rank returned None. Return a list"),
        (ReturnsTokens, "test_it_is_deterministic", "internal item ids as in request.items, not of tokens"),
        (WithoutRank, "test_it_is_deterministic", "WithoutRank has no method rank"),
        (WrongArity, "test_it_is_deterministic", "cannot be called as rank(requests): missing a required argument"),
        (lambda request: request.items, "test_it_is_deterministic", "cannot be called as rank(request, catalog)"),
        (lambda request, catalog: None, "test_it_is_deterministic", "the ranking is None"),
        (FitWrites, "test_fit_does_not_change_the_requests", "fit changes the request train/user0"),
        (FitSorts, "test_fit_does_not_change_the_requests", "fit changes the request"),
        (WritesCatalog, "test_it_does_not_change_the_catalog", "the re-ranker changes the catalogue"),
    ],
)
def test_a_bad_reranker_fails_with_a_clear_message(reranker, test, message):
    assert message in failures(derived(RerankerTests, reranker=reranker))[test]


def test_a_changed_catalog_does_not_affect_other_tests():
    failures(derived(RerankerTests, reranker=WritesCatalog))
    assert not failures(derived(RerankerTests, reranker=by_prior))


def test_the_extension_has_to_be_named():
    messages = failures(derived(RerankerTests)).values()
    assert messages and all("TestDerived does not name the extension to test" in message for message in messages)


# --- rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_built_in_rewards(name):
    assert not failures(derived(RewardTests, reward=REWARDS[name]))


class TestOverlong(RewardTests):
    reward = rewards.overlong(max_reasoning=64, buffer=16)


counter = itertools.count()


def changes_answer(request, answer):
    object.__setattr__(answer, "reasoning", "")
    return float(answer.status == "ok")


def test_nan_fails_only_the_test_of_finite_numbers():
    assert set(failures(derived(RewardTests, reward=lambda r, a: float("nan"), constant_allowed=True))) == {
        "test_it_returns_a_finite_number_or_none"
    }
    messages = failures(derived(FeatureProviderTests, provider=nan_feature))
    assert set(messages) == {"test_a_feature_has_one_number_per_candidate"}


@pytest.mark.parametrize(
    ("reward", "test", "message"),
    [
        (lambda r, a: float("nan"), "test_it_returns_a_finite_number_or_none", "is nan"),
        (lambda r, a: "good", "test_it_returns_a_finite_number_or_none", "is 'good'"),
        (lambda r, a: next(counter), "test_equal_input_has_an_equal_reward", "may depend on its arguments only"),
        (lambda r, a: 1.0, "test_it_distinguishes_answers", "has no effect on training"),
        (lambda r, a: None, "test_it_distinguishes_answers", "has no effect on training"),
        (
            lambda r, a: float(r.features is None or r.features.candidates.fill(0) or len(a.reasoning)),
            "test_it_does_not_change_its_arguments",
            "the reward changes the request",
        ),
        (changes_answer, "test_it_does_not_change_its_arguments", "the reward changes the copied answer"),
        (lambda a: 1.0, "test_it_returns_a_finite_number_or_none", "cannot be called as reward(request, answer)"),
    ],
)
def test_a_bad_reward_fails_with_a_clear_message(reward, test, message):
    assert message in failures(derived(RewardTests, reward=reward))[test]


def test_a_reward_that_fails_for_lists_without_target_shows_its_exception():
    tests = derived(RewardTests, reward=lambda r, a: 1.0 / a.ranking.index(r.target))
    with pytest.raises((ValueError, ZeroDivisionError)):
        tests().test_it_returns_a_finite_number_or_none()


def test_the_report_shows_what_each_kind_of_answer_gets():
    report = derived(RewardTests, reward=REWARDS["unchanged"])().report()
    assert report["copied"] == report["unreadable"] == 1.0 and report["reversed"] == 0.0
    assert derived(RewardTests, reward=REWARDS["format"])().report()["repaired"] == 0.0


# --- teachers --------------------------------------------------------------------------------------------------------


class TitleTeacher:
    """Names the title of the candidate with the highest prior, or of the target."""

    name = "title"

    def __init__(self, *, catalog, settings, seed):
        self.catalog = catalog

    def argue(self, requests, *, targeted, attempt):
        replies = []
        for request in requests:
            first = request.target if targeted else request.by_prior[min(attempt, len(request.items) - 1)]
            ranking = (first, *(item for item in request.items if item != first))
            replies.append(TeacherReply(reasoning=f"{self.catalog.item(first).title} fits.", ranking=ranking))
        return replies


class TestRules(TeacherTests):
    teacher = RulesTeacher


class TestTitle(TeacherTests):
    teacher = TitleTeacher


def test_the_recorded_teacher(tmp_path):
    catalog, requests = synthetic_catalog(), derived(TeacherTests)().requests()
    lines = [
        {"request_id": r.request_id, "reasoning": "It fits.", "ranking": [catalog.item(r.target).token]}
        for r in requests
    ]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"trace_file": str(tmp_path / "traces.jsonl")}
    assert not failures(derived(TeacherTests, teacher=RecordedTeacher, settings=settings))


class Unnamed(TitleTeacher):
    name = ""


class Cheating(TitleTeacher):
    """Reads the target under rejection sampling, too."""

    def argue(self, requests, *, targeted, attempt):
        return [
            TeacherReply(reasoning="x", ranking=(r.target, *(item for item in r.items if item != r.target)))
            for r in requests
        ]


class Strings(TitleTeacher):
    def argue(self, requests, *, targeted, attempt):
        return ["because" for _ in requests]


class Unseeded(TitleTeacher):
    def argue(self, requests, *, targeted, attempt):
        return [
            TeacherReply(reasoning=str(random.random()), ranking=tuple(random.sample(r.items, len(r.items))))
            for r in requests
        ]


class Silent(TitleTeacher):
    def argue(self, requests, *, targeted, attempt):
        return [TeacherReply(reasoning="", ranking=()) for _ in requests]


class CountsCalls(TitleTeacher):
    calls = 0

    def argue(self, requests, *, targeted, attempt):
        self.calls += 1
        return super().argue(requests, targeted=targeted, attempt=self.calls)


class CountsPositions(TitleTeacher):
    def argue(self, requests, *, targeted, attempt):
        replies = super().argue(requests, targeted=targeted, attempt=attempt)
        return [replace(reply, reasoning=f"{number}: {reply.reasoning}") for number, reply in enumerate(replies)]


class OneTarget(TitleTeacher):
    """Explains the target of the first request only."""

    def argue(self, requests, *, targeted, attempt):
        return [
            reply if number == 0 else replace(reply, ranking=request.by_prior)
            for number, (request, reply) in enumerate(
                zip(requests, super().argue(requests, targeted=targeted, attempt=attempt), strict=True)
            )
        ]


class WithoutArgue:
    name = "without"

    def __init__(self, *, catalog, settings, seed):
        pass


class ReturnsNothing(TitleTeacher):
    def argue(self, requests, *, targeted, attempt):
        return None


class OldInit(TitleTeacher):
    def __init__(self, catalog):
        self.catalog = catalog


@pytest.mark.parametrize(
    ("teacher", "test", "message"),
    [
        (CountsCalls, "test_a_reply_does_not_depend_on_earlier_calls", "in a second call of the same teacher"),
        (CountsPositions, "test_a_reply_does_not_depend_on_the_batch", "if the requests are reversed"),
        (OneTarget, "test_it_explains_targets", "does not rank the target first"),
        (WithoutArgue, "test_it_replies_to_each_request", "the method argue cannot be called"),
        (ReturnsNothing, "test_it_replies_to_each_request", "argue returned None. Return a list"),
        (OldInit, "test_it_has_a_name", "cannot be called as teacher(catalog=..., settings=..., seed=...)"),
        (Unnamed, "test_it_has_a_name", "the attribute `name` is ''"),
        (Cheating, "test_it_replies_to_each_request", "not candidates: [0]"),
        (Strings, "test_it_replies_to_each_request", "argue returned a str"),
        (Unseeded, "test_it_is_deterministic", "two teachers with one seed differ"),
        (Silent, "test_it_explains_targets", "has no reasoning or does not rank the target first"),
    ],
)
def test_a_bad_teacher_fails_with_a_clear_message(teacher, test, message):
    assert message in failures(derived(TeacherTests, teacher=teacher))[test]


# --- feature providers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROVIDERS)
def test_built_in_feature_providers(name):
    assert not failures(derived(FeatureProviderTests, provider=PROVIDERS[name]))


def title_length(training_data):
    """A feature provider: the number of characters of the title, and whether it contains a history title."""
    catalog = synthetic_catalog()

    def describe(request):
        lengths = np.array([len(catalog.item(item).title) for item in request.items])
        recent = request.history[-10:]
        same = np.array(
            [[float(catalog.item(c).title == catalog.item(h).title) for c in request.items] for h in recent]
        )
        return {"title length": lengths, "same title": same}

    return describe


class TestTitleLength(FeatureProviderTests):
    provider = title_length


def reads_target(training_data):
    return lambda request: {"hit": np.array([float(item == request.target) for item in request.items])}


def not_finite(training_data):
    return lambda request: {"log": np.full(len(request.items), -np.inf)}


def one_number(training_data):
    return lambda request: {"length": np.array(len(request.history))}


def built_in_name(training_data):
    return lambda request: {"popularity": np.zeros(len(request.items))}


def changing_names(training_data):
    return lambda request: {f"rank of {len(request.items)}": np.arange(len(request.items))}


def stateful(training_data):
    seen = []

    def describe(request):
        seen.append(request)
        return {"calls": np.full(len(request.items), len(seen))}

    return describe


def nan_feature(training_data):
    return lambda request: {"x": np.full(len(request.items), np.nan)}


def reads_target_in_training(training_data):
    def describe(request):
        hits = [float(request.split == "train" and item == request.target) for item in request.items]
        return {"hit": np.array(hits)}

    return describe


def reads_split(training_data):
    return lambda request: {"train": np.full(len(request.items), float(request.split == "train"))}


def no_dictionary(training_data):
    return lambda request: [1.0] * len(request.items)


def no_function(training_data):
    return None


def texts(training_data):
    return lambda request: {"x": ["a"] * len(request.items)}


def no_arguments():
    return None


def writes_embeddings(training_data):
    training_data.embeddings[:] = 0
    return lambda request: {"x": np.zeros(len(request.items))}


@pytest.mark.parametrize(
    ("provider", "test", "message"),
    [
        (reads_target_in_training, "test_features_do_not_depend_on_labels", "of train/user0 depends on the target"),
        (reads_split, "test_features_do_not_depend_on_the_split", "depends on request.split"),
        (no_dictionary, "test_names_are_the_same_for_each_request", "Return a dictionary of named features"),
        (no_function, "test_features_do_not_depend_on_labels", "cannot be called as describe(request)"),
        (texts, "test_features_do_not_depend_on_labels", "is no array of numbers"),
        (no_arguments, "test_features_do_not_depend_on_labels", "cannot be called as provider(data): too many"),
        (writes_embeddings, "test_it_does_not_change_the_training_data", "the provider changes the interactions"),
        (reads_target, "test_features_do_not_depend_on_labels", "'hit' of test/user2 depends on the target"),
        (not_finite, "test_a_feature_has_one_number_per_candidate", "values that are not finite"),
        (one_number, "test_a_feature_has_one_number_per_candidate", "has the shape () for 2 candidates"),
        (built_in_name, "test_names_differ_from_those_of_the_built_in_providers", "'popularity' also has"),
        (changing_names, "test_names_are_the_same_for_each_request", "Return the same names"),
        (stateful, "test_features_do_not_depend_on_other_requests", "depends on the requests before it"),
    ],
)
def test_a_bad_feature_provider_fails_with_a_clear_message(provider, test, message):
    assert message in failures(derived(FeatureProviderTests, provider=provider))[test]


# --- the synthetic data ----------------------------------------------------------------------------------------------


def test_synthetic_requests_are_reproducible_and_valid():
    assert synthetic_requests() == synthetic_requests()
    for count in (2, 26):
        request = synthetic_request(candidates=count, history=1)
        assert len(set(request.items)) == count and len(request.prior) == count and len(request.history) == 1
        assert request.features.candidates.shape[0] == request.features.pairs.shape[0] == count
        assert np.isclose(np.exp(request.prior).sum(), 1.0)
    assert synthetic_request(target=False).target_rank is None
