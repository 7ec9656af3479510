"""Which methods of a run are compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recbole_gr2.ranking import Comparison, adjust


def declared_pairs(
    methods: Sequence[str], compare_with: Mapping[str, Sequence[str]], *, every: bool, without: Sequence[str]
) -> list[tuple[str, str]]:
    """Return the pairs of methods that a run compares, each pair once.

    Args:
        methods: names of the methods of the run, in the order of the tables.
        compare_with: for each method the names of those it is compared with; "all" stands for every other method.
        every: return all pairs, whatever the methods declare.
        without: methods that only take part in pairs that another method declares by name.

    >>> declared_pairs(["prior", "sft", "mine"], {"sft": ["prior"], "mine": ["all"]}, every=False, without=())
    [('sft', 'prior'), ('mine', 'prior'), ('mine', 'sft')]
    """
    pairs: list[tuple[str, str]] = []
    for method in methods:
        others = compare_with.get(method, ())
        if (every and method not in without) or "all" in others:
            others = [other for other in methods if other not in without]
        for other in others:
            if other in methods and other != method and not {(method, other), (other, method)} & set(pairs):
                pairs.append((method, other))
    return pairs


def compare_pairs(
    pairs: Sequence[tuple[str, str]], compare: Callable[[str, str], dict[str, Comparison]], diagnostic: Sequence[str]
) -> list[dict[str, Any]]:
    """Compare pairs of methods and adjust the p-values as one family.

    Args:
        pairs: names of two methods each.
        compare: returns the comparison of two methods.
        diagnostic: methods that make no claim. Comparisons with them are not part of the family.
    """
    compared = [(method, other, compare(method, other)) for method, other in pairs]
    adjust([metrics for _, other, metrics in compared if other not in diagnostic])
    return [{"method": method, "versus": other, "metrics": metrics} for method, other, metrics in compared]
