"""The door to RecBole: rows in exact time order, base models, and RecBole's evaluator with the last word."""

import copy
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_gr2 import compat
from recbole_gr2.bridge.data import Data, exact_time_dataset, read_item_texts, unquote
from recbole_gr2.bridge.evaluator import base_order, evaluate_rows, tie_free
from recbole_gr2.bridge.models import ByLength, ListedBase, find_model, mask_seen, train_base
from recbole_gr2.config import load_settings, recbole_config
from recbole_gr2.errors import ConfigurationError, DependencyError, GR2Error, MissingFileError
from recbole_gr2.quick_start import main
from recbole_gr2.ranking import promote
from recbole_gr2.stages.candidates import top_candidates
from recbole_gr2.text import clean_text

K = 10
BASES = ("CausalSASRec", "BPR")


@pytest.fixture(scope="module")
def raw() -> dict[str, list[str]]:
    """ml-100k as pandas reads it: user -> items by time, those of one second in the order of the file."""
    import recbole

    file = Path(recbole.__file__).parent / "dataset_example" / "ml-100k" / "ml-100k.inter"
    frame = pd.read_csv(file, sep="\t", dtype=str)
    frame.columns = [column.split(":")[0] for column in frame.columns]
    frame["timestamp"] = frame["timestamp"].astype("int64")
    frame = frame.sort_values("timestamp", kind="stable")
    return {user: list(items) for user, items in frame.groupby("user_id")["item_id"]}


# --- rows ------------------------------------------------------------------------------------------------------------


def target_tokens(data: Data, dataset) -> dict[str, str]:
    """User -> target item of a built split, as tokens."""
    users, items = dataset.inter_feat[data.uid].tolist(), dataset.inter_feat[data.iid].tolist()
    return {data.user_tokens[u]: data.item_tokens[i] for u, i in zip(users, items, strict=True)}


def test_sequences_are_in_exact_time_order(ml100k, raw):
    data = ml100k("CausalSASRec").data
    assert len(raw) == len(data.sequences) == 943
    for user, items in data.sequences.items():
        assert [data.item_tokens[i] for i in items] == raw[data.user_tokens[user]]


def target_of(data, user, split):
    return next(iter(data.targets(user, split)), None)


@pytest.mark.parametrize(("split", "behind"), [("test", 1), ("valid", 2), ("train", 3)])
def test_rows_targets_and_histories(ml100k, raw, split, behind):
    data = ml100k("CausalSASRec").data
    rows, users = data.rows(split)
    assert sorted(users) == sorted(data.sequences)
    lists, lengths = rows["item_id_list"].tolist(), rows["item_length"].tolist()
    for user, target, cut, length in zip(users.tolist(), rows[data.iid].tolist(), lists, lengths, strict=True):
        items = raw[data.user_tokens[user]]
        assert data.item_tokens[target] == items[-behind]
        assert target_of(data, user, split) == target
        history = [data.item_tokens[i] for i in data.history(user, split)]
        assert history == items[:-behind]
        assert [data.item_tokens[i] for i in cut[:length]] == history[-50:]


def test_stock_recbole_has_the_trap_that_exact_time_avoids(ml100k, raw):
    from recbole.data.dataset import SequentialDataset

    data = ml100k("CausalSASRec").data
    assert data.config["normalize_all"] is False
    stock = target_tokens(data, SequentialDataset(data.config).build()[2])
    ours = target_tokens(data, data.built[2])
    assert sum(stock[user] != items[-1] for user, items in raw.items()) > 100
    assert sum(ours[user] != items[-1] for user, items in raw.items()) == 0


def test_general_models_get_the_same_rows(ml100k):
    assert ml100k("BPR").data.fingerprint == ml100k("CausalSASRec").data.fingerprint


