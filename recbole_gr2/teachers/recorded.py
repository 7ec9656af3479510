"""Traces from a file as a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.ranking import complete
from recbole_gr2.store import numbered_lines
from recbole_gr2.teachers.base import TeacherReply
from recbole_gr2.types import Request


class RecordedTeacher:
    """Reads traces that were written elsewhere, such as accepted.jsonl of another run.

    The file contains JSON lines with `request_id`, `reasoning` and `ranking`, a list of item tokens. The n-th line of a
    request is its n-th attempt. Candidates that a line does not rank follow in the order of the prior. A line whose
    first item is not a candidate is rejected, since it belongs to another list. A request without a line gets an empty
    reasoning, which the traces stage rejects.

    Args:
        catalog: the items.
        settings: settings of the run. The teacher reads trace_file, the path of the file.
        seed: not used.

    Raises:
        ConfigurationError: trace_file is not set.
        MissingFileError: the file does not exist.
        GR2Error: a line lacks a field, or ranks an item that is not in the catalogue.
    """

    name = "recorded"

    def __init__(self, *, catalog: Catalog, settings: Mapping[str, Any], seed: int) -> None:
        path = settings["trace_file"]
        if path is None:
            raise ConfigurationError(
                "the recorded teacher needs a file", where="trace_file", do="set trace_file to a file of JSON lines"
            )
        if not Path(path).is_file():
            raise MissingFileError(f"the file {path} does not exist", where="trace_file", do="check the path")
        self.replies: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for number, line in numbered_lines(Path(path)):
            try:
                if not isinstance(line["reasoning"], str) or not isinstance(line["ranking"], list):
                    raise TypeError("reasoning has to be a text, and ranking a list")
                reply = (line["reasoning"], catalog.ids(line["ranking"]))
                self.replies.setdefault(line["request_id"], []).append(reply)
            except (KeyError, TypeError) as error:
                raise GR2Error(
                    f"the line cannot be read: {error!r}",
                    where=f"{path}:{number}",
                    why="a field is missing, or an item is not in the catalogue",
                    do="give request_id, reasoning and ranking, a list of item tokens",
                ) from error

    def argue(self, requests: Sequence[Request], *, targeted: bool, attempt: int) -> list[TeacherReply]:
        """Reply to each request, see `Teacher.argue`."""
        return [self._argue(request, attempt) for request in requests]

    def _argue(self, request: Request, attempt: int) -> TeacherReply:
        replies = self.replies.get(request.request_id, [])
        reasoning, ranking = replies[attempt] if attempt < len(replies) else ("", request.by_prior)
        if not ranking or ranking[0] not in request.items:
            return TeacherReply(reasoning=reasoning, ranking=(), problem="the first item of the line is no candidate")
        return TeacherReply(reasoning=reasoning, ranking=complete(ranking, request.by_prior))
