"""Contract tests for extensions: re-rankers, rewards, teachers and feature providers.

A class of this module tests one extension on a small synthetic data set. Derive a class in a test file, name the
extension, and run pytest:

    from recbole_gr2.testing import RewardTests
    from my_rewards import brief

    class TestBrief(RewardTests):
        reward = brief

The tests read no files, train no language model and take less than a second. They need no pytest plugin.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from recbole_gr2.catalog import Catalog
from recbole_gr2.config import Settings, load_settings
from recbole_gr2.features.providers import PROVIDERS, Provider, TrainingData
from recbole_gr2.plugins import misfit
from recbole_gr2.ranking import promote
from recbole_gr2.rerankers.base import Reranker
from recbole_gr2.rerankers.external import from_function
from recbole_gr2.sid.tokens import MAX_CANDIDATES
from recbole_gr2.teachers.base import TeacherReply
from recbole_gr2.types import RECENT, Answer, Candidate, CandidateFeatures, Context, Item, Request, SourceScores

FEATURES, PAIR_FEATURES = 4, 3  # F and P of the synthetic requests
BRANDS = ("", "Acme", "Birch", "Cedar")
CATEGORIES = ("", "Beauty > Makeup > Nails", "Beauty > Makeup > Lips", "Beauty > Skin Care", "Tools > Brushes")


@cache
def synthetic_catalog(size: int = 60) -> Catalog:
    """Return a catalogue of `size` items with titles, brands, categories and semantic IDs of three levels."""
    rng = random.Random(0)
    return Catalog(
        Item(
            item_id=number,
            token=f"item{number}",
            title=f"Product {number}",
            categories=rng.choice(CATEGORIES),
            brand=rng.choice(BRANDS),
            description=f"Description of product {number}.",
            sid=(number % 4, number // 4 % 4, number // 16),
        )
        for number in range(1, size + 1)
    )


def synthetic_request(
    split: str = "test",
    *,
    user: str = "user0",
    candidates: int = 10,
    history: int = 6,
    target: bool = True,
    prior: bool = True,
    features: bool = True,
    seed: int = 0,
) -> Request:
    """Return a request over `synthetic_catalog()`.

    Args:
        split: train, valid or test.
        user: token of the user. It determines the request together with the other arguments.
        candidates: number of candidates, K.
        history: number of history items.
        target: whether the list contains its target.
        prior: whether the request has a prior.
        features: whether the request has features.
        seed: seed of the items and the numbers.
    """
    rng = random.Random(f"{seed} {split} {user} {candidates} {history} {target}")
    numbers = np.random.default_rng(rng.randrange(2**32))
    drawn = rng.sample(range(1, len(synthetic_catalog()) + 1), candidates + 1)
    scores = sorted((rng.uniform(-5.0, 5.0) for _ in range(candidates)), reverse=True)
    log_prior = np.log(numbers.dirichlet(np.ones(candidates)))
    recent = min(history, RECENT)
    return Request(
        request_id=f"{split}/{user}",
        user_token=user,
        split=split,
        history=tuple(rng.choices(range(1, len(synthetic_catalog()) + 1), k=history)),
        candidates=tuple(
            Candidate(item_id=item, score=score, rank=rank)
            for rank, (item, score) in enumerate(zip(drawn[:candidates], scores, strict=True), start=1)
        ),
        target=rng.choice(drawn[:candidates]) if target else drawn[-1],
        provider="synthetic",
        sources=(
            SourceScores("synthetic", tuple(range(1, candidates + 1)), tuple(scores)),
            SourceScores("reversed", tuple(range(candidates, 0, -1)), tuple(reversed(scores))),
        ),
        prior=tuple(log_prior.tolist()) if prior else (),
        features=CandidateFeatures(
            numbers.normal(size=(candidates, FEATURES)).astype(np.float32),
            numbers.normal(size=(candidates, recent, PAIR_FEATURES)).astype(np.float16),
        )
        if features
        else None,
    )


def synthetic_requests(split: str = "test", count: int = 12, **options: Any) -> list[Request]:
    """Return requests of different users with 10 candidates each, see `synthetic_request`.

    The histories have 1, 2, ... items. Two thirds of the lists contain their target.
    """
    return [
        synthetic_request(split, user=f"user{n}", **{"history": n + 1, "target": n % 3 != 2, **options})
        for n in range(count)
    ]


def synthetic_training_data(catalog: Catalog | None = None) -> TrainingData:
    """Return training interactions of 40 users, and text embeddings of the items, (N, 8)."""
    catalog = catalog or synthetic_catalog()
    numbers = np.random.default_rng(0)
    embeddings = numbers.normal(size=(len(catalog), 8))
    return TrainingData(
        catalog=catalog,
        sequences=SyntheticData().known_items("hold_out"),
        times=SyntheticData().known_times("hold_out"),
        embeddings=(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32),
    )


class SyntheticData:
    """A data set of 40 users in memory. It has the attributes of `recbole_gr2.bridge.data.Data` that extensions use.

    Attributes:
        catalog: the items, with semantic IDs.
        sequences: internal user id -> item ids of all interactions, oldest first.
    """

    def __init__(self) -> None:
        self.catalog = synthetic_catalog()
        numbers = np.random.default_rng(1)
        self.sequences = {
            user: numbers.integers(1, len(self.catalog) + 1, size=int(numbers.integers(5, 15))) for user in range(1, 41)
        }

    @property
    def item_count(self) -> int:
        """Number of items."""
        return len(self.catalog)

    def train_sequences(self) -> dict[int, np.ndarray]:
        """Return the training interactions of each user: all but the last two."""
        return {user: sequence[:-2] for user, sequence in self.sequences.items()}

    def known_items(self, interactions: str) -> list[list[int]]:
        """Return the known interactions of each user, see `recbole_gr2.bridge.data.Data.known_items`."""
        unknown = {"hold_out": 3, "train": 2, "refit": 1}[interactions]
        return [sequence[:-unknown].tolist() for sequence in self.sequences.values()]

    def known_times(self, interactions: str) -> list[np.ndarray]:
        """Return the times of the interactions of `known_items`: the position of each in the sequence of its user."""
        return [np.arange(len(items), dtype=float) for items in self.known_items(interactions)]


def synthetic_settings(**changes: Any) -> Settings:
    """Return the settings of the preset `smoke` with changes. Raises the errors of `load_settings`."""
    return _load(json.dumps({"preset": "smoke", **changes}))


@cache
def _load(values: str) -> Settings:
    return load_settings(config_dict=json.loads(values))


def synthetic_context(**changes: Any) -> Context:
    """Return a context without stage folders.

    Args:
        changes: settings that differ from those of the preset `smoke`.
    """
    return Context(
        stage="testing",
        settings=synthetic_settings(**changes),
        data=SyntheticData(),  # type: ignore[arg-type]  # it has the same public attributes
        folder=Path("no-folder"),
        inputs={},
        folders={},
        say=lambda line: None,
    )


class RerankerTests:
    """Tests of a re-ranker.

    Attributes:
        reranker: a subclass of `recbole_gr2.rerankers.base.Reranker`, or a function `rank(request, catalog)` that
            returns the candidates as item ids, best first.
        settings: settings that differ from those of the preset `smoke`.
        candidates: numbers of candidates that the re-ranker has to support.

    The tests call `fit` with 40 train requests and 20 validation requests if the class has this method. Override
    `make_reranker` if the re-ranker reads folders of stages.
    """

    reranker: Any = None
    settings: Mapping[str, Any] = {}
    candidates: Sequence[int] = (2, 3, 10, MAX_CANDIDATES)
    _fitted_to: Sequence[Sequence[Request]] = ()

    def make_reranker(self) -> Reranker:
        """Return a re-ranker that is ready to rank."""
        synthetic_catalog.cache_clear()  # an earlier extension may have changed it
        reranker = _extension(self, "reranker")
        if inspect.isclass(reranker):
            assert issubclass(reranker, Reranker), (
                f"{reranker.__name__} is no subclass of Reranker. Derive it from recbole_gr2.rerankers.base.Reranker."
            )
            assert reranker.rank is not Reranker.rank, f"{reranker.__name__} has no method rank(self, requests)."
            _check_fits("the class", "Reranker(context)", reranker, None)
            built: Reranker = reranker(synthetic_context(**self.settings))
        else:
            _check_fits("the re-ranker", "rank(request, catalog)", reranker, None, None)
            built = from_function("function", reranker)(synthetic_context(**self.settings))
        _check_fits("the method rank", "rank(requests)", built.rank, [])
        if type(built).fit is not Reranker.fit:
            _check_fits("the method fit", "fit(train, valid)", built.fit, [], [])
            self._fitted_to = _requests_to_fit()
            built.fit(*self._fitted_to)
        return built

    def rank(self, requests: Sequence[Request], reranker: Reranker | None = None) -> list[tuple[int, ...]]:
        """Return the rankings of a re-ranker for requests without labels."""
        visible = [request.without_labels() for request in requests]
        return [_ranking(answer) for answer in _answers(reranker or self.make_reranker(), visible)]

    def test_it_returns_a_permutation_of_each_list(self) -> None:
        """There is one answer per request. Each answer contains every candidate once, and belongs to its request."""
        requests = synthetic_requests()
        answers = _answers(self.make_reranker(), [request.without_labels() for request in requests])
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, Answer):
                assert answer.request_id == request.request_id, (
                    f"the answer to {request.request_id} has the request id {answer.request_id}. "
                    "Return the answers in the order of the requests."
                )
            _check_permutation(request, _ranking(answer))

    def test_it_supports_lists_of_different_lengths(self) -> None:
        """Lists of 2 to 26 candidates are ranked, also together in one call."""
        requests = [synthetic_request(candidates=count, user=f"user{count}") for count in self.candidates]
        for request, ranking in zip(requests, self.rank(requests), strict=True):
            _check_permutation(request, ranking)

    def test_it_supports_a_history_of_one_item(self) -> None:
        """A history may contain a single item."""
        request = synthetic_request(history=1)
        _check_permutation(request, self.rank([request])[0])

    def test_it_supports_requests_without_prior_and_features(self) -> None:
        """Without `needs_features` a re-ranker ranks requests without prior and features."""
        reranker = self.make_reranker()
        if reranker.needs_features:
            return
        requests = synthetic_requests(prior=False, features=False)
        for request, ranking in zip(requests, self.rank(requests, reranker), strict=True):
            _check_permutation(request, ranking)

    def test_it_is_deterministic(self) -> None:
        """Two calls, and two instances, give the same rankings."""
        requests, reranker = synthetic_requests(), self.make_reranker()
        rankings = self.rank(requests, reranker)
        _check_equal(requests, rankings, self.rank(requests, reranker), "in a second call")
        _check_equal(requests, rankings, self.rank(requests), "by a second instance")

    def test_a_ranking_does_not_depend_on_the_batch(self) -> None:
        """The ranking of a request does not depend on the other requests or on their order."""
        requests, reranker = synthetic_requests(), self.make_reranker()
        rankings = self.rank(requests, reranker)
        _check_equal(requests, rankings, self.rank(requests[::-1], reranker)[::-1], "if the requests are reversed")
        single = [self.rank([request], reranker)[0] for request in requests]
        _check_equal(requests, rankings, single, "if each request is ranked alone")

    def test_it_does_not_read_labels(self) -> None:
        """The rankings are the same for every target and grade."""
        requests, reranker = synthetic_requests(), self.make_reranker()
        rankings = self.rank(requests, reranker)
        for position in (0, -1):
            labelled = [
                replace(r, target=r.items[position], grades=tuple(int(i == r.items[position]) for i in r.items))
                for r in requests
            ]
            answers = [_ranking(answer) for answer in _answers(reranker, labelled)]
            _check_equal(requests, rankings, answers, "if the target is another candidate: it reads labels")

    def test_it_does_not_change_the_requests(self) -> None:
        """Requests, and the arrays of their features, stay as they are."""
        requests = [request.without_labels() for request in synthetic_requests()]
        before = copy.deepcopy(requests)
        self.make_reranker().rank(requests)
        _check_unchanged(requests, before, "rank")

    def test_fit_does_not_change_the_requests(self) -> None:
        """The train and validation requests stay as they are, and so does their order."""
        self.make_reranker()
        for requests, before in zip(self._fitted_to, _requests_to_fit(), strict=False):
            _check_unchanged(requests, before, "fit")

    def test_it_does_not_change_the_catalog(self) -> None:
        """The items and their semantic IDs stay as they are."""
        self.rank(synthetic_requests())
        _check_catalog("the re-ranker")


class RewardTests:
    """Tests of a reward.

    Attributes:
        reward: the function `reward(request, answer) -> float | None`.
        constant_allowed: whether the reward may be the same for all answers to a request.
    """

    reward: Any = None
    constant_allowed: bool = False

    def value(self, request: Request, answer: Answer) -> float | None:
        """Return the reward of an answer."""
        reward = _extension(self, "reward")
        _check_fits("the reward", "reward(request, answer)", reward, request, answer)
        value = reward(request, answer)
        assert value is None or isinstance(value, Real), (
            f"the reward of {request.request_id} is {value!r}. Return a number, or None if the reward does not apply."
        )
        return value if value is None else float(value)

    def requests(self) -> list[Request]:
        """Return train requests of different lengths, with and without target, with and without grades."""
        requests = [synthetic_request("train", candidates=k, user=f"user{k}") for k in (2, 3, 10, MAX_CANDIDATES)]
        requests += [replace(requests[2], target=item) for item in (requests[2].items[0], requests[2].items[-1])]
        requests.append(replace(requests[2], grades=(2, 0, 1, 0, 0, 1, 0, 0, 0, 3)))
        requests.append(synthetic_request("train", target=False, prior=False, features=False))
        return requests

    def report(self) -> dict[str, float | None]:
        """Return the mean reward of each kind of answer, see `synthetic_answers`; None if it never applies.

        A reward that is high for `copied` or `unreadable` answers can be obtained without ranking.
        """
        values: dict[str, list[float]] = {}
        for request in self.requests():
            for kind, answer in synthetic_answers(request).items():
                value = self.value(request, answer)
                values.setdefault(kind, []).extend([] if value is None else [value])
        return {kind: sum(each) / len(each) if each else None for kind, each in values.items()}

    def test_it_returns_a_finite_number_or_none(self) -> None:
        """Every kind of answer has a finite reward or None, and raises no exception."""
        for request in self.requests():
            for kind, answer in synthetic_answers(request).items():
                value = self.value(request, answer)
                assert value is None or math.isfinite(value), (
                    f"the reward of the {kind} answer to {request.request_id} is {value!r}. Return a finite number, or "
                    "None if the reward does not apply."
                )

    def test_equal_input_has_an_equal_reward(self) -> None:
        """Two calls with equal arguments give the same value."""
        for request in self.requests():
            for kind, answer in synthetic_answers(request).items():
                values = [self.value(copy.deepcopy(request), copy.deepcopy(answer)) for _ in range(2)]
                assert values[0] == values[1] or all(value is not None and math.isnan(value) for value in values), (
                    f"the reward of the {kind} answer to {request.request_id} is {values[0]} in one call and "
                    f"{values[1]} in the next. A reward may depend on its arguments only."
                )

    def test_it_does_not_change_its_arguments(self) -> None:
        """Requests and answers stay as they are."""
        requests = self.requests()
        before = copy.deepcopy(requests)
        for request in requests:
            for kind, answer in synthetic_answers(request).items():
                original = copy.deepcopy(answer)
                self.value(request, answer)
                assert answer == original, f"the reward changes the {kind} answer to {request.request_id}: {answer}"
        _check_unchanged(requests, before, "the reward")

    def test_it_distinguishes_answers(self) -> None:
        """At least one request has answers with different rewards. Prints the report of the reward."""
        report = self.report()
        print("mean reward by kind of answer:", report)
        distinguishes = any(
            len({self.value(request, answer) for answer in synthetic_answers(request).values()} - {None}) > 1
            for request in self.requests()
        )
        assert distinguishes or self.constant_allowed, (
            f"all answers to a request have the same reward: {report}. Such a reward has no effect on training. "
            "Set constant_allowed = True if it is a measurement."
        )


def synthetic_answers(request: Request) -> dict[str, Answer]:
    """Return one answer of each kind: unreadable, copied, reversed, random, best, repaired, truncated and long.

    `unreadable` has no labels, so that its ranking is the base order. `best` is sorted by relevance. `repaired` lacks
    labels, `truncated` reached the limit of 64 reasoning tokens, and `long` ended one token before it.
    """
    items, size = request.items, len(request.items)
    rng = random.Random(request.request_id)
    short, longest = size + 10, 64 + size + 2

    def answer(ranking: Sequence[int], tokens: int = short, **values: Any) -> Answer:
        given = {"reasoning": "Because it fits.", "output_tokens": tokens, **values}
        return Answer(request_id=request.request_id, ranking=tuple(ranking), **given)

    return {
        "unreadable": answer(items, status="unreadable", missing=size, reasoning=""),
        "copied": answer(items),
        "reversed": answer(items[::-1]),
        "random": answer(rng.sample(items, size)),
        "best": answer(request.sorted_by_grade(items)),
        "repaired": answer(promote(items, items[-1]), status="repaired", missing=size - 1, repeated=1, foreign=1),
        "truncated": answer(items, longest, status="truncated"),
        "long": answer(items[::-1], longest - 1),
    }


class TeacherTests:
    """Tests of a teacher.

    Attributes:
        teacher: the class, or a function that is called with `catalog`, `settings` and `seed`.
        settings: settings that differ from those of the preset `smoke`.
        modes: the values of the setting `trace_mode` that the teacher supports.
        attempts: number of attempts per request that the tests make under rejection sampling.

    Override `make_teacher` if the teacher needs other arguments.
    """

    teacher: Any = None
    settings: Mapping[str, Any] = {}
    modes: Sequence[str] = ("targeted", "rejection")
    attempts: int = 3

    def make_teacher(self) -> Any:
        """Return a new teacher."""
        synthetic_catalog.cache_clear()  # an earlier extension may have changed it
        teacher = _extension(self, "teacher")
        given = {"catalog": synthetic_catalog(), "settings": synthetic_settings(**self.settings), "seed": 7}
        _check_fits("the teacher", "teacher(catalog=..., settings=..., seed=...)", teacher, **given)
        return teacher(**given)

    def requests(self) -> list[Request]:
        """Return train requests that contain their target, with and without a prior."""
        both = [*synthetic_requests("train", 8, target=True), *synthetic_requests("train", 4, target=True, prior=False)]
        return [replace(request, request_id=f"train/user{number}") for number, request in enumerate(both)]

    def replies(self, requests: Sequence[Request], mode: str, attempt: int, teacher: Any = None) -> list[TeacherReply]:
        """Return the replies of a teacher. Under rejection sampling the requests have no labels."""
        targeted = mode == "targeted"
        visible = list(requests) if targeted else [request.without_labels() for request in requests]
        argue: Any = getattr(teacher or self.make_teacher(), "argue", None)
        given = {"targeted": targeted, "attempt": attempt}
        _check_fits("the method argue", "argue(requests, targeted=..., attempt=...)", argue, visible, **given)
        replies = _listed("argue", argue(visible, **given))
        _check_count("argue", requests, replies, "reply")
        for reply in replies:
            assert isinstance(reply, TeacherReply), (
                f"argue returned a {type(reply).__name__}. Return recbole_gr2.teachers.TeacherReply objects."
            )
        return replies

    def _attempts(self) -> list[tuple[str, int]]:
        return [(mode, attempt) for mode in self.modes for attempt in range(1 if mode == "targeted" else self.attempts)]

    def test_it_has_a_name(self) -> None:
        """The name is part of each trace."""
        name = getattr(self.make_teacher(), "name", None)
        assert isinstance(name, str) and name, f"the attribute `name` is {name!r}. Give the teacher a name."

    def test_it_replies_to_each_request(self) -> None:
        """There is one reply per request. Its ranking is a permutation of the candidates, or empty."""
        requests = self.requests()
        for mode, attempt in self._attempts():
            replies = self.replies(requests, mode, attempt)
            for request, reply in zip(requests, replies, strict=True):
                assert isinstance(reply.reasoning, str), f"the reasoning is {reply.reasoning!r}. Return a text."
                if reply.ranking:
                    _check_permutation(request, tuple(reply.ranking))

    def test_it_explains_targets(self) -> None:
        """Under targeted sampling each reply has a reasoning and ranks the target first."""
        if "targeted" not in self.modes:
            return
        requests = self.requests()
        replies = self.replies(requests, "targeted", 0)
        for request, reply in zip(requests, replies, strict=True):
            assert reply.reasoning.strip() and tuple(reply.ranking[:1]) == (request.target,), (
                f"with targeted=True the reply to {request.request_id} has no reasoning or does not rank the target "
                'first, so that it is rejected. Rank request.target first, or set modes = ("rejection",).'
            )

    def test_it_is_deterministic(self) -> None:
        """Two teachers with the same seed give the same replies to the same attempt."""
        requests = self.requests()
        for mode, attempt in self._attempts():
            first, second = (self.replies(requests, mode, attempt) for _ in range(2))
            for request, one, other in zip(requests, first, second, strict=True):
                assert one == other, (
                    f"two teachers with one seed differ in {request.request_id} (trace_mode {mode}, attempt {attempt}):"
                    f" {one} and {other}. Use the argument `seed` and recbole_gr2.seeding.derive_seed."
                )

    def test_a_reply_does_not_depend_on_earlier_calls(self) -> None:
        """A second call of the same teacher with the same requests and attempt gives the same replies."""
        requests, teacher = self.requests(), self.make_teacher()
        for mode, attempt in self._attempts():
            replies = self.replies(requests, mode, attempt, teacher)
            again = self.replies(requests, mode, attempt, teacher)
            _check_replies(requests, replies, again, "in a second call of the same teacher")

    def test_a_reply_does_not_depend_on_the_batch(self) -> None:
        """The reply to a request does not depend on the other requests or on their order."""
        requests = self.requests()
        for mode, attempt in self._attempts():
            replies = self.replies(requests, mode, attempt)
            backwards = self.replies(requests[::-1], mode, attempt)[::-1]
            _check_replies(requests, replies, backwards, "if the requests are reversed")
            single = [self.replies([request], mode, attempt)[0] for request in requests]
            _check_replies(requests, replies, single, "if the teacher gets each request alone")

    def test_it_does_not_change_the_requests(self) -> None:
        """Requests, and the arrays of their features, stay as they are."""
        requests = self.requests()
        before = copy.deepcopy(requests)
        for mode, attempt in self._attempts():
            self.replies(requests, mode, attempt)
        _check_unchanged(requests, before, "argue")

    def test_it_does_not_change_the_catalog(self) -> None:
        """The items and their semantic IDs stay as they are."""
        for mode, attempt in self._attempts():
            self.replies(self.requests(), mode, attempt)
        _check_catalog("the teacher")


class FeatureProviderTests:
    """Tests of a feature provider.

    Attributes:
        provider: the function `provider(training_data)` that returns a function `describe(request)`. This function
            returns a dictionary of named features.
    """

    provider: Provider | None = None

    def describe(self) -> Callable[[Request], Mapping[str, np.ndarray]]:
        """Return the function of the provider that computes the features of a request."""
        synthetic_catalog.cache_clear()  # an earlier extension may have changed it
        return self._describe(synthetic_training_data())

    def _describe(self, data: TrainingData) -> Callable[[Request], Mapping[str, np.ndarray]]:
        provider = _extension(self, "provider")
        _check_fits("the provider", "provider(data)", provider, data)
        describe = provider(data)
        _check_fits("the result of the provider", "describe(request)", describe, None)

        def checked(request: Request) -> Mapping[str, np.ndarray]:
            features = describe(request)
            assert isinstance(features, Mapping), (
                f"describe returned {features!r:.200} for {request.request_id}. Return a dictionary of named features."
            )
            return features

        return checked

    def requests(self) -> list[Request]:
        """Return test and train requests with 2 to 26 candidates and with short and long histories."""
        lengths = [synthetic_request(candidates=k, user=f"user{k}") for k in (2, 3, MAX_CANDIDATES)]
        tests = lengths + synthetic_requests(prior=False, features=False)
        return tests + synthetic_requests("train", prior=False, features=False)

    def test_a_feature_has_one_number_per_candidate(self) -> None:
        """A feature is finite. Its shape is (K,), or (R, K) for the last R history items, oldest first."""
        describe = self.describe()
        for request in self.requests():
            size, recent = len(request.items), min(len(request.history), RECENT)
            for name, value in describe(request).items():
                shape = _numbers(name, value).shape
                assert shape in ((size,), (recent, size)), (
                    f"the feature {name!r} has the shape {shape} for {size} candidates and {recent} recent history "
                    f"items. Return the shape ({size},) or ({recent}, {size})."
                )
                assert np.isfinite(_numbers(name, value)).all(), (
                    f"the feature {name!r} of {request.request_id} has values that are not finite: {value}"
                )

    def test_names_are_the_same_for_each_request(self) -> None:
        """Each request has the same features in the same order. There is at least one."""
        describe, requests = self.describe(), self.requests()
        names = list(describe(requests[0]))
        assert names and all(isinstance(name, str) for name in names), f"the names of the features are {names}"
        for request in requests:
            others = list(describe(request))
            assert others == names, (
                f"{request.request_id} has the features {others}, and {requests[0].request_id} has {names}. Return the "
                "same names for each request; use 0 where a feature does not apply."
            )

    def test_names_differ_from_those_of_the_built_in_providers(self) -> None:
        """Two providers of one run must not use the same name."""
        provider, request = _extension(self, "provider"), synthetic_request()
        for name, other in PROVIDERS.items():
            if other is not provider:
                common = set(self.describe()(request)) & set(other(synthetic_training_data())(request))
                assert not common, (
                    f"the built-in provider {name!r} also has the features {sorted(common)}. Rename them."
                )

    def test_features_do_not_depend_on_labels(self) -> None:
        """The features are the same for every target and grade, and without labels."""
        describe = self.describe()
        for request in self.requests():
            plain = describe(request.without_labels())
            for position in (0, -1):
                target = request.items[position]
                grades = tuple(int(item == target) for item in request.items)
                labelled = describe(replace(request, target=target, grades=grades))
                _check_features(request, plain, labelled, "depends on the target or the grades")

    def test_features_do_not_depend_on_the_split(self) -> None:
        """The features are the same for train, validation and test requests."""
        describe = self.describe()
        for request in self.requests():
            features = describe(request)
            for split in ("train", "valid", "test"):
                other = replace(request, split=split, request_id=f"{split}/{request.user_token}")
                _check_features(request, features, describe(other), "depends on request.split or request.request_id")

    def test_features_do_not_depend_on_other_requests(self) -> None:
        """The features are the same in any order of the requests, and for a second instance."""
        describe, requests = self.describe(), self.requests()
        forwards = [describe(request) for request in requests]
        backwards = [describe(request) for request in reversed(requests)][::-1]
        again = [self.describe()(request) for request in requests]
        for request, one, other, third in zip(requests, forwards, backwards, again, strict=True):
            _check_features(request, one, other, "depends on the requests before it")
            _check_features(request, one, third, "differs between two instances of the provider")

    def test_it_does_not_change_the_requests(self) -> None:
        """Requests stay as they are."""
        describe, requests = self.describe(), self.requests()
        before = copy.deepcopy(requests)
        for request in requests:
            describe(request)
        _check_unchanged(requests, before, "describe")

    def test_it_does_not_change_the_training_data(self) -> None:
        """The catalogue, the interactions and the embeddings stay as they are."""
        data, before = synthetic_training_data(), synthetic_training_data()
        describe = self._describe(data)
        for request in self.requests():
            describe(request)
        _check_catalog("the provider")
        sequences = list(map(list, data.sequences)) == list(map(list, before.sequences))
        times = list(map(list, data.times)) == list(map(list, before.times))
        assert sequences and times and np.array_equal(data.embeddings, before.embeddings), (
            "the provider changes the interactions, the times or the embeddings. Work on copies."
        )


def _extension(tests: object, name: str) -> Any:
    """Return the extension that a test class names. A function is not bound to the test class."""
    extension = inspect.getattr_static(type(tests), name)
    extension = extension.__func__ if isinstance(extension, staticmethod) else extension
    assert extension is not None, f"{type(tests).__name__} does not name the extension to test. Set `{name}`."
    return extension


def _check_fits(kind: str, form: str, function: Any, *args: Any, **given: Any) -> None:
    """Check that a function accepts the arguments of a call."""
    problem = misfit(function, *args, **given)
    assert not problem, f"{kind} cannot be called as {form}: {problem}."


def _listed(name: str, results: Any) -> list[Any]:
    """Return the results of a method as a list."""
    assert isinstance(results, Iterable), (
        f"{name} returned {results!r:.200}. Return a list with one entry for each request."
    )
    return list(results)


def _answers(reranker: Reranker, requests: Sequence[Request]) -> list[Any]:
    answers = _listed("rank", reranker.rank(requests))
    _check_count("rank", requests, answers, "answer")
    return answers


def _requests_to_fit() -> tuple[list[Request], list[Request]]:
    """Return new train and validation requests that contain their target."""
    train, valid = synthetic_requests("train", 40), synthetic_requests("valid", 20)
    return [r for r in train if r.has_signal], [r for r in valid if r.has_signal]


def _ranking(answer: Any) -> tuple[int, ...]:
    """Return a ranking as item ids."""
    ranking = answer.ranking if isinstance(answer, Answer) else answer
    assert isinstance(ranking, Iterable), f"the ranking is {ranking!r:.200}. Return the item ids of request.items."
    values = list(ranking)
    assert all(isinstance(value, Real) or getattr(value, "shape", None) == () for value in values), (
        f"the ranking is {values!r:.200}. A ranking consists of internal item ids as in request.items, not of tokens."
    )
    return tuple(int(value) for value in values)


def _numbers(name: str, value: Any) -> np.ndarray:
    """Return a feature as an array of numbers."""
    try:
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"the feature {name!r} is no array of numbers: {error}. Return an array.") from error


def _check_count(name: str, requests: Sequence[Request], results: Sequence[Any], kind: str) -> None:
    assert len(results) == len(requests), (
        f"{name} returned {len(results)} results for {len(requests)} requests. Return one {kind} per request."
    )


def _check_permutation(request: Request, ranking: tuple[int, ...]) -> None:
    missing, foreign = set(request.items) - set(ranking), set(ranking) - set(request.items)
    assert sorted(ranking) == sorted(request.items), (
        f"the ranking of {request.request_id} is not a permutation of its {len(request.items)} candidates. It has "
        f"{len(ranking)} items; missing: {sorted(missing)}; not candidates: {sorted(foreign)}. Return each item id of "
        "request.items once."
    )


def _check_equal(
    requests: Sequence[Request], one: Sequence[tuple[int, ...]], other: Sequence[tuple[int, ...]], when: str
) -> None:
    for request, expected, actual in zip(requests, one, other, strict=True):
        assert expected == actual, f"the ranking of {request.request_id} is {expected}, but {actual} {when}"


def _check_replies(
    requests: Sequence[Request], one: Sequence[TeacherReply], other: Sequence[TeacherReply], when: str
) -> None:
    for request, expected, actual in zip(requests, one, other, strict=True):
        assert expected == actual, f"the reply to {request.request_id} is {expected}, but {actual} {when}"


def _check_catalog(name: str) -> None:
    """Check that the catalogue of the tests is as it was created."""
    catalog, original = synthetic_catalog(), synthetic_catalog.__wrapped__()
    same = list(catalog) == list(original) and catalog.id_of == original.id_of
    same = same and np.array_equal(catalog.sids, original.sids)
    assert same, f"{name} changes the catalogue. Work on copies of its items and arrays."


def _check_unchanged(requests: Sequence[Request], before: Sequence[Request], name: str) -> None:
    assert len(requests) == len(before), f"{name} changes the list of requests. Work on a copy."
    for request, original in zip(requests, before, strict=True):
        same = request == original
        if request.features is not None and original.features is not None:
            pairs = zip(request.features, original.features, strict=True)
            same = same and all(np.array_equal(one, other) for one, other in pairs)
        assert same, f"{name} changes the request {original.request_id}. Work on copies of its arrays."


def _check_features(
    request: Request, one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], what: str
) -> None:
    for name in one:
        same = name in other and np.array_equal(_numbers(name, one[name]), _numbers(name, other[name]), equal_nan=True)
        assert same, f"the feature {name!r} of {request.request_id} {what}"
