"""Files of any form become a data set that this package reads, or one error that names the place."""

import bz2
import csv
import gzip
import io
import json
import lzma
import shlex
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import duckdb
import pyarrow
import pyarrow.parquet as parquet
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from recbole_gr2.bridge.atomic import MISSING, AtomicFile
from recbole_gr2.bridge.data import TEXTS, Data, read_item_texts
from recbole_gr2.bridge.item_text import clean_text
from recbole_gr2.commands.convert import convert as command
from recbole_gr2.config import load_settings
from recbole_gr2.config.values import read_yaml
from recbole_gr2.convert import convert
from recbole_gr2.convert.columns import NEW, OLD
from recbole_gr2.convert.items import one_line
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.quick_start import parse

pytestmark = pytest.mark.slow  # Together they need many seconds.

START = 1_400_000_000
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\ttitle:token_seq\tbrand:token\tcategories:token_seq\tdescription:token_seq\n"
# Two users, three items, one repeated interaction; user, item, rating, time.
ROWS = [("A1", "B1", 5.0, START), ("A2", "B1", 4.5, START + 1), ("A1", "B2", 1.0, START + 2), ("A1", "B1", 3.0, START)]
ROWS += [("A2", "B3", 2.0, START + 3)]
OLD_INTER = INTER + "".join(f"{user}\t{item}\t{rating:g}\t{time}\n" for user, item, rating, time in ROWS)
NEW_INTER = INTER + "".join(f"{user}\t{item}\t{rating:g}\t{time}.07\n" for user, item, rating, time in ROWS)


def old(**fields) -> list[dict]:
    names = ("reviewerID", "asin", "overall", "unixReviewTime")
    return [{**dict(zip(names, row, strict=True)), "reviewText": "good\tone", **fields} for row in ROWS]


def new() -> list[dict]:
    names = ("user_id", "parent_asin", "rating", "timestamp")
    rows = [(*row[:3], 1000 * row[3] + 70) for row in ROWS]
    return [{**dict(zip(names, row, strict=True)), "asin": "B9", "title": "A review", "text": "good"} for row in rows]


META = {
    "2014": [
        {"asin": "B9", "title": "No interaction"},
        {
            "asin": "B1",
            "title": 'It\'s a "nice"\ttube\n',
            "categories": [["Beauty"], ["Beauty", "Hair Care"], ["Beauty", "Men"]],
            "brand": "X & Y",
            "description": 'First.\r\nSecond "quoted".',
        },
        {"asin": "B1", "title": "Another text of B1"},
        {"asin": "B2", "categories": [["Beauty"]]},
    ],
    "2018": [
        {"asin": "B3", "title": '"A" is for &quot;Alibi', "brand": None, "category": [], "description": []},
        {
            "asin": "B1",
            "title": "<b>Soap</b>",
            "brand": "\n X",
            "category": ["Beauty", "Soap"],
            "description": ["a", "b"],
        },
    ],
    "2023": [
        {
            "parent_asin": "B2",
            "title": "Brush 🖌\x00\x1f",
            "store": "S",
            "categories": ["A", "B"],
            "description": ["d", "e"],
        },
        {"parent_asin": "B3", "title": None, "store": None, "categories": None, "description": None},
    ],
}
ITEMS = {
    "2014": 'B1\tIt\'s a "nice" tube\tX & Y\tBeauty > Hair Care\tFirst. Second "quoted".\nB2\t\t\tBeauty\t\n',
    "2018": 'B3\t"""A"" is for &quot;Alibi"\t\t\t\nB1\t<b>Soap</b>\tX\tBeauty > Soap\ta b\n',
    "2023": "B2\tBrush 🖌\tS\tA > B\td e\nB3\t\t\t\t\n",
}
REVIEWS = {"2014": old(helpful=[0, 0]), "2018": old(verified=True, style={"Size": "L"}), "2023": new()}
RATINGS = {
    "2014": [list(row) for row in ROWS],
    "2018": [[item, user, *rest] for user, item, *rest in ROWS],
    "2023": [["user_id", "parent_asin", "rating", "timestamp"], *([*r[:3], 1000 * r[3] + 70] for r in ROWS)],
}


