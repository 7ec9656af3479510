"""Progress lines and tables of a running command, on stderr. Only the path of the result goes to stdout."""

from __future__ import annotations

import itertools
import os
import re
import textwrap
import time
from collections.abc import Sequence

from recbole_gr2.progress import Display, stderr, terminal_width

NUMBER = re.compile(
    r"([-+]?[\d.,]*(%| s| MiB|)( ± [\d.]+)?( \[.*\])?|\[[-+\d.]+, [-+\d.]+\])$"
)  # A cell of a column of numbers, or an empty cell.
METRIC = re.compile(r"(\w+)@\d+$")  # A column of a metric. Those of one metric stay together.
INDENT = re.compile(r"(\[ *\d+:\d\d\] )? *([\w ]{1,16}  +)?")  # What the further lines of a long line are indented by.
NARROW = 12  # Width of a column of text down to which it shrinks before the table is divided.
NARROW_FIRST = 40  # That of the first column, which names the lines.


def quiet_libraries() -> None:
    """Turn off progress bars and warnings of libraries that say nothing about a run."""
    import warnings

    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    for module in ("recbole", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    # RecBole's graph models build sparse matrices in a way that torch will remove.
    warnings.filterwarnings("ignore", "torch.sparse.SparseTensor", UserWarning, module="recbole")
    # PEFT saves the rows of the new tokens in checkpoints, as intended.
    warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning, module="peft")
    warnings.filterwarnings("ignore", category=DeprecationWarning)


class Console:
    """Prints progress lines with the elapsed time, and tables. Of several processes only the first one prints.

    Attributes:
        stream: the stream that it prints to: stderr, or one that discards everything.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.stream = stderr()

    def say(self, text: str) -> None:
        """Print one progress line: minutes and seconds since the start, and `text`."""
        elapsed = int(time.monotonic() - self.started)
        self.print(f"[{elapsed // 60:3d}:{elapsed % 60:02d}] {text}")

    def print(self, text: str) -> None:
        """Print `text`, above the bar of a stage. On a terminal, long lines continue in indented lines."""
        if width := terminal_width(self.stream):
            text = "\n".join(fold(line, width) for line in text.split("\n"))
        display = Display.current
        if display and display.live and display.stream is self.stream:
            display.print(text)
        else:
            print(text, file=self.stream, flush=True)

    def render(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        """Return an aligned table that fits the terminal, see `render_table`."""
        return render_table(header, rows, width=terminal_width(self.stream))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print an aligned table that fits the terminal, see `render_table`."""
        self.print(self.render(header, rows))

    def stage(self, label: str) -> Display:
        """Show the progress of a stage during a `with` block.

        Args:
            label: name of the stage, e.g. `stage 3 of 14: sft`.
        """
        return Display(label, self.stream, self.say)


