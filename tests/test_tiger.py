"""TIGER: what its encoder reads, its loss and scores against plain forwards, ties, and that it learns."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_gr2 import pipeline
from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.evaluator import collect, depth_of, evaluate_methods, joined, recommend
from recbole_gr2.bridge.models import BaseModel
from recbole_gr2.config import load_settings, recbole_config
from recbole_gr2.llm.beam import UNREACHED
from recbole_gr2.model.tiger import TIGER, TRAIN_SLICE
from recbole_gr2.stages import base_model
from recbole_gr2.stages.candidates import base_models, top_candidates
from recbole_gr2.types import Context

ITEMS, LEVELS, CODES = 24, 3, 4
TINY = {
    "preset": "smoke",
    "dataset": "planted",
    "base_model": "TIGER",
    "metrics": ["Recall", "NDCG"],
    "topk": [1, 2, 10],
    "base_n_layers": 1,
    "base_n_heads": 2,
    "base_head_size": 16,
    "base_hidden_size": 32,
    "base_inner_size": 64,
    "base_dropout_prob": 0.0,
    "base_n_user_tokens": 7,
    "base_max_history": 4,
    "base_train_batch_size": 32,
    "base_learning_rate": 0.003,
    "base_epochs": 30,
    "base_eval_step": 10,
    "cand_beams": 1000,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """120 users, each with 7 items in a row of one cycle through all items: the next item is known from the last."""
    root, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    cycle = rng.permutation(ITEMS)
    lines = [f"{user}\t{cycle[(user + time) % ITEMS]}\t{time}" for user in range(120) for time in range(7)]
    (root / "planted").mkdir()
    head = "user_id:token\titem_id:token\ttimestamp:float"
    (root / "planted" / "planted.inter").write_text("\n".join([head, *lines]) + "\n")
    texts = [f"{item}\tThing {item}" for item in range(ITEMS)]
    (root / "planted" / "planted.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *texts]) + "\n")
    return root


@pytest.fixture(scope="module")
def data(folder) -> Data:
    return Data(chosen(folder))


@pytest.fixture(scope="module")
def distinct() -> np.ndarray:
    """One SID an item, 24 of 64."""
    chosen = np.random.default_rng(1).permutation(CODES**LEVELS)[:ITEMS]
    return np.stack(np.unravel_index(chosen, (CODES,) * LEVELS), axis=1)


def chosen(folder: Path, **changes):
    return load_settings(config_dict={**TINY, "data_path": str(folder), "checkpoint_dir": str(folder), **changes})


def untaught(data: Data, sids: np.ndarray, **words) -> TIGER:
    """A model with random weights, far from uniform, and without rounding to bf16."""
    torch.manual_seed(0)
    beams = words.pop("cand_beams", 1000)
    model = TIGER(recbole_config(data.settings, TIGER, sids=sids, cand_beams=beams, **words), data.built[0]).eval()
    model.bf16 = False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def written(model: TIGER, row, item: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (1, L, V) of an item's codes after one row, by T5's own teacher forcing, without padding; and codes."""
    tokens = model.inputs(row)
    tokens = tokens[:, tokens[0] != 0]
    codes = model.item_tokens[torch.tensor([item])]
    with torch.no_grad():
        return model.t5(input_ids=tokens, labels=codes).logits, codes


def mixed_rows(data: Data, count: int):
    """Training rows with histories of 1 to 4 items, more than one slice of them."""
    feat = data.built[0].inter_feat
    return feat[torch.randperm(len(feat), generator=torch.Generator().manual_seed(0))[:count]]


def test_the_encoder_reads_the_user_and_the_last_items(data, distinct):
    model, row = untaught(data, distinct), data.rows("test")[0][:1]
    user = int(row[data.uid])
    history = data.history(user, "test")
    assert len(history) == 6
    codes = [1 + level * CODES + code for item in history[-4:] for level, code in enumerate(distinct[item - 1])]
    assert model.inputs(row).tolist() == [[1 + LEVELS * CODES + user % 7, *codes]]
    first = data.built[0].inter_feat[:1]  # one item of history
    assert int(first["item_length"]) == 1
    item = int(first["item_id_list"][0, 0])
    alone = [1 + level * CODES + code for level, code in enumerate(distinct[item - 1])]
    assert untaught(data, distinct, n_user_tokens=0).inputs(first).tolist() == [alone + [0] * 9]