def json_lines(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def put(file: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" and isinstance(content, str) else data)
    return file


def files_of(folder: Path, release: str, form: str = "reviews.jsonl") -> dict[str, Path]:
    if ".csv" in form:
        reviews = put(folder / form, "".join(",".join(map(str, row)) + "\n" for row in RATINGS[release]))
    else:
        reviews = put(folder / form, json_lines(REVIEWS[release]))
    python = release == "2014"  # the loose lines of its metadata
    lines = "".join(f"{record!r}\n" for record in META[release]) if python else json_lines(META[release])
    return {
        "interactions": reviews,
        "items": put(folder / f"meta.json{form[-3:] if form.endswith('.gz') else ''}", lines),
    }


def called(*arguments):
    """Result of the command `recbole-gr2 data convert`."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("form", ["reviews.jsonl", "reviews.json.gz", "ratings.csv", "ratings.csv.gz"])
@pytest.mark.parametrize("release", ["2014", "2018", "2023"])
def test_each_release_gives_the_expected_files(release, form, tmp_path):
    report = convert(name="toy", **files_of(tmp_path, release, form), output=tmp_path / "out")
    folder = tmp_path / "out" / "toy"
    assert sorted(file.name for file in folder.iterdir()) == ["toy.inter", "toy.item", "toy.yaml"]
    assert (folder / "toy.inter").read_text() == (NEW_INTER if release == "2023" else OLD_INTER)
    assert (folder / "toy.item").read_bytes().decode() == ITEM + ITEMS[release]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["toy"]
    counts = report.counts
    assert report.source == f"Amazon {release}"
    assert (counts["lines of interactions"], counts["interactions"], counts["users"], counts["items"]) == (5, 5, 2, 3)
    assert (counts["repeated interactions"], counts["items without a line with texts"]) == (1, 1)
    assert counts["malformed lines of interactions"] == counts["malformed lines of items"] == 0
    assert counts["repeated lines of items"] == (release == "2014")
    assert counts["items without title"] == (1 if release == "2018" else 2)  # one of them has no line
    assert counts["titles with HTML, which a run removes"] == (2 if release == "2018" else 0)


@pytest.mark.parametrize("release", ["2014", "2018", "2023"])
def test_texts_are_read_back_as_those_of_the_raw_file(release, tmp_path):
    report = convert(name="toy", **files_of(tmp_path, release), output=tmp_path)
    fields = read_yaml((report.folder / "toy.yaml").read_text())
    texts = read_item_texts(report.folder / "toy.item", fields)
    key, brand = ("parent_asin", "store") if release == "2023" else ("asin", "brand")
    raw = {record[key]: record for record in reversed(META[release]) if record[key] != "B9"}
    assert set(texts) == set(raw)
    for item, record in raw.items():
        assert texts[item]["title"] == clean_text(record.get("title") or "")
        assert texts[item]["brand"] == clean_text(record.get(brand) or "")
    if release == "2014":
        assert texts["B1"]["categories"] == clean_text(str(raw["B1"]["categories"])) == "Beauty > Hair Care"


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.sampled_from('"\t\n\r ,ab<&;\x00\x1f\x85\u2028\ufeff\ud83dé|')), min_size=3, max_size=3))
def test_any_text_is_read_back_exactly(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("any")
    names = ("title", "store", "description")
    meta = [{"parent_asin": "B1", **dict(zip(names, texts, strict=True))}, {"parent_asin": "B2", "title": texts[2]}]
    files = {
        "interactions": put(folder / "r.jsonl", json_lines(new())),
        "items": put(folder / "m.json", json_lines(meta)),
    }
    report = convert(name="toy", **files, output=folder)
    atomic = AtomicFile(report.folder / "toy.item")
    columns = list(atomic.read(atomic.names).values())
    with open(report.folder / "toy.item", newline="") as stream:
        _, *rows = csv.reader(stream, delimiter="\t")  # Other programs read the same values.
    assert rows == list(map(list, zip(*columns, strict=True)))
    assert rows[0] == ["B1", one_line(texts[0]), one_line(texts[1]), "", one_line(texts[2])]
    assert rows[1] == ["B2", one_line(texts[2]), "", "", ""]


def test_one_line():
    assert one_line("a\t\r\n b\x00c\x1f \ud83d\ude00\ud83d") == "a b c 😀"


@pytest.mark.parametrize("release", ["2018", "2023"])
def test_the_printed_command_runs_the_data_set(release, tmp_path):
    """Six users with five items each; an item with one interaction is dropped by the settings of the file."""
    times = [(f"U{u}", f"I{n}", 4.0, START + 60 * n) for u in range(6) for n in (0, 2, 1, 4, 3)]
    times += [("U1", "I9", 1.0, START)]
    user, item, rating, time = OLD if release == "2018" else NEW
    unit = 1 if release == "2018" else 1000
    reviews = [{user: u, item: i, rating: r, time: unit * t, "verified": True} for u, i, r, t in times]
    meta = [{item: f"I{n}", "title": f'"Thing" {n}', "category": ["House"], "categories": ["House"]} for n in range(6)]
    files = [put(tmp_path / "r.json.gz", json_lines(reviews)), put(tmp_path / "m.json.gz", json_lines(meta))]
    result = called(files[0], "--items", files[1], "--name", "toy", "--output", tmp_path / "my data")
    assert result.exit_code == 0 and "31 interactions" in result.stderr
    program, run, *arguments = shlex.split(result.stdout)
    assert (program, run) == ("recbole-gr2", "run")
    options, command_line = parse(arguments)
    preset = {"preset": "smoke"}
    data = Data(load_settings(command_line=command_line, config_files=options.config_files, config_dict=preset))
    sequences = {data.user_tokens[u]: [data.item_tokens[i] for i in items] for u, items in data.sequences.items()}
    assert sequences == {f"U{u}": [f"I{n}" for n in range(5)] for u in range(6)}
    assert data.user_times[1].tolist() == [START + 60 * n for n in range(5)]
    assert {(i.token, i.title, i.categories, i.brand) for i in data.catalog} == {
        (f"I{n}", f'"Thing" {n}', "House", "") for n in range(5)
    }


def change(file: Path, number: int, line: str | bytes) -> Path:
    lines = file.read_bytes().splitlines(keepends=True)
    lines[number - 1] = line.encode() + b"\n" if isinstance(line, str) else line
    file.write_bytes(b"".join(lines))
    return file


def review(**fields) -> str:
    return json.dumps({**old(verified=True)[1], **fields})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"reviewerID": "A1", ', "no JSON object"),
        ("[1, 2]", "no JSON object"),
        ("__import__('os').getcwd()", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        (b'{"reviewerID": "\xff"}\n', "0xff is not valid UTF-8"),
        (json.dumps({"asin": "B1"}), "reviewerID is None"),
        (review(asin=None), "asin is None"),
        (review(asin=" "), "asin is ' '"),
        (review(reviewerID="a\tb"), "reviewerID is"),
        (review(reviewerID="NA"), "reviewerID is 'NA'"),
        (review(overall="good"), "overall is 'good'"),
        (review(overall=float("inf")), "overall is 'Infinity'"),
        (review(unixReviewTime=None), "unixReviewTime is None"),
        (review(unixReviewTime=START * 1000), "but the times are Unix times in seconds"),
    ],
)
def test_a_malformed_line_is_named_or_skipped(line, message, tmp_path):
    files = files_of(tmp_path, "2018")
    change(files["interactions"], 2, line)
    with pytest.raises(ConfigurationError, match=message) as error:
        convert(name="toy", **files, output=tmp_path)
    assert error.value.where == f"{files['interactions']}, line 2"
    assert not (tmp_path / "toy").exists() and not list(tmp_path.glob(".toy*"))
    report = convert(name="toy", **files, output=tmp_path, skip_malformed=True)
    assert report.counts["malformed lines of interactions"] == 1
    assert (tmp_path / "toy" / "toy.inter").read_text() == OLD_INTER.replace(f"A2\tB1\t4.5\t{START + 1}\n", "")


@pytest.mark.parametrize("line", ["B1,A2,4.5", "B1,A2,x,1", 'B1,"A2,4.5,1'])
def test_a_malformed_rating_is_named_or_skipped(line, tmp_path):
    files = files_of(tmp_path, "2018", "ratings.csv")
    change(files["interactions"], 2, line)
    with pytest.raises(ConfigurationError) as error:
        convert(name="toy", **files, output=tmp_path)
    assert error.value.where == f"{files['interactions']}, line 2"
    assert convert(name="toy", **files, output=tmp_path, skip_malformed=True).counts["interactions"] == 4


def test_a_malformed_line_of_the_metadata_is_named_or_skipped(tmp_path):
    files = files_of(tmp_path, "2014")
    change(files["items"], 3, "{'title': open('x')}")
    with pytest.raises(ConfigurationError) as error:
        convert(name="toy", **files, output=tmp_path)
    assert error.value.where == f"{files['items']}, line 3"
    report = convert(name="toy", **files, output=tmp_path, skip_malformed=True)
    assert report.counts["malformed lines of items"] == 1
    assert (report.folder / "toy.item").read_text() == ITEM + ITEMS["2014"]


def test_empty_lines_are_no_lines(tmp_path):
    files = files_of(tmp_path, "2018")
    change(files["interactions"], 2, files["interactions"].read_bytes().splitlines(True)[1] + b"\n  \r\n")
    report = convert(name="toy", **files, output=tmp_path)
    assert report.counts["lines of interactions"] == 5 and report.counts["malformed lines of interactions"] == 0


@pytest.mark.parametrize("form", ["reviews.jsonl", "ratings.csv"])
@pytest.mark.parametrize(("right", "wrong"), [("2014", "2018"), ("2018", "2023"), ("2023", "2014")])
def test_another_release_is_refused(right, wrong, form, tmp_path):
    files = files_of(tmp_path, right, form)
    with pytest.raises(ConfigurationError, match=f"and not of {wrong}"):
        convert(name="toy", **files, output=tmp_path, release=wrong)
    (tmp_path / "other").mkdir()
    mixed = {**files, "items": files_of(tmp_path / "other", wrong)["items"]}
    with pytest.raises(ConfigurationError, match=r"and not of|none of the 2 items"):
        convert(name="toy", **mixed, output=tmp_path)
    assert convert(name="toy", **files, output=tmp_path, release=right).source == f"Amazon {right}"


def test_files_without_the_fields_of_a_release_are_refused(tmp_path):
    files = files_of(tmp_path, "2018")
    plain = put(tmp_path / "plain.json", '{"user": 1}\n')
    with pytest.raises(ConfigurationError, match="no single release"):
        convert(name="toy", interactions=plain, items=files["items"], output=tmp_path, release="2018")
    with pytest.raises(ConfigurationError, match="the file is empty"):
        convert(name="toy", interactions=files["interactions"], items=put(plain, ""), output=tmp_path)
    with pytest.raises(ConfigurationError, match="add --items FILE"):
        convert(name="toy", interactions=files["interactions"], output=tmp_path, release="2018")
    undecided = put(tmp_path / "undecided.json", '{"asin": "B1", "brand": "X"}\n')
    ratings = files_of(tmp_path, "2018", "ratings.csv")["interactions"]
    given = {"interactions": ratings, "items": undecided, "output": tmp_path}
    with pytest.raises(ConfigurationError, match="fit 2014 and 2018"):
        convert(name="toy", **given)
    assert convert(name="toy", **given, release="2018").counts["users"] == 2
    with pytest.raises(ConfigurationError, match="none of the 2 items"):  # Its ratings have the user first.
        convert(name="toy2", **given, release="2014")
    with pytest.raises(ConfigurationError, match="no release '2015'"):
        convert(name="toy2", **given, release="2015")


def test_metadata_of_another_category_are_refused(tmp_path):
    files = files_of(tmp_path, "2018")
    put(files["items"], json_lines([{"asin": "C1", "category": ["Toys"]}]))
    with pytest.raises(ConfigurationError, match="none of the 3 items") as error:
        convert(name="toy", **files, output=tmp_path)
    assert error.value.where == str(files["items"]) and not (tmp_path / "toy").exists()


@pytest.mark.parametrize("kind", ["interactions", "items"])
def test_a_missing_or_damaged_file_is_named(kind, tmp_path):
    files = files_of(tmp_path, "2018", "reviews.json.gz")
    with pytest.raises(MissingFileError) as error:
        convert(name="toy", **{**files, kind: tmp_path / "absent.json.gz"}, output=tmp_path)
    assert error.value.where == str(tmp_path / "absent.json.gz")
    packed = files[kind].read_bytes()
    for damaged in (packed[:-12], b"plain" + packed):
        with pytest.raises(ConfigurationError, match="cannot be unpacked") as damage:
            convert(name="toy", **{**files, kind: put(tmp_path / "damaged.gz", damaged)}, output=tmp_path)
        assert damage.value.where == str(tmp_path / "damaged.gz")


def test_an_existing_folder_is_replaced_only_on_request(tmp_path):
    files = files_of(tmp_path, "2018")
    (tmp_path / "toy").mkdir()
    note, inter = put(tmp_path / "toy" / "note.txt", "mine"), put(tmp_path / "toy" / "toy.inter", "old")
    with pytest.raises(ConfigurationError, match="exists") as error:
        convert(name="toy", **files, output=tmp_path)
    assert error.value.where == str(tmp_path / "toy") and inter.read_text() == "old"
    convert(name="toy", **files, output=tmp_path, overwrite=True)
    assert inter.read_text() == OLD_INTER and note.read_text() == "mine"


def test_errors_of_the_command_line(tmp_path):
    files = files_of(tmp_path, "2018")
    given = [files["interactions"], "--items", files["items"], "--output", tmp_path]
    for arguments, code, where in (
        ([*given, "--name", "../toy"], 2, "--name"),
        ([tmp_path / "absent.json", *given[1:], "--name", "toy"], 4, str(tmp_path / "absent.json")),
        ([*given[:-1], put(tmp_path / "file", ""), "--name", "toy"], 2, str(tmp_path / "file" / "toy")),
        ([*given, "--name", "toy", "--min_interactions", "0"], 2, "--min_interactions"),
    ):
        error = called(*arguments).exception
        assert isinstance(error, GR2Error) and (error.exit_code, error.where) == (code, where)
        assert error.why and error.do


# --- files of a user -------------------------------------------------------------------------------------------------

# The ids have leading zeros or more digits than a float64 number holds.
INTERACTIONS = [
    {"userId": "007", "itemId": "0010", "rating": "4.5", "timestamp": "1588888888"},
    {"userId": "9007199254740993", "itemId": "0010", "rating": "", "timestamp": "1588888890"},
    {"userId": "007", "itemId": "B 2", "rating": "3", "timestamp": "1588888889"},
    {"userId": "007", "itemId": "0010", "rating": "4.5", "timestamp": "1588888888"},
]
TITLES = [
    {"itemId": "0010", "title": 'A "nice", old; thing | x'},
    {"itemId": "B 2", "title": "Käse <b>&amp;</b> more"},
    {"itemId": "C", "title": "none"},
]
MINE_INTER = INTER + "".join("\t".join(row.values()) + "\n" for row in INTERACTIONS)
MINE_ITEM = "item_id:token\ttitle:token_seq\n" + "".join("\t".join(row.values()) + "\n" for row in TITLES)


def table(rows, separator=",", end="\n", quoting=csv.QUOTE_MINIMAL) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys(), delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write(file: Path, rows, form: str) -> Path:
    if form == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file
    if form == "jsonl":
        return put(file, json_lines(rows))
    # The module csv of Python does not quote a value for a carriage return alone.
    quoting = csv.QUOTE_ALL if any("\r" in value for row in rows for value in row.values()) else csv.QUOTE_MINIMAL
    return put(file, table(rows, form, "\r\n" if form == ";" else "\n", quoting))


def made(folder: Path, interactions, items=None, name="mine", **options):
    """Convert texts of files; returns the report, and the content of the .inter and .item file."""
    files = [put(folder / "inter.txt", interactions), put(folder / "items.txt", items or table(TITLES))]
    report = convert(*files, name=name, output=folder / "dataset", overwrite=True, **options)
    return report, *((report.folder / f"{name}.{ending}").read_text() for ending in ("inter", "item"))


@pytest.mark.parametrize("form", [",", ";", "\t", "|", "jsonl", "parquet"])
def test_each_form_gives_the_same_files(form, tmp_path):
    files = [write(tmp_path / f"{name}.x", rows, form) for name, rows in (("r", INTERACTIONS), ("i", TITLES))]
    report = convert(*files, name="mine", output=tmp_path)
    assert (report.folder / "mine.inter").read_text() == MINE_INTER
    assert (report.folder / "mine.item").read_text() == MINE_ITEM


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, "zst"])
def test_packed_files_are_unpacked(pack, tmp_path):
    content = table(INTERACTIONS).encode()
    if pack == "zst":
        with pyarrow.CompressedOutputStream(str(tmp_path / "r"), "zstd") as out:
            out.write(content)
        packed = (tmp_path / "r").read_bytes()
    else:
        packed = pack(content)
    assert made(tmp_path, packed)[1] == MINE_INTER
    with pytest.raises(ConfigurationError, match="cannot be unpacked"):
        made(tmp_path, packed[:-5])


def test_what_is_counted_and_written(tmp_path):
    report, inter, item = made(tmp_path, table(INTERACTIONS))
    assert (inter, item) == (MINE_INTER, MINE_ITEM)
    expected = {
        "interactions": 4,
        "interactions without a rating": 1,
        "users": 2,
        "items": 2,
        "density": 3 / 4,
        "identical interactions": 1,
        "repeated interactions": 1,
        "interactions at the same time as another one of the user": 2,
        "users with one time for their last two interactions": 0,
        "lines of items": 3,
        "items without title": 0,
        "titles with HTML, which a run removes": 1,
        "items without interactions": 1,
        "users with 4 or more interactions, who have a training list": 0,
    }
    assert {what: report.counts[what] for what in expected} == expected
    assert any("rm_dup_inter" in warning for warning in report.warnings)
    assert any("no user has 4 interactions" in warning for warning in report.warnings)
    assert "user = userId, item = itemId, rating = rating, time = timestamp" in str(report)
    properties = (report.folder / "mine.yaml").read_text()
    assert read_yaml(properties) == {f"text_{text}": None for text in TEXTS} | {"text_title": "title"}
    assert "# rm_dup_inter: first" in properties and "inter.txt and items.txt" in properties


def test_ties_of_the_last_interactions_are_a_warning(tmp_path):
    rows = [("a", 5), ("a", 5), ("b", 5), ("b", 6), ("b", 6), ("c", 7), ("c", 7), ("c", 8)]
    text = "user,item,time\n" + "".join(f"{user},0010,{START + time}\n" for user, time in rows)
    report, *_ = made(tmp_path, text)
    assert report.counts["users with one time for their last two interactions"] == 2
    assert any(warning.startswith("2 of 3 users have one time") for warning in report.warnings)


def test_few_training_lists_are_a_warning(tmp_path):
    rows = "".join(f"u{user},0010,{START + user + n}\n" for user in range(35) for n in range(4 + user % 2))
    report, *_ = made(tmp_path, "user,item,time\n" + rows + f"v,B 2,{START}\n")
    assert report.counts["users with 4 or more interactions, who have a training list"] == 35
    assert any("only 35 users have a training list" in warning for warning in report.warnings)


def test_the_least_number_of_interactions_is_that_of_recbole(tmp_path):
    """Item B has two interactions until user 3 is left out, who has only one other."""
    pairs = [(1, "A"), (1, "C"), (2, "A"), (2, "C"), (3, "B"), (4, "B"), (4, "A"), (4, "C")]
    text = "user,item,time\n" + "".join(f"{user},{item},{START + n}\n" for n, (user, item) in enumerate(pairs))
    items = "item,title\nA,a\nB,b\nC,c\n"
    report, *_ = made(tmp_path, text, items, min_interactions=2)
    kept = {what.partition(" ")[0]: n for what, n in report.counts.items() if "2-core" in what}
    assert kept == {"interactions": 6, "users": 3, "items": 2}
    settings = load_settings(config_dict={"preset": "smoke", "dataset": "mine", "data_path": str(tmp_path / "dataset")})
    assert settings.recbole["user_inter_num_interval"] == settings.recbole["item_inter_num_interval"] == "[2,inf)"
    assert made(tmp_path, text, items, min_interactions=9)[0].warnings[0].startswith("no interaction is in the 9-core")


def test_texts_can_be_in_the_file_of_interactions(tmp_path):
    rows = [{**row, "name": f"Item {row['itemId']}"} for row in INTERACTIONS]
    file = put(tmp_path / "r.csv", table(rows))
    with pytest.raises(ConfigurationError, match=r"--title COLUMN: .*'name' \(e.g. 'Item 0010'\)"):
        convert(file, name="mine", output=tmp_path)
    report = convert(file, name="mine", output=tmp_path, title="name")
    assert (report.folder / "mine.item").read_text().splitlines()[1:] == ["0010\tItem 0010", "B 2\tItem B 2"]
    assert report.counts["repeated lines of items"] == 2


def test_text_columns_and_lists(tmp_path):
    records = [
        {"id": "0010", "name": "T", "brand": "X", "genres": ["a", "b"], "overview": "one\n\ttwo"},
        {"id": "B 2", "name": 7, "brand": None, "genres": [["p"], ["q", "r"]], "overview": "nan"},
    ]
    report, _, item = made(tmp_path, table(INTERACTIONS), json_lines(records))
    assert item.splitlines()[1:] == ["0010\tT\tX\ta > b\tone two", "B 2\t7\t\tq > r\t"]
    assert report.counts["items without brand"] == report.counts["items without description"] == 1
    assert read_yaml((report.folder / "mine.yaml").read_text())["text_brand"] == "brand"


MOVIELENS = {
    "ml-1m": (
        b"1::1193::5::978300760\n1::661::3::978302109\n",
        '1193::"Great" Cats: Café (1998)::Musical|Drama\n661::James, The (1996)::Children\'s\n'.encode("latin-1"),
    ),
    "ml-100k": (
        b"1\t1193\t5\t978300760\n1\t661\t3\t978302109\n",
        (
            '1193|"Great" Cats: Café (1998)|01-Jan-1998||http://x|' + "|".join("0000000010001000000") + "\n"
            "661|James, The (1996)|01-Jan-1996||http://y|" + "|".join("0000100000000000000") + "\n"
        ).encode("latin-1"),
    ),
    "ml-20m": (
        b"userId,movieId,rating,timestamp\n1,1193,5,978300760\n1,661,3.0,978302109\n",
        'movieId,title,genres\n1193,"""Great"" Cats: Café (1998)",Drama|Musical\n'
        '661,"James, The (1996)",Children\'s\n'.encode(),
    ),
}


