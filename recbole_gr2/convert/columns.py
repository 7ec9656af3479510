"""Which column has which meaning: named by the user, recognised in the files of Amazon and MovieLens, or guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recbole_gr2.convert.reading import Source
from recbole_gr2.errors import ConfigurationError, nearest

RELEASES = ("2014", "2018", "2023")
OLD = ("reviewerID", "asin", "overall", "unixReviewTime")  # user, item, rating and time in 2014 and 2018
NEW = ("user_id", "parent_asin", "rating", "timestamp")  # the same in 2023
METADATA = {"category", "categories", "brand", "related", "also_buy", "also_view", "salesRank", "imUrl", "main_cat"}
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)  # the flags of u.item
NUMBER = re.compile(r"\d+(\.\d+)?", re.ASCII)
# Names that a column can have, in lower case and without other characters than letters and digits.
NAMES = {
    "user": "user userid uid userindex username reviewerid customerid customer visitorid memberid accountid profileid",
    "item": "item itemid iid movieid asin parentasin productid product bookid isbn articleid gameid trackid songid "
    "artistid businessid newsid videoid recipeid sku",
    "time": "timestamp time date datetime unixreviewtime reviewtime unixtime createdat created ts eventtime reviewdate "
    "ratingdate",
    "rating": "rating ratings overall stars score",
    "title": "title name itemname itemtitle movietitle producttitle productname booktitle",
    "brand": "brand store manufacturer",
    "categories": "categories category genres genre",
    "description": "description overview plot synopsis",
}
REQUIRED = ("user", "item", "time", "title")
INTER, TEXTS = ("user", "item", "rating", "time"), ("title", "brand", "categories", "description")


@dataclass(frozen=True)
class Layout:
    """What is known about the files of a data set.

    Attributes:
        name: name of the data set's source, such as `Amazon 2014`; "" if it is not known.
        inter: column of each meaning in the file of interactions.
        items: column of each meaning in the file of items.
        unit: times per second of the numbers of the column `time`; None to detect it.
        keep_unused: whether items without interactions are written.
        genres: names of the columns with flags that are the categories.
    """

    name: str = ""
    inter: Mapping[str, str] = field(default_factory=dict)
    items: Mapping[str, str] = field(default_factory=dict)
    unit: int | None = None
    keep_unused: bool = True
    genres: Sequence[str] = ()


def recognise(source: Source, items: Source | None, release: str | None) -> Layout:
    """Return the layout of the files.

    Args:
        source: the file of interactions.
        items: the file of items.
        release: the release of Amazon files, if it is given.

    Raises:
        ConfigurationError: the files are those of no release, or of two releases of Amazon.
    """
    if release is not None or (items is not None and _is_amazon(source, items)):
        return _amazon(source, items, release)
    layout = Layout(inter=_movielens_ratings(source), items=_movielens_items(items) if items else {})
    if not layout.inter and not layout.items:
        return Layout()
    genres = GENRES if items is not None and len(items.columns) == 24 and layout.items else ()
    return Layout("MovieLens", layout.inter, layout.items, genres=genres)


def _movielens_ratings(source: Source) -> dict[str, str]:
    """Columns of ratings.dat and u.data, whose lines have four numbers and no header."""
    numbers = source.form == "text" and all(len(row) == 4 and all(map(NUMBER.fullmatch, row)) for row in source.sample)
    if not numbers or source.separator not in ("::", "\t"):
        return {}
    source.number_columns()
    return dict(zip(("user", "item", "rating", "time"), "1234", strict=True))


def _movielens_items(items: Source) -> dict[str, str]:
    """Columns of movies.dat, u.item and movies.csv."""
    if items.form != "text":
        return {}
    if [name.lower() for name in items.columns] == ["movieid", "title", "genres"]:
        return dict(zip(("item", "title", "categories"), items.columns, strict=True))
    ids = all(NUMBER.fullmatch(row[0]) for row in items.sample)
    if ids and items.separator == "::" and len(items.columns) == 3:
        items.number_columns()
        return {"item": "1", "title": "2", "categories": "3"}
    if ids and items.separator == "|" and len(items.columns) == 24 and set(items.sample[0][5:]) <= {"0", "1"}:
        items.number_columns()
        return {"item": "1", "title": "2"}
    return {}


def _is_amazon(source: Source, items: Source) -> bool:
    """Whether the fields are those of an Amazon release: reviews or ratings, and metadata."""
    metadata = set(items.columns)
    if items.form != "json" or not ("parent_asin" in metadata or ("asin" in metadata and metadata & METADATA)):
        return False
    if source.form == "json" or source.columns == list(NEW):
        return set(OLD) <= set(source.columns) or set(NEW) <= set(source.columns)
    return _is_ratings(source)


def _is_ratings(source: Source) -> bool:
    """Whether lines have an id, an id, a rating and a time in seconds, without a header."""
    return source.form == "text" and all(
        len(row) == 4 and NUMBER.fullmatch(row[2]) and re.fullmatch(r"\d{9,10}", row[3]) for row in source.sample[:1]
    )


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


def _amazon(source: Source, items: Source | None, given: str | None) -> Layout:
    """The layout of the release that the fields of both files have."""
    if given is not None and given not in RELEASES:
        raise _wrong_release(f"there is no release {given!r}", "--release", f"choose from {', '.join(RELEASES)}")
    if items is None:
        raise _wrong_release(
            "a release of Amazon has a file with the metadata of the items", "--items", "add --items FILE"
        )
    possible = {given} if given else set(RELEASES)
    for each in (source, items):
        found = set(RELEASES)
        for record in each.sample[:1] if each.form == "text" else each.sample:
            found &= _releases(record) or found
            if len(found) == 1:
                break
        if not found & possible or found == set(RELEASES):
            fields = " or ".join(sorted(found)) if found < set(RELEASES) and found else "no single release"
            raise _wrong_release(
                f"the fields are those of {fields}, and not of {' or '.join(sorted(possible))}",
                str(each.file),
                "give reviews and metadata of one release and category; omit --release, or correct it",
            )
        possible &= found
    if len(possible) > 1:
        raise _wrong_release(
            "the fields fit 2014 and 2018", f"{source.file}, {items.file}", "add --release 2014 or 2018"
        )
    release = possible.pop()
    names: Sequence[str] = NEW if release == "2023" else OLD
    if source.form == "text" and release != "2023":
        source.number_columns()
        names = ("1", "2", "3", "4") if release == "2014" else ("2", "1", "3", "4")
    user, item, rating, time = names
    metadata = {
        "2014": ("asin", "title", "brand", "categories", "description"),
        "2018": ("asin", "title", "brand", "category", "description"),
        "2023": ("parent_asin", "title", "store", "categories", "description"),
    }[release]
    return Layout(
        f"Amazon {release}",
        {"user": user, "item": item, "rating": rating, "time": time},
        dict(zip(("item", *TEXTS), metadata, strict=True)),
        unit=1000 if release == "2023" else 1,
        keep_unused=False,
    )


def _wrong_release(what: str, where: str, do: str) -> ConfigurationError:
    why = "each release has its own fields, columns and unit of time"
    return ConfigurationError(what, where=where, why=why, do=do)


def choose(
    source: Source, meanings: Sequence[str], given: Mapping[str, str | None], known: Mapping[str, str]
) -> dict[str, str]:
    """Return the column of each meaning that the file has.

    Args:
        source: the file.
        meanings: what is needed, such as `user` or `title`.
        given: names, or numbers from 1 of a file without a header, that the user gave.
        known: columns of a layout.

    Raises:
        ConfigurationError: a column that the user named does not exist, or a required column cannot be guessed.
    """
    if source.has_header and gives_numbers(source, given):
        source.number_columns()
    chosen: dict[str, str] = {}
    undecided: dict[str, list[str]] = {}
    for meaning in meanings:
        name = given.get(meaning)
        fitting = usual_names(source, meaning)
        if name is not None:
            if name not in source.columns:
                near = nearest(name, source.columns, cutoff=0.6)
                raise ConfigurationError(
                    f"there is no column {name!r}" + (f"; nearest: {', '.join(near)}" if near else ""),
                    where=f"--{meaning}, {source.file}",
                    why=f"the column with the {meaning} was requested",
                    do=f"choose from {source.described_columns()}",
                )
            chosen[meaning] = name
        elif meaning in known:
            chosen[meaning] = known[meaning]
        elif len(fitting) == 1:
            chosen[meaning] = fitting[0]
        elif meaning in REQUIRED:
            undecided[meaning] = fitting
    if undecided:
        raise _undecided(source, undecided)
    return chosen


def gives_numbers(source: Source, given: Mapping[str, str | None]) -> bool:
    """Return whether the user gave the number of a column of a text, which has no header then."""
    numbers = [text for text in given.values() if text and text.isdecimal() and text not in source.columns]
    return bool(numbers) and source.form == "text"


def usual_names(source: Source, meaning: str) -> list[str]:
    """Return the columns whose names usually have a meaning, such as `userId` for the user."""
    names = NAMES[meaning].split()
    return [name for name in source.columns if re.sub(r"[\W_]", "", name).lower() in names]


def _undecided(source: Source, undecided: Mapping[str, Sequence[str]]) -> ConfigurationError:
    """The error for meanings that no column, or several columns, can have by their names."""
    what = [
        f"several columns can be the {meaning}: {', '.join(names)}"
        if names
        else f"no column has a usual name of the {meaning}"
        for meaning, names in undecided.items()
    ]
    options = " ".join(f"--{meaning} COLUMN" for meaning in undecided)
    do = f"add {options}; the columns are {source.described_columns()}"
    if source.form == "text" and source.has_header:
        do += ". If the first line is no header, give the numbers of the columns, such as --user 1"
    return ConfigurationError(
        "; ".join(what),
        where=str(source.file),
        why="users, items, times and titles are read from columns",
        do=do,
    )
