"""Convert the review and metadata files of the Amazon releases 2014, 2018 and 2023 into RecBole's atomic files.

    python -m recbole_gr2.convert NAME --reviews FILE --metadata FILE --output DIR

The folder DIR/NAME gets NAME.inter, NAME.item, and NAME.yaml, the settings of a run. The last line on stdout is the
command of this run. Files are read line by line, and texts of reviews are not kept. A process holds the ids of users
and items, and eight bytes for each interaction.

Fields of the JSON lines. The metadata of 2014 are lines in Python notation. Times of 2023 are milliseconds.

| release | reviews | metadata |
|---|---|---|
| 2014 | reviewerID, asin, overall, unixReviewTime | asin, title, brand, categories, description |
| 2018 | reviewerID, asin, overall, unixReviewTime | asin, title, brand, category, description |
| 2023 | user_id, parent_asin, rating, timestamp | parent_asin, title, store, categories, description |

Ratings without reviews are comma-separated: user, item, rating, time in 2014; item, user, rating, time in 2018; and the
names of the fields in a header in 2023.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gzip
import html
import json
import math
import os
import re
import shlex
import sys
import tempfile
import unicodedata
import warnings
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from recbole_gr2.bridge.atomic import MISSING
from recbole_gr2.bridge.item_text import SURROGATE, TAG
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError

RELEASES = ("2014", "2018", "2023")
OLD = ("reviewerID", "asin", "overall", "unixReviewTime")  # user, item, rating and time in 2014 and 2018
NEW = ("user_id", "parent_asin", "rating", "timestamp")  # the same in 2023
CSV_COLUMNS = {"2014": (0, 1, 2, 3), "2018": (1, 0, 2, 3)}  # places of user, item, rating and time without a header
INTER = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
ITEM = ("item_id:token", "title:token_seq", "brand:token", "categories:token_seq", "description:token_seq")
TEXTS = ("title", "brand", "categories", "description")
SECONDS = (1e8, 1e11)  # Times from 1973 to 5138. Milliseconds and days are outside of these limits.
EVERY = 1_000_000  # lines between two progress lines
SAMPLE = 1000  # lines whose fields tell the release


@dataclass
class Report:
    """What a conversion has read and written.

    Attributes:
        release: 2014, 2018 or 2023.
        folder: the data set's folder.
        command: the command that runs the data set.
        counts: numbers of lines, users, items and so on, by what is counted. "Malformed" lines were left out; of
            several metadata lines of an item the first is kept; repeated interactions are kept.
    """

    release: str
    folder: Path
    command: str = ""
    counts: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = [f"{count:12,} {what}" for what, count in self.counts.items()]
        return "\n".join([f"Amazon {self.release}, written to {self.folder}", *counts])


class _Malformed(ValueError):
    """A line cannot be converted."""


class _Lines:
    """Records of a file, one for each line that is not empty.

    Args:
        file: a file of JSON lines or comma-separated lines, also with gzip (`.gz`).
        skip: whether malformed lines are counted and left out.

    Attributes:
        read: lines without empty ones that were read so far.
        number: number of the current line in the file, from 1.
        malformed: lines that were left out.
    """

    def __init__(self, file: Path, skip: bool) -> None:
        self.file, self.skip = file, skip
        self.is_csv = file.name.removesuffix(".gz").endswith(".csv")
        self.read = self.number = self.malformed = 0

    def __iter__(self) -> Iterator[Any]:
        try:
            with gzip.open(self.file) if self.file.suffix == ".gz" else open(self.file, "rb") as stream:
                for self.number, line in enumerate(stream, start=1):
                    if not line.strip():
                        continue
                    self.read += 1
                    if self.read % EVERY == 0:
                        print(f"{self.file.name}: {self.read:,} lines", file=sys.stderr, flush=True)
                    try:
                        text = line.decode("utf-8-sig" if self.number == 1 else "utf-8").rstrip("\r\n")
                        record = next(csv.reader([text], strict=True)) if self.is_csv else _parse(text)
                    except (ValueError, csv.Error) as error:
                        self.refuse(error)
                    else:
                        yield record
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ConfigurationError(
                f"the file cannot be unpacked after line {self.number} ({error})",
                where=str(self.file),
                why="the rest of the data would be missing",
                do="download the file again; remove .gz from its name if it is not packed",
            ) from error
        except OSError as error:
            raise MissingFileError(
                f"a file cannot be read ({error.strerror})",
                where=str(self.file),
                why="it contains the interactions or the item texts",
                do="correct --reviews or --metadata",
            ) from error

    def refuse(self, error: Exception) -> None:
        """Count the current line as malformed, or raise a ConfigurationError that names it."""
        if not self.skip:
            raise ConfigurationError(
                f"a line is malformed ({error})",
                where=f"{self.file}, line {self.number}",
                why="an interaction or the texts of an item would be missing",
                do="repair the line, give the right --release, or leave out such lines with --skip_malformed",
            ) from error
        self.malformed += 1


def convert(
    name: str,
    reviews: str | Path,
    metadata: str | Path,
    output: str | Path,
    *,
    release: str | None = None,
    skip_malformed: bool = False,
    overwrite: bool = False,
) -> Report:
    """Write the data set `name` into the folder `output`/`name`.

    Args:
        name: name of the data set: letters, digits, `_`, `-` and `.`.
        reviews: file with reviews or ratings.
        metadata: file with item texts.
        output: folder of data sets, the later `data_path`.
        release: 2014, 2018 or 2023; by default the fields of the files tell it.
        skip_malformed: whether malformed lines are left out.
        overwrite: whether the files of an existing folder are replaced.

    Raises:
        MissingFileError: a file cannot be read.
        ConfigurationError: a line is malformed, the files do not belong together or to the release, or the folder
            exists.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigurationError(
            f"{name!r} cannot name a data set",
            where="NAME",
            why="a folder and its files get this name",
            do="use letters, digits, _, - and .",
        )
    folder = Path(output) / name
    if folder.exists() and not overwrite:
        raise ConfigurationError(
            "the folder of the data set exists",
            where=str(folder),
            why="its files would be replaced",
            do="choose another name, or add --overwrite",
        )
    report = Report(_release(Path(reviews), Path(metadata), release), folder)
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=f".{name}-") as temporary:
            part = Path(temporary)
            items = _write_interactions(part / f"{name}.inter", _Lines(Path(reviews), skip_malformed), report)
            texts = _write_items(part / f"{name}.item", _Lines(Path(metadata), skip_malformed), items, report)
            (part / f"{name}.yaml").write_text(_settings(name, texts, report), encoding="utf-8")
            folder.mkdir(exist_ok=True)
            for file in sorted(part.iterdir()):
                os.replace(file, folder / file.name)
    except OSError as error:
        raise ConfigurationError(
            f"the data set cannot be written ({error.strerror})",
            where=str(folder),
            why="a run reads its files from there",
            do="choose another folder with --output, or free disk space",
        ) from error
    report.command = shlex.join(
        ["recbole-gr2", "--config_files", str(folder / f"{name}.yaml"), "--data_path", str(output)]
    )
    return report


