"""A deterministic teacher without a model. It compares categories, brands and titles of candidates and history.

`SENTENCE`, `REASONS` and `HABITS` define the text of the teacher. The texts that it writes, the regular expression that
reads them, and the words for a trimmed vocabulary are all derived from these templates.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_gr2.catalog import Catalog
from recbole_gr2.features.providers import overlap
from recbole_gr2.prompts import kind, recent, shorten
from recbole_gr2.ranking import promote
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.tokens import SID, sid_text
from recbole_gr2.teachers.base import TeacherReply
from recbole_gr2.teachers.local_llm import HINT
from recbole_gr2.types import Item, Request

# The chosen candidate comes before the reasons, because the model chooses it with the help of the prior. Reasons that
# precede the choice would be written without the prior. The choice is repeated before the ranking, because a small
# model copies a label only from there.
REASON = ", {why}."
SENTENCE = "The shopper takes {habit}. {sid}: {kind}" + REASON + " Best is {best}"
REASONS = {
    "brand": "the same brand, {brand}",
    "kind": "the same kind",
    "related": "it goes with {other}",
    "new": "something new beside them",
}
HABITS = {"two": "{one} and {other}", "title": "items like {title}"}
TITLE_CHARS = 30  # maximum length of a title in a sentence, in characters. Our choice.


def pattern(template: str, **groups: str) -> str:
    """Return a regular expression for the texts of a template: its literal words, and `groups` in place of its fields.

    >>> pattern("it goes with {other}.", other="(.*)")
    'it\\\\ goes\\\\ with\\\\ (.*)\\\\.'
    """
    parts = re.split(r"\{(\w+)\}", template)
    return "".join(groups[part] if index % 2 else re.escape(part) for index, part in enumerate(parts))


WHY = "|".join(pattern(reason, brand="(?P<brand>.*?)", other="(?P<other>.*?)") for reason in REASONS.values())
TEXT = re.compile(
    pattern(
        SENTENCE,
        habit="(?P<habit>.*?)",
        sid=f"(?P<sid>{SID.pattern})",
        kind="(?P<kind>.*)",
        why=f"(?P<why>{WHY})",
        best=SID.pattern,
    )
)


class RulesTeacher:
    """Explains a candidate by what it has in common with the history.

    Attempt 0 chooses the candidate with the highest prior, or with the highest `score` without a prior. Later attempts
    sample a candidate with probability proportional to exp(prior / trace_temperature). At temperature 0 they make the
    same choice as attempt 0. Under targeted sampling the teacher explains the target. The other candidates follow in
    the order of the prior.

    Args:
        catalog: the items, with their semantic IDs.
        settings: settings of the run. The teacher reads trace_temperature and prompt_history, the number of history
            items that it considers (at least one).
        seed: seed of the sampling.
    """

    name = "rules"

    def __init__(self, *, catalog: Catalog, settings: Mapping[str, Any], seed: int) -> None:
        self.catalog, self.seed = catalog, seed
        self.temperature, self.history = settings["trace_temperature"], max(settings["prompt_history"], 1)

    def argue(self, requests: Sequence[Request], *, targeted: bool, attempt: int) -> list[TeacherReply]:
        """Reply to each request, see `Teacher.argue`."""
        return [self._argue(request, targeted, attempt) for request in requests]

    def _argue(self, request: Request, targeted: bool, attempt: int) -> TeacherReply:
        scores: dict[int, float] = (
            dict(zip(request.items, request.prior, strict=True))
            if request.prior
            else {c.item_id: self.score(request, c.item_id, c.rank) for c in request.candidates}
        )
        if targeted:
            choice = request.target
        elif attempt == 0 or self.temperature == 0:
            choice = max(scores, key=lambda item: scores[item])
        else:
            rng = random.Random(derive_seed(self.seed, request.request_id, attempt))
            best = max(scores.values())  # subtracted, so that the largest weight is 1 at every temperature
            weights = [math.exp((score - best) / self.temperature) for score in scores.values()]
            choice = rng.choices(list(scores), weights)[0]
        return TeacherReply(reasoning=self.text(request, choice), ranking=promote(request.by_prior, choice))

    def score(self, request: Request, item_id: int, rank: int) -> float:
        """Return a score of a candidate without a prior.

        The score is the sum of (category overlap + same brand) / n over the last five history items, where n = 1 is
        the most recent item, plus 2 / log2(1 + rank in the base order). Our choice.
        """
        candidate, fit = self.catalog.item(item_id), 0.0
        for back, past in enumerate(reversed(request.history[-5:])):
            other = self.catalog.item(past)
            fit += (overlap(candidate, other) + (candidate.brand != "" and candidate.brand == other.brand)) / (back + 1)
        return fit + 2.0 / math.log2(rank + 1)

    def text(self, request: Request, choice: int) -> str:
        """Return the reasoning: frequent categories of the history, the chosen candidate, and the reason for it."""
        history = [self.catalog.item(i) for i in recent(request.history, self.history)]
        chosen = self.catalog.item(choice)
        sid = sid_text(chosen.sid)
        return SENTENCE.format(
            habit=_habit(history), sid=sid, kind=_kind_or_title(chosen), why=_reason(chosen, history), best=sid
        )


def _habit(history: Sequence[Item]) -> str:
    """Name the two most frequent categories of the history, or its last title without categories."""
    counts = Counter(kind(item) for item in history if kind(item))
    names = [name for name, _ in counts.most_common(2)]
    if len(names) == 2:
        return HABITS["two"].format(one=names[0], other=names[1])
    return names[0] if names else HABITS["title"].format(title=shorten(history[-1].title, TITLE_CHARS))


def _reason(chosen: Item, history: Sequence[Item]) -> str:
    """Return the strongest reason for a candidate: brand, category, related category, or none of them."""
    related = max(history, key=lambda item: (overlap(chosen, item), item.brand == chosen.brand != ""))
    if chosen.brand and chosen.brand in {item.brand for item in history}:
        return REASONS["brand"].format(brand=chosen.brand)
    if overlap(chosen, related) == 1.0:
        return REASONS["kind"]
    if overlap(chosen, related) > 0:
        return REASONS["related"].format(other=kind(related))
    return REASONS["new"]


def _kind_or_title(item: Item) -> str:
    """Return the last category of an item, or its title without categories."""
    return kind(item) or shorten(item.title, TITLE_CHARS)


def true_statements(text: str, request: Request, catalog: Catalog, history: int) -> dict[str, bool]:
    """Check the statements of a reasoning text in the words of `RulesTeacher`, whoever wrote it.

    Args:
        text: the reasoning.
        request: the request. Its labels are not used.
        catalog: the items, with their semantic IDs.
        history: number of history items in the prompt.

    Returns:
        Three booleans. `habit`: the named categories are categories of the history. `kind`: the named category is that
        of the cited candidate. `why`: the reason is true. All are false if the text has another form. If several
        candidates have the cited semantic ID, the text is about the one for which most statements are true.
    """
    match = TEXT.fullmatch(text.strip())
    cited = [i for i in request.items if match is not None and sid_text(catalog.item(i).sid) == match["sid"]]
    if match is None or not cited:
        return dict.fromkeys(("habit", "kind", "why"), False)
    past = [catalog.item(i) for i in recent(request.history, max(history, 1))]
    return max((_true_statements(match, catalog.item(i), past) for i in cited), key=lambda each: sum(each.values()))


def _true_statements(match: re.Match[str], chosen: Item, past: Sequence[Item]) -> dict[str, bool]:
    """Check the statements about one candidate, see `true_statements`."""
    kinds = {kind(item) for item in past} - {""} or {HABITS["title"].format(title=shorten(past[-1].title, TITLE_CHARS))}
    if match["brand"] is not None:
        why = match["brand"] == chosen.brand and chosen.brand in {item.brand for item in past}
    elif match["other"] is not None:
        why = any(kind(item) == match["other"] and overlap(chosen, item) > 0 for item in past)
    else:
        closest = max(overlap(chosen, item) for item in past)
        new = closest == 0 and chosen.brand not in {item.brand for item in past} - {""}
        why = closest == 1.0 if match["why"] == REASONS["kind"] else new
    pairs = {HABITS["two"].format(one=one, other=other) for one in kinds for other in kinds}
    return {
        "habit": match["habit"] in kinds | pairs,
        "kind": match["kind"] == _kind_or_title(chosen),
        "why": why,
    }


def phrases() -> list[str]:
    """Return the fixed words of the teachers, which a trimmed vocabulary has to contain.

    The placeholders `A` and `B` stand for a category, a brand or a title. `<` is the first character of a semantic ID.
    """
    reasons = {name: reason.format_map({"brand": "A", "other": "A"}) for name, reason in REASONS.items()}
    habit = HABITS["two"].format(one="A", other="B")
    sentence = SENTENCE.format(habit=habit, sid="<", kind="A", why=reasons.pop("brand"), best="<")
    head, mark, rest = sentence.partition("<")
    return [
        head + mark,
        rest,
        *(REASON.format(why=reason) for reason in reasons.values()),
        " " + HABITS["title"].format(title="A"),
        HINT.format(label="A"),
    ]
