"""The `.inter` file: users, items, ratings and times, in a table of DuckDB that need not fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow

from recbole_gr2.bridge.atomic import MISSING
from recbole_gr2.bridge.summary import MOST
from recbole_gr2.convert.columns import Layout
from recbole_gr2.convert.reading import Malformed, Source, id_of
from recbole_gr2.convert.report import Report
from recbole_gr2.convert.times import find_form
from recbole_gr2.errors import ConfigurationError

BATCH = 50_000  # lines that are stored at once
LEAST_HISTORY = 4  # interactions of a user with a training list: a history of one item and three targets
FEW_LISTS = 1000  # Below this number of training lists a warning follows. The limit is a choice of this package.


def _rating(value: Any, what: str, separator: str) -> str | None:
    """The text of a rating; None if it is missing. Files with semicolons may have decimal commas."""
    text = "" if value is None else str(value).strip()
    if text in MISSING:
        return None
    if separator == ";":
        text = text.replace(",", ".")
    try:
        number = math.nan if isinstance(value, bool) else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise Malformed(f"{what} is {value!r:.80}, expected a number")
    return text.removesuffix(".0")


def _time(value: Any, what: str) -> str:
    text = "" if value is None or isinstance(value, bool | list | dict) else str(value).strip()
    if text in MISSING or not text.isprintable():
        raise Malformed(f"{what} is {value!r:.80}, expected a time")
    return text


def _interactions(source: Source, columns: Mapping[str, str]) -> Iterator[tuple[int, str, str, str | None, str]]:
    """Line, user, item, rating and time of each interaction."""
    has_rating = "rating" in columns
    for values in source.rows(list(columns.values())):
        value = dict(zip(columns, values, strict=True))
        try:
            yield (
                source.line,
                id_of(value["user"], columns["user"]),
                id_of(value["item"], columns["item"]),
                _rating(value["rating"], columns["rating"], source.separator) if has_rating else None,
                _time(value["time"], columns["time"]),
            )
        except Malformed as error:
            source.refuse(error)


def read(
    connection: duckdb.DuckDBPyConnection,
    source: Source,
    columns: Mapping[str, str],
    layout: Layout,
    report: Report,
    time_format: str | None,
) -> None:
    """Make the table `interactions` with line, user_id, item_id, rating and seconds, in the order of the file.

    Raises:
        ConfigurationError: a line is malformed, the times are ambiguous, or there is no interaction.
    """
    connection.execute("SET TimeZone = 'UTC'")
    _store(connection, _interactions(source, columns))
    _check_any(connection, "rows", source)
    where = f"{source.file}, column {columns['time']!r}"
    form = find_form(connection, where, given=time_format, unit=layout.unit)
    report.times = form.name
    connection.execute(
        f"CREATE TABLE interactions AS SELECT *, {form.seconds} AS seconds, {form.early} AS early FROM rows"
    )
    connection.execute("DROP TABLE rows")
    wrong, early = _one(connection, "SELECT count_if(seconds IS NULL), count_if(early) FROM interactions")
    if wrong:
        query = "SELECT line, time FROM interactions WHERE seconds IS NULL ORDER BY line LIMIT 1"
        source.line, time = _one(connection, query)
        source.refuse(f"{columns['time']} is {time!r}, but the times are {form.name}")
        source.malformed += wrong - 1
        connection.execute("DELETE FROM interactions WHERE seconds IS NULL")
        _check_any(connection, "interactions", source)
    total, missing = _one(connection, "SELECT count(*), count_if(rating IS NULL) FROM interactions")
    if early:
        report.warnings.append(f"{early:,} times are before March 1973; such a number can stand for a missing time")
    report.counts |= {
        "lines of interactions": source.read,
        "malformed lines of interactions": source.malformed,
        "interactions": total,
    }
    if "rating" in columns:
        report.counts["interactions without a rating"] = missing
    if source.with_quotes:
        report.counts["lines of interactions with quotation marks as characters"] = source.with_quotes


def _store(connection: duckdb.DuckDBPyConnection, interactions: Iterator[tuple[Any, ...]]) -> None:
    """Make the table `rows` of the values of `_interactions`."""
    kinds = {"line": pyarrow.int64()} | dict.fromkeys(("user_id", "item_id", "rating", "time"), pyarrow.string())
    schema = pyarrow.schema(list(kinds.items()))
    connection.register("batch", schema.empty_table())
    connection.execute("CREATE TABLE rows AS FROM batch")
    while batch := list(islice(interactions, BATCH)):
        columns = zip(*batch, strict=True)
        arrays = [pyarrow.array(values, kind) for values, kind in zip(columns, kinds.values(), strict=True)]
        connection.register("batch", pyarrow.table(arrays, schema=schema))
        connection.execute("INSERT INTO rows FROM batch")
    connection.unregister("batch")


def _check_any(connection: duckdb.DuckDBPyConnection, table: str, source: Source) -> None:
    if not _one(connection, f"SELECT count(*) FROM {table}")[0]:
        raise ConfigurationError(
            "no interaction was read",
            where=str(source.file),
            why="the file has no line after the header, or all lines are malformed",
            do="give the right file and columns; without --skip_malformed the first malformed line is named",
        )


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> Any:
    """The only row of a result."""
    return connection.execute(query).fetchone()


def write(connection: duckdb.DuckDBPyConnection, file: Path, *, has_rating: bool) -> None:
    """Write the `.inter` file in the order of the lines."""
    names = ["user_id:token", "item_id:token", *(["rating:float"] if has_rating else []), "timestamp:float"]
    columns = ["user_id", "item_id", *(["rating"] if has_rating else []), "seconds"]
    query = ", ".join(f'{column} AS "{name}"' for column, name in zip(columns, names, strict=True))
    target = str(file).replace("'", "''")
    connection.execute(  # DuckDB keeps the order of a table.
        f"COPY (SELECT {query} FROM interactions) TO '{target}' (FORMAT csv, DELIMITER '\t', HEADER, QUOTE '\"')"
    )


def count(connection: duckdb.DuckDBPyConnection, report: Report) -> None:
    """Count users, items, repeated interactions and ties in time."""
    users, items = _one(connection, "SELECT count(DISTINCT user_id), count(DISTINCT item_id) FROM interactions")
    (lines,) = _one(
        connection, "SELECT count(*) FROM (SELECT DISTINCT user_id, item_id, rating, seconds FROM interactions)"
    )
    (pairs,) = _one(connection, "SELECT count(*) FROM (SELECT DISTINCT user_id, item_id FROM interactions)")
    (tied,) = _one(
        connection,
        "SELECT coalesce(sum(n), 0)::BIGINT FROM "
        "(SELECT count(*) AS n FROM interactions GROUP BY user_id, seconds HAVING n > 1)",
    )
    (tied_users,) = _one(
        connection,
        "WITH ends AS (SELECT user_id, max(seconds::DOUBLE) AS latest FROM interactions GROUP BY user_id) "
        "SELECT count(*) FROM (SELECT user_id FROM interactions JOIN ends USING (user_id) "
        "WHERE seconds::DOUBLE = latest GROUP BY user_id HAVING count(*) > 1)",
    )
    total = int(report.counts["interactions"])
    report.counts |= {
        "users": users,
        "items": items,
        "density": pairs / (users * items),
        "identical interactions": total - lines,
        "repeated interactions": total - pairs,
        "interactions at the same time as another one of the user": tied,
        "users with one time for their last two interactions": tied_users,
    }
    if total > pairs:
        report.warnings.append(
            f"{total - pairs:,} interactions repeat a user and an item; candidates exclude seen items, so such targets "
            "cannot be found: rm_dup_inter: first in the property file keeps the first interaction of each pair"
        )
    if tied_users > MOST * users:
        report.warnings.append(
            f"{tied_users:,} of {users:,} users have one time for their last two interactions, so that the order of "
            "the lines decides which one is the test target"
        )


def item_ids(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """Return the ids of all items that have interactions."""
    return {item for (item,) in connection.execute("SELECT DISTINCT item_id FROM interactions").fetchall()}


def filter_core(connection: duckdb.DuckDBPyConnection, least: int, report: Report) -> None:
    """Delete users and items with fewer interactions until all have `least`, as RecBole does, and count the rest."""
    left = int(report.counts["interactions"])
    before = left + 1
    while left < before:
        before = left
        few = (
            f"{column} IN (SELECT {column} FROM interactions GROUP BY {column} HAVING count(*) < {least})"
            for column in ("user_id", "item_id")
        )
        connection.execute(f"DELETE FROM interactions WHERE {' OR '.join(few)}")
        (left,) = _one(connection, "SELECT count(*) FROM interactions")
    users, items = _one(connection, "SELECT count(DISTINCT user_id), count(DISTINCT item_id) FROM interactions")
    kept = f"in the {least}-core, which the property file selects"
    report.counts |= {f"interactions {kept}": left, f"users {kept}": users, f"items {kept}": items}
    if not left:
        report.warnings.append(f"no interaction is {kept}: choose a smaller --min_interactions")


def count_lists(connection: duckdb.DuckDBPyConnection, report: Report) -> None:
    """Count the users who have a training list."""
    (lists,) = _one(
        connection,
        f"SELECT count(*) FROM (SELECT user_id FROM interactions GROUP BY user_id HAVING count(*) >= {LEAST_HISTORY})",
    )
    report.counts[f"users with {LEAST_HISTORY} or more interactions, who have a training list"] = lists
    if not lists:
        report.warnings.append(f"no user has {LEAST_HISTORY} interactions, so that a run has nothing to learn from")
    elif lists < FEW_LISTS:
        report.warnings.append(
            f"only {lists:,} users have a training list, and a re-ranker learns only from lists that contain their "
            "target; train_requests: 5 in the property file gives several lists for each user"
        )
