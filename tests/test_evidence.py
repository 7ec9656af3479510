"""Evidence: facts by hand, nothing of the target in them, and a prior that learns what is there to learn."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_gr2 import evidence
from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.evidence import PROVIDERS, RECENT, Counts, Described, Observed, collect, overlap
from recbole_gr2.evidence.prior import cross_entropy, cross_fit, fit_prior, fit_priors, log_prior, pad, shares
from recbole_gr2.types import Candidate, Item, Request

ITEMS = tuple(
    Item(item_id=n, token=f"t{n}", title=f"Title {n}", brand=brand, categories=categories)
    for n, (brand, categories) in enumerate(
        [("X", "A > B > C"), ("X", "A > B"), ("Y", "A > D"), ("", "E"), ("Y", ""), ("X", "A > B > C")], start=1
    )
)
SEQUENCES = [[1, 2, 3], [1, 2, 4], [2, 5], [6, 1, 2]]
VECTORS = np.eye(6, dtype=np.float32)
TEXTS = np.array([[1, 0], [0.6, 0.8], [1, 0], [0, 0], [0, 1], [0.8, 0.6]])  # item 4 has no text
OBSERVED = Observed(items=ITEMS, sequences=SEQUENCES, embeddings=VECTORS)


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


def facts(name: str, **changes) -> dict[str, list[float]]:
    described = PROVIDERS[name](OBSERVED)(request(**changes))
    return {key: np.round(np.asarray(value, dtype=float), 6).tolist() for key, value in described.items()}


def logs(*counts: float) -> list[float]:
    return [round(math.log1p(count), 6) for count in counts]


def test_facts_by_hand():
    total = math.exp(0) + math.exp(-1) + math.exp(-3)
    base = facts("base")
    assert base["rank"] == [1, 2, 3] and base["gap"] == [0, 1, 3]
    assert base["log share"] == pytest.approx([score - math.log(total) for score in (0, -1, -3)], abs=1e-6)
    assert facts("popularity") == {"popularity": logs(1, 1, 1)}
    assert facts("popularity", candidates=(1, 2, 6)) == {"popularity": logs(3, 4, 1)}
    after = facts("transition")
    assert after["next"] == logs(1, 1, 1) and after["share of next"] == [0.333333] * 3
    assert after["soon after last"] == logs(1, 1, 1)
    assert after["soon after"] == logs(1.7, 1.7, 1)  # behind item 2 (the last), and behind item 1 at 0.7
    assert facts("transition", history=(1,), candidates=(6, 2, 3))["soon before last"] == logs(1, 0, 0)
    pair = facts("together", candidates=(3, 4, 6))
    assert pair["together with last"] == pytest.approx([0.5, 0.5, 0.5])  # n = 1, sqrt(4 * 1)
    assert pair["together"] == pytest.approx([0.5 + 1 / math.sqrt(3)] * 3, abs=1e-6)
    assert pair["most together"] == pytest.approx([1 / math.sqrt(3)] * 3, abs=1e-6)
    assert pair["users together"] == logs(2, 2, 2)
    assert facts("text", candidates=(2, 1, 3)) == {
        "text of last": [1, 0, 0],
        "closest text": [1, 1, 0],
        "text": [0.5, 0.5, 0],
        "text of each": [[0, 1, 0], [1, 0, 0]],
    }
    assert facts("brand", candidates=(6, 3, 4)) == {
        "brand of last": [1, 0, 0],
        "brand": [1, 0, 0],
        "brand of each": [[1, 0, 0], [1, 0, 0]],
    }
    same = facts("category", candidates=(6, 3, 5))
    assert same["category of last"] == [0.666667, 0.5, 0] and same["category"] == [0.833333, 0.416667, 0]
    assert same["category of each"] == [[1, 0.333333, 0], [0.666667, 0.5, 0]]


def test_facts_about_pairs_by_hand():
    """The rows are items 1 and 2 of the history, the columns candidates 3, 4 and 6."""
    after = facts("transition", candidates=(3, 4, 6))
    assert after["next after each"] == [logs(0, 0, 0), logs(1, 1, 0)]
    assert after["soon after each"] == [logs(1, 1, 0), logs(1, 1, 0)]
    assert after["soon before each"] == [logs(0, 0, 1), logs(0, 0, 1)]
    both = facts("together", candidates=(3, 4, 6))
    assert both["users together with each"] == [logs(1, 1, 1)] * 2
    assert both["together with each"] == [[round(1 / math.sqrt(3), 6)] * 3, [0.5] * 3]
    _, (known,) = collect([request(candidates=(2, 1, 3))], ["text", "brand"], OBSERVED)
    assert known.facts.shape == (3, 5) and known.pairs.shape == (3, 2, 2)
    assert known.pairs[:, :, 0].tolist() == [[1, 0], [0, 1], [0, 0]]  # of each candidate the text, newest item first
    _, (known,) = collect([request(history=tuple(range(1, 7)) * 3)], ["popularity", "text"], OBSERVED)
    assert known.pairs.shape == (3, RECENT, 1) and known.pairs[1, :, 0].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1, 0]
    assert collect([request()], ["popularity"], OBSERVED)[1][0].pairs.shape == (3, 2, 0)


def test_linear_weights_are_ridge_regressions_of_each_item_on_the_others(monkeypatch):
    users = np.array([[item in sequence for item in range(1, 7)] for sequence in SEQUENCES], dtype=float)
    taken = np.concatenate([users, math.sqrt(0.3) * TEXTS.T])  # a dimension of the texts is one more user
    monkeypatch.setattr(evidence, "RIDGE", 0.5)
    monkeypatch.setattr(evidence, "TEXT", 0.3)
    monkeypatch.setattr(sys.modules[__name__], "OBSERVED", replace(OBSERVED, embeddings=TEXTS))

    def weights(item: int) -> np.ndarray:
        others = np.delete(taken, item - 1, axis=1)
        solved = np.linalg.solve(others.T @ others + 0.5 * np.eye(5), others.T @ taken[:, item - 1])
        return np.insert(solved, item - 1, 0.0)

    said = facts("linear", history=(6, 1, 2), candidates=(3, 5, 2))
    expected = np.array([weights(item)[[5, 0, 1]] for item in (3, 5, 2)]).T
    assert np.allclose(said["linear of each"], expected, atol=1e-5) and expected[1, 2] > 0.1
    assert np.allclose(said["linear of last"], expected[-1], atol=1e-5)
    assert np.allclose(said["linear"], expected.sum(axis=0), atol=1e-5)
    longer = facts("linear", history=(6,) * 20 + (1,), candidates=(3, 4))  # the sum is over the whole history
    assert np.shape(longer["linear of each"]) == (RECENT, 2)
    assert np.allclose(longer["linear"], [20 * weights(i)[5] + weights(i)[0] for i in (3, 4)], atol=1e-4)


def test_items_that_are_taken_too_seldom_have_no_linear_weight(monkeypatch):
    monkeypatch.setattr(evidence, "MOST_ITEMS", 2)  # items 1 and 2, taken by three and four users
    said = facts("linear", history=(1, 3), candidates=(2, 4, 1))
    assert said["linear of each"][0][0] > 0
    assert said["linear of each"] == [[said["linear"][0], 0, 0], [0, 0, 0]]


def test_overlap():
    assert [overlap(ITEMS[0], ITEMS[n]) for n in (1, 5, 4)] == [2 / 3, 1, 0]
    words = [Item(item_id=n, token="", title="", categories=c) for n, c in enumerate(["Drama War", "War"], start=1)]
    assert overlap(*words) == 0.5


def test_the_target_is_in_no_fact():
    names = list(PROVIDERS)
    rows = [collect([request(target=target)], names, OBSERVED) for target in (3, 4, 5, 0)]
    for labels, (known,) in rows:
        assert labels == rows[0][0] and len(labels) == len(set(labels)) == known.facts.shape[1] > 15
        assert all(np.array_equal(one, other) for one, other in zip(known, rows[0][1][0], strict=True))
        assert known.facts.shape[0] == 3 and known.pairs.shape == (3, 2, 9)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40))
def test_counts_look_up_what_the_matrix_holds(pairs):
    from scipy.sparse import csr_matrix

    rows, columns = (np.array(part, dtype=int) for part in (zip(*pairs, strict=False) if pairs else ((), ())))
    matrix = csr_matrix((np.ones(len(pairs)), (rows, columns)), shape=(7, 7))
    grid = np.arange(7)
    assert np.array_equal(Counts(matrix).of(grid[:, None], grid), matrix.toarray())


def two_names(observed):
    return lambda request: {"rank": np.zeros(len(request.items))}


def too_short(observed):
    return lambda request: {"x": np.zeros(1)}


def not_finite(observed):
    return lambda request: {"x": np.full(len(request.items), np.nan)}


def beyond_float16(observed):
    return lambda request: {"x": np.full((len(request.history), len(request.items)), 1e6)}


def about_pairs_alone(observed):
    return lambda request: {"x": np.arange(6).reshape(2, 3)}


def test_providers_of_a_user():
    labels, (known,) = collect([request()], ["popularity", f"{__name__}:two_names"], OBSERVED)
    assert labels == ["popularity", "rank"] and known.facts.shape == (3, 2)
    with pytest.raises(GR2Error, match="two facts have one name"):
        collect([request()], ["base", f"{__name__}:two_names"], OBSERVED)
    labels, (known,) = collect([request()], [f"{__name__}:about_pairs_alone"], OBSERVED)
    assert labels == [] and known.facts.shape == (3, 0) and known.pairs[:, :, 0].tolist() == [[3, 0], [4, 1], [5, 2]]
    for wrong in ("too_short", "not_finite", "beyond_float16"):
        with pytest.raises(GR2Error, match="one finite number per candidate"):
            collect([request()], ["popularity", f"{__name__}:{wrong}"], OBSERVED)
    for wrong in ("weather", "no_such_module:x", f"{__name__}:no_such_name"):
        with pytest.raises(ConfigurationError, match="there is no|cannot import"):
            collect([request()], [wrong], OBSERVED)


# --- the prior -------------------------------------------------------------------------------------------------------

OPTIONS = dict(hidden=8, dropout=0.0, learning_rate=0.02, weight_decay=0.0)


def alone(table: np.ndarray) -> Described:
    """Facts about candidates, and none about pairs."""
    return Described(table.astype(np.float32), np.zeros((len(table), 1, 0), np.float16))


def planted(count: int, seed: int):
    """Lists of five in which the target is the candidate with the largest first fact, seven times out of ten."""
    rng = np.random.default_rng(seed)
    tables = [rng.normal(size=(5, 3)) for _ in range(count)]
    targets = [int(t[:, 0].argmax()) if rng.random() < 0.7 else int(rng.integers(5)) for t in tables]
    return [alone(t) for t in tables], [tuple(int(place == target) for place in range(5)) for target in targets]


def planted_pairs(count: int, seed: int):
    """Histories of two to four items, and lists of four in which the target has the largest first fact with the one item
    that the second fact is 1 for; with the others its first fact is noise."""
    rng = np.random.default_rng(seed)
    lists, gains = [], []
    for _ in range(count):
        size = int(rng.integers(2, 5))
        pairs = np.stack([rng.normal(size=(4, size)), np.zeros((4, size))], axis=2)
        pairs[:, (counts := int(rng.integers(size))), 1] = 1
        lists.append(Described(np.zeros((4, 1), np.float32), pairs.astype(np.float16)))
        gains.append(tuple(int(place == pairs[:, counts, 0].argmax()) for place in range(4)))
    return lists, gains


def test_the_prior_finds_a_planted_pattern():
    tables, targets = planted(300, 0)
    prior, steps, error = fit_prior(tables, targets, valid=planted(200, 1), steps=200, seed=3, **OPTIONS)
    new, truth = planted(200, 2)
    rows = log_prior(prior, new)
    right = np.mean([gains[np.argmax(row)] for row, gains in zip(rows, truth, strict=False)])
    assert right > 0.65 and 10 <= steps <= 200 and error < math.log(5) - 0.3
    assert all(math.fsum(map(math.exp, row)) == pytest.approx(1, abs=1e-5) for row in rows)
    again, _, _ = fit_prior(tables, targets, valid=planted(200, 1), steps=200, seed=3, **OPTIONS)
    assert log_prior(again, new) == rows


def test_the_prior_finds_which_item_of_the_history_counts():
    """Without knowing the item: the mean over 3 of them, 45 % right."""
    prior, _, _ = fit_prior(
        *planted_pairs(500, 0), valid=planted_pairs(200, 1), steps=400, seed=3, **{**OPTIONS, "hidden": 32}
    )
    new, truth = planted_pairs(200, 2)
    rows = log_prior(prior, new)
    assert np.mean([gains[np.argmax(row)] for row, gains in zip(rows, truth, strict=False)]) > 0.8
    short = min(new, key=lambda each: each.pairs.shape[1])  # beside longer histories, and by itself
    assert rows[[each is short for each in new].index(True)] == pytest.approx(log_prior(prior, [short])[0], abs=1e-5)


def test_several_fits_are_one_prior():
    lists, new = planted(100, 0), planted(50, 2)[0]
    valid = planted(60, 1)
    priors, steps, error = fit_priors(*lists, valid=valid, steps=[60, 40, 20], seed=3, **OPTIONS)
    alone = [log_prior(prior, new) for prior in priors]
    assert len(steps) == 3 and all(count <= most for count, most in zip(steps, [60, 40, 20], strict=True))
    assert not np.allclose(alone[0], alone[1], atol=1e-3)
    mean = np.mean(alone, axis=0)
    mean -= np.log(np.exp(mean).sum(axis=1, keepdims=True))
    assert np.allclose(log_prior(priors, new), mean, atol=1e-5)
    assert error == pytest.approx(cross_entropy(priors(pad(valid[0])), shares(valid[1])).item())


def test_padding_of_short_lists_takes_no_probability():
    tables, gains = planted(50, 0)
    short = [Described(*(part[:2] for part in each)) for each in tables[:25]] + tables[25:]
    prior, _, _ = fit_prior(short, [(1, 0)] * 25 + gains[25:], valid=None, steps=20, seed=3, **OPTIONS)
    rows = log_prior(prior, short)
    assert [len(row) for row in rows] == [2] * 25 + [5] * 25
    assert all(math.fsum(map(math.exp, row)) == pytest.approx(1, abs=1e-5) for row in rows)
    assert rows[0] == pytest.approx(log_prior(prior, [short[0]])[0], abs=1e-5)


def test_several_targets_are_asked_for_in_proportion():
    """Two facts make a candidate wanted, one of them twice as much: the likelihoods follow."""
    rng = np.random.default_rng(0)
    tables, gains = [], []
    for _ in range(300):
        kinds = rng.permutation([0, 1, 2, 2, 2])
        tables.append(alone(np.eye(3)[kinds]))
        gains.append(tuple(int((2, 1, 0)[kind]) for kind in kinds))
    prior, _, _ = fit_prior(tables, gains, valid=None, steps=300, seed=3, **OPTIONS)
    (row,) = log_prior(prior, [alone(np.eye(3)[[2, 1, 0]])])
    assert np.exp(row[1:]) == pytest.approx([1 / 3, 2 / 3], abs=0.03) and row[0] < -3
    by_hand = -(2 * math.log(0.5) + math.log(0.25)) / 3
    log_probs = torch.tensor([[0.25, 0.5, 0.25, 0.0]]).log()
    assert cross_entropy(log_probs, shares([(1, 2, 0, 0)])).item() == pytest.approx(by_hand)


def test_a_cross_fitted_list_does_not_know_its_own_target():
    tables, targets = planted(40, 0)
    before = cross_fit(tables, targets, folds=4, steps=[30, 20], seed=1, **OPTIONS)
    changed = list(targets)
    changed[7] = targets[7][1:] + targets[7][:1]
    after = cross_fit(tables, changed, folds=4, steps=[30, 20], seed=1, **OPTIONS)
    assert before[7] == after[7] and before != after
    assert len(before) == 40 and all(len(row) == 5 for row in before)


def test_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    fit_prior(*planted(20, 0), valid=None, steps=5, seed=1, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)


def test_order_by_prior():
    plain = request()
    assert plain.by_prior == plain.items == (3, 4, 5)
    assert replace(plain, prior=(-2.0, -1.0, -2.0)).by_prior == (4, 3, 5)
