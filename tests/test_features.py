"""Features by hand, providers of users, the target in no feature, and priors that learn planted patterns."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError, QualityCheckError
from recbole_gr2.features import prior as prior_module
from recbole_gr2.features import providers
from recbole_gr2.features.extraction import TrainingData, extract_features, feature_names, find_providers
from recbole_gr2.features.prior import (
    Priors,
    cross_entropy,
    cross_fit,
    fit_prior,
    fit_priors,
    log_prior,
    pad,
    shares,
)
from recbole_gr2.features.providers import PERIODS, PROVIDERS, SparseLookup, overlap
from recbole_gr2.types import RECENT, Candidate, CandidateFeatures, Item, Request

CATALOG = Catalog(
    Item(item_id=n, token=f"t{n}", title=f"Title {n}", brand=brand, categories=categories)
    for n, (brand, categories) in enumerate(
        [("X", "A > B > C"), ("X", "A > B"), ("Y", "A > D"), ("", "E"), ("Y", ""), ("X", "A > B > C")], start=1
    )
)
SEQUENCES = [[1, 2, 3], [1, 2, 4], [2, 5], [6, 1, 2]]
TIMES = [[10, 20, 30], [20, 30, 40], [50, 60], [70, 80, 90]]
DATA = TrainingData(catalog=CATALOG, sequences=SEQUENCES, times=TIMES, embeddings=np.eye(6, dtype=np.float32))
TEXTS = np.array([[1, 0], [0.6, 0.8], [1, 0], [0, 0], [0, 1], [0.8, 0.6]])  # Item 4 has no text.


def request(history=(1, 2), candidates=(3, 4, 5), scores=(3.0, 2.0, 0.0), target=4) -> Request:
    listed = tuple(
        Candidate(item_id=i, score=s, rank=r) for r, (i, s) in enumerate(zip(candidates, scores, strict=False), start=1)
    )
    return Request(
        request_id="r",
        user_token="u",
        split="test",
        history=tuple(history),
        candidates=listed,
        target=target,
        provider="p",
    )


def features(name: str, data: TrainingData = DATA, **changes: object) -> dict[str, list]:
    """Return the features of a request that a provider computes, rounded to six digits."""
    values = PROVIDERS[name](data)(request(**changes))
    return {key: np.round(np.asarray(value, dtype=float), 6).tolist() for key, value in values.items()}


def logs(*counts: float) -> list[float]:
    """Return log(1 + count) of each count, rounded to six digits."""
    return [round(math.log1p(count), 6) for count in counts]


# --- providers -------------------------------------------------------------------------------------------------------


def test_base_by_hand():
    total = math.exp(0) + math.exp(-1) + math.exp(-3)
    base = features("base")
    assert base["rank"] == [1, 2, 3] and base["gap"] == [0, 1, 3]
    assert base["1 / rank"] == [1, 0.5, 0.333333]
    assert base["log share"] == pytest.approx([score - math.log(total) for score in (0, -1, -3)], abs=1e-6)


def test_popularity_by_hand():
    assert features("popularity") == {"popularity": logs(1, 1, 1)}
    assert features("popularity", candidates=(1, 2, 6)) == {"popularity": logs(3, 4, 1)}


def test_time_by_hand(monkeypatch):
    """Item 2 has the times 20, 30, 50 and 90, item 4 has 40, and item 6 has 70. 11 interactions have a time."""
    monkeypatch.setattr("recbole_gr2.features.providers.PERIODS", ((-0.3, 0.0), (0.0, 0.26)))
    now = replace(request(candidates=(2, 4, 6)), times=(30, 50))
    values = PROVIDERS["time"](DATA)(now)
    # Interactions before: 1, 1, 3, 5, 6 and 10 for the times of item 2 and so on; 6 of 12 are before the time 50.
    assert np.round(values["interactions from -0.3 to +0"], 6).tolist() == logs(1, 1, 0)
    assert np.round(values["interactions from +0 to +0.26"], 6).tolist() == logs(1, 0, 1)
    assert values["share of earlier"].tolist() == [0.5, 1, 0]
    after, before, middle = (
        np.exp(values["time to next"]),
        np.exp(values["time from previous"]),
        values["time of median"],
    )
    assert after == pytest.approx([1e-4, 1, 2 / 12]) and before == pytest.approx([3 / 12, 1 / 12, 1])
    assert middle == pytest.approx([0, -1 / 12, 2 / 12])


@given(st.integers(0, 1000), st.floats(0, 12))
def test_time_is_that_of_a_plain_count(seed, now):
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(1, 7, size=rng.integers(0, 5)) for _ in range(4)]
    times = [np.sort(rng.integers(0, 12, size=len(items))) for items in sequences]
    data = replace(DATA, sequences=[*sequences, [1]], times=[*times, [5]])
    asked = request(candidates=(1, 2, 3, 4, 5, 6), scores=[0.0] * 6)
    values = PROVIDERS["time"](data)(replace(asked, times=(0, now)))
    every = np.concatenate(data.times)
    size, rank = len(every) + 1, {time: (every < time).sum() for time in [*every, now]}
    for place, item in enumerate(asked.items):
        own = [
            rank[time]
            for sequence, when in zip(data.sequences, data.times, strict=True)
            for other, time in zip(sequence, when, strict=True)
            if other == item
        ]
        for low, high in PERIODS:
            count = sum(rank[now] + low * size <= other < rank[now] + high * size for other in own)
            assert values[f"interactions from {low:+g} to {high:+g}"][place] == pytest.approx(math.log1p(count))
        assert values["share of earlier"][place] == pytest.approx(sum(r < rank[now] for r in own) / max(len(own), 1))


def test_times_in_another_unit_and_an_unknown_time_give_the_same_features():
    seconds = replace(DATA, times=[[60 * time + 5 for time in times] for times in TIMES])
    one = PROVIDERS["time"](DATA)(replace(request(), times=(10, 30)))
    other = PROVIDERS["time"](seconds)(replace(request(), times=(60 * 10 + 5, 60 * 30 + 5)))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    last, unknown = (PROVIDERS["time"](DATA)(replace(request(), times=times)) for times in ((1000, 1000), ()))
    assert unknown["share of earlier"].tolist() == last["share of earlier"].tolist() == [1, 1, 1]


def test_transition_by_hand():
    after = features("transition")
    assert after["next"] == logs(1, 1, 1) and after["share of next"] == [0.333333] * 3
    assert after["soon after last"] == logs(1, 1, 1)
    assert after["soon after"] == logs(1.7, 1.7, 1)  # After item 2 (the last one), and after item 1 with weight 0.7.
    assert features("transition", history=(1,), candidates=(6, 2, 3))["soon before last"] == logs(1, 0, 0)
    # The rows are the history items 1 and 2, the columns the candidates 3, 4 and 6.
    pairs = features("transition", candidates=(3, 4, 6))
    assert pairs["next after each"] == [logs(0, 0, 0), logs(1, 1, 0)]
    assert pairs["soon after each"] == [logs(1, 1, 0), logs(1, 1, 0)]
    assert pairs["soon before each"] == [logs(0, 0, 1), logs(0, 0, 1)]


def test_together_by_hand():
    values = features("together", candidates=(3, 4, 6))
    assert values["together with last"] == pytest.approx([0.5, 0.5, 0.5])  # n = 1, sqrt(4 * 1) = 2
    assert values["together"] == pytest.approx([0.5 + 1 / math.sqrt(3)] * 3, abs=1e-6)
    assert values["most together"] == pytest.approx([1 / math.sqrt(3)] * 3, abs=1e-6)
    assert values["users together"] == logs(2, 2, 2)
    assert values["users together with each"] == [logs(1, 1, 1)] * 2
    assert values["together with each"] == [[round(1 / math.sqrt(3), 6)] * 3, [0.5] * 3]


def test_text_by_hand():
    assert features("text", candidates=(2, 1, 3)) == {
        "text of last": [1, 0, 0],
        "closest text": [1, 1, 0],
        "text": [0.5, 0.5, 0],
        "text of each": [[0, 1, 0], [1, 0, 0]],
    }


def test_brand_and_category_by_hand():
    assert features("brand", candidates=(6, 3, 4)) == {
        "brand of last": [1, 0, 0],
        "brand": [1, 0, 0],
        "brand of each": [[1, 0, 0], [1, 0, 0]],
    }
    category = features("category", candidates=(6, 3, 5))
    assert category["category of last"] == [0.666667, 0.5, 0] and category["category"] == [0.833333, 0.416667, 0]
    assert category["category of each"] == [[1, 0.333333, 0], [0.666667, 0.5, 0]]


def test_linear_weights_are_ridge_regressions_of_each_item_on_the_others(monkeypatch):
    users = np.array([[item in sequence for item in range(1, 7)] for sequence in SEQUENCES], dtype=float)
    rows = np.concatenate([users, math.sqrt(0.3) * TEXTS.T])  # A dimension of the texts is one more user.
    monkeypatch.setattr(providers, "RIDGE", 0.5)
    monkeypatch.setattr(providers, "TEXT", 0.3)
    data = replace(DATA, embeddings=TEXTS)

    def weights(item: int) -> np.ndarray:
        others = np.delete(rows, item - 1, axis=1)
        solved = np.linalg.solve(others.T @ others + 0.5 * np.eye(5), others.T @ rows[:, item - 1])
        return np.insert(solved, item - 1, 0.0)

    values = features("linear", data, history=(6, 1, 2), candidates=(3, 5, 2))
    expected = np.array([weights(item)[[5, 0, 1]] for item in (3, 5, 2)]).T
    assert np.allclose(values["linear of each"], expected, atol=1e-5) and expected[1, 2] > 0.1
    assert np.allclose(values["linear of last"], expected[-1], atol=1e-5)
    assert np.allclose(values["linear"], expected.sum(axis=0), atol=1e-5)
    longer = features("linear", data, history=(6,) * 20 + (1,), candidates=(3, 4))  # The sum is over all 21 items.
    assert np.shape(longer["linear of each"]) == (RECENT, 2)
    assert np.allclose(longer["linear"], [20 * weights(i)[5] + weights(i)[0] for i in (3, 4)], atol=1e-4)


def test_overlap_of_categories():
    assert [overlap(CATALOG.item(1), CATALOG.item(n)) for n in (2, 6, 5)] == [2 / 3, 1, 0]
    words = [Item(item_id=n, token="", title="", categories=c) for n, c in enumerate(["Drama War", "War"], start=1)]
    assert overlap(*words) == 0.5


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40))
def test_sparse_lookup_returns_the_entries_of_the_matrix(entries):
    rows, columns = (np.array(part, dtype=int) for part in (zip(*entries, strict=True) if entries else ((), ())))
    matrix = csr_matrix((np.ones(len(entries)), (rows, columns)), shape=(7, 7))
    grid = np.arange(7)
    lookup = SparseLookup(matrix)
    assert np.array_equal(lookup.values_at(grid[:, None], grid), matrix.toarray())
    assert np.array_equal(lookup.rows([6, 0, 6], grid[::-1]), matrix.toarray()[[6, 0, 6], ::-1])


# --- extraction ------------------------------------------------------------------------------------------------------


def test_pair_features_have_the_newest_history_item_first():
    _, (values,) = extract_features([request(candidates=(2, 1, 3))], ["text", "brand"], DATA)
    assert values.candidates.shape == (3, 5) and values.pairs.shape == (3, 2, 2)
    assert values.candidates.dtype == np.float32 and values.pairs.dtype == np.float16
    assert values.pairs[:, :, 0].tolist() == [[1, 0], [0, 1], [0, 0]]
    assert values.padded.shape == (3, RECENT, 2) and not values.padded[:, 2:].any()


def test_pair_features_are_limited_to_recent_history_items():
    _, (values,) = extract_features([request(history=tuple(range(1, 7)) * 3)], ["popularity", "text"], DATA)
    assert values.pairs.shape == (3, RECENT, 1)
    assert values.pairs[1, :, 0].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1, 0]
    assert extract_features([request()], ["popularity"], DATA)[1][0].pairs.shape == (3, 2, 0)


def test_the_target_is_in_no_feature():
    names = list(PROVIDERS)
    results = [extract_features([request(target=target)], names, DATA) for target in (3, 4, 5, 0)]
    for labels, (values,) in results:
        assert labels == results[0][0] and len(labels) == len(set(labels)) == values.candidates.shape[1] > 15
        assert all(np.array_equal(one, other) for one, other in zip(values, results[0][1][0], strict=True))
        assert values.candidates.shape[0] == 3 and values.pairs.shape == (3, 2, 10)
    assert feature_names(names) == results[0][0]


def repeated_name(data: TrainingData) -> Callable:
    return lambda request: {"rank": np.zeros(len(request.items))}


def too_short(data: TrainingData) -> Callable:
    return lambda request: {"x": np.zeros(1)}


def not_finite(data: TrainingData) -> Callable:
    return lambda request: {"x": np.full(len(request.items), np.nan)}


def beyond_float16(data: TrainingData) -> Callable:
    return lambda request: {"x": np.full((len(request.history), len(request.items)), 1e6)}


def pairs_only(data: TrainingData) -> Callable:
    return lambda request: {"x": np.arange(6).reshape(2, 3)}


def test_providers_of_a_user():
    labels, (values,) = extract_features([request()], ["popularity", f"{__name__}:repeated_name"], DATA)
    assert labels == ["popularity", "rank"] and values.candidates.shape == (3, 2)
    labels, (values,) = extract_features([request()], [f"{__name__}:pairs_only"], DATA)
    assert labels == [] and values.candidates.shape == (3, 0)
    assert values.pairs[:, :, 0].tolist() == [[3, 0], [4, 1], [5, 2]]


def test_two_providers_must_not_return_the_same_name():
    with pytest.raises(GR2Error, match="two features have the same name"):
        extract_features([request()], ["base", f"{__name__}:repeated_name"], DATA)


def texts(data: TrainingData) -> Callable:
    return lambda request: {"x": ["a"] * len(request.items)}


def no_dictionary(data: TrainingData) -> Callable:
    return lambda request: None


def no_function(data: TrainingData) -> None:
    return None


def raises(data: TrainingData) -> Callable:
    return lambda request: {"x": [1 / 0 for _ in request.items]}


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        ("too_short", r"the feature 'x' has the shape \(1,\)"),
        ("not_finite", "the feature 'x' has 3 values that are not finite"),
        ("beyond_float16", "the feature 'x' has 6 values that are not finite as float16"),
        ("texts", "the feature 'x' is no array of numbers"),
        ("no_dictionary", "returned no dictionary of named features: None"),
        ("no_function", "cannot be called as describe"),
        ("raises", r"test_features:raises' raised ZeroDivisionError: division by zero \(.*test_features.py:\d+\)"),
    ],
)
def test_a_provider_must_return_finite_numbers_of_the_right_shape(provider, message):
    with pytest.raises(GR2Error, match=message):
        extract_features([request()], ["popularity", f"{__name__}:{provider}"], DATA)


def other_names(data: TrainingData) -> Callable:
    return lambda request: {f"{len(request.items)} candidates": np.zeros(len(request.items))}


def test_each_request_must_have_the_same_names():
    with pytest.raises(GR2Error) as error:
        extract_features([request(), request(candidates=(2, 1))], ["popularity", f"{__name__}:other_names"], DATA)
    assert "['popularity', '2 candidates']" in error.value.what and "['popularity', '3 candidates']" in error.value.what


def seen(data: TrainingData) -> Callable:
    return lambda request: {"x": np.full(len(request.items), float(request.target or sum(request.grades)))}


def test_providers_get_requests_without_labels():
    labelled = replace(request(target=3), grades=(0, 1, 2))
    _, (values,) = extract_features([labelled], [f"{__name__}:seen"], DATA)
    assert values.candidates.tolist() == [[0.0]] * 3


def no_arguments() -> Callable:
    return lambda request: {}


def test_the_arguments_of_a_provider_are_checked():
    with pytest.raises(ConfigurationError, match=r"no_arguments' cannot be called as provider\(data\): too many"):
        find_providers([f"{__name__}:no_arguments"])


@pytest.mark.parametrize("provider", ["weather", "no_such_module:x", f"{__name__}:no_such_name"])
def test_an_unknown_provider_is_an_error(provider):
    with pytest.raises(ConfigurationError, match="there is no|cannot import"):
        extract_features([request()], [provider], DATA)


# --- the prior -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_prior(monkeypatch):
    """Make priors small and fast to fit."""
    for name, value in {"HIDDEN": 8, "DROPOUT": 0.0, "LEARNING_RATE": 0.02, "WEIGHT_DECAY": 0.0}.items():
        monkeypatch.setattr(prior_module, name, value)


def without_pairs(table: np.ndarray) -> CandidateFeatures:
    """Return features of candidates (K, F) without pair features."""
    return CandidateFeatures(table.astype(np.float32), np.zeros((len(table), 1, 0), np.float16))


def planted(count: int, seed: int) -> tuple[list[CandidateFeatures], list[tuple[int, ...]]]:
    """Return lists of five candidates. In 70 % of them the target has the largest first feature."""
    rng = np.random.default_rng(seed)
    tables = [rng.normal(size=(5, 3)) for _ in range(count)]
    targets = [int(t[:, 0].argmax()) if rng.random() < 0.7 else int(rng.integers(5)) for t in tables]
    relevance = [tuple(int(position == target) for position in range(5)) for target in targets]
    return [without_pairs(t) for t in tables], relevance


def planted_pairs(count: int, seed: int) -> tuple[list[CandidateFeatures], list[tuple[int, ...]]]:
    """Return lists of four candidates with histories of two to four items.

    One history item has the second pair feature 1. The target has the largest first pair feature with this item. With
    all other items the first pair feature is noise.
    """
    rng = np.random.default_rng(seed)
    lists, relevance = [], []
    for _ in range(count):
        size = int(rng.integers(2, 5))
        pairs = np.stack([rng.normal(size=(4, size)), np.zeros((4, size))], axis=2)
        pairs[:, (marked := int(rng.integers(size))), 1] = 1
        lists.append(CandidateFeatures(np.zeros((4, 1), np.float32), pairs.astype(np.float16)))
        relevance.append(tuple(int(position == pairs[:, marked, 0].argmax()) for position in range(4)))
    return lists, relevance


def accuracy(log_probs: list[list[float]], relevance: list[tuple[int, ...]]) -> float:
    """Return the share of lists whose target has the highest log-probability."""
    return float(np.mean([target[np.argmax(row)] for row, target in zip(log_probs, relevance, strict=True)]))


def test_the_prior_learns_a_planted_pattern(small_prior):
    lists, relevance = planted(300, 0)
    valid = planted(200, 1)
    prior, steps, error = fit_prior(lists, relevance, valid=valid, steps=120, seed=3)
    assert error == pytest.approx(cross_entropy(prior(pad(valid[0])), shares(valid[1])).item())  # Of the best step.
    new, targets = planted(200, 2)
    log_probs = log_prior(prior, new)
    assert accuracy(log_probs, targets) > 0.65 and 10 <= steps <= 120 and error < math.log(5) - 0.3
    assert all(math.fsum(map(math.exp, row)) == pytest.approx(1, abs=1e-5) for row in log_probs)


def test_a_fit_depends_on_the_seed_only(small_prior):
    lists, relevance = planted(50, 0)
    state = torch.get_rng_state()
    first, second, other = (
        log_prior(fit_prior(lists, relevance, valid=None, steps=5, seed=seed)[0], lists) for seed in (1, 1, 2)
    )
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_the_prior_learns_which_history_item_matters(small_prior, monkeypatch):
    """The mean over all history items gives 45 % correct lists."""
    monkeypatch.setattr(prior_module, "HIDDEN", 32)
    prior, _, _ = fit_prior(*planted_pairs(400, 0), valid=None, steps=150, seed=3)
    new, targets = planted_pairs(200, 2)
    log_probs = log_prior(prior, new)
    assert accuracy(log_probs, targets) > 0.8
    short = min(new, key=lambda each: each.pairs.shape[1])  # In a batch with longer histories, and alone.
    position = [each is short for each in new].index(True)
    assert log_probs[position] == pytest.approx(log_prior(prior, [short])[0], abs=1e-5)


def test_an_ensemble_is_the_normalised_mean_of_its_members(small_prior):
    lists, new = planted(100, 0), planted(50, 2)[0]
    valid = planted(60, 1)
    priors, steps, error = fit_priors(*lists, valid=valid, steps=[60, 40, 20], seed=3)
    members = [log_prior(prior, new) for prior in priors]
    assert len(steps) == 3 and all(count <= most for count, most in zip(steps, [60, 40, 20], strict=True))
    assert not np.allclose(members[0], members[1], atol=1e-3)
    mean = np.mean(members, axis=0)
    mean -= np.log(np.exp(mean).sum(axis=1, keepdims=True))
    assert np.allclose(log_prior(priors, new), mean, atol=1e-5)
    assert error == pytest.approx(cross_entropy(priors(pad(valid[0])), shares(valid[1])).item())


def test_a_saved_ensemble_is_loaded_back(small_prior, tmp_path):
    lists, relevance = planted_pairs(20, 0)
    priors, _, _ = fit_priors(lists, relevance, valid=None, steps=[5, 5], seed=3)
    priors.save(tmp_path / "prior.safetensors")
    assert log_prior(Priors.load(tmp_path / "prior.safetensors"), lists) == log_prior(priors, lists)
    with pytest.raises(MissingFileError, match="nothing"):
        Priors.load(tmp_path / "nothing")


def test_padding_has_no_probability(small_prior):
    lists, relevance = planted(50, 0)
    short = [CandidateFeatures(*(part[:2] for part in each)) for each in lists[:25]] + lists[25:]
    prior, _, _ = fit_prior(short, [(1, 0)] * 25 + relevance[25:], valid=None, steps=20, seed=3)
    log_probs = log_prior(prior, short)
    assert [len(row) for row in log_probs] == [2] * 25 + [5] * 25
    assert all(math.fsum(map(math.exp, row)) == pytest.approx(1, abs=1e-5) for row in log_probs)
    assert log_probs[0] == pytest.approx(log_prior(prior, [short[0]])[0], abs=1e-5)


@pytest.mark.slow
def test_several_targets_get_probabilities_in_proportion_to_their_relevance(small_prior):
    """Two of three features make a candidate relevant, one of them twice as much as the other."""
    rng = np.random.default_rng(0)
    lists, relevance = [], []
    for _ in range(300):
        kinds = rng.permutation([0, 1, 2, 2, 2])
        lists.append(without_pairs(np.eye(3)[kinds]))
        relevance.append(tuple(int((2, 1, 0)[kind]) for kind in kinds))
    prior, _, _ = fit_prior(lists, relevance, valid=None, steps=200, seed=3)
    (row,) = log_prior(prior, [without_pairs(np.eye(3)[[2, 1, 0]])])
    assert np.exp(row[1:]) == pytest.approx([1 / 3, 2 / 3], abs=0.03) and row[0] < -3


def test_cross_entropy_by_hand():
    by_hand = -(2 * math.log(0.5) + math.log(0.25)) / 3
    log_probs = torch.tensor([[0.25, 0.5, 0.25, 0.0]]).log()
    assert cross_entropy(log_probs, shares([(1, 2, 0, 0)])).item() == pytest.approx(by_hand)


def test_a_cross_fitted_list_does_not_depend_on_the_targets_of_its_user(small_prior):
    lists, relevance = planted(40, 0)
    users = [str(number % 36) for number in range(40)]  # The lists 0 to 3 and 36 to 39 have the same users.
    before = cross_fit(lists, relevance, users=users, steps=4, seed=1)
    changed = list(relevance)
    changed[7] = relevance[7][1:] + relevance[7][:1]
    after = cross_fit(lists, changed, users=users, steps=4, seed=1)
    assert before[7] == after[7] and before != after
    changed = list(relevance)
    changed[37] = relevance[37][1:] + relevance[37][:1]
    after = cross_fit(lists, changed, users=users, steps=4, seed=1)
    assert (before[1], before[37]) == (after[1], after[37]) and before != after
    assert len(before) == 40 and all(len(row) == 5 for row in before)


def test_few_users_have_fewer_folds_and_one_user_is_an_error(small_prior):
    lists, relevance = planted(3, 0)
    log_probs = cross_fit(lists, relevance, users=["a", "b", "b"], steps=2, seed=1)
    assert all(len(row) == 5 for row in log_probs)
    with pytest.raises(QualityCheckError, match="belong to 1 users"):
        cross_fit(lists, relevance, users=["a"] * 3, steps=2, seed=1)


def test_order_by_prior():
    plain = request()
    assert plain.by_prior == plain.items == (3, 4, 5)
    assert replace(plain, prior=(-2.0, -1.0, -2.0)).by_prior == (4, 3, 5)
