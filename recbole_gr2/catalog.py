"""The catalogue: the mapping between internal item ids, tokens of the data files, texts and semantic IDs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import overload

import numpy as np

from recbole_gr2.plain_text import plain_text
from recbole_gr2.types import Item, Sid


class Catalog(Sequence[Item]):
    """All items of a data set, in the order of their internal ids.

    Internal ids start at 1, because 0 is RecBole's padding. `catalog.item(item_id)` looks an item up by its id. As a
    sequence the catalogue starts at position 0: `catalog[0]` is the item with id 1.

    A control token of a language model in a text, such as `<|im_end|>`, becomes ordinary text, see `plain_text`. All
    models, teachers and prompts get the texts from here.

    Args:
        items: the items with the ids 1, 2, ..., N.

    Raises:
        ValueError: the ids are not 1 to N in order.

    >>> catalog = Catalog([Item(item_id=1, token="B001", title="Soap"), Item(item_id=2, token="B002", title="Comb")])
    >>> catalog.item(2).title, catalog.ids(["B002", "B001"]), catalog.tokens([1])
    ('Comb', (2, 1), ('B001',))
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = tuple(_with_plain_texts(item) for item in items)
        if [item.item_id for item in self._items] != list(range(1, len(self._items) + 1)):
            raise ValueError("the internal ids of a catalogue have to be 1 to N in order")

    @overload
    def __getitem__(self, position: int) -> Item: ...

    @overload
    def __getitem__(self, position: slice) -> tuple[Item, ...]: ...

    def __getitem__(self, position: int | slice) -> Item | tuple[Item, ...]:
        """The item at a position, from 0, or the items of a slice."""
        return self._items[position]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def item(self, item_id: int) -> Item:
        """The item with this internal id.

        Raises:
            KeyError: there is no such id. 0 is padding and no item.
        """
        if not 1 <= item_id <= len(self._items):
            raise KeyError(f"no item has the internal id {item_id}; the ids are 1 to {len(self._items)}")
        return self._items[item_id - 1]

    @cached_property
    def id_of(self) -> Mapping[str, int]:
        """Internal id of each token."""
        return {item.token: item.item_id for item in self._items}

    def ids(self, tokens: Iterable[str]) -> tuple[int, ...]:
        """Internal ids of tokens.

        Raises:
            KeyError: the catalogue does not contain a token.
        """
        return tuple(self.id_of[token] for token in tokens)

    def tokens(self, item_ids: Iterable[int]) -> tuple[str, ...]:
        """Tokens of internal ids.

        Raises:
            KeyError: there is no such id.
        """
        return tuple(self.item(item_id).token for item_id in item_ids)

    def with_sids(self, sids: Mapping[str, Sid]) -> Catalog:
        """A copy whose items have these semantic IDs, given by token.

        Raises:
            KeyError: an item has none.
        """
        return Catalog(replace(item, sid=tuple(sids[item.token])) for item in self._items)

    @cached_property
    def sids(self) -> np.ndarray:
        """Codes of the semantic IDs, (N, L) int64: row n belongs to the item with the id n + 1."""
        return np.array([item.sid for item in self._items], dtype=np.int64)


def _with_plain_texts(item: Item) -> Item:
    """Return the item without control tokens in its texts: the same object if there are none."""
    plain = replace(
        item,
        title=plain_text(item.title),
        categories=plain_text(item.categories),
        brand=plain_text(item.brand),
        description=plain_text(item.description),
    )
    return item if plain == item else plain