def test_train_sequences_hold_no_valid_or_test_item(ml100k):
    data = ml100k("CausalSASRec").data
    train = data.train_sequences()
    assert len(train) == 943
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
    base = train_base(data, tmp_path / "base", hold_out=False, epochs=1)
    # A list needs a target and an item before it.
    for split, least in (("test", 2), ("valid", 3), ("train", 4)):
        requests = top_candidates(base, split, K)
        rows = {data.user_tokens[user] for user in data.rows(split)[1]}
        expected = {u for u, items in sequences.items() if len(items) >= least} & rows
        assert {request.user_token for request in requests} == expected
        assert len(expected) >= 24
        for request in requests:
            items, behind = sequences[request.user_token], least - 1
            assert [data.item_tokens[i] for i in request.history] == items[:-behind]
            assert data.item_tokens[request.target] == items[-behind]
            assert not {data.item_tokens[i] for i in request.items} & set(items[:-behind])
            assert len(request.items) == K
    for user in data.sequences:
        assert data.history(user, "train") == tuple(data.sequences[user][:-3])


# --- the three invariants --------------------------------------------------------------------------------------------


def stock_metrics(data: Data, base, mask: str | None = None) -> dict[str, float]:
    """RecBole's Trainer.evaluate on its own test loader; with `mask`, seen items at -inf by a plain loop."""
    from recbole.data.utils import get_dataloader
    from recbole.trainer import Trainer

    class Masked(Trainer):
        def _full_sort_batch_eval(self, batched_data):
            interaction, scores, rows, items = super()._full_sort_batch_eval(batched_data)
            for row, user in enumerate(interaction[data.uid].tolist()):
                scores[row, data.sequences[user][:-1].tolist()] = -torch.inf
            return interaction, scores, rows, items

    loader = get_dataloader(data.config, "test")(data.config, data.built[2], None, shuffle=False)
    trainer = (Masked if mask else Trainer)(data.config, base.model)
    trainer.eval_collector.data_collect(SimpleNamespace(dataset=data.built[0]))
    return {name: float(value) for name, value in trainer.evaluate(loader, load_best_model=False).items()}


def evaluated(data: Data, base, rankings, users=None) -> dict[str, float]:
    return evaluate_rows(data, base, {"row": rankings}, split="test", users=users)["row"]


def lists_of(data: Data, base) -> dict[int, tuple[int, ...]]:
    users = {token: user for user, token in enumerate(data.user_tokens)}
    return {users[request.user_token]: request.items for request in top_candidates(base, "test", K)}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
def test_identity_is_recboles_own_evaluation(ml100k, name, mask):
    trained = ml100k(name)
    base = trained.masked if mask else trained.open
    stock = stock_metrics(trained.data, base, mask)
    assert len(stock) > 40 and "gauc" in stock
    assert evaluated(trained.data, base, None) == stock
    lists = lists_of(trained.data, base)
    assert len(lists) == 943
    assert evaluated(trained.data, base, lists) == stock


def test_the_mask_is_that_of_recboles_general_protocol(ml100k):
    """For general models RecBole masks the history itself; with the mask on our rows give its numbers."""
    from recbole.data.utils import create_samplers, get_dataloader
    from recbole.trainer import Trainer

    trained = ml100k("BPR")
    config = recbole_config(trained.settings, "BPR", repeatable=False)
    dataset = exact_time_dataset(sequential=False)(config)
    built = dataset.build()
    sampler = create_samplers(config, dataset, built)[2]
    loader = get_dataloader(config, "test")(config, built[2], sampler, shuffle=False)
    trainer = Trainer(config, trained.open.model)
    trainer.eval_collector.data_collect(SimpleNamespace(dataset=trained.data.built[0]))
    stock = {k: float(v) for k, v in trainer.evaluate(loader, load_best_model=False).items()}
    ours = evaluated(trained.data, trained.masked, None)
    for metric in stock:  # GAUC and means sum the users in another order
        assert ours[metric] == pytest.approx(stock[metric], abs=1e-6), metric
    assert stock != evaluated(trained.data, trained.open, None)


@pytest.mark.parametrize("name", BASES)
def test_recall_at_k_does_not_change_and_recall_at_1_does(ml100k, name):
    trained = ml100k(name)
    own = evaluated(trained.data, trained.masked, None)
    for seed in range(3):
        rng = random.Random(seed)
        shuffled = {u: tuple(rng.sample(items, K)) for u, items in lists_of(trained.data, trained.masked).items()}
        metrics = evaluated(trained.data, trained.masked, shuffled)
        for metric in (f"recall@{K}", "recall@20", f"hit@{K}", f"precision@{K}", f"itemcoverage@{K}", "giniindex@20"):
            assert metrics[metric] == own[metric], metric
        assert metrics["ndcg@5"] != own["ndcg@5"] and metrics["gauc"] != own["gauc"]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
