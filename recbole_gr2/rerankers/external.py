"""The user's own methods: a class, a function, or a file with rankings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.plugins import calling
from recbole_gr2.ranking import complete
from recbole_gr2.rerankers.base import ALL, Reranker
from recbole_gr2.store import numbered_lines
from recbole_gr2.types import Answer, Request

FILE = "file:"  # start of an entry of `eval_rows` that names a file with rankings


def from_function(name: str, function: Callable[..., Sequence[int]]) -> type[Reranker]:
    """Return a re-ranker that calls `function(request, catalog)` for each request.

    Args:
        name: name of the method.
        function: returns the candidates of a request as item ids, best first.
    """

    class FunctionReranker(Reranker):
        def rank(self, requests: Sequence[Request]) -> list[Sequence[int]]:
            rankings = []
            for request in requests:
                with calling(name, where=f"request {request.request_id}"):
                    rankings.append(function(request, self.catalog))
            return rankings

    FunctionReranker.name = name
    FunctionReranker.description = f"the user's function {name}"
    FunctionReranker.compare_with = (ALL,)
    return FunctionReranker


def from_file(name: str, file: Path) -> type[Reranker]:
    """Return a re-ranker that reads rankings from a file, see `read_rankings`.

    Candidates that the file does not rank follow in base order. `summary` counts such answers by status, and the items
    of the file that are not candidates.
    """

    class FileReranker(Reranker):
        windowed = False

        def rank(self, requests: Sequence[Request]) -> list[Answer]:
            rankings = read_rankings(file)
            answers = [_answer(request, rankings, self.catalog.id_of) for request in requests]
            statuses = {status: sum(a.status == status for a in answers) for status in ("ok", "repaired", "unreadable")}
            if statuses["unreadable"] == len(answers):
                raise ConfigurationError(
                    "the file ranks no candidate of any request",
                    where=f"eval_rows: file:{file}",
                    why="all lists would keep the base order",
                    do="use the user ids or request ids and the item ids of the data files, for example "
                    f"{requests[0].user_token!r} and {self.catalog.item(requests[0].items[0]).token!r}",
                )
            self.summary = {"statuses": statuses, "foreign": sum(answer.foreign for answer in answers)}
            return answers

    FileReranker.name = name
    FileReranker.description = f"rankings of the file {file.name}"
    FileReranker.compare_with = (ALL,)
    return FileReranker


def _answer(request: Request, rankings: Mapping[str, Sequence[str]], id_of: Mapping[str, int]) -> Answer:
    """The file's ranking of a request as a permutation of its candidates."""
    tokens = rankings.get(request.request_id, rankings.get(request.user_token, ()))
    items = [id_of.get(token, 0) for token in tokens]
    ranked = [item for item in dict.fromkeys(items) if item in request.items]
    missing = len(request.items) - len(ranked)
    return Answer(
        request_id=request.request_id,
        ranking=complete(ranked, request.items),
        status="unreadable" if not ranked else "repaired" if missing else "ok",
        missing=missing,
        repeated=len(items) - len(set(items)),
        foreign=sum(item not in request.items for item in items),
    )


def read_rankings(file: Path) -> dict[str, list[str]]:
    """Read rankings as item tokens, best first, by request id or user token.

    The file has JSON lines with `ranking` and `request_id` or `user_id`, or it is a TREC run file: lines
    `user Q0 item rank score tag`, separated by blanks. The ranks of a TREC run are ignored and its items sorted by
    descending score, as trec_eval does. Items with equal scores keep the order of the file.

    Raises:
        MissingFileError: there is no such file.
        ConfigurationError: a line has another form. The error names the line.
        GR2Error: a line is not JSON, although the first one begins with `{`.
    """
    if not file.is_file():
        raise MissingFileError(f"there is no file {file}", where="eval_rows", do="correct the path after file:")
    with open(file, encoding="utf-8-sig", errors="replace") as handle:
        first = next((line for line in handle if line.strip()), "")
    return _json_rankings(file) if first.lstrip().startswith("{") else _trec_rankings(file)


def _json_rankings(file: Path) -> dict[str, list[str]]:
    rankings: dict[str, list[str]] = {}
    for number, line in numbered_lines(file):
        values = line if isinstance(line, dict) else {}
        name, ranking = values.get("request_id", values.get("user_id")), values.get("ranking")
        if (
            type(name) not in (str, int)
            or not isinstance(ranking, list)
            or any(type(token) not in (str, int) for token in ranking)
            or str(name) in rankings
        ):
            raise ConfigurationError(
                f"the line has no ranking of a new request: {json.dumps(line)[:80]}",
                where=f"{file}:{number}",
                do='write {"user_id": "U1", "ranking": ["I5", "I2"]}, once for each user',
            )
        rankings[str(name)] = [str(token) for token in ranking]
    return rankings


def _trec_rankings(file: Path) -> dict[str, list[str]]:
    scores: dict[str, dict[str, float]] = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            fields: list[Any] = line.decode("utf-8-sig").split()
            user, _, item, _, score, _ = fields
            if math.isnan(float(score)):
                raise ValueError("a score has to be a number, so that items can be sorted by it")
            if item in scores.get(user, {}):
                raise ValueError("an item occurs twice for a user")
            scores.setdefault(user, {})[item] = float(score)
        except ValueError as error:
            shown = line[:80].decode(errors="replace")
            raise ConfigurationError(
                f"the line {shown!r} is not of the form `user Q0 item rank score tag`, or it repeats an item",
                where=f"{file}:{number}",
                do="correct the line, or use JSON lines with user_id and ranking",
            ) from error
    return {user: sorted(items, key=lambda item: -items[item]) for user, items in scores.items()}