@pytest.mark.parametrize("name", MOVIELENS)
def test_movielens_is_recognised(name, tmp_path):
    report, inter, item = made(tmp_path, *MOVIELENS[name])
    assert report.source == "MovieLens"
    assert inter == INTER + "1\t1193\t5\t978300760\n1\t661\t3\t978302109\n"
    genres = "Musical, Drama" if name == "ml-1m" else "Drama, Musical"
    assert item.splitlines()[1:] == [
        f'1193\t"""Great"" Cats: Café (1998)"\t{genres}',
        "661\tJames, The (1996)\tChildren's",
    ]


# --- columns ---------------------------------------------------------------------------------------------------------


def test_columns_are_named_guessed_or_asked_for(tmp_path):
    text = "Nutzer;Artikel;Datum\n007;0010;1588888888\n"
    with pytest.raises(ConfigurationError) as error:
        made(tmp_path, text)
    assert "no column has a usual name of the user; no column has a usual name of the item" in error.value.what
    assert "--user COLUMN --item COLUMN --time COLUMN" in error.value.do
    assert "'Artikel' (e.g. '0010')" in error.value.do
    given = {"user": "Nutzer", "item": "Artikel"}
    assert made(tmp_path, text, time="Datum", **given)[1].splitlines()[1] == "007\t0010\t1588888888"
    with pytest.raises(ConfigurationError, match="no column 'Daten'; nearest: Datum"):
        made(tmp_path, text, time="Daten", **given)
    with pytest.raises(ConfigurationError, match="several columns can be the time: date, timestamp"):
        made(tmp_path, "user,item,date,timestamp\n1,0010,2020-01-01,1588888888\n")
    for names in ("User ID,movieId,unixReviewTime", "reviewerID,asin,date", "uid,product_id,Time"):
        assert made(tmp_path, f"{names}\n1,0010,1588888888\n")[1].endswith("1\t0010\t1588888888\n")