def one_line(text: str) -> str:
    """Return a text in one line: white space and control characters are blanks, and surrogate pairs are joined.

    Reading an atomic file gives the result unchanged. `item_text.clean_text` merges white space in the same way.

    >>> one_line(' a\\tb \\n "c" ')
    'a b "c"'
    """
    if SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
    if not text.isprintable():
        text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text).replace("\ufeff", "")
    return " ".join(text.split())


def _parse(text: str) -> dict[str, Any]:
    """The object of a line in JSON, or in Python notation as in the metadata of 2014."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns about unknown escape sequences.
                record = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise _Malformed("it is no JSON object") from None
    if not isinstance(record, dict):
        raise _Malformed("it is no JSON object")
    return record


def _wrong_release(what: str, where: str, do: str) -> ConfigurationError:
    why = "each release has its own fields, columns and unit of time"
    return ConfigurationError(what, where=where, why=why, do=do)


def _releases(record: Any) -> set[str]:
    """Releases to which a line of reviews, ratings or metadata can belong."""
    if isinstance(record, list):
        return {"2023"} if set(NEW) <= set(record) else {"2014", "2018"} if len(record) == 4 else set()
    if "parent_asin" in record:
        return {"2023"}
    if "asin" not in record:
        return set()
    if {"category", "verified", "style", "vote"} & set(record):
        return {"2018"}
    return {"2014"} if {"categories", "helpful"} & set(record) else {"2014", "2018"}


def _release(reviews: Path, metadata: Path, given: str | None) -> str:
    """The release that the fields of both files have.

    Raises:
        ConfigurationError: the fields are those of no release, of two releases, or of another one than `given`.
    """
    possible = {given} if given else set(RELEASES)
    for file in (reviews, metadata):
        lines, found = _Lines(file, True), set(RELEASES)
        for record in islice(lines, 1 if lines.is_csv else SAMPLE):  # Ratings of 2023 have a header.
            found &= _releases(record) or found
            if len(found) == 1:
                break
        if not found & possible or found == set(RELEASES):
            fields = " or ".join(sorted(found)) if found < set(RELEASES) and found else "no single release"
            raise _wrong_release(
                f"the fields are those of {fields}, and not of {' or '.join(sorted(possible))}",
                str(file),
                "give reviews and metadata of one release and category; omit --release, or correct it",
            )
        possible &= found
    if len(possible) > 1:
        raise _wrong_release("the fields fit 2014 and 2018", f"{reviews}, {metadata}", "add --release 2014 or 2018")
    return possible.pop()


def _id(value: Any, what: str) -> str:
    name = value.strip() if isinstance(value, str) else ""
    if name in MISSING or name == "[PAD]" or not name.isprintable():
        raise _Malformed(f"{what} is {value!r:.80}, expected an id")
    return name


def _number(value: Any, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _Malformed(f"{what} is {value!r:.80}, expected a number")
    return number


def _cell(text: str) -> str:
    """A value of an atomic file. A quotation mark at its beginning would otherwise be read as that of CSV."""
    return '"' + text.replace('"', '""') + '"' if text.startswith('"') else text


def _value(record: Any, key: Any) -> Any:
    try:
        return record[key]
    except (KeyError, IndexError, TypeError):
        missing = f"column {key + 1}" if isinstance(key, int) else f"the field {key!r}"
        raise _Malformed(f"{missing} is missing") from None


def _write_interactions(file: Path, lines: _Lines, report: Report) -> dict[str, int]:
    """Write the `.inter` file, and return the items with their numbers."""
    names = NEW if report.release == "2023" else OLD
    keys: Sequence[Any] | None = CSV_COLUMNS.get(report.release) if lines.is_csv else names
    unit = 1000 if report.release == "2023" else 1
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    pairs = array("q")
    with open(file, "w", encoding="utf-8", newline="\n") as out:
        out.write("\t".join(INTER) + "\n")
        for record in lines:
            if keys is None:  # `_release` has found these names in the header.
                keys = [record.index(name) for name in names]
                lines.read -= 1
                continue
            try:
                user, item, rating, time = (_value(record, key) for key in keys)
                user, item = _id(user, names[0]), _id(item, names[1])
                rating, time = _number(rating, names[2]), _number(time, names[3]) / unit
                if not SECONDS[0] <= time < SECONDS[1]:
                    raise _Malformed(f"{names[3]} is no time in {'milli' if unit > 1 else ''}seconds since 1970")
            except _Malformed as error:
                lines.refuse(error)
                continue
            seconds = f"{time:.3f}".rstrip("0").rstrip(".")
            out.write(f"{_cell(user)}\t{_cell(item)}\t{rating:g}\t{seconds}\n")
            pairs.append(users.setdefault(user, len(users)) << 32 | items.setdefault(item, len(items)))
    if not pairs:
        raise _wrong_release("no interaction was read", str(lines.file), "give the right file and --release")
    report.counts |= {
        "lines of reviews": lines.read,
        "malformed lines of reviews": lines.malformed,
        "interactions": len(pairs),
        "users": len(users),
        "items": len(items),
        "repeated interactions": len(pairs) - len(np.unique(np.frombuffer(pairs, dtype=np.int64))),
    }
    return items


def _write_items(file: Path, lines: _Lines, items: Mapping[str, int], report: Report) -> list[str]:
    """Write the `.item` file, in the order of the metadata, and return the names of the texts that occur."""
    key, brand, categories = {
        "2014": ("asin", "brand", "categories"),
        "2018": ("asin", "brand", "category"),
        "2023": ("parent_asin", "store", "categories"),
    }[report.release]
    written: set[str] = set()
    counts = dict.fromkeys(("repeated", "HTML", *TEXTS), 0)
    with open(file, "w", encoding="utf-8", newline="\n") as out:
        out.write("\t".join(ITEM) + "\n")
        for record in lines:
            try:
                item = _id(_value(record, key), key)
            except _Malformed as error:
                lines.refuse(error)
                continue
            if item not in items:
                continue
            if item in written:
                counts["repeated"] += 1
                continue
            written.add(item)
            title = _text(record.get("title"))
            texts = (title, _text(record.get(brand)), _path(record.get(categories)), _text(record.get("description")))
            out.write("\t".join(map(_cell, (item, *texts))) + "\n")
            for name, text in zip(TEXTS, texts, strict=True):
                counts[name] += bool(text)
            counts["HTML"] += bool(TAG.search(title)) or html.unescape(title) != title
    if not written:
        do = "give the reviews and the metadata of one release and category, or the right --release"
        raise _wrong_release(f"none of the {len(items):,} items has a line with metadata", str(lines.file), do)
    report.counts |= {
        "lines of metadata": lines.read,
        "malformed lines of metadata": lines.malformed,
        "repeated lines of metadata": counts["repeated"],
        "items without metadata": len(items) - len(written),
        "titles with HTML": counts["HTML"],
        **{f"items with metadata and without {name}": len(written) - counts[name] for name in TEXTS},
    }
    return [name for name in TEXTS if counts[name]]


def _text(value: Any) -> str:
    """A text, or the joined texts of a list, in one line; "" for anything else."""
    if isinstance(value, list):
        return " ".join(filter(None, map(_text, value)))
    return one_line(value) if isinstance(value, str) else ""


def _path(value: Any) -> str:
    """The joined names of a path. Of several paths it is the first of the longest, as in `item_text.clean_text`."""
    if not isinstance(value, list):
        return _text(value)
    longest: Any = max((path for path in value if isinstance(path, list)), key=len, default=value)
    return " > ".join(filter(None, map(_text, longest)))


def _settings(name: str, texts: Sequence[str], report: Report) -> str:
    """The text of the property file."""
    size = ", ".join(f"{report.counts[what]:,} {what}" for what in ("users", "items", "interactions"))
    lines = [
        f"# Amazon {report.release}, written by recbole_gr2.convert: {size}",
        "# before the 5-core filter.",
        f"dataset: {json.dumps(name)}",
        'user_inter_num_interval: "[5,inf)"',
        'item_inter_num_interval: "[5,inf)"',
        *(f"text_{text}: {text if text in (*texts, 'title') else '~'}" for text in TEXTS),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code, see `recbole_gr2.errors`."""
    parser = argparse.ArgumentParser(
        prog="python -m recbole_gr2.convert", description="Convert raw Amazon files into a data set for RecBole."
    )
    parser.add_argument("name", metavar="NAME", help="name of the data set")
    parser.add_argument("--reviews", required=True, metavar="FILE", help="reviews (.json, .jsonl) or ratings (.csv)")
    parser.add_argument("--metadata", required=True, metavar="FILE", help="item texts (.json, .jsonl)")
    parser.add_argument("--output", default="dataset", metavar="DIR", help="folder of data sets (default: dataset)")
    parser.add_argument("--release", choices=RELEASES, help="by default the fields of the files tell it")
    parser.add_argument("--skip_malformed", action="store_true", help="count malformed lines and leave them out")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an existing data set")
    try:
        report = convert(**vars(parser.parse_args(argv)))
    except GR2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report, file=sys.stderr)
    print(report.command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
