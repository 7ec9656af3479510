"""Files of rows, read one by one: text with separators, JSON lines and Parquet, packed or not.

Text is read with the modules csv and json of Python, because a mistake in a value then has the number of its line.
DuckDB reads Parquet.
"""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import duckdb

from recbole_gr2.bridge.atomic import MISSING
from recbole_gr2.errors import ConfigurationError, MissingFileError

EVERY = 1_000_000  # lines between two progress lines
SAMPLE = 1000  # lines from which the form of a file is detected
SEPARATORS = ("\t", ",", ";", "|", "::")
MOVIELENS = ("::", "|")  # separators of files of MovieLens
LONGEST_VALUE = 1000  # lines that one value in quotation marks may have
WIDEST_VALUE = 2**24  # characters of one value; the limit of the module csv is 131,072
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
NOT_READ = {b"PK\x03\x04": "a ZIP archive or an Excel workbook", b"\xd0\xcf\x11\xe0": "an Excel workbook"}


class Malformed(ValueError):
    """A line cannot be converted."""


def id_of(value: Any, what: str) -> str:
    """Return an id as it is in the file, without blanks at its ends.

    Raises:
        Malformed: it is missing, contains an invisible character, or is no text or number.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    name = value.strip() if isinstance(value, str) else ""
    if name in MISSING or name == "[PAD]" or not name.isprintable():
        raise Malformed(f"{what} is {value!r:.80}, expected an id")
    return name


def _open_zstd(file: Path) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd"))


PACKED: dict[str, tuple[bytes, Callable[[Path], Any]]] = {  # ending of the name: first bytes, and how to open it
    ".gz": (b"\x1f\x8b", gzip.open),
    ".bz2": (b"BZh", bz2.open),
    ".xz": (b"\xfd7zXZ", lzma.open),
    ".zst": (b"\x28\xb5\x2f\xfd", _open_zstd),
}


class Source:
    """The rows of a file, and what was read of them.

    The content tells the form: Parquet, JSON lines (the first character is a brace), or text with separators. Lines in
    Python notation, as in the metadata of the Amazon release 2014, count as JSON. Numbers of JSON keep the digits that
    they have in the file. In text, values may stand in quotation marks as in CSV. Tab- and pipe-separated files often
    have quotation marks that are characters of a value: a line that is malformed as CSV and has the right number of
    columns otherwise is read in this way.

    Args:
        file: the file.
        encoding: encoding of a text, by the name that Python has for it. By default it is UTF-16 if the file has its
            byte-order mark, Latin-1 for the files of MovieLens that are not in UTF-8, and else UTF-8.
        skip: whether malformed lines are counted and left out.

    Attributes:
        form: `text`, `json` or `parquet`.
        separator: the separator of a text.
        columns: names of the columns; "1", "2", ... after `number_columns`.
        sample: the first records, at most 1,000: lists of values of a text, or mappings.
        line: number of the current line in the file, from 1; of a Parquet file that of the row.
        read: lines without empty ones that were read; a value with line breaks is in one.
        malformed: lines that were left out.
        with_quotes: lines whose quotation marks were read as characters, though CSV has another meaning for them.

    Raises:
        MissingFileError: the file cannot be read.
        ConfigurationError: the file is empty, damaged, or of another form.
    """

    def __init__(self, file: str | Path, *, encoding: str | None = None, skip: bool = False) -> None:
        self.file, self.encoding, self.skip = Path(file), encoding or "utf-8", skip
        self.separator = ","
        self.has_header = False
        self.line = self.read = self.malformed = self.with_quotes = 0
        self._width = 0
        self._check_encoding()
        self._open, self.form = self._detect()
        csv.field_size_limit(max(csv.field_size_limit(), WIDEST_VALUE))
        if self.form == "text":
            self._detect_separator()
            if encoding is None and self.separator in MOVIELENS and any(error for _, _, error in self._lines()):
                self.encoding = "latin-1"
        self.sample: list[Any] = self._read_sample()
        if self.form == "text":
            self.has_header = True
            self.columns = [value.strip() for value in self.sample[0]]
        else:
            self.columns = list(dict.fromkeys(str(key) for record in self.sample for key in record))

    def number_columns(self) -> None:
        """Read the first line of a text as data. The names of the columns are their numbers, from 1."""
        self.has_header = False
        self.columns = [str(number) for number in range(1, len(self.sample[0]) + 1)]

    def example(self, column: str) -> str:
        """Return the first value of a column that is not empty, cut to 40 characters; "" if there is none."""
        place = self.columns.index(column)
        for record in self.sample[self.has_header :]:
            value = record[place] if isinstance(record, list) else record.get(column)
            if value not in (None, ""):
                return str(value)[:40]
        return ""

    def described_columns(self) -> str:
        """Return the columns, each with an example, as in an error message."""
        return ", ".join(f"{column!r} (e.g. {self.example(column)!r})" for column in self.columns)

    def rows(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """Yield the values of columns, line by line; None for a value that a JSON line does not have.

        Values of a text are texts. Values of JSON are texts, booleans, None, lists or mappings. Numbers and times of a
        Parquet file are texts; a whole number has no decimal point.

        Raises:
            ConfigurationError: a line is malformed, or the file is damaged.
        """
        self.line = self.read = self.malformed = self.with_quotes = 0
        if self.form == "text":
            places = [self.columns.index(column) for column in columns]
            for record in islice(self._records(), int(self.has_header), None):
                yield [record[place] for place in places]
            self.read -= self.has_header
        elif self.form == "json":
            for record in self._records():
                yield [record.get(column) for column in columns]
        else:
            yield from self._parquet_rows(columns)

    def refuse(self, error: Exception | str, *, do: str = "", always: bool = False) -> None:
        """Count the current line as malformed, or raise a ConfigurationError that names it.

        Args:
            error: what is wrong with the line.
            do: what the user can do.
            always: whether the line cannot be left out.
        """
        if always or not self.skip:
            raise ConfigurationError(
                f"a line is malformed ({error})",
                where=f"{self.file}, {'row' if self.form == 'parquet' else 'line'} {self.line}",
                why="an interaction or the texts of an item would be missing",
                do=do or "repair the line, or leave out such lines with --skip_malformed",
            )
        self.malformed += 1

    def _read_sample(self) -> list[Any]:
        sample = list(islice(self._parquet_rows() if self.form == "parquet" else self._records(), SAMPLE))
        if not sample:
            raise ConfigurationError(
                "the file has no line that can be read" if self.malformed else "the file is empty",
                where=str(self.file),
                why="it contains the interactions or the item texts",
                do="give a file with one line for each interaction or item",
            )
        return sample

    def _check_encoding(self) -> None:
        try:
            b" ".decode(self.encoding, "ignore")
        except LookupError as error:
            raise ConfigurationError(
                f"there is no encoding {self.encoding!r}",
                where="--encoding",
                why="the bytes of the file cannot be read as text",
                do="name an encoding of Python, for example utf-8, cp1252, latin-1 or gb18030",
            ) from error

    def _detect(self) -> tuple[Callable[[], Any], str]:
        """How to open the file as bytes, and its form."""
        with self._reading(), open(self.file, "rb") as stream:
            first = stream.read(8)
        for beginning, what in NOT_READ.items():
            if first.startswith(beginning):
                raise ConfigurationError(
                    f"the file is {what}",
                    where=str(self.file),
                    why="its rows cannot be read line by line",
                    do="unpack it, or save the sheet as CSV in UTF-8",
                )
        unpack = next((how for start, how in PACKED.values() if first.startswith(start)), None)
        if unpack is None and self.file.suffix in PACKED:
            raise self._damaged("its first bytes are others")
        if first.startswith(b"PAR1"):
            return partial(open, self.file, "rb"), "parquet"
        opener: Callable[[], Any] = partial(unpack or partial(open, mode="rb"), self.file)
        with self._reading(), opener() as stream:
            start: bytes = stream.read(4096)
        if start.startswith(UTF_16) and self.encoding == "utf-8":
            self.encoding = "utf-16"
        text = start.decode(self.encoding, "ignore").lstrip("\ufeff \t\r\n")
        if text.startswith("["):
            raise ConfigurationError(
                "the file is a JSON array",
                where=str(self.file),
                why="JSON is read line by line, one object in each line",
                do=f"write one object in each line, for example with: jq -c '.[]' {self.file.name}",
            )
        return opener, "json" if text.startswith("{") else "text"

    def _damaged(self, what: object) -> ConfigurationError:
        return ConfigurationError(
            f"the file cannot be unpacked after line {self.line} ({what})",
            where=str(self.file),
            why="the rest of the data would be missing",
            do=f"download the file again; remove {self.file.suffix} from its name if it is not packed",
        )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn errors of reading the file into errors of this package."""
        try:
            yield
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise self._damaged(error) from error
        except OSError as error:
            if error.errno is None:  # an error of unpacking
                raise self._damaged(error) from error
            raise MissingFileError(
                f"a file cannot be read ({error.strerror})",
                where=str(self.file),
                why="it contains the interactions or the item texts",
                do="give the path of a file",
            ) from error

    def _lines(self) -> Iterator[tuple[int, str, UnicodeDecodeError | None]]:
        """Number and text of each line, and the error if it cannot be decoded."""
        with self._reading(), self._open() as stream:
            if self.encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32", "utf16", "utf32")):
                text = io.TextIOWrapper(stream, encoding=self.encoding, newline="\n")
                try:
                    for self.line, line in enumerate(text, start=1):
                        yield self.line, line, None
                except UnicodeDecodeError as error:
                    raise self._wrong_encoding(error, self.line + 1) from error
                return
            for number, raw in enumerate(stream, start=1):
                encoding = "utf-8-sig" if number == 1 and self.encoding.lower() in ("utf-8", "utf8") else self.encoding
                try:
                    yield number, raw.decode(encoding), None
                except UnicodeDecodeError as error:
                    yield number, raw.decode(encoding, "replace"), error

    def _wrong_encoding(self, error: UnicodeDecodeError, line: int) -> ConfigurationError:
        bad = error.object[error.start : error.start + 1]
        return ConfigurationError(
            f"the byte 0x{bad.hex()} is not valid {self.encoding.upper()}",
            where=f"{self.file}, line {line}",
            why="texts and ids would be wrong",
            do="name the encoding of the file, for example --encoding cp1252 for Windows and Western Europe, or leave "
            "out such lines with --skip_malformed",
        )

    def _records(self) -> Iterator[Any]:
        """The records of a text or of JSON lines. Malformed ones are refused."""
        lines = _Lines(self._lines())
        reader = csv.reader(lines, delimiter=self.separator, strict=True) if len(self.separator) == 1 else None
        self._width = 0
        while True:
            lines.buffered.clear()
            try:
                if self.form == "json":
                    text = next(lines)
                    record: Any = _parse(text) if text.strip() else None
                elif reader is None:
                    record = next(lines).rstrip("\r\n").split(self.separator)
                else:
                    record = next(reader)
                problem: Exception | None = None
            except StopIteration:
                return
            except (csv.Error, Malformed) as error:
                is_open = "end of data" in str(error)  # what the module csv says of it
                record, problem = [], Malformed("a quotation mark is not closed") if is_open else error
            self.line = lines.buffered[0][0]
            if problem is None and _is_empty(record):
                continue
            self.read += 1
            if self.read % EVERY == 0:
                print(f"{self.file.name}: {self.read:,} lines", file=sys.stderr, flush=True)
            undecodable = next((error for _, _, error in lines.buffered if error), None)
            if undecodable is not None:
                if not self.skip:
                    raise self._wrong_encoding(undecodable, self.line)
                problem = undecodable
            elif self.form == "text":
                record, problem = self._fitting(record, problem, lines)
            if problem is None:
                self._width = self._width or len(record)
                yield record
            else:
                lines.give_back()
                self.refuse(problem, always=self.form == "text" and not self._width)  # A header cannot be left out.

    def _fitting(
        self, record: list[str], problem: Exception | None, lines: _Lines
    ) -> tuple[list[str], Exception | None]:
        """The record with as many values as the first one, and what is wrong with it."""
        texts = [text.rstrip("\r\n").split(self.separator) for _, text, _ in lines.buffered]
        width = self._width or len(record) or len(texts[0])
        if self.separator in "\t|" and '"' in lines.buffered[0][1] and len(texts[0]) == width:
            several = len(texts) > 1 and all(len(fields) == width for fields in texts)
            if problem is not None or len(record) != width or several:
                self.with_quotes += 1
                lines.give_back()
                return texts[0], None
        if problem is None and len(record) != width:
            problem = Malformed(f"it has {len(record)} columns, and the first line has {width}")
        return record, problem

    def _detect_separator(self) -> None:
        """Choose the separator that cuts most of the first lines into as many values as the first one."""
        lines = [text for _, text, _ in islice((each for each in self._lines() if each[1].strip()), 30)]

        def score(separator: str) -> tuple[int, int]:
            try:
                fields = csv.reader(lines, delimiter=separator) if len(separator) == 1 else None
                counts = [len(row) for row in fields or (line.split(separator) for line in lines) if row]
            except csv.Error:
                return 0, 0
            return (sum(count == counts[0] for count in counts), counts[0]) if counts and counts[0] > 1 else (0, 0)

        self.separator = max(SEPARATORS, key=score)
        if lines and "\r" in lines[0].strip() and '"' not in lines[0]:
            raise ConfigurationError(
                "the lines end with a carriage return alone",
                where=str(self.file),
                why="the file would be a single line",
                do="write the file with a line feed at the end of each line",
            )

    def _parquet_rows(self, columns: Sequence[str] = ()) -> Iterator[Any]:
        """Rows of a Parquet file: values of columns, or mappings of all columns."""
        with duckdb.connect() as connection:
            connection.execute("SET TimeZone = 'UTC'; SET threads = 1")
            try:
                file = connection.read_parquet(str(self.file), binary_as_string=True)
                types = dict(zip(file.columns, map(str, file.types), strict=True))
                wanted = list(columns or types)
                query = file.project(", ".join(_text_of(column, types[column]) for column in wanted))
                batches = query.to_arrow_reader(10_000)
                for batch in batches:
                    for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                        self.line += 1
                        self.read += 1
                        yield list(values) if columns else dict(zip(wanted, values, strict=True))
            except duckdb.Error as error:
                raise ConfigurationError(
                    f"the Parquet file cannot be read ({str(error).splitlines()[0]})",
                    where=str(self.file),
                    why="it contains the interactions or the item texts",
                    do="write or download the file again",
                ) from error