def test_the_loss_is_the_mean_over_rows_and_codes(data, distinct):
    model, rows = untaught(data, distinct), mixed_rows(data, TRAIN_SLICE + 11)
    losses = []
    for number in range(len(rows)):
        row = rows[number : number + 1]
        logits, codes = written(model, row, int(row[data.iid]))
        losses.append(torch.nn.functional.cross_entropy(logits[0], codes[0]))
    assert len({int(length) for length in rows["item_length"]}) > 2
    torch.testing.assert_close(model.calculate_loss(rows), torch.stack(losses).mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("users", [0, 7])
def test_scores_are_the_log_probabilities_of_all_items(data, distinct, users):
    model, rows = untaught(data, distinct, n_user_tokens=users), mixed_rows(data, 5)
    scores = model.full_sort_predict(rows)
    assert scores.shape == (5, ITEMS + 1) and (scores[:, 0] == -torch.inf).all()
    for number, row in enumerate(scores):
        for item in range(1, ITEMS + 1):
            logits, codes = written(model, rows[number : number + 1], item)
            exact = logits.log_softmax(-1).gather(-1, codes.unsqueeze(-1)).sum()
            assert row[item].item() == pytest.approx(exact.item(), abs=1e-4)
    assert len({tuple(row.argsort().tolist()) for row in scores}) > 1  # histories matter


def test_neither_the_batch_nor_its_padding_changes_a_score(data, distinct):
    model, rows = untaught(data, distinct, cand_beams=5), mixed_rows(data, 30)
    scores = model.full_sort_predict(rows)
    alone = torch.cat([model.full_sort_predict(rows[n : n + 1]) for n in range(30)])
    torch.testing.assert_close(scores, alone, atol=1e-4, rtol=0)
    assert ((scores[:, 1:] > UNREACHED).sum(1) == 5).all()


def test_items_that_no_beam_names_are_no_candidates(data, distinct):
    model = untaught(data, distinct, cand_beams=3)
    base = BaseModel(name="TIGER", model=model, data=data, exclude_seen=False, metadata={"hold_out": False})
    requests = list(top_candidates(base, "valid", 10))
    assert len(requests) == 120 and {len(request.items) for request in requests} == {3}


def test_a_target_stands_behind_its_ties_and_before_the_next_number(data, distinct):
    below = np.nextafter(np.float32(-1), np.float32(-2))
    scores = torch.tensor([[-torch.inf, below, -1.0, -1.0]], dtype=torch.float32)
    ranks = [
        untaught(data, distinct).break_ties(scores, torch.tensor([t])).argsort(descending=True)[0].tolist().index(t)
        for t in (1, 2, 3)
    ]
    assert ranks == [2, 1, 1]


def trained(folder: Path, place: Path, sids: np.ndarray, **changes) -> BaseModel:
    """As the stages train and load it: the codes come from the tokenizer's folder, by item token."""
    data = Data(chosen(folder, **changes))
    lines = [
        json.dumps({"item_id": item.token, "sid": sid.tolist()}) for item, sid in zip(data.items, sids, strict=True)
    ]
    (place / "sids.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    context = Context(
        stage="base_model_TIGER",
        settings=data.settings,
        data=data,
        folder=place,
        inputs={},
        folders={"tokenizer": place, "base_model_TIGER": place},
        say=print,
    )
    (stage,) = base_model.stages(data.settings)
    stage.run(context)
    return base_models(context)[0]["base"]


def metrics_of(base: BaseModel, rankings=None, break_ties: bool = True) -> dict[str, float]:
    batches = recommend(base, "test", depth_of(base.data), break_ties=break_ties, check=True)
    scored = joined(batches, len(base.data.rows("test")[0]))
    recommendations = collect(base.data, scored, exclude_seen=base.exclude_seen)
    return evaluate_methods(base.data, recommendations, {"m": rankings}, {"s": None})["m"]["s"]


@pytest.mark.slow
def test_it_learns_a_planted_pattern_and_loads_back(folder, distinct, tmp_path):
    base = trained(folder, tmp_path, distinct)
    assert metrics_of(base)["recall@1"] > 0.9 and base.metadata["epochs"] in (10, 20, 30)
    again = trained(folder, tmp_path, distinct)
    assert again.model is not base.model and again.metadata == base.metadata
    for (users, scores), (others, same) in zip(base.scores("test"), again.scores("test"), strict=True):
        assert users.tolist() == others.tolist() and torch.equal(scores, same)


@pytest.mark.slow
def test_a_shared_sid_is_no_hit(folder, tmp_path):
    """All items have one SID: RecBole's topk would hit some targets by their position, in training's validation too."""
    base = trained(folder, tmp_path, np.zeros((ITEMS, 2), int), base_epochs=1, base_eval_step=1)
    metrics = metrics_of(base)
    assert set(metrics.values()) == {0.0} and set(base.metadata["best_valid"].values()) == {0.0}
    lists = {r.user_token: r.items for r in top_candidates(base, "test", 10)}
    proposed = metrics_of(base, break_ties=False)
    assert metrics_of(base, lists, break_ties=False) == proposed  # lists keep the order in which they were proposed
    first = torch.cat([scores for _, scores in base.scores("test")]).topk(10).indices
    assert (first == base.data.rows("test")[0][base.data.iid].unsqueeze(1)).any() and proposed["recall@10"] > 0


@pytest.mark.parametrize(
    ("base", "models", "reads"),
    [
        ("TIGER", [], {"candidates"}),
        ("Pop", ["TIGER", "BPR"], {"TIGER"}),
        ("Pop", ["BPR"], set()),
    ],
)
def test_the_stage_that_trains_it_needs_the_tokenizer(folder, data, base, models, reads):
    words = {"preset": "smoke", "dataset": "planted", "data_path": str(folder), "checkpoint_dir": str(folder)}
    settings = load_settings(config_dict={**words, "sid_codes": 8, "base_model": base, "models": models})
    planned = pipeline.plan(settings, data)
    needs = {entry.stage.name: set(entry.needs) for entry in planned}
    assert {name for name in ("candidates", *models) if "tokenizer" in needs[name]} == reads
    assert not any("midtrain" in needs[name] for name in ("candidates", *models))