def fold(line: str, width: int) -> str:
    """Return a line in several ones of at most `width` characters. A longer word, such as a path, stays whole.

    >>> print(fold("[  0:01] users     943 users have a training list", 32))
    [  0:01] users     943 users
                       have a
                       training list
    """
    if len(line) <= width:
        return line
    found = INDENT.match(line)
    indent = " " * (len(found[0]) if found else 0)
    return textwrap.fill(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, tabsize=1
    )


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Return an aligned plain-text table. Columns of numbers are right-aligned, other columns left-aligned.

    Args:
        header: name of each column.
        rows: cells of each line, as many as there are columns.
        width: largest length of a line; None for any. In a table that is wider, texts continue in the next lines. If
            this is not enough, the columns are divided into several tables, each with the first column. Numbers stay
            whole, so that a table of few columns with very long ones can be wider.

    >>> print(render_table(["method", "n"], [["base", "12"]]))
    method   n
    ------  --
    base    12
    >>> print(render_table(["stage", "why"], [["sft", "first time of this stage"]], width=18))
    stage  why
    -----  -----------
    sft    first time
           of this
           stage
    """
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    columns = [
        _Column(column, NARROW if number else NARROW_FIRST) for number, column in enumerate(zip(*cells, strict=True))
    ]
    parts = [columns] if width is None else _divided(columns, width)
    return "\n\n".join(_aligned(part, width) for part in parts)


class _Column:
    """A column of a table with its header.

    Args:
        cells: its header and its cells.
        narrow: width down to which a column of texts shrinks.

    Attributes:
        cells: its header and its cells.
        width: length of the longest cell.
        word: length of its longest word, or `width` in a column of numbers.
        least: the smallest width: that of its longest word, but at most `narrow` in a column of texts.
    """

    def __init__(self, cells: Sequence[str], narrow: int) -> None:
        self.cells = cells
        self.numbers = all(NUMBER.match(cell) for cell in cells[1:])
        self.width = max(map(len, cells))
        self.word = (
            self.width if self.numbers else max((len(word) for cell in cells for word in cell.split()), default=0)
        )
        self.least = self.word if self.numbers else min(self.word, narrow)

    def lines(self, row: int, width: int) -> list[str]:
        """Return a cell as lines of `width` characters."""
        if self.numbers:
            return [self.cells[row].rjust(width)]
        lines = (
            textwrap.wrap(self.cells[row], width, break_on_hyphens=False) if width < self.width else [self.cells[row]]
        )
        return [line.ljust(width) for line in lines or [""]]


def _total(widths: Sequence[int]) -> int:
    """The length of a line with columns of these widths."""
    return sum(widths) + 2 * (len(widths) - 1)


def _divided(columns: Sequence[_Column], width: int) -> list[list[_Column]]:
    """Divide columns into the fewest tables of at most `width` characters, and of these into the narrowest ones."""
    first, others = columns[0], columns[1:]

    def metric(column: _Column) -> str:
        found = METRIC.match(column.cells[0])
        return found[1] if found else str(id(column))

    groups = [list(group) for _, group in itertools.groupby(others, metric)]

    def divide(limit: int) -> list[list[_Column]]:
        parts = [[first]]
        for group in groups:
            fits = _total([column.least for column in (first, *group)]) <= limit
            for unit in [group] if fits else [[column] for column in group]:
                if len(parts[-1]) > 1 and _total([column.least for column in (*parts[-1], *unit)]) > limit:
                    parts.append([first])
                parts[-1] += unit
        return parts

    fewest = len(divide(width))
    return next(parts for limit in range(1, width + 1) if len(parts := divide(limit)) == fewest)


def _limited(columns: Sequence[_Column], longest: int) -> list[int]:
    """The smallest widths that break no word of at most `longest` characters."""
    return [max(column.least, min(column.word, longest)) for column in columns]


def _widths(columns: Sequence[_Column], width: int | None) -> list[int]:
    """The width of each column of a table. The widest columns of text are made narrower until the table fits."""
    if width is None or _total([column.width for column in columns]) <= width:
        return [column.width for column in columns]
    longest = max(column.word for column in columns)
    while longest > NARROW and _total(_limited(columns, longest)) > width:
        longest -= 1
    least = _limited(columns, longest)
    for most in range(max(column.width for column in columns), 0, -1):
        widths = [max(small, min(column.width, most)) for small, column in zip(least, columns, strict=True)]
        if _total(widths) <= width:
            return widths
    return least


def _aligned(columns: Sequence[_Column], width: int | None) -> str:
    """The lines of one table."""
    widths = _widths(columns, width)
    lines = []
    for row in range(len(columns[0].cells)):
        cells = [column.lines(row, size) for column, size in zip(columns, widths, strict=True)]
        for parts in itertools.zip_longest(*cells, fillvalue=None):
            lines.append("  ".join(part or " " * size for part, size in zip(parts, widths, strict=True)).rstrip())
        if row == 0:
            lines.append("  ".join("-" * size for size in widths))
    return "\n".join(lines)


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
