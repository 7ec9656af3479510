"""Errors in one format: what is wrong, where, why it matters, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GR2Error(Exception):
    """Base class of all errors that this package raises deliberately.

    Args:
        what: One sentence that says what is wrong.
        where: The setting, file and line, stage or request that has the problem.
        why: The consequence of the problem.
        do: The next step for the user.

    Attributes:
        exit_code: Exit code of the command line for this error.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        self.what, self.where, self.why, self.do = what, where, why, do
        parts = [what]
        for name, text in (("where", where), ("why", why), ("do", do)):
            if text:
                parts.append(f"  {name:5s} {text}")
        super().__init__("\n".join(parts))


class ConfigurationError(GR2Error):
    """A setting, a combination of settings or a command line is invalid."""

    exit_code = 2


class DependencyError(GR2Error):
    """A package is missing, or its version does not work."""

    exit_code = 3


class MissingFileError(GR2Error):
    """A data set, model, checkpoint or other file is missing."""

    exit_code = 4


class QualityCheckError(GR2Error):
    """A stage has finished, but its result is too poor for the next stage."""

    exit_code = 5


def nearest(name: str, names: Iterable[str], *, cutoff: float = 0.4) -> list[str]:
    """Return at most three of `names` that are similar to `name`, the most similar first.

    Upper and lower case are equal.

    Args:
        name: The name to compare.
        names: The valid names.
        cutoff: Least similarity, 0 to 1.

    >>> nearest("sasrec", ["GRU4Rec", "SASRec"]), nearest("x", ["one"])
    (['SASRec', 'GRU4Rec'], [])
    """
    by_lower = {other.lower(): other for other in names}
    return [by_lower[other] for other in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=cutoff)]
