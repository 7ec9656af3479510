"""Requests on disk: the candidate lists of every split, portable as JSON lines.

One line a request: `request_id, user_id, split, history, target, candidates, scores, provider`, and `grades` in train
lists with several targets or graded ones; all ids are tokens of the data files, so that lists can be exchanged with
other tools. `candidate_item_ids` is read as another name of
`candidates`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.store import read_lines, write_lines
from recbole_gr2.types import Candidate, Item, Request


def request_id(split: str, user_token: str) -> str:
    """Leave-one-out has one row a user and split, so this names it."""
    return f"{split}/{user_token}"


def write_requests(file: Path, requests: Iterable[Request], items: Sequence[Item]) -> int:
    """Write requests; returns their number."""

    def token(item_id: int) -> str:
        return items[item_id - 1].token

    return write_lines(
        file,
        (
            {
                "request_id": r.request_id,
                "user_id": r.user_token,
                "split": r.split,
                "history": [token(i) for i in r.history],
                "target": token(r.target),
                "candidates": [token(c.item_id) for c in r.candidates],
                "scores": [c.score for c in r.candidates],
                "provider": r.provider,
                **({"grades": list(r.grades)} if r.grades else {}),
            }
            for r in requests
        ),
    )


def read_requests(file: Path, items: Sequence[Item]) -> list[Request]:
    """Read requests back.

    Raises:
        ConfigurationError: an item that the data set does not have, a repeated candidate or request; says which line.
    """
    ids = {item.token: item.item_id for item in items}
    requests: dict[str, Request] = {}
    for number, line in enumerate(read_lines(file), start=1):
        where = f"{file}:{number}"
        try:
            candidates = line["candidates"] if "candidates" in line else line["candidate_item_ids"]
            name = line.get("request_id") or request_id(line["split"], str(line["user_id"]))
            scores = line.get("scores") or [float(-rank) for rank in range(len(candidates))]
            request = Request(
                request_id=name,
                user_token=str(line["user_id"]),
                split=line["split"],
                history=tuple(ids[token] for token in line["history"]),
                target=ids[line["target"]],
                candidates=tuple(
                    Candidate(item_id=ids[token], score=score, rank=rank)
                    for rank, (token, score) in enumerate(zip(candidates, scores, strict=True), start=1)
                ),
                provider=line.get("provider", file.name),
                grades=tuple(line.get("grades", ())),
            )
            if request.grades and (
                len(request.grades) != len(request.items)
                or request.split != "train"
                or not all(isinstance(grade, int) and grade >= 0 for grade in request.grades)
            ):
                raise ValueError("grades are whole numbers from 0, one for each candidate of a train list")

        except (KeyError, TypeError, ValueError) as error:  # ValueError: as many scores as candidates
            raise ConfigurationError(
                f"unknown item, missing or unreadable field: {error}",
                where=where,
                do="use item tokens of this data set and the fields user_id, split, history, target, candidates",
            ) from error
        if len(set(request.items)) < len(request.items) or name in requests:
            raise ConfigurationError("a candidate or a request is named twice", where=where, do="remove the second")
        requests[name] = request
    return list(requests.values())
