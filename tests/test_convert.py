"""Raw Amazon files of each release become a data set that this package reads, or one error that names the place."""

import csv
import gzip
import json
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_gr2.bridge.atomic import AtomicFile
from recbole_gr2.bridge.data import Data, read_item_texts
from recbole_gr2.bridge.item_text import clean_text
from recbole_gr2.config import load_settings
from recbole_gr2.config.values import read_yaml
from recbole_gr2.convert import NEW, OLD, convert, main, one_line
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.quick_start import parse

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
        "reviews": reviews,
        "metadata": put(folder / f"meta.json{form[-3:] if form.endswith('.gz') else ''}", lines),
    }


@pytest.mark.parametrize("form", ["reviews.jsonl", "reviews.json.gz", "ratings.csv", "ratings.csv.gz"])
@pytest.mark.parametrize("release", ["2014", "2018", "2023"])
def test_each_release_gives_the_expected_files(release, form, tmp_path):
    report = convert("toy", **files_of(tmp_path, release, form), output=tmp_path / "out")
    folder = tmp_path / "out" / "toy"
    assert sorted(file.name for file in folder.iterdir()) == ["toy.inter", "toy.item", "toy.yaml"]
    assert (folder / "toy.inter").read_text() == (NEW_INTER if release == "2023" else OLD_INTER)
    assert (folder / "toy.item").read_bytes().decode() == ITEM + ITEMS[release]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["toy"]
    counts = report.counts
    assert report.release == release
    assert (counts["lines of reviews"], counts["interactions"], counts["users"], counts["items"]) == (5, 5, 2, 3)
    assert (counts["repeated interactions"], counts["items without metadata"]) == (1, 1)
    assert counts["malformed lines of reviews"] == counts["malformed lines of metadata"] == 0
    assert counts["repeated lines of metadata"] == (release == "2014")
    assert counts["items with metadata and without title"] == (release != "2018")
    assert counts["titles with HTML"] == (2 if release == "2018" else 0)


@pytest.mark.parametrize("release", ["2014", "2018", "2023"])
def test_texts_are_read_back_as_those_of_the_raw_file(release, tmp_path):
    report = convert("toy", **files_of(tmp_path, release), output=tmp_path)
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
@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from('"\t\n\r ,ab<&;\x00\x1f\x85\u2028\ufeff\ud83dé|')), min_size=3, max_size=3))
def test_any_text_is_read_back_exactly(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("any")
    names = ("title", "store", "description")
    meta = [{"parent_asin": "B1", **dict(zip(names, texts, strict=True))}, {"parent_asin": "B2", "title": texts[2]}]
    files = {
        "reviews": put(folder / "r.jsonl", json_lines(new())),
        "metadata": put(folder / "m.json", json_lines(meta)),
    }
    report = convert("toy", **files, output=folder)
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
def test_the_printed_command_runs_the_data_set(release, tmp_path, capsys):
    """Six users with five items each; an item with one interaction is dropped by the settings of the file."""
    times = [(f"U{u}", f"I{n}", 4.0, START + 60 * n) for u in range(6) for n in (0, 2, 1, 4, 3)]
    times += [("U1", "I9", 1.0, START)]
    user, item, rating, time = OLD if release == "2018" else NEW
    unit = 1 if release == "2018" else 1000
    reviews = [{user: u, item: i, rating: r, time: unit * t, "verified": True} for u, i, r, t in times]
    meta = [{item: f"I{n}", "title": f'"Thing" {n}', "category": ["House"], "categories": ["House"]} for n in range(6)]
    arguments = ["toy", "--reviews", str(put(tmp_path / "r.json.gz", json_lines(reviews)))]
    arguments += [
        "--metadata",
        str(put(tmp_path / "m.json.gz", json_lines(meta))),
        "--output",
        str(tmp_path / "my data"),
    ]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "31 interactions" in err
    options, command_line = parse(shlex.split(out)[1:])
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
        (b'{"reviewerID": "\xff"}\n', "utf-8"),
        (json.dumps({"asin": "B1"}), "the field 'reviewerID' is missing"),
        (review(asin=None), "asin is None"),
        (review(asin=" "), "asin is ' '"),
        (review(reviewerID="a\tb"), "reviewerID is"),
        (review(reviewerID="NA"), "reviewerID is 'NA'"),
        (review(overall="good"), "overall is 'good'"),
        (review(overall=float("nan")), "overall is nan"),
        (review(unixReviewTime=None), "unixReviewTime is None"),
        (review(unixReviewTime=START * 1000), "unixReviewTime is no time in seconds"),
    ],
)
def test_a_malformed_line_is_named_or_skipped(line, message, tmp_path):
    files = files_of(tmp_path, "2018")
    change(files["reviews"], 2, line)
    with pytest.raises(ConfigurationError, match=message) as error:
        convert("toy", **files, output=tmp_path)
    assert error.value.where == f"{files['reviews']}, line 2"
    assert not (tmp_path / "toy").exists() and not list(tmp_path.glob(".toy*"))
    report = convert("toy", **files, output=tmp_path, skip_malformed=True)
    assert report.counts["malformed lines of reviews"] == 1
    assert (tmp_path / "toy" / "toy.inter").read_text() == OLD_INTER.replace(f"A2\tB1\t4.5\t{START + 1}\n", "")


