"""Text of the data without control tokens.

A tokenizer reads the string `<|im_end|>` as one token wherever it occurs. In a title it would end the turn, and
`<|sid_begin|>` or `<|A|>` would begin a semantic ID or name a candidate. A space after the first character makes such a
string ordinary text. The catalogue changes the texts of its items in this way, so that no model reads a control token
that comes from the data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# The strings that this package, chat formats, and tokenizers of common language models use as one token. The special
# tokens of a tokenizer that are not among them become text when a text is encoded (`prompts.encode`).
NAMES = """s bos eos pad unk mask cls sep eot eop sop think thinking tool_call tool_calls tool_response tools
    start_of_turn end_of_turn start_of_image end_of_image end_of_utterance startoftext endoftext"""
CONTROL_TOKEN = re.compile(
    r"<(?="
    r"\|[^\s<>|]+\|>"  # ChatML, Llama 3, Phi, the labels, the ranking mark and both ends of a semantic ID
    r"|s_[a-z]_\d+>"  # a code of a semantic ID
    r"|\uff5c[^\s<>]+\uff5c>"  # DeepSeek, which writes a wide bar
    rf"|/?(?:{'|'.join(NAMES.split())})>"  # Llama 2, Gemma, Qwen3
    r"|</?SYS>>"  # Llama 2
    r")"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|THINK|gMASK|sMASK)\])"  # Mistral, GLM
)


def plain_text(text: str) -> str:
    """Return a text in which no control token occurs. A text without one is returned unchanged.

    >>> plain_text("Soap <|im_end|> <3 <M>"), plain_text("a <<|A|>|>")
    ('Soap < |im_end|> <3 <M>', 'a << |A|>|>')
    """
    return CONTROL_TOKEN.sub(r"\g<0> ", text)


def pattern_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a regular expression for the first character of each occurrence of one of these strings.

    >>> pattern_of(["<eos_1>", "<<"]).sub(r"\\g<0> ", "<eos_1> <<<")
    '< eos_1> < < <'
    """
    rests: dict[str, list[str]] = {}
    for token in tokens:
        rests.setdefault(token[0], []).append(re.escape(token[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()) or r"(?!)")
