"""What a person sees while a run goes on: plain lines on stderr, so that stdout ends with the result's path alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence


class Console:
    """Progress lines with elapsed time, and tables."""

    def __init__(self) -> None:
        self.started, self.stream = time.monotonic(), sys.stderr

    def say(self, text: str) -> None:
        """One progress line."""
        elapsed = int(time.monotonic() - self.started)
        print(f"[{elapsed // 60:3d}:{elapsed % 60:02d}] {text}", file=self.stream, flush=True)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """An aligned table."""
        print(render_table(header, rows), file=self.stream, flush=True)


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned plain-text table; the first column is left-aligned, the others right-aligned.

    >>> print(render_table(["row", "n"], [["base", "12"]]))
    row    n
    ----  --
    base  12
    """
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    ]  # fmt: skip
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
