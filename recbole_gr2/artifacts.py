"""The files that stages exchange: one function that writes and one that reads each of them.

Files contain item tokens of the data files, never internal ids, so that other tools can read and write them.

| file | stage | content |
|---|---|---|
| `embeddings.npy` | embeddings | text embedding of every item, (N, D) float32 |
| `sids.jsonl` | tokenizer | semantic ID of every item |
| `<split>.jsonl` | candidates, prior | candidate lists; those of the prior stage have the prior |
| `recommendations.npz` | candidates, validation, recommenders | the first items of the catalogue for every user |
| `<base model>.npz` | candidates, validation | the same of each base model alone, if there are several |
| `features.json`, `features-<split>.npy`, `pairs-<split>.npy` | prior | features of the candidate lists |
| `accepted.jsonl`, `rejected.jsonl` | traces | reasoning traces |
| `rankings.jsonl` | rerank | the answers of a re-ranker |
| `per_user.csv` | evaluate | the rank of the target under every method |
| `log.json` | stages that train a language model | what training logged |
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.store import numbered_lines, read_lines, write_json, write_lines
from recbole_gr2.types import (
    Answer,
    Candidate,
    CandidateFeatures,
    Context,
    Recommendations,
    Request,
    SourceScores,
    Trace,
)

SPLITS = ("train", "valid", "test")


def request_id(split: str, user_token: str) -> str:
    """Return the name of a request. A user has one request per split; `train-2` is a split of its own, see `Data`."""
    return f"{split}/{user_token}"


# --- catalogue -------------------------------------------------------------------------------------------------------


def write_embeddings(folder: Path, embeddings: np.ndarray) -> None:
    """Write the text embeddings of all items, (N, D) float32, in the order of the internal ids."""
    np.save(folder / "embeddings.npy", embeddings)


def read_embeddings(folder: Path, *, mapped: bool = False) -> np.ndarray:
    """Read the text embeddings of all items, (N, D) float32.

    Args:
        folder: folder of the stage `embeddings`.
        mapped: whether to leave them in the file, read-only, until they are used.
    """
    return np.load(folder / "embeddings.npy", mmap_mode="r" if mapped else None, allow_pickle=False)


def write_sids(folder: Path, catalog: Catalog, codes: np.ndarray) -> None:
    """Write the semantic IDs of all items, (N, L), in the order of the internal ids."""
    write_lines(
        folder / "sids.jsonl",
        ({"item_id": item.token, "sid": [int(c) for c in row]} for item, row in zip(catalog, codes, strict=True)),
    )


def read_catalog(folder: Path, catalog: Catalog) -> Catalog:
    """Return the catalogue with the semantic IDs that the tokenizer stage wrote."""
    return catalog.with_sids({line["item_id"]: tuple(line["sid"]) for line in read_lines(folder / "sids.jsonl")})


def load_catalog(context: Context) -> Catalog:
    """Return the catalogue, with semantic IDs if the stage needs the tokenizer stage."""
    folder = context.folders.get("tokenizer")
    return context.data.catalog if folder is None else _cached_catalog(folder, context.data.catalog)


@lru_cache(maxsize=2)
def _cached_catalog(folder: Path, catalog: Catalog) -> Catalog:
    return read_catalog(folder, catalog)


# --- candidate lists -------------------------------------------------------------------------------------------------


def write_requests(file: Path, requests: Iterable[Request], catalog: Catalog) -> int:
    """Write candidate lists as JSON lines and return their number.

    The fields are `request_id, user_id, split, history, target, candidates, scores, provider`; `grades` in train lists
    with several or graded targets; `times` of the history; `sources`, ranks and scores by each base model, if there are
    several; `log_prior` after the prior stage, and `ranker`, scores of LambdaMART, if it selects the candidates.
    """
    return write_lines(file, (_request_record(request, catalog) for request in requests))


def _request_record(request: Request, catalog: Catalog) -> dict[str, Any]:
    record: dict[str, Any] = {
        "request_id": request.request_id,
        "user_id": request.user_token,
        "split": request.split,
        "history": catalog.tokens(request.history),
        "target": catalog.item(request.target).token,
        "candidates": catalog.tokens(request.items),
        "scores": [candidate.score for candidate in request.candidates],
        "provider": request.provider,
    }
    if request.times:
        record["times"] = request.times
    if request.sources:
        record["sources"] = {name: {"ranks": ranks, "scores": scores} for name, ranks, scores in request.sources}
    if request.grades:
        record["grades"] = request.grades
    if request.prior:
        record["log_prior"] = request.prior
    if request.ranker:
        record["ranker"] = request.ranker
    return record


def read_requests(file: Path, catalog: Catalog) -> list[Request]:
    """Read candidate lists.

    `candidate_item_ids` is read as another name of `candidates`. Without `scores` the candidates get descending ones.

    Raises:
        ConfigurationError: an item is not in the data set, a field is missing or unreadable, or a candidate or a
            request occurs twice. The error names the line.
        GR2Error: a line is not JSON.
    """
    return [request for _, request in numbered_requests(file, catalog)]


def numbered_requests(
    file: Path, catalog: Catalog, users: Collection[str] | None = None
) -> Iterator[tuple[int, Request]]:
    """Yield the number of the line, from 1, and the request of each candidate list, see `read_requests`.

    Args:
        file: the candidate lists.
        catalog: the catalogue.
        users: tokens of the users whose lists are read; by default all.
    """
    names: set[str | tuple[str, str, int]] = set()
    for number, line in numbered_lines(file):
        where = f"{file}:{number}"
        if users is not None and isinstance(line, dict) and str(line.get("user_id")) not in users:
            continue
        try:
            request = _read_request(line, catalog, file.name)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigurationError(
                f"unknown item, missing or unreadable field: {error}",
                where=where,
                do="use item tokens of this data set and the fields user_id, split, history, target, candidates",
            ) from error
        row = request.split, request.user_token, len(request.history)
        if len(set(request.items)) < len(request.items) or request.request_id in names or row in names:
            raise ConfigurationError(
                "a candidate or a request occurs twice", where=where, do="remove the second occurrence"
            )
        names |= {request.request_id, row}
        yield number, request


def _read_request(line: Any, catalog: Catalog, provider: str) -> Request:
    """The request of a line.

    Raises:
        KeyError: a field is missing, or an item is not in the data set.
        TypeError, ValueError, OverflowError: a value is of the wrong type, or a number is not finite.
    """
    if not isinstance(line, dict):
        raise TypeError("a line has to be a JSON object")
    tokens = line["candidates"] if "candidates" in line else line["candidate_item_ids"]
    user, name = line["user_id"], line.get("request_id")
    for field, value, kind in (
        ("candidates", tokens, list),
        ("history", line["history"], list),
        ("split", line["split"], str),
        ("provider", line.get("provider", provider), str),
        ("request_id", name or "", str),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{field} has to be a {'list' if kind is list else 'text'}")
    if type(user) not in (str, int):
        raise TypeError("user_id has to be a text")
    items = catalog.ids(tokens)
    scores = line.get("scores") or [float(-rank) for rank in range(len(items))]
    if not _all_finite(scores):
        raise TypeError("scores have to be finite numbers")
    if len(scores) != len(items):
        raise ValueError("scores must have one number for each candidate")
    request = Request(
        request_id=name or request_id(line["split"], str(user)),
        user_token=str(user),
        split=line["split"],
        history=catalog.ids(line["history"]),
        target=catalog.id_of[line["target"]],
        candidates=tuple(map(Candidate, items, map(float, scores), range(1, len(items) + 1))),
        provider=line.get("provider", provider),
        sources=_read_sources(line.get("sources", {}), len(items)),
        prior=tuple(line.get("log_prior", ())),
        grades=tuple(line.get("grades", ())),
        times=tuple(line.get("times", ())),
        ranker=tuple(line.get("ranker", ())),
    )
    if not _all_finite(request.times):
        raise ValueError("times have to be finite numbers")
    if request.grades and (
        len(request.grades) != len(request.items)
        or request.split != "train"
        or not all(isinstance(grade, int) and grade >= 0 for grade in request.grades)
    ):
        raise ValueError("grades have to be integers of at least 0, one for each candidate of a train list")
    return request


def _all_finite(values: Sequence[Any]) -> bool:
    """Whether all values are finite numbers. Truth values are none."""
    return set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))


def _read_sources(sources: Any, count: int) -> tuple[SourceScores, ...]:
    """The field `sources` of a line whose list has `count` candidates. Raises a ValueError if it has another form."""
    read = []
    for name, values in dict(sources).items():
        ranks, scores = values["ranks"], values["scores"]
        if not (set(map(type, ranks)) <= {int} and min(ranks, default=1) >= 1 and _all_finite(scores)):
            raise ValueError("ranks have to be integers of at least 1, and scores finite numbers")
        if not len(ranks) == len(scores) == count:
            raise ValueError("each of sources has one rank and one score for each candidate")
        read.append(SourceScores(str(name), tuple(ranks), tuple(map(float, scores))))
    return tuple(read)


def write_recommendations(folder: Path, recommendations: Recommendations, name: str = "recommendations") -> None:
    """Write the recommendations of a split to <name>.npz."""
    temporary = folder / f".{name}.npz.tmp"
    with open(temporary, "wb") as handle:
        np.savez_compressed(
            handle,
            users=np.array(recommendations.users, dtype=str),
            items=recommendations.items,
            target_rank=recommendations.target_rank,
            exclude_seen=np.array(recommendations.exclude_seen),
        )
    os.replace(temporary, folder / f"{name}.npz")


def read_recommendations(folder: Path, name: str = "recommendations") -> Recommendations:
    """Read the recommendations of a split from <name>.npz."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
        return Recommendations(
            users=tuple(arrays["users"].tolist()),
            items=arrays["items"],
            target_rank=arrays["target_rank"],
            exclude_seen=bool(arrays["exclude_seen"]),
        )


