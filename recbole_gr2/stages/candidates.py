"""Stage `candidates`: the candidate list of each user in each split, and the recommendations of the test split.

With `eval_split: valid` the stage `validation` adds the recommendations of the validation split.

The base model proposes the lists of validation and test, the hold-out base model those of training. Several base models
propose one list together; validation chooses their weights, see `bridge.fusion`. The target is never inserted. With
`cand_file` the lists are imported, and no base model is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recbole_gr2.artifacts import (
    SPLITS,
    numbered_requests,
    read_requests,
    request_id,
    write_recommendations,
    write_requests,
)
from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.evaluator import Scored, collect, depth_of, from_lists, in_chunks, joined, recommend
from recbole_gr2.bridge.fusion import FusedModel, Fusion, choose_weights
from recbole_gr2.bridge.models import BaseModel
from recbole_gr2.bridge.splits import LEAVE_ONE_OUT
from recbole_gr2.config import GENERATOR, Settings
from recbole_gr2.errors import ConfigurationError, GR2Error, QualityCheckError
from recbole_gr2.lists import pool_size
from recbole_gr2.recommenders import (
    BASE,
    HOLD_OUT,
    REFIT,
    VALIDATION,
    base_stage,
    load_base_model,
    load_fused_model,
    stages_of,
)
from recbole_gr2.store import check_text, file_hash, write_json
from recbole_gr2.types import Candidate, Context, Recommendations, Request, SourceScores, Stage

ROWS = 1024  # Rows whose lists are made at a time.
DEPTHS = (10, 20, 50, 100, 200)  # at which the recall of the base models is reported


def run(context: Context) -> dict[str, Any]:
    """Write train.jsonl, valid.jsonl, test.jsonl, recommendations.npz of the test split and stats.json.

    Several base models also have <name>.npz, the recommendations of each of them.

    Raises:
        QualityCheckError: Recall@K of a split is 0.
    """
    settings, count = context.settings, pool_size(context.settings)
    summary: dict[str, Any] = {}
    if settings["cand_file"]:
        imported, summary["imported"] = _import(context), settings["cand_file"]
        write_recommendations(context.folder, from_lists(context.data, imported["test"]))
    else:
        models, summary["fusion"] = base_models(context)

    def lists(split: str) -> Iterator[Request]:
        if settings["cand_file"]:
            yield from imported[split]
        elif split == "train":
            for rows in context.data.train_splits:
                yield from top_candidates(models[HOLD_OUT], rows, count)
        elif split == "valid":
            yield from top_candidates(models[BASE], "valid", count)
        else:
            base = models[REFIT if settings["refit"] else BASE]
            scored, _, summary["depth"] = _recommend(context, base, "test")
            yield from to_requests(base, "test", in_chunks(scored, ROWS), count)
            if base.exclude_seen and settings["eval_split"] == "test":
                _report_masked_targets(context)

    # One split after another, because the lists of all splits take gigabytes.
    summary["stats"] = {split: _write_lists(context, split, lists(split)) for split in SPLITS}
    summary["protocol"] = protocol(context)
    write_json(context.folder / "stats.json", summary["stats"])
    return summary


def _write_lists(context: Context, split: str, requests: Iterable[Request]) -> dict[str, float]:
    """Write the lists of a split, and return their statistics."""
    ranks: list[int] = []

    def counted() -> Iterator[Request]:
        for request in requests:
            ranks.append(request.target_rank or 0)
            yield request

    write_requests(context.folder / f"{split}.jsonl", counted(), context.data.catalog)
    return _stats(context, split, ranks)


def run_validation(context: Context) -> dict[str, Any]:
    """Write recommendations.npz of the validation split, and <name>.npz of each of several base models.

    `refit` has no effect: the refitted models have learnt the validation targets.

    Raises:
        GR2Error: the first items of the recommendations are not the validation lists of the stage `candidates`.
    """
    settings = context.settings
    lists = read_requests(context.folders["candidates"] / "valid.jsonl", context.data.catalog)
    if settings["cand_file"]:
        write_recommendations(context.folder, from_lists(context.data, lists))
        return {"split": "valid"}
    _, recommendations, depth = _recommend(context, load_fused_model(context), "valid")
    first = dict(zip(recommendations.users, recommendations.items[:, : pool_size(settings)].tolist(), strict=True))
    different = [
        request.user_token for request in lists if list(request.items) != list(filter(None, first[request.user_token]))
    ]
    if different:
        raise GR2Error(
            f"the recommendations of {len(different):,} users do not begin with their validation lists",
            where=f"{context.folders['candidates'] / 'valid.jsonl'}, user {different[0]}",
            why="the base models are the same, but another device or library can change the last digits of scores",
            do="repeat the command with --from_stage candidates, to compute both on this machine",
        )
    return {"split": "valid", "depth": depth}


def _recommend(
    context: Context, base: BaseModel, split: str
) -> tuple[Scored, Recommendations, dict[str, dict[str, float]]]:
    """The scored rows of a split, and their recommendations with the recall of each base model by depth.

    The recommendations of each of several base models are written.
    """
    batches = recommend(base, split, depth_of(context.data), break_ties=False, check=True, alone=True)
    scored = joined(batches, len(context.data.rows(split)[0]))
    recommendations = collect(context.data, scored, exclude_seen=base.exclude_seen)
    write_recommendations(context.folder, recommendations)
    depth = {base.name: recall_by_depth(recommendations)}
    for position, source in enumerate(base.sources if len(base.sources) > 1 else ()):
        of_source = scored.sources[position].alone
        assert of_source is not None  # because of `alone=True`
        alone = collect(context.data, of_source, exclude_seen=base.exclude_seen)
        write_recommendations(context.folder, alone, source.name)
        depth[source.name] = recall_by_depth(alone)
    return scored, recommendations, depth


def base_models(context: Context) -> tuple[dict[str, BaseModel], dict[str, Any]]:
    """The base model, the hold-out base model and, for `refit`, the refitted one, and the weights of the fusion.

    Each is fused if there are several base models.
    """
    settings, names = context.settings, context.settings["base_model"]
    kinds = (BASE, HOLD_OUT, *((REFIT,) if settings["refit"] else ()))
    models = {kind: [load_base_model(context, name, kind) for name in names] for kind in kinds}
    if len(names) == 1:
        return {kind: each[0] for kind, each in models.items()}, {}
    fusion = Fusion(settings["cand_fusion"])
    if settings["cand_weights"]:
        weights = tuple(float(settings["cand_weights"].get(name, 0)) for name in names)
    else:
        count = pool_size(settings)
        weights, recall = choose_weights(models[BASE], fusion, count)
        context.say(f"weights chosen on validation, where they give recall@{count} {recall:.4f}")
    summary = dict(zip(names, weights, strict=True))
    context.say("fusion: " + ", ".join(f"{name} {weight:g}" for name, weight in summary.items()))
    return {kind: FusedModel.of(each, fusion, weights) for kind, each in models.items()}, summary


def protocol(context: Context) -> dict[str, str]:
    """What has to agree when the results of two runs are compared, in words."""
    settings, split, cuts = context.settings, context.data.split.name, context.data.split.cuts
    learnt = "the training interactions"
    source, learns = "the imported file", {}
    if not settings["cand_file"]:
        source = ", ".join(settings["base_model"])
        learns = {
            "models of validation lists learn from": learnt,
            "models of test lists learn from": f"{learnt} and those of validation" if settings["refit"] else learnt,
        }
    if cuts:
        split += f", validation from {cuts['valid']:.15g} and test from {cuts['test']:.15g}"
    elif split == LEAVE_ONE_OUT:
        split += " in time order"
    return {
        "split": split,
        "items of the history": "excluded" if settings["cand_exclude_seen"] else "not excluded",
        **learns,
        "training requests of a user": str(settings["train_requests"]),
        **({"requests of a split": f"a sample of {settings['max_requests']}"} if settings["max_requests"] else {}),
        "items of a list": f"{pool_size(settings)} by {source}",
        "candidates of language models": str(settings["cand_num"])
        + (f", selected by {settings['cand_ranker']}" if pool_size(settings) > settings["cand_num"] else ""),
    }


def recall_by_depth(recommendations: Recommendations) -> dict[str, float]:
    """Share of the users whose target is among their first 10, 20, 50, 100 and 200 items, as far as there are so many.

    >>> import numpy as np
    >>> items, ranks = np.ones((2, 20), dtype=np.int32), np.array([11, 0], dtype=np.int32)
    >>> recall_by_depth(Recommendations(users=("a", "b"), items=items, target_rank=ranks, exclude_seen=True))
    {'recall@10': 0.0, 'recall@20': 0.5}
    """
    ranks = recommendations.target_rank
    depths = [depth for depth in DEPTHS if depth <= recommendations.items.shape[1]]
    return {f"recall@{depth}": float(((ranks > 0) & (ranks <= depth)).mean()) for depth in depths}


def top_candidates(base: BaseModel, split: str, count: int) -> Iterator[Request]:
    """Yield the requests of a split with the first `count` items of the base model as candidates, see `to_requests`."""
    depth = min(count, base.data.item_count)
    return to_requests(base, split, recommend(base, split, depth, break_ties=False), count)


def to_requests(base: BaseModel, split: str, scored: Iterable[Scored], count: int) -> Iterator[Request]:
    """Yield requests whose candidates are the first `count` items of scored rows.

    If a training list contains several targets, its target is the one with the highest grade, and of several such
    targets the earliest. If the list contains no target, the target is chosen among all targets of the request in the
    same way. Rows without a history, or with fewer than two proposed items, give no request.

    Args:
        base: the model that scored the rows.
        split: a split of `Data.rows`; the training requests of all splits have the split train.
        scored: result of `recommend` for this split, with a depth of at least `count` or the whole catalogue.
        count: largest number K of candidates.
    """
    data: Data = base.data
    provider = f"{base.name}{' hold-out' if base.metadata['hold_out'] else ''}"
    for batch in scored:
        for row, (user, items, scores) in enumerate(
            zip(batch.users.tolist(), batch.items[:, :count].tolist(), batch.scores[:, :count].tolist(), strict=True)
        ):
            history = data.history(user, split)
            proposed = [(item, score) for item, score in zip(items, scores, strict=True) if item > 0]
            if not history or len(proposed) < 2:
                continue
            targets = data.targets(user, split)
            graded = split in data.train_splits and data.graded
            yield Request(
                request_id=request_id(split, data.user_tokens[user]),
                user_token=data.user_tokens[user],
                split="train" if split in data.train_splits else split,
                history=history,
                candidates=tuple(
                    Candidate(item_id=item, score=score, rank=rank)
                    for rank, (item, score) in enumerate(proposed, start=1)
                ),
                target=_best_target(targets, [item for item, _ in proposed]),
                grades=tuple(targets.get(item, 0) for item, _ in proposed) if graded else (),
                provider=provider,
                times=data.history_times(user, split),
                sources=tuple(
                    SourceScores(
                        model.name,
                        tuple(source.ranks[row, : len(proposed)].tolist()),
                        tuple(source.scores[row, : len(proposed)].tolist()),
                    )
                    for model, source in zip(base.sources, batch.sources, strict=bool(batch.sources))
                ),
            )


def _best_target(targets: dict[int, int], items: Sequence[int]) -> int:
    """The target with the highest grade, the earliest of these; among the listed targets if one has a grade above 0."""
    listed = [item for item in items if targets.get(item)]
    order = list(targets)
    return min(listed or order, key=lambda item: (-targets[item], order.index(item)))


def _stats(context: Context, split: str, ranks: Sequence[int]) -> dict[str, float]:
    """Number of lists, number of hit users, and recall of a split.

    With `eval_split: valid` those of the test split are neither printed nor checked.

    Args:
        context: the context of the stage.
        split: name of the split.
        ranks: rank of the target in each list, from 1; 0 if the list does not contain it.

    Raises:
        QualityCheckError: no list contains its target.
    """
    count, hits = pool_size(context.settings), sum(map(bool, ranks))
    recall = hits / max(len(ranks), 1)
    reported = split != "test" or context.settings["eval_split"] == "test"
    if reported:
        context.say(f"{split}: {len(ranks)} lists, {hits} contain their target ({recall:.4f})")
    if reported and not hits:
        raise QualityCheckError(
            f"no {split} list contains its target: recall@{count} is 0",
            where=f"base_model {', '.join(context.settings['base_model'])}",
            why="re-ranking cannot improve a list without its target",
            do="train the base model longer (base_epochs) or raise cand_pool or cand_num; if users repeat items, set "
            "cand_exclude_seen: False",
        )
    return {
        "lists": len(ranks),
        "hit_users": hits,
        f"recall@{count}": recall,
        "recall@1": ranks.count(1) / max(len(ranks), 1),
    }


def _report_masked_targets(context: Context) -> None:
    """Print the share of test targets that the mask of seen items excludes, if there are any."""
    data = context.data
    users = data.rows("test")[1].tolist()
    masked = sum(next(iter(data.targets(user, "test"))) in data.history(user, "test") for user in users)
    if masked:
        context.say(
            f"{masked / len(users):.1%} of the test targets are in the user's history and masked: set "
            "cand_exclude_seen: False to recommend them, or rm_dup_inter: first to remove repeated interactions"
        )


def _import(context: Context) -> dict[str, list[Request]]:
    """The requests of `cand_file` by split.

    Raises:
        ConfigurationError: a history or a target is not the one of the data set, or a list has the wrong length.
    """
    data, count = context.data, pool_size(context.settings)
    users = {token: user for user, token in enumerate(data.user_tokens)}
    lists: dict[str, list[Request]] = {split: [] for split in SPLITS}
    file = Path(context.settings["cand_file"])
    for number, request in numbered_requests(file, data.catalog):
        where = f"{file}:{number}, {request.request_id}"
        user = users.get(request.user_token)
        if (
            request.split not in SPLITS
            or user not in data.sequences
            or not any(
                request.history == data.history(user, split) and request.target in data.targets(user, split)
                for split in (data.train_splits if request.split == "train" else (request.split,))
            )
        ):
            raise ConfigurationError(
                "an imported list does not belong to a row of this data set",
                where=where,
                why="a longer history would contain the target",
                do="export lists with this plugin, and keep history, target and split unchanged",
            )
        if not 2 <= len(request.items) <= count:
            raise ConfigurationError(
                f"an imported list has {len(request.items)} candidates",
                where=where,
                why=f"cand_pool, by default cand_num, is {count}, and a list needs two candidates to order",
                do="import lists of 2 to cand_pool candidates",
            )
        # The prior stage scores these lists itself. The history is the beginning of the user's sequence.
        times = tuple(data.user_times[user][: len(request.history)].tolist())
        lists[request.split].append(replace(request, prior=(), ranker=(), times=times))
    return lists


def check_settings(settings: Settings) -> None:
    """Check the imported file, or that there is a model that may propose the candidates of train requests."""
    if GENERATOR in settings["base_model"] and not settings["cand_file"] and not settings["mid_hold_out"]:
        raise ConfigurationError(
            f"with mid_hold_out: False, {GENERATOR} is mid-trained on the targets of the train requests",
            where="mid_hold_out",
            why="a re-ranker that is trained on such lists would learn to keep their order",
            do="set mid_hold_out: True",
        )
    if settings["cand_file"]:
        check_text(settings["cand_file"], where="cand_file")


def check_data(settings: Settings, data: Data) -> None:
    """Check that the cut-off of the metric for early stopping is not above the catalogue."""
    cutoff = int(settings["valid_metric"].partition("@")[2] or 1)
    if not settings["cand_file"] and cutoff > data.item_count:
        raise ConfigurationError(
            f"valid_metric is {settings['valid_metric']}, and the catalogue has {data.item_count} items",
            where="valid_metric",
            why="the base model cannot rank more items than there are",
            do=f"choose a cut-off of at most {data.item_count}",
        )


def key_values(settings: Settings) -> dict[str, Any]:
    """Return the size of the pool, and the hash of the imported file or the base models in their order."""
    file = settings["cand_file"]
    return {
        "cand_pool": pool_size(settings),
        "cand_file": file_hash(file, where="cand_file") if file else None,
        "base_model": [] if file else settings["base_model"],
    }


def stages(settings: Settings) -> list[Stage]:
    """Declare the stages. What they need depends on what proposes the candidates."""
    needs: list[str] = []
    for name in () if settings["cand_file"] else settings["base_model"]:
        needs += ("midtrain",) if name == GENERATOR else (base_stage(name),)
        needs += stages_of(name, settings, base=True)
    needs = list(dict.fromkeys(needs))
    candidates = Stage(
        name="candidates",
        version=4,
        run=run,
        settings=("cand_beams", "cand_exclude_seen", "cand_fusion", "cand_weights", "refit", "seed"),
        needs=tuple(needs),
        check=check_settings,
        check_data=check_data,
        key_values=key_values,
    )
    if settings["eval_split"] == "test":
        return [candidates]
    return [candidates, Stage(name=VALIDATION, version=1, run=run_validation, needs=("candidates", *needs))]
