"""Permutations, ranks, and the statistics of paired comparisons."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recbole_gr2.config import load_settings
from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.ranking import (
    METRICS,
    adjust,
    compare_ranks,
    complete,
    holm,
    ndcg_at,
    paired_comparison,
    promote,
    recall_at,
)

items = st.lists(st.integers(0, 50), min_size=1, max_size=12, unique=True)


@given(items, st.data())
def test_promote_moves_one_item_to_the_front_and_keeps_the_order_of_the_rest(given_items, data):
    first = data.draw(st.sampled_from(given_items))
    promoted = promote(given_items, first)
    assert promoted[0] == first
    assert list(promoted[1:]) == [item for item in given_items if item != first]


def test_promote_refuses_a_foreign_item():
    with pytest.raises(ValueError, match="item 5 is not in the list"):
        promote((1, 2), 5)


@given(st.lists(st.integers(0, 60), max_size=15), items)
def test_complete_gives_a_permutation_that_starts_with_the_given_items(partial, given_items):
    full = complete(partial, given_items)
    assert sorted(full) == sorted(given_items)
    start = [item for item in dict.fromkeys(partial) if item in given_items]
    assert list(full[: len(start)]) == start
    rest = [item for item in given_items if item not in start]
    assert list(full[len(start) :]) == rest


def test_complete_by_hand():
    assert complete((), (4, 7, 9)) == (4, 7, 9)
    assert complete((7,), (4, 7, 9)) == (7, 4, 9)
    assert complete((1, 9, 9, 1), (4, 7, 9)) == (9, 4, 7)


def test_metrics_by_hand():
    ranks = np.array([1, 2, 3, 5, 6, 10**9])
    assert recall_at(ranks, 5).tolist() == [1, 1, 1, 1, 0, 0]
    # 1 / log2(rank + 1)
    expected = [1.0, 0.6309297535714575, 0.5, 0.38685280723454163, 0.0, 0.0]
    assert ndcg_at(ranks, 5) == pytest.approx(expected, abs=1e-15)


@given(st.integers(1, 40), st.integers(1, 20))
def test_ndcg_lies_between_zero_and_recall(rank, k):
    ndcg, recall = float(ndcg_at(rank, k)), float(recall_at(rank, k))
    assert 0 <= ndcg <= recall
    assert (ndcg > 0) == (recall == 1)
    assert ndcg_at(1, k) == 1


@pytest.mark.slow
def test_paired_comparison_agrees_with_scipy():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    ours = base + np.where(rng.random(200) < 0.3, rng.normal(0.05, 0.3, 200), 0.0)  # 7 of 10 differences are 0
    compared = paired_comparison(ours, base, seed=0)
    assert compared["diff"] == pytest.approx(float((ours - base).mean()), abs=1e-12)
    bootstrap = stats.bootstrap(
        (ours - base,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = bootstrap.high - bootstrap.low
    assert compared["low"] == pytest.approx(bootstrap.low, abs=0.03 * width)
    assert compared["high"] == pytest.approx(bootstrap.high, abs=0.03 * width)
    test = stats.permutation_test(
        (ours, base),
        lambda x, y, axis: (x - y).mean(axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(2),
    )
    assert 0.01 < test.pvalue < 0.9  # neither certain nor impossible
    assert compared["p"] == pytest.approx(test.pvalue, abs=0.02)


def test_p_value_is_exact_on_a_case_that_can_be_counted():
    # Four differences are equal and the others are 0: 2 of the 16 sign patterns are as extreme.
    compared = paired_comparison(np.array([1.0, 1, 1, 1, 0, 0]), np.zeros(6), seed=3)
    assert compared["p"] == pytest.approx(2 / 16, abs=0.01)


def test_a_clear_shift_is_significant_and_noise_is_not():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 500)
    shifted = paired_comparison(noise + 0.5, noise * 0, seed=0)
    assert shifted["p"] == pytest.approx(1 / 10_001) and shifted["low"] > 0.3
    p_values = [
        paired_comparison(rng.normal(0, 1, 60), np.zeros(60), seed=s, draws=500)["p"] for s in range(200)
    ]  # under the null the share of p <= .1 is .1, give or take .04
    assert np.mean(np.array(p_values) <= 0.1) == pytest.approx(0.1, abs=0.06)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.integers(0, 9))
def test_paired_comparison_is_symmetric(differences, seed):
    difference, zero = np.array(differences), np.zeros(len(differences))
    one = paired_comparison(difference, zero, seed=seed, draws=400)
    other = paired_comparison(zero, difference, seed=seed, draws=400)
    assert one["diff"] == -other["diff"] and one["p"] == other["p"]
    assert (one["low"], one["high"]) == pytest.approx((-other["high"], -other["low"]), abs=1e-12)
    assert 0 < one["p"] <= 1


def test_no_difference():
    assert paired_comparison(np.ones(3), np.ones(3), seed=0) == {"diff": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


@pytest.mark.parametrize("draws", [1, 40, 100, 150, 1030])
def test_there_are_exactly_as_many_flips_as_requested(draws):
    """One user's difference is as extreme under each flip, so p counts the flips."""
    compared = paired_comparison(np.array([1.0]), np.zeros(1), seed=0, draws=draws)
    assert compared["p"] == 1.0
    rng = np.random.default_rng(0)
    clear = paired_comparison(rng.normal(5, 1, 50), np.zeros(50), seed=0, draws=draws)
    assert clear["p"] == 1 / (draws + 1) and clear["low"] <= clear["diff"] + 1


