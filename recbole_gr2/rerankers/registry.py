"""All re-rankers by name: the built-in ones, and those that the setting `eval_rows` names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from recbole_gr2.config import GENERATOR, ONEREC_THINK, Settings
from recbole_gr2.config.recbole_options import candidate_models
from recbole_gr2.errors import ConfigurationError, nearest
from recbole_gr2.plugins import check_call, check_method, find
from recbole_gr2.rerankers.answers import Distilled, Internalised, Rl, Sft, Shuffled
from recbole_gr2.rerankers.base import ALL, Reranker
from recbole_gr2.rerankers.external import FILE, from_file, from_function
from recbole_gr2.rerankers.lambdamart import LambdaMART
from recbole_gr2.rerankers.likelihood import Midtrain, OneRecThink, OneRecThinkWithoutTraces
from recbole_gr2.rerankers.orders import BaseOrder, Oracle, PriorOrder
from recbole_gr2.rerankers.score import Score
from recbole_gr2.store import file_hash, module_hash

ORDERS: tuple[type[Reranker], ...] = (BaseOrder, Oracle, PriorOrder)  # part of every run, computed by evaluate
RERANKERS: Mapping[str, type[Reranker]] = {
    reranker.name: reranker
    for reranker in (
        LambdaMART,
        Midtrain,
        Sft,
        Rl,
        Shuffled,
        Distilled,
        Internalised,
        Score,
        OneRecThink,
        OneRecThinkWithoutTraces,
    )
}


def orders(settings: Settings) -> list[type[Reranker]]:
    """Return the methods that are part of every run."""
    return [order for order in ORDERS if settings["prior_features"] or not order.needs_features]


def chosen(settings: Settings) -> list[type[Reranker]]:
    """Return the re-rankers of a run: those of `eval_rows`, and those of recommenders in `models`.

    Re-rankers that need candidate features are left out if there are no feature providers.

    Raises:
        ConfigurationError: there is no such re-ranker, two of them or a built-in one have the same name, or one is to
            be compared with a method that does not exist.
    """
    named = [find_reranker(name) for name in dict.fromkeys(settings["eval_rows"])]
    named += [RERANKERS[ONEREC_THINK[model]] for model in settings["models"] if model in ONEREC_THINK]
    by_name: dict[str, type[Reranker]] = {}
    built_in = {**RERANKERS, **{order.name: order for order in ORDERS}}
    for reranker in named:
        same_name = by_name.setdefault(reranker.name, reranker), built_in.get(reranker.name, reranker)
        if any(other is not reranker for other in same_name) or reranker.name in settings["models"]:
            raise ConfigurationError(
                f"two methods have the name {reranker.name!r}",
                where="eval_rows, models",
                why="the result tables name each method once, and the names of built-in methods are reserved",
                do="give your class another `name`, or rename the file with rankings",
            )
    for reranker in named:
        _check_compared(reranker, by_name)
    return [r for r in by_name.values() if settings["prior_features"] or not r.needs_features]


def _check_compared(reranker: type[Reranker], chosen: Mapping[str, type[Reranker]]) -> None:
    """Check that the names in `compare_with` are known methods or recommenders."""
    names = reranker.compare_with
    if isinstance(names, str) or not isinstance(names, Collection):
        raise ConfigurationError(
            f"compare_with of the method {reranker.name!r} is {names!r}",
            where="eval_rows",
            why="it has to be a tuple of names",
            do='write a tuple such as ("lambdamart",)',
        )
    known = {ALL, *RERANKERS, *(order.name for order in ORDERS), *chosen}
    if not known.issuperset(names):
        known |= {*candidate_models(), GENERATOR, *ONEREC_THINK}
    for name in names:
        if name not in known:
            near = nearest(name, sorted(known)) or list(RERANKERS)
            raise ConfigurationError(
                f"the method {reranker.name!r} is to be compared with {name!r}, which is no method",
                where="eval_rows",
                why="its comparison would be missing in the report",
                do=f"did you mean {' or '.join(near)}? Correct compare_with, or add the method to eval_rows",
            )


def find_reranker(name: str) -> type[Reranker]:
    """Return a re-ranker by name: a built-in one, `module:attribute`, or `file:path`.

    Raises:
        ConfigurationError: there is no such re-ranker, or its methods cannot be called as the run does.
    """
    if name.startswith(FILE):
        file = Path(name.removeprefix(FILE))
        return from_file(file.stem, file)
    if ":" not in name and name not in RERANKERS:
        if name in {order.name for order in ORDERS}:
            raise ConfigurationError(
                f"{name} is part of every run", where="eval_rows", do=f"remove {name} from eval_rows"
            )
        near = nearest(name, RERANKERS)
        raise ConfigurationError(
            f"there is no re-ranker {name!r}",
            where="eval_rows",
            do=(f"did you mean {' or '.join(near)}? " if near else "")
            + f"Choose from {', '.join(RERANKERS)}; your own is module:attribute or file:rankings.jsonl",
        )
    attribute = find(name, RERANKERS, where="eval_rows")
    if isinstance(attribute, type) and issubclass(attribute, Reranker):
        if ":" in name:
            _check_class(name, attribute)
        if not attribute.name:
            attribute.name = name
        return attribute
    if isinstance(attribute, type) or not callable(attribute):
        raise ConfigurationError(
            f"{name!r} is neither a subclass of recbole_gr2.rerankers.base.Reranker nor a function",
            where="eval_rows",
            do="name a class that inherits from Reranker, or a function rank(request, catalog) -> order",
        )
    check_call(attribute, "rank(request, catalog)", None, None, name=name, where="eval_rows")
    return from_function(name, attribute)


def _check_class(name: str, reranker: type[Reranker]) -> None:
    """Check the methods of a class of the user."""
    if reranker.rank is Reranker.rank:
        raise ConfigurationError(
            f"{name!r} has no method rank",
            where="eval_rows",
            why="the run calls it to rank the candidates",
            do="write the method rank(self, requests)",
        )
    check_call(reranker, "Reranker(context)", None, name=name, where="eval_rows")
    check_method(reranker, "rank(requests)", None, name=name, where="eval_rows")
    check_method(reranker, "fit(train, valid)", None, None, name=name, where="eval_rows")


def source_values(settings: Settings) -> dict[str, dict[str, str]]:
    """Return for the name of each of the user's re-rankers the hash of its module or file."""
    values = {}
    for name in dict.fromkeys(settings["eval_rows"]):
        if name.startswith(FILE):
            file = name.removeprefix(FILE)
            values[find_reranker(name).name] = {"file.sha": file_hash(file, where="eval_rows")}
        elif ":" in name:
            values[find_reranker(name).name] = {f"{name}.sha": module_hash(name.partition(":")[0], where="eval_rows")}
    return values
