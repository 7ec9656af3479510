"""The test lists of a run in words: history, candidates, and what each method made of them.

`recbole-gr2 show` prints the list of a user. The report has those of a sample of users.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from recbole_gr2.artifacts import numbered_requests, read_answers
from recbole_gr2.bridge.data import read_item_texts
from recbole_gr2.catalog import Catalog
from recbole_gr2.config import Settings, read_yaml, recbole_properties
from recbole_gr2.errors import ConfigurationError, MissingFileError, nearest
from recbole_gr2.inspection import with_titles
from recbole_gr2.lists import selected
from recbole_gr2.preflight import PACKAGED_DATASET
from recbole_gr2.prompts import recent
from recbole_gr2.ranking import complete, promote
from recbole_gr2.rerankers.base import stage_name
from recbole_gr2.store import read_lines
from recbole_gr2.teachers import true_statements
from recbole_gr2.types import Answer, Item, Request


def ranking_methods(result: Mapping[str, Any]) -> list[str]:
    """Return the methods of a run that rank the candidates, in the order of the tables.

    Args:
        result: content of result.json.
    """
    return [entry["method"] for entry in result["methods"] if entry["scope"] == "hit_users"]


def describe(
    result: Mapping[str, Any], stages: Mapping[str, Path], settings: Settings, user: str, method: str | None = None
) -> dict[str, Any]:
    """Return the test list of a user and the answers of the methods of a run.

    Args:
        result: result.json of a run of one seed.
        stages: the folders of its stages.
        settings: its settings.
        user: token of the user.
        method: the only method to describe; by default all that ranked the list.

    Returns:
        `user`; `request`; `history`, the last items, oldest first, and `earlier`, the number of items before them;
        `target`; `candidates` in base order, each with `rank`, and `ranks` by method; `not_ranked`, the methods that
        did not rank this list, and `ranked_users`, up to three users with a list that the first of these methods
        ranked; `answers` by method: `status`, `order` (item tokens, best first), `reasoning` (with titles) and
        `statements`, true or false by kind, or None without reasoning or if they cannot be checked.

    Raises:
        ConfigurationError: there is no such user or method.
        MissingFileError: the item file is missing.
    """
    known = ranking_methods(result)
    if method is not None and method not in known:
        near = nearest(method, known)
        raise ConfigurationError(
            f"the run has no method {method!r:.200} that ranks the candidates",
            where="--method",
            why="only a method of the run has rankings",
            do=(f"did you mean {' or '.join(near)}? " if near else "") + f"Choose from {', '.join(known)}",
        )
    return next(described(result, stages, settings, [user], method))


def described(
    result: Mapping[str, Any],
    stages: Mapping[str, Path],
    settings: Settings,
    users: Sequence[str],
    method: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield what `describe` returns for each of several users, in their order. Each file is read once.

    Raises:
        ConfigurationError: a user has no test list.
        MissingFileError: the item file is missing.
    """
    known = ranking_methods(result)
    catalog = read_items(stages["tokenizer"], settings)
    requests = _read_requests(stages["prior"] / f"{result['split']}.jsonl", catalog, users)
    answers = {name: read_answers(stages[stage_name(name)], catalog) for name in known if stage_name(name) in stages}
    for user in users:
        request = requests[user]
        ranked = {
            name: _listed(answers[name][request.request_id], request, settings)
            if name in answers
            else _ordered(name, request)
            for name in known
            if name not in answers or request.request_id in answers[name]
        }
        chosen = {name: each for name, each in ranked.items() if method in (None, name)}
        missing = [name for name in known if method in (None, name) and name not in ranked]
        others = _ranked_users(stages["prior"] / f"{result['split']}.jsonl", answers[missing[0]]) if missing else []
        yield {**_list(request, chosen, catalog, settings), "not_ranked": missing, "ranked_users": others}


def _ranked_users(file: Path, answers: Mapping[str, Answer]) -> list[str]:
    """Up to three users of a file of lists whose lists have an answer."""
    return list(islice((str(line["user_id"]) for line in read_lines(file) if line["request_id"] in answers), 3))


@dataclass(frozen=True, kw_only=True)
class _Ranked:
    """What a method made of a list: the order of all items, and the items that a language model read."""

    order: tuple[int, ...]
    read: tuple[int, ...]
    status: str = "ok"
    reasoning: str = ""


