"""Answers in words: examples for the report, and the share of true statements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from recbole_gr2.catalog import Catalog
from recbole_gr2.console import render_table
from recbole_gr2.prompts import kind, recent, shorten
from recbole_gr2.sid.tokens import SID, sid_text
from recbole_gr2.teachers import true_statements
from recbole_gr2.types import Answer, Request

EXAMPLES = 2  # number of examples of each kind


def truthfulness(
    requests: Sequence[Request], answers: Mapping[str, Answer], catalog: Catalog, history: int
) -> dict[str, float]:
    """Return the share of answers whose statements are true.

    Only the sentences of the rules teacher can be checked. A text of another form has no true statement.

    Args:
        requests: at least one request.
        answers: answers by request id.
        catalog: the catalogue with semantic IDs.
        history: number of most recent history items in the prompts.

    Returns:
        The share for each kind of statement, and for `all` statements of an answer.
    """
    checked = [true_statements(answers[r.request_id].reasoning, r, catalog, history) for r in requests]
    return {
        **{name: float(np.mean([each[name] for each in checked])) for name in checked[0]},
        "all": float(np.mean([all(each.values()) for each in checked])),
    }


def examples(
    requests: Sequence[Request], method: str, answers: Mapping[str, Answer], catalog: Catalog, history: int
) -> str:
    """Return the requests whose target moved up most, and those whose target moved down most, as Markdown.

    Args:
        requests: requests that contain their target.
        method: name of the method, for the heading of its column.
        answers: its answers by request id.
        catalog: the catalogue with semantic IDs.
        history: number of most recent history items to print.
    """
    moved = {r.request_id: _base_rank(r) - answers[r.request_id].ranking.index(r.target) - 1 for r in requests}
    ordered = sorted(requests, key=lambda r: -moved[r.request_id])
    chosen = [r for r in ordered[:EXAMPLES] if moved[r.request_id] > 0]
    chosen += [r for r in ordered[-EXAMPLES:] if moved[r.request_id] < 0]

    def words(item_id: int) -> str:
        item = catalog.item(item_id)
        return shorten(item.title, 60) + (f" ({kind(item)})" if kind(item) else "")

    parts = []
    for request in chosen:
        answer = answers[request.request_id]
        table = [
            [
                str(rank),
                str(answer.ranking.index(item) + 1),
                "target" if item == request.target else "",
                words(item),
            ]
            for rank, item in enumerate(request.items, start=1)
        ]
        reasoning = with_titles(answer.reasoning, catalog)
        parts.append(
            f"{request.request_id}: the target moved from rank {request.target_rank} to "
            f"{answer.ranking.index(request.target) + 1}. History:\n\n"
            + "".join(f"- {words(item)}\n" for item in recent(request.history, max(history, 1)))
            + f"\n```\n{render_table(['base', method, 'target', 'candidate'], table)}\n```\n\n> {reasoning}\n"
        )
    return "\n".join(parts)


def with_titles(text: str, catalog: Catalog) -> str:
    """Return a reasoning text with the titles of items, in brackets, in the place of their semantic IDs.

    Args:
        text: the reasoning.
        catalog: the catalogue with semantic IDs. Of several items with one semantic ID the last one gives the title.
    """
    titles = _titles(catalog)
    return SID.sub(lambda match: titles.get(match[0], match[0]), text).strip()


@lru_cache(maxsize=2)
def _titles(catalog: Catalog) -> dict[str, str]:
    """The title of each item in brackets, by the text of its semantic ID."""
    return {sid_text(item.sid): f"[{shorten(item.title, 60)}]" for item in catalog}


def _base_rank(request: Request) -> int:
    assert request.target_rank is not None, "the request contains its target"
    return request.target_rank