class _Lines:
    """An iterator over texts of lines. Lines can be given back after the error of a reader.

    Attributes:
        buffered: number, text and error of the lines that were read since the buffer was emptied.
    """

    def __init__(self, lines: Iterator[tuple[int, str, UnicodeDecodeError | None]]) -> None:
        self._lines = lines
        self._pending: deque[tuple[int, str, UnicodeDecodeError | None]] = deque()
        self.buffered: list[tuple[int, str, UnicodeDecodeError | None]] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if len(self.buffered) == LONGEST_VALUE:
            raise csv.Error(f"a quotation mark is not closed within {LONGEST_VALUE:,} lines")
        line = self._pending.popleft() if self._pending else next(self._lines)
        self.buffered.append(line)
        return line[1]

    def give_back(self) -> None:
        """Return all buffered lines but the first one to the iterator."""
        self._pending.extendleft(reversed(self.buffered[1:]))
        del self.buffered[1:]


def _is_empty(record: Any) -> bool:
    return record is None or record == [] or (isinstance(record, list) and len(record) == 1 and not record[0].strip())


def _parse(text: str) -> dict[str, Any]:
    """The object of a line in JSON, or in Python notation as in the metadata of 2014."""
    try:
        record = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns about unknown escape sequences.
                record = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise Malformed("it is no JSON object") from None
    if not isinstance(record, dict):
        raise Malformed("it is no JSON object")
    return cast("dict[str, Any]", record)


def _text_of(column: str, kind: str) -> str:
    """The SQL of a column of a Parquet file: a text, unless it is a list, a structure or a boolean."""
    name = '"' + column.replace('"', '""') + '"'
    if kind in ("FLOAT", "DOUBLE"):
        whole = f"isfinite({name}) AND {name} = trunc({name}) AND abs({name}) < 9007199254740992"
        return f"CASE WHEN {whole} THEN {name}::BIGINT::VARCHAR ELSE {name}::VARCHAR END AS {name}"
    if kind == "BOOLEAN" or kind.endswith("]") or kind.startswith(("STRUCT", "MAP")):
        return name
    return f"{name}::VARCHAR AS {name}"