def test_a_file_without_header_has_numbers_as_names(tmp_path):
    text = "1588888888|007|0010\n1588888889|008|0010\n"
    with pytest.raises(ConfigurationError, match="If the first line is no header"):
        made(tmp_path, text)
    _, inter, item = made(tmp_path, text, "0010,x,T\n", time="1", user="2", item="3", title="3")
    assert inter.splitlines()[1:] == ["007\t0010\t1588888888", "008\t0010\t1588888889"]
    assert item.splitlines()[1:] == ["0010\tT"]
    with pytest.raises(ConfigurationError, match="no column '4'"):
        made(tmp_path, text, time="1", user="2", item="4")


def test_the_ids_of_both_files_belong_together(tmp_path):
    with pytest.raises(ConfigurationError, match="the interactions have '0010', the items '10'"):
        made(tmp_path, table(INTERACTIONS), "itemId,title\n10,T\n")
    with pytest.raises(ConfigurationError, match="rename the column with the item ids to 'itemId'"):
        made(tmp_path, table(INTERACTIONS), "number,title\n0010,T\n")
    assert made(tmp_path, table(INTERACTIONS), "ID,title\n0010,T\n")[2].endswith("0010\tT\n")


def test_numbers_of_parquet_are_ids_without_a_decimal_point(tmp_path):
    query = "SELECT 7::DOUBLE AS user, 9007199254740993 AS item, TIMESTAMP '2020-05-07 22:01:28' AS time"
    duckdb.sql(f"COPY ({query}) TO '{tmp_path / 'r.parquet'}'")
    items = put(tmp_path / "i.csv", "item,title\n9007199254740993,T\n")
    report = convert(tmp_path / "r.parquet", items, name="mine", output=tmp_path)
    assert (report.folder / "mine.inter").read_text().endswith("7\t9007199254740993\t1588888888\n")