# --- features --------------------------------------------------------------------------------------------------------


def write_features(folder: Path, split: str, features: Iterable[CandidateFeatures]) -> int:
    """Write the features of the requests of a split, in their order, and return the number of requests.

    The arrays of all lists follow one another.
    """
    lists = rows = 0
    with (
        open(folder / f"features-{split}.npy", "wb") as of_candidates,
        open(folder / f"pairs-{split}.npy", "wb") as of_pairs,
    ):
        for each in features:
            parts = (of_candidates, each.candidates), (of_pairs, each.padded)
            for handle, array in parts:
                if not lists:
                    np.lib.format.write_array_header_1_0(handle, _header(array, rows))
                handle.write(array.tobytes())
            lists, rows = lists + 1, rows + len(each.candidates)
        for handle, array in parts if lists else ():
            handle.seek(0)  # The header has space for a larger number of rows.
            np.lib.format.write_array_header_1_0(handle, _header(array, rows))
    return lists


def _header(array: np.ndarray, rows: int) -> dict[str, Any]:
    """The header of a .npy file with this number of rows like those of an array."""
    descr = np.lib.format.dtype_to_descr(array.dtype)
    return {"descr": descr, "fortran_order": False, "shape": (rows, *array.shape[1:])}


def write_feature_names(folder: Path, names: Sequence[str]) -> None:
    """Write the names of the candidate features."""
    write_json(folder / "features.json", list(names))


