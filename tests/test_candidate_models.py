"""PairCounts, TextEASE, TextNeighbours and TextSASRec: scores by hand, leakage, storage, and their inputs."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_gr2 import pipeline
from recbole_gr2.bridge import training
from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.evaluator import depth_of, recommend
from recbole_gr2.bridge.models import BaseModel, find_model
from recbole_gr2.bridge.training import load_model, train_model, train_or_load
from recbole_gr2.config import load_settings, recbole_config
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.model.dropout import Dropout
from recbole_gr2.model.linear import largest_weights
from recbole_gr2.model.pair_counts import decayed_pairs
from recbole_gr2.model.text_sasrec import standardised
from recbole_gr2.sid.embed import item_text

pytestmark = pytest.mark.slow  # Together they need many seconds.

A, B, C, D, E = range(1, 6)
# The training items are the first three. Item E is only a test target, and item D has no text.
FIVE = {"u0": "abcde", "u1": "bcade", "u2": "dabce"}
TITLES = {"a": "red soap", "b": "red comb", "c": "blue soap", "d": "", "e": "blue comb"}
EMBEDDINGS = np.array([[1, 0], [0.6, 0.8], [0, 2], [0, 0], [0.8, 0.6]], dtype=np.float32)
SMALL_SASREC = {"base_hidden_size": 8, "base_inner_size": 8, "base_n_layers": 1, "base_train_batch_size": 4}
OPTIONS = {
    "PairCounts": {"base_text_weight": 6},
    "TextEASE": {"base_reg_weight": 2, "base_text_weight": 3, "base_max_weights": 3},
    "TextNeighbours": {},
    "TextSASRec": {**SMALL_SASREC, "base_epochs": 2, "base_eval_step": 1},
}


def write(folder: Path, sequences: dict[str, str], titles: dict[str, str] = TITLES) -> Path:
    """Write the data set `five`. A letter is an item, in time order."""
    (folder / "five").mkdir(parents=True)
    lines = [f"{user}\t{item}\t{time}" for user, items in sequences.items() for time, item in enumerate(items)]
    head = "user_id:token\titem_id:token\ttimestamp:float"
    (folder / "five" / "five.inter").write_text("\n".join([head, *lines]) + "\n")
    texts = [f"{item}\t{title}" for item, title in titles.items()]
    (folder / "five" / "five.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *texts]) + "\n")
    return folder


def settings_for(folder: Path, model: str, **options):
    words = {"preset": "smoke", "dataset": "five", "data_path": str(folder), "checkpoint_dir": str(folder)}
    words |= {"valid_metric": "NDCG@5", "cand_exclude_seen": False, "base_epochs": 1}
    return load_settings(config_dict={**words, "base_model": model, **options})


def inputs(data: Data) -> dict:
    """All inputs of the four models: texts and embeddings of the items 1..N."""
    embeddings = {token: row for token, row in zip("abcde", EMBEDDINGS, strict=True)}
    rows = [embeddings.get(token, np.full(2, ord(token) / 99)) for token in data.item_tokens[1:]]
    texts = [item_text(item) for item in data.catalog]
    return {"item_texts": texts, "text_embeddings": np.array(rows, dtype=np.float32)}


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("five"), FIVE)


def fitted(folder: Path, place: Path, model: str, *, hold_out: bool = False, **options) -> BaseModel:
    """A model that is trained, stored and loaded."""
    data = Data(settings_for(folder, model, **options))
    return train_or_load(data, place, hold_out=hold_out, epochs=1 if hold_out else None, inputs=inputs(data))


def scores_of(base: BaseModel, split: str = "valid") -> torch.Tensor:
    return torch.cat([scores for _, scores in base.scores(split)])


def test_pair_counts_by_hand(five, tmp_path):
    options = {
        "base_distance_decay": 0.5,
        "base_window": 2,
        "base_age_decay": 0.25,
        "base_max_history": 2,
        "base_popularity_scale": 10,
        "base_popularity_weight": 0.5,
        "base_smoothing": 1,
    }
    base = fitted(five, tmp_path / "pairs", "PairCounts", **options, base_text_weight=0)
    share = {A: 4 / 14, B: 4 / 14, C: 3 / 14, D: 2 / 14, E: 1 / 14}  # (n + 1) / sum (n + 1)
    pairs = {(A, B): 2, (B, C): 2, (A, C): 0.5, (C, A): 1, (B, A): 0.5, (D, A): 1, (D, B): 0.5}

    def score(item: int, last: int, before: int) -> float:
        terms = [math.log(1 + pairs.get((past, item), 0) / (10 * share[item])) for past in (last, before)]
        return terms[0] + 0.25 * terms[1] + 0.5 * math.log(share[item])

    expected = [[score(item, C, B) for item in range(1, 6)]]  # the last two items of u0, u1 and u2
    expected += [[score(item, A, C) for item in range(1, 6)], [score(item, B, A) for item in range(1, 6)]]
    assert scores_of(base)[:, 1:].numpy() == pytest.approx(np.array(expected), abs=1e-6)
    # Both soaps, and both blue things, share one of two words: a cosine of 1/2.
    cosine = {A: (1, 0.5, 0.5, 0, 0), B: (0.5, 1, 0, 0, 0.5), C: (0.5, 0, 1, 0, 0.5)}
    text = [6 * np.array(cosine[last]) + 1.5 * np.array(cosine[before]) for last, before in ((C, B), (A, C), (B, A))]
    both = fitted(five, tmp_path / "both", "PairCounts", **options, base_text_weight=6)
    assert scores_of(both)[:, 1:].numpy() == pytest.approx(np.array(expected) + text, abs=1e-5)


def test_pairs_do_not_cross_users_and_end_at_the_window():
    users, items = np.array([1, 1, 1, 1, 2, 2]), np.array([1, 2, 1, 3, 2, 3])
    counts = decayed_pairs(users, items, 2, 0.5, 4).toarray()
    assert counts.tolist() == [[0, 0, 0, 0], [0, 0.5, 1, 1], [0, 1, 0, 1.5], [0, 0, 0, 0]]
    for few in (0, 1):
        assert decayed_pairs(users[:few], items[:few], 5, 0.5, 4).nnz == 0


def test_text_neighbours_by_hand(five, tmp_path):
    options = {"base_age_decay": 0.5, "base_max_history": 2}
    words = scores_of(fitted(five, tmp_path / "words", "TextNeighbours", **options))
    first = [0.5 + 0.25, 0 + 0.5, 1 + 0, 0, 0.5 + 0.25]  # of u0: the last item is C, the one before B
    assert words[0, 1:].tolist() == pytest.approx(first, abs=1e-6)
    vectors = scores_of(
        fitted(five, tmp_path / "vectors", "TextNeighbours", **options, base_representation="embedding")
    )
    first = [0 + 0.3, 0.8 + 0.5, 1 + 0.4, 0, 0.6 + 0.5 * 0.96]  # The embedding of C is scaled to length 1.
    assert vectors[0, 1:].tolist() == pytest.approx(first, abs=1e-6)


def ease(interactions: np.ndarray, texts: np.ndarray, ridge: float, weight: float) -> np.ndarray:
    inverse = np.linalg.inv(interactions.T @ interactions + weight * texts @ texts.T + ridge * np.eye(len(texts)))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return weights


def test_text_ease_by_hand(five, tmp_path):
    interactions = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]], dtype=float)
    texts = EMBEDDINGS / np.maximum(np.linalg.norm(EMBEDDINGS, axis=1, keepdims=True), 1e-9)
    weights = ease(interactions, texts, 2, 3)
    options = {"base_reg_weight": 2, "base_text_weight": 3}
    scores = scores_of(fitted(five, tmp_path / "all", "TextEASE", **options, base_max_weights=0))
    assert scores[:, 1:].numpy() == pytest.approx(interactions @ weights, abs=1e-5)
    assert abs(scores[:, E]).min() > 0.01 and (scores[:, D] != 0).any()
    kept = np.where(abs(weights) >= np.sort(abs(weights), axis=1)[:, -2:-1], weights, 0)  # the two largest of a row
    scores = scores_of(fitted(five, tmp_path / "two", "TextEASE", **options, base_max_weights=2))
    assert scores[:, 1:].numpy() == pytest.approx(interactions @ kept, abs=1e-5)


def test_text_ease_without_texts_is_recboles_ease(tmp_path):
    folder = write(tmp_path, {"u0": "abcde", "u1": "bcafe", "u2": "dabce"}, {**TITLES, "f": ""})
    data = Data(settings_for(folder, "TextEASE", base_text_weight=0, base_reg_weight=2, base_max_weights=0))
    ours = train_or_load(data, tmp_path / "ours", inputs=inputs(data))
    data.settings = settings_for(folder, "TextEASE", models=["EASE"], models_options={"reg_weight": 2.0})
    theirs = train_or_load(data, tmp_path / "theirs", model="EASE", base=False)
    assert torch.allclose(scores_of(ours), scores_of(theirs), atol=1e-5)
    assert (scores_of(ours)[:, E] == 0).all() and scores_of(ours)[:, A].all()  # E has no training interactions.


@pytest.mark.parametrize("count", [0, 3, 2000])
def test_weights_are_computed_in_blocks(count):
    rng, size = np.random.default_rng(0), 1100
    factor = rng.normal(size=(size, 20)).astype(np.float32)
    inverse = factor @ factor.T + np.eye(size, dtype=np.float32)
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    found = largest_weights(inverse, count).toarray()
    assert found.shape == (size + 1, size + 1) and not found[0].any() and not found[:, 0].any()
    if count == 3:
        assert ((found != 0).sum(axis=1)[1:] == 3).all()
        weights = np.where(abs(weights) >= np.sort(abs(weights), axis=1)[:, -3:-2], weights, 0)
    assert np.array_equal(found[1:, 1:], weights)


def test_a_matrix_that_cannot_be_inverted_is_an_error(five, tmp_path):
    with pytest.raises(ConfigurationError, match="cannot invert") as caught:
        fitted(five, tmp_path / "m", "TextEASE", base_reg_weight=1e-30, base_text_weight=1e9)
    assert caught.value.where == "reg_weight" and caught.value.why and caught.value.do


def untrained_sasrec(folder: Path, **options):
    """A TextSASRec with random weights, its data, and the item table by definition."""
    data = Data(settings_for(folder, "TextSASRec", **SMALL_SASREC, **options))
    torch.manual_seed(0)
    model_class = find_model("TextSASRec")
    model = model_class(recbole_config(data.settings, model_class, **inputs(data)), data.built[0])
    texts = torch.cat([torch.zeros(1, 2), standardised(torch.from_numpy(EMBEDDINGS))[1:]])
    return model, data, model.item_embedding.weight + texts @ model.text_map.weight.T


def test_text_sasrec_is_causal_sasrec_with_the_sum_of_both_embeddings(five):
    model, data, table = untrained_sasrec(five)
    causal = find_model("CausalSASRec")
    plain = causal(recbole_config(data.settings, causal), data.built[0])
    state = {name: value for name, value in model.state_dict().items() if name != "text_map.weight"}
    plain.load_state_dict({**state, "item_embedding.weight": table.detach()})
    for each in (model, plain):
        each.eval()
    rows = data.built[0].inter_feat
    with torch.no_grad():
        scores = plain.full_sort_predict(rows)
        assert torch.allclose(model.full_sort_predict(rows), scores, atol=1e-6)
        assert torch.allclose(model.predict(rows), scores.gather(1, rows[data.iid].unsqueeze(1)).squeeze(1), atol=1e-6)
        assert torch.allclose(model.calculate_loss(rows), plain.calculate_loss(rows), atol=1e-6)
    assert "texts" not in model.state_dict()  # They are read from the stage `embeddings`.


def test_the_text_map_of_text_sasrec_learns_and_its_input_has_dropout(five):
    model, data, table = untrained_sasrec(five, base_text_dropout=0.5)
    model.calculate_loss(data.built[0].inter_feat).backward()
    assert model.text_map.weight.grad.abs().sum() > 0 and model.item_embedding.weight.grad.abs().sum() > 0
    assert not torch.equal(model.item_table(), model.item_table())
    model.eval()
    assert torch.allclose(model.item_table(), table)
    with torch.no_grad():
        assert model.item_table() is model.item_table()
        model.train()
        model.item_embedding.weight += 1
        assert torch.allclose(model.eval().item_table(), table + 1)


def test_standardised_embeddings():
    values = standardised(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert values.tolist() == [[0, 0], [-1, 0], [1, 0]]


LONG = {  # The first user fixes the numbers of the items. Item h is never a training item.
    "u0": "abcdefgh",
    **{f"u{n}": "".join("abcdefg"[(n * step + n) % 7] for step in range(1, 7)) for n in range(1, 7)},
}
LONG_TITLES = {**TITLES, "f": "green soap", "g": "green comb", "h": "red brush"}


def scrambled(sequences: dict[str, str]) -> dict[str, str]:
    """The same sequences, with the last three items of each user but the first one moved to the next user."""
    users = list(sequences)[1:]
    ends = [sequences[user][-3:] for user in users]
    changed = {user: sequences[user][:-3] + end for user, end in zip(users, [*ends[1:], ends[0]], strict=True)}
    return {"u0": sequences["u0"], **changed}


@pytest.mark.parametrize("model", OPTIONS)
def test_a_hold_out_model_does_not_see_the_targets(tmp_path, model):
    scores = {}
    for name, sequences in (("true", LONG), ("scrambled", scrambled(LONG))):
        folder = write(tmp_path / name, sequences, LONG_TITLES)
        for hold_out in (True, False):
            base = fitted(folder, tmp_path / name / str(hold_out), model, hold_out=hold_out, **OPTIONS[model])
            scores[name, hold_out] = scores_of(base, "train")
            assert base.metadata["hold_out"] is hold_out
    assert torch.equal(scores["true", True], scores["scrambled", True])
    # The base model learns from them. TextNeighbours counts no interactions.
    assert torch.equal(scores["true", False], scores["scrambled", False]) is (model == "TextNeighbours")


@pytest.mark.parametrize("model", OPTIONS)
def test_new_items_have_finite_scores_by_their_text(tmp_path, model):
    scores = []
    for text in ("red brush", "green comb"):
        folder = write(tmp_path / text, LONG, {**LONG_TITLES, "h": text})
        data = Data(settings_for(folder, model, **OPTIONS[model]))
        words = inputs(data)
        words["text_embeddings"][7] = (1, 0.1) if text == "red brush" else (0.1, -1)
        base = train_or_load(data, tmp_path / text / "m", inputs=words)
        scores.append(scores_of(base))
        assert torch.isfinite(scores[-1][:, 1:]).all() and (scores[-1][:, 0] == -torch.inf).all()
    assert not torch.allclose(scores[0][:, 8], scores[1][:, 8], atol=1e-4)


@pytest.mark.parametrize("model", OPTIONS)
def test_a_loaded_model_has_the_same_scores(tmp_path, monkeypatch, model):
    networks, real = [], training._make_trainer
    monkeypatch.setattr(training, "_make_trainer", lambda *args: networks.append(args[2]) or real(*args))
    data = Data(settings_for(write(tmp_path, LONG, LONG_TITLES), model, **OPTIONS[model]))
    train_model(data, tmp_path / "m", epochs=1, inputs=inputs(data))
    if model != "TextSASRec":  # A loaded model is not fitted again.
        monkeypatch.setattr(find_model(model), "fit", lambda *args: pytest.fail("fitted again"))
    base = load_model(data, tmp_path / "m", inputs=inputs(data))
    for split in ("train", "valid", "test"):
        assert torch.equal(scores_of(base, split), scores_of(replace(base, model=networks[0].eval()), split))
        one, two = (list(recommend(base, split, depth_of(data), break_ties=False)) for _ in range(2))
        assert all(np.array_equal(a.items, b.items) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("model", ["PairCounts", "TextEASE", "TextNeighbours"])
def test_traditional_models_have_one_epoch_without_batches(five, tmp_path, monkeypatch, model):
    calls, real = [], find_model(model).fit
    monkeypatch.setattr(find_model(model), "fit", lambda *args: calls.append(args) or real(*args))
    monkeypatch.setattr("recbole.data.dataloader.TrainDataLoader.collate_fn", lambda *args: pytest.fail("a batch"))
    data = Data(settings_for(five, model, base_epochs=30, base_eval_step=2))
    metadata = train_model(data, tmp_path / "base", inputs=inputs(data))
    assert len(calls) == 1 and metadata["epochs"] == 1 and 0 < metadata["best_valid"]["NDCG@5"] <= 1
    hold_out = train_model(data, tmp_path / "hold_out", hold_out=True, epochs=1, inputs=inputs(data))
    assert len(calls) == 2 and hold_out["training_rows"] == metadata["training_rows"] - 3


def test_training_sequences_are_not_cut(tmp_path):
    data = Data(settings_for(write(tmp_path, LONG, LONG_TITLES), "PairCounts", MAX_ITEM_LIST_LENGTH=2))
    model_class = find_model("PairCounts")
    model = model_class(recbole_config(data.settings, model_class, **inputs(data)), data.built[0])
    users, items = model.training_sequences(data.built[0])
    assert {user: items[users == user].tolist() for user in data.sequences} == {
        user: sequence.tolist() for user, sequence in data.train_sequences().items()
    }
    nothing = data.built[0].copy(data.built[0].inter_feat[[]])
    assert [part.tolist() for part in model.training_sequences(nothing)] == [[], []]


def test_item_texts_without_words_are_an_error(tmp_path):
    folder = write(tmp_path, FIVE, dict.fromkeys("abcde", "x"))
    for model, options in (("TextNeighbours", {}), ("PairCounts", {"base_text_weight": 1})):
        with pytest.raises(ConfigurationError, match="have no words") as caught:
            fitted(folder, tmp_path / model, model, **options)
        assert caught.value.where and caught.value.why and caught.value.do
    assert torch.isfinite(scores_of(fitted(folder, tmp_path / "m", "PairCounts", base_text_weight=0))[:, 1:]).all()


@pytest.mark.parametrize(
    ("model", "option", "value", "message"),
    [
        ("PairCounts", "window", 0, "window is 0, expected int >= 1"),
        ("PairCounts", "age_decay", 1.5, "age_decay is 1.5, expected float > 0, <= 1"),
        ("PairCounts", "smoothing", 0, "smoothing is 0"),
        ("TextEASE", "reg_weight", 0, "reg_weight is 0"),
        ("TextNeighbours", "representation", "words", "expected one of tfidf, embedding"),
        ("TextSASRec", "text_dropout", 1, "text_dropout is 1"),
        ("TextSASRec", "text_dropuot", 0.1, "nearest: base_text_dropout"),
    ],
)
def test_options_that_cannot_work_are_refused(five, model, option, value, message):
    with pytest.raises(ConfigurationError) as caught:
        settings_for(five, model, **{f"base_{option}": value})
    assert message in str(caught.value) and caught.value.why and caught.value.do
    with pytest.raises(ConfigurationError, match=option):
        settings_for(five, "Pop", models=[model], models_options={option: value})


@pytest.mark.parametrize(
    ("changes", "readers"),
    [
        ({"base_model": "PairCounts", "base_text_weight": 6}, set()),
        ({"base_model": "TextEASE"}, {"base_model_TextEASE", "candidates"}),
        ({"base_model": "TextNeighbours", "models": ["TextSASRec"]}, {"TextSASRec"}),
        (
            {"base_model": "TextNeighbours", "base_representation": "embedding"},
            {"base_model_TextNeighbours", "candidates"},
        ),
        (
            {"base_model": "Pop", "models": ["TextNeighbours"], "models_options": {"representation": "embedding"}},
            {"TextNeighbours"},
        ),
        (
            {
                "base_model": "TextNeighbours",
                "models": ["TextNeighbours"],
                "models_options": {"representation": "embedding"},
            },
            {"TextNeighbours"},
        ),
    ],
)
def test_stages_read_embeddings_only_if_their_model_does(tiny_settings, tmp_path, changes, readers):
    settings = tiny_settings(tmp_path, **changes)
    planned = pipeline.plan(settings, Data(settings))
    needs = {entry.stage.name: set(entry.needs) for entry in planned}
    recommenders = (f"base_model_{changes['base_model']}", "candidates", *changes.get("models", ()))
    assert {name for name in recommenders if "embeddings" in needs[name]} == readers
    assert not any("tokenizer" in needs[name] for name in recommenders)


@pytest.mark.slow
@pytest.mark.parametrize("model", OPTIONS)
def test_the_stages_train_and_load_each_model(tiny_run, tmp_path, model):
    """The data set has a rule that all four models can learn in part."""
    others = [name for name in OPTIONS if name != model]
    short = {"epochs": 2, "eval_step": 1}
    run = tiny_run(tmp_path, ["candidates", *others], base_model=model, models=others, models_options=short)
    assert 0.1 < run.records["candidates"].summary["stats"]["test"]["recall@5"] <= 1
    assert run.records[f"base_model_{model}"].summary["hold_out"]["hold_out"] is True
    assert all(run.records[name].summary["model"] == name for name in others)


@pytest.mark.parametrize("share, rounded", [(0.5, 0.5), (0.2, 51 / 256)])
def test_fast_dropout_drops_a_share_and_keeps_the_mean(share, rounded):
    values = torch.full((301, 333), 2.0, requires_grad=True)
    dropout = Dropout(share)
    torch.manual_seed(0)
    dropped = dropout(values)
    kept = dropped > 0
    assert (~kept).float().mean().item() == pytest.approx(rounded, abs=0.005)
    assert dropped[kept].unique().tolist() == pytest.approx([2 / (1 - rounded)])
    (grad,) = torch.autograd.grad(dropped.sum(), values)
    assert torch.equal(grad > 0, kept)
    for line in (kept.float().mean(0), kept.float().mean(1)):  # No row, column or byte of a word is special.
        assert abs(line - (1 - rounded)).max() < 0.15
    torch.manual_seed(0)
    assert torch.equal(dropout(values), dropped) and not torch.equal(dropout(values), dropped)
    assert torch.equal(dropout.eval()(values), values)
