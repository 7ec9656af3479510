"""Read a ranking from a completion."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.llm.grammar import Grammar
from recbole_gr2.ranking import complete
from recbole_gr2.types import Answer, Request


def read_answer(
    request: Request,
    completion_ids: Sequence[int],
    label_items: Sequence[int],
    grammar: Grammar,
    tokenizer: PreTrainedTokenizerBase,
) -> Answer:
    """Return the answer that a completion contains. Every completion gives a permutation of the candidates.

    The ranking is the order of the first mentions of labels after the first ranking mark. Candidates without a mention
    follow in base order. Tokens after eos are ignored.

    Args:
        request: The request with its candidates.
        completion_ids: Token ids of the completion.
        label_items: Item id of each label in the prompt, a permutation of `request.items`.
        grammar: The grammar of completions.
        tokenizer: Decodes the reasoning.

    Returns:
        An answer. Its status is the first that applies of: `unreadable` (no label), `truncated` (the reasoning was
        stopped by its limit), `repaired` (a missing, repeated or foreign label), `ok`. `foreign` counts tokens after
        the mark that are not labels of the request.

    Raises:
        ConfigurationError: `label_items` are not the candidates of the request.
    """
    if sorted(label_items) != sorted(request.items):
        raise ConfigurationError(
            "the labels of the prompt do not stand for the candidates of the request",
            where=f"request {request.request_id}",
            why="the answer would be read as a ranking of other items",
            do="pass the item ids in the order in which the prompt labels them",
        )
    ids = list(completion_ids)
    length = ids.index(grammar.eos_id) + 1 if grammar.eos_id in ids else len(ids)
    text = [token for token in ids[:length] if token != grammar.eos_id]
    mark = text.index(grammar.ranking_id) if grammar.ranking_id in text else len(text)
    item_of = dict(zip(grammar.label_ids, label_items, strict=False))  # labels beyond K stand for no item
    tokens = text[mark + 1 :]
    mentioned = [item_of[token] for token in tokens if token in item_of]
    missing = len(label_items) - len(set(mentioned))
    repeated = len(mentioned) - len(set(mentioned))
    foreign = len(tokens) - len(mentioned)
    if not mentioned:
        status = "unreadable"
    elif grammar.was_truncated(text):
        status = "truncated"
    else:
        status = "repaired" if missing or repeated or foreign else "ok"
    # Labels of cited candidates have no meaning without their prompt.
    reasoning = [token for token in text[:mark] if token not in grammar.label_ids]
    return Answer(
        request_id=request.request_id,
        ranking=complete(mentioned, request.items),
        status=status,
        reasoning=str(tokenizer.decode(reasoning, skip_special_tokens=True)).strip(),
        missing=missing,
        repeated=repeated,
        foreign=foreign,
        output_tokens=length,
    )
