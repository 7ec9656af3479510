"""Data files as users have them: each is read whole and right, or refused with one error that names the place."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_gr2.bridge.atomic import AtomicFile
from recbole_gr2.bridge.data import Data, read_item_texts
from recbole_gr2.bridge.item_text import clean_text
from recbole_gr2.config import load_settings
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.quick_start import main

HEADER = "user_id:token\titem_id:token\ttimestamp:float"
START = 1_400_000_000
# Six users with five of eight items, shuffled; the times of a user are 1, 2, 3, ... seconds and minutes apart.
TRUTH = {f"u{user}": [f"i{(user + 3 * n) % 8}" for n in range(5)] for user in range(6)}
ROWS = [(user, item, START + 61 * n) for user, items in TRUTH.items() for n, item in enumerate(items)]
random.Random(5).shuffle(ROWS)
ITEMS = [(f"i{n}", f"Thing {n}", "House") for n in range(8)]


def as_text(rows: Sequence[Sequence[object]], header: str = HEADER, separator: str = "\t", end: str = "\n") -> str:
    lines = [header.replace("\t", separator), *(separator.join(map(str, row)) for row in rows)]
    return end.join(lines) + end


def timed(form) -> list[tuple]:
    """The rows with times in another form."""
    return [(user, item, form(time)) for user, item, time in ROWS]


def iso(pattern: str, zone: timezone | None = UTC):
    return lambda time: datetime.fromtimestamp(time, zone).strftime(pattern)


def data_of(folder: Path, inter: str | bytes, item: str | bytes | None = None, **options) -> Data:
    """The data set `toy` of files with these contents."""
    (folder / "toy").mkdir(exist_ok=True)
    item = as_text(ITEMS, "item_id:token\ttitle:token_seq\tcategories:token_seq") if item is None else item
    for ending, content in (("inter", inter), ("item", item)):
        (folder / "toy" / f"toy.{ending}").write_bytes(content.encode() if isinstance(content, str) else content)
    settings = {"preset": "smoke", "dataset": "toy", "data_path": str(folder), "text_categories": "categories"}
    return Data(load_settings(config_dict=settings | options))


def sequences(data: Data) -> dict[str, list[str]]:
    return {data.user_tokens[u]: [data.item_tokens[i] for i in items] for u, items in data.sequences.items()}


PLAIN = as_text(ROWS)
TOKEN = HEADER.replace("float", "token")


@pytest.mark.parametrize(
    ("inter", "options"),
    [
        pytest.param(PLAIN.removesuffix("\n"), {}, id="no line end at the end"),
        pytest.param("\ufeff" + PLAIN, {}, id="byte-order mark"),
        pytest.param(PLAIN.encode("utf-16"), {}, id="UTF-16 with a byte-order mark"),
        pytest.param(PLAIN.replace("\n", "\r\n"), {}, id="CRLF"),
        pytest.param(PLAIN.replace("\n", "\r"), {}, id="CR"),
        pytest.param(PLAIN.replace("\n", "\n\n  \n"), {}, id="empty lines"),
        pytest.param(PLAIN.replace("i3\t", ' "i3"\t').replace(' "', '"'), {}, id="some ids in quotation marks"),
        pytest.param(PLAIN.replace("i3\t", "i3 \t").replace("u1\t", " u1\t"), {}, id="blanks at the ends of ids"),
        pytest.param(as_text(ROWS, separator=","), {"field_separator": ","}, id="commas"),
        pytest.param(as_text(ROWS, separator=" "), {"field_separator": " "}, id="blanks"),
        pytest.param(PLAIN, {"field_separator": "\\t"}, id="a tab as the command line gives it"),
        pytest.param(as_text(ROWS, separator="||"), {"field_separator": "||"}, id="a separator of two characters"),
        pytest.param(as_text(ROWS, TOKEN), {}, id="numbers declared as token"),
        pytest.param(as_text(timed(lambda t: f"{t / 1e9:.9e}"), HEADER), {}, id="exponents"),
        pytest.param(as_text(timed(lambda t: (t - START) * 0.001)), {}, id="fractions of a second"),
        pytest.param(as_text(timed(iso("%Y-%m-%d %H:%M:%S")), TOKEN), {}, id="dates as token"),
        pytest.param(as_text(timed(iso("%Y-%m-%dT%H:%M:%SZ"))), {}, id="dates as float"),
        pytest.param(as_text(timed(lambda t: f"2020-01-0{(t - START) // 61 + 1}"), TOKEN), {}, id="days"),
        pytest.param(
            as_text([(t, "x", i, u) for u, i, t in ROWS], "timestamp:float\tmore:token\titem_id:token\tuser_id:token"),
            {},
            id="columns in another order",
        ),
        pytest.param(
            as_text(ROWS, "who:token\twhat:token\twhen:float"),
            {"USER_ID_FIELD": "who", "ITEM_ID_FIELD": "what", "TIME_FIELD": "when"},
            id="other names of columns",
        ),
    ],
)
def test_interactions_are_read_whole_and_in_the_order_of_time(tmp_path, inter, options):
    separator = options.get("field_separator", "\t").replace("\\t", "\t")
    item = as_text(ITEMS, "item_id:token\ttitle:token_seq\tcategories:token_seq", separator)
    if options.get("field_separator") == " ":
        item = item.replace("Thing ", "Thing")
    data = data_of(tmp_path, inter, item.replace("item_id", options.get("ITEM_ID_FIELD", "item_id")), **options)
    assert sequences(data) == TRUTH
    assert data.catalog[0].title.startswith("Thing")


def test_offsets_from_utc_are_part_of_the_time(tmp_path):
    zones = {user: timezone(timedelta(hours=hour)) for hour, user in enumerate(TRUTH, start=-3)}
    rng = random.Random(0)
    rows = []
    for _, item, time in ROWS:
        zone = rng.choice(list(zones.values()))
        rows.append((_, item, datetime.fromtimestamp(time, zone).isoformat()))
    assert sequences(data_of(tmp_path, as_text(rows, TOKEN))) == TRUTH


def test_an_id_may_contain_a_quotation_mark(tmp_path):
    renamed = {user: [item.replace("i3", '"i3').replace("i4", '5" i4') for item in own] for user, own in TRUTH.items()}
    inter = PLAIN.replace("i3\t", '"i3\t').replace("i4\t", '5" i4\t')
    data = data_of(tmp_path, inter)
    assert sequences(data) == renamed
    assert data.summary().without_line == 2 and data.summary().without_interactions == 2


LINE_5 = PLAIN.splitlines()[4]
USER_5, ITEM_5, TIME_5 = LINE_5.split("\t")


def changed(line: str) -> str:
    """The interactions with another line 5."""
    return PLAIN.replace(LINE_5, line)


@pytest.mark.parametrize(
    ("inter", "options", "words"),
    [
        # Headers
        pytest.param("", {}, ["empty"], id="empty file"),
        pytest.param(" \n\n", {}, ["empty"], id="blank file"),
        pytest.param(HEADER + "\n", {}, ["no other line"], id="header only"),
        pytest.param(as_text(ROWS, separator=","), {}, ["line 1", "field_separator: ','"], id="commas"),
        pytest.param(as_text(ROWS, separator=" "), {}, ["line 1", "field_separator: ' '"], id="blanks"),
        pytest.param(as_text(ROWS, separator="::"), {}, ["line 1", "field_separator: '::'"], id="colons"),
        pytest.param(PLAIN, {"field_separator": ","}, ["line 1", "field_separator: '\\t'"], id="wrong separator"),
        pytest.param(as_text(ROWS[1:], "\t".join(map(str, ROWS[0]))), {}, ["line 1", "'user_id'"], id="no header"),
        pytest.param(
            as_text(ROWS, HEADER.replace(":token", "")), {}, ["line 1", "'user_id'", "no type"], id="no types"
        ),
        pytest.param(as_text(ROWS, HEADER.replace("float", "int")), {}, ["line 1", "'timestamp'", "'int'"], id="type"),
        pytest.param(as_text(ROWS, HEADER.replace("user_id", "User")), {}, ["USER_ID_FIELD: User"], id="other name"),
        pytest.param(as_text(ROWS, HEADER.replace("item_id", "user_id")), {}, ["line 1", "several"], id="same name"),
        pytest.param(
            as_text(ROWS, HEADER.replace("token", "float", 1)), {}, ["'user_id'", "declare user_id:token"], id="id type"
        ),
        pytest.param(
            as_text(ROWS, HEADER.replace("token", "token_seq", 1)),
            {},
            ["'user_id'", "token_seq"],
            id="a sequence as id",
        ),
        pytest.param(PLAIN, {"TIME_FIELD": "item_id"}, ["TIME_FIELD"], id="one column for two purposes"),
        # Lines
        pytest.param(changed(f"{USER_5}\t{ITEM_5}"), {}, ["line 5", "2 columns", "3"], id="too few columns"),
        pytest.param(changed(LINE_5 + "\t"), {}, ["line 5", "4 columns", "3"], id="too many columns"),
        pytest.param(changed("x"), {}, ["line 5", "1 column,"], id="one column"),
        pytest.param(
            changed(f'{USER_5}\t"i\n{ITEM_5}"\t{TIME_5}'), {}, ["line 5", "invisible"], id="line break in an id"
        ),
        pytest.param(
            PLAIN.replace(LINE_5, f'{USER_5}\t"i7\t1\nu1\ti7"\t2'),
            {},
            ["line 5", "line 6"],
            id="an open quotation mark",
        ),
        pytest.param(changed(LINE_5 + "\0"), {}, ["line 5", "NUL"], id="NUL"),
        pytest.param(PLAIN.encode("utf-16-le"), {}, ["line 1", "NUL", "UTF-8"], id="UTF-16 without a byte-order mark"),
        pytest.param(changed(f"Zoé\t{ITEM_5}\t{TIME_5}").encode("latin-1"), {}, ["line 5", "UTF-8"], id="Latin-1"),
        # Ids
        pytest.param(changed(f"\t{ITEM_5}\t{TIME_5}"), {}, ["line 5", "'user_id'", "missing"], id="no user"),
        pytest.param(changed(f"{USER_5}\t  \t{TIME_5}"), {}, ["line 5", "'item_id'", "missing"], id="no item"),
        pytest.param(changed(f"{USER_5}\tnan\t{TIME_5}"), {}, ["line 5", "'item_id'", "'nan'"], id="item nan"),
        pytest.param(changed(f"[PAD]\t{ITEM_5}\t{TIME_5}"), {}, ["line 5", "'user_id'", "padding"], id="padding"),
        pytest.param(changed(f"u\u200b1\t{ITEM_5}\t{TIME_5}"), {}, ["line 5", "u\\u200b1"], id="invisible character"),
        # Times
        pytest.param(changed(f"{USER_5}\t{ITEM_5}\t"), {}, ["line 5", "'timestamp'", "missing"], id="no time"),
        pytest.param(changed(f"{USER_5}\t{ITEM_5}\tNaN"), {}, ["line 5", "'timestamp'", "missing"], id="time NaN"),
        pytest.param(changed(f"{USER_5}\t{ITEM_5}\tinf"), {}, ["line 5", "'inf'"], id="infinite time"),
        pytest.param(changed(f"{USER_5}\t{ITEM_5}\t1e999"), {}, ["line 5", "'1e999'"], id="a time out of range"),
        pytest.param(changed(LINE_5 + "000"), {}, ["line 2", "unit", f"'{TIME_5}000'"], id="milliseconds and seconds"),
        pytest.param(changed(f"{USER_5}\t{ITEM_5}\t12,5"), {}, ["line 5", "'12,5'"], id="decimal comma"),
        pytest.param(changed(f"{USER_5}\t{ITEM_5}\t1_000"), {}, ["line 5", "'1_000'"], id="underscore"),
        pytest.param(changed(f"{USER_5}\t{ITEM_5}\t2014-05-13"), {}, ["line 5", "a date", "line 2"], id="one date"),
        pytest.param(as_text(timed(iso("%d/%m/%Y")), TOKEN), {}, ["line 2", "ISO"], id="day and month"),
        pytest.param(
            as_text([("u", "i", "2014-02-28"), ("u", "j", "2014-02-30")], TOKEN),
            {},
            ["line 3", "'2014-02-30'", "does not exist"],
            id="no such day",
        ),
        pytest.param(
            as_text([("u", "i", "2014-02-28 10:00"), ("u", "j", "2014-02-28 10:00Z")], TOKEN),
            {},
            ["line 3", "offset"],
            id="an offset on some lines",
        ),
        pytest.param(
            as_text([("u", "i", 2**60 + 1), ("u", "j", 2**60 + 2)]), {}, ["'timestamp'", "digits"], id="too many digits"
        ),
        # Columns and filters that the settings name
        pytest.param(
            PLAIN,
            {"load_col": {"inter": ["user_id", "rating"]}},
            ["load_col", "'rating'"],
            id="column that is not there",
        ),
        pytest.param(PLAIN, {"load_col": {"inter": "rating"}}, ["load_col"], id="load_col is text"),
        pytest.param(PLAIN, {"unload_col": {"inter": ["user_id"]}}, ["unload_col"], id="both choices of columns"),
        pytest.param(PLAIN, {"val_interval": {"rating": "[3,inf)"}}, ["val_interval", "'rating'"], id="not loaded"),
        pytest.param(PLAIN, {"val_interval": {"timestamp": "above 3"}}, ["val_interval", "'above 3'"], id="interval"),
        pytest.param(PLAIN, {"val_interval": {"item_id": "[3,inf)"}}, ["val_interval", "a list of values"], id="token"),
        pytest.param(
            PLAIN, {"val_interval": {"timestamp": "[0,5]"}}, ["no interaction", "val_interval"], id="by value"
        ),
        pytest.param(PLAIN, {"user_inter_num_interval": "[50,inf)"}, ["no interaction", "[50,inf)"], id="by number"),
        pytest.param(PLAIN, {"item_inter_num_interval": "50"}, ["item_inter_num_interval", "'50'"], id="no interval"),
        pytest.param(PLAIN, {"field_separator": ""}, ["field_separator"], id="no separator"),
        pytest.param(PLAIN, {"threshold": {"rating": 3}}, ["threshold", "load_col"], id="threshold of no column"),
        pytest.param(PLAIN, {"alias_of_item_id": ["other"]}, ["alias_of_item_id"], id="alias of no column"),
    ],
)
def test_interactions_that_are_refused(tmp_path, inter, options, words):
    with pytest.raises(ConfigurationError) as error:
        data_of(tmp_path, inter, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert error.value.why and error.value.do


RATED = "user_id:token\titem_id:token\ttimestamp:float\trating:"
WITH_RATING = {"load_col": {"inter": ["user_id", "item_id", "timestamp", "rating"]}}


@pytest.mark.parametrize(
    ("kind", "value", "options", "words"),
    [
        ("float", "3,5", {}, ["line 3", "'rating'", "'3,5'"]),
        ("float", "good", {}, ["line 3", "'rating'", "'good'"]),
        ("float", "inf", {}, ["line 3", "'rating'", "'inf'"]),
        ("float_seq", "1 x", {}, ["line 3", "'rating'", "'1 x'"]),
        ("float", "", {"train_grades": {"rating": [3]}}, ["line 3", "train_grades", "missing"]),
        ("float", "nan", {"val_interval": {"rating": "[1,inf)"}}, ["line 3", "val_interval", "missing"]),
        ("token", "4", {"train_grades": {"rating": [3]}}, ["train_grades", "'rating'", "token", "float"]),
        ("float", "4", {"train_grades": {"timestamp": [3]}}, ["train_grades", "'timestamp'"]),
        ("float", "4", {"train_grades": {"rating": ["low"]}}, ["train_grades", "rising thresholds"]),
        ("token", "4", {"val_interval": {"rating": "[3,inf)"}}, ["val_interval", "rating:float"]),
        ("token_seq", "4", {"val_interval": {"rating": [4]}}, ["val_interval", "sequence"]),
    ],
)
def test_values_of_other_columns_that_are_refused(tmp_path, kind, value, options, words):
    rows = [(*row, 4 if number != 1 else value) for number, row in enumerate(ROWS)]
    with pytest.raises(ConfigurationError) as error:
        data_of(tmp_path, as_text(rows, RATED + kind), **WITH_RATING, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_missing_rating_is_reported(tmp_path):
    rows = [(*row, 4 if number else "") for number, row in enumerate(ROWS)]
    data = data_of(tmp_path, as_text(rows, RATED + "float"), **WITH_RATING)
    assert data.summary().notes == {"toy.inter: missing values of rating replaced by the mean": 1}


# --- item files -------------------------------------------------------------------------------------------------------

TEXT = {"dataset": "toy", "text_title": "title", "text_categories": "c", "text_brand": None, "text_description": None}


def texts_of(folder: Path, content: str, separator: str = "\t") -> dict[str, tuple[str, str]]:
    file = folder / "toy.item"
    file.write_bytes(content.encode())
    texts = read_item_texts(file, TEXT, separator=separator)
    return {token: (text["title"], text["categories"]) for token, text in texts.items()}


@pytest.mark.parametrize(
    ("lines", "separator", "expected"),
    [
        (["a\tTwo\tx", "", "b\tOne\ty", " "], "\t", {"a": ("Two", "x"), "b": ("One", "y")}),
        (['a\t"Two\nlines\n\nhere"\tx', "b\tOne\ty"], "\t", {"a": ("Two lines here", "x"), "b": ("One", "y")}),
        (['a\tTwo\t"x\ny"', "b\tOne\ty"], "\t", {"a": ("Two", "x y"), "b": ("One", "y")}),
        (['a\t"A tab\there"\tx', "b\tOne\ty"], "\t", {"a": ("A tab here", "x"), "b": ("One", "y")}),
        (["a\tA tab\rhere\tx", "b\tOne\ty"], "\t", {"a": ("A tab here", "x"), "b": ("One", "y")}),
        (['a\t"Open\tx', "b\tOne\ty"], "\t", {"a": ('"Open', "x"), "b": ("One", "y")}),
        (['a\t"Open\tx"', "b\tOne\ty"], "\t", {"a": ('"Open', 'x"'), "b": ("One", "y")}),
        (['a\t"A" and "B\tx', "b\tOne\ty"], "\t", {"a": ('"A" and "B', "x"), "b": ("One", "y")}),
        (['a,"Story, 1995",x', 'b,"5"" pipe",y'], ",", {"a": ("Story, 1995", "x"), "b": ('5" pipe', "y")}),
        (['a,"Story,\n1995",x', "b,One,y"], ",", {"a": ("Story, 1995", "x"), "b": ("One", "y")}),
        (["a \tTwo\tx", "a\tTwo\tx"], "\t", {"a": ("Two", "x")}),
    ],
)
def test_item_files_are_read_whole(tmp_path, lines, separator, expected):
    header = separator.join(["item_id:token", "title:token_seq", "c:token_seq"])
    assert texts_of(tmp_path, "\n".join([header, *lines]), separator) == expected


@pytest.mark.parametrize(
    ("lines", "separator", "words"),
    [
        (["a\tTwo\tx", "b\ta title\twith a tab\ty"], "\t", ["line 3", "4 columns, and the header has 3"]),
        (["a\tTwo\tx", "b\tOne\nand two\ty"], "\t", ["line 3", "2 columns"]),
        (["a\tTwo\tx", 'b\t"One\nand two\ty', "c\tThree\tz"], "\t", ["line 3", "2 columns"]),
        (['a,"Story, 1995"', "b,One,y"], ",", ["line 2", "2 columns"]),
        (['a\tTwo\t"x\nb\tOne\ty"'], "\t", ["line 2", "line 3", "quotation mark"]),
        (["a\tTwo\tx", "b\tOne\ty", "a\tThree\tx"], "\t", ["line 4", "'a'", "line 2"]),
        (["a\tTwo\tx", "\tOne\ty"], "\t", ["line 3", "'item_id'", "missing"]),
        ([], "\t", ["no other line"]),
    ],
)
def test_item_files_that_are_refused(tmp_path, lines, separator, words):
    header = separator.join(["item_id:token", "title:token_seq", "c:token_seq"])
    with pytest.raises(ConfigurationError) as error:
        texts_of(tmp_path, "\n".join([header, *lines]), separator)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "content", [b"", "item_id\ttitle\tc\ni0\tB\u00fcrste\tx\n".encode("latin-1"), b"item_id\tc\ni0\tx\n"]
)
def test_a_broken_item_file_stops_a_dry_run(tmp_path, capsys, content):
    data_of(tmp_path, PLAIN)
    (tmp_path / "toy" / "toy.item").write_bytes(content)
    argv = ["--preset=smoke", "--dataset=toy", f"--data_path={tmp_path}", "--dry_run", "--text_categories=c"]
    assert main(argv) == 2
    assert "toy.item" in capsys.readouterr().err


# --- files that are not there -----------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path):
    folder = tmp_path / "toy"
    data_of(tmp_path, PLAIN)
    (folder / "toy.inter").rename(folder / "toy.inter.gz")
    settings = load_settings(config_dict={"preset": "smoke", "dataset": "toy", "data_path": str(tmp_path)})
    with pytest.raises(MissingFileError, match="unpack toy.inter.gz"):
        Data(settings)
    (folder / "toy.inter").mkdir()
    with pytest.raises(MissingFileError, match="toy.inter is not a file"):
        Data(settings)
    (tmp_path / "flat").write_text("")
    with pytest.raises(MissingFileError, match="flat is not a folder"):
        Data(load_settings(config_dict={"preset": "smoke", "dataset": "flat", "data_path": str(tmp_path)}))
    with pytest.raises(MissingFileError, match="Is a directory"):
        AtomicFile(folder)


# --- random files -----------------------------------------------------------------------------------------------------

# `pytest tests/test_data_files.py -k random --hypothesis-profile=long` tries many more files.


@dataclass(frozen=True)
class Form:
    """How a file is written."""

    separator: str = "\t"
    quotes: str = "never"  # or "needed", "always"
    end: str = "\n"
    encoding: str = "utf-8"  # or another one that has a byte-order mark
    empty: bool = False  # empty lines between the others
    time: str = "int"

    def field(self, value: str) -> str:
        needed = any(character in value for character in (*self.separator, '"', "\n", "\r"))
        if self.quotes == "always" or (self.quotes == "needed" and needed):
            return '"' + value.replace('"', '""') + '"'
        return value

    def file(self, rows: Sequence[Sequence[str]]) -> bytes:
        lines = [self.separator.join(map(self.field, row)) for row in rows]
        return ((self.end * 2 if self.empty else self.end).join(lines) + self.end).encode(self.encoding)

    def when(self, time: int) -> str:
        moment = datetime.fromtimestamp(time, UTC)
        offset = timezone(timedelta(hours=time % 3))
        return {
            "int": str(time),
            "float": f"{time}.5",
            "exponent": f"{time:.12e}",
            "iso": f"{moment:%Y-%m-%d %H:%M:%S}",
            "micro": f"{moment:%Y-%m-%dT%H:%M:%S}.000{time % 7:03d}",
            "offset": moment.astimezone(offset).isoformat(),
        }[self.time]


forms = st.builds(
    Form,
    separator=st.sampled_from(["\t", ",", ";", "|", "::", " "]),
    quotes=st.sampled_from(["needed", "always"]),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    empty=st.booleans(),
    time=st.sampled_from(["int", "float", "exponent", "iso", "micro", "offset"]),
) | st.builds(Form, time=st.sampled_from(["int", "iso"]))
ids = (
    st.text("ab1é_.-\"' ,:", min_size=1, max_size=4)
    .map(str.strip)
    .filter(lambda text: text.strip('"') == text and text)
)
texts = st.text("abé1 \"',;|:&<\t\n[]", max_size=12)
tables = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1_000_000_000, 1_000_000_999)), min_size=1, max_size=24
)


def read(folder: Path, inter: bytes, item: bytes, form: Form) -> Data:
    return data_of(folder, inter, item, field_separator=form.separator, text_categories=None)


def written(form: Form, rows, users, items, titles, kind) -> tuple[bytes, bytes]:
    inter = [["user_id:token", "item_id:token", f"timestamp:{kind}"]]
    inter += [[users[user], items[item], form.when(time)] for user, item, time in rows]
    item = [["title:token_seq", "item_id:token"] if len(titles[0]) % 2 else ["item_id:token", "title:token_seq"]]
    item += [[title, name] if len(titles[0]) % 2 else [name, title] for name, title in zip(items, titles, strict=True)]
    return form.file(inter), form.file(item)


@pytest.mark.slow
@given(
    form=forms,
    rows=tables,
    users=st.lists(ids, min_size=4, max_size=4, unique=True),
    items=st.lists(ids, min_size=6, max_size=6, unique=True),
    titles=st.lists(texts, min_size=6, max_size=6),
    kind=st.sampled_from(["float", "token"]),
)
def test_random_files_are_read_exactly(tmp_path_factory, form, rows, users, items, titles, kind):
    """What a writer of CSV writes is read back. Only a title that could also be several rows may be refused."""
    if (
        form.quotes == "never"
    ):  # Such a file cannot contain separators, line breaks, and quotation marks around a value.
        titles = [" ".join(title.split()).strip('"') for title in titles]
    inter, item = written(form, rows, users, items, titles, kind)
    try:
        data = read(tmp_path_factory.mktemp("random"), inter, item, form)
        catalog = data.catalog
    except ConfigurationError as error:
        assert "a quotation mark opens" in error.what and any("\n" in title for title in titles)
        return
    expected: dict[str, list[tuple[int, str]]] = {}
    for user, name, time in rows:
        shown = time + (time % 7) / 1e6 if form.time == "micro" else time
        expected.setdefault(users[user], []).append((shown, items[name]))
    ordered = {user: [item for _, item in sorted(own, key=lambda event: event[0])] for user, own in expected.items()}
    assert sequences(data) == ordered
    title_of = dict(zip(items, map(clean_text, titles), strict=True))
    assert {item.token: item.title for item in catalog} == {item.token: title_of[item.token] for item in catalog}


@pytest.mark.slow
@given(
    form=forms,
    rows=tables,
    places=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(["insert", "delete", "replace"])), max_size=4),
    pieces=st.lists(
        st.sampled_from(["\t", "\n", "\r", '"', ",", ":", " ", "\0", "\x1f", "nan", "-", "\ufeff", "é", "1e999"])
        | st.text(max_size=2),
        min_size=4,
        max_size=4,
    ),
    which=st.integers(0, 1),
)
def test_random_damage_is_read_or_refused(tmp_path_factory, form, rows, places, pieces, which):
    """A damaged file is refused with an error of this package, or every line that is left is an interaction."""
    names = [f"n{n}" for n in range(6)]
    files = list(written(form, rows, names[:4], names, [f"title {n}" for n in range(6)], "float"))
    for (place, action), piece in zip(places, pieces, strict=False):
        at = place % (len(files[which]) + 1)
        new = b"" if action == "delete" else piece.encode("utf-8", "replace")
        files[which] = files[which][:at] + new + files[which][at + (action != "insert") :]
    try:
        data = read(tmp_path_factory.mktemp("random"), *files, form)
        summary = data.summary()
        summary.text()
    except GR2Error as error:
        assert error.what and error.where and error.why and error.do
        return
    assert summary.interactions == summary.input_lines and len(data.catalog) == data.item_count
    if which == 1:
        assert summary.interactions == len(rows)
    try:
        summary.check()
    except GR2Error as error:
        assert error.what and error.where and error.why and error.do