@pytest.mark.parametrize("line", ["B1,A2,4.5", "B1,A2,x,1", 'B1,"A2,4.5,1'])
def test_a_malformed_rating_is_named_or_skipped(line, tmp_path):
    files = files_of(tmp_path, "2018", "ratings.csv")
    change(files["reviews"], 2, line)
    with pytest.raises(ConfigurationError) as error:
        convert("toy", **files, output=tmp_path)
    assert error.value.where == f"{files['reviews']}, line 2"
    assert convert("toy", **files, output=tmp_path, skip_malformed=True).counts["interactions"] == 4


def test_a_malformed_line_of_the_metadata_is_named_or_skipped(tmp_path):
    files = files_of(tmp_path, "2014")
    change(files["metadata"], 3, "{'title': open('x')}")
    with pytest.raises(ConfigurationError) as error:
        convert("toy", **files, output=tmp_path)
    assert error.value.where == f"{files['metadata']}, line 3"
    report = convert("toy", **files, output=tmp_path, skip_malformed=True)
    assert report.counts["malformed lines of metadata"] == 1
    assert (report.folder / "toy.item").read_text() == ITEM + ITEMS["2014"]


def test_empty_lines_are_no_lines(tmp_path):
    files = files_of(tmp_path, "2018")
    change(files["reviews"], 2, files["reviews"].read_bytes().splitlines(True)[1] + b"\n  \r\n")
    report = convert("toy", **files, output=tmp_path)
    assert report.counts["lines of reviews"] == 5 and report.counts["malformed lines of reviews"] == 0


@pytest.mark.parametrize("form", ["reviews.jsonl", "ratings.csv"])
@pytest.mark.parametrize(("right", "wrong"), [("2014", "2018"), ("2018", "2023"), ("2023", "2014")])
def test_another_release_is_refused(right, wrong, form, tmp_path):
    files = files_of(tmp_path, right, form)
    with pytest.raises(ConfigurationError, match=f"and not of {wrong}"):
        convert("toy", **files, output=tmp_path, release=wrong)
    (tmp_path / "other").mkdir()
    mixed = {**files, "metadata": files_of(tmp_path / "other", wrong)["metadata"]}
    with pytest.raises(ConfigurationError, match=r"and not of|none of the 2 items"):
        convert("toy", **mixed, output=tmp_path)
    assert convert("toy", **files, output=tmp_path, release=right).release == right


