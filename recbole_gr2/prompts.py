"""Prompts: templates are data files, rendered with Jinja2; what they are given does not hold the target."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from recbole_gr2.config import properties_folder, read_yaml
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.tokens import label_tokens, sid_text
from recbole_gr2.types import Item, Prompt, Request

SEQUENTIAL = "Taken in order: "


@dataclass(frozen=True, kw_only=True)
class Template:
    """A prompt template: Jinja2 sources of the system and the user message, and the hash of its file."""

    name: str
    sha: str
    system: str
    user: str


def load_template(name: str) -> Template:
    """A template of `properties/prompt/`, or of a YAML file given by path.

    Raises:
        MissingFileError: there is none of that name.
        ConfigurationError: it lacks a message, or has a syntax error.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else properties_folder() / "prompt" / f"{name}.yaml"
    if not file.is_file():
        raise MissingFileError(
            f"there is no prompt template {name!r}",
            where="prompt_template",
            do=f"choose from {', '.join(built_in())}, or give the path of a YAML file",
        )
    text = file.read_text(encoding="utf-8")
    values = read_yaml(text)
    if not isinstance(values, dict) or {"system", "user"} - set(values):
        raise ConfigurationError("a prompt template has a system and a user message", where=str(file))
    return Template(
        name=file.stem, sha=hashlib.sha256(text.encode()).hexdigest()[:12], system=values["system"], user=values["user"]
    )


def built_in() -> list[str]:
    """Names of the templates in `properties/prompt/`."""
    return sorted(path.stem for path in (properties_folder() / "prompt").glob("*.yaml"))


def templates_for(name: str) -> list[Template]:
    """The built-in templates, and the one of this name where it is the user's own: a model that learns the words of
    all of them once can be asked with any."""
    return [load_template(each) for each in dict.fromkeys([*built_in(), name])]


@dataclass(frozen=True, kw_only=True)
class PromptMaker:
    """Renders requests with one template and one way of showing items.

    With `shuffle_seed` the candidates stand in a random order of the request's own; None: in base order.
    """

    template: Template
    items: Sequence[Item]
    history: int
    title_chars: int
    shuffle_seed: int | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any], items: Sequence[Item]) -> PromptMaker:
        """The prompt maker of a run's settings; `items` carry their semantic IDs."""
        return cls(
            template=load_template(settings["prompt_template"]),
            items=items,
            history=settings["prompt_history"],
            title_chars=settings["prompt_title_chars"],
            shuffle_seed=settings["seed"] if settings["prompt_shuffle"] else None,
        )

    def shown(self, item_id: int, label: str = "") -> dict[str, str]:
        """What a template sees of an item."""
        item = self.items[item_id - 1]
        return {
            "label": label,
            "sid": sid_text(item.sid) if item.sid else "",
            "title": shorten(item.title, self.title_chars),
            "category": kind(item),
            "brand": item.brand,
            "facts": "",
        }

    def order(self, request: Request) -> tuple[int, ...]:
        """Base positions of the candidates in the order in which they are shown and labelled."""
        if self.shuffle_seed is not None:
            return shuffled_order(request, self.shuffle_seed)
        return tuple(range(len(request.candidates)))

    def render(self, request: Request, order: Sequence[int] | None = None) -> Prompt:
        """The request as chat messages.

        Args:
            order: base positions in the order in which they are shown and labelled; by default the maker's own.
        """
        order = self.order(request) if order is None else tuple(order)
        labels = tuple(label_tokens(len(order)))
        values = {
            "history": [self.shown(item) for item in recent(request.history, self.history)],
            "candidates": [self.shown(request.items[p], label) for p, label in zip(order, labels, strict=True)],
        }
        if request.facts:
            for shown, position in zip(values["candidates"], order, strict=True):
                shown["facts"] = " ".join(f"{name} {level}" for name, level in request.facts[position].items())
        return Prompt(
            request_id=request.request_id,
            messages=(
                {"role": "system", "content": _jinja(self.template.system).render(values).strip()},
                {"role": "user", "content": _jinja(self.template.user).render(values).strip()},
            ),
            labels=labels,
            order=order,
            template=self.template.name,
            template_sha=self.template.sha,
        )

    def label_items(self, request: Request, prompt: Prompt) -> tuple[int, ...]:
        """Item id behind each label, (K,)."""
        return tuple(request.items[position] for position in prompt.order)

    def label_prior(self, request: Request, prompt: Prompt) -> list[float]:
        """Log-prior of each label, (K,); zeros where there is no evidence."""
        return [request.prior[position] if request.prior else 0.0 for position in prompt.order]


def recent(history: Sequence[int], count: int) -> Sequence[int]:
    """The last `count` items of a history, none for 0.

    >>> recent((1, 2, 3), 2), recent((1, 2, 3), 0)
    ((2, 3), ())
    """
    return history[max(len(history) - count, 0) :]


def shuffled_order(request: Request, seed: int, purpose: str = "prompt") -> tuple[int, ...]:
    """The candidates' base positions in a random order of the request's own."""
    order = list(range(len(request.candidates)))
    random.Random(derive_seed(seed, purpose, request.request_id)).shuffle(order)
    return tuple(order)


def history_ids(history: Sequence[int], items: Sequence[Item], tokenizer, longest: int) -> list[int]:
    """Token ids of a history as mid-training's sequential task shows it: the last items that fit, oldest first.

    Args:
        longest: tokens that these and one more semantic ID may have.
    """
    head, sid = tokenizer([SEQUENTIAL, sid_text(items[0].sid)], add_special_tokens=False)["input_ids"]
    return sequential_ids(recent(history, max(1, (longest - len(head)) // len(sid) - 1)), items, tokenizer)


def sequential_ids(history: Sequence[int], items: Sequence[Item], tokenizer) -> list[int]:
    """Token ids of a whole history in that form."""
    head, text = SEQUENTIAL, "".join(sid_text(items[item - 1].sid) for item in history)
    return [token for ids in tokenizer([head, text], add_special_tokens=False)["input_ids"] for token in ids]


def encode_prompt(prompt: Prompt, tokenizer) -> list[int]:
    """Token ids up to the start of the assistant's turn, (P,)."""
    text = tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def kind(item: Item) -> str:
    """The most particular category, e.g. `Nail Polish` of `Beauty > Makeup > Nails > Nail Polish`."""
    return shorten(item.categories.split(" > ")[-1], 40)


def shorten(text: str, chars: int) -> str:
    """At most `chars` characters, cut at a word if there is one.

    >>> shorten("OPI Nail Lacquer", 12), shorten("abcdef", 3)
    ('OPI Nail', 'abc')
    """
    if len(text) <= chars:
        return text
    cut = text[: chars + 1]
    return cut[: cut.rfind(" ")].rstrip(" ,-") if " " in cut else text[:chars]


@lru_cache
def _jinja(source: str):
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    return SandboxedEnvironment(undefined=StrictUndefined, autoescape=False).from_string(source)
