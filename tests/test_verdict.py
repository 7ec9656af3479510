"""The two sentences of the verdict, in every case."""

import pytest

from recbole_gr2.report.verdict import BANNER, banner, verdict


def compared(diff: float, p: float, half: float = 0.01) -> dict:
    """A comparison in NDCG@10. Its interval has this half width."""
    return {"ndcg@10": {"diff": diff, "low": diff - half, "high": diff + half, "p": p / 2, "p_holm": p}}


NONE = compared(0.0, 1.0, 0.0)


def result(base, pairs=(), *, preset="laptop", seeds=(2020,), diagnostic=("oracle", "shuffled"), **more) -> dict:
    """A result whose methods have these comparisons with the base order, and these pairs of methods."""
    methods = [
        {
            "method": name,
            "scope": scope,
            "diagnostic": name in diagnostic,
            "n": [1234] * len(seeds),
            "vs_base": versus,
        }
        for scope in ("all_users", "hit_users")
        for name, versus in {"base": {}, "oracle": compared(0.5, 0.001), **base}.items()
    ]
    comparisons = [
        {"method": one, "versus": other, "scope": "hit_users", "metrics": metrics} for one, other, metrics in pairs
    ]
    more = {"split": "test", **more}
    return {"preset": preset, "seeds": list(seeds), "methods": methods, "comparisons": comparisons, **more}


BETTER, WORSE, SAME = compared(0.05, 0.002), compared(-0.05, 0.002), compared(0.002, 0.7)
LLM = ["sft", "rl", "shuffled"]


@pytest.mark.parametrize(
    ("base", "start"),
    [
        (
            {"prior": BETTER},
            "`prior` is ahead of the base order by +0.0500 NDCG@10 [+0.0400, +0.0600] (adjusted p = 0.0020) over 1,234 "
            "hit users.",
        ),
        (
            {"prior": BETTER, "sft": compared(0.08, 0.01), "rl": SAME, "lambdamart": WORSE},
            "`sft` is ahead of the base order by +0.0800 NDCG@10 [+0.0700, +0.0900] (adjusted p = 0.0100) over 1,234 "
            "hit users; `prior` is also ahead; `lambdamart` is behind.",
        ),
        # The largest difference is not significant: it is not the one that is named.
        ({"prior": BETTER, "sft": compared(0.3, 0.06)}, "`prior` is ahead of the base order by +0.0500"),
        (
            {"prior": SAME, "sft": compared(-0.002, 0.7)},
            "No method is significantly ahead of the base order over 1,234 hit users: the largest difference is that "
            "of `prior`, +0.0020 NDCG@10 [-0.0080, +0.0120] (adjusted p = 0.7000).",
        ),
        (
            {"prior": SAME, "sft": WORSE},
            "No method is significantly ahead of the base order over 1,234 hit users: the largest difference is that "
            "of `prior`, +0.0020 NDCG@10 [-0.0080, +0.0120] (adjusted p = 0.7000); `sft` is behind.",
        ),
        ({"sft": WORSE}, "`sft` is behind the base order: its difference over 1,234 hit users is -0.0500 NDCG@10"),
        (
            {"sft": WORSE, "rl": compared(-0.1, 0.002)},
            "`sft`, the nearest of 2 methods, is behind the base order",
        ),
        ({"sft": NONE, "rl": NONE}, "No method changes the NDCG@10 of the base order for any of 1,234 hit users."),
        ({}, "No method is compared with the base order in NDCG@10."),
        ({"SASRec": {}}, "No method is compared with the base order in NDCG@10."),
        (
            {"prior": compared(0.05, 0.00001)},
            "`prior` is ahead of the base order by +0.0500 NDCG@10 [+0.0400, +0.0600] (adjusted p < 0.0001)",
        ),
    ],
)
def test_what_is_ahead_of_the_base_order(base, start):
    assert verdict(result(base), LLM)[0].startswith(start)


@pytest.mark.parametrize(
    ("base", "pairs", "sentence"),
    [
        (
            {"prior": BETTER},
            [],
            "No method of this run answers a prompt with a language model, so that the run does not tell whether a "
            "language model adds to the features.",
        ),
        ({"prior": BETTER, "shuffled": BETTER}, [], "No method of this run answers a prompt with a language model"),
        ({"sft": BETTER}, [], "This run has no features, so that `sft` can only be compared with the base order"),
        ({"prior": BETTER, "sft": BETTER}, [], "This run does not compare `sft` with `prior`"),
        (
            {"prior": BETTER, "sft": BETTER},
            [("sft", "prior", SAME)],
            "The language model adds nothing significant to the features: the difference of `sft` to `prior` is "
            "+0.0020 NDCG@10 [-0.0080, +0.0120] (adjusted p = 0.7000).",
        ),
        (
            {"prior": BETTER, "sft": BETTER, "rl": BETTER},
            [("sft", "prior", SAME), ("rl", "prior", WORSE), ("rl", "sft", BETTER)],
            "The language model adds nothing significant to the features: the difference of `sft` to `prior` is "
            "+0.0020 NDCG@10 [-0.0080, +0.0120] (adjusted p = 0.7000); `rl` is behind.",
        ),
        (
            {"prior": BETTER, "sft": BETTER, "rl": BETTER},
            [("sft", "prior", WORSE), ("rl", "prior", BETTER)],
            "The language model adds to the features: `rl` is ahead of `prior` by +0.0500 NDCG@10 [+0.0400, +0.0600] "
            "(adjusted p = 0.0020); `sft` is behind.",
        ),
        # With eval_comparisons: all, the prior can be the first of a pair.
        (
            {"prior": BETTER, "sft": BETTER},
            [("prior", "sft", compared(-0.05, 0.002, 0.02))],
            "The language model adds to the features: `sft` is ahead of `prior` by +0.0500 NDCG@10 [+0.0300, +0.0700]",
        ),
        (
            {"prior": BETTER, "sft": BETTER},
            [("sft", "prior", WORSE)],
            "The language model makes the order of the features worse: the difference of `sft` to `prior` is -0.0500",
        ),
        (
            {"prior": BETTER, "sft": BETTER},
            [("sft", "prior", NONE)],
            "The language model adds nothing to the features: `sft` ranks as `prior` does.",
        ),
        # Only the comparison of another method: it says nothing about the language model.
        (
            {"prior": BETTER, "sft": BETTER, "lambdamart": BETTER},
            [("lambdamart", "prior", BETTER)],
            "This run does not compare `sft` with `prior`",
        ),
    ],
)
def test_what_the_language_model_adds(base, pairs, sentence):
    assert verdict(result(base, pairs), LLM)[1].startswith(sentence)


def test_the_verdict_names_seeds_and_the_validation_split():
    pairs = [("sft", "prior", SAME)]
    base = {"prior": BETTER, "sft": BETTER}
    assert "over the hit users of 3 seeds" in verdict(result(base, pairs, seeds=(1, 2, 3)), LLM)[0]
    first, second = verdict(result(base, pairs, split="valid"), LLM)
    assert first.startswith("On the validation split, `prior` is ahead")
    assert second.startswith("On the validation split, the language model adds nothing significant")
    assert "validation" not in " ".join(verdict(result(base, pairs, split="test"), LLM))


def test_a_smoke_run_has_a_banner_and_no_verdict():
    smoke = result({"prior": BETTER, "sft": BETTER}, [("sft", "prior", BETTER)], preset="smoke")
    assert banner(smoke) == BANNER and "mean nothing" in BANNER
    sentences = " ".join(verdict(smoke, LLM))
    assert "no verdict" in sentences and "prior" not in sentences and "ahead" not in sentences
