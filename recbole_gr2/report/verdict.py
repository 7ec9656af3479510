"""The verdict of a run: two sentences that are generated from its numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from recbole_gr2.report.result import BASE, in_scope
from recbole_gr2.report.tables import GAP

LEVEL = 0.05  # A difference is significant if its adjusted p-value is below it.
PRIOR = "prior"  # The method that ranks with the features alone.
SMOKE = "smoke"  # The preset whose numbers mean nothing.
BANNER = (
    "This is a smoke run: it only shows that every stage works. Its models are tiny or untrained, so its numbers mean "
    "nothing."
)


def banner(result: Mapping[str, Any]) -> str:
    """Return the warning of a smoke run, "" for other runs.

    Args:
        result: content of result.json of a run or of an ablation.

    >>> banner({"preset": "laptop"})
    ''
    """
    return BANNER if result["preset"] == SMOKE else ""


def verdict(result: Mapping[str, Any], language_models: Collection[str]) -> tuple[str, str]:
    """Return what is ahead of the base order, and whether the language model adds to the features.

    Both sentences are about NDCG@10 over hit users. A difference counts if its Holm-adjusted p-value is below .05.
    Methods that make no claim, such as the oracle, do not take part. A smoke run has no verdict.

    Args:
        result: content of result.json of a run.
        language_models: names of the methods in which a language model answers a prompt.

    Returns:
        Two sentences.
    """
    if banner(result):
        return (
            "There is no verdict, because this is a smoke run.",
            "Run another preset to compare methods.",
        )
    where = "On the validation split" if result["split"] == "valid" else ""
    return _first(_begin(where, _ahead_of_base(result))), _first(_begin(where, _added(result, language_models)))


def _ahead_of_base(result: Mapping[str, Any]) -> str:
    """Which methods are ahead of the base order."""
    found = {
        entry["method"]: entry["vs_base"][GAP]
        for entry in in_scope(result, "hit_users")
        if entry["method"] != BASE and not entry["diagnostic"] and "p_holm" in entry["vs_base"].get(GAP, {})
    }
    if not found:
        return f"no method is compared with the base order in {_metric()}."
    ahead, behind = _significant(found, 1), _significant(found, -1)
    best = max(found, key=lambda name: found[name]["diff"])
    users = _users(result)
    if ahead:
        best = max(ahead, key=lambda name: found[name]["diff"])
        others = [name for name in ahead if name != best]
        return f"`{best}` is ahead of the base order by {_difference(found[best])} over {users}" + _clauses(
            others, behind
        )
    if all(each["low"] == each["high"] == 0 for each in found.values()):
        return f"no method changes the {_metric()} of the base order for any of {users}."
    if len(behind) == len(found):
        many = f", the nearest of {len(found)} methods," if len(found) > 1 else ""
        return f"`{best}`{many} is behind the base order: its difference over {users} is {_difference(found[best])}."
    return (
        f"no method is significantly ahead of the base order over {users}: the largest difference is that of `{best}`, "
        f"{_difference(found[best])}" + _clauses([], behind)
    )


def _added(result: Mapping[str, Any], language_models: Collection[str]) -> str:
    """Whether a language model is ahead of the prior, which has the same features."""
    entries = in_scope(result, "hit_users")
    models = [e["method"] for e in entries if e["method"] in language_models and not e["diagnostic"]]
    if not models:
        return (
            "no method of this run answers a prompt with a language model, so that the run does not tell whether a "
            "language model adds to the features."
        )
    if not any(entry["method"] == PRIOR for entry in entries):
        return (
            f"this run has no features, so that {_names(models)} can only be compared with the base order and with "
            "other methods."
        )
    found = {name: each for name in models if (each := _versus_prior(result, name)) is not None}
    if not found:
        return (
            f"this run does not compare {_names(models)} with `{PRIOR}`, so that it does not tell whether the language "
            "model adds to the features."
        )
    ahead, behind = _significant(found, 1), _significant(found, -1)
    if ahead:
        best = max(ahead, key=lambda name: found[name]["diff"])
        others = [name for name in ahead if name != best]
        return (
            f"the language model adds to the features: `{best}` is ahead of `{PRIOR}` by {_difference(found[best])}"
            + _clauses(others, behind)
        )
    best = max(found, key=lambda name: found[name]["diff"])
    if len(behind) == len(found):
        many = f", the nearest of {len(found)} methods," if len(found) > 1 else ""
        return (
            f"the language model makes the order of the features worse: the difference of `{best}`{many} to `{PRIOR}` "
            f"is {_difference(found[best])}."
        )
    if all(each["low"] == each["high"] == 0 for each in found.values()):
        return f"the language model adds nothing to the features: {_names(list(found))} ranks as `{PRIOR}` does."
    return (
        f"the language model adds nothing significant to the features: the difference of `{best}` to `{PRIOR}` is "
        f"{_difference(found[best])}" + _clauses([], behind)
    )


def _versus_prior(result: Mapping[str, Any], method: str) -> dict[str, float] | None:
    """The comparison of a method with the prior; None if the run has none. A pair may be in either direction."""
    for pair in result["comparisons"]:
        compared = pair["metrics"].get(GAP, {})
        if pair["scope"] != "hit_users" or "p_holm" not in compared:
            continue
        if (pair["method"], pair["versus"]) == (method, PRIOR):
            return dict(compared)
        if (pair["method"], pair["versus"]) == (PRIOR, method):
            return {**compared, "diff": -compared["diff"], "low": -compared["high"], "high": -compared["low"]}
    return None


def _significant(found: Mapping[str, Mapping[str, float]], sign: int) -> list[str]:
    """The names whose difference has this sign and is significant."""
    return [name for name, each in found.items() if each["p_holm"] < LEVEL and sign * each["diff"] > 0]


def _difference(found: Mapping[str, float]) -> str:
    p = f"= {found['p_holm']:.4f}" if found["p_holm"] >= 0.00005 else "< 0.0001"
    return f"{found['diff']:+.4f} {_metric()} [{found['low']:+.4f}, {found['high']:+.4f}] (adjusted p {p})"


def _users(result: Mapping[str, Any]) -> str:
    counts = in_scope(result, "hit_users")[0]["n"]
    if len(counts) == 1:
        return f"{counts[0]:,} hit users"
    return f"the hit users of {len(counts)} seeds"


def _metric() -> str:
    return GAP.upper()


def _names(names: Collection[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _clauses(ahead: Collection[str], behind: Collection[str]) -> str:
    """The end of a sentence: which other methods are ahead, and which are behind."""
    parts = [f"; {_names(ahead)} {_is(ahead)} also ahead"] if ahead else []
    parts += [f"; {_names(behind)} {_is(behind)} behind"] if behind else []
    return "".join(parts) + "."


def _is(names: Collection[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _begin(where: str, sentence: str) -> str:
    return f"{where}, {sentence}" if where else sentence


def _first(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
