"""`recbole-gr2 show`: one candidate list, and what each method of a run made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recbole_gr2.commands.output import AsJson, CheckpointDir, DataPath, Run, print_json, print_table
from recbole_gr2.errors import ConfigurationError, MissingFileError, nearest
from recbole_gr2.runs import find_run, finished_stages, one_seed, read_result

if TYPE_CHECKING:
    from recbole_gr2.catalog import Catalog
    from recbole_gr2.config import Settings
    from recbole_gr2.types import Answer, Request

TITLE_CHARS = 60


def show(
    run: Run,
    user: Annotated[str, typer.Argument(metavar="USER", help="Id of a user, as in the data files.")],
    method: Annotated[str | None, typer.Option("--method", metavar="NAME", help="Only this method.")] = None,
    data_path: DataPath = None,
    checkpoint_dir: CheckpointDir = "saved",
    as_json: AsJson = False,
) -> None:
    """Show the test list of a user: history, candidates, the order of each method, and its reasoning.

    In the reasoning, titles replace the semantic IDs. Statements are checked if the traces of the run are those of the
    rules teacher, because only its sentences can be checked. Nothing is trained.

    \b
    Examples:
      recbole-gr2 show latest 196
      recbole-gr2 show first A2CG5Y82ZZNY6W --method rl --data_path data
      recbole-gr2 show first 196 --json
    """
    folder = one_seed(find_run(run, checkpoint_dir))
    stages = finished_stages(folder)
    from recbole_gr2.config import load_settings

    moved = {} if data_path is None else {"data_path": data_path}
    settings = load_settings(config_files=[folder / "config.yaml"], command_line=moved)
    shown = describe(read_result(folder), stages, settings, user, method)
    if as_json:
        print_json({"run": str(folder), **shown})
    else:
        _print(shown)


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
        did not rank this list; `answers` by method: `status`, `order` (item tokens, best first), `reasoning` (with
        titles) and `statements`, true or false by kind, or None without reasoning or if they cannot be checked.

    Raises:
        ConfigurationError: there is no such user or method.
        MissingFileError: the item file is missing.
    """
    known = [entry["method"] for entry in result["methods"] if entry["scope"] == "hit_users"]
    if method is not None and method not in known:
        near = nearest(method, known)
        raise ConfigurationError(
            f"the run has no method {method!r:.200} that ranks the candidates",
            where="--method",
            why="only a method of the run has rankings",
            do=(f"did you mean {' or '.join(near)}? " if near else "") + f"Choose from {', '.join(known)}",
        )
    from recbole_gr2.inspection import with_titles
    from recbole_gr2.prompts import recent
    from recbole_gr2.teachers import true_statements

    catalog = read_items(stages["tokenizer"], settings)
    request = _read_request(stages["prior"] / "test.jsonl", catalog, user)
    answers = {name: answer for name in known if (answer := _answer(name, request, stages, catalog, settings))}
    chosen = {name: answer for name, answer in answers.items() if method in (None, name)}
    history = recent(request.history, max(settings["prompt_history"], 1))
    checkable = settings["trace_teacher"] == "rules"

    def item(number: int) -> dict[str, Any]:
        found = catalog.item(number)
        return {"item": found.token, "title": found.title, "sid": list(found.sid)}

    return {
        "user": user,
        "request": request.request_id,
        "earlier": len(request.history) - len(history),
        "history": [item(number) for number in history],
        "target": {**item(request.target), "rank": request.target_rank},
        "candidates": [
            {
                **item(number),
                "rank": rank,
                "target": number == request.target,
                "ranks": {name: answer.order.index(number) + 1 for name, answer in chosen.items()},
            }
            for rank, number in enumerate(request.items, start=1)
        ],
        "not_ranked": [name for name in known if method in (None, name) and name not in answers],
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
            for name, answer in chosen.items()
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
    from recbole_gr2.bridge.data import read_item_texts
    from recbole_gr2.catalog import Catalog
    from recbole_gr2.config import read_yaml, recbole_properties
    from recbole_gr2.preflight import PACKAGED_DATASET
    from recbole_gr2.store import read_lines
    from recbole_gr2.types import Item

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


def _read_request(file: Path, catalog: Catalog, user: str) -> Request:
    """The test list of a user.

    Raises:
        ConfigurationError: the user has no test list.
    """
    from recbole_gr2.artifacts import numbered_requests

    users = []
    for _, request in numbered_requests(file, catalog):
        if request.user_token == user:
            return request
        users.append(request.user_token)
    near = nearest(user, users) or users[:3]
    raise ConfigurationError(
        f"the run has no test list of a user {user!r:.200}",
        where=str(file),
        why="a user without enough interactions, or without a test target, has no list",
        do=f"name another user, for example {', '.join(near)}",
    )


@dataclass(frozen=True, kw_only=True)
class _Ranked:
    """What a method made of a list: the order of all items, and the items that a language model read."""

    order: tuple[int, ...]
    read: tuple[int, ...]
    status: str = "ok"
    reasoning: str = ""


def _answer(
    method: str, request: Request, stages: Mapping[str, Path], catalog: Catalog, settings: Settings
) -> _Ranked | None:
    """The answer of a method, None if it did not rank this list."""
    from recbole_gr2.lists import selected
    from recbole_gr2.ranking import complete, promote
    from recbole_gr2.rerankers.base import stage_name

    stage = stages.get(stage_name(method))
    if stage is None:
        orders = {
            "base": request.items,
            "prior": request.by_prior,
            "oracle": promote(request.items, request.target) if request.target_rank else request.items,
        }
        return _Ranked(order=orders[method], read=request.items)
    answer = _read_answer(stage / "rankings.jsonl", request.request_id, catalog)
    if answer is None:
        return None
    candidates, others = selected(request, settings)
    return _Ranked(
        order=complete(answer.ranking, candidates + others),
        read=answer.ranking[: settings["cand_num"]],
        status=answer.status,
        reasoning=answer.reasoning,
    )


def _read_answer(file: Path, request_id: str, catalog: Catalog) -> Answer | None:
    from recbole_gr2.store import read_lines
    from recbole_gr2.types import Answer

    for line in read_lines(file):
        if line["request_id"] == request_id:
            return Answer(**{**line, "ranking": catalog.ids(line["ranking"])})
    return None


def _print(shown: Mapping[str, Any]) -> None:
    from recbole_gr2.prompts import shorten

    def title(item: Mapping[str, Any]) -> str:
        return shorten(item["title"], TITLE_CHARS)

    def sid(item: Mapping[str, Any]) -> str:
        return " ".join(map(str, item["sid"]))

    print(f"user {shown['user']}, list {shown['request']}\n")
    if shown["earlier"]:
        print(f"The {len(shown['history'])} last items of the history, after {shown['earlier']} earlier ones:")
    print_table(["history", "title", "semantic ID"], [[i["item"], title(i), sid(i)] for i in shown["history"]])
    target = shown["target"]
    place = f"rank {target['rank']} of the base order" if target["rank"] else "not among the candidates"
    print(f"\ntarget: {target['item']}, {title(target)} ({place})\n")
    methods = list(shown["answers"])
    print_table(
        [*methods, "candidate", "title", "semantic ID", "target"],
        [
            [
                *(str(candidate["ranks"][name]) for name in methods),
                candidate["item"],
                title(candidate),
                sid(candidate),
                "target" if candidate["target"] else "",
            ]
            for candidate in shown["candidates"]
        ],
    )
    if shown["not_ranked"]:
        print(f"\nnot ranked by {', '.join(shown['not_ranked'])}: eval_scope and eval_max_lists choose the lists")
    for name, answer in shown["answers"].items():
        if answer["reasoning"]:
            print(f"\n{name}, {answer['status']}: {answer['reasoning']}")
            if answer["statements"] is None:
                print("  not checked: only sentences of the rules teacher can be checked")
            else:
                checks = [f"{kind} {'true' if true else 'false'}" for kind, true in answer["statements"].items()]
                print(f"  statements: {', '.join(checks)}")
