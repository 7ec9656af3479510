"""Render requests as chat messages.

Prompt templates are YAML files with a system and a user message in Jinja2. A template receives the history and the
candidates of a request. It has no access to the target. `prompt_items` says how the items are written; each of its
forms except `text` has a template of its own in `properties/prompt_items/`.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_gr2.catalog import Catalog
from recbole_gr2.config import properties_folder, read_yaml
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.plain_text import pattern_of
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.tokens import SID_BEGIN, SID_END, is_added, label_tokens, sid_text
from recbole_gr2.types import Item, Prompt, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEQUENTIAL = "Taken in order: "  # the first words of a sequential text of mid-training
FIELDS = ("label", "sid", "title", "category", "brand")  # variables of an item in a template
TEXTS = ("title", "category", "brand")  # those with a text of the data
TEXT = "text"  # the value of `prompt_items` whose template `prompt_template` names
VECTOR = "vector"  # the value of `prompt_items` with which an item is one position, see `recbole_gr2.llm.item_vectors`
FORMS = (TEXT, "short", "sid", VECTOR)  # values of `prompt_items`
INVARIANT = "invariant"  # name of the template of the form without input order
SHORT_TITLE = 24  # largest length of a title in the form `short` in characters. Our choice.
SHORT_CATEGORY = 12  # largest length of a category or brand in the form `short` in characters. Our choice.
LEAST_TITLE = 8  # smallest length of a title that ends before a mark of `TITLE_END`. Our choice.
TITLE_END = re.compile(r", | - | \(| \[|: |; | \| ")  # what follows in a title is often a variant, a size or a year
PLACEHOLDER = "\ue000"  # stands for any text of the data; a character for private use
# A text of the data beside characters that can be a part of a token of a semantic ID, a label or the ranking mark.
JOINED = re.compile(rf"<[\w|]*{PLACEHOLDER}|{PLACEHOLDER}[\w|]*[>{PLACEHOLDER}]")


@dataclass(frozen=True, kw_only=True)
class Template:
    """A prompt template.

    Attributes:
        name: name of the file without its extension.
        sha: first 12 hex digits of the SHA-256 hash of the file.
        system: Jinja2 source of the system message.
        user: Jinja2 source of the user message.
    """

    name: str
    sha: str
    system: str
    user: str

    def messages(
        self, history: Sequence[Mapping[str, str]], candidates: Sequence[Mapping[str, str]]
    ) -> tuple[dict[str, str], ...]:
        """Render the system and the user message.

        Args:
            history: template variables of the history items, oldest first, each with the keys `FIELDS`.
            candidates: template variables of the candidates, in the order of their labels.

        Raises:
            ConfigurationError: the template has a syntax error or uses a variable that does not exist.
        """
        from jinja2 import TemplateError

        try:
            return tuple(
                {"role": role, "content": _compile(source).render(history=history, candidates=candidates).strip()}
                for role, source in (("system", self.system), ("user", self.user))
            )
        except TemplateError as error:
            raise ConfigurationError(
                f"the prompt template {self.name!r} cannot be rendered: {error}",
                where="prompt_template",
                why=f"a template receives `history` and `candidates`; each item has {', '.join(FIELDS)}"
                + ("; `facts` was removed together with the setting prompt_evidence" if "facts" in str(error) else ""),
                do="correct the template, or choose a built-in one: " + ", ".join(built_in()),
            ) from error


def load_template(name: str) -> Template:
    """Load a template of `properties/prompt/` by name, or a YAML file by path.

    The template is rendered once with an example, so that an error appears before any stage starts.

    Raises:
        MissingFileError: the file does not exist.
        ConfigurationError: the file has no system or user message, has a syntax error, uses an unknown variable, or
            joins texts of the data so that they can form a token of a semantic ID or a label.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else properties_folder() / "prompt" / f"{name}.yaml"
    return _read_template(file, name)


def template_of(settings: Mapping[str, Any]) -> Template:
    """Return the template of a run: `prompt_template` with `prompt_items: text`, else that of the form.

    Raises:
        MissingFileError, ConfigurationError: see `load_template`.
    """
    return _template(settings["prompt_items"], settings["prompt_template"])