# --- times -----------------------------------------------------------------------------------------------------------


def times(folder, *values, **options) -> tuple[str, list[str]]:
    """Description of the form of times, and the times in the .inter file."""
    text = "user;item;time\n" + "".join(f"{number};0010;{value}\n" for number, value in enumerate(values))
    report, inter, _ = made(folder, text, **options)
    return report.times, [line.split("\t")[-1] for line in inter.splitlines()[1:]]


@pytest.mark.parametrize(
    ("values", "form", "seconds"),
    [
        (["1588888888", "1588888889.5"], "Unix times in seconds", ["1588888888", "1588888889.5"]),
        (["1588888888123"], "Unix times in milliseconds, written in seconds", ["1588888888.123"]),
        (["1588888888000000"], "Unix times in microseconds, written in seconds", ["1588888888"]),
        (["1588888888000000000"], "Unix times in nanoseconds, written in seconds", ["1588888888"]),
        (["1", "2.50", "-3"], "numbers that are no Unix times, kept as they are", ["1", "2.5", "-3"]),
        (["20200507", "20200508"], "dates such as 20201231", ["1588809600", "1588896000"]),
        (["20200507220128"], "dates such as 20201231", ["1588888888"]),
        (["2020-05-07", "2020-05-07T22:01:28Z"], "ISO dates", ["1588809600", "1588888888"]),
        (["2020-05-07 22:01:28.25", "2020-05-07 22:01"], "ISO dates", ["1588888888.25", "1588888860"]),
        (["2020-05-07T22:01:28+02:00", "2020-05-07 22:01:28 +0200"], "ISO dates", ["1588881688", "1588881688"]),
        (["2020/5/7 22:01:28 UTC"], "ISO dates", ["1588888888"]),
        (["07.05.2020", "31.12.2020"], "%d.%m.%Y", ["1588809600", "1609372800"]),
        (["07.05.2020 22:01"], "%d.%m.%Y %H:%M", ["1588888860"]),
        (["7/5/2020", "31/12/2020"], "%d/%m/%Y", ["1588809600", "1609372800"]),
        (["5/7/2020 10:01:28 PM", "12/31/2020 12:00:00 AM"], "%m/%d/%Y %I:%M:%S %p", ["1588888888", "1609372800"]),
        (["05/05/2020"], "%d/%m/%Y", ["1588636800"]),
        (["31/12/99", "01/02/98"], "%d/%m/%y", ["946598400", "886291200"]),
        (["7 May 2020", "31 December 2020"], "%d %B %Y", ["1588809600", "1609372800"]),
        (["7 Mai 2020", "31 Dezember 2020"], "", None),
        (["May 7, 2020"], "%b %d, %Y", ["1588809600"]),
        (["05 7, 2020"], "%m %d, %Y", ["1588809600"]),
        (["Thu May 07 22:01:28 +0000 2020"], "%a %b %d %H:%M:%S %z %Y", ["1588888888"]),
        (["Thu, 07 May 2020 22:01:28 +0200"], "%a, %d %b %Y %H:%M:%S %z", ["1588881688"]),
    ],
)
def test_forms_of_times(values, form, seconds, tmp_path):
    if seconds is None:  # The names of months have to be English.
        with pytest.raises(ConfigurationError, match="no known form fits most of the times"):
            times(tmp_path, *values)
    else:
        name, found = times(tmp_path, *values)
        assert form in name and found == seconds


