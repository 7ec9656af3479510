"""Strict reading of RecBole's atomic files: every mistake ends in an error with the file, the line and the column.

RecBole reads these files with pandas. There a quotation mark can swallow lines, a missing time becomes the mean of the
column, and dates are numbered in the order of the file. Here a line has as many columns as the header, or the file is
refused.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError, nearest

TYPES = ("token", "token_seq", "float", "float_seq")
HEADER = "user_id:token, item_id:token, timestamp:float"
SEPARATORS = ("\t", ",", ";", "|", "::", " ")
# Texts that pandas, and therefore RecBole, reads as a missing value.
MISSING = frozenset(
    [
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
        *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    ]
)
# The separator of the lines in memory. A value in quotation marks may contain the separator of the file.
CUT = "\x1f"
LONGEST_VALUE = 1000  # lines that one value in quotation marks may have
AMBIGUOUS_LINES = 4  # such lines if each of them fits the header, which hardly happens in more of them

_NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
_DATE = r"\d{4}-\d\d-\d\d"
_CLOCK = rf"{_DATE}[T ]\d\d:\d\d(:\d\d(\.\d{{1,6}}0*)?)?"  # float64 seconds are exact to a microsecond
# Times since 1970 from 1973 to 5138 are between these limits if they are seconds, milliseconds, micro- or nanoseconds.
UNITS = (1e8, 1e11, 1e14, 1e17)
TIMES = {
    "a number": re.compile(_NUMBER, re.ASCII),
    "a date": re.compile(_DATE, re.ASCII),
    "a date with a time of day": re.compile(_CLOCK, re.ASCII),
    "a date with a time of day and a UTC offset": re.compile(rf"{_CLOCK} ?(Z|[+-]\d\d(:?\d\d)?)", re.ASCII),
}


class AtomicFile:
    """An atomic file in UTF-8, or UTF-16 with a byte-order mark, whose lines all have the columns of the header.

    A value in quotation marks may contain separators, doubled quotation marks and line breaks. A quotation mark
    elsewhere is a character of the value. Empty lines are skipped.

    Args:
        file: path of the file.
        separator: RecBole's option `field_separator`.

    Attributes:
        file: path of the file.
        names: names of the columns, without their types.
        types: type of each column as the header gives it; "" if it gives none.
        lines: line of each row in the file, from 1, (R,).
        notes: number of lines that were skipped or changed, by what happened to them.

    Raises:
        MissingFileError: the file cannot be read.
        ConfigurationError: the file is empty, has another encoding, has no usable header, or a line has too few or too
            many columns.
    """

    def __init__(self, file: Path, separator: str = "\t") -> None:
        self.file = file
        self.separator = "\t" if separator == "\\t" else separator  # a command line gives \t as two characters
        self.notes: Counter[str] = Counter()
        self._header, content = self._content()
        fields = [unquote(field.strip()).strip() for field in self._header.split(self.separator)]
        self.names = [field.partition(":")[0].strip() for field in fields]
        self.types = {field.partition(":")[0].strip(): field.partition(":")[2].strip() for field in fields}
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise self.error(
                f"several columns are named {', '.join(map(repr, twice))}",
                line=1,
                why="it is undefined which of them is read",
                do="give each column its own name",
            )
        self._rows, self.lines = self._whole_rows(content)
        if not len(self.lines):
            raise self.error(
                "the file has a header and no other line",
                why="there is nothing to learn from",
                do="write one line for each interaction or item",
            )

    def error(self, what: str, *, line: int | None = None, column: str = "", why: str, do: str) -> ConfigurationError:
        """Return the error of a place in the file."""
        place = [str(self.file), f"line {line}" if line else "", f"column {column!r}" if column else ""]
        return ConfigurationError(what, where=", ".join(filter(None, place)), why=why, do=do)

    def require(self, columns: Mapping[str, str]) -> None:
        """Raise an error if a column is missing.

        Args:
            columns: name of each column, by the setting that names it.

        Raises:
            ConfigurationError: the header lacks a column. The error names the separator if another one would help.
        """
        missing = {setting: name for setting, name in columns.items() if name not in self.names}
        if not missing:
            return
        pieces = {s: {field.strip(' "').partition(":")[0] for field in self._header.split(s)} for s in SEPARATORS}
        fitting = [s for s in SEPARATORS if len(pieces[s]) > len(self.names) and pieces[s] & set(missing.values())]
        if fitting:
            do = f"declare the separator of the columns: field_separator: {fitting[0]!r}"
        else:
            settings = ", ".join(
                f"{setting}: {(nearest(name, filter(None, self.names), cutoff=0.6) or ['NAME'])[0]}"
                for setting, name in missing.items()
            )
            do = (
                f"write the names of the columns with their types into the first line ({HEADER}), or set the names "
                f"that the file has ({settings}); recbole-gr2 data convert makes atomic files of other ones"
            )
        raise self.error(
            f"the header has no column {', '.join(map(repr, missing.values()))}; it has {self.names}",
            line=1,
            why="users, items and their order in time are read from these columns",
            do=do,
        )

    def kind(self, column: str) -> str:
        """Return the declared type of a column.

        Raises:
            ConfigurationError: the header declares no type, or one that RecBole does not have.
        """
        kind = self.types[column]
        if kind in TYPES:
            return kind
        similar = (nearest(kind, TYPES) or ["token"])[0]
        raise self.error(
            f"{column!r} has {f'the unknown type {kind!r}' if kind else 'no type'}",
            line=1,
            column=column,
            why="the type defines how the values are read",
            do=f"declare one of {', '.join(TYPES)} in the first line, for example {column}:{similar}",
        )

    def read(self, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the values of columns as text, (R,) each."""
        positions = {self.names.index(column): column for column in columns}
        frame: Any = pd.read_csv(
            io.BytesIO(self._rows),
            sep=CUT,
            header=None,
            names=range(len(self.names)),
            usecols=list(positions),
            dtype=str,
            na_filter=False,
            quoting=csv.QUOTE_NONE,
            lineterminator="\n",
            skip_blank_lines=False,
            encoding="utf-8",
        )
        if len(frame) != len(self.lines):
            raise GR2Error(
                f"{len(frame)} of {len(self.lines)} lines were read",
                where=str(self.file),
                why="a result from a part of the data would be wrong",
                do="report this as a bug, with the file",
            )
        return {column: frame[position].to_numpy(dtype=object) for position, column in positions.items()}

    def ids(self, column: str, values: np.ndarray) -> np.ndarray:
        """Return user or item ids without blanks at their ends.

        Raises:
            ConfigurationError: an id is missing, or contains an invisible character.
        """
        codes, distinct = pd.factorize(values)
        ids = [str(value).strip() for value in distinct]
        wrong = [n for n, name in enumerate(ids) if name in MISSING or name == "[PAD]" or not name.isprintable()]
        if wrong:
            row = int(np.flatnonzero(np.isin(codes, wrong))[0])
            name = values[row].strip()
            if not name:
                what = "an id is missing"
            elif name in MISSING:
                what = f"the id {name!r} stands for a missing value"
            elif name == "[PAD]":
                what = f"the id {name!r} is reserved for padding"
            else:
                what = f"the id {name!r} contains an invisible character"
            raise self.error(
                what,
                line=int(self.lines[row]),
                column=column,
                why="the line would belong to a user or an item that does not exist",
                do="correct the id, or remove the line; if it is a real name, write it in another way",
            )
        changed = np.array([name != value for name, value in zip(ids, distinct, strict=True)], dtype=bool)[codes]
        if changed.any():
            self.notes[f"blanks at the ends of {column} removed"] += int(changed.sum())
        return np.array(ids, dtype=object)[codes]

    def times(self, column: str, values: np.ndarray) -> np.ndarray:
        """Return times as numbers, (R,): numbers as they are, ISO dates as seconds since 1970 in UTC.

        Raises:
            ConfigurationError: a time is missing, is neither a number nor an ISO date, or has another form or unit
                than other times.
        """
        texts = [value.strip() for value in values]
        form = next((name for name, pattern in TIMES.items() if pattern.fullmatch(texts[0])), "a number")
        fits = np.array([TIMES[form].fullmatch(text) is not None for text in texts])
        if form == "a number":
            numbers = np.array([float(text) if fit else np.nan for text, fit in zip(texts, fits.tolist(), strict=True)])
        else:
            dates: Any = pd.to_datetime(pd.Series(texts), format="ISO8601", utc=True, errors="coerce")
            numbers = dates.dt.tz_localize(None).to_numpy(dtype="datetime64[us]").astype(np.int64) / 1e6
            numbers[~fits | dates.isna().to_numpy()] = np.nan
        if not np.isfinite(numbers).all():
            row = int(np.flatnonzero(~np.isfinite(numbers))[0])
            other = next((name for name, pattern in TIMES.items() if pattern.fullmatch(texts[row])), "")
            if texts[row] in MISSING:
                what = "a time is missing"
            elif other not in ("", form):
                what = f"the time {texts[row]!r} is {other}, but line {self.lines[0]} has {form}"
            elif other:
                what = f"the time {texts[row]!r} does not exist or is out of range"
            else:
                what = f"the time {texts[row]!r} is neither a number nor an ISO date"
            raise self.error(
                what,
                line=int(self.lines[row]),
                column=column,
                why="histories, splits and targets are defined by time",
                do="write all times in one form: as numbers such as Unix seconds, or as ISO dates such as 2014-05-13 "
                "or 2014-05-13 16:53:20; recbole-gr2 data convert reads other forms",
            )
        if np.abs(numbers).max() > 2**53 and len(np.unique(numbers)) < len(set(texts)):
            raise self.error(
                "times have more digits than a float64 number holds",
                column=column,
                why="different times would be equal",
                do="write seconds, milliseconds or microseconds",
            )
        units = np.digitize(numbers, UNITS)
        mixed = np.flatnonzero((units > 0) & (units != units.max()))
        if len(mixed):
            raise self.error(
                f"the time {texts[mixed[0]]!r} has another unit than {texts[int(np.argmax(numbers))]!r}",
                line=int(self.lines[mixed[0]]),
                column=column,
                why="seconds, milliseconds and so on in one column give a wrong order",
                do="write all times in one unit",
            )
        return numbers

    def numbers(self, column: str, values: np.ndarray) -> np.ndarray:
        """Return numbers, (R,); a missing one is NaN.

        Raises:
            ConfigurationError: a value is no finite number.
        """
        texts = [value.strip() for value in values]
        pattern = TIMES["a number"]
        numbers = np.array([float(text) if pattern.fullmatch(text) else np.nan for text in texts])
        given = np.array([text not in MISSING for text in texts])
        wrong = np.flatnonzero(given & ~np.isfinite(numbers))
        if len(wrong):
            raise self.error(
                f"{values[wrong[0]]!r} is no number",
                line=int(self.lines[wrong[0]]),
                column=column,
                why=f"the header declares {column}:float",
                do=f"write numbers with a decimal point, or declare {column}:token",
            )
        return numbers

    def _content(self) -> tuple[str, bytes]:
        """Return the header, and the other lines in UTF-8. Columns end with `CUT`, and each line with a line feed."""
        if not isinstance(self.separator, str) or not self.separator or set(self.separator) & set('"\r\n'):
            raise ConfigurationError(
                f"{self.separator!r} cannot separate columns",
                where="field_separator",
                why="lines cannot be split into columns",
                do='set field_separator: "\\t"',
            )
        try:
            raw = self.file.read_bytes()
        except OSError as error:
            raise MissingFileError(
                f"a data file cannot be read ({error.strerror})",
                where=str(self.file),
                why="interactions and item texts are read from data files",
                do="put a readable file there",
            ) from error
        encoding = "UTF-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "UTF-8"
        try:
            text = raw.decode(encoding).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise self.error(
                f"byte {error.start + 1} of the file is not valid {encoding}",
                line=raw.count(b"\n", 0, error.start) + 1,
                why="texts and ids would be wrong",
                do="convert the file to UTF-8, for example with iconv -f LATIN1 -t UTF-8",
            ) from error
        del raw
        if not text.strip():
            raise self.error(
                "the file is empty",
                why="interactions and item texts are read from data files",
                do=f"write a header with the names and types of the columns ({HEADER}), and one line for each row",
            )
        for character, name in (("\0", "NUL"), *(() if self.separator == CUT else ((CUT, "U+001F"),))):
            if character in text:
                raise self.error(
                    f"the file contains the character {name}",
                    line=text.count("\n", 0, text.index(character)) + 1,
                    why="text does not contain this character: the file is damaged or has another encoding",
                    do="remove the character, or convert the file to UTF-8, for example with iconv -f UTF-16 -t UTF-8",
                )
        if "\r" in text:
            text = text.replace("\r\n", "\n")
            if "\n" not in text:
                text = text.replace("\r", "\n")
        header, _, rest = text.replace(self.separator, CUT).partition("\n")
        return header.replace(CUT, self.separator), rest.encode() + (b"" if rest.endswith("\n") or not rest else b"\n")

    def _whole_rows(self, content: bytes) -> tuple[bytes, np.ndarray]:
        """Return the content without quotation marks and empty lines, one line for each row, and the line numbers."""
        data = np.frombuffer(content, dtype=np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        starts = np.r_[0, ends[:-1] + 1] if len(ends) else ends
        cuts = np.searchsorted(np.flatnonzero(data == ord(CUT)), ends)
        fits = np.diff(np.r_[0, cuts]) == len(self.names) - 1
        special = ~fits
        special[np.searchsorted(ends, np.flatnonzero(data == ord('"')))] = True
        del data, cuts
        keep = np.ones(len(ends), dtype=bool)
        pieces, written = [], 0

        def line(number: int) -> str:
            return content[starts[number] : ends[number]].decode()

        for number in np.flatnonzero(special).tolist():
            if starts[number] < written:  # It belongs to a value that began on an earlier line.
                continue
            pieces.append(content[written : starts[number]])
            if line(number).strip(" \r"):
                fields, used = self._fields(line, number, fits)
                row = CUT.join(unquote(field.replace(CUT, self.separator)).replace("\n", "\r") for field in fields)
                pieces.append(row.encode() + b"\n")
                keep[number + 1 : number + used] = False
            else:
                used = 1
                keep[number] = False
                self.notes["empty lines skipped"] += 1
            written = int(ends[number + used - 1]) + 1
        rows = b"".join([*pieces, content[written:]]) if pieces else content
        return rows, np.flatnonzero(keep) + 2

    def _fields(self, line: Callable[[int], str], number: int, fits: np.ndarray) -> tuple[list[str], int]:
        """Return the fields of the row that begins on a line, with quotation marks, and its number of lines.

        A quotation mark that is not closed on its line begins a value with line breaks if the lines do not fit the
        header otherwise. Else it is a character of the value, as in the title `"A" is for "Alibi`.

        Args:
            line: returns the text of a line by its number, from 0.
            number: the line.
            fits: whether each line has as many separators as the header.

        Raises:
            ConfigurationError: the row has too few or too many columns, or can be read in two ways.
        """
        plain = line(number).split(CUT)
        fields, is_open = _merge(plain)
        if is_open:
            alone = fits[number : number + 2].all()
            longer, used = self._over_lines(line, number, len(fits), AMBIGUOUS_LINES if alone else LONGEST_VALUE)
            if used and fits[number : number + used].all():
                raise self.error(
                    f"a quotation mark opens a value that may end here or on line {number + used + 1}",
                    line=number + 2,
                    why="the lines in between are rows of their own, or a part of the value",
                    do="put the value in quotation marks and double those inside it, or remove the line breaks",
                )
            if used:
                self.notes["lines joined to a value with line breaks"] += used - 1
                return longer, used
        if not is_open and len(fields) == len(self.names):
            return fields, 1
        # With commas, a value in quotation marks may hide a missing column. Tabs hardly occur in values.
        if fits[number] and (is_open or self.separator == "\t"):
            return plain, 1
        count = len(plain if is_open else fields)
        raise self.error(
            f"the line has {count} {'column' if count == 1 else 'columns'}, and the header has {len(self.names)}",
            line=number + 2,
            why="values would be read as those of another column, or be cut",
            do="remove separators and line breaks from the values, or put such values in quotation marks",
        )

    def _over_lines(self, line: Callable[[int], str], number: int, count: int, most: int) -> tuple[list[str], int]:
        """Fields of a row whose value in quotation marks ends on a later line, and its number of lines; 0 if none."""
        text = line(number)
        for other in range(number + 1, min(number + most, count)):
            text += "\n" + line(other)
            fields, is_open = _merge(text.split(CUT))
            if not is_open:
                return (fields, other - number + 1) if len(fields) == len(self.names) else ([], 0)
        return [], 0


def unquote(text: str) -> str:
    """A field without its CSV quotation marks.

    >>> unquote('"a ""b"" c"'), unquote('5" pipe')
    ('a "b" c', '5" pipe')
    """
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1].replace('""', '"')
    return text


def _merge(pieces: Sequence[str]) -> tuple[list[str], bool]:
    """Join the pieces of values that a separator in quotation marks has cut.

    Returns:
        The fields, and whether the quotation mark of the last one is not closed.
    """
    fields: list[str] = []
    is_open = False
    for piece in pieces:
        if is_open:
            fields[-1] += CUT + piece
        else:
            fields.append(piece)
        field = fields[-1]
        joined_without_end = is_open and not field.endswith('"')
        is_open = field.startswith('"') and (field.count('"') % 2 == 1 or joined_without_end)
    return fields, is_open
