"""The catalogue, and the files of `recbole_gr2.artifacts`: what is read equals what was written."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_gr2.artifacts import (
    load_catalog,
    load_requests,
    read_answers,
    read_feature_names,
    read_per_user,
    read_recommendations,
    read_requests,
    read_traces,
    write_answers,
    write_feature_names,
    write_features,
    write_per_user,
    write_recommendations,
    write_requests,
    write_sids,
    write_traces,
)
from recbole_gr2.catalog import Catalog
from recbole_gr2.testing import synthetic_catalog, synthetic_context, synthetic_request
from recbole_gr2.types import Answer, Item, Recommendations, Trace

TOKENS = st.lists(st.text(min_size=1, max_size=4), unique=True, min_size=1, max_size=12)


def catalog_of(tokens) -> Catalog:
    return Catalog(Item(item_id=n, token=token, title=f"T{n}") for n, token in enumerate(tokens, start=1))


# --- the catalogue ----------------------------------------------------------------------------------------------------


def test_positions_start_at_0_and_ids_at_1():
    catalog = catalog_of("abc")
    assert [item.item_id for item in catalog] == [1, 2, 3] and len(catalog) == 3
    assert catalog[0] is catalog.item(1) and catalog[-1] is catalog.item(3)
    assert catalog[1:] == (catalog.item(2), catalog.item(3)) and catalog.item(2) in catalog


@pytest.mark.parametrize("ids", [[0, 1], [2, 3], [1, 3], [2, 1], [1, 1]])
def test_ids_are_1_to_n_in_order(ids):
    with pytest.raises(ValueError, match="1 to N in order"):
        Catalog(Item(item_id=number, token=str(place), title="") for place, number in enumerate(ids))


@pytest.mark.parametrize("item_id", [0, -1, 4])
def test_padding_and_other_numbers_are_no_items(item_id):
    catalog = catalog_of("abc")
    with pytest.raises(KeyError, match="the ids are 1 to 3"):
        catalog.item(item_id)
    with pytest.raises(KeyError):
        catalog.tokens([1, item_id])


@given(tokens=TOKENS, data=st.data())
def test_tokens_and_ids_are_inverse(tokens, data):
    catalog = catalog_of(tokens)
    some = data.draw(st.lists(st.sampled_from(tokens)))
    assert catalog.tokens(catalog.ids(some)) == tuple(some)
    assert catalog.ids(tokens) == tuple(range(1, len(tokens) + 1))
    assert all(catalog.item(catalog.id_of[token]).token == token for token in tokens)
    with pytest.raises(KeyError):
        catalog.ids(["longer than four"])


@given(tokens=TOKENS, levels=st.integers(1, 4), data=st.data())
def test_semantic_ids_belong_to_tokens(tokens, levels, data):
    codes = st.tuples(*[st.integers(0, 9)] * levels)
    sids = {token: data.draw(codes) for token in data.draw(st.permutations(tokens))}
    plain = catalog_of(tokens)
    catalog = plain.with_sids(sids)
    assert catalog.sids.shape == (len(tokens), levels) and catalog.sids.dtype == np.int64
    assert [tuple(row) for row in catalog.sids.tolist()] == [sids[token] for token in tokens]
    assert [replace(item, sid=()) for item in catalog] == list(plain)  # everything else stays, also in the original
    with pytest.raises(KeyError):
        plain.with_sids({token: sids[token] for token in tokens[1:]})


# --- files ------------------------------------------------------------------------------------------------------------


def test_semantic_ids(tmp_path):
    context = synthetic_context()
    plain = Catalog(replace(item, sid=()) for item in context.data.catalog)
    write_sids(tmp_path, plain, context.data.catalog.sids)
    context.data.catalog = plain
    assert load_catalog(context) is plain  # a stage that does not need the tokenizer gets no semantic IDs
    assert list(load_catalog(replace(context, folders={"tokenizer": tmp_path}))) == list(synthetic_catalog())


def train_requests():
    """Train requests of different lengths. Every second one has neither prior nor features."""
    sizes = [(2, 1), (5, 3), (3, 12), (7, 2), (4, 10), (6, 11)]
    requests = []
    for number, (size, history) in enumerate(sizes):
        used = number % 2 == 1
        request = synthetic_request(
            "train", user=f"user{number}", candidates=size, history=history, prior=used, features=used
        )
        requests.append(replace(request, grades=tuple(range(size)) if number == 3 else ()))
    return requests


def test_requests(tmp_path):
    requests, file = train_requests(), tmp_path / "train.jsonl"
    assert write_requests(file, requests, synthetic_catalog()) == 6
    assert read_requests(file, synthetic_catalog()) == requests
    first = json.loads(file.read_text().splitlines()[0])
    assert first["target"] == synthetic_catalog().item(requests[0].target).token  # tokens, not internal ids
    assert not {"grades", "log_prior"} & set(first)


def test_features_are_joined_with_their_requests(tmp_path):
    """Requests without a prior have no rows in the feature files. They must not shift the rows of later requests."""
    requests = train_requests()
    used = [request for request in requests if request.prior]
    write_requests(tmp_path / "train.jsonl", requests, synthetic_catalog())
    write_features(tmp_path, "train", [request.features for request in used])
    write_feature_names(tmp_path, ["a", "b", "c", "d"])
    joined = load_requests(replace(synthetic_context(), folders={"prior": tmp_path}), "train")
    assert joined == requests and read_feature_names(tmp_path) == ["a", "b", "c", "d"]
    for request, read in zip(requests, joined, strict=True):
        assert (read.features is None) == (request.features is None)
        if request.features is not None:
            assert np.array_equal(read.features.candidates, request.features.candidates)
            assert np.array_equal(read.features.pairs, request.features.pairs)


def test_requests_without_features(tmp_path):
    requests = [replace(request, prior=(), features=None) for request in train_requests()]
    write_requests(tmp_path / "train.jsonl", requests, synthetic_catalog())
    joined = load_requests(replace(synthetic_context(), folders={"prior": tmp_path}), "train")
    assert joined == requests and all(request.features is None for request in joined)
    assert read_feature_names(tmp_path) == []


def test_recommendations(tmp_path):
    items, ranks = np.array([[3, 1], [2, 0]], np.int32), np.array([7, 0], np.int32)
    written = Recommendations(users=("007", "b"), items=items, target_rank=ranks, exclude_seen=True)
    write_recommendations(tmp_path, written)
    read = read_recommendations(tmp_path)
    assert read.users == ("007", "b") and read.exclude_seen is True
    for name in ("items", "target_rank"):
        assert np.array_equal(getattr(read, name), getattr(written, name))
        assert getattr(read, name).dtype == np.int32
    assert [path.name for path in tmp_path.iterdir()] == ["recommendations.npz"]


def test_answers(tmp_path):
    answers = [
        Answer(request_id="test/a", ranking=(3, 1), reasoning="Line\nbreak \u2028 \u00e9", output_tokens=9),
        Answer(request_id="test/b", ranking=(2,), status="unreadable"),
    ]
    assert write_answers(tmp_path, answers, synthetic_catalog()) == 2
    assert read_answers(tmp_path, synthetic_catalog()) == {answer.request_id: answer for answer in answers}


def test_traces(tmp_path):
    common = {"teacher": "t", "mode": "rejection", "reasoning": "So.", "reason": "r"}
    traces = [
        Trace(request_id="train/a", ranking=(5, 4), accepted=True, tries=3, **common),
        Trace(request_id="train/b", ranking=(), accepted=False, **common),
    ]
    assert write_traces(tmp_path / "traces.jsonl", traces, synthetic_catalog()) == 2
    assert read_traces(tmp_path / "traces.jsonl", synthetic_catalog()) == {t.request_id: t for t in traces}


def test_ranks_of_users(tmp_path):
    frame = pd.DataFrame({"user": ["007", "8"], "history": [3, 4], "popularity": [0, 9], "base": [1, 2], "m:x": [2, 1]})
    write_per_user(tmp_path, frame)
    pd.testing.assert_frame_equal(read_per_user(tmp_path), frame)  # "007" stays a string