def _ordered(method: str, request: Request) -> _Ranked:
    """The order of a method that needs no stage."""
    orders = {
        "base": request.items,
        "prior": request.by_prior,
        "oracle": promote(request.items, request.target) if request.target_rank else request.items,
    }
    return _Ranked(order=orders[method], read=request.items)


def _listed(answer: Answer, request: Request, settings: Settings) -> _Ranked:
    """The answer of a method, completed to all items of the list."""
    candidates, others = selected(request, settings)
    return _Ranked(
        order=complete(answer.ranking, candidates + others),
        read=answer.ranking[: settings["cand_num"]],
        status=answer.status,
        reasoning=answer.reasoning,
    )


def _list(request: Request, answers: Mapping[str, _Ranked], catalog: Catalog, settings: Settings) -> dict[str, Any]:
    """A list with answers, see `describe`."""
    history = recent(request.history, max(settings["prompt_history"], 1))
    checkable = settings["trace_teacher"] == "rules"

    def item(number: int) -> dict[str, Any]:
        found = catalog.item(number)
        return {"item": found.token, "title": found.title, "sid": list(found.sid)}

    return {
        "user": request.user_token,
        "request": request.request_id,
        "earlier": len(request.history) - len(history),
        "history": [item(number) for number in history],
        "target": {**item(request.target), "rank": request.target_rank},
        "candidates": [
            {
                **item(number),
                "rank": rank,
                "target": number == request.target,
                "ranks": {name: answer.order.index(number) + 1 for name, answer in answers.items()},
            }
            for rank, number in enumerate(request.items, start=1)
        ],
        "answers": {
            name: {
                "status": answer.status,
                "order": list(catalog.tokens(answer.order)),
                "reasoning": with_titles(answer.reasoning, catalog),
                "statements": true_statements(
                    answer.reasoning, request.shortlist(answer.read), catalog, settings["prompt_history"]
                )
                if answer.reasoning and checkable
                else None,
            }
            for name, answer in answers.items()
        },
    }


def read_items(tokenizer: Path, settings: Settings) -> Catalog:
    """Return the catalogue of a run without loading its data set: its semantic IDs, and the texts of the `.item` file.

    Args:
        tokenizer: folder of the finished tokenizer stage, whose lines are in the order of the item ids.
        settings: settings of the run.

    Raises:
        MissingFileError: the `.item` file is missing.
    """
    dataset, properties = settings["dataset"], recbole_properties()
    folder = Path(settings["data_path"]) / dataset
    if dataset == PACKAGED_DATASET:
        folder = properties.parent / "dataset_example" / dataset
    if not (folder / f"{dataset}.item").is_file():
        raise MissingFileError(
            f"there are no item texts of the data set {dataset!r}",
            where=str(folder / f"{dataset}.item"),
            why="the titles of the items are read from this file",
            do="name the folder that contains the folder of the data set with --data_path DIR",
        )
    own = properties / "dataset" / f"{dataset}.yaml"  # RecBole's options of a data set that it knows
    options = {**(read_yaml(own.read_text(encoding="utf-8")) if own.is_file() else {}), **settings.recbole}
    texts = read_item_texts(
        folder / f"{dataset}.item",
        settings,
        item_field=options.get("ITEM_ID_FIELD", "item_id"),
        separator=options.get("field_separator", "\t"),
    )
    untitled: Mapping[str, str] = {"title": ""}
    return Catalog(
        Item(item_id=number, token=line["item_id"], sid=tuple(line["sid"]), **texts.get(line["item_id"], untitled))
        for number, line in enumerate(read_lines(tokenizer / "sids.jsonl"), start=1)
    )


def _read_requests(file: Path, catalog: Catalog, users: Sequence[str]) -> dict[str, Request]:
    """The test list of each user.

    Raises:
        ConfigurationError: a user has no test list.
    """
    requests = {request.user_token: request for _, request in numbered_requests(file, catalog, users=set(users))}
    for user in users:
        if user not in requests:
            known = [str(line["user_id"]) for line in read_lines(file)]
            near = nearest(user, known) or known[:3]
            raise ConfigurationError(
                f"the run has no test list of a user {user!r:.200}",
                where=str(file),
                why="a user without enough interactions, or without a test target, has no list",
                do=f"name another user, for example {', '.join(near)}",
            )
    return requests
