"""Records that the modules of this package exchange.

Shape letters used across the package: B requests, T history, K candidates, L levels, C codes, D dimensions, F features
of a candidate, P features of a candidate-history pair, R recent history items, U users, V vocabulary, N items, G group,
O output tokens. Ranks start at 1, positions at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from recbole_gr2.bridge.data import Data
    from recbole_gr2.config import Settings

Sid = tuple[int, ...]
RECENT = 10  # R, the number of most recent history items that features compare a candidate with. Our choice.


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item of the catalogue.

    Attributes:
        item_id: RecBole's internal id, at least 1; 0 is padding.
        token: the id in the data files.
        title: cleaned title, may be empty.
        categories: cleaned category path such as `Beauty > Makeup`, may be empty.
        brand: cleaned brand, may be empty.
        description: the beginning of a longer text. Only the text encoder reads it.
        sid: semantic ID, or () before the tokenizer stage.
    """

    item_id: int
    token: str
    title: str
    categories: str = ""
    brand: str = ""
    description: str = ""
    sid: Sid = ()


class Candidate(NamedTuple):
    """One entry of a candidate list: its base-model score and its rank by that score, from 1."""

    item_id: int
    score: float
    rank: int


class SourceScores(NamedTuple):
    """What one of several base models says of the candidates of a list.

    Attributes:
        name: name of the base model.
        ranks: rank of each candidate among all unmasked items by this model, from 1, (K,).
        scores: its score of each candidate, standardised over the unmasked items, (K,).
    """

    name: str
    ranks: tuple[int, ...]
    scores: tuple[float, ...]


class CandidateFeatures(NamedTuple):
    """Features of one candidate list.

    Attributes:
        candidates: F features of each candidate, (K, F) float32.
        pairs: P features of each candidate with each of the last R history items, newest first, (K, R, P) float16. R is
            smaller than `RECENT` for a shorter history.
    """

    candidates: np.ndarray
    pairs: np.ndarray

    @property
    def padded(self) -> np.ndarray:
        """The pair features, filled with 0 where the history is shorter than RECENT, (K, RECENT, P)."""
        return np.pad(self.pairs, ((0, 0), (0, RECENT - self.pairs.shape[1]), (0, 0)))


@dataclass(frozen=True, kw_only=True)
class Request:
    """One candidate list to re-rank.

    The target and the grades are labels. They are used for training targets, rewards and metrics, and never reach a
    prompt, a feature or a score. Re-rankers receive requests without them, see `without_labels`.

    Attributes:
        request_id: unique name, `<split>/<user token>`.
        user_token: the user's id in the data files.
        split: train, valid or test.
        history: item ids of the user's earlier interactions, oldest first.
        candidates: the candidate list in base order.
        target: id of the item that the user interacted with next; 0 if it is withheld.
        provider: name of the model that proposed the candidates, or of the models, joined by " + ".
        sources: ranks and scores by each base model, if several proposed the candidates together; else ().
        prior: log-probability of each candidate under the prior, in base order, (K,); () without a prior.
        grades: relevance grade of each candidate in base order, (K,), in train lists with several or graded targets;
            else ().
        times: time of each history item in the unit of the data file; () if they are unknown.
        ranker: score of each candidate by the model of `cand_ranker: lambdamart`, in base order, (K,); () without it.
        features: features of the candidates, or None where the prior stage did not compute them.
    """

    request_id: str
    user_token: str
    split: str
    history: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    target: int
    provider: str
    sources: tuple[SourceScores, ...] = ()
    prior: tuple[float, ...] = ()
    grades: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    ranker: tuple[float, ...] = ()
    features: CandidateFeatures | None = field(default=None, compare=False, repr=False)

    @cached_property
    def items(self) -> tuple[int, ...]:
        """Candidate item ids in base order, (K,)."""
        return tuple(c.item_id for c in self.candidates)

    @property
    def by_prior(self) -> tuple[int, ...]:
        """Candidate item ids by descending prior, (K,). Ties, and all items without a prior, keep the base order."""
        return self._sorted_by(self.prior)

    @property
    def by_ranker(self) -> tuple[int, ...]:
        """Candidate item ids by descending score of `ranker`, (K,). Ties, and all without one, keep the base order."""
        return self._sorted_by(self.ranker)

    def _sorted_by(self, scores: Sequence[float]) -> tuple[int, ...]:
        items = self.items
        order = sorted(range(len(scores)), key=lambda position: -scores[position])
        return tuple(items[position] for position in order) or items

    @property
    def target_rank(self) -> int | None:
        """Rank of the target in the base order, from 1; None if the list does not contain it."""
        items = self.items
        return items.index(self.target) + 1 if self.target in items else None

    @property
    def relevance(self) -> tuple[int, ...]:
        """Relevance of each candidate in base order, (K,): its grade, or 1 for the target and 0 for the others."""
        return self.grades or tuple(int(item == self.target) for item in self.items)

    @property
    def has_signal(self) -> bool:
        """Whether the list contains its target and candidates of different relevance."""
        return self.target in self.items and len(set(self.relevance)) > 1

    def sorted_by_grade(self, ranking: Sequence[int]) -> tuple[int, ...]:
        """Sort a ranking of the candidates by descending relevance. Equal candidates keep their order."""
        relevance = dict(zip(self.items, self.relevance, strict=True))
        return tuple(sorted(ranking, key=lambda item: -relevance[item]))

    def shortlist(self, items: Sequence[int]) -> Request:
        """Return a copy whose candidates are some of the items, in base order and with new ranks.

        The prior is normalised over the remaining candidates.

        Args:
            items: item ids of at least two candidates.
        """
        chosen = set(items)
        kept = [position for position, item in enumerate(self.items) if item in chosen]
        return replace(
            self,
            candidates=tuple(
                self.candidates[position]._replace(rank=rank) for rank, position in enumerate(kept, start=1)
            ),
            prior=_log_softmax([self.prior[position] for position in kept]) if self.prior else (),
            grades=tuple(self.grades[position] for position in kept) if self.grades else (),
            ranker=tuple(self.ranker[position] for position in kept) if self.ranker else (),
            sources=tuple(
                SourceScores(name, tuple(ranks[p] for p in kept), tuple(scores[p] for p in kept))
                for name, ranks, scores in self.sources
            ),
            features=self.features and CandidateFeatures(self.features.candidates[kept], self.features.pairs[kept]),
        )

    def without_labels(self) -> Request:
        """Return a copy whose target is 0 and whose grades are ()."""
        return replace(self, target=0, grades=())