@pytest.mark.parametrize(
    ("value", "forms"),
    [
        ("03/04/2020", {"%d/%m/%Y": 1585872000, "%m/%d/%Y": 1583280000}),
        ("03-04-2020 10:00", {"%d-%m-%Y %H:%M": 1585908000, "%m-%d-%Y %H:%M": 1583316000}),
        ("03/04/05", {"%d/%m/%y": 1112486400, "%y/%m/%d": 1049760000 - 86400 * 3}),
    ],
)
def test_an_ambiguous_date_is_refused_unless_its_form_is_given(value, forms, tmp_path):
    with pytest.raises(ConfigurationError, match="is ambiguous") as error:
        times(tmp_path, value, value)
    assert next(iter(forms)) in error.value.do
    for form, seconds in forms.items():
        assert times(tmp_path, value, time_format=form)[1] == [str(seconds)]


def test_a_form_that_is_given(tmp_path):
    assert times(tmp_path, "7|May|2020 at 22", time_format="%d|%b|%Y at %H")[1] == ["1588888800"]
    with pytest.raises(ConfigurationError, match="is no format of dates"):
        times(tmp_path, "7", time_format="%Q")
    with pytest.raises(ConfigurationError, match="line is malformed"):
        times(tmp_path, "2020-05-07", time_format="%d.%m.%Y")
    with pytest.raises(ConfigurationError, match="no interaction was read"):
        times(tmp_path, "2020-05-07", time_format="%d.%m.%Y", skip_malformed=True)


