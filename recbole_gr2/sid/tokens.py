"""Text form of semantic IDs, labels of candidates, and the ranking marker.

GR2 (section 3) and OneRec-Think write an item as `<|sid_begin|><s_a_3><s_b_17>..<|sid_end|>`. The labels and the
ranking marker are our own. A label is one token, so a ranking of K items has K tokens with every tokenizer.
"""

from __future__ import annotations

import re
import string

from recbole_gr2.types import Sid

SID_BEGIN, SID_END = "<|sid_begin|>", "<|sid_end|>"
RANKING = "<|ranking|>"  # The end of the reasoning. The K labels follow it.
CODE = re.compile(r"<s_[a-z]_\d+>")
SID = re.compile(f"{re.escape(SID_BEGIN)}.*?{re.escape(SID_END)}")
SID_TOKEN = re.compile(f"{re.escape(SID_BEGIN)}|{re.escape(SID_END)}|{CODE.pattern}")
ADDED = re.compile(rf"{SID_TOKEN.pattern}|{re.escape(RANKING)}|<\|[A-Z]\|>")
MAX_CANDIDATES = len(string.ascii_uppercase)


def sid_text(sid: Sid) -> str:
    """Return the text of a semantic ID.

    >>> sid_text((3, 17))
    '<|sid_begin|><s_a_3><s_b_17><|sid_end|>'
    """
    codes = "".join(f"<s_{string.ascii_lowercase[level]}_{code}>" for level, code in enumerate(sid))
    return f"{SID_BEGIN}{codes}{SID_END}"


def code_tokens(levels: int, codes: int) -> list[str]:
    """Return all L * C code tokens, level by level.

    >>> code_tokens(levels=2, codes=2)
    ['<s_a_0>', '<s_a_1>', '<s_b_0>', '<s_b_1>']
    """
    return [f"<s_{string.ascii_lowercase[level]}_{code}>" for level in range(levels) for code in range(codes)]


def is_code(token: str) -> bool:
    """Return whether a token is a code of a semantic ID.

    >>> is_code("<s_b_17>"), is_code("<s>")
    (True, False)
    """
    return CODE.fullmatch(token) is not None


def level_of(code: str) -> str:
    """Return the letter of a code token's level.

    >>> level_of("<s_b_17>")
    'b'
    """
    return code.split("_")[1]


def is_added(token: str) -> bool:
    """Return whether a token is one of `added_tokens`.

    >>> is_added("<|sid_end|>"), is_added("<|B|>"), is_added("<|im_end|>")
    (True, True, False)
    """
    return ADDED.fullmatch(token) is not None


def label_tokens(count: int) -> list[str]:
    """Return the labels of `count` candidates, at most `MAX_CANDIDATES`.

    >>> label_tokens(3)
    ['<|A|>', '<|B|>', '<|C|>']
    """
    return [f"<|{letter}|>" for letter in string.ascii_uppercase[:count]]


def added_tokens(levels: int, codes: int, candidates: int) -> list[str]:
    """Return all tokens that this package adds to the vocabulary of a language model, in a fixed order.

    Args:
        levels: L, codes of a semantic ID.
        codes: C, size of the codebook of each level.
        candidates: K, number of labels.
    """
    return [SID_BEGIN, SID_END, *code_tokens(levels, codes), RANKING, *label_tokens(candidates)]
