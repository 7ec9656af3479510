"""Texts of mid-training: four tasks of next-token prediction (GR2, section 3).

`sequential` is a history as semantic IDs. `persona` is a history as semantic IDs with the texts of the items. `caption`
is one item's semantic ID and text. `general` is plain English, so that the language ability is kept.

A text is a list of pieces. The first piece is repeated where a long text is split, and the other pieces stay whole.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.llm.train import Example
from recbole_gr2.plain_text import plain_text
from recbole_gr2.prompts import SEQUENTIAL, TEXT, PromptMaker, encode, kind, templates_for
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.tokens import sid_text
from recbole_gr2.teachers import phrases
from recbole_gr2.types import Candidate, Request

TASKS = ("sequential", "persona", "caption", "general")
PERSONA = "A shopper took"  # first piece of a persona text
MIN_PARAGRAPH = 120  # characters of the shortest paragraph that counts as plain text
HELD_OUT = 40  # paragraphs of plain text on which perplexity is measured


def check_mix(mix: Mapping[str, float]) -> None:
    """Check the shares of the tasks.

    Raises:
        ConfigurationError: a task is unknown, a share is negative, or all shares are 0.
    """
    if set(mix) - set(TASKS):
        raise ConfigurationError(
            f"there are no tasks {sorted(set(mix) - set(TASKS))}", where="mid_mix", do=f"choose from {', '.join(TASKS)}"
        )
    if any(not isinstance(share, int | float) or share < 0 for share in mix.values()) or not sum(mix.values()) > 0:
        raise ConfigurationError(
            f"mid_mix is {dict(mix)}", where="mid_mix", do="give shares of at least 0, one of them above 0"
        )


def share_of(task: str, mix: Mapping[str, float]) -> float:
    """Return a task's share of the training tokens, 0 to 1."""
    return mix.get(task, 0.0) / sum(mix.values())


class Texts(Sequence[list[str]]):
    """Texts that are written when they are read. All texts of a large data set would need gigabytes.

    Args:
        sources: what each text is written from.
        write: returns the text of a source.
    """

    def __init__(self, sources: Sequence[Any], write: Callable[[Any], list[str]]) -> None:
        self.sources, self.write = sources, write

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, place: Any) -> Any:
        chosen = self.sources[place]
        return [self.write(source) for source in chosen] if isinstance(place, slice) else self.write(chosen)


def task_texts(
    catalog: Catalog, histories: Sequence[Sequence[int]], general: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Sequence[list[str]]]:
    """Return the texts of every task.

    Args:
        catalog: the catalogue with semantic IDs.
        histories: item ids of every user, oldest first.
        general: paragraphs of plain English.
        settings: settings of the run.
    """
    return {
        "sequential": sequential_texts(catalog, histories),
        "persona": persona_texts(catalog, histories, settings),
        "caption": caption_texts(catalog, settings),
        "general": [["", text] for text in general],
    }


def sequential_texts(catalog: Catalog, histories: Sequence[Sequence[int]]) -> Texts:
    """Return each history of at least two items as semantic IDs."""
    return Texts(
        [history for history in histories if len(history) > 1],
        lambda history: [SEQUENTIAL, *(sid_text(catalog.item(item).sid) for item in history)],
    )


def persona_texts(catalog: Catalog, histories: Sequence[Sequence[int]], settings: Mapping[str, Any]) -> Texts:
    """Return each history as semantic IDs that are followed by the texts of their items."""
    values = PromptMaker.of(settings, catalog, TEXT).fields
    return Texts(
        [history for history in histories if history],
        lambda history: [PERSONA, *(f"\n{describe(values(item))}" for item in history)],
    )


def caption_texts(catalog: Catalog, settings: Mapping[str, Any]) -> Texts:
    """Return each item's semantic ID and text."""
    values = PromptMaker.of(settings, catalog, TEXT).fields
    return Texts([item.item_id for item in catalog], lambda item: ["The item", f" {describe(values(item))}"])


def describe(values: Mapping[str, str]) -> str:
    """Return an item as a text: semantic ID, title, category and brand.

    Args:
        values: what a prompt template gets of the item.
    """
    text = f"{values['sid']}, its title is {values['title']}"
    if values["category"]:
        text += f", its category is {values['category']}"
    if values["brand"]:
        text += f", its brand is {values['brand']}"
    return text