def test_times_of_another_unit_or_without_a_meaning(tmp_path):
    values = ["1588888888", "1588888889", "1588888890000", "yesterday", "0"]
    with pytest.raises(ConfigurationError, match="'1588888890000', but the times are Unix times in seconds") as error:
        times(tmp_path, *values)
    assert error.value.where.endswith("line 4")
    report, inter, _ = made(
        tmp_path, "user,item,time\n" + "".join(f"u,0010,{value}\n" for value in values), skip_malformed=True
    )
    assert report.counts["malformed lines of interactions"] == 2 and inter.count("\n") == 4
    assert any("1 times are before March 1973" in warning for warning in report.warnings)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.datetimes(datetime(1975, 1, 1), datetime(2090, 1, 1)), min_size=1, max_size=4),
    st.sampled_from(["%Y-%m-%d %H:%M:%S", "%d.%m.%Y %H:%M:%S", "%d %B %Y %I:%M:%S %p", "%b %d, %Y %H:%M:%S"]),
)
def test_dates_are_those_of_python(tmp_path_factory, dates, form):
    _, found = times(tmp_path_factory.mktemp("dates"), *(date.strftime(form) for date in dates))
    assert found == [str(int(date.replace(tzinfo=UTC, microsecond=0).timestamp())) for date in dates]


# --- text files ------------------------------------------------------------------------------------------------------

HEAD = "user,item,time\n1,0010,1588888888\n"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("2,0010\n", "it has 2 columns, and the first line has 3"),
        ("2,0010,1588888889,\n", "it has 4 columns"),
        ('2,"0010,1588888889\n', "a quotation mark is not closed"),
        ('2,"00"10,1588888889\n', "expected after"),
        (",0010,1588888889\n", "user is '', expected an id"),
        ("2,nan,1588888889\n", "item is 'nan', expected an id"),
        ('2,"a\nb",1588888889\n', "expected an id"),
        ("2,0010,\n", "time is '', expected a time"),
        ("2,0010,soon\n", "time is 'soon', but the times are Unix times in seconds"),
        (b"2,caf\xe9,1588888889\n", "0xe9 is not valid UTF-8"),
    ],
)
def test_a_malformed_line_of_text_is_named_or_skipped(line, what, tmp_path):
    text = HEAD.encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"3,0010,1588888890\n"
    with pytest.raises(ConfigurationError, match=what) as error:
        made(tmp_path, text)
    assert error.value.where == f"{tmp_path / 'inter.txt'}, line 4"
    report, inter, _ = made(tmp_path, text, skip_malformed=True)
    assert report.counts["malformed lines of interactions"] == 1
    assert report.counts["lines of interactions"] == 3
    assert [row.split("\t")[0] for row in inter.splitlines()[1:]] == ["1", "3"]