def test_files_without_the_fields_of_a_release_are_refused(tmp_path):
    files = files_of(tmp_path, "2018")
    plain = put(tmp_path / "plain.json", '{"user": 1}\n')
    with pytest.raises(ConfigurationError, match="no single release"):
        convert("toy", reviews=plain, metadata=files["metadata"], output=tmp_path)
    with pytest.raises(ConfigurationError, match="no single release"):
        convert("toy", reviews=files["reviews"], metadata=put(plain, ""), output=tmp_path)
    undecided = put(tmp_path / "undecided.json", '{"asin": "B1"}\n')
    ratings = files_of(tmp_path, "2018", "ratings.csv")["reviews"]
    with pytest.raises(ConfigurationError, match="fit 2014 and 2018"):
        convert("toy", reviews=ratings, metadata=undecided, output=tmp_path)
    assert convert("toy", reviews=ratings, metadata=undecided, output=tmp_path, release="2018").counts["users"] == 2
    with pytest.raises(ConfigurationError, match="none of the 2 items"):  # Its ratings have the user first.
        convert("toy2", reviews=ratings, metadata=undecided, output=tmp_path, release="2014")


def test_metadata_of_another_category_are_refused(tmp_path):
    files = files_of(tmp_path, "2018")
    put(files["metadata"], json_lines([{"asin": "C1", "category": ["Toys"]}]))
    with pytest.raises(ConfigurationError, match="none of the 3 items") as error:
        convert("toy", **files, output=tmp_path)
    assert error.value.where == str(files["metadata"]) and not (tmp_path / "toy").exists()


@pytest.mark.parametrize("kind", ["reviews", "metadata"])
def test_a_missing_or_damaged_file_is_named(kind, tmp_path):
    files = files_of(tmp_path, "2018", "reviews.json.gz")
    with pytest.raises(MissingFileError) as error:
        convert("toy", **{**files, kind: tmp_path / "absent.json.gz"}, output=tmp_path)
    assert error.value.where == str(tmp_path / "absent.json.gz")
    packed = files[kind].read_bytes()
    for damaged in (packed[:-12], b"plain" + packed):
        with pytest.raises(ConfigurationError, match="cannot be unpacked") as damage:
            convert("toy", **{**files, kind: put(tmp_path / "damaged.gz", damaged)}, output=tmp_path)
        assert damage.value.where == str(tmp_path / "damaged.gz")


def test_an_existing_folder_is_replaced_only_on_request(tmp_path):
    files = files_of(tmp_path, "2018")
    (tmp_path / "toy").mkdir()
    note, inter = put(tmp_path / "toy" / "note.txt", "mine"), put(tmp_path / "toy" / "toy.inter", "old")
    with pytest.raises(ConfigurationError, match="exists") as error:
        convert("toy", **files, output=tmp_path)
    assert error.value.where == str(tmp_path / "toy") and inter.read_text() == "old"
    convert("toy", **files, output=tmp_path, overwrite=True)
    assert inter.read_text() == OLD_INTER and note.read_text() == "mine"


def test_the_command_line_returns_the_exit_code_of_an_error(tmp_path, capsys):
    files = files_of(tmp_path, "2018")
    given = ["--reviews", str(files["reviews"]), "--metadata", str(files["metadata"]), "--output", str(tmp_path)]
    assert main(["../toy", *given]) == 2
    assert main(["toy", *given, "--reviews", "absent.json"]) == 4
    put(tmp_path / "file", "")
    assert main(["toy", *given, "--output", str(tmp_path / "file")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 3 and "Traceback" not in err


def test_recbole_downloads_toys_under_the_name_of_a_property_file():
    url = Path(find_spec("recbole").origin).parent / "properties" / "dataset" / "url.yaml"
    assert "amazon-toys-games" in read_yaml(url.read_text())
    keys = ("user_inter_num_interval", "item_inter_num_interval", "text_title", "text_categories", "text_brand")
    toys = [load_settings(config_dict={"preset": "smoke", "dataset": f"amazon-{n}"}) for n in ("toys", "toys-games")]
    beauty = load_settings(config_dict={"preset": "smoke", "dataset": "amazon-beauty"})
    assert all(each.get(key) == beauty.get(key) for each in toys for key in keys)
