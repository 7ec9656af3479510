"""Times as numbers and dates of several forms, converted to seconds since 1970 by DuckDB."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import duckdb

from recbole_gr2.errors import ConfigurationError

NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
COMPACT = r"(19|20)\d{6}|(19|20)\d{12}"
CLOCK = r"[T ]\d{1,2}:\d\d(:\d\d([.,]\d+)?)?( ?(Z|UTC|[+-]\d\d(:?\d\d)?))?"
ISO = rf"\d{{4}}[-/]\d{{1,2}}[-/]\d{{1,2}}({CLOCK})?"
# Unix times from 1973 to 5138 lie between these limits in seconds, milliseconds, micro- and nanoseconds.
LIMITS = (1e8, 1e11, 1e14, 1e17)
UNITS = {1: "seconds", 1000: "milliseconds", 10**6: "microseconds", 10**9: "nanoseconds"}
YEARS = (-2208988800000000, 4102444800000000)  # microseconds of 1900 and 2100
SAMPLE = 1000  # times that decide which forms are tried

DATES = [
    *("%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y", "%d.%m.%Y", "%Y.%m.%d"),
    *("%d/%m/%y", "%m/%d/%y", "%y/%m/%d", "%d-%m-%y", "%m-%d-%y", "%y-%m-%d", "%d.%m.%y"),
    *("%d %b %Y", "%d %B %Y", "%d-%b-%Y", "%d-%b-%y", "%b %d, %Y", "%B %d, %Y", "%b %d %Y", "%B %d %Y", "%m %d, %Y"),
]
CLOCKS = ["", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p"]
FORMS = [
    *("".join(parts) for parts in product(DATES, CLOCKS)),
    *("%a %b %d %H:%M:%S %z %Y", "%a %b %d %H:%M:%S %Z %Y", "%a %b %d %H:%M:%S %Y", "%a, %d %b %Y %H:%M:%S %z"),
    *("%a, %d %b %Y %H:%M:%S %Z", "%d/%b/%Y:%H:%M:%S %z"),
]


@dataclass(frozen=True)
class TimeForm:
    """The form of a column of times.

    Attributes:
        name: description for a report.
        seconds: SQL of the seconds since 1970 as a text, or NULL if a value has another form.
        early: SQL of the condition that a number is below 1e8, while others are Unix times.
    """

    name: str
    seconds: str
    early: str = "false"


def find_form(connection: duckdb.DuckDBPyConnection, where: str, *, given: str | None, unit: int | None) -> TimeForm:
    """Return the form that most times of the table `rows` have.

    Args:
        connection: has a table `rows` with a column `time` of texts without blanks at their ends, and no empty ones.
        where: the file and the column, for errors.
        given: a format of `strptime` that the user named.
        unit: units per second, if the times are known to be numbers.

    Raises:
        ConfigurationError: the format does not exist, the times have no known form, or the form is ambiguous.
    """
    if given is not None:
        return _given_form(connection, given)
    if unit is not None:
        return _unix(UNITS[unit], unit, only=True)
    kinds = ", ".join(f"count_if(regexp_full_match(time, '{kind}'))" for kind in (NUMBER, COMPACT))
    total, numbers, compact = _one(connection, f"SELECT count(*), {kinds} FROM rows")
    if compact > total / 2:
        dates = f"coalesce({_parsed('%Y%m%d')}, {_parsed('%Y%m%d%H%M%S')})"
        (fits,) = _one(connection, f"SELECT count({dates}) FROM rows")
        if fits == compact:
            return TimeForm("dates such as 20201231, in UTC", _as_seconds(dates))
    if numbers > total / 2:
        return _number_form(connection)
    return _date_form(connection, where, total)


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[int, ...]:
    """The only row of a result."""
    result: Any = connection.execute(query).fetchone()
    return tuple(result)


def _given_form(connection: duckdb.DuckDBPyConnection, given: str) -> TimeForm:
    try:
        connection.execute(f"SELECT try_strptime('', {_quoted(given)})").fetchall()
    except duckdb.InvalidInputException as error:
        raise ConfigurationError(
            f"{given!r} is no format of dates",
            where="--time_format",
            why="times cannot be read with it",
            do="write it as for strptime, for example '%d/%m/%Y %H:%M' for 31/12/2020 18:30",
        ) from error
    return TimeForm(f"dates of the form {given}, in UTC", _as_seconds(_parsed(given)))


def _number_form(connection: duckdb.DuckDBPyConnection) -> TimeForm:
    """The unit that most numbers above `LIMITS` have."""
    counts = connection.execute(
        f"SELECT {_unit_of('try_cast(time AS DOUBLE)')} AS unit, count(*) FROM rows "
        f"WHERE regexp_full_match(time, '{NUMBER}') GROUP BY unit ORDER BY count(*) DESC, unit"
    ).fetchall()
    units = [unit for unit, _ in counts if unit > 0]
    if not units:
        value = _seconds_text("try_cast(time AS DOUBLE)")
        name = "numbers that are no Unix times, kept as they are"
        return TimeForm(name, f"CASE WHEN regexp_full_match(time, '{NUMBER}') THEN {value} END")
    per_second = 1000 ** (units[0] - 1)
    return _unix(UNITS[per_second], per_second, only=False)


def _unit_of(number: str) -> str:
    cases = " ".join(f"WHEN {number} < {limit:.0f} THEN {place}" for place, limit in enumerate(LIMITS))
    return f"CASE {cases} ELSE {len(LIMITS)} END"


def _unix(name: str, per_second: int, *, only: bool) -> TimeForm:
    """Unix times of a unit.

    Args:
        name: name of the unit.
        per_second: units per second.
        only: whether smaller numbers are malformed.
    """
    number = f"(CASE WHEN regexp_full_match(time, '{NUMBER}') THEN try_cast(time AS DOUBLE) END)"
    unit = _unit_of(number)
    place = list(UNITS).index(per_second) + 1
    fits = f"{number} IS NOT NULL AND isfinite({number}) AND {unit} {f'= {place}' if only else f'IN (0, {place})'}"
    value = f"{number} / {per_second}" if per_second > 1 else number
    form = "Unix times in seconds" if per_second == 1 else f"Unix times in {name}, written in seconds"
    return TimeForm(form, f"CASE WHEN {fits} THEN {_seconds_text(value)} END", f"{unit} = 0")


def _date_form(connection: duckdb.DuckDBPyConnection, where: str, total: int) -> TimeForm:
    sample = dict.fromkeys(time for (time,) in connection.execute(f"SELECT time FROM rows LIMIT {SAMPLE}").fetchall())
    connection.execute("CREATE TEMP TABLE examples AS SELECT unnest(?) AS time", [list(sample)])
    columns = ", ".join(f"count(try_strptime(time, {_quoted(form)}))" for form in FORMS)
    fits = dict(zip(FORMS, _one(connection, f"SELECT {columns} FROM examples"), strict=True))
    tried = {"ISO": _iso(), **{form: _parsed(form) for form, count in fits.items() if count > len(sample) / 2}}
    columns = ", ".join(f"count({expression})" for expression in tried.values())
    counts = dict(zip(tried, _one(connection, f"SELECT {columns} FROM rows"), strict=True))
    best = max(counts, key=lambda form: counts[form])
    if counts[best] <= total / 2:
        raise ConfigurationError(
            f"no known form fits most of the times, for example {next(iter(sample), '')!r}",
            where=where,
            why="histories, splits and targets are defined by time",
            do="describe their form with --time_format, for example '%d/%m/%Y %H:%M' for 31/12/2020 18:30",
        )
    for other in tried:
        if other == best or counts[other] < counts[best]:
            continue
        differing = connection.execute(
            f"SELECT time FROM rows WHERE {tried[best]} != {tried[other]} ORDER BY line LIMIT 1"
        ).fetchone()
        if differing is not None:
            raise ConfigurationError(
                f"the time {differing[0]!r} is ambiguous: it can have the form {best} or {other}",
                where=where,
                why="all times of the column fit both forms, and histories, splits and targets are defined by time",
                do=f"add --time_format {_quoted(best)} or --time_format {_quoted(other)}; %d is the day, %m the month",
            )
    name = "ISO dates" if best == "ISO" else f"dates of the form {best}"
    return TimeForm(f"{name}, in UTC if they have no offset", _as_seconds(tried[best]))


def _iso() -> str:
    """SQL of the microseconds of an ISO date. Slashes, one-digit months and a blank before the offset are accepted."""
    text = r"replace(regexp_replace(regexp_replace(time, ' ?(Z|UTC)$', '+00'), ' ([+-])', '\1'), ',', '.')"
    text = rf"regexp_replace({text}, '([+-]\d\d)(\d\d)$', '\1:\2')"
    return _bounded(f"epoch_us(CASE WHEN regexp_full_match(time, '{ISO}') THEN try_cast({text} AS TIMESTAMPTZ) END)")


def _parsed(form: str) -> str:
    """SQL of the microseconds of a date of a form."""
    return _bounded(f"epoch_us(try_strptime(time, {_quoted(form)}))")


def _bounded(microseconds: str) -> str:
    """SQL that is NULL outside of the years 1900 to 2099, such as the year 20 of 31/12/20."""
    return f"CASE WHEN {microseconds} BETWEEN {YEARS[0]} AND {YEARS[1]} THEN {microseconds} END"


def _as_seconds(microseconds: str) -> str:
    """SQL of a text with the seconds of microseconds."""
    whole = f"({microseconds}) % 1000000 = 0"
    parts = _seconds_text(f"({microseconds}) / 1e6")
    return f"CASE WHEN {whole} THEN (({microseconds}) // 1000000)::VARCHAR ELSE {parts} END"


def _seconds_text(number: str) -> str:
    """SQL of a number as text; a whole number has no decimal point."""
    return rf"regexp_replace(({number})::DOUBLE::VARCHAR, '\.0$', '')"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
