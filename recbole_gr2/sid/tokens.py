"""The text form of semantic IDs, candidate labels and the ranking mark.

GR2 section 3 and OneRec-Think write an item as `<|sid_begin|><s_a_3><s_b_17>..<|sid_end|>`. Labels and the ranking
mark are ours: one token a candidate makes a ranking of K items K tokens long, whatever the tokenizer.
"""

from __future__ import annotations

import re
import string

from recbole_gr2.types import Sid

SID_BEGIN, SID_END = "<|sid_begin|>", "<|sid_end|>"
RANKING = "<|ranking|>"  # ends the reasoning; the K labels follow
CODE = re.compile(r"<s_[a-z]_\d+>")
SID = re.compile(f"{re.escape(SID_BEGIN)}.*?{re.escape(SID_END)}")
MAX_CANDIDATES = len(string.ascii_uppercase)


def sid_text(sid: Sid) -> str:
    """Text of one semantic ID.

    >>> sid_text((3, 17))
    '<|sid_begin|><s_a_3><s_b_17><|sid_end|>'
    """
    codes = "".join(f"<s_{string.ascii_lowercase[level]}_{code}>" for level, code in enumerate(sid))
    return f"{SID_BEGIN}{codes}{SID_END}"


def code_tokens(levels: int, codes: int) -> list[str]:
    """All L * C code tokens, level by level."""
    return [f"<s_{string.ascii_lowercase[level]}_{code}>" for level in range(levels) for code in range(codes)]


def is_code(token: str) -> bool:
    """Whether a token is a code of a semantic ID.

    >>> is_code("<s_b_17>"), is_code("<s>")
    (True, False)
    """
    return CODE.fullmatch(token) is not None


def label_tokens(count: int) -> list[str]:
    """The first `count` candidate labels.

    >>> label_tokens(3)
    ['<|A|>', '<|B|>', '<|C|>']
    """
    return [f"<|{letter}|>" for letter in string.ascii_uppercase[:count]]


def added_tokens(levels: int, codes: int, candidates: int) -> list[str]:
    """Every token this package adds to a language model's vocabulary, in a fixed order."""
    return [SID_BEGIN, SID_END, *code_tokens(levels, codes), RANKING, *label_tokens(candidates)]
