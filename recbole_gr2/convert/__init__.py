"""Conversion of files of interactions and items into a data set: RecBole's atomic files and a property file.

`convert` reads text with separators, JSON lines and Parquet, packed or not, and recognises the raw files of the Amazon
releases 2014, 2018 and 2023 and of MovieLens (docs/data.md). `reading` reads the rows, `columns` finds the columns,
`times` converts times to seconds, and `interactions` and `items` write the files.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb

from recbole_gr2.convert import interactions as inter
from recbole_gr2.convert.columns import INTER, RELEASES, TEXTS, Layout, choose, gives_numbers, recognise, usual_names
from recbole_gr2.convert.items import one_line, write_items
from recbole_gr2.convert.reading import Source
from recbole_gr2.convert.report import Report
from recbole_gr2.errors import ConfigurationError

__all__ = ["RELEASES", "Report", "convert"]

DATA_PATH = "dataset"  # the folder that a run reads by default
# DuckDB writes larger tables to the disk. Each thread needs memory of its own.
DUCKDB: dict[str, str | bool | int | float | list[str]] = {
    "memory_limit": "512MB",
    "threads": min(4, os.cpu_count() or 1),
}
AMAZON_CORE = 5  # least number of interactions of users and items in the papers


def convert(
    interactions: str | Path,
    items: str | Path | None = None,
    *,
    name: str,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    rating: str | None = None,
    title: str | None = None,
    brand: str | None = None,
    categories: str | None = None,
    description: str | None = None,
    output: str | Path = DATA_PATH,
    overwrite: bool = False,
    skip_malformed: bool = False,
    min_interactions: int | None = None,
    time_format: str | None = None,
    encoding: str | None = None,
    release: str | None = None,
) -> Report:
    """Write the data set `name` into the folder `output`/`name`.

    The result is the same for the same files: lines keep their order.

    Args:
        interactions: file with one line for each interaction.
        items: file with item texts; by default they are read from `interactions`, and `title` has to be given.
        name: name of the data set: letters, digits, `_`, `-` and `.`.
        user, item, time, rating: columns of `interactions`, by name, or by number from 1 if the file has no header. By
            default they are recognised or guessed. `rating` is optional.
        title, brand, categories, description: columns of `items`, in the same way; all but the title are optional.
        output: folder of data sets, the later `data_path`.
        overwrite: whether the files of an existing folder are replaced.
        skip_malformed: whether malformed lines are counted and left out.
        min_interactions: least number of interactions of each user and item, >= 1, which the property file requires;
            by default 5 for Amazon, and none for other data.
        time_format: form of the times as for `strptime`, such as `%d/%m/%Y`; by default it is detected.
        encoding: encoding of text files; by default UTF-8, or the one of the byte-order mark.
        release: release of raw Amazon files: 2014, 2018 or 2023; by default their fields tell it.

    Raises:
        MissingFileError: a file cannot be read.
        ConfigurationError: a line is malformed, a column is not found, times are ambiguous, the files do not belong
            together, or the folder exists.

    >>> from recbole_gr2.convert import convert
    >>> report = convert("ratings.csv", "items.csv", name="mine")  # doctest: +SKIP
    """
    folder = Path(output) / name
    _check(name, folder, overwrite=overwrite, min_interactions=min_interactions)
    options: dict[str, Any] = {"encoding": encoding, "skip": skip_malformed}
    source = Source(interactions, **options)
    texts = Source(items, **options) if items is not None else None
    layout = recognise(source, texts, release)
    columns = choose(source, INTER, {"user": user, "item": item, "time": time, "rating": rating}, layout.inter)
    if texts is None:
        texts = _same_file(source, title, options)
    given = {"title": title, "brand": brand, "categories": categories, "description": description}
    text_columns = _text_columns(texts, source, columns["item"], given, layout)
    core = AMAZON_CORE if min_interactions is None and layout.unit else min_interactions
    report = Report(layout.name, folder)
    report.files = {"interactions": _how(source, columns), "items": _how(texts, text_columns)}
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=f".{name}-") as temporary:
            part = Path(temporary) / name
            part.mkdir()
            with duckdb.connect(Path(temporary) / "rows.duckdb", config=DUCKDB) as connection:
                inter.read(connection, source, columns, layout, report, time_format)
                inter.write(connection, part / f"{name}.inter", has_rating="rating" in columns)
                inter.count(connection, report)
                used = inter.item_ids(connection)
                found = write_items(part / f"{name}.item", texts, text_columns, layout, used, report)
                if core and core > 1:
                    inter.filter_core(connection, core, report)
                inter.count_lists(connection, report)
            settings = _settings(source, texts, found, core, report)
            (part / f"{name}.yaml").write_text(settings, encoding="utf-8")
            folder.mkdir(exist_ok=True)
            for file in sorted(part.iterdir()):
                os.replace(file, folder / file.name)
    except (OSError, duckdb.IOException, duckdb.OutOfMemoryException) as error:
        raise ConfigurationError(
            f"the data set cannot be written ({error.strerror if isinstance(error, OSError) else error})",
            where=str(folder),
            why="a run reads its files from there",
            do="choose another folder with --output, or free disk space",
        ) from error
    place = [] if Path(output) == Path(DATA_PATH) else ["--data_path", str(output)]
    report.command = shlex.join(["recbole-gr2", "run", "--dataset", name, *place])
    return report


def _check(name: str, folder: Path, *, overwrite: bool, min_interactions: int | None) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigurationError(
            f"{name!r} cannot name a data set",
            where="--name",
            why="a folder and its files get this name",
            do="use letters, digits, _, - and .",
        )
    if min_interactions is not None and min_interactions < 1:
        raise ConfigurationError(
            f"the least number of interactions is {min_interactions}, expected at least 1",
            where="--min_interactions",
            why="users and items with fewer interactions are left out",
            do="give a number such as 5, or omit the option",
        )
    if folder.exists() and not overwrite:
        raise ConfigurationError(
            "the folder of the data set exists",
            where=str(folder),
            why="its files would be replaced",
            do="choose another --name, or add --overwrite",
        )


def _same_file(source: Source, title: str | None, options: Mapping[str, Any]) -> Source:
    """The file of interactions as the file of items."""
    if title is None:
        raise ConfigurationError(
            "there is no file of items",
            where="--items",
            why="semantic IDs and prompts are computed from item texts",
            do="add --items FILE, or, if the file of interactions has the titles of the items, --title COLUMN: "
            + source.described_columns(),
        )
    return Source(source.file, **options)


def _text_columns(
    texts: Source, source: Source, item: str, given: Mapping[str, str | None], layout: Layout
) -> dict[str, str]:
    """Columns of the item id and of the texts. The item id has the name that it has in the file of interactions."""
    if gives_numbers(texts, given):
        texts.number_columns()
        item = item if texts.file == source.file else "1"
    elif item not in texts.columns and not layout.items:
        fitting = usual_names(texts, "item") or [name for name in texts.columns if name.lower() == "id"]
        if len(fitting) != 1:
            raise ConfigurationError(
                f"no column is named {item!r}, and {len(fitting)} columns have a usual name of the item",
                where=str(texts.file),
                why="interactions and texts belong together by the id of the item",
                do=f"rename the column with the item ids to {item!r}; the columns are {texts.described_columns()}. "
                "If the first line is no header, the ids have to be in the first column: give the number of the column "
                "of titles, such as --title 2",
            )
        item = fitting[0]
    return choose(texts, ("item", *TEXTS), given, {"item": item, **layout.items})


def _how(file: Source, columns: Mapping[str, str]) -> str:
    """How a file was read, for the report."""
    form = {"json": "JSON lines", "parquet": "Parquet"}.get(file.form)
    if form is None:
        names = {"\t": "tabs", ",": "commas", ";": "semicolons"}
        form = f"columns separated by {names.get(file.separator, file.separator)}"
        form += "" if file.has_header else ", no header"
        form += "" if file.encoding == "utf-8" else f", {file.encoding}"
    chosen = ", ".join(f"{meaning} = {column}" for meaning, column in columns.items())
    return f"{file.file.name}, {form}; {chosen}"


def _settings(source: Source, texts: Source, found: Sequence[str], core: int | None, report: Report) -> str:
    """The text of the property file."""
    files = dict.fromkeys((source.file.name, texts.file.name))
    size = ", ".join(f"{report.counts[what]:,} {what}" for what in ("users", "items", "interactions"))
    lines = [
        f"# {one_line(report.source or 'Data')} from {one_line(' and '.join(files))}: {size}.",
        *(f"text_{text}: {text if text in (*found, 'title') else '~'}" for text in TEXTS),
    ]
    if core and core > 1:
        lines += [f'user_inter_num_interval: "[{core},inf)"', f'item_inter_num_interval: "[{core},inf)"']
    if report.counts["repeated interactions"]:
        lines += ["# Keeps the first interaction of each user and item:", "# rm_dup_inter: first"]
    return "\n".join(lines) + "\n"