def examples_of(
    texts: Mapping[str, Sequence[Sequence[str]]],
    tokenizer: Any,
    mix: Mapping[str, float],
    tokens: int,
    max_length: int,
    seed: int,
) -> dict[str, list[Example]]:
    """Return training examples of each task that together have about `tokens` tokens.

    The texts of a task are shuffled and repeated until its share of the tokens is reached. The part of an example is
    the alphabetical position of its task, from 1, so that the loss of each task is logged separately.
    """
    mixed = {}
    for part, (task, share) in enumerate(sorted(mix.items()), start=1):
        remaining, examples = share / sum(mix.values()) * tokens, []
        shuffled, shuffler = list(range(len(texts[task]))), random.Random(derive_seed(seed, task))
        while remaining > 0 and shuffled:
            shuffler.shuffle(shuffled)
            for place in shuffled:
                if remaining <= 0:
                    break
                for ids in split_text(texts[task][place], tokenizer, max_length):
                    examples.append(Example(input_ids=ids, parts=[part] * len(ids)))
                    remaining -= len(ids)
        mixed[task] = examples
    return mixed


def split_text(text: Sequence[str], tokenizer: Any, max_length: int) -> Iterator[list[int]]:
    """Yield the token ids of a text, split into texts of at most `max_length` tokens.

    Each of them begins with the first piece and ends with the end-of-sequence token. A piece is cut only if it is too
    long for a text of its own.
    """
    pieces = [encode(piece, tokenizer) for piece in text]
    head, end = pieces[0], [tokenizer.eos_token_id]
    limit = max_length - len(head) - 1
    ids: list[int] = []
    for piece in pieces[1:]:
        piece = piece[:limit]
        if ids and len(ids) + len(piece) > limit:
            yield head + ids + end
            ids = []
        ids = ids + piece
    if ids:
        yield head + ids + end


def general_source(file: str | None) -> str:
    """Return plain English with blank lines between paragraphs.

    Args:
        file: a text file; None reads the documentation that comes with Python.

    Raises:
        MissingFileError: there is no such file.
    """
    if file is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    if not Path(file).is_file():
        raise MissingFileError(f"there is no text file {file}", where="mid_general", do="correct the path")
    return Path(file).read_text(encoding="utf-8")


def general_texts(file: str | None, tokens: float, seed: int) -> tuple[list[str], list[str]]:
    """Return paragraphs of plain English: about `tokens` tokens to train on, and others to measure perplexity on.

    They contain no control tokens, see `recbole_gr2.plain_text`.

    Args:
        file: a text file with blank lines between paragraphs; None reads the documentation that comes with Python.
        tokens: number of tokens of the training paragraphs, at four characters per token.
        seed: seed of their order.

    Raises:
        MissingFileError: there is no such file.
        ConfigurationError: the file has no paragraph of MIN_PARAGRAPH characters.
    """
    paragraphs = [plain_text(" ".join(part.split())) for part in general_source(file).split("\n\n")]
    paragraphs = [part for part in paragraphs if len(part) >= MIN_PARAGRAPH and part[0].isalpha()]
    if not paragraphs:
        raise ConfigurationError(
            f"the file has no paragraph of {MIN_PARAGRAPH} characters",
            where=f"mid_general: {file}",
            do="give plain text with blank lines between paragraphs",
        )
    random.Random(derive_seed(seed, "general")).shuffle(paragraphs)
    held_out = paragraphs[: min(HELD_OUT, len(paragraphs) // 2 + 1)]
    training, remaining = [], 4 * tokens
    for part in paragraphs[len(held_out) :]:
        if remaining <= 0:
            break
        training.append(part)
        remaining -= len(part)
    return training, held_out


def vocabulary_texts(catalog: Catalog, settings: Mapping[str, Any]) -> list[str]:
    """Return every text that later stages may use, without semantic IDs: the texts that a trimmed vocabulary covers."""
    plain = Catalog(replace(item, sid=()) for item in catalog)
    size, texts = settings["cand_num"], [SEQUENTIAL, *phrases()]
    maker = replace(PromptMaker.of(settings, plain, TEXT), history=size)  # whatever number of items a prompt contains
    request = None
    for start in range(0, len(plain), size):
        block = [item.item_id for item in plain[start : start + size]]
        candidates = tuple(Candidate(item_id=item, score=0.0, rank=rank) for rank, item in enumerate(block, start=1))
        request = Request(
            request_id="vocabulary",
            user_token="",
            split="train",
            history=tuple(block),
            target=block[0],
            provider="",
            candidates=candidates,
        )
        texts += [message["content"] for message in maker.render(request).messages]
    assert request is not None, "a catalogue has items"
    for template in templates_for(settings["prompt_template"]):
        texts += [message["content"] for message in replace(maker, template=template).render(request).messages]
    texts += ["".join(text) for text in caption_texts(plain, settings)]
    texts += [f" {kind(item)}; {item.brand}; {kind(item).lower()}" for item in plain]
    return texts