def test_oracle_ndcg_is_the_base_models_recall(ml100k, name, mask):
    trained = ml100k(name)
    data, base = trained.data, trained.masked if mask else trained.open
    own = evaluated(data, base, None)
    lists = {
        u: promote(items, target_of(data, u, "test")) if target_of(data, u, "test") in items else items
        for u, items in lists_of(data, base).items()
    }
    oracle = evaluated(data, base, lists)
    for k in (1, 5, K):
        assert oracle[f"ndcg@{k}"] == oracle[f"recall@{k}"] == oracle[f"mrr@{k}"] == own[f"recall@{K}"] > 0
    assert oracle["recall@20"] == own["recall@20"]


def test_recall_against_a_count_by_hand(ml100k):
    trained = ml100k("BPR")
    data = trained.data
    lists = lists_of(data, trained.masked)
    hits = [target_of(data, user, "test") in items for user, items in lists.items()]
    metrics = evaluated(data, trained.masked, None)
    assert metrics[f"recall@{K}"] == pytest.approx(np.mean(hits), abs=1e-12)
    inside = [user for user, hit in zip(lists, hits, strict=True) if hit]
    assert evaluated(data, trained.masked, None, users=inside)[f"recall@{K}"] == 1.0


def test_a_ranking_of_other_items_is_an_error(ml100k):
    trained = ml100k("BPR")
    user, items = next(iter(lists_of(trained.data, trained.masked).items()))
    with pytest.raises(GR2Error, match="no permutation"):
        evaluated(trained.data, trained.masked, {user: (*items[:-1], items[0])})
    with pytest.raises(GR2Error, match="no permutation"):
        evaluated(trained.data, trained.open, {user: items})


@pytest.mark.parametrize("name", ["Pop", "ItemKNN"])
def test_base_models_with_tied_scores_keep_their_order(ml100k, name):
    trained = ml100k(name)
    for base in (trained.open, trained.masked):
        stock = evaluated(trained.data, base, None)
        again = evaluated(trained.data, base, lists_of(trained.data, base))
        # RecBole's GAUC gives tied items their mean rank, and a re-ranked row has no ties.
        assert {m: v for m, v in again.items() if m != "gauc"} == {m: v for m, v in stock.items() if m != "gauc"}


rows_of_scores = st.integers(4, 12).flatmap(
    lambda width: st.lists(
        st.lists(st.sampled_from([-torch.inf, 0.0, 0.5, 1.0, 2.0, 3.0]), min_size=width, max_size=width),
        min_size=1,
        max_size=4,
    )
)


@settings(deadline=None)
@given(rows_of_scores, st.integers(2, 4), st.randoms())
def test_tie_free_rows(rows, reach, rng):
    scores = torch.tensor(rows)
    scores[:, 0] = -torch.inf
    order = base_order(scores, reach)
    first = order[:, :reach]
    assert torch.equal(first, torch.topk(scores, reach).indices)
    heads = [None if rng.random() < 0.3 else tuple(rng.sample(row, len(row))) for row in first.tolist()]
    free = tie_free(order, heads)
    assert sorted(free[0].tolist()) == list(range(-scores.size(1), 0))
    for row, (before, after) in enumerate(zip(scores.tolist(), free.tolist(), strict=True)):
        ranked = sorted(range(len(after)), key=lambda item: -after[item])
        assert ranked[:reach] == list(heads[row] or first[row].tolist())
        assert [before[i] for i in ranked[reach:]] == sorted((before[i] for i in ranked[reach:]), reverse=True)


# --- seen items ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_mask_covers_whole_histories(ml100k, raw, split):
    trained = ml100k("CausalSASRec")
    data, behind = trained.data, {"test": 1, "valid": 2, "train": 3}[split]
    long = 0
    for users, scores in trained.masked.scores(split):
        for user, row in zip(users.tolist(), scores, strict=True):
            hidden = {data.item_tokens[i] for i in torch.nonzero(row == -torch.inf).flatten().tolist()}
            assert hidden == {"[PAD]", *raw[data.user_tokens[user]][:-behind]}
            long += len(raw[data.user_tokens[user]]) > 60
    assert long > 300  # RecBole's own list is cut to 50 items
    for users, scores in trained.open.scores(split):
        assert torch.equal((scores == -torch.inf).sum(1), torch.ones(len(users), dtype=torch.long))