def test_quotation_marks_of_tab_separated_files(tmp_path):
    """A line that is malformed as CSV is read without a meaning of its quotation marks."""
    items = 'item\ttitle\n0010\t"A" is for Alibi\nB 2\t"open\nC\tclosed"\nD\t"in, quotes"\n'
    report, _, item = made(tmp_path, table(INTERACTIONS), items)
    assert item.splitlines()[1:] == ['0010\t"""A"" is for Alibi"', 'B 2\t"""open"', 'C\tclosed"', "D\tin, quotes"]
    assert report.counts["lines of items with quotation marks as characters"] == 2


def test_encodings_and_line_ends(tmp_path):
    text = "user,item,time\n1,0010,1588888888\n2,é,1588888889\n"
    expected = ["1\t0010\t1588888888", "2\té\t1588888889"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert made(tmp_path, text.encode(encoding))[1].splitlines()[1:] == expected
    assert made(tmp_path, text.encode("cp1252"), encoding="cp1252")[1].splitlines()[1:] == expected
    mixed = text.replace("\n", "\r\n", 2)
    assert made(tmp_path, mixed)[1].splitlines()[1:] == expected
    with pytest.raises(ConfigurationError, match="carriage return alone"):
        made(tmp_path, text.replace("\n", "\r"))
    with pytest.raises(ConfigurationError, match="no encoding 'utf9'"):
        made(tmp_path, text, encoding="utf9")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the file is empty"),
        (b"user,item,time\n", "no interaction was read"),
        (b'[{"user": 1}]', "JSON array"),
        (b"PK\x03\x04xx", "ZIP archive"),
        (b"PAR1xxxx", "Parquet file cannot be read"),
    ],
)
def test_files_that_cannot_be_read(content, what, tmp_path):
    with pytest.raises(ConfigurationError, match=what) as error:
        made(tmp_path, content)
    assert str(tmp_path / "inter.txt") in error.value.where


# Letters, and what separates, quotes or ends values. `clean_text` gives list notation another meaning.
CHARACTERS = st.sampled_from("ab0é漢😀 \"',;|\t\n\r<>&\x85\u2028")
IDS = st.text(st.sampled_from("ab019é漢\"',;|:-."), min_size=1, max_size=6).filter(lambda text: text not in MISSING)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(IDS, st.text(CHARACTERS, max_size=12), min_size=1, max_size=4),
    st.sampled_from([",", ";", "jsonl", "parquet"]),
    st.data(),
)
def test_a_run_reads_the_interactions_and_texts_of_the_files(tmp_path_factory, titles, form, data):
    """The order of each user's items is that of the times, and ties keep the order of the lines."""
    folder = tmp_path_factory.mktemp("any")
    users = data.draw(st.lists(IDS, min_size=1, max_size=3, unique=True))
    moments = st.datetimes(datetime(1990, 1, 1), datetime(2030, 1, 1)).map(lambda moment: moment.replace(microsecond=0))
    row = st.tuples(st.sampled_from(users), st.sampled_from(sorted(titles)), moments)
    rows = data.draw(st.lists(row, min_size=1, max_size=12))
    rows += [(users[0], next(iter(titles)), datetime(2031, 1, n + 1)) for n in range(4)]  # one user has a training list
    records = [{"user": user, "item": item, "time": f"{moment:%d.%m.%Y %H:%M:%S}"} for user, item, moment in rows]
    names = [{"item": item, "title": title} for item, title in titles.items()]
    files = [write(folder / "r.x", records, form), write(folder / "i.x", names, form)]
    convert(*files, name="any", output=folder, user="user", item="item", time="time", title="title")
    read = Data(load_settings(config_dict={"preset": "smoke", "dataset": "any", "data_path": str(folder)}))
    expected: dict[str, list] = {}
    for user, item, moment in sorted(rows, key=lambda row: row[2]):
        expected.setdefault(user, []).append((item, moment.replace(tzinfo=UTC).timestamp()))
    found = {
        read.user_tokens[user]: [(read.item_tokens[i], t) for i, t in zip(items, read.user_times[user], strict=True)]
        for user, items in read.sequences.items()
    }
    assert found == expected
    given_items = {item for _, item, _ in rows}
    assert {item.token: item.title for item in read.catalog} == {
        item: "" if title.strip() in MISSING else clean_text(title)
        for item, title in titles.items()
        if item in given_items
    }


def test_recbole_downloads_toys_under_the_name_of_a_property_file():
    url = Path(find_spec("recbole").origin).parent / "properties" / "dataset" / "url.yaml"
    assert "amazon-toys-games" in read_yaml(url.read_text())
    keys = ("user_inter_num_interval", "item_inter_num_interval", "text_title", "text_categories", "text_brand")
    toys = [load_settings(config_dict={"preset": "smoke", "dataset": f"amazon-{n}"}) for n in ("toys", "toys-games")]
    beauty = load_settings(config_dict={"preset": "smoke", "dataset": "amazon-beauty"})
    assert all(each.get(key) == beauty.get(key) for each in toys for key in keys)
