"""What a person sees while a run goes on: plain lines on stderr, so that stdout ends with the result's path alone."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from recbole_gr2.processes import PLACE

T = TypeVar("T")
SILENCE = 60  # seconds that a log may go without a line
METER = "        {desc}{n_fmt} of {total_fmt} batches, {elapsed} gone, {remaining} to go"
NUMBER = re.compile(r"[-+]?[\d.,]*(%| s| MiB|)( \[.*\])?$")  # what a cell of a number column looks like, or nothing


class Console:
    """Progress lines with elapsed time, and tables; of several processes the first alone speaks."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.stream = sys.stderr if PLACE == 0 else open(os.devnull, "w")

    def say(self, text: str) -> None:
        """One progress line."""
        elapsed = int(time.monotonic() - self.started)
        print(f"[{elapsed // 60:3d}:{elapsed % 60:02d}] {text}", file=self.stream, flush=True)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """An aligned table."""
        print(render_table(header, rows), file=self.stream, flush=True)


def progress(things: Sequence[T], what: str) -> Iterator[T]:
    """The things, one by one; where that takes long, with a bar on a terminal, and in a log with a line a minute."""
    if PLACE != 0:
        yield from things
    elif sys.stderr.isatty():
        yield from tqdm(things, desc=what, unit="batch", leave=False, delay=5)
    else:
        started = said = time.monotonic()
        for done, thing in enumerate(things):
            now = time.monotonic()
            if now - said >= SILENCE:
                said = now
                line = tqdm.format_meter(done, len(things), now - started, prefix=f"{what}: ", bar_format=METER)
                print(line, file=sys.stderr, flush=True)
            yield thing


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned plain-text table; columns of numbers are right-aligned, the others left-aligned.

    >>> print(render_table(["row", "n"], [["base", "12"]]))
    row    n
    ----  --
    base  12
    """
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(NUMBER.match(cell) for cell in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])
