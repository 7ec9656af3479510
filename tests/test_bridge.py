"""The RecBole adapter: rows in exact time order, base models, recommendations and RecBole's metrics."""

import contextlib
import copy
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import EXACT, MOVIE_USERS
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_gr2 import compat
from recbole_gr2.artifacts import read_recommendations, read_requests, write_recommendations, write_requests
from recbole_gr2.bridge.atomic import unquote
from recbole_gr2.bridge.data import SPLITS, Data, exact_time_dataset, read_item_texts
from recbole_gr2.bridge.evaluator import (
    RecboleCheck,
    check_invariants,
    collect,
    depth_of,
    evaluate_methods,
    from_lists,
    full_rows,
    joined,
    rank_items,
    recommend,
)
from recbole_gr2.bridge.item_text import clean_text
from recbole_gr2.bridge.models import UNREACHED, find_model, mask_seen
from recbole_gr2.bridge.training import BucketedLoss, load_model, train_model, train_or_load
from recbole_gr2.catalog import Catalog
from recbole_gr2.config import load_settings, recbole_config
from recbole_gr2.errors import ConfigurationError, DependencyError, GR2Error, MissingFileError
from recbole_gr2.quick_start import main
from recbole_gr2.ranking import promote
from recbole_gr2.stages import base_model, candidates, recommender
from recbole_gr2.stages.candidates import top_candidates
from recbole_gr2.types import Context, Recommendations

K = 10
BASES = ("CausalSASRec", "BPR")


@pytest.fixture(scope="module")
def raw(movies_folder) -> dict[str, list[str]]:
    """The data set `movies` as pandas reads it: user -> items by time, equal times in the order of the file."""
    frame = pd.read_csv(movies_folder / "movies" / "movies.inter", sep="\t", dtype=str)
    frame.columns = [column.split(":")[0] for column in frame.columns]
    frame["timestamp"] = frame["timestamp"].astype("int64")
    frame = frame.sort_values("timestamp", kind="stable")
    return {user: list(items) for user, items in frame.groupby("user_id")["item_id"]}


# --- rows ------------------------------------------------------------------------------------------------------------


def target_tokens(data: Data, dataset) -> dict[str, str]:
    """User -> target item of a built split, as tokens."""
    users, items = dataset.inter_feat[data.uid].tolist(), dataset.inter_feat[data.iid].tolist()
    return {data.user_tokens[u]: data.item_tokens[i] for u, i in zip(users, items, strict=True)}


@pytest.mark.slow
def test_sequences_are_in_exact_time_order(movies, raw):
    data = movies("CausalSASRec").data
    assert len(raw) == len(data.sequences) == MOVIE_USERS
    for user, items in data.sequences.items():
        assert [data.item_tokens[i] for i in items] == raw[data.user_tokens[user]]


def target_of(data, user, split):
    return next(iter(data.targets(user, split)), None)


@pytest.mark.parametrize(("split", "from_end"), [("test", 1), ("valid", 2), ("train", 3)])
def test_rows_targets_and_histories(movies, raw, split, from_end):
    data = movies("CausalSASRec").data
    rows, users = data.rows(split)
    assert sorted(users) == sorted(data.sequences)
    lists, lengths = rows["item_id_list"].tolist(), rows["item_length"].tolist()
    for user, target, cut, length in zip(users.tolist(), rows[data.iid].tolist(), lists, lengths, strict=True):
        items = raw[data.user_tokens[user]]
        assert data.item_tokens[target] == items[-from_end]
        assert target_of(data, user, split) == target
        history = [data.item_tokens[i] for i in data.history(user, split)]
        assert history == items[:-from_end]
        assert [data.item_tokens[i] for i in cut[:length]] == history[-50:]


def test_stock_recbole_has_the_trap_that_exact_time_avoids(movies, raw):
    from recbole.data.dataset import SequentialDataset

    data = movies("CausalSASRec").data
    assert data.config["normalize_all"] is False
    stock = target_tokens(data, SequentialDataset(data.config).build()[2])
    ours = target_tokens(data, data.built[2])
    assert sum(stock[user] != items[-1] for user, items in raw.items()) > 10
    assert sum(ours[user] != items[-1] for user, items in raw.items()) == 0


def test_general_models_get_the_same_rows(planted):
    one, other = (Data(toy_settings(planted, "planted", base_model=name)) for name in BASES)
    assert one.fingerprint == other.fingerprint
    for split in SPLITS:
        assert one.rows(split)[0][one.iid].tolist() == other.rows(split)[0][other.iid].tolist()


def test_train_sequences_hold_no_valid_or_test_item(movies):
    data = movies("CausalSASRec").data
    train = data.train_sequences()
    assert len(train) == MOVIE_USERS
    assert all(list(train[user]) == list(items[:-2]) for user, items in data.sequences.items())