def prompt_values(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of the template, and `prompt_items`, for the key of a stage.

    The default form is left out, so that stages of earlier versions keep their keys. A stage with these values
    declares `prompt_items` as excluded.
    """
    items = settings["prompt_items"]
    return {"prompt_template": template_of(settings).sha, **({} if items == TEXT else {"prompt_items": items})}


def _template(items: str, name: str) -> Template:
    if items == TEXT:
        return load_template(name)
    return _form_template(items)


@lru_cache(maxsize=8)
def _form_template(items: str) -> Template:
    """The template of a form, `properties/prompt_items/<items>.yaml`."""
    return _read_template(properties_folder() / "prompt_items" / f"{items}.yaml", items)


def _read_template(file: Path, name: str) -> Template:
    """Read and check a template, see `load_template`."""
    if not file.is_file():
        raise MissingFileError(
            f"the prompt template {name!r} does not exist",
            where="prompt_template",
            do=f"choose from {', '.join(built_in())}, or give the path of a YAML file",
        )
    text = file.read_text(encoding="utf-8")
    values = read_yaml(text)
    if not isinstance(values, dict) or not all(isinstance(values.get(key), str) for key in ("system", "user")):
        raise ConfigurationError(
            "a prompt template needs the keys `system` and `user`, each with a text",
            where=str(file),
            do="copy properties/prompt/rerank.yaml and change its texts",
        )
    template = Template(
        name=file.stem, sha=hashlib.sha256(text.encode()).hexdigest()[:12], system=values["system"], user=values["user"]
    )
    example = dict.fromkeys(FIELDS, ".") | dict.fromkeys(TEXTS, PLACEHOLDER)
    for message in template.messages([example, example], [example, example]):
        joined = JOINED.search(message["content"])
        if joined:
            raise ConfigurationError(
                f"the text {joined[0].replace(PLACEHOLDER, '(text)')!r} of the {message['role']} message joins a text "
                "of the data to its neighbour",
                where=str(file),
                why="together they can form a semantic ID or a label that is not the one of the item",
                do=f"write a space or a line break on both sides of {', '.join(TEXTS)}",
            )
    return template


def built_in() -> list[str]:
    """Return the names of the templates in `properties/prompt/`, sorted."""
    return sorted(path.stem for path in (properties_folder() / "prompt").glob("*.yaml"))


def templates_for(name: str) -> list[Template]:
    """Return all built-in templates, and the template `name` if it is a file of the user.

    Mid-training covers the words of all of them, so that one mid-trained model serves every template.
    """
    return [load_template(each) for each in dict.fromkeys([*built_in(), name])]


@dataclass(frozen=True, kw_only=True)
class PromptMaker:
    """Renders requests with one template.

    Attributes:
        template: the prompt template.
        catalog: the items, with their semantic IDs.
        history: number of history items in a prompt; the most recent ones.
        title_chars: maximum length of a title in characters.
        shuffle_seed: seed of a random order of the candidates, one order per request; None keeps the base order.
        items: form of the items, one of `FORMS`.
    """

    template: Template
    catalog: Catalog
    history: int
    title_chars: int
    shuffle_seed: int | None = None
    items: str = TEXT

    @classmethod
    def of(cls, settings: Mapping[str, Any], catalog: Catalog, items: str | None = None) -> PromptMaker:
        """Return the prompt maker of a run.

        Args:
            settings: settings of the run. The method reads prompt_template, prompt_history, prompt_title_chars,
                prompt_shuffle, seed and, without `items`, prompt_items.
            catalog: the items, with their semantic IDs.
            items: form of the items; by default prompt_items.
        """
        items = settings["prompt_items"] if items is None else items
        return cls(
            items=items,
            template=_template(items, settings["prompt_template"]),
            catalog=catalog,
            history=settings["prompt_history"],
            title_chars=settings["prompt_title_chars"],
            shuffle_seed=settings["seed"] if settings["prompt_shuffle"] else None,
        )

    def fields(self, item_id: int, label: str = "") -> dict[str, str]:
        """Return the template variables of an item in the form `text`, see `FIELDS`."""
        item = self.catalog.item(item_id)
        return {
            "label": label,
            "sid": sid_text(item.sid) if item.sid else "",
            "title": shorten(item.title, self.title_chars),
            "category": kind(item),
            "brand": item.brand,
        }

    def written(
        self, candidates: Sequence[tuple[int, str]], history: Sequence[int]
    ) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Return the template variables of candidates and history in the form of the prompt.

        `sid` and `vector` have no texts. `short` has the start of each title, see `short_title`, and of each category
        and brand, unless an earlier item has it or the title contains it. Candidates come before the history.

        Args:
            candidates: item id and label of each candidate, in the order of the prompt.
            history: item ids, oldest first.
        """
        seen: set[str] = set()
        first = [self._in_form(item, label, seen) for item, label in candidates]
        return first, [self._in_form(item, "", seen) for item in history]

    def _in_form(self, item_id: int, label: str, seen: set[str]) -> dict[str, str]:
        """Template variables of an item. `seen` has the categories and brands of earlier items, and gets its own."""
        values = self.fields(item_id, label)
        if self.items in ("sid", VECTOR):
            return values | dict.fromkeys(TEXTS, "")
        if self.items == "short":
            values["title"] = short_title(values["title"])
            for name in ("category", "brand"):
                values[name] = shorten(values[name], SHORT_CATEGORY)
                if values[name] in seen or values[name].lower() in values["title"].lower():
                    values[name] = ""
                else:
                    seen.add(values[name])
        return values

    def render_parts(self, request: Request, order: Sequence[int]) -> tuple[tuple[dict[str, str], ...], list[str]]:
        """Return the messages with the history, and the text of each candidate, for the form without input order.

        The text of a candidate does not depend on the other candidates.

        Args:
            request: the request. Its labels are not used.
            order: base positions of the candidates in the order of the result, (K,).
        """
        template, seen = _form_template(INVARIANT), set[str]()
        history = [self._in_form(item, "", seen) for item in recent(request.history, self.history)]
        candidates = [self._in_form(request.items[position], "", set(seen)) for position in order]
        return template.messages(history=history, candidates=[]), [_line(values) for values in candidates]

    def order(self, request: Request) -> tuple[int, ...]:
        """Return the base positions of the candidates in the order of the prompt, (K,)."""
        if self.shuffle_seed is not None:
            return shuffled_order(request, self.shuffle_seed)
        return tuple(range(len(request.candidates)))

    def render(self, request: Request, order: Sequence[int] | None = None) -> Prompt:
        """Render a request as chat messages.

        Args:
            request: the request. Its labels are not used.
            order: base positions of the candidates in the order of the prompt, (K,). Default: `self.order(request)`.

        Raises:
            ConfigurationError: the template uses a variable that does not exist.
        """
        order = self.order(request) if order is None else tuple(order)
        labels = tuple(label_tokens(len(order)))
        candidates, history = self.written(
            [(request.items[position], label) for position, label in zip(order, labels, strict=True)],
            recent(request.history, self.history),
        )
        return Prompt(
            request_id=request.request_id,
            messages=self.template.messages(history=history, candidates=candidates),
            labels=labels,
            order=order,
        )

    def label_items(self, request: Request, prompt: Prompt) -> tuple[int, ...]:
        """Return the item id of each label, (K,)."""
        return tuple(request.items[position] for position in prompt.order)

    def label_prior(self, request: Request, prompt: Prompt) -> list[float]:
        """Return the log-prior of each label, (K,); zeros without a prior."""
        return [request.prior[position] if request.prior else 0.0 for position in prompt.order]


def recent(history: Sequence[int], count: int) -> Sequence[int]:
    """Return the last `count` items of a history; none for 0.

    >>> recent((1, 2, 3), 2), recent((1, 2, 3), 0)
    ((2, 3), ())
    """
    return history[max(len(history) - count, 0) :]


def shuffled_order(request: Request, seed: int, purpose: str = "prompt") -> tuple[int, ...]:
    """Return the base positions of the candidates in a random order, (K,).

    The order depends on the seed, the purpose and the request id only.
    """
    order = list(range(len(request.candidates)))
    random.Random(derive_seed(seed, purpose, request.request_id)).shuffle(order)
    return tuple(order)


def history_ids(
    history: Sequence[int], catalog: Catalog, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[int]:
    """Return the token ids of a history in the form of the sequential texts of mid-training.

    The text contains the most recent items that fit, oldest first.

    Args:
        history: item ids, oldest first.
        catalog: the items, with their semantic IDs.
        tokenizer: tokenizer of the language model.
        max_length: maximum number of tokens of the text and one further semantic ID.
    """
    head, sid = tokenizer([SEQUENTIAL, sid_text(catalog[0].sid)], add_special_tokens=False)["input_ids"]
    return sequential_ids(recent(history, max(1, (max_length - len(head)) // len(sid) - 1)), catalog, tokenizer)


def sequential_ids(history: Sequence[int], catalog: Catalog, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a complete history in the form of the sequential texts of mid-training."""
    head, text = SEQUENTIAL, "".join(sid_text(catalog.item(item).sid) for item in history)
    return [token for ids in tokenizer([head, text], add_special_tokens=False)["input_ids"] for token in ids]


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a prompt up to the start of the assistant's turn, (P,)."""
    return encode_chat(prompt.messages, tokenizer)


@lru_cache(maxsize=64)
def item_prompt(
    items: str, candidates: int, history: int, levels: int, tokenizer: PreTrainedTokenizerBase, filler: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids of a prompt in which an item is one position, and the positions of items in their order.

    They depend on the numbers of items only. A candidate is its label. A history item is `filler`.

    Args:
        items: name of the template, `vector` or `invariant`.
        candidates: number of candidates that the template gets.
        history: number of history items.
        levels: number of codes of a semantic ID. The template writes one for each item.
        tokenizer: tokenizer of the language model.
        filler: a token id that stands for an item without a label.
    """
    number = tokenizer.get_vocab()
    labels = label_tokens(candidates)
    example = dict.fromkeys(FIELDS, "") | {"sid": sid_text((0,) * levels)}
    messages = _form_template(items).messages(
        history=[example] * history, candidates=[example | {"label": label} for label in labels]
    )
    begin, end, *of_labels = (number[token] for token in (SID_BEGIN, SID_END, *labels))
    found: list[int] = []
    places: list[int] = []
    inside = False
    for token in encode_chat(messages, tokenizer):
        if token == begin:
            inside = True
            places.append(len(found))
        elif token == end:
            inside = False
            found.append(filler)
        elif token in of_labels and places and places[-1] == len(found) - 1:
            found[-1] = token
        elif not inside:
            found.append(token)
    return tuple(found), tuple(places)


def encode_chat(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of chat messages up to the start of the assistant's turn.

    Only the chat template writes control tokens of the tokenizer. In the messages they are text, see `encode`.
    """
    control = _control_tokens(tokenizer, len(tokenizer))
    chat = [{**message, "content": control.sub(r"\g<0> ", message["content"])} for message in messages]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a text. Semantic IDs and labels in it are tokens.

    The special tokens of the tokenizer, and the added tokens that its chat template writes, become ordinary text: a
    space follows their first character. So no text ends a turn or a document.
    """
    text = _control_tokens(tokenizer, len(tokenizer)).sub(r"\g<0> ", text)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@lru_cache(maxsize=4)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    """Return a regular expression for the control tokens of a tokenizer with `size` tokens, see `encode`."""
    template = str(tokenizer.chat_template or "")
    return pattern_of(
        text
        for text, special in ((str(token), token.special) for token in tokenizer.added_tokens_decoder.values())
        # A tokenizer of another project may have the tokens of semantic IDs as special tokens.
        if (special or text in template) and len(text) > 1 and not text.isspace() and not is_added(text)
    )


def kind(item: Item) -> str:
    """Return the last part of the category path, at most 40 characters.

    >>> kind(Item(item_id=1, token="t", title="", categories="Beauty > Makeup > Nail Polish"))
    'Nail Polish'
    """
    return shorten(item.categories.split(" > ")[-1], 40)


def shorten(text: str, chars: int) -> str:
    """Cut a text to at most `chars` characters, between two words if possible.

    >>> shorten("OPI Nail Lacquer", 12), shorten("abcdef", 3)
    ('OPI Nail', 'abc')
    """
    if len(text) <= chars:
        return text
    cut = text[: chars + 1]
    return cut[: cut.rfind(" ")].rstrip(" ,-") if " " in cut else text[:chars]


def _line(values: Mapping[str, str]) -> str:
    """An item as in the template `invariant`."""
    category = f" ({values['category']})" if values["category"] else ""
    return " ".join(part for part in (values["sid"], values["title"]) if part) + category


def short_title(title: str) -> str:
    """Return the start of a title: up to a comma, a bracket or a similar mark, and at most `SHORT_TITLE` characters.

    >>> short_title("Toy Story (1995)"), short_title("OPI Nail Lacquer, Red, 0.5 Fluid Ounce"), short_title("Yes, No")
    ('Toy Story', 'OPI Nail Lacquer', 'Yes, No')
    """
    end = TITLE_END.search(title, LEAST_TITLE)
    return shorten(title[: end.start()] if end else title, SHORT_TITLE)


@lru_cache
def _compile(source: str) -> Any:
    """Compile a Jinja2 source. The sandbox gives a template no access to Python objects."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    return SandboxedEnvironment(undefined=StrictUndefined, autoescape=False).from_string(source)
