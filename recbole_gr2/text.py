"""Fields of an item file as readable text, whatever language, markup or list notation they come in."""

from __future__ import annotations

import ast
import html
import re
import unicodedata
import warnings

# Tags by name, so that "size <M>" stays; an unknown element is text.
NAMES = """a abbr address article b big blockquote body br center cite code dd div dl dt em embed font footer form
    h1 h2 h3 h4 h5 h6 head header hr html i iframe img input ins label li link main meta nav ol option p param pre s
    section small source span strike strong sub sup table tbody td tfoot th thead title tr tt u ul video wbr"""
TAG = re.compile(
    rf"<!--.*?-->|<(script|style)\b[^<>]*>.*?</\1\s*>|</?(?:{'|'.join(NAMES.split())})(?:[\s/][^<>]*)?>",
    re.IGNORECASE | re.DOTALL,
)
WORD = re.compile(r"u?'(?:[^'\\]|\\.)*'", re.DOTALL)  # one string; two are no list, but a text with quotation marks
SURROGATE = re.compile("[\ud800-\udfff]")
# Marks that show nothing: soft hyphen, zero-width space, direction marks, byte-order mark. The joiners of Persian, of
# Indic scripts and of emoji stay.
INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


def clean_text(text: str, separator: str = " > ") -> str:
    """One field as one line of text that any tokenizer can read; cleaning it again changes nothing.

    Entities are resolved however often they were escaped, tags and characters that show nothing are dropped, surrogate
    pairs joined. Of a list in Python notation that holds several lists, such as the category paths of Amazon's data,
    the longest is kept, the first of several: it says most about what the item is.

    >>> clean_text("'Beauty', 'Skin Care'"), clean_text("Nails &amp;amp;  <b>more</b>")
    ('Beauty > Skin Care', 'Nails & more')
    >>> clean_text("[['Beauty'], ['Beauty', 'Hair Care'], ['Beauty', 'Men']]")
    'Beauty > Hair Care'
    """
    before = None
    while text != before:  # what one step brings to light may be the next one's, e.g. a tag of entities
        before = text
        text = _visible(TAG.sub(" ", html.unescape(_joined(text, separator))))
    return text


def _visible(text: str) -> str:
    """Without control characters, lone surrogates and marks that show nothing; blanks are single."""
    if SURROGATE.search(text):  # Python 2 wrote an emoji as two: u'\\ud83d\\ude00'
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
    if not text.isprintable():
        text = INVISIBLE.sub("", text)
        text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join(text.split())


def _joined(text: str, separator: str) -> str:
    """A list or string in Python notation as its words; any other text as it is."""
    text = text.strip()
    if not text.startswith(("'", "[", "u'")) or not text.endswith(("'", "]")):
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's on escapes that it does not know
            parsed = ast.literal_eval(text)
        if isinstance(parsed, list | tuple):
            paths = _paths(parsed)
            return separator.join(max(paths, key=len))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text  # it happens to start and end like a list
    return parsed if isinstance(parsed, str) and WORD.fullmatch(text) else text


def _paths(values: list | tuple) -> list[list[str]]:
    """The innermost lists, of strings and numbers; what stands beside lists is a list, too."""
    words = [" ".join(str(v).split()) for v in values if v is not None and not isinstance(v, list | tuple)]
    inner = [path for v in values if isinstance(v, list | tuple) for path in _paths(v)]
    return [[word for word in words if word], *inner]
