"""Evidence: facts about the candidates of every list, and the prior that a small model makes of them.

Facts of train lists come from the training data without their targets, as their base model does; facts of valid and
test lists from all of the training data. The prior is fitted on the train lists that hold their target, and validation
lists choose when to stop.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from safetensors.torch import load_file, save_file

from recbole_gr2.errors import ConfigurationError
from recbole_gr2.evidence import Described, Observed, collect
from recbole_gr2.evidence.prior import Prior, Priors, cross_fit, fit_priors, log_prior
from recbole_gr2.ranking import ndcg_at
from recbole_gr2.requests import read_requests
from recbole_gr2.seeding import derive_seed
from recbole_gr2.stages import Context
from recbole_gr2.stages.embeddings import load_embeddings
from recbole_gr2.store import read_lines, write_json, write_lines
from recbole_gr2.types import Item, Request

SPLITS = ("train", "valid", "test")


def run(context: Context) -> dict:
    """Writes facts.json (names), facts-<split>.npy and pairs-<split>.npy (`Described`, all lists' candidates behind
    each other), prior.safetensors and <split>.jsonl: every candidate's log-prior.

    Train lists without their target are left out: nothing is learnt from them.
    """
    settings, data = context.settings, context.data
    if not settings["evidence_providers"]:
        for split in SPLITS:
            write_lines(context.folder / f"{split}.jsonl", ())
        context.say("no evidence: the policy starts from the language model alone")
        return {"facts": []}
    requests = {split: read_requests(context.folders["candidates"] / f"{split}.jsonl", data.items) for split in SPLITS}
    requests["train"] = [r for r in requests["train"] if r.teaches]
    embeddings = load_embeddings(context)
    training = [sequence.tolist() for sequence in data.train_sequences().values()]
    known = {}
    for splits, sequences in ((("train",), data.open_sequences()), (("valid", "test"), training)):
        observed = Observed(items=data.items, sequences=sequences, embeddings=embeddings)
        every = [r for split in splits for r in requests[split]]
        names, rows = collect(every, settings["evidence_providers"], observed)
        for split in splits:
            known[split], rows = rows[: len(requests[split])], rows[len(requests[split]) :]
    for split in SPLITS:
        np.save(context.folder / f"facts-{split}.npy", np.concatenate([each.facts for each in known[split]]))
        np.save(context.folder / f"pairs-{split}.npy", np.concatenate([each.padded for each in known[split]]))
        context.say(
            f"{split}: {len(names)} facts about each candidate of {len(known[split]):,} lists, "
            f"{known[split][0].pairs.shape[2]} about it and each item of the history"
        )

    options = {name: settings[f"evidence_{name}"] for name in ("hidden", "dropout", "learning_rate", "weight_decay")}
    seed = derive_seed(settings["seed"], "evidence")
    goals = [r.gains for r in requests["train"]]
    held = [number for number, r in enumerate(requests["valid"]) if r.target_rank]
    checked = [known["valid"][n] for n in held], [requests["valid"][n].gains for n in held]
    most = [settings["evidence_steps"]] * settings["evidence_fits"]
    prior, steps, error = fit_priors(known["train"], goals, valid=checked, steps=most, seed=seed, **options)
    rows = {split: log_prior(prior, known[split]) for split in ("valid", "test")}
    rows["train"] = cross_fit(
        known["train"], goals, folds=settings["evidence_folds"], steps=steps, seed=seed, **options
    )
    save_file(prior.state_dict(), context.folder / "prior.safetensors")
    for split in SPLITS:
        write_lines(
            context.folder / f"{split}.jsonl",
            (
                {"request_id": r.request_id, "log_prior": row}
                for r, row in zip(requests[split], rows[split], strict=True)
            ),
        )
    quality = {
        "train": _quality(requests["train"], rows["train"]),
        "valid": _quality([requests["valid"][n] for n in held], [rows["valid"][n] for n in held]),
    }
    for split, found in quality.items():
        context.say(
            f"{split}: target first {found['recall@1']:.4f} (base {found['base recall@1']:.4f}), ndcg@5 "
            f"{found['ndcg@5']:.4f} (base {found['base ndcg@5']:.4f}), {found['lists']:,} lists"
        )
    write_json(context.folder / "facts.json", names)
    return {"facts": names, "steps": steps, "valid_cross_entropy": error, "quality": quality}


def load_requests(context: Context, split: str, items: Sequence[Item]) -> list[Request]:
    """The lists of a split with their prior, and with the facts that a prompt shows."""
    lines = read_lines(context.folders["evidence"] / f"{split}.jsonl")
    priors = {line["request_id"]: tuple(line["log_prior"]) for line in lines}
    requests = read_requests(context.folders["candidates"] / f"{split}.jsonl", items)
    requests = [replace(r, prior=priors.get(r.request_id, ())) for r in requests]
    if not context.settings["prompt_evidence"]:
        return requests
    described = [r for r in requests if r.prior]
    shown = {r.request_id: r for r in _show(context, described, load_described(context, split, described))}
    return [shown.get(r.request_id, r) for r in requests]


def injected_requests(context: Context, items: Sequence[Item], count: int) -> list[Request]:
    """`count` train lists that lack their target, drawn by seed, with it in place of a random candidate.

    It takes that candidate's rank and score: its own score, below all others, would give it away. The prior has not
    seen these lists.
    """
    if not count:
        return []
    settings, data = context.settings, context.data
    rng = random.Random(derive_seed(settings["seed"], "injected"))
    lists = [r for r in read_requests(context.folders["candidates"] / "train.jsonl", items) if r.target not in r.items]
    users = {token: user for user, token in enumerate(data.user_tokens)}
    requests = []
    for r in rng.sample(lists, min(count, len(lists))):
        place, grade = rng.randrange(len(r.candidates)), data.targets(users[r.user_token], "train")[r.target]
        requests.append(
            replace(
                r,
                candidates=(
                    *r.candidates[:place],
                    replace(r.candidates[place], item_id=r.target),
                    *r.candidates[place + 1 :],
                ),
                grades=r.grades and (*r.grades[:place], grade, *r.grades[place + 1 :]),
            )
        )
    requests = [r for r in requests if r.teaches]
    if not requests or not settings["evidence_providers"]:
        return requests
    observed = Observed(items=data.items, sequences=data.open_sequences(), embeddings=load_embeddings(context))
    _, known = collect(requests, settings["evidence_providers"], observed)
    sizes = known[0].facts.shape[1], known[0].pairs.shape[2], settings["evidence_hidden"], settings["evidence_dropout"]
    prior = Priors(Prior(*sizes) for _ in range(settings["evidence_fits"]))
    prior.load_state_dict(load_file(context.folders["evidence"] / "prior.safetensors"))
    rows = log_prior(prior.eval(), known)
    requests = [replace(r, prior=tuple(row)) for r, row in zip(requests, rows, strict=True)]
    return _show(context, requests, known) if settings["prompt_evidence"] else requests


def _show(context: Context, requests: Sequence[Request], described: Sequence[Described]) -> list[Request]:
    """Requests with the facts that a prompt shows, from all of theirs.

    Raises:
        ConfigurationError: `prompt_evidence` names a fact that there is not.
    """
    folder, names = context.folders["evidence"], context.settings["prompt_evidence"]
    every = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    if set(names) - set(every):
        raise ConfigurationError(
            f"there are no facts {sorted(set(names) - set(every))} to show",
            where="prompt_evidence",
            do=f"choose from {', '.join(every)}",
        )
    columns = [every.index(name) for name in names]
    tenths = edges(np.load(folder / "facts-train.npy")[:, columns])
    shown = [(each.facts[:, None, columns] > tenths).sum(axis=1).tolist() for each in described]
    return [
        replace(r, facts=tuple(dict(zip(names, row, strict=True)) for row in rows))
        for r, rows in zip(requests, shown, strict=True)
    ]


def edges(seen: np.ndarray) -> np.ndarray:
    """What a fact has to exceed to be 1, .. 9 instead of 0, (9, F): tenths of those that were seen, (n, F).

    So the smallest value is 0 however often it occurs, and counts and cosines are read alike.

    >>> edges(np.array([[0.0], [0.0], [0.0], [0.5], [3.0]])).ravel().tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5]
    """
    return np.quantile(seen, np.linspace(0.1, 0.9, 9), axis=0, method="lower")


def load_described(context: Context, split: str, requests: Sequence[Request]) -> list[Described]:
    """What is known of each of these lists of a split, given in any order; train lists have to hold their target."""
    lines = read_lines(context.folders["evidence"] / f"{split}.jsonl")
    sizes = {line["request_id"]: len(line["log_prior"]) for line in lines}
    ends = dict(zip(sizes, np.cumsum(list(sizes.values())), strict=True))
    facts, pairs = (
        np.load(context.folders["evidence"] / f"{kind}-{split}.npy", mmap_mode="r") for kind in ("facts", "pairs")
    )
    rows = {r.request_id: slice(ends[r.request_id] - sizes[r.request_id], ends[r.request_id]) for r in requests}
    return [
        Described(np.array(facts[rows[r.request_id]]), np.array(pairs[rows[r.request_id], : len(r.history)]))
        for r in requests
    ]


def _quality(requests: Sequence[Request], rows: Sequence[Sequence[float]]) -> dict:
    """How well the prior orders lists that hold their target, beside the base order."""
    base = np.array([r.target_rank for r in requests])
    orders = [replace(r, prior=tuple(row)).by_prior for r, row in zip(requests, rows, strict=True)]
    ours = np.array([order.index(r.target) + 1 for r, order in zip(requests, orders, strict=True)])
    return {
        "lists": len(requests),
        "recall@1": float((ours == 1).mean()),
        "base recall@1": float((base == 1).mean()),
        "ndcg@5": float(ndcg_at(ours, 5).mean()),
        "base ndcg@5": float(ndcg_at(base, 5).mean()),
    }
