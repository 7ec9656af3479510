"""The interface of a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from recbole_gr2.errors import GR2Error
from recbole_gr2.types import Request


@dataclass(frozen=True, kw_only=True)
class TeacherReply:
    """A teacher's reply to one request.

    Attributes:
        reasoning: the reasoning trace. An empty trace is rejected.
        ranking: item ids, best first: a permutation of the request's candidates. () or an incomplete ranking is
            rejected.
    """

    reasoning: str
    ranking: tuple[int, ...]


class Teacher(Protocol):
    """A teacher.

    A teacher is built with the keyword arguments `catalog` (`recbole_gr2.catalog.Catalog`, the items with titles and
    semantic IDs), `settings` (the settings of the run, a mapping) and `seed` (an integer).

    Attributes:
        name: name of the teacher in the traces.

    A teacher may also have an attribute `usage`, a dictionary of counts. The report computes the cost of the traces
    from its keys `prompt_tokens` and `completion_tokens`.
    """

    name: str

    def argue(self, requests: Sequence[Request], *, targeted: bool, attempt: int) -> Sequence[TeacherReply]:
        """Reply to each request, in the order of the requests.

        Args:
            requests: requests that still need a trace. They contain labels only if `targeted` is true.
            targeted: whether the teacher explains the target (targeted sampling), or ranks the candidates without
                labels (rejection sampling: a trace is accepted if its first item is the target).
            attempt: number of the attempt, from 0. Later attempts may give other replies.
        """
        ...


def ask(teacher: Teacher, requests: Sequence[Request], *, targeted: bool, attempt: int) -> list[TeacherReply]:
    """Return one reply of the teacher per request. Without `targeted` the teacher receives no labels.

    Args:
        teacher: the teacher.
        requests: requests with labels.
        targeted: see `Teacher.argue`.
        attempt: see `Teacher.argue`.

    Raises:
        GR2Error: the teacher returns another number of replies, or objects of another type.
    """
    visible = list(requests) if targeted else [request.without_labels() for request in requests]
    replies = list(teacher.argue(visible, targeted=targeted, attempt=attempt))
    if len(replies) != len(requests):
        raise GR2Error(
            f"the teacher returned {len(replies)} replies to {len(requests)} requests",
            where=f"teacher {teacher.name}, attempt {attempt}",
            why="each reply belongs to the request at the same position",
            do="return one TeacherReply per request; leave its ranking empty if there is none",
        )
    for request, reply in zip(requests, replies, strict=True):
        if not isinstance(reply, TeacherReply):
            raise GR2Error(
                f"the teacher returned a {type(reply).__name__} instead of a TeacherReply",
                where=f"teacher {teacher.name}, request {request.request_id}",
                do="return recbole_gr2.teachers.TeacherReply(reasoning=..., ranking=...)",
            )
    return replies
