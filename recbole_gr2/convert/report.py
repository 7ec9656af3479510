"""The report of a conversion."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Report:
    """What a conversion has read and written.

    Attributes:
        source: `Amazon 2014` and so on, `MovieLens`, or "" for other files.
        folder: the data set's folder.
        files: names of the files of `interactions` and `items`, with the form and the columns that were read.
        times: form of the times.
        command: the command that runs the data set.
        counts: numbers of lines, users, items and so on, by what is counted. Malformed lines were left out; of several
            lines of an item the first is kept; repeated interactions are kept.
        warnings: what makes a result doubtful.
    """

    source: str
    folder: Path
    files: dict[str, str] = field(default_factory=dict)
    times: str = ""
    command: str = ""
    counts: dict[str, int | float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = [
            f"{count:12.4%} {what}" if isinstance(count, float) else f"{count:12,} {what}"
            for what, count in self.counts.items()
        ]
        return "\n".join(
            [
                *(f"{what}: {file}" for what, file in self.files.items()),
                f"times: {self.times}",
                f"{self.source + ', written' if self.source else 'written'} to {self.folder}",
                *counts,
                *(f"warning: {warning}" for warning in self.warnings),
            ]
        )
