"""The `.item` file: texts of the items, each in one line."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from recbole_gr2.bridge.atomic import MISSING
from recbole_gr2.bridge.item_text import SURROGATE, TAG
from recbole_gr2.convert.columns import TEXTS, Layout
from recbole_gr2.convert.reading import Malformed, Source, id_of
from recbole_gr2.convert.report import Report
from recbole_gr2.errors import ConfigurationError

TYPES = {"title": "token_seq", "brand": "token", "categories": "token_seq", "description": "token_seq"}


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


def text_of(value: Any) -> str:
    """Return a text or a number, or the joined texts of a list, in one line; "" for anything else."""
    if isinstance(value, list):
        return " ".join(filter(None, map(text_of, value)))
    if isinstance(value, bool | dict) or value is None:
        return ""
    return one_line(str(value))


def path_of(value: Any) -> str:
    """Return the joined names of a path. Of several paths it is the first of the longest, as in `clean_text`.

    >>> path_of([["Beauty"], ["Beauty", "Hair Care"]])
    'Beauty > Hair Care'
    """
    if not isinstance(value, list):
        return text_of(value)
    longest: Any = max((path for path in value if isinstance(path, list)), key=len, default=value)
    return " > ".join(filter(None, map(text_of, longest)))


def cell(text: str) -> str:
    """Return a value of an atomic file. A quotation mark at its beginning would otherwise be read as that of CSV.

    >>> cell('"A" is for Alibi')
    '\"\"\"A\"\" is for Alibi\"'
    """
    return '"' + text.replace('"', '""') + '"' if text.startswith('"') else text


def write_items(
    file: Path, texts: Source, columns: Mapping[str, str], layout: Layout, used: Set[str], report: Report
) -> list[str]:
    """Write the `.item` file in the order of the lines.

    Args:
        file: the file to write.
        texts: the file of items.
        columns: column of the item id and of each text.
        layout: what is known about the files.
        used: ids of the items that have interactions.
        report: gets counts and warnings.

    Returns:
        The names of the texts that occur.

    Raises:
        ConfigurationError: a line is malformed, or no item of `used` has a line.
    """
    names = [text for text in TEXTS if text in columns or (text == "categories" and layout.genres)]
    first: dict[str, int] = {}  # hash of the texts of each item that was written
    counts = dict.fromkeys(("repeated", "other", "HTML", "unused", "lines", *TEXTS), 0)
    with open(file, "w", encoding="utf-8", newline="\n") as out:
        out.write("\t".join(["item_id:token", *(f"{text}:{TYPES[text]}" for text in names)]) + "\n")
        for token, values in _items(texts, columns, layout):
            written = hash(values)
            if token in first:
                counts["repeated"] += 1
                counts["other"] += first[token] != written
                continue
            first[token] = written
            if token not in used:
                counts["unused"] += 1
                if not layout.keep_unused:
                    continue
            else:
                counts["lines"] += 1
                for name, text in zip(names, values, strict=True):
                    counts[name] += bool(text)
                counts["HTML"] += bool(TAG.search(values[0])) or html.unescape(values[0]) != values[0]
            out.write("\t".join(map(cell, (token, *values))) + "\n")
    items = len(used)
    if not counts["lines"]:
        raise ConfigurationError(
            f"none of the {items:,} items has a line with texts",
            where=str(texts.file),
            why="semantic IDs and prompts are computed from item texts",
            do=f"write the ids in the same way in both files: the interactions have {min(used)!r}, the "
            f"items {next(iter(first), '')!r}"
            + ("; give the files of one release and category" if not layout.keep_unused else ""),
        )
    report.counts |= {
        "lines of items": texts.read,
        "malformed lines of items": texts.malformed,
        "repeated lines of items": counts["repeated"],
        "items without a line with texts": items - counts["lines"],
        **{f"items without {name}": items - counts[name] for name in names},
        "titles with HTML, which a run removes": counts["HTML"],
        "items without interactions" + ("" if layout.keep_unused else ", left out"): counts["unused"],
    }
    if texts.with_quotes:
        report.counts["lines of items with quotation marks as characters"] = texts.with_quotes
    if counts["other"]:
        report.warnings.append(f"{counts['other']:,} lines of items have other texts than the first line of the item")
    if items - counts["title"] > items / 2:
        report.warnings.append(f"{items - counts['title']:,} of {items:,} items have no title")
    return [name for name in names if counts[name]]


def _items(texts: Source, columns: Mapping[str, str], layout: Layout) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Id and texts of each line of the file of items."""
    flags = [str(number) for number in range(6, 6 + len(layout.genres))]
    movies = layout.name == "MovieLens"
    for values in texts.rows([*columns.values(), *flags]):
        value = dict(zip(columns, values, strict=False))
        try:
            token = id_of(value["item"], columns["item"])
        except Malformed as error:
            texts.refuse(error)
            continue
        if flags:
            set_flags = zip(layout.genres, values[len(columns) :], strict=True)
            value["categories"] = ", ".join(genre for genre, flag in set_flags if flag == "1")
        elif movies and "categories" in value:
            genres = str(value["categories"])
            value["categories"] = "" if genres == "(no genres listed)" else genres.replace("|", ", ")
        line = (
            path_of(value[text]) if text == "categories" else text_of(value[text]) for text in TEXTS if text in value
        )
        yield token, tuple("" if text in MISSING else text for text in line)
