"""Progress and tables: a live bar and tables of 80 columns on a terminal, plain lines in a log."""

import contextlib
import fcntl
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from conftest import called

from recbole_gr2 import progress
from recbole_gr2.console import Console, fold, render_table
from recbole_gr2.progress import Loop, clock, show_values, terminal_width

ESCAPE = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


class Terminal:
    """A pseudo-terminal, and what was written to it."""

    def __init__(self, columns):
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.stream = open(self.slave, "w", encoding="utf-8")  # noqa: SIM115  # closed by `read`
        self.written = b""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # all writers have closed the terminal
            while part := os.read(self.master, 65536):
                self.written += part

    def read(self):
        """Close the terminal and return its text."""
        if not self.stream.closed:
            self.stream.close()
            self.reader.join()
            os.close(self.master)
        return self.written.decode()

    def lines(self):
        """All lines that the terminal ever showed, without escape sequences."""
        return re.split(r"[\r\n]+", ESCAPE.sub("", self.read()))


@pytest.fixture
def terminal(monkeypatch):
    """terminal(columns): stderr becomes a terminal with so many columns, and without the variables of the user."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    made = []

    def make(columns=80):
        made.append(Terminal(columns))
        monkeypatch.setattr(sys, "stderr", made[-1].stream)
        return made[-1]

    yield make
    for each in made:
        each.read()


def train_and_answer():
    """A stage with a line, a training with values, and a loop within a loop."""
    console = Console()
    with console.stage("stage 2 of 3: sft"):
        console.say("  354 texts with 359 tokens on average")
        with Loop("step", 4) as steps:
            for step in range(1, 5):
                steps.at(step)
                show_values(f"step {step}/4  loss {5 - step}.0", lambda text: console.say(f"  {text}"))
                assert list(progress.progress("ab", "answers, batch")) == ["a", "b"]
        with Loop("epoch", 10, at_most=True) as epochs:
            epochs.advance()
    console.say("stage 2 of 3: sft done in 1 s")


# --- in a log ---------------------------------------------------------------------------------------------------------


def test_a_log_gets_a_line_a_minute(monkeypatch, capsys):
    """A long loop prints a line a minute and a short one none. Each element is yielded once."""
    now = itertools.count(0, 20)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    console = Console()
    with console.stage("stage 3 of 14: sft"):
        assert list(progress.progress("abcdefgh", "answers, batch")) == list("abcdefgh")
    lines = capsys.readouterr().err.splitlines()
    assert 1 < len(lines) < 4
    assert all(
        re.fullmatch(r"\[ +\d+:\d\d\] stage 3 of 14: sft, answers, batch \d of 8, \d:\d\d remaining", line)
        for line in lines
    )
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    assert list(progress.progress(range(3), "answers, batch")) == [0, 1, 2] and not capsys.readouterr().err


def test_a_log_gets_all_values_and_no_control_characters(capsys):
    train_and_answer()
    printed = capsys.readouterr().err
    assert [line.split("] ")[1] for line in printed.splitlines()] == [
        "  354 texts with 359 tokens on average",
        *(f"  step {step}/4  loss {5 - step}.0" for step in range(1, 5)),
        "stage 2 of 3: sft done in 1 s",
    ]
    assert printed.replace("\n", "").isprintable()


def test_only_the_first_process_prints(monkeypatch, capsys, terminal):
    monkeypatch.setattr(progress, "RANK", 1)
    train_and_answer()
    Console().table(["a"], [["b"]])
    assert list(progress.progress("ab", "x")) == ["a", "b"]
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    shown = terminal()
    train_and_answer()
    assert shown.read() == ""


def test_a_failed_stage_leaves_nothing_behind(capsys):
    """The loops of the next stage are shown, although those of the failed one were not closed."""
    console = Console()
    with pytest.raises(KeyError), console.stage("stage 1 of 2: rl"):
        Loop("step", 5).open()
        raise KeyError
    with console.stage("stage 2 of 2: evaluate") as display, Loop("batch", 2) as loop:
        assert display.loop is loop
    assert progress.Display.current is None


def test_the_remaining_time_counts_the_steps_of_this_start():
    """A resumed training began at step 50: 10 steps took 10 s, and 40 are left."""
    loop = Loop("step", 100, first=50)
    assert loop.text(loop.started + 10) == "step 50 of 100"
    loop.at(60)
    assert loop.text(loop.started + 10) == "step 60 of 100, 0:40 remaining"
    loop = Loop("epoch", 3, at_most=True)
    loop.at(1.5)
    assert loop.text(loop.started + 60) == "epoch 1 of at most 3, at most 1:00 remaining"
    assert clock(3599) == "59:59" and clock(3600) == "1:00:00"


# --- on a terminal ----------------------------------------------------------------------------------------------------


def test_a_terminal_gets_one_bar_and_the_last_values(terminal):
    shown = terminal(80)
    train_and_answer()
    text, lines = shown.read(), shown.lines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("stage 2 of 3: sft, 0:00 elapsed") for line in lines)
    stamped = [line.split("] ")[1] for line in lines if line.startswith("[")]
    assert stamped == [
        "  354 texts with 359 tokens on average",
        "  step 4/4  loss 1.0",
        "stage 2 of 3: sft done in 1 s",
    ]
    assert not any("answers" in line for line in lines)  # a loop within a loop
    assert text.count("\x1b[?25h") == text.count("\x1b[?25l") == 1  # the cursor is shown again


def test_what_other_code_prints_stays_above_the_bar(terminal):
    shown = terminal(80)
    with Console().stage("stage 1 of 1: sft"):
        print("a warning of a library", file=sys.stderr)
    assert "a warning of a library" in shown.lines()


def test_a_terminal_without_cursor_movements_gets_a_log(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    shown = terminal(80)
    train_and_answer()
    assert "\x1b" not in shown.read() and "  step 2/4  loss 3.0" in "\n".join(shown.lines())


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color(terminal, monkeypatch, no_color):
    monkeypatch.setenv("NO_COLOR", no_color)
    shown = terminal(80)
    with Console().stage("stage 1 of 1: sft"), Loop("step", 2) as loop:
        loop.advance()
    assert bool(re.search(r"\x1b\[[\d;]+m", shown.read())) != bool(no_color)


def test_the_width_of_a_terminal(terminal, monkeypatch, tmp_path):
    """The width is at least 80. The variable COLUMNS has priority."""
    widths = [terminal_width(terminal(columns).stream) for columns in (0, 60, 80, 132)]
    assert widths == [80, 80, 80, 132]
    monkeypatch.setenv("COLUMNS", "100")
    assert terminal_width(terminal(132).stream) == 100
    with open(tmp_path / "log", "w") as log:
        assert terminal_width(log) is None


@pytest.mark.slow
def test_the_command_fits_80_columns(finished_command, finished_copy):
    """The command in a terminal of 80 columns, and the same one with a log: only the path of the result on stdout."""
    folder = finished_copy().parent
    argv = [*finished_command.argv[:-1], "saved", "--eval_rows=[lambdamart,sft]", "--from_stage", "rerank_sft"]
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")} | {"TERM": "xterm"}
    shown = Terminal(80)
    command = [sys.executable, "-m", "recbole_gr2", "run", *argv]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=shown.slave, text=True, check=False
    )
    lines = shown.lines()
    assert done.returncode == 0, lines
    assert (folder / done.stdout.strip()).name == "result.json" and done.stdout.count("\n") == 1
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert any(re.match(r"stage \d+ of \d+: rerank_sft, \d+:\d\d elapsed", line) for line in lines)


@pytest.mark.slow
def test_the_log_of_a_command_is_plain(finished_command, finished_copy):
    argv = [*finished_command.argv[:-1], finished_copy(), "--eval_rows=[lambdamart,sft]", "--from_stage", "rerank_sft"]
    code, stdout, stderr = called(argv)
    assert code == 0 and Path(stdout.strip()).is_file()
    assert stderr.replace("\n", "").isprintable()
    assert re.search(r"stage \d+ of \d+: rerank_sft, run", stderr)


# --- tables -----------------------------------------------------------------------------------------------------------

METRICS = [f"{metric}@{k}" for metric in ("recall", "ndcg", "mrr") for k in (1, 3, 5, 10)]


def test_a_wide_table_is_divided_by_metric():
    """Columns of one metric stay together, and each part begins with the names of the methods."""
    header = ["method", *METRICS, "difference [95 %]", "p (Holm)", "unchanged"]
    values = [*["0.1234"] * len(METRICS), "+0.0129 [+0.0066, +0.0196]", "0.0030", "12.0%"]
    text = render_table(header, [["lambdamart", *values], ["sft", *values]], width=80)
    parts = [part.splitlines() for part in text.split("\n\n")]
    assert max(len(line) for part in parts for line in part) <= 80
    assert {(part[0].split()[0], part[2].split()[0]) for part in parts} == {("method", "lambdamart")}
    assert [part[0].split()[1:] for part in parts] == [
        METRICS[:4],
        METRICS[4:],
        ["difference", "[95", "%]", "p", "(Holm)", "unchanged"],
    ]
    assert all(value in text for value in values) and text.count("0.1234") == 2 * len(METRICS)
    assert render_table(header, [["lambdamart", *values]]).count("\n") == 2  # in a log each row is one line


@pytest.mark.parametrize("width", [80, 100, 200])
def test_texts_are_wrapped_and_numbers_are_not(width):
    words = "first time of this stage with these settings, because the data or the code changed since then"
    header, rows = ["stage", "seconds", "why"], [["base_model_CausalSASRec", "12,345,678 s", words], ["sft", "", ""]]
    text = render_table(header, rows, width=width)
    assert max(map(len, text.splitlines())) <= width and "12,345,678 s" in text
    assert "base_model_CausalSASRec" in text and "\n\n" not in text
    shown = " ".join(line[39:].strip() for line in text.splitlines()[2:])
    assert shown.split() == words.split()


def test_long_words_are_broken_only_if_it_is_necessary():
    path = "/home/" + "x" * 100
    text = render_table(["where", "n"], [[path, "1234567890"]], width=80)
    assert max(map(len, text.splitlines())) <= 80 and "1234567890" in text
    assert "".join(line[:68].strip() for line in text.splitlines()[2:]) == path


def test_long_lines_continue_below_their_text():
    line = "[  0:12]   answers: " + "word " * 20 + "/a/path/" + "x" * 90
    folded = fold(line.strip(), 80).splitlines()
    assert all(len(part) <= 80 or "/a/path" in part for part in folded)
    assert all(part.startswith(" " * 11) for part in folded[1:]) and " ".join(" ".join(folded).split()) == " ".join(
        line.split()
    )
