"""The evaluation: rankings, features and examples agree with the tables."""

from dataclasses import replace

import numpy as np
import pytest

from recbole_gr2.artifacts import load_requests, read_answers, read_embeddings, read_feature_names, read_per_user
from recbole_gr2.catalog import Catalog
from recbole_gr2.config import load_settings
from recbole_gr2.features.extraction import TrainingData, extract_features
from recbole_gr2.inspection import examples
from recbole_gr2.lists import reported_requests, training_histories
from recbole_gr2.sid.tokens import sid_text
from recbole_gr2.types import Answer, Candidate, Item, Request


@pytest.mark.parametrize("method", load_settings(config_dict={"preset": "smoke"})["eval_rows"])
def test_rankings_are_those_of_the_tables(finished, method):
    answers = read_answers(finished.folders[f"rerank_{method}"], finished.data.catalog)
    _, hits = reported_requests(finished.context())
    assert len(answers) == len(hits)
    assert all(sorted(answers[r.request_id].ranking) == sorted(r.items) for r in hits)
    table = read_per_user(finished.folders["evaluate"]).set_index("user")[method]
    assert {r.user_token: answers[r.request_id].ranking.index(r.target) + 1 for r in hits} == table.to_dict()


def test_features_belong_to_their_requests(finished):
    """Features of a request that was read equal those that are computed again, in another order of the requests."""
    context = finished.context()
    requests = load_requests(context, "test")[:50][::-1]
    assert [len(r.features.candidates) for r in requests] == [len(r.items) for r in requests]
    assert [r.features.pairs.shape[:2] for r in requests] == [(len(r.items), min(len(r.history), 10)) for r in requests]
    training = TrainingData(
        catalog=finished.data.catalog,
        sequences=training_histories(finished.data, hold_out=False),
        embeddings=read_embeddings(finished.folders["embeddings"]),
    )
    names, again = extract_features(requests, finished.settings["prior_features"], training)
    assert names == read_feature_names(finished.folders["prior"])
    for request, features in zip(requests, again, strict=True):
        assert np.array_equal(request.features.candidates, features.candidates)
        assert np.array_equal(request.features.pairs, features.pairs)
        assert features.candidates[:, names.index("rank")].tolist() == list(range(1, len(request.items) + 1))
    train = load_requests(context, "train")
    assert all((r.features is not None) == bool(r.prior) == r.has_signal for r in train)


def test_examples_show_where_the_target_went():
    """Up from 3 to 1, up from 2 to 1, unmoved, down from 1 to 2: a list that did not move is left out."""
    catalog = Catalog(
        Item(item_id=n, token=f"t{n}", title=f"Thing {n}", categories=f"Root > Kind{n % 3}", sid=(n, n + 1))
        for n in range(1, 31)
    )
    moves = {"a": (12, (12, 10, 11)), "b": (11, (11, 10, 12)), "c": (10, (10, 12, 11)), "d": (10, (11, 10, 12))}
    candidates = tuple(Candidate(item_id=i, score=-float(r), rank=r) for r, i in enumerate((10, 11, 12), start=1))
    request = Request(
        request_id="",
        user_token="u",
        split="test",
        history=(1, 2, 3),
        candidates=candidates,
        target=1,
        provider="p",
    )
    requests = [replace(request, request_id=name, target=target) for name, (target, _) in moves.items()]
    reasoning = f" Best is {sid_text((12, 13))}, {sid_text((99, 99))}"
    answers = {
        name: Answer(request_id=name, ranking=ranking, reasoning=reasoning) for name, (_, ranking) in moves.items()
    }
    text = examples(requests, "rl", answers, catalog, 2)
    assert [line for line in text.splitlines() if "the target moved" in line] == [
        "a: the target moved from rank 3 to 1. History:",
        "b: the target moved from rank 2 to 1. History:",
        "d: the target moved from rank 1 to 2. History:",
    ]
    first = text.split("b: the target")[0].splitlines()
    assert "- Thing 1 (Kind1)" not in first and "- Thing 2 (Kind2)" in first and "- Thing 3 (Kind0)" in first
    table = [line.split() for line in first if line.endswith("(Kind0)") and "Thing 12" in line]
    assert table == [["3", "1", "target", "Thing", "12", "(Kind0)"]]
    assert f"> Best is [Thing 12], {sid_text((99, 99))}" in first  # an ID of no item stays as it is