def read_feature_names(folder: Path) -> list[str]:
    """Read the names of the candidate features; [] without features."""
    file = folder / "features.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def load_requests(context: Context, split: str) -> list[Request]:
    """Return the requests of a split with their prior and features, as the prior stage wrote them.

    Train requests without a training signal have neither prior nor features.
    """
    return list(read_prior(context.folders["prior"], split, context.data.catalog))


class StoredFeatures:
    """The features of the requests of a split, read from the disk one after another in the order of `write_features`.

    Args:
        folder: folder of a prior stage.
        split: name of the split.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.features = np.load(folder / f"features-{split}.npy", mmap_mode="r", allow_pickle=False)
        self.pairs = np.load(folder / f"pairs-{split}.npy", mmap_mode="r", allow_pickle=False)
        self.end = 0

    def next(self, request: Request) -> CandidateFeatures:
        """Return the features of the next request."""
        start, self.end = self.end, self.end + len(request.items)
        pairs = self.pairs[start : self.end, : len(request.history)]
        return CandidateFeatures(self.features[start : self.end], pairs)


@lru_cache(maxsize=6)
def read_prior(folder: Path, split: str, catalog: Catalog) -> tuple[Request, ...]:
    """Return the requests in the folder of a finished prior stage. They are parsed once per process."""
    requests = read_requests(folder / f"{split}.jsonl", catalog)
    if not (folder / f"features-{split}.npy").is_file():
        return tuple(requests)
    stored = StoredFeatures(folder, split)
    return tuple(replace(request, features=stored.next(request)) if request.prior else request for request in requests)


# --- traces and answers ----------------------------------------------------------------------------------------------


def write_traces(file: Path, traces: Iterable[Trace], catalog: Catalog) -> int:
    """Write reasoning traces as JSON lines and return their number."""
    return write_lines(file, ({**asdict(trace), "ranking": catalog.tokens(trace.ranking)} for trace in traces))


def read_traces(file: Path, catalog: Catalog) -> dict[str, Trace]:
    """Read reasoning traces by request id."""
    return {line["request_id"]: Trace(**{**line, "ranking": catalog.ids(line["ranking"])}) for line in read_lines(file)}


def write_answers(folder: Path, answers: Iterable[Answer], catalog: Catalog) -> int:
    """Write the answers of a re-ranker to rankings.jsonl and return their number."""
    return write_lines(
        folder / "rankings.jsonl",
        (
            {
                "request_id": answer.request_id,
                "ranking": catalog.tokens(answer.ranking),
                "status": answer.status,
                "reasoning": answer.reasoning,
                "output_tokens": answer.output_tokens,
            }
            for answer in answers
        ),
    )


def read_answers(folder: Path, catalog: Catalog) -> dict[str, Answer]:
    """Read the answers of a re-ranker by request id."""
    return {
        line["request_id"]: Answer(**{**line, "ranking": catalog.ids(line["ranking"])})
        for line in read_lines(folder / "rankings.jsonl")
    }


# --- evaluation ------------------------------------------------------------------------------------------------------


def write_per_user(folder: Path, frame: pd.DataFrame) -> None:
    """Write per_user.csv: one line for each hit user.

    Args:
        frame: `user`, `history` (number of items), `popularity` (training interactions of the target), and for every
            method the rank of the target, from 1.
    """
    frame.to_csv(folder / "per_user.csv", index=False)


def read_per_user(folder: Path) -> pd.DataFrame:
    """Read per_user.csv of an evaluate stage."""
    return pd.read_csv(folder / "per_user.csv", dtype={"user": str})
