"""A finished run as a re-ranker of new lists: of other users, of other systems, and of items without interactions.

A new list takes the same way as a test list of the run: the base models score the candidates, features are computed
from the training interactions, the prior scores the features, and the method ranks the list.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from recbole_gr2.artifacts import load_catalog, read_embeddings, read_feature_names, request_id
from recbole_gr2.bridge.data import TEXTS, Data
from recbole_gr2.bridge.item_text import clean_text
from recbole_gr2.bridge.models import BaseModel
from recbole_gr2.bridge.scoring import check_histories, score_candidates
from recbole_gr2.catalog import Catalog
from recbole_gr2.config import Settings
from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.features.extraction import TrainingData, extract_features, make_describes
from recbole_gr2.features.prior import Priors, log_prior
from recbole_gr2.features.trees import load_trees, scores_of
from recbole_gr2.lists import ranks_by_trees
from recbole_gr2.llm.download import resolve
from recbole_gr2.llm.model import device
from recbole_gr2.recommenders import BASE, REFIT, load_fused_model
from recbole_gr2.rerankers.apply import fit, rank_pools
from recbole_gr2.rerankers.base import Reranker, stage_name
from recbole_gr2.sid.embed import HASH, embed_texts, hash_embeddings, item_text
from recbole_gr2.sid.methods import load_tokenizer
from recbole_gr2.sid.quantizer import assign_new
from recbole_gr2.sid.tokens import SID, sid_text
from recbole_gr2.types import Answer, Candidate, Context, Item, Request, SourceScores, StageRecord

UNRANKED = "unranked"


@dataclass(frozen=True, kw_only=True)
class CandidateList:
    """A list to re-rank.

    Attributes:
        history: item tokens of the user's interactions, oldest first.
        candidates: item tokens, best first.
        scores: a score of each candidate, higher is better, for example of the system that made the list. They define
            the base order. Without them the base models of the run score the candidates.
        times: time of each interaction of the history in the unit of the data file; None if they are unknown.
        sources: ranks and scores of each candidate by each base model of the run, as in the candidate files of a run.
            Without them the base models score the candidates.
        user: the user's id. It only names the list.
        items: texts of items that the data set does not contain, by token: `title`, and optionally `categories`,
            `brand` and `description`.
    """

    history: Sequence[str]
    candidates: Sequence[str]
    scores: Sequence[float] | None = None
    times: Sequence[float] | None = None
    sources: Mapping[str, Mapping[str, Sequence[float]]] | None = None
    user: str | None = None
    items: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reranked:
    """A re-ranked list.

    Attributes:
        ranking: all candidates as item tokens, best first. Unknown candidates keep the place that they had in the
            input.
        titles: title of each item of the ranking; "" for an unknown one.
        probabilities: probability of each item of the ranking to be ranked first; None for an item that the method did
            not compare with the others. Methods that give no probabilities have None for all items.
        reasoning: the reasoning of a language model, with titles in square brackets in the place of semantic IDs.
        status: as in `Answer.status`; `unranked` if the history or the candidates are not known, so that the list is
            as it was.
        unknown: item tokens of the history and of the candidates that are neither in the data set nor have a text.
    """

    ranking: tuple[str, ...]
    titles: tuple[str, ...]
    probabilities: tuple[float | None, ...]
    reasoning: str
    status: str
    unknown: tuple[str, ...]


class ListReranker:
    """A method of a finished run that ranks new lists.

    Args:
        settings: settings of the run.
        data: its data set.
        folders: folders of its stages, by name.
        records: manifests of its stages, by name.
        method: the re-ranker.
        say: prints a line of progress.

    Raises:
        ConfigurationError: the method cannot rank other lists than those of the run.
    """

    def __init__(
        self,
        settings: Settings,
        data: Data,
        folders: Mapping[str, Path],
        records: Mapping[str, StageRecord],
        method: type[Reranker],
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.method, self.say = settings, method, say
        self.run = Context(
            stage=stage_name(method.name),
            settings=settings,
            data=data,
            folder=folders.get(stage_name(method.name), folders["prior"]),
            inputs=records,
            folders=folders,
            say=say,
        )
        self._set_items(load_catalog(self.run), read_embeddings(folders["embeddings"]))

    @property
    def known(self) -> int:
        """Number of items of the data set. Items that were added have larger ids."""
        return self.run.data.item_count

    def _set_items(self, catalog: Catalog, embeddings: np.ndarray) -> None:
        """Set the items that lists may contain. Everything that depends on them is computed at its first use."""
        self.catalog, self.embeddings = catalog, embeddings
        for name in ("describes", "reranker", "_title_of"):
            self.__dict__.pop(name, None)

    @cached_property
    def describes(self) -> list[Any]:
        """The functions that compute the features of a list, from the interactions that test lists may use."""
        names = tuple(self.settings["prior_features"])
        if len(self.catalog) == self.known:
            return _describes_of_run(self.run.data, self.run.folders["embeddings"], names)
        return make_describes(names, _training_data(self.run.data, self.catalog, self.embeddings))

    @cached_property
    def prior(self) -> Priors:
        """The prior of the run."""
        return Priors.load(self.run.folders["prior"] / "prior.safetensors")

    @cached_property
    def reranker(self) -> Reranker:
        """The method, with what it has learned in the run."""
        data = copy.copy(self.run.data)
        data.__dict__["catalog"] = self.catalog
        # The catalogue has its semantic IDs, so that the folder of the tokenizer is not read.
        folders = {name: folder for name, folder in self.run.folders.items() if name != "tokenizer"}
        reranker = self.method(replace(self.run, data=data, folders=folders))
        if type(reranker).fit is not Reranker.fit and not reranker.load(self.run.folder):
            self.say(f"{self.method.name} stores nothing that it has learned, and is fitted again")
            fit(reranker, self.run)
        return reranker

    @cached_property
    def base_model(self) -> BaseModel:
        """The base models of the test lists, fused as in the run.

        Raises:
            ConfigurationError: the run has none, or one of them cannot score a history alone.
        """
        if self.settings["cand_file"]:
            raise ConfigurationError(
                "the run imported its candidate lists",
                where=f"cand_file {self.settings['cand_file']}",
                why="it has no base model that scores items",
                do="give the scores of the candidates, or use a run with base models",
            )
        base = load_fused_model(self.run, REFIT if self.settings["refit"] else BASE)
        check_histories(base)
        return base

    def rerank(self, lists: Sequence[CandidateList]) -> list[Reranked]:
        """Re-rank lists.

        Raises:
            ConfigurationError: a list is not valid, or a base model cannot score it.
        """
        given = {token: texts for each in lists for token, texts in each.items.items()}
        used = {token for each in lists for token in (*each.history, *each.candidates)}
        texts = self.run.data.item_texts
        unseen = {token: texts[token] for token in sorted(used & texts.keys()) if any(texts[token].values())}
        self.add_items({**unseen, **given})
        requests = {}
        for number, each in enumerate(lists):
            if (request := self._request(each, where=f"list {number + 1} of {len(lists)}")) is not None:
                requests[number] = request
        scored = self._scored(requests, lists)
        answers = dict(zip(scored, self.rank(list(scored.values())), strict=True))
        return [self._result(each, answers.get(number)) for number, each in enumerate(lists)]

    def rank(self, requests: Sequence[Request]) -> list[Answer]:
        """Return rankings of whole pools, see `rerankers.apply.rank_pools`.

        Args:
            requests: requests with their base order, sources and times. Features and prior are computed here.
        """
        requests = self._with_features(requests)
        return rank_pools(self.reranker, requests) if requests else []

    def add_items(self, texts: Mapping[str, Mapping[str, str]]) -> None:
        """Add items that the data set does not contain. An item gets a semantic ID from the embedding of its text.

        Items that the catalogue has already stay as they are.

        Args:
            texts: `title`, and optionally `categories`, `brand` and `description` of each item, by token.

        Raises:
            ConfigurationError: an item has no text, or a text of an unknown name.
        """
        items: list[Item] = []
        for token, named in texts.items():
            if token in self.catalog.id_of:
                continue
            given = dict(named) if isinstance(named, Mapping) else {}
            text = {name: clean_text(str(given.get(name) or "")) for name in TEXTS}
            if set(given) - set(TEXTS) or not any(text.values()):
                raise ConfigurationError(
                    f"the item {token!r} has the texts {named!r:.200}",
                    where="items",
                    why="an item that the data set does not contain is known by its texts only",
                    do=f"give at least one of {', '.join(TEXTS)}",
                )
            fields: dict[str, Any] = {"item_id": len(self.catalog) + len(items) + 1, "token": token, **text}
            items.append(Item(**fields))
        if not items:
            return
        embeddings = self._embed([item_text(item) for item in items])
        tokenizer = load_tokenizer(self.run.folders["tokenizer"], self.settings)
        codes = assign_new(tokenizer, embeddings, self.catalog.sids)
        added = [replace(item, sid=tuple(row)) for item, row in zip(items, codes.tolist(), strict=True)]
        self._set_items(Catalog([*self.catalog, *added]), np.concatenate([self.embeddings, embeddings]))

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        """The text embeddings of new items, by the encoder of the run."""
        if self.settings["sid_encoder"] == HASH:
            # Hashed embeddings weight a text by the frequencies of its n-grams in all texts.
            everything = [item_text(item) or item.token for item in self.run.data.catalog]
            return hash_embeddings([*everything, *texts])[len(everything) :]
        return embed_texts(texts, resolve(self.settings["sid_encoder"], where="sid_encoder"), device=device())

    def _request(self, given: CandidateList, *, where: str) -> Request | None:
        """The request of a list, with descending scores unless it has scores; None if there is nothing to rank.

        Raises:
            ConfigurationError: a candidate occurs twice, or scores, times or sources do not fit.
        """
        for name, tokens in (("history", given.history), ("candidates", given.candidates)):
            if isinstance(tokens, str) or not isinstance(tokens, Sequence):
                raise ConfigurationError(
                    f"{name} is {tokens!r:.100}, expected a list of item ids",
                    where=where,
                    why="each element is the id of an item",
                    do='write a list such as ["I1", "I2"]',
                )
        tokens, history = [str(token) for token in given.candidates], [str(token) for token in given.history]
        count = len(tokens)
        scores = _numbers(given.scores, "scores", where) or [-float(n) for n in range(count)]
        times = _numbers(given.times, "times", where)
        problems = {
            "a candidate occurs twice": len(set(tokens)) < count,
            f"{len(scores)} scores for {count} candidates": len(scores) != count,
            "a score or a time is not a finite number": not all(map(math.isfinite, [*scores, *(times or ())])),
            f"{len(times or ())} times for {len(history)} items of the history": times is not None
            and len(times) != len(history),
            f"ranks and scores by base models do not fit {count} candidates": any(
                len(values["ranks"]) != count or len(values["scores"]) != count
                for values in (given.sources or {}).values()
            ),
        }
        for problem, found in problems.items():
            if found:
                raise ConfigurationError(
                    problem,
                    where=where,
                    why="a list has each candidate once, one score for each, and one time for each item of its history",
                    do="correct the list",
                )
        id_of = self.catalog.id_of
        places = [place for place in range(count) if tokens[place] in id_of]
        places.sort(key=lambda place: -scores[place])
        read = [place for place, token in enumerate(history) if token in id_of]
        if len(places) < 2 or not any(id_of[history[place]] <= self.known for place in read):
            return None
        user = given.user
        content = json.dumps([history, tokens, scores])
        name = hashlib.sha256(content.encode()).hexdigest()[:12] if user is None else user
        return Request(
            request_id=request_id("test", name),
            user_token=name,
            split="test",
            history=tuple(id_of[history[place]] for place in read),
            times=() if times is None else tuple(times[place] for place in read),
            candidates=tuple(
                Candidate(item_id=id_of[tokens[place]], score=scores[place], rank=rank)
                for rank, place in enumerate(places, start=1)
            ),
            sources=tuple(
                SourceScores(
                    source,
                    tuple(int(values["ranks"][place]) for place in places),
                    tuple(float(values["scores"][place]) for place in places),
                )
                for source, values in (given.sources or {}).items()
            ),
            target=0,
            provider="",
        )

    def _scored(self, requests: Mapping[int, Request], lists: Sequence[CandidateList]) -> dict[int, Request]:
        """The requests with what the base models say about their candidates, where the list does not say it.

        Lists without scores are sorted by those of the base models, unless the lists of the run were imported.
        """
        imported = bool(self.settings["cand_file"])
        needs_sources = "sources" in self.settings["prior_features"] and len(self.settings["base_model"]) > 1
        pending = {
            number: request
            for number, request in requests.items()
            if not imported and (lists[number].scores is None or (needs_sources and not request.sources))
        }
        if not pending:
            return dict(requests)
        found = score_candidates(
            self.base_model,
            [[item for item in request.history if item <= self.known] for request in pending.values()],
            [request.items for request in pending.values()],
        )
        scored = dict(requests)
        for (number, request), (scores, sources) in zip(pending.items(), found, strict=True):
            order = list(range(len(scores)))
            if lists[number].scores is None:
                order.sort(key=lambda place: -scores[place])
                candidates = [request.candidates[place]._replace(score=scores[place]) for place in order]
            else:
                candidates = list(request.candidates)
            scored[number] = replace(
                request,
                candidates=tuple(each._replace(rank=rank) for rank, each in enumerate(candidates, start=1)),
                sources=tuple(
                    SourceScores(name, tuple(ranks[p] for p in order), tuple(values[p] for p in order))
                    for name, ranks, values in sources
                )
                or request.sources,
            )
        return scored

    def _with_features(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with features, prior and the scores of `cand_ranker`."""
        names = self.settings["prior_features"]
        if not names or not requests:
            return list(requests)
        labels, features = extract_features(requests, names, self.describes)
        expected = read_feature_names(self.run.folders["prior"])
        if labels != expected:
            raise GR2Error(
                f"the features of the lists are {labels}, and those of the run {expected}",
                where=f"prior_features {list(names)}",
                why="the prior cannot read other features",
                do="give `sources` with the names of the base models of the run, or leave them out",
            )
        trees: list[list[float]] = [[]] * len(requests)
        if ranks_by_trees(self.settings):
            trees = scores_of(self.trees, features)
        return [
            replace(request, features=each, prior=tuple(row), ranker=tuple(ranker))
            for request, each, row, ranker in zip(
                requests, features, log_prior(self.prior, features), trees, strict=True
            )
        ]

    @cached_property
    def trees(self) -> Any:
        """LambdaMART as it selects the candidates of the run.

        Raises:
            MissingFileError: the run is of a version that did not store it.
        """
        return load_trees(self.run.folders["prior"], do="repeat the command of the run with --from_stage prior")

    def _result(self, given: CandidateList, answer: Answer | None) -> Reranked:
        """The answer in item tokens, with the unknown candidates at their places in the input."""
        tokens, id_of = [str(token) for token in given.candidates], self.catalog.id_of
        everything = dict.fromkeys([*map(str, given.history), *tokens])
        unknown = tuple(token for token in everything if token not in id_of)
        if answer is None:
            ranking, chances = tokens, {}
        else:
            ranked = iter(self.catalog.tokens(answer.ranking))
            ranking = [next(ranked) if token in id_of else token for token in tokens]
            chances = dict(zip(self.catalog.tokens(answer.ranking), answer.first_choice, strict=False))
        return Reranked(
            ranking=tuple(ranking),
            titles=tuple(self.catalog.item(id_of[token]).title if token in id_of else "" for token in ranking),
            probabilities=tuple(chances.get(token) for token in ranking),
            reasoning="" if answer is None else self.with_titles(answer.reasoning),
            status=UNRANKED if answer is None else answer.status,
            unknown=unknown,
        )

    def with_titles(self, reasoning: str) -> str:
        """Return a reasoning with titles in square brackets in the place of semantic IDs."""
        return SID.sub(lambda match: self._title_of.get(match[0], match[0]), reasoning).strip()

    @cached_property
    def _title_of(self) -> dict[str, str]:
        return {sid_text(item.sid): f"[{item.title or item.token}]" for item in self.catalog}


def _numbers(values: Sequence[float] | None, name: str, where: str) -> list[float] | None:
    """The values as floats. Raises a ConfigurationError if one is no number."""
    try:
        return None if values is None else list(map(float, values))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{name} cannot be read: {error}",
            where=where,
            why="they are numbers, and times have the unit of the data file",
            do=f"give a list of numbers as {name}",
        ) from error


def _training_data(data: Data, catalog: Catalog, embeddings: np.ndarray) -> TrainingData:
    """What the features of a test list are computed from."""
    known = "refit" if data.settings["refit"] else "train"
    return TrainingData(
        catalog=catalog, sequences=data.known_items(known), times=data.known_times(known), embeddings=embeddings
    )


@lru_cache(maxsize=2)
def _describes_of_run(data: Data, folder: Path, names: tuple[str, ...]) -> list[Any]:
    """The functions that compute the features of lists without new items. All methods of a run share them.

    Args:
        data: the data set of the run.
        folder: folder of its embeddings.
        names: names of the feature providers.
    """
    return make_describes(names, _training_data(data, data.catalog, read_embeddings(folder)))
