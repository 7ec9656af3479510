"""The vocabulary: frozen records that stages hand to each other.

Shape letters used across the package: B requests, T history, K candidates, L levels, C codes, D dim, G group,
V vocabulary, N items, P prompt tokens, O output tokens. Ranks start at 1, positions at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Sid = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item of the catalogue.

    `item_id` is RecBole's internal id (1-based, 0 is padding), `token` the id in the data files, `title` and
    `categories` cleaned text (either may be empty), `description` the beginning of a longer one, for the text encoder
    alone, `sid` its semantic ID or () before the tokenizer stage.
    """

    item_id: int
    token: str
    title: str
    categories: str = ""
    brand: str = ""
    description: str = ""
    sid: Sid = ()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One entry of a base model's list: its score there and its 1-based rank."""

    item_id: int
    score: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """One list to re-rank.

    `history` holds item ids, oldest first. `target` is the item the user took next: it is kept for training
    targets, rewards and metrics and never reaches a prompt, a feature or a score. So are `grades`: what each candidate
    is worth, in base order, in train lists with several targets or graded ones; else (). `prior` holds the evidence's
    log-probability of each candidate, in base order; () before the evidence stage, and without evidence. `facts` holds
    what a prompt shows of the evidence: the level of each candidate, 0 to 9, by the name of the fact; in base order, or
    () where nothing is shown.
    """

    request_id: str
    user_token: str
    split: str  # train | valid | test
    history: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    target: int
    provider: str
    prior: tuple[float, ...] = ()
    facts: tuple[Mapping[str, int], ...] = ()
    grades: tuple[int, ...] = ()

    @property
    def items(self) -> tuple[int, ...]:
        """Candidate item ids in base order, (K,)."""
        return tuple(c.item_id for c in self.candidates)

    @property
    def by_prior(self) -> tuple[int, ...]:
        """Candidate item ids in the order of the prior, ties and no prior in base order, (K,)."""
        order = sorted(range(len(self.prior)), key=lambda position: -self.prior[position])
        return tuple(self.items[position] for position in order) or self.items

    @property
    def target_rank(self) -> int | None:
        """1-based rank of the target in the base order; None if the list does not hold it."""
        return self.items.index(self.target) + 1 if self.target in self.items else None

    @property
    def gains(self) -> tuple[int, ...]:
        """What each candidate is worth in base order, (K,): its grade, or 1 for the target and 0 for the others."""
        return self.grades or tuple(int(item == self.target) for item in self.items)

    @property
    def teaches(self) -> bool:
        """Whether the list holds its target, and some candidate is worth more than another."""
        return self.target in self.items and len(set(self.gains)) > 1

    def by_gain(self, ranking: Sequence[int]) -> tuple[int, ...]:
        """A ranking of the candidates with those that are worth more first, else as it is."""
        gain = dict(zip(self.items, self.gains, strict=True))
        return tuple(sorted(ranking, key=lambda item: -gain[item]))


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A request as chat messages. `labels[i]` is the label token of the candidate at base position `order[i]`."""

    request_id: str
    messages: tuple[dict, ...]
    labels: tuple[str, ...]
    order: tuple[int, ...]
    template: str
    template_sha: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said, read back.

    `ranking` is always a full permutation of the request's candidates (item ids). `status` is `ok`, `repaired`
    (labels missing, repeated or foreign), `truncated` (the reasoning ran into its limit) or `unreadable` (no
    usable label at all: base order).
    """

    request_id: str
    ranking: tuple[int, ...]
    status: str
    reasoning: str = ""
    missing: int = 0
    repeated: int = 0
    foreign: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One reasoning trace by a teacher, with the ranking it argues for (item ids; () if it gave none)."""

    request_id: str
    teacher: str
    mode: str  # targeted | rejection
    reasoning: str
    ranking: tuple[int, ...]
    accepted: bool
    reason: str
    tries: int = 1


@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """Whether items that share codes are alike, counted over pairs of items; levels drawn at random are left out.

    `pairs[l]` pairs share their first l + 1 codes; `same_path[l]` of them have the same category, `same_top[l]` the
    same first two parts of it (shares; None where there is no pair). `random_path` and `random_top` are the same shares
    among all pairs of the `items` that have a category: what codes without meaning would reach.
    """

    items: int
    pairs: tuple[int, ...]
    same_path: tuple[float | None, ...]
    same_top: tuple[float | None, ...]
    random_path: float
    random_top: float


@dataclass(frozen=True, kw_only=True)
class Health:
    """How well an SID table keeps items apart, and alike ones together.

    `uniqueness` is distinct SIDs / items, `uniqueness_without_random_level` that of the nearest codes alone.
    `used_codes[l]` and `entropy[l]` (bits, 0..log2 C) describe level l. `reconstruction` is the mean cosine similarity
    of decoded and original embedding before random last levels. `neighbourhood` is None without categories.
    """

    items: int
    uniqueness: float
    uniqueness_without_random_level: float
    largest_collision: int
    used_codes: tuple[int, ...]
    entropy: tuple[float, ...]
    reconstruction: float
    neighbourhood: Neighbourhood | None = None


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """manifest.json of a finished stage.

    `seconds` is the wall time of all its starts, of those that were stopped up to the last file that they left;
    `peak_memory_mb` and `code`, as `recbole_gr2.store.code_version` writes it, are of the last start.
    """

    stage: str
    key: str
    version: int
    needs: dict[str, str]
    settings: dict
    seconds: float
    peak_memory_mb: float
    facts: dict = field(default_factory=dict)
    files: tuple[str, ...] = ()
    code: str = ""
