"""Item texts: a field becomes one readable line, and cleaning the line again does not change it."""

import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recbole_gr2.bridge.data import read_item_texts
from recbole_gr2.bridge.item_text import clean_text

PATHS = "[['Beauty', 'Hair'], ['Beauty', 'Men', 'Shaving'], ['Grocery', 'Food', 'Tea']]"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        # lists in Python notation
        ("['Beauty', 'Skin Care']", "Beauty > Skin Care"),
        ("[['Beauty', 'Skin Care']]", "Beauty > Skin Care"),
        ("'Beauty', \"Men's\", 'Skin Care'", "Beauty > Men's > Skin Care"),
        (PATHS, "Beauty > Men > Shaving"),  # The first of the two longest lists.
        ("[['Beauty'], 'Hair', 'Men']", "Hair > Men"),
        ("[[['a', 'b']], []]", "a > b"),
        ("[u'Beaut\\xe9', u'Men']", "Beauté > Men"),
        ("[&#39;Beauty&#39;, &#39;Hair&#39;]", "Beauty > Hair"),
        ("['Bath &amp;amp; Body', ' ', '', None]", "Bath & Body"),
        ("[3, 7]", "3 > 7"),
        ("[]", ""),
        ("[[]]", ""),
        ("'one'", "one"),
        ("u'one'", "one"),
        # texts that only look like a list
        ("'Salem's Lot'", "'Salem's Lot'"),
        ("'Super' 'Deluxe'", "'Super' 'Deluxe'"),
        ("[not a list]", "[not a list]"),
        ("[{'a': 1}", "[{'a': 1}"),
        ("use 'this'", "use 'this'"),
        # entities and tags
        ("A &amp;amp;amp; B &lt;3", "A & B <3"),
        ("L&#39;Or&eacute;al&nbsp;Paris", "L'Oréal Paris"),
        ('<p class="x">one<br/>two</P>', "one two"),
        ("&lt;b&gt;bold&lt;/b&gt; text", "bold text"),
        ("<!-- a > b --><style>p {x}</style>soap", "soap"),
        ("size <M>, x < y > z, <3", "size <M>, x < y > z, <3"),
        # characters
        ("a\x00b\tc\u2028d\x7fe\u00a0f", "a b c d e f"),
        ("so\u00adft\u200b wa\ufeffx \u202edrow\u202c", "soft wax drow"),
        ("u'\\ud83d\\udc84 gloss'", "💄 gloss"),
        ("['\\ud83d']", ""),
        ("\ud83d\udc84\udc84", "💄"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("資生堂 アネッサ", "資生堂 アネッサ"),
    ],
)
def test_clean_text(raw, clean):
    assert clean_text(raw) == clean


# Random combinations of these pieces are cleaned. Each piece has a meaning for one of the steps.
PIECES = [
    "'",
    '"',
    "[",
    "]",
    ",",
    " ",
    "u'",
    "\\",
    "\\x27",
    "\\ud83d",
    "\ud83d",
    "\udc84",
    "&",
    "amp;",
    "&lt;",
    "&gt;",
    "&#39;",
    "&#91;",
    "&quot;",
    "#0;",
    "<",
    ">",
    "b",
    "/",
    "<p>",
    "</script>",
    "<script>",
    "<!--",
    "-->",
    "\x00",
    "\n",
    "\u200b",
    "\u2028",
    "é",
    "美",
    "💄",
    "1",
    "0x",
    "e9",
    "None",
    "(",
    ")",
    "{",
    ":",
]
fields = st.text() | st.text(st.characters()) | st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
nested = st.recursive(st.text(max_size=6), lambda inner: st.lists(inner, max_size=4), max_leaves=9)


@settings(max_examples=150, deadline=None)
@given(fields | nested.map(repr))
@example("&#39;[&amp;#39;a&amp;#39;]&#39;")
@example("[" * 3000 + "]" * 3000)
@example("[0x" + "f" * 9000 + "]")
@example("[9" + "9" * 9000 + "]")
def test_any_field_gives_one_clean_line(raw):
    clean = clean_text(raw)
    assert clean.encode("utf-8").decode("utf-8") == clean
    assert clean == " ".join(clean.split()) and len(clean.splitlines()) <= 1
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in clean)
    assert clean_text(clean) == clean


letters = st.text("abcdefghij ÀÉ美日本ひ", min_size=1, max_size=8).map(lambda t: " ".join(t.split())).filter(bool)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(letters, max_size=4), min_size=1, max_size=4))
def test_the_longest_of_several_paths_is_kept(paths):
    assert clean_text(repr(paths)) == " > ".join(max(paths, key=len))


@settings(max_examples=60, deadline=None)
@given(letters)
def test_plain_text_is_unchanged(text):
    assert clean_text(text) == text


@pytest.mark.parametrize("piece", ["&amp;", "&", "<", "<!--", "<script>", "[", "'", "\\", "a ", "\u200b", "<b "])
def test_ten_thousand_characters_are_cleaned_fast(piece):
    started = time.perf_counter()
    clean_text("&" + piece * (10_000 // len(piece)))
    assert time.perf_counter() - started < 5  # Linear and quadratic run times are far below this limit.


# --- item files ------------------------------------------------------------------------------------------------------

FIELDS = {"dataset": "toy", "text_title": "title", "text_categories": None, "text_brand": None, "text_description": "d"}


def read(folder, content: bytes, **options) -> dict:
    (folder / "toy.item").write_bytes(content)
    return read_item_texts(folder / "toy.item", FIELDS, **options)


def test_the_beginning_of_a_description_is_kept(tmp_path):
    long, paragraphs = "wort " * 2000, repr(["first", "second &amp; third"] + ["x" * 100] * 100)
    markup = "<p class='a'>soft</p>" * 500
    lines = [
        "item_id:token\ttitle:token_seq\td:token_seq",
        f"a\tA\t{long}",
        f"b\tB\t{paragraphs}",
        "c\tC\t",
        f"e\tE\t{markup}",
    ]
    texts = {token: text["description"] for token, text in read(tmp_path, "\n".join(lines).encode()).items()}
    assert texts["a"] == long[:999].rstrip() and texts["c"] == ""
    assert texts["b"].startswith("first second & third xxx") and len(texts["b"]) == 1000
    assert texts["e"].startswith("soft soft soft") and 900 < len(texts["e"]) <= 1000


def test_the_file_options_of_recbole_are_used(tmp_path):
    content = "title,item_id,d\nBürste,7,ü\n".encode()
    texts = read(tmp_path, content, item_field="item_id", separator=",")
    assert texts == {"7": {"title": "Bürste", "categories": "", "brand": "", "description": "ü"}}


@settings(max_examples=60, deadline=None)
@given(st.lists(fields, min_size=1, max_size=4))
def test_no_field_breaks_a_file(tmp_path_factory, values):
    """A field cannot contain tabs, line ends, NUL, U+001F and lone surrogates. They are removed first."""
    rows = [
        "".join(c for c in value if c not in "\t\r\n\x00\x1f" and not "\ud800" <= c <= "\udfff") for value in values
    ]
    content = "\n".join(["item_id\ttitle\td", *(f"i{n}\t{row}\t{row}" for n, row in enumerate(rows))])
    texts = read(tmp_path_factory.mktemp("file"), content.encode())
    assert list(texts) == [f"i{n}" for n in range(len(rows))]
    for text in texts.values():
        assert " ".join(text["title"].encode().decode().split()) == text["title"]
