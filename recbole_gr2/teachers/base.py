"""The interface of a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Protocol

from recbole_gr2.errors import GR2Error
from recbole_gr2.plain_text import plain_text
from recbole_gr2.plugins import calling, name_of
from recbole_gr2.sid.tokens import SID_TOKEN
from recbole_gr2.types import Request


@dataclass(frozen=True, kw_only=True)
class TeacherReply:
    """A teacher's reply to one request.

    Attributes:
        reasoning: the reasoning trace. An empty trace is rejected.
        ranking: item ids, best first: a permutation of the request's candidates. () or an incomplete ranking is
            rejected, and so is one with other items.
        problem: why the reply has no ranking, "" if it has one. The traces stage counts the replies by this reason.
    """

    reasoning: str
    ranking: tuple[int, ...]
    problem: str = ""


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

    The only control tokens of a reasoning are those of semantic IDs. All others become text, see `plain_text`.

    Args:
        teacher: the teacher.
        requests: requests with labels.
        targeted: see `Teacher.argue`.
        attempt: see `Teacher.argue`.

    Raises:
        GR2Error: the teacher returns another number of replies or objects of another type, or a teacher of the user
            raises an exception.
    """
    visible = list(requests) if targeted else [request.without_labels() for request in requests]
    with calling(name_of(type(teacher)), where=f"teacher {teacher.name}, attempt {attempt}"):
        returned = teacher.argue(visible, targeted=targeted, attempt=attempt)
        replies = list(returned) if isinstance(returned, Iterable) else None
    if replies is None:
        raise GR2Error(
            f"argue returned an object of the type {type(returned).__name__} instead of a list of replies",
            where=f"teacher {teacher.name}, attempt {attempt}",
            why="each request needs one reply",
            do="return a list with one TeacherReply per request",
        )
    if len(replies) != len(requests):
        raise GR2Error(
            f"the teacher returned {len(replies)} replies to {len(requests)} requests",
            where=f"teacher {teacher.name}, attempt {attempt}",
            why="each reply belongs to the request at the same position",
            do="return one TeacherReply per request; leave its ranking empty if there is none",
        )
    for request, reply in zip(requests, replies, strict=True):
        where = f"teacher {teacher.name}, request {request.request_id}"
        if not isinstance(reply, TeacherReply):
            raise GR2Error(
                f"the teacher returned a {type(reply).__name__} instead of a TeacherReply",
                where=where,
                do="return recbole_gr2.teachers.TeacherReply(reasoning=..., ranking=...)",
            )
        if not isinstance(reply.reasoning, str) or not isinstance(reply.problem, str) or not _are_ids(reply.ranking):
            raise GR2Error(
                "the reasoning or the problem of a reply is no text, or its ranking contains something else than item "
                "ids",
                where=where,
                do="return a text and the internal ids of the candidates, such as request.items",
            )
    return [_checked(reply, request) for reply, request in zip(replies, requests, strict=True)]


def _checked(reply: TeacherReply, request: Request) -> TeacherReply:
    """A reply without control tokens, and without a ranking if that ranks other items than candidates."""
    reply = replace(reply, reasoning=plain_reasoning(reply.reasoning))
    if set(reply.ranking) <= set(request.items):
        return reply
    return replace(reply, ranking=(), problem="the ranking contains items that are no candidates")


def _are_ids(ranking: object) -> bool:
    return isinstance(ranking, tuple | list) and all(isinstance(item, Integral) for item in ranking)


def plain_reasoning(text: str) -> str:
    """Return a reasoning without control tokens other than those of semantic IDs.

    >>> plain_reasoning("<|sid_begin|><s_a_3><|sid_end|> <|A|> <|im_end|>")
    '<|sid_begin|><s_a_3><|sid_end|> < |A|> < |im_end|>'
    """
    text = text.encode("utf-8", "ignore").decode("utf-8")  # JSON may contain half of a surrogate pair
    others = (plain_text(part) for part in SID_TOKEN.split(text))
    return "".join(part for pair in zip(others, [*SID_TOKEN.findall(text), ""], strict=True) for part in pair)