def write_atomic(folder: Path, name: str, sequences: dict[str, list[str]], times=None) -> None:
    (folder / name).mkdir(parents=True)
    lines = [
        f"{user}\t{item}\t{times[user][n] if times else n}"
        for user, items in sequences.items()
        for n, item in enumerate(items)
    ]
    head = "user_id:token\titem_id:token\ttimestamp:float"
    (folder / name / f"{name}.inter").write_text("\n".join([head, *lines]) + "\n")
    tokens = sorted({item for items in sequences.values() for item in items})
    texts = [f"{token}\tThing {token}" for token in tokens]
    (folder / name / f"{name}.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *texts]) + "\n")


def toy_settings(folder: Path, name: str, **more):
    return load_settings(config_dict={"preset": "smoke", "dataset": name, "data_path": str(folder), **more})


def planted_sequences(users: int = 60, length: int = 9, items: int = 40) -> dict[str, list[str]]:
    """Item n is followed by n + 1."""
    rng = random.Random(0)
    starts = {f"u{user}": rng.randrange(items) for user in range(users)}
    return {user: [f"i{(start + step) % items}" for step in range(length)] for user, start in starts.items()}


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    write_atomic(folder, "planted", planted_sequences())
    return folder


def test_timestamps_that_float32_cannot_tell_apart(tmp_path):
    # 2014-07-18 and the seconds after it: float32 has steps of 128 s there.
    rng, second = random.Random(0), 1_405_641_600
    sequences = {f"u{u}": [f"i{i}" for i in rng.sample(range(40), 8)] for u in range(30)}
    times = {user: sorted(rng.choices(range(second, second + 60), k=8)) for user in sequences}
    write_atomic(tmp_path, "seconds", sequences, times)
    data = Data(toy_settings(tmp_path, "seconds"))
    for user, items in data.sequences.items():
        assert [data.item_tokens[i] for i in items] == sequences[data.user_tokens[user]]


def test_users_with_few_items(tmp_path):
    rng = random.Random(1)
    sequences = {f"u{u}": [f"i{i}" for i in rng.sample(range(30), (1, 2, 3, 4, 7)[u % 5])] for u in range(60)}
    write_atomic(tmp_path, "short", sequences)
    data = Data(toy_settings(tmp_path, "short"))
    base = train_or_load(data, tmp_path / "base", epochs=1)
    # A list needs a target and an item before it.
    for split, least in (("test", 2), ("valid", 3), ("train", 4)):
        requests = list(top_candidates(base, split, K))
        rows = {data.user_tokens[user] for user in data.rows(split)[1]}
        expected = {u for u, items in sequences.items() if len(items) >= least} & rows
        assert {request.user_token for request in requests} == expected
        assert len(expected) >= 24
        for request in requests:
            items, from_end = sequences[request.user_token], least - 1
            assert [data.item_tokens[i] for i in request.history] == items[:-from_end]
            assert data.item_tokens[request.target] == items[-from_end]
            assert not {data.item_tokens[i] for i in request.items} & set(items[:-from_end])
            assert len(request.items) == K
    for user in data.sequences:
        assert data.history(user, "train") == tuple(data.sequences[user][:-3])


# --- the invariants of the evaluation --------------------------------------------------------------------------------


def stock_trainer(trainer_class, config, model):
    """A trainer of RecBole, which writes logs to the current folder."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return trainer_class(config, model)


def stock_metrics(data: Data, base, mask: bool = False, split: str = "test") -> dict[str, float]:
    """RecBole's Trainer.evaluate on its loader of a split. With `mask`, a plain loop sets seen items to -inf."""
    from recbole.data.utils import get_dataloader
    from recbole.trainer import Trainer

    class Masked(Trainer):
        def _full_sort_batch_eval(self, batched_data):
            interaction, scores, rows, items = super()._full_sort_batch_eval(batched_data)
            for row, user in enumerate(interaction[data.uid].tolist()):
                scores[row, data.sequences[user][: {"valid": -2, "test": -1}[split]].tolist()] = -torch.inf
            return interaction, scores, rows, items

    built = data.built[SPLITS.index(split)]
    loader = get_dataloader(data.config, split)(data.config, built, None, shuffle=False)
    trainer = stock_trainer(Masked if mask else Trainer, data.config, base.model)
    trainer.eval_collector.data_collect(SimpleNamespace(dataset=data.built[0]))
    return {name: float(value) for name, value in trainer.evaluate(loader, load_best_model=False).items()}


def score(base, split: str = "test") -> Recommendations:
    """Score the users of a split once."""
    batches = recommend(base, split, depth_of(base.data), break_ties=False, check=True)
    scored = joined(batches, len(base.data.rows(split)[0]))
    return collect(base.data, scored, exclude_seen=base.exclude_seen)


@pytest.fixture(scope="module")
def recommendations_of():
    """recommendations_of(base): the result of `score`, computed once per model of this module."""
    results = {}

    def stored(base) -> Recommendations:
        if id(base) not in results:
            results[id(base)] = base, score(base)  # The reference keeps the id in use.
        return results[id(base)][1]

    return stored


@pytest.fixture(scope="module")
def evaluated(recommendations_of):
    """evaluated(base, rankings, users): RecBole's metrics of one method for one group of users."""

    def evaluate(base, rankings=None, users=None) -> dict[str, float]:
        return evaluate_methods(base.data, recommendations_of(base), {"m": rankings}, {"s": users})["m"]["s"]

    return evaluate


def lists_of(base, split: str = "test") -> dict[str, tuple[int, ...]]:
    return {request.user_token: request.items for request in top_candidates(base, split, K)}


def test_targets(data: Data) -> dict[str, int]:
    return {data.user_tokens[user]: target_of(data, user, "test") for user in data.sequences}


test_targets.__test__ = False


def base_of(trained, mask: bool):
    return trained.masked if mask else trained.open


def at_most_10(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics that depend on the first ten items alone."""
    return {name: value for name, value in metrics.items() if name != "gauc" and not name.endswith("@20")}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_identity_is_recboles_own_evaluation(movies, name, mask, split, monkeypatch):
    """On all 12 metric families and cut-offs up to 20, although a list has ten candidates."""
    base = base_of(movies(name), mask)
    predict = base.model.full_sort_predict

    def distinct(rows):
        """Ranks instead of scores. Rounding can make two scores equal, whose order depends on the largest cut-off."""
        scores = predict(rows)
        return scores.view(-1, base.data.item_count + 1).argsort(dim=1).argsort(dim=1).float().view_as(scores)

    monkeypatch.setattr(base.model, "full_sort_predict", distinct)
    stock = stock_metrics(base.data, base, mask, split)
    assert len(stock) > 40 and "gauc" in stock and "tailpercentage@20" in stock
    recommendations = score(base, split)
    lists = lists_of(base, split)
    assert len(lists) == MOVIE_USERS
    for rankings in (None, lists):
        found = evaluate_methods(base.data, recommendations, {"m": rankings}, {"s": None}, split=split)
        assert found["m"]["s"] == stock


@pytest.mark.slow
def test_identity_is_recboles_own_evaluation_on_ml100k(tmp_path):
    data = Data(load_settings(config_dict=EXACT))
    base = train_or_load(data, tmp_path / "base")
    stock = stock_metrics(data, base, mask=True)
    recommendations = score(replace(base, exclude_seen=True))
    assert len(recommendations.users) == 943
    assert evaluate_methods(data, recommendations, {"m": None}, {"s": None})["m"]["s"] == stock


def test_the_mask_is_that_of_recboles_general_protocol(movies, evaluated):
    """RecBole masks the history for general models. The mask of the plugin gives the same metrics."""
    from recbole.data.utils import create_samplers, get_dataloader
    from recbole.trainer import Trainer

    trained = movies("BPR")
    config = recbole_config(trained.settings, "BPR", repeatable=False)
    dataset = exact_time_dataset(sequential=False)(config)
    built = dataset.build()
    sampler = create_samplers(config, dataset, built)[2]
    loader = get_dataloader(config, "test")(config, built[2], sampler, shuffle=False)
    trainer = stock_trainer(Trainer, config, trained.open.model)
    trainer.eval_collector.data_collect(SimpleNamespace(dataset=trained.data.built[0]))
    stock = {k: float(v) for k, v in trainer.evaluate(loader, load_best_model=False).items()}
    metrics = evaluated(trained.masked)
    for metric in stock:  # RecBole sums the users in another order.
        assert metrics[metric] == pytest.approx(stock[metric], abs=1e-6), metric
    assert stock != evaluated(trained.open)


@pytest.mark.parametrize("name", BASES)
def test_recall_at_k_does_not_change_and_recall_at_1_does(movies, name, recommendations_of):
    base = movies(name).masked
    lists = lists_of(base)
    shuffled = {}
    for seed in range(3):
        rng = random.Random(seed)
        shuffled[str(seed)] = {user: tuple(rng.sample(items, K)) for user, items in lists.items()}
    rankings = {"base": None, **shuffled}
    metrics = evaluate_methods(base.data, recommendations_of(base), rankings, {"all_users": None})
    check_invariants(metrics, K)
    before = metrics["base"]["all_users"]
    for seed in shuffled:
        after = metrics[seed]["all_users"]
        for metric in (f"recall@{K}", "recall@20", f"hit@{K}", f"precision@{K}", f"itemcoverage@{K}", "giniindex@20"):
            assert after[metric] == before[metric], metric
        assert after["ndcg@5"] != before["ndcg@5"] and after["gauc"] != before["gauc"]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
def test_oracle_ndcg_is_the_base_models_recall(movies, name, mask, recommendations_of):
    base = base_of(movies(name), mask)
    targets = test_targets(base.data)
    oracle = {user: promote(items, targets[user]) for user, items in lists_of(base).items() if targets[user] in items}
    scopes = {"all_users": None, "hit_users": set(oracle)}
    metrics = evaluate_methods(base.data, recommendations_of(base), {"base": None, "oracle": oracle}, scopes)
    check_invariants(metrics, K)
    recall = metrics["base"]["all_users"][f"recall@{K}"]
    values = metrics["oracle"]["all_users"]
    for k in (1, 5, K):
        assert values[f"ndcg@{k}"] == values[f"recall@{k}"] == values[f"mrr@{k}"] == recall > 0
    assert values["recall@20"] == metrics["base"]["all_users"]["recall@20"]
    assert metrics["oracle"]["hit_users"]["ndcg@1"] == metrics["base"]["hit_users"][f"recall@{K}"] == 1.0


def test_broken_invariants_are_errors():
    base = {"recall@5": 0.4, "recall@10": 0.5, "recall@20": 0.6, "ndcg@10": 0.3}
    oracle = {**base, "recall@5": 0.5, "ndcg@10": 0.5}
    whole = {"base": {"all_users": base}, "oracle": {"all_users": oracle}}
    check_invariants(whole, 10)
    check_invariants(whole, 10, {"all_users": 0.50004})
    check_invariants(whole, 10, {"all_users": 0.504}, decimals=2)
    with pytest.raises(GR2Error, match="recall@10 of base is 0.5, but 0.502 of the lists"):
        check_invariants(whole, 10, {"all_users": 0.502})
    short = {name: {"all_users": {"ndcg@3": 0.5, "recall@20": 0.6}} for name in whole}
    check_invariants(short, 10)
    with pytest.raises(GR2Error, match="ndcg@3 of oracle is 0.5, but 0.4 of the lists"):  # topk does not contain K
        check_invariants(short, 10, {"all_users": 0.4})
    with pytest.raises(GR2Error, match="changed recall@20 from 0.6 to 0.7"):
        check_invariants({"base": {"all_users": base}, "rl": {"all_users": {**base, "recall@20": 0.7}}}, 10)
    with pytest.raises(GR2Error, match="ndcg@10 of oracle is 0.3"):
        check_invariants({"base": {"all_users": base}, "oracle": {"all_users": {**oracle, "ndcg@10": 0.3}}}, 10)


def test_recall_against_a_count_by_hand(movies, recommendations_of):
    base = movies("BPR").masked
    targets = test_targets(base.data)
    hits = {user for user, items in lists_of(base).items() if targets[user] in items}
    scopes = {"all_users": None, "hit_users": hits, "others": set(targets) - hits}
    metrics = evaluate_methods(base.data, recommendations_of(base), {"base": None}, scopes)["base"]
    assert metrics["all_users"][f"recall@{K}"] == pytest.approx(len(hits) / MOVIE_USERS, abs=1e-12)
    assert metrics["hit_users"][f"recall@{K}"] == 1.0 and metrics["others"][f"recall@{K}"] == 0.0


def test_a_scope_without_users_is_an_error(movies, evaluated):
    base = movies("BPR").masked
    with pytest.raises(GR2Error, match="group of users") as error:
        evaluated(base, users=set())
    assert error.value.do


def test_a_ranking_of_other_items_is_an_error(movies, evaluated):
    trained = movies("BPR")
    user, items = next(iter(lists_of(trained.masked).items()))
    for wrong in ((*items[:-1], items[0]), (*items[:-1], 0)):
        with pytest.raises(GR2Error, match="no permutation"):
            evaluated(trained.masked, {user: wrong})
    with pytest.raises(GR2Error, match="no permutation"):
        evaluated(trained.open, {user: items})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BPR", "Pop", "ItemKNN"])
@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
def test_base_models_with_tied_scores_keep_their_order(movies, name, mask, evaluated):
    """RecBole's metrics up to its default cut-off 10 are equal, although `torch.topk` breaks ties as it likes.

    RecBole's GAUC gives tied items their mean rank, and the rebuilt rows have no ties.
    """
    base = base_of(movies(name), mask)
    config = copy.copy(base.data.config)
    config.final_config_dict = {**config.final_config_dict, "topk": [1, 5, 10]}
    direct = SimpleNamespace(config=config, built=base.data.built, uid=base.data.uid, sequences=base.data.sequences)
    stock = at_most_10(stock_metrics(direct, base, mask))
    assert len(stock) == 11 * 3
    assert at_most_10(evaluated(base)) == at_most_10(evaluated(base, lists_of(base))) == stock


def test_ties_behind_the_tenth_place_are_in_order_of_ids(movies):
    base = movies("Pop").masked
    ties = 0
    for batch in recommend(base, "test", depth_of(base.data), break_ties=False):
        for items, scores in zip(batch.items[:, K:], batch.scores[:, K:], strict=True):
            pairs = list(zip((-scores).tolist(), items.tolist(), strict=True))
            assert pairs == sorted(pairs)
            ties += len(pairs) - len(set(scores.tolist()))
    assert ties > 10_000


def test_the_first_items_do_not_depend_on_the_depth(movies):
    base = movies("Pop").masked
    (deep,) = recommend(base, "test", depth_of(base.data), break_ties=False)
    for depth in (1, 5, K, 11, 50):
        (batch,) = recommend(base, "test", depth, break_ties=False)
        assert np.array_equal(batch.items, deep.items[:, :depth])
        assert np.array_equal(batch.scores, deep.scores[:, :depth])


def test_a_wrong_order_is_not_stored(movies):
    """The check of the scoring pass notices a wrong rank, and items in a wrong order."""
    base = movies("BPR").masked
    (scored,) = base.batches("test")
    rows, scores = scored.rows, scored.scores
    targets = rows[base.data.iid]
    (batch,) = recommend(base, "test", depth_of(base.data), break_ties=False)
    check = RecboleCheck(base)
    check.add(batch, scores, targets)
    check.finish()
    for wrong in (batch.target_rank + 1, batch.target_rank - 1):
        with pytest.raises(GR2Error, match="rank of a target") as error:
            RecboleCheck(base).add(batch._replace(target_rank=wrong), scores, targets)
        assert "BPR" in error.value.where
    check = RecboleCheck(base)
    check.add(batch._replace(items=np.roll(batch.items, 1, axis=1)), scores, targets)
    with pytest.raises(GR2Error, match="RecBole's metrics"):
        check.finish()


values_of_scores = st.sampled_from([-torch.inf, UNREACHED, 0.0, 0.5, 1.0, 2.0, 3.0])


@st.composite
def scored_rows(draw):
    """Scores (B, N + 1) with ties, masked and unreached items, and targets."""
    width, count = draw(st.integers(4, 30)), draw(st.integers(1, 4))
    row = st.lists(values_of_scores, min_size=width, max_size=width)
    scores = torch.tensor([draw(row) for _ in range(count)], dtype=torch.float64)
    scores[:, 0] = -torch.inf
    targets = torch.tensor([draw(st.integers(1, width - 1)) for _ in range(count)])
    return scores, targets, draw(st.integers(2, width - 1))


@settings(deadline=None, max_examples=100)
@given(scored_rows())
def test_full_rows(drawn):
    """The rebuilt row is the complete ranking: listed items, then ids in order, and the target at its exact rank."""
    scores, targets, depth = drawn
    items, values, ranks = rank_items(scores, targets, depth)
    rows = full_rows(items, targets, ranks, scores == -torch.inf)
    first = torch.topk(scores, min(10, scores.size(1))).indices
    for number, row in enumerate(scores.tolist()):
        target, proposed = int(targets[number]), [item for item, score in enumerate(row) if score > UNREACHED]
        head = [item for item in first[number].tolist() if item in proposed]
        expected = head + sorted(set(proposed) - set(head), key=lambda item: (-row[item], item))
        listed = [item for item in items[number].tolist() if item]
        assert listed == expected[:depth]
        assert [row[item] for item in listed] == values[number].tolist()[: len(listed)]
        assert int(ranks[number]) == (expected.index(target) + 1 if target in proposed else 0)
        free = [item for item, score in enumerate(row) if score > -torch.inf]
        rest = [item for item in free if item not in listed and item != target]
        if target in free and target not in listed:
            rest.insert((int(ranks[number]) or len(free)) - 1 - len(listed), target)
        assert rows[number].argsort(descending=True).tolist()[: len(free)] == listed + rest
        assert sorted(rows[number].tolist(), reverse=True)[: len(free)] == [-1.0 - i for i in range(len(free))]
        assert (rows[number] > -torch.inf).sum() == len(free)


@settings(deadline=None, max_examples=100)
@given(scored_rows(), st.integers(1, 29))
def test_a_target_outside_the_list_is_never_a_hit(drawn, cutoff):
    """However short the list is, and however few items are not masked."""
    scores, targets, depth = drawn
    cutoff = min(cutoff, scores.size(1) - 1)
    items, _, ranks = rank_items(scores, targets, depth)
    listed = (items == targets.unsqueeze(1)).any(1)
    ranks = torch.where(listed, ranks, 0)
    rows = full_rows(items, targets, ranks, scores == -torch.inf, cutoff)
    hits = (torch.topk(rows, cutoff).indices == targets.unsqueeze(1)).any(1)
    assert torch.equal(hits, listed & (ranks <= cutoff))


def test_batches_do_not_change_anything(movies, monkeypatch, recommendations_of, evaluated):
    base = movies("CausalSASRec").masked
    lists = {user: items[::-1] for user, items in lists_of(base).items()}
    whole, metrics = recommendations_of(base), evaluated(base, lists)
    monkeypatch.setitem(base.data.config.final_config_dict, "eval_batch_size", 100)
    assert len(list(base.scores("test"))) == 2
    parts = score(base)
    assert parts.users == whole.users and np.array_equal(parts.target_rank, whole.target_rank)
    assert np.array_equal(parts.items, whole.items) and evaluated(base, lists) == metrics


def test_cut_offs_above_the_stored_depth(movies, recommendations_of):
    base = movies("BPR").masked
    recommendations, config = recommendations_of(base), copy.copy(base.data.config)
    assert recommendations.items.shape == (MOVIE_USERS, 200)
    config.final_config_dict = {**config.final_config_dict, "topk": [200], "metrics": ["Recall"]}
    (recall,) = evaluate_methods(base.data, recommendations, {"m": None}, {"s": None}, config)["m"]["s"].values()
    ranks = recommendations.target_rank
    assert recall == pytest.approx(np.mean((ranks > 0) & (ranks <= 200))) and ranks.max() > 1000
    config.final_config_dict["topk"] = [10, 201]
    with pytest.raises(ConfigurationError, match="topk contains 201, but 200 items") as error:
        evaluate_methods(base.data, recommendations, {"m": None}, {"s": None}, config)
    assert error.value.where == "topk" and "at most 200" in error.value.do


def test_unreached_is_the_score_of_the_beam_search():
    from recbole_gr2.llm import beam

    assert beam.UNREACHED == UNREACHED == float(np.float32(UNREACHED))


# --- seen items ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_mask_covers_whole_histories(movies, raw, split):
    trained = movies("CausalSASRec")
    data, from_end = trained.data, {"test": 1, "valid": 2, "train": 3}[split]
    long = 0
    for users, scores in trained.masked.scores(split):
        for user, row in zip(users.tolist(), scores, strict=True):
            hidden = {data.item_tokens[i] for i in torch.nonzero(row == -torch.inf).flatten().tolist()}
            assert hidden == {"[PAD]", *raw[data.user_tokens[user]][:-from_end]}
            long += len(raw[data.user_tokens[user]]) > 60
    assert long > 50  # RecBole's own list is cut to 50 items
    for users, scores in trained.open.scores(split):
        assert torch.equal((scores == -torch.inf).sum(1), torch.ones(len(users), dtype=torch.long))


def test_mask_seen_touches_nothing_else():
    scores = torch.zeros(2, 5)
    mask_seen(scores, [(2, 3), ()])
    assert scores.tolist() == [[0, 0, -torch.inf, -torch.inf, 0], [0, 0, 0, 0, 0]]


# --- training --------------------------------------------------------------------------------------------------------


def capture_training(monkeypatch) -> list:
    """The data sets that RecBole's training loaders are built on."""
    import recbole.data.utils as utils

    captured, real = [], utils.get_dataloader

    def spy(config, phase):
        loader = real(config, phase)

        def build(config, dataset, *args, **kwargs):
            if phase == "train":
                captured.append(dataset)
            return loader(config, dataset, *args, **kwargs)

        return build

    monkeypatch.setattr(utils, "get_dataloader", spy)
    return captured


@pytest.mark.parametrize("name", [*BASES, "SASRec"])
def test_what_each_base_is_trained_on(movies, name, monkeypatch, tmp_path):
    data = movies(name if name in BASES else "CausalSASRec").data
    if name == "SASRec":  # RecBole's rows, one per prefix
        data = copy.copy(data)
        data.settings = load_settings(config_dict={"preset": "smoke", "base_model": name})
    captured = capture_training(monkeypatch)
    monkeypatch.setattr("recbole.trainer.Trainer.fit", stop_training)
    for hold_out, last in ((False, 2), (True, 3)):
        with pytest.raises(StopTraining):
            train_model(data, tmp_path / str(hold_out), hold_out=hold_out, epochs=1)
        feat = captured[-1].inter_feat
        seen: dict[int, set] = {user: set() for user in data.sequences}
        lists = feat["item_id_list"].tolist() if "item_id_list" in feat else [[]] * len(feat)
        for user, target, past in zip(feat[data.uid].tolist(), feat[data.iid].tolist(), lists, strict=True):
            seen[user] |= {target, *past} - {0}
        for user, items in data.sequences.items():
            assert seen[user] == set(items[:-last].tolist())
    assert len(captured) == 2


class StopTraining(BaseException):
    """Ends a training that a test does not need. The package reports an Exception as an error of the model."""


def stop_training(*args, **kwargs):
    raise StopTraining


@pytest.mark.parametrize("name", ["BPR", "LightGCN", "SASRec", "ItemKNN"])
def test_a_finished_base_is_loaded_and_scores_the_same(planted, tmp_path, monkeypatch, name):
    data = Data(toy_settings(planted, "planted", base_model=name, cand_exclude_seen=False))
    first = train_or_load(data, tmp_path / "base", hold_out=True, epochs=1)
    monkeypatch.setattr("recbole.trainer.Trainer.fit", stop_training)
    monkeypatch.setattr("recbole.data.utils.create_samplers", stop_training)
    monkeypatch.setattr("recbole.data.utils.get_dataloader", stop_training)
    again = train_or_load(data, tmp_path / "base", hold_out=True, epochs=1)
    assert again.metadata == first.metadata and first.metadata["hold_out"] is True
    assert first.exclude_seen is data.settings["cand_exclude_seen"] is False
    assert load_model(data, tmp_path / "base", exclude_seen=True).exclude_seen is True
    ((_, one),) = first.scores("valid")
    ((_, other),) = again.scores("valid")
    assert torch.equal(one, other)


def test_a_model_without_metadata_is_not_finished(planted, tmp_path):
    data = Data(toy_settings(planted, "planted"))
    train_model(data, tmp_path, model="Pop", base=False, epochs=1)
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(MissingFileError, match="not been trained"):
        load_model(data, tmp_path, model="Pop", base=False)
    assert train_or_load(data, tmp_path, model="Pop", base=False, epochs=1).metadata["model"] == "Pop"


def test_the_hold_out_base_differs_from_the_base(movies, tmp_path):
    trained = movies("BPR")
    hold_out = train_model(trained.data, tmp_path / "base", hold_out=True, epochs=1)
    assert hold_out["training_rows"] == trained.open.metadata["training_rows"] - MOVIE_USERS


def test_negatives_of_a_general_base_are_never_the_users_own_items(movies, tmp_path, monkeypatch):
    data, drawn = movies("BPR").data, []

    def look(trainer, loader, *args, **kwargs):
        for batch in loader:
            drawn.extend(zip(batch[data.uid].tolist(), batch[f"neg_{data.iid}"].tolist(), strict=True))
        raise StopTraining

    monkeypatch.setattr("recbole.trainer.Trainer.fit", look)
    with pytest.raises(StopTraining):
        train_model(data, tmp_path, epochs=1)
    trained = {user: set(items.tolist()) for user, items in data.train_sequences().items()}
    assert len(drawn) == sum(map(len, trained.values()))
    assert not [pair for pair in drawn if pair[1] in trained[pair[0]]]


@pytest.mark.parametrize(
    ("name", "text"), [("Nobody", "no model named 'Nobody'"), ("FM", "FM is a context-aware model")]
)
def test_models_that_cannot_be_a_base(name, text):
    with pytest.raises(ConfigurationError, match=text):
        load_settings(config_dict={"preset": "smoke", "base_model": name})


# --- SASRec on whole sequences ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 23), min_size=1, max_size=6), st.integers(1, 7))
def test_training_rows_cover_every_target_once(lengths, length):
    rows = [(user, end) for user, count in enumerate(lengths, start=1) for end in range(1, count)]
    config = {"USER_ID_FIELD": "user_id", "MAX_ITEM_LIST_LENGTH": length}
    chosen = find_model("CausalSASRec").training_rows({"user_id": torch.tensor([user for user, _ in rows])}, config)
    covered = []
    for user, end in (rows[row] for row in chosen):
        first = max(0, end - length)  # the row's list is items[first:end], its target items[end]
        covered += [(user, position) for position in range(first + 1, end + 1)]
    assert sorted(covered) == sorted(rows) and len(set(chosen.tolist())) == len(chosen)


def toy_interaction(model, sequences):
    from recbole.data.interaction import Interaction

    width = 50
    lists = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, items in enumerate(sequences):
        lists[row, : len(items) - 1] = torch.tensor(items[:-1])
    return Interaction(
        {
            model.ITEM_SEQ: lists,
            model.ITEM_SEQ_LEN: torch.tensor([len(items) - 1 for items in sequences]),
            model.POS_ITEM_ID: torch.tensor([items[-1] for items in sequences]),
        }
    )


def toy_sequences(seed: int, count: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(1, 1400) for _ in range(rng.choice([2, 3, 5, 20, 51]))] for _ in range(count)]


def test_loss_is_the_mean_over_all_prefixes(movies, monkeypatch):
    model = movies("CausalSASRec").open.model.eval()  # no dropout
    monkeypatch.setattr(model, "bf16", False)
    sequences = toy_sequences(0)
    with torch.no_grad():
        loss = model.calculate_loss(toy_interaction(model, sequences))
        losses = []
        for items in sequences:
            for end in range(1, len(items)):
                past = torch.zeros(1, 50, dtype=torch.long)
                past[0, :end] = torch.tensor(items[:end])
                logits = model.forward(past, torch.tensor([end])) @ model.item_embedding.weight.T
                losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([items[end]])))
    assert len(losses) > 300
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_hidden_states_and_predictions_are_recboles(movies):
    from recbole.model.sequential_recommender.sasrec import SASRec

    trained = movies("CausalSASRec")
    model = trained.open.model.eval()
    stock = SASRec(recbole_config(trained.settings, find_model("CausalSASRec")), trained.data.built[0]).eval()
    stock.load_state_dict(model.state_dict())
    interaction = toy_interaction(model, toy_sequences(1))
    with torch.no_grad():
        ours, theirs = model.full_sort_predict(interaction), stock.full_sort_predict(interaction)
        assert torch.allclose(ours, theirs, atol=1e-6)
        lengths, order = interaction[model.ITEM_SEQ_LEN].sort()
        items = interaction[model.ITEM_SEQ][order]
        last = model.encode(items, lengths)[lengths.cumsum(0) - 1]
        assert torch.allclose(last, stock.forward(items, lengths), atol=1e-6)