def test_mask_seen_touches_nothing_else():
    histories = {1: (2, 3), 2: ()}
    scores = torch.zeros(2, 5)
    mask_seen(scores, [1, 2], SimpleNamespace(history=lambda user, split: histories[user]), "test")
    assert scores.tolist() == [[0, 0, -torch.inf, -torch.inf, 0], [0, 0, 0, 0, 0]]


def test_scores_of_some_users_and_in_batches(ml100k):
    trained = ml100k("CausalSASRec")
    some = [5, 900, 33]
    ((users, few),) = trained.masked.scores("test", users=some)
    assert sorted(users.tolist()) == sorted(some)
    every = {
        user: row
        for ids, scores in trained.masked.scores("test")
        for user, row in zip(ids.tolist(), scores, strict=False)
    }
    for user, row in zip(users.tolist(), few, strict=True):
        assert torch.allclose(row, every[user], atol=1e-5)


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
def test_what_each_base_is_trained_on(ml100k, name, monkeypatch, tmp_path):
    data = ml100k(name if name in BASES else "CausalSASRec").data
    if name == "SASRec":  # RecBole's rows, one a prefix; stop before the training, which takes long
        more = {**dict(data.settings), "base_model": "SASRec"}
        data = Data(load_settings(config_dict={k: v for k, v in more.items() if k != "preset"} | {"preset": "smoke"}))
    captured = capture_training(monkeypatch)
    monkeypatch.setattr("recbole.trainer.Trainer.fit", stop_training)
    for hold_out, last in ((False, 2), (True, 3)):
        with pytest.raises(StopTraining):
            train_base(data, tmp_path / str(hold_out), hold_out=hold_out, epochs=1)
        feat = captured[-1].inter_feat
        seen: dict[int, set] = {user: set() for user in data.sequences}
        lists = feat["item_id_list"].tolist() if "item_id_list" in feat else [[]] * len(feat)
        for user, target, past in zip(feat[data.uid].tolist(), feat[data.iid].tolist(), lists, strict=True):
            seen[user] |= {target, *past} - {0}
        for user, items in data.sequences.items():
            assert seen[user] == set(items[:-last].tolist())
    assert len(captured) == 2


class StopTraining(Exception):
    pass


def stop_training(*args, **kwargs):
    raise StopTraining


def test_a_finished_base_is_loaded_and_scores_the_same(ml100k, tmp_path, monkeypatch):
    data = ml100k("BPR").data
    first = train_base(data, tmp_path / "base", hold_out=True, epochs=1)
    monkeypatch.setattr("recbole.trainer.Trainer.fit", stop_training)
    again = train_base(data, tmp_path / "base", hold_out=True, epochs=1)
    assert again.facts == first.facts and first.facts["hold_out"] is True
    ((_, one),) = first.scores("valid")
    ((_, other),) = again.scores("valid")
    assert torch.equal(one, other)


def test_the_hold_out_base_differs_from_the_base(ml100k, tmp_path):
    trained = ml100k("BPR")
    held = train_base(trained.data, tmp_path / "base", hold_out=True, epochs=1)
    assert held.facts["training_rows"] == trained.open.facts["training_rows"] - 943


def test_negatives_of_a_general_base_are_never_the_users_own_items(ml100k, tmp_path, monkeypatch):
    data, drawn = ml100k("BPR").data, []

    def look(trainer, loader, *args, **kwargs):
        for batch in loader:
            drawn.extend(zip(batch[data.uid].tolist(), batch[f"neg_{data.iid}"].tolist(), strict=True))
        raise StopTraining

    monkeypatch.setattr("recbole.trainer.Trainer.fit", look)
    with pytest.raises(StopTraining):
        train_base(data, tmp_path, hold_out=False, epochs=1)
    trained = {user: set(items.tolist()) for user, items in data.train_sequences().items()}
    assert len(drawn) == sum(map(len, trained.values()))
    assert not [pair for pair in drawn if pair[1] in trained[pair[0]]]