@pytest.mark.parametrize("draws", [150, 1030, 9999])
@pytest.mark.parametrize("count", [3, 7, 11])
def test_p_values_are_those_of_all_sign_flips(count, draws):
    """An enumeration of all patterns. The observed pattern counts as one more flip."""
    difference = np.random.default_rng(count).normal(0.3, 1, count).round(2)
    signs = np.array(list(itertools.product((-1, 1), repeat=count)))
    exact = np.mean(np.abs(signs @ difference) >= abs(difference.sum()) - 1e-9)
    padded = np.concatenate([difference, np.zeros(5)])  # users without a difference change nothing
    p = paired_comparison(padded, np.zeros(len(padded)), seed=8, draws=draws)["p"]
    extreme = p * (draws + 1) - 1
    assert extreme == pytest.approx(round(extreme), abs=1e-6) and 0 <= round(extreme) <= draws
    assert extreme == pytest.approx(draws * exact, abs=5 * np.sqrt(draws * exact * (1 - exact)))


def test_too_few_draws_are_refused_with_the_settings():
    assert load_settings(config_dict={"preset": "smoke", "eval_draws": 199})["eval_draws"] == 199
    with pytest.raises(ConfigurationError, match="eval_draws is 50"):
        load_settings(config_dict={"preset": "smoke", "eval_draws": 50})


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_differences_have_to_be_finite(wrong):
    """A difference that is not a number would have the smallest p-value."""
    with pytest.raises(GR2Error, match="1 of 3 differences"):
        paired_comparison(np.array([1.0, wrong, 0.0]), np.zeros(3), seed=0, draws=100)
    with pytest.raises(GR2Error, match="0 of 0 differences"):
        paired_comparison(np.zeros(0), np.zeros(0), seed=0, draws=100)


def test_results_are_the_same_to_the_last_digit():
    """Figures of earlier versions stay comparable: the order of the random draws must not change."""
    difference = np.array([0.5, -0.25, 0, 0, 1.0, 0.125, 0, -0.5])
    assert paired_comparison(difference, np.zeros(8), seed=5, draws=1000) == {
        "diff": 0.109375,
        "low": -0.15625,
        "high": 0.40625,
        "p": 0.6333666333666333,
    }


def test_compare_ranks():
    ours, base = np.array([1, 2, 7, 1]), np.array([2, 2, 3, 12])
    compared = compare_ranks(ours, base, seed=4, draws=300)
    assert set(compared) == set(METRICS)
    for metric, value in METRICS.items():
        assert compared[metric] == paired_comparison(value(ours), value(base), seed=4, draws=300)
    everyone = compare_ranks(ours, base, seed=4, draws=300, users=10)
    beyond = np.full(6, 10**9)
    for metric, value in METRICS.items():
        padded = [value(np.concatenate([ranks, beyond])) for ranks in (ours, base)]
        assert everyone[metric] == paired_comparison(*padded, seed=4, draws=300)
    assert everyone["recall@1"]["diff"] == pytest.approx(compared["recall@1"]["diff"] * 4 / 10)


def test_adjust_covers_all_comparisons_and_metrics_of_a_family():
    family = [{"a": {"p": 0.01}, "b": {"p": 0.04, "diff": 1.0}}, {"a": {"p": 0.03}, "c": {"diff": 0.5}}]
    adjust(family)
    assert [family[0]["a"]["p_holm"], family[0]["b"]["p_holm"], family[1]["a"]["p_holm"]] == pytest.approx(
        [0.03, 0.06, 0.06]
    )
    assert family[1]["c"] == {"diff": 0.5}


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04: x4 = .04, x3 = .06, x2 = .06, x1 = .04 -> never below the one before.
    adjusted = holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02})
    assert adjusted == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06})
    assert list(adjusted) == ["d", "a", "c", "b"]
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_value_nor_swaps_two(p_values):
    adjusted = holm(p_values)
    assert set(adjusted) == set(p_values)
    for name, p in p_values.items():
        assert p <= adjusted[name] <= 1.0
    order = sorted(p_values, key=p_values.get)
    assert [adjusted[name] for name in order] == sorted(adjusted.values())
