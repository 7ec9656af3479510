"""One shape of error: what is wrong, where, why it matters, and what to do about it."""

from __future__ import annotations


class GR2Error(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: what is wrong, one sentence.
        where: the key, file:line, stage or request it was seen at.
        why: why it matters.
        do: what the reader should do next.
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
    """A setting, a combination of settings, or a command line that cannot be run."""

    exit_code = 2


class DependencyError(GR2Error):
    """A package is missing or is a version that is known not to work."""

    exit_code = 3


class MissingFileError(GR2Error):
    """A data set, model or checkpoint that should be there is not."""

    exit_code = 4


class GateError(GR2Error):
    """A stage finished but its result is not good enough to build the next stage on."""

    exit_code = 5