@pytest.mark.parametrize("positions", [1, 127, 128, 300])
def test_catalogue_cross_entropy_is_torchs(positions):
    from recbole_gr2.model.causal_sasrec import CatalogueCrossEntropy

    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 8, generator=generator, dtype=torch.double, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, dtype=torch.double, requires_grad=True)
    targets = torch.randint(50, (positions,), generator=generator)
    ours = CatalogueCrossEntropy.apply(hidden, weight, targets)
    theirs = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    assert torch.allclose(ours, theirs, atol=1e-12)
    gradients = [torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    floats = [value.detach().float().requires_grad_() for value in (hidden, weight)]
    rounded = CatalogueCrossEntropy.apply(*floats, targets, True)
    assert rounded.item() == pytest.approx(theirs.item(), rel=0.01)
    for one, other in zip(torch.autograd.grad(3 * rounded, floats), gradients[1], strict=True):
        assert 0 < (one - other).norm() < 0.01 * other.norm()


# --- item texts ------------------------------------------------------------------------------------------------------

TEXT = {
    "dataset": "toy",
    "text_title": "title",
    "text_categories": "categories",
    "text_brand": None,
    "text_description": None,
}


def item_file(folder: Path, *lines: str, header: str = "item_id:token\ttitle:token_seq\tcategories:token_seq") -> Path:
    file = folder / "toy.item"
    file.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return file


def test_item_texts(tmp_path):
    file = item_file(
        tmp_path,
        "a\tNails &amp; more\t['Beauty', 'Skin Care']",
        'b\t"5 Minute" Mask\t[[\'Beauty\', "Men\'s"]]',
        'c\t"""Quoted"" title, all of it"\t\'Beauty\', \'Skin Care\'',
        'd\t"Unclosed title\tBeauty > Makeup',
        "e\tNA\tNone",
        "f\t  two   blanks &#39;n  entities\t",
        "g\t'Salem's Lot'\t[not a list]",
        "1\tTitle été\tx",
    )
    texts = read_item_texts(file, TEXT)
    assert {token: (text["title"], text["categories"]) for token, text in texts.items()} == {
        "a": ("Nails & more", "Beauty > Skin Care"),
        "b": ('"5 Minute" Mask', "Beauty > Men's"),
        "c": ('"Quoted" title, all of it', "Beauty > Skin Care"),
        "d": ('"Unclosed title', "Beauty > Makeup"),
        "e": ("NA", "None"),
        "f": ("two blanks 'n entities", ""),
        "g": ("'Salem's Lot'", "[not a list]"),
        "1": ("Title été", "x"),
    }
    assert {text["brand"] + text["description"] for text in texts.values()} == {""}


def test_item_text_errors(tmp_path):
    with pytest.raises(MissingFileError, match="no item texts") as error:
        read_item_texts(tmp_path / "toy.item", TEXT)
    assert "toy.item" in error.value.where and ".item" in error.value.do
    file = item_file(tmp_path, "a\tA\tB")
    with pytest.raises(ConfigurationError, match="text_title: name, text_brand: maker") as error:
        read_item_texts(file, {**TEXT, "text_title": "name", "text_brand": "maker"})
    assert "['item_id', 'title', 'categories']" in error.value.do


def test_unquote_and_clean_text():
    assert unquote('"') == '"' and unquote('""') == "" and unquote('say "hi"') == 'say "hi"'
    assert clean_text("[]") == "" and clean_text("'one'") == "one" and clean_text("[['a'], ['b']]") == "a"


def test_items_of_movies(movies, raw):
    data = movies("BPR").data
    assert len(data.items) == data.item_count == len({token for items in raw.values() for token in items})
    toy_story = next(item for item in data.items if item.token == "1")
    assert (toy_story.title, toy_story.item_id) == ("Toy Story", data.item_tokens.index("1"))
    assert all(item.title and item.item_id == number for number, item in enumerate(data.items, start=1))


@pytest.mark.parametrize("text", ["title", "categories", "brand", "description"])
def test_every_text_is_in_the_fingerprint(movies, text):
    data, other = (copy.copy(movies("BPR").data) for _ in range(2))
    data.__dict__.pop("fingerprint", None)
    other.__dict__.pop("fingerprint", None)
    other.__dict__["catalog"] = Catalog((*data.catalog[:-1], replace(data.catalog[-1], **{text: "another"})))
    assert data.fingerprint == movies("BPR").data.fingerprint != other.fingerprint


# --- what is not there -----------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """RecBole's download without a network, after it has made the folder."""

    def fail(url, folder):
        raise URLError("no network")

    monkeypatch.setattr("recbole.data.dataset.dataset.decide_download", lambda url: True)
    monkeypatch.setattr("recbole.data.dataset.dataset.download_url", fail)


def test_a_failed_download_says_what_to_put_where(offline, tmp_path, capsys):
    argv = ["--preset=smoke", "--dataset=amazon-beauty", f"--data_path={tmp_path / 'data'}", "--dry_run"]
    assert main(argv) == 4
    shown = capsys.readouterr().err
    assert "no network" in shown and "amazon-beauty.inter" in shown and "--data_path DIR" in shown
    assert str(tmp_path / "data" / "amazon-beauty") in shown
    assert not (tmp_path / "data" / "amazon-beauty").exists()  # it would pass for the data set next time


def test_a_download_that_works_is_not_stopped_by_the_barrier(offline, tmp_path, monkeypatch):
    import zipfile

    rng = random.Random(0)
    write_atomic(tmp_path / "source", "x", {f"u{u}": [f"i{i}" for i in rng.sample(range(20), 8)] for u in range(20)})

    def deliver(url, folder):
        path = Path(folder) / "ml-1m.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for ending in ("inter", "item"):
                archive.write(tmp_path / "source" / "x" / f"x.{ending}", f"ml-1m.{ending}")
        return str(path)

    monkeypatch.setattr("recbole.data.dataset.dataset.download_url", deliver)
    data = Data(toy_settings(tmp_path / "data", "ml-1m"))
    assert len(data.sequences) == 20 and data.items[0].title.startswith("Thing i")


def test_a_folder_without_interactions(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["--preset=smoke", "--dataset=empty", f"--data_path={tmp_path}", "--dry_run"]) == 4
    assert "has no empty.inter" in capsys.readouterr().err


def test_other_protocols_are_refused(tmp_path, capsys):
    split = "--eval_args={split: {RS: [0.8, 0.1, 0.1]}, order: RO, mode: full}"
    assert main(["--preset=smoke", split, "--dry_run", f"--checkpoint_dir={tmp_path}"]) == 2
    assert "leave-one-out" in capsys.readouterr().err


# --- RecBole beside current libraries --------------------------------------------------------------------------------


def test_anomaly_detection_stays_off():
    compat.apply()
    assert "recbole.model.sequential_recommender.sine" in sys.modules  # it turns it on when it is imported
    assert not torch.is_anomaly_enabled()


def test_apply_twice_changes_nothing():
    from recbole.evaluator.collector import Collector

    compat.apply()
    patched = Collector.get_data_struct
    compat.apply()
    assert Collector.get_data_struct is patched


def test_pandas_3_is_refused(monkeypatch):
    monkeypatch.setattr(pd, "__version__", "3.0.1")
    with pytest.raises(DependencyError, match="pandas 3.0.1") as error:
        compat.apply()
    assert error.value.exit_code == 3 and "pandas>=2.1.1,<3" in error.value.do


def test_importing_the_package_leaves_torch_load_safe():
    import os

    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ


# --- imported lists --------------------------------------------------------------------------------------------------


def test_imported_lists_rank_as_the_model_does(movies, evaluated):
    base = movies("BPR").masked
    recommendations = from_lists(base.data, list(top_candidates(base, "test", 20)))
    imported = evaluate_methods(base.data, recommendations, {"m": None}, {"s": None})["m"]["s"]
    metrics = evaluated(base)
    assert {m: v for m, v in imported.items() if m != "gauc"} == {m: v for m, v in metrics.items() if m != "gauc"}


@pytest.mark.parametrize("length", [2, 6])
def test_short_lists_contain_all_hits(movies, length):
    """Metrics at 10 and 20 count the targets in the lists, not items that fill the places after them."""
    base = movies("BPR").masked
    requests = list(top_candidates(base, "test", length))
    hits = [request.target in request.items for request in requests]
    recommendations = from_lists(base.data, requests)
    rankings = {
        "base": None,
        "oracle": {r.user_token: promote(r.items, r.target) for r in requests if r.target in r.items},
    }
    metrics = evaluate_methods(base.data, recommendations, rankings, {"all_users": None})
    check_invariants(metrics, 10)
    for k in (10, 20):
        assert metrics["base"]["all_users"][f"recall@{k}"] == pytest.approx(np.mean(hits), abs=1e-12) and any(hits)
    assert metrics["oracle"]["all_users"]["ndcg@1"] == pytest.approx(np.mean(hits), abs=1e-12)


def test_recommendations_are_read_as_they_were_written(movies, tmp_path, recommendations_of):
    recommendations = recommendations_of(movies("BPR").masked)
    write_recommendations(tmp_path, recommendations)
    again = read_recommendations(tmp_path)
    assert again.users == recommendations.users and again.exclude_seen is True
    assert np.array_equal(again.items, recommendations.items) and again.items.dtype == np.int32
    assert np.array_equal(again.target_rank, recommendations.target_rank)
    assert [file.name for file in tmp_path.iterdir()] == ["recommendations.npz"]


# --- the stages ------------------------------------------------------------------------------------------------------


def stage_context(name: str, data: Data, folder: Path, **folders: Path) -> Context:
    (folder / name).mkdir()
    return Context(
        stage=name, settings=data.settings, data=data, folder=folder / name, inputs={}, folders=folders, say=print
    )


def run_stages(root: Path, folder: Path, **options) -> tuple[Data, dict, dict]:
    data = Data(toy_settings(folder, "planted", base_model="BPR", base_epochs=2, **options))
    (stage,) = base_model.stages(data.settings)
    base = stage.run(stage_context(stage.name, data, root))
    summary = candidates.run(stage_context("candidates", data, root, **{stage.name: root / stage.name}))
    return data, base, summary


def test_stages_base_model_and_candidates(planted, tmp_path, monkeypatch):
    data, base, summary = run_stages(tmp_path, planted)
    assert base["base"]["training_rows"] == 60 * 7 and base["hold_out"]["training_rows"] == 60 * 6
    assert base["hold_out"]["epochs"] == base["base"]["epochs"] and "best_valid" not in base["hold_out"]
    folder = tmp_path / "candidates"
    assert {file.name for file in folder.iterdir()} == {
        *(f"{split}.jsonl" for split in SPLITS),
        "recommendations.npz",
        "stats.json",
    }
    lists = {split: read_requests(folder / f"{split}.jsonl", data.catalog) for split in SPLITS}
    for split, requests in lists.items():
        assert {r.user_token for r in requests} == set(planted_sequences())
        assert {r.provider for r in requests} == {"BPR hold-out" if split == "train" else "BPR"}
        assert summary["stats"][split]["hit_users"] == sum(r.target in r.items for r in requests) > 0
    recommendations = read_recommendations(folder)
    users = dict(zip(recommendations.users, recommendations.items.tolist(), strict=True))
    assert all(users[r.user_token][:K] == list(r.items) for r in lists["test"])
    assert recommendations.items.shape == (60, 40) and recommendations.exclude_seen
    assert set(map(len, map(set, users.values()))) == {40 - 8 + 1}  # 0 fills the places of seen items
    monkeypatch.setattr("recbole.trainer.Trainer.fit", stop_training)
    (stage,) = base_model.stages(data.settings)
    again = stage.run(replace(stage_context("again", data, tmp_path), folder=tmp_path / stage.name))
    assert again == base  # An interrupted stage does not train a finished model again.


def test_stage_candidates_imports_lists_without_a_base_model(planted, tmp_path):
    data, _, summary = run_stages(tmp_path, planted)
    file = tmp_path / "lists.jsonl"
    requests = [r for split in SPLITS for r in read_requests(tmp_path / "candidates" / f"{split}.jsonl", data.catalog)]
    write_requests(file, requests, data.catalog)
    other = Data(toy_settings(planted, "planted", base_model="BPR", cand_file=str(file)))
    (tmp_path / "import").mkdir()
    imported = candidates.run(stage_context("candidates", other, tmp_path / "import"))
    assert (imported["imported"], imported["stats"]) == (str(file), summary["stats"])
    assert imported["protocol"]["items of a list"] == "10 by the imported file"
    assert "models of test lists learn from" in summary["protocol"].keys() - imported["protocol"].keys()
    for split in SPLITS:
        texts = [(root / "candidates" / f"{split}.jsonl").read_text() for root in (tmp_path, tmp_path / "import")]
        assert texts[0] == texts[1]
    lists = read_recommendations(tmp_path / "import" / "candidates")
    own = read_recommendations(tmp_path / "candidates")
    assert (
        not lists.exclude_seen and np.array_equal(lists.items[:, :K], own.items[:, :K]) and not lists.items[:, K:].any()
    )
    assert np.array_equal(lists.target_rank, np.where(own.target_rank <= K, own.target_rank, 0))


def test_stage_of_another_recommender(planted, tmp_path, recommendations_of):
    data = Data(toy_settings(planted, "planted", models=["ItemKNN"], models_options={"k": 5}))
    summary = recommender.run(stage_context("ItemKNN", data, tmp_path))
    assert summary["model"] == "ItemKNN" and summary["hold_out"] is False
    folder = tmp_path / "ItemKNN"
    metrics = evaluate_methods(data, read_recommendations(folder), {"m": None}, {"s": None})["m"]["s"]
    model = load_model(data, tmp_path / "ItemKNN" / "model", model="ItemKNN", base=False)
    assert metrics == evaluate_methods(data, recommendations_of(model), {"m": None}, {"s": None})["m"]["s"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BPR", "SASRec"])
def test_training_reads_no_setting_of_lists_and_no_reported_metric(planted, tmp_path, name):
    trained = []
    for number, options in enumerate(
        (
            {},
            {"metrics": ["GAUC", "Precision"], "topk": [3, 20]},
            {"cand_num": 4, "cand_exclude_seen": False},
        )
    ):
        data = Data(toy_settings(planted, "planted", base_model=name, base_epochs=1, **options))
        metadata = train_model(data, tmp_path / str(number))
        trained.append((metadata, (tmp_path / str(number) / "model.safetensors").read_bytes()))
    assert trained[0] == trained[1] == trained[2] and list(trained[0][0]["best_valid"]) == ["NDCG@10"]


def test_validation_masks_seen_items_only_without_repeats(tmp_path):
    """Every target is in the user's history: a mask would make all validation scores 0."""
    sequences = {f"u{user}": ["a", "b", "a", "b", f"c{user}", "a", "b", "a"] for user in range(30)}
    write_atomic(tmp_path, "repeats", sequences)
    # Pop counts an item at most once in a batch.
    data = Data(toy_settings(tmp_path, "repeats", base_model="Pop", base_train_batch_size=1))
    assert data.has_repeats
    assert train_model(data, tmp_path / "base")["best_valid"]["NDCG@10"] > 0.5


def test_movies_has_no_repeats(movies):
    assert not movies("BPR").data.has_repeats


def test_masked_targets_are_reported(tmp_path, capsys):
    sequences = planted_sequences()
    for user in list(sequences)[:6]:
        sequences[user][-1] = sequences[user][0]
    write_atomic(tmp_path, "planted", sequences)
    run_stages(tmp_path, tmp_path)
    shown = capsys.readouterr().out
    assert "10.0% of the test targets are in the user's history" in shown and "rm_dup_inter" in shown


def test_training_writes_nothing_to_the_current_folder(planted, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    data = Data(toy_settings(planted, "planted", base_model="BPR", base_epochs=2))
    train_model(data, tmp_path / "model")
    assert not list(Path.cwd().iterdir())
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"metadata.json", "model.safetensors"}


# --- Beauty ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_amazon_beauty(beauty, record_property):
    started = time.monotonic()
    data = Data(load_settings(config_dict={"preset": "smoke", "dataset": "amazon-beauty", "data_path": str(beauty)}))
    items = data.items
    seconds = time.monotonic() - started
    assert (len(data.sequences), data.item_count) == (22_363, 12_101)
    assert sum(map(len, data.sequences.values())) == 198_502
    assert min(map(len, data.sequences.values())) >= 5
    assert sum(bool(item.title) for item in items) > 0.99 * len(items)
    nail = next(item for item in items if item.token == "B004756YJA")
    assert (nail.title, nail.brand, nail.categories) == (
        "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce",
        "OPI",
        "Beauty > Makeup > Nails > Nail Polish",
    )
    record_property("seconds", seconds)
    assert seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "exact"),
    [("SASRec", True), ("GRU4Rec", True), ("BERT4Rec", True), ("HGN", False), ("CausalSASRec", False)],
)
def test_a_loss_by_length_is_the_whole_loss(movies, name, exact):
    """Value and gradients, on a batch with short and long rows; a mean over positions is told apart."""
    from recbole.data.utils import get_dataloader
    from recbole.utils import init_seed

    data = movies("CausalSASRec").data
    config = recbole_config(data.settings, find_model(name), base=False, train_batch_size=512)
    init_seed(7, True)
    batch = next(iter(get_dataloader(config, "train")(config, data.built[0], None, shuffle=True)))
    network = find_model(name)(config, data.built[0])
    if exact:
        batch = batch[batch[network.ITEM_SEQ_LEN].argsort()[::8]]
    lengths = batch[network.ITEM_SEQ_LEN]
    assert lengths.min() <= 4 and lengths.max() == 50
    lines = []
    loss = BucketedLoss(network, lines.append)
    network.train()
    loss(batch)
    assert loss.exact is exact and network.training and len(lines) == (not exact)
    if not exact:
        return
    network.eval()  # without dropout
    values, gradients = [], []
    for each in (loss.whole, loss):
        network.zero_grad()
        value = each(batch)
        value.backward()
        values.append(value.item())
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 1e-3
