"""Progress lines and tables of a running command, on stderr. Only the path of the result goes to stdout."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO, TypeVar

from tqdm import tqdm

from recbole_gr2.distributed import RANK

T = TypeVar("T")
INTERVAL = 60  # Seconds between two progress lines in a log.
METER = "        {desc}{n_fmt} of {total_fmt} batches, {elapsed} elapsed, {remaining} remaining"
NUMBER = re.compile(
    r"[-+]?[\d.,]*(%| s| MiB|)( ± [\d.]+)?( \[.*\])?$"
)  # A cell of a column of numbers, or an empty cell.


def quiet_libraries() -> None:
    """Turn off progress bars and warnings of libraries that say nothing about a run."""
    import warnings

    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    for module in ("recbole", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


class _Discard(io.TextIOBase):
    """A text stream that discards what is written to it."""

    def write(self, text: str) -> int:
        return len(text)


class Console:
    """Prints progress lines with the elapsed time, and tables. Of several processes only the first one prints.

    Attributes:
        stream: the stream that it prints to: stderr, or one that discards everything.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.stream: TextIO | io.TextIOBase = sys.stderr if RANK == 0 else _Discard()

    def say(self, text: str) -> None:
        """Print one progress line: minutes and seconds since the start, and `text`."""
        elapsed = int(time.monotonic() - self.started)
        self.print(f"[{elapsed // 60:3d}:{elapsed % 60:02d}] {text}")

    def print(self, text: str) -> None:
        """Print `text` as it is."""
        print(text, file=self.stream, flush=True)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print an aligned table, see `render_table`."""
        self.print(render_table(header, rows))


def progress(things: Sequence[T], what: str) -> Iterator[T]:
    """Yield the elements of `things` and show the progress of a long loop on stderr.

    A terminal shows a progress bar after 5 seconds. A log gets one line every `INTERVAL` seconds.

    Args:
        things: what the loop iterates over.
        what: name of the loop, e.g. `answers`.
    """
    if RANK != 0:
        yield from things
    elif sys.stderr.isatty():
        yield from tqdm(things, desc=what, unit="batch", leave=False, delay=5)
    else:
        started = last = time.monotonic()
        for done, thing in enumerate(things):
            now = time.monotonic()
            if now - last >= INTERVAL:
                last = now
                line = tqdm.format_meter(done, len(things), now - started, prefix=f"{what}: ", bar_format=METER)
                print(line, file=sys.stderr, flush=True)
            yield thing


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned plain-text table. Columns of numbers are right-aligned, other columns left-aligned.

    Args:
        header: name of each column.
        rows: cells of each line, as many as there are columns.

    >>> print(render_table(["method", "n"], [["base", "12"]]))
    method   n
    ------  --
    base    12
    """
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(NUMBER.match(cell) for cell in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def pipe_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. Columns of numbers are right-aligned. Cells are shown as they are.

    Args:
        header: name of each column.
        rows: cells of each line, as many as there are columns.

    >>> print(pipe_table(["method", "n"], [["a|b", "12"]]))
    | method | n |
    | --- | ---: |
    | a\\|b | 12 |
    """
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    right = [all(NUMBER.match(cell) for cell in column[1:]) for column in zip(*cells, strict=True)]
    rule = ["---:" if each else "---" for each in right]
    first, *others = [list(map(markdown, row)) for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in [first, rule, *others])


def markdown(text: str) -> str:
    """Return a text on one line so that Markdown shows it as it is.

    >>> print(markdown("5 * 3 <b> [x](y)"))
    5 \\* 3 \\<b> [x]\\(y)
    """
    escaped = re.sub(r"[\\`*<|~&]|(?<!\w)_|_(?!\w)|(?<=\])\(", r"\\\g<0>", text)
    return " ".join(escaped.split())