def _log_softmax(values: Sequence[float]) -> tuple[float, ...]:
    highest = max(values)
    total = highest + math.log(math.fsum(math.exp(value - highest) for value in values))
    return tuple(value - total for value in values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recommendations:
    """The first items of a recommender's ranking of the whole catalogue, for each user of a split.

    Attributes:
        users: user tokens, (U,).
        items: the first D item ids, best first, (U, D) int32. 0 fills the places of items that the recommender did not
            propose or that are masked.
        target_rank: rank of the target among all unmasked items, from 1, (U,) int32; 0 if the recommender did not
            propose it.
        exclude_seen: whether items of the user's history are masked.
    """

    users: tuple[str, ...]
    items: np.ndarray
    target_rank: np.ndarray
    exclude_seen: bool


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A request as chat messages.

    Attributes:
        messages: system and user message, each with `role` and `content`.
        labels: label token of each shown candidate, (K,).
        order: base position of each shown candidate, (K,): `labels[i]` belongs to the candidate at `order[i]`.
    """

    request_id: str
    messages: tuple[dict[str, str], ...]
    labels: tuple[str, ...]
    order: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A re-ranker's answer to one request.

    Attributes:
        ranking: item ids, best first: a permutation of the request's candidates.
        status: `ok`; `repaired` (labels missing, repeated or foreign); `truncated` (the reasoning reached its token
            limit); `unreadable` (no usable label; the ranking is the base order).
        reasoning: the text before the ranking, may be empty.
        missing: number of candidates that the answer did not rank.
        repeated: number of labels that occurred more than once.
        foreign: number of labels or items that are not candidates.
        output_tokens: number of generated tokens.
        first_choice: probability of each candidate to be ranked first, in base order, (K,); () if the method has none.
            A language model has it after its reasoning. It is not stored.
    """

    request_id: str
    ranking: tuple[int, ...]
    status: str = "ok"
    reasoning: str = ""
    missing: int = 0
    repeated: int = 0
    foreign: int = 0
    output_tokens: int = 0
    first_choice: tuple[float, ...] = ()


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
    """Whether items that share codes have the same category, over pairs of items. Random levels are left out.

    Attributes:
        items: number of items that have a category.
        pairs: number of pairs of items that share their first l + 1 codes, for each level l.
        same_path: share of these pairs with the same category, for each level. None if there is no such pair.
        same_top: share of these pairs with the same first two parts of the category, for each level. None if there is
            no such pair.
        random_path: share of all pairs with the same category. Codes without meaning have this expected value.
        random_top: share of all pairs with the same first two parts of the category.
    """

    items: int
    pairs: tuple[int, ...]
    same_path: tuple[float | None, ...]
    same_top: tuple[float | None, ...]
    random_path: float
    random_top: float


@dataclass(frozen=True, kw_only=True)
class Health:
    """Quality of semantic IDs.

    Attributes:
        items: N, number of items.
        uniqueness: number of distinct semantic IDs divided by N, 0 to 1.
        uniqueness_without_random_level: the same for the nearest codes, before random last levels.
        largest_collision: largest number of items with the same semantic ID.
        used_codes: number of codes in use, for each level.
        entropy: entropy of the code shares in bits, 0 to log2 C, for each level.
        reconstruction: mean cosine of the embeddings and the embeddings decoded from the nearest codes.
        neighbourhood: whether items that share codes have the same category. None without categories.
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
    """The manifest of a finished stage.

    Attributes:
        stage: name of the stage.
        key: hash of everything that determines the result; the name of the stage's folder.
        version: version of the stage's code.
        needs: keys of the stages whose files the stage read, by name.
        settings: the settings that are part of the key.
        seconds: wall time of all starts, in seconds. An interrupted start counts up to the last file that it wrote.
        peak_memory_mb: largest resident memory of the last start, in MiB.
        summary: the figures that the stage reports.
        files: the files that the stage wrote: path relative to its folder -> `bytes` and `sha256`.
        code: package version and commit, see `recbole_gr2.store.code_version`.
        sources: hash of the package sources that the stage uses, see `recbole_gr2.store.source_hash`.
    """

    stage: str
    key: str
    version: int
    needs: dict[str, str]
    settings: dict[str, Any]
    seconds: float
    peak_memory_mb: float
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    code: str = ""
    sources: str = ""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a stage and a re-ranker get.

    Attributes:
        stage: name of the stage.
        settings: settings of the run.
        data: the data set.
        folder: folder of the stage. It exists and contains the files of an interrupted start.
        inputs: manifests of the stages that this stage needs, by name.
        folders: folders of the stages that this stage needs, by name.
        say: prints one progress line.
        parameters: parameters of a variant of the stage.
    """

    stage: str
    settings: Settings
    data: Data
    folder: Path
    inputs: Mapping[str, StageRecord]
    folders: Mapping[str, Path]
    say: Callable[[str], None]
    parameters: Mapping[str, Any] = field(default_factory=dict)


def _no_values(settings: Settings) -> dict[str, Any]:
    return {}


def _no_check(settings: Settings) -> None:
    return None


def _no_data_check(settings: Settings, data: Data) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step of a run. Its output folder is cached under a hash of everything that determines the output.

    Attributes:
        name: name in the plan, and of the folder that contains the stage's outputs.
        version: part of the key. Increase it if a change of the code can change the output.
        run: writes the files of the stage to `context.folder` and returns its summary, a dictionary for the manifest.
        settings: prefixes of the settings that can change the output.
        excluded: settings with such a prefix that cannot change it.
        needs: names of the stages whose folders it reads.
        key_values: returns further values of the key, such as hashes of files that settings name.
        check: raises a ConfigurationError if the stage cannot run with the settings. It is called before any data is
            loaded.
        check_data: raises an error if the stage cannot run on the data set, or needs a package or file that is missing.
            It is called for each stage that a run computes, before the first of them runs.
        parameters: parameters of a variant; `context.parameters` contains them.
        distributed: whether several processes run the stage together. If not, the first one runs it alone.
        modules: further modules whose sources the stage uses, see `recbole_gr2.store.source_hash`.
        unused_modules: modules that the stage's module imports, but that cannot change its output.
        amount: the setting that the time of the stage is proportional to, for the estimate of a plan; "" for none.
        tokens: returns the most tokens that a language model is trained on, for the estimate of a plan without earlier
            runs. None for a stage without such a number.
    """

    name: str
    version: int
    run: Callable[[Context], dict[str, Any]]
    settings: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    key_values: Callable[[Settings], Mapping[str, Any]] = _no_values
    check: Callable[[Settings], None] = _no_check
    check_data: Callable[[Settings, Data], None] = _no_data_check
    parameters: Mapping[str, Any] = field(default_factory=dict)
    distributed: bool = False
    modules: tuple[str, ...] = ()
    unused_modules: tuple[str, ...] = ()
    amount: str = ""
    tokens: Callable[[Settings], int] | None = None