@pytest.mark.parametrize(("name", "text"), [("Nobody", "no model named 'Nobody'"), ("FM", "FM is a context model")])
def test_models_that_cannot_be_a_base(ml100k, name, text, tmp_path):
    data = ml100k("BPR").data
    wrong = SimpleNamespace(settings={**dict(data.settings), "base_model": name})
    if name == "FM":
        wrong.settings = load_settings(config_dict={"preset": "smoke", "base_model": name})
    with pytest.raises(ConfigurationError, match=text):
        train_base(wrong, tmp_path, hold_out=False)


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
    return [[rng.randint(1, 1682) for _ in range(rng.choice([2, 3, 5, 20, 51]))] for _ in range(count)]


def test_loss_is_the_mean_over_all_prefixes(ml100k):
    model = ml100k("CausalSASRec").open.model.eval()  # no dropout
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


def test_hidden_states_and_predictions_are_recboles(ml100k):
    from recbole.model.sequential_recommender.sasrec import SASRec

    trained = ml100k("CausalSASRec")
    model = trained.open.model.eval()
    stock = SASRec(recbole_config(trained.settings, find_model("CausalSASRec")), trained.data.built[0]).eval()
    stock.load_state_dict(model.state_dict())
    interaction = toy_interaction(model, toy_sequences(1))
    with torch.no_grad():
        assert torch.equal(model.full_sort_predict(interaction), stock.full_sort_predict(interaction))
        items, lengths = interaction[model.ITEM_SEQ], interaction[model.ITEM_SEQ_LEN]
        last = model.encode(items)[torch.arange(len(items)), lengths - 1]
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


def test_ml100k_items(ml100k):
    data = ml100k("BPR").data
    assert len(data.items) == data.item_count == 1682
    toy_story = next(item for item in data.items if item.token == "1")
    assert (toy_story.title, toy_story.item_id) == ("Toy Story", data.item_tokens.index("1"))
    assert all(item.title and item.item_id == number for number, item in enumerate(data.items, start=1))


@pytest.mark.parametrize("text", ["title", "categories", "brand", "description"])
def test_every_text_is_in_the_fingerprint(ml100k, text):
    data, other = (copy.copy(ml100k("BPR").data) for _ in range(2))
    data.__dict__.pop("fingerprint", None)
    other.__dict__.pop("fingerprint", None)
    other.__dict__["items"] = (*data.items[:-1], replace(data.items[-1], **{text: "another"}))
    assert data.fingerprint == ml100k("BPR").data.fingerprint != other.fingerprint


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


# --- candidate lists as a base ---------------------------------------------------------------------------------------


def test_listed_base_ranks_as_the_model_does(ml100k):
    trained = ml100k("BPR")
    listed = ListedBase(data=trained.data, requests=top_candidates(trained.masked, "test", 20))
    ours = evaluated(trained.data, listed, None)
    own = evaluated(trained.data, trained.masked, None)
    assert {m: v for m, v in ours.items() if m != "gauc"} == {m: v for m, v in own.items() if m != "gauc"}


# --- Beauty ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("name", "exact"),
    [("SASRec", True), ("GRU4Rec", True), ("BERT4Rec", True), ("HGN", False), ("CausalSASRec", False)],
)
def test_a_loss_by_length_is_the_whole_loss(ml100k, name, exact):
    """Value and gradients, on a batch with short and long rows; a mean over positions is told apart."""
    from recbole.data.utils import get_dataloader
    from recbole.utils import init_seed

    data = ml100k("CausalSASRec").data
    config = recbole_config(data.settings, find_model(name), base=False, train_batch_size=512)
    init_seed(7, True)
    batch = next(iter(get_dataloader(config, "train")(config, data.built[0], None, shuffle=True)))
    network = find_model(name)(config, data.built[0])
    lengths = batch[network.ITEM_SEQ_LEN]
    assert lengths.min() <= 4 and lengths.max() == 50
    said = []
    loss = ByLength(network, said.append)
    network.train()
    loss(batch)
    assert loss.exact is exact and network.training and len(said) == (not exact)
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
