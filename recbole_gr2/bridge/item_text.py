"""Cleaning of text fields of an item file: markup, entities, invisible characters and list notation."""

from __future__ import annotations

import ast
import html
import re
import unicodedata
import warnings

# Only tags with these names are removed. An unknown element such as the one in "size <M>" is text.
NAMES = """a abbr address article b big blockquote body br center cite code dd div dl dt em embed font footer form
    h1 h2 h3 h4 h5 h6 head header hr html i iframe img input ins label li link main meta nav ol option p param pre s
    section small source span strike strong sub sup table tbody td tfoot th thead title tr tt u ul video wbr"""
TAG = re.compile(
    rf"<!--.*?-->|<(script|style)\b[^<>]*>.*?</\1\s*>|</?(?:{'|'.join(NAMES.split())})(?:[\s/][^<>]*)?>",
    re.IGNORECASE | re.DOTALL,
)
# A single Python string. Two strings without a comma are a text with quotation marks.
STRING = re.compile(r"u?'(?:[^'\\]|\\.)*'", re.DOTALL)
SURROGATE = re.compile("[\ud800-\udfff]")
# Invisible characters: soft hyphen, zero-width space, direction marks, byte-order mark. The joiners of Persian, of
# Indic scripts and of emoji are kept.
INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


def clean_text(text: str, separator: str = " > ") -> str:
    """Return a field as one line of readable text. Cleaning the result again does not change it.

    Entities are resolved, also if they were escaped several times. Tags and invisible characters are removed, and
    surrogate pairs are joined. A list in Python notation becomes its joined elements. If it contains several lists,
    such as the category paths of the Amazon data, only the first of the longest lists is kept, because it is the most
    specific one.

    Args:
        text: the field as it is in the file.
        separator: text between the elements of a list.

    >>> clean_text("'Beauty', 'Skin Care'"), clean_text("Nails &amp;amp;  <b>more</b>")
    ('Beauty > Skin Care', 'Nails & more')
    >>> clean_text("[['Beauty'], ['Beauty', 'Hair Care'], ['Beauty', 'Men']]")
    'Beauty > Hair Care'
    """
    before = None
    while text != before:  # A step can reveal input of another one, such as a tag that was written with entities.
        before = text
        text = _visible(TAG.sub(" ", html.unescape(_joined(text, separator))))
    return text


def _visible(text: str) -> str:
    """Remove control characters, lone surrogates and invisible characters, and merge white space."""
    if SURROGATE.search(text):  # Python 2 wrote an emoji as two surrogates: u'\\ud83d\\ude00'
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
    if not text.isprintable():
        text = INVISIBLE.sub("", text)
        text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join(text.split())


def _joined(text: str, separator: str) -> str:
    """Return the joined elements of a list, or the content of a string, in Python notation. Other text is unchanged."""
    text = text.strip()
    if not text.startswith(("'", "[", "u'")) or not text.endswith(("'", "]")):
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns about unknown escape sequences.
            parsed = ast.literal_eval(text)
        if isinstance(parsed, list | tuple):
            longest: list[str] = max(_paths(parsed), key=len)
            return separator.join(longest)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text  # The text is no Python expression.
    return parsed if isinstance(parsed, str) and STRING.fullmatch(text) else text


def _paths(values: list | tuple) -> list[list[str]]:
    """Return the innermost lists as lists of words. Elements beside inner lists form a list of their own."""
    words = [" ".join(str(v).split()) for v in values if v is not None and not isinstance(v, list | tuple)]
    inner = [path for v in values if isinstance(v, list | tuple) for path in _paths(v)]
    return [[word for word in words if word], *inner]
