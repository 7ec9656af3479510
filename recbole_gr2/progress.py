"""Progress of a stage: one live bar on a terminal, plain lines in a log. Nothing in this module changes a result.

A stage opens a `Display`, see `Console.stage`. Its long loops report with `progress` or `Loop`. If a loop runs inside
another one, only the outer one is shown. A loop outside of a stage, as in the Python interface, has its own display.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from recbole_gr2.distributed import RANK

if TYPE_CHECKING:
    from rich.console import RenderableType

T = TypeVar("T")
Stream = TextIO | io.TextIOBase
INTERVAL = 60  # Seconds between two progress lines of a loop in a log.
DELAY = 5  # Seconds after which a loop outside of a stage shows a bar.
WIDTH = 80  # Columns that a terminal has at least.
BAR = 10, 30  # Least and largest width of a bar.


class _Discard(io.TextIOBase):
    """A text stream that discards what is written to it."""

    def write(self, text: str) -> int:
        return len(text)


def stderr() -> Stream:
    """Return the stream of progress: stderr. Of several processes all but the first one get a stream that discards."""
    return sys.stderr if RANK == 0 else _Discard()


def terminal_width(stream: Stream) -> int | None:
    """Return the columns of the terminal that a stream writes to, at least 80, or None if it is no terminal."""
    if not stream.isatty():
        return None
    given = os.environ.get("COLUMNS", "")
    try:
        columns = int(given) if given.isdecimal() else os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # the width is unknown
        columns = WIDTH
    return max(columns, WIDTH)


def is_live(stream: Stream) -> bool:
    """Return whether a stream is a terminal that can move its cursor, so that a bar can be drawn again."""
    return stream.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown")


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, with hours if there are any.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Loop:
    """The progress of a loop, shown during a `with` block, or in a stage from `open` to `close`.

    Args:
        what: name of one step, e.g. `epoch`.
        total: number of steps.
        first: number of steps that an earlier start finished.
        at_most: whether the loop can end before the last step.
    """

    def __init__(self, what: str, total: float, *, first: float = 0, at_most: bool = False) -> None:
        self.what, self.total, self.first, self.at_most = what, total, first, at_most
        self.done = first
        self.started = self.reported = time.monotonic()
        self.display: Display | None = None
        self.own: Display | None = None

    def open(self) -> Loop:
        """Begin to show the loop, if a stage runs and no other loop is shown."""
        self.display = Display.current
        if self.display and self.display.loop is None:
            self.display.loop = self
        return self

    def close(self) -> None:
        """End to show the loop. On a terminal, the latest values of `show_values` are printed."""
        if self.display and self.display.loop is self:
            self.display.loop = None
            self.display.print_values()

    def __enter__(self) -> Loop:
        if Display.current is None:
            self.own = Display("", stderr(), delay=DELAY).open()
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()
        if self.own:
            self.own.close()

    def at(self, done: float) -> None:
        """Report that `done` steps are finished."""
        self.done = min(done, self.total)
        if self.display and self.display.loop is self:
            self.display.update()

    def advance(self) -> None:
        """Report that one more step is finished."""
        self.at(self.done + 1)

    def text(self, now: float) -> str:
        """Return the finished steps and the remaining time, which comes from the mean time of the steps so far.

        Args:
            now: the value of `time.monotonic`.
        """
        elapsed, most = now - self.started, "at most " if self.at_most else ""
        text = f"{self.what} {int(self.done):,} of {most}{int(self.total):,}"
        if elapsed > 0 and self.first < self.done:
            remaining = elapsed * (self.total - self.done) / (self.done - self.first)
            text += f", {most}{clock(remaining)} remaining"
        return text


def progress(things: Sequence[T], what: str) -> Iterator[T]:
    """Yield the elements of `things` and show the progress of the loop over them.

    Args:
        things: what the loop iterates over.
        what: name of one element, e.g. `answers, batch`.
    """
    with Loop(what, len(things)) as loop:
        for done, thing in enumerate(things):
            loop.at(done)
            yield thing


def show_values(text: str, say: Callable[[str], None]) -> None:
    """Show the latest values of a training: below the bar of a terminal, or as a line of a log.

    Args:
        text: the values.
        say: prints a line.
    """
    display = Display.current
    if display and display.live and display.loop:
        display.values, display.say_values = text, say
    else:
        say(text)


class Display:
    """What a stage shows. On a terminal this is a bar with the time, until the stage ends.

    Args:
        label: name of the stage, "" for a loop outside of a stage.
        stream: where it is shown.
        say: prints a line of a log.
        delay: seconds after which the bar appears.
    """

    current: Display | None = None  # the open display of this process

    def __init__(
        self, label: str, stream: Stream, say: Callable[[str], None] | None = None, *, delay: float = 0.0
    ) -> None:
        self.label, self.stream, self.delay = label, stream, delay
        self.is_live = is_live(stream)
        self.say = say or (lambda text: print(text, file=stream, flush=True))
        self.started = time.monotonic()
        self.loop: Loop | None = None
        self.live: Any = None
        self.values = ""
        self.say_values: Callable[[str], None] = self.say

    def open(self) -> Display:
        """Become the current display."""
        self.outer, Display.current = Display.current, self
        if not self.delay:
            self.update()
        return self

    def close(self) -> None:
        """Remove the bar. The display that was open before is the current one again."""
        if self.live:
            self.live.stop()
            self.live = None
        Display.current = self.outer

    __enter__ = open

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self) -> None:
        """Show the bar if it is time for it. In a log, print a line if the last one of the loop is old enough."""
        if self.is_live:
            if self.live is None and time.monotonic() - self.started >= self.delay:
                self._start()
            return
        now = time.monotonic()
        if self.loop and now - self.loop.reported >= INTERVAL:
            self.loop.reported = now
            self.say(", ".join(filter(None, [self.label, self.loop.text(now)])))

    def print(self, text: str) -> None:
        """Print text above the bar."""
        from rich.text import Text

        self.live.console.print(Text(text), soft_wrap=True)

    def print_values(self) -> None:
        """Print the values below the bar as a line, and remove them."""
        if self.values:
            self.say_values(self.values)
        self.values = ""

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self.stream, force_terminal=True)  # type: ignore[arg-type]  # rich needs only `write`
        # Text that other code prints to the terminal appears above the bar. If stdout is a file, it is left as it is.
        self.live = Live(
            get_renderable=lambda: self._picture(console.width),
            console=console,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),
        )
        self.live.start(refresh=True)

    def _picture(self, columns: int) -> RenderableType:
        """Return the lines of the bar for a terminal of this width: time of the stage, the loop, and its values."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        loop, now, (least, most) = self.loop, time.monotonic(), BAR
        lines: list[RenderableType] = []
        if self.label:
            text = f"{self.label}, {clock(now - self.started)} elapsed"
            lines.append(Text(text, no_wrap=True, overflow="ellipsis"))
        line = Table.grid(padding=(0, 1))
        if loop:
            text = loop.text(now)
            width = max(least, min(most, columns - len(text) - 2))
            bar = ProgressBar(total=max(loop.total, 1), completed=loop.done, width=width)
            line.add_row(bar, Text(text, no_wrap=True, overflow="ellipsis"))
        else:
            line.add_row(ProgressBar(total=None, width=most))
        lines.append(line)
        if self.values:
            lines.append(Text(self.values, no_wrap=True, overflow="ellipsis"))
        return Group(*lines)
