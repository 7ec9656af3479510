"""Trace teachers: they look at a request and argue for a ranking.

A teacher writes one argument per request and try. Under targeted sampling it is told the target, under rejection
sampling it is not (GR2 section 4).
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.evidence import overlap
from recbole_gr2.prompts import kind, recent, shorten
from recbole_gr2.ranking import complete, promote
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.tokens import SID, sid_text
from recbole_gr2.store import read_lines
from recbole_gr2.types import Item, Request


@dataclass(frozen=True, kw_only=True)
class Argument:
    """What a teacher says about one request: a text, and a full permutation of its candidates (item ids)."""

    reasoning: str
    ranking: tuple[int, ...]


class Teacher(Protocol):
    """Anything that argues. One that is paid for counts its tokens in `usage`: prompt_tokens, completion_tokens."""

    name: str

    def argue(self, requests: Sequence[Request], *, targeted: bool, attempt: int) -> list[Argument]:
        """One argument per request. `attempt` counts from 0; a later attempt may say something else.

        Only under `targeted` may it look at `request.target`.
        """


class RulesTeacher:
    """A deterministic teacher that needs no model: it compares kinds, brands and titles with the history, and cites the
    facts that the prompt shows.

    Its first attempt takes the best candidate by the prior, or by its own score where there is no evidence; later ones
    sample by it, so that rejection sampling has something to choose from. The others follow in the prior's order.
    `history` is how many of the last items it looks at: those that the prompt shows.
    """

    name = "rules"

    def __init__(self, items: Sequence[Item], *, seed: int, temperature: float, history: int) -> None:
        self.items, self.seed, self.temperature, self.history = items, seed, temperature, max(history, 1)

    def argue(self, requests: Sequence[Request], *, targeted: bool, attempt: int) -> list[Argument]:
        """See `Teacher`."""
        return [self._argue(request, targeted, attempt) for request in requests]

    def _argue(self, request: Request, targeted: bool, attempt: int) -> Argument:
        scores = (
            dict(zip(request.items, request.prior, strict=True))
            if request.prior
            else {c.item_id: self.score(request, c.item_id, c.rank) for c in request.candidates}
        )
        if targeted:
            pick = request.target
        elif attempt == 0:
            pick = max(scores, key=scores.get)
        else:
            rng = random.Random(derive_seed(self.seed, request.request_id, attempt))
            weights = [math.exp(score / self.temperature) for score in scores.values()]
            pick = rng.choices(list(scores), weights)[0]
        return Argument(reasoning=self.text(request, pick), ranking=promote(request.by_prior, pick))

    def score(self, request: Request, item_id: int, rank: int) -> float:
        """How well a candidate fits: kinds and brands in common with the last items, and its base rank."""
        candidate, fit = self.items[item_id - 1], 0.0
        for back, past in enumerate(reversed(request.history[-5:])):
            other = self.items[past - 1]
            fit += (overlap(candidate, other) + (candidate.brand != "" and candidate.brand == other.brand)) / (back + 1)
        return fit + 2.0 / math.log2(rank + 1)

    def text(self, request: Request, pick: int) -> str:
        """Pattern in the history, the candidate that matches, cited by semantic ID, and why: what it has in common with
        the history, and in which facts it is first."""
        history = [self.items[i - 1] for i in recent(request.history, self.history)]
        chosen = self.items[pick - 1]
        kinds = Counter(kind(item) for item in history if kind(item))
        usual = " and ".join(name for name, _ in kinds.most_common(2)) or "items like " + shorten(history[-1].title, 30)
        related = max(history, key=lambda item: (overlap(chosen, item), item.brand == chosen.brand != ""))
        if chosen.brand and chosen.brand in {item.brand for item in history}:
            why = f"the same brand, {chosen.brand}"
        elif overlap(chosen, related) == 1.0:
            why = "the same kind"
        elif overlap(chosen, related) > 0:
            why = f"it goes with {kind(related)}"
        else:
            why = "something new beside them"
        if first := leads_in(request, pick):
            why += f"; first in {', '.join(first)}"
        # The pick comes before its reasons, since it is a choice under the prior, and words that anticipate it are not;
        # and once more behind them, next to the ranking: a small model copies a label from there alone.
        sid = sid_text(chosen.sid)
        return f"The shopper takes {usual}. {sid}: {kind_or_title(chosen)}, {why}. Best is {sid}"


def kind_or_title(item: Item) -> str:
    """What the rules teacher calls an item."""
    return kind(item) or shorten(item.title, 30)


def leads_in(request: Request, pick: int) -> list[str]:
    """The facts, of those that a prompt shows, in which no candidate is ahead of this one and not all lack it."""
    own = request.facts[request.items.index(pick)] if request.facts else {}
    return [name for name, level in own.items() if level == max(facts[name] for facts in request.facts) > 0]


RULES = re.compile(
    rf"The shopper takes (?P<habit>.*?)\. (?P<sid>{SID.pattern}): (?P<kind>.*), (?P<why>the same brand, (?P<brand>.*?)|"
    r"the same kind|it goes with (?P<other>.*?)|something new beside them)(; first in (?P<first>.*?))?\. "
    rf"Best is {SID.pattern}"
)


def true_statements(said: str, request: Request, items: Sequence[Item], shown: int) -> dict[str, bool]:
    """Which statements of a text in the words of `RulesTeacher` are true of the request, whoever wrote it.

    `habit`: the kinds that the shopper is said to take are kinds of items in the history; `kind`: the cited candidate
    is of the kind that is named; `why`: the reason that is given for it holds. None is true of a text in other words.

    Args:
        shown: items of the history that the prompt shows, the last ones.
    """
    text = RULES.fullmatch(said.strip())
    cited = {sid_text(items[i - 1].sid): items[i - 1] for i in request.items}
    if text is None or text["sid"] not in cited:
        return dict.fromkeys(("habit", "kind", "why"), False)
    chosen, history = cited[text["sid"]], [items[i - 1] for i in recent(request.history, max(shown, 1))]
    kinds = {kind(item) for item in history} - {""} or {"items like " + shorten(history[-1].title, 30)}
    if text["brand"] is not None:
        why = text["brand"] == chosen.brand and chosen.brand in {item.brand for item in history}
    elif text["other"] is not None:
        why = any(kind(item) == text["other"] and overlap(chosen, item) > 0 for item in history)
    else:
        closest = max(overlap(chosen, item) for item in history)
        new = closest == 0 and chosen.brand not in {item.brand for item in history} - {""}
        why = closest == 1.0 if text["why"] == "the same kind" else new
    if text["first"] is not None:
        why = why and set(text["first"].split(", ")) <= set(leads_in(request, chosen.item_id))
    return {
        "habit": text["habit"] in kinds | {f"{one} and {other}" for one in kinds for other in kinds},
        "kind": text["kind"] == kind_or_title(chosen),
        "why": why,
    }


class LocalLLMTeacher:
    """A language model on this machine that argues under the answer grammar: free text, then the ranking.

    Under targeted sampling the prompt says which candidate was taken, and the ranking is the target first.
    """

    name = "local_llm"

    def __init__(
        self, model: Any, tokenizer: Any, maker: Any, grammar: Any, *, seed: int, temperature: float, bf16: bool
    ):
        self.model, self.tokenizer, self.maker, self.grammar = model, tokenizer, maker, grammar
        self.seed, self.temperature, self.bf16 = seed, temperature, bf16

    def argue(self, requests: Sequence[Request], *, targeted: bool, attempt: int) -> list[Argument]:
        """See `Teacher`."""
        from recbole_gr2.llm.rollout import generate_rankings, read_answer
        from recbole_gr2.prompts import encode_prompt

        prompts = [self.maker.render(request) for request in requests]
        ids = []
        for request, prompt in zip(requests, prompts, strict=True):
            if targeted:
                label = prompt.labels[prompt.order.index(request.target_rank - 1)]
                *before, user = prompt.messages
                hint = {**user, "content": f"{user['content']}\nThe shopper took {label}. Say why, in one sentence."}
                prompt = type(prompt)(**{**vars(prompt), "messages": (*before, hint)})
            ids.append(encode_prompt(prompt, self.tokenizer))
        completions = generate_rankings(
            self.model,
            ids,
            [self.maker.label_prior(r, p) for r, p in zip(requests, prompts, strict=True)],
            grammar=self.grammar,
            bf16=self.bf16,
            temperature=self.temperature if attempt or targeted else 0.0,
            seed=derive_seed(self.seed, attempt),
        )
        arguments = []
        for request, prompt, completion in zip(requests, prompts, completions, strict=True):
            answer = read_answer(
                request, completion, self.maker.label_items(request, prompt), self.grammar, self.tokenizer
            )
            ranking = promote(request.by_prior, request.target) if targeted else answer.ranking
            arguments.append(Argument(reasoning=answer.reasoning, ranking=ranking))
        return arguments


class RecordedTeacher:
    """Arguments that were written elsewhere: JSON lines with `request_id`, `reasoning` and `ranking` (item tokens).

    The n-th line of a request is its n-th try; candidates that a line does not rank follow in the prior's order. Where
    there is no line the argument is empty, which is rejected and counted.

    Raises:
        ConfigurationError: no file is named.
        MissingFileError: it is not there.
        GR2Error: a line lacks a field, or ranks an item that is not in the data.
    """

    name = "recorded"

    def __init__(self, file: str | None, items: Sequence[Item]) -> None:
        if file is None:
            raise ConfigurationError("the recorded teacher reads a file", where="trace_file", do="name one")
        if not Path(file).is_file():
            raise MissingFileError(f"there is no file {file}", where="trace_file", do="check its path")
        ids = {item.token: item.item_id for item in items}
        self.said: dict[str, list[tuple[str, list[int]]]] = {}
        for number, line in enumerate(read_lines(Path(file)), start=1):
            try:
                said = (line["reasoning"], [ids[token] for token in line["ranking"]])
                self.said.setdefault(line["request_id"], []).append(said)
            except (KeyError, TypeError) as error:
                raise GR2Error(
                    f"record {number} cannot be read: {error!r}",
                    where=file,
                    do="give request_id, reasoning and ranking, a list of item tokens",
                ) from error

    def argue(self, requests: Sequence[Request], *, targeted: bool, attempt: int) -> list[Argument]:
        """See `Teacher`."""
        return [self._argue(request, attempt) for request in requests]

    def _argue(self, request: Request, attempt: int) -> Argument:
        said = self.said.get(request.request_id, [])
        reasoning, ranking = said[attempt] if attempt < len(said) else ("", [])
        return Argument(reasoning=reasoning, ranking=complete(ranking, request.by_prior))


def phrases() -> list[str]:
    """The rules teacher's fixed words, for a trimmed vocabulary."""
    return [
        "The shopper takes A and B. <",
        ": A, the same brand, A. Best is <",
        ", the same kind.",
        ", it goes with A.",
        ", something new beside them.",
        "; first in A, A.",
        " items like A",
        "The shopper took A. Say why, in one sentence.",
    ]
