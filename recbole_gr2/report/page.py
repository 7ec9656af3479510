"""report.md: a list of sections. Each section is a function of result.json and of the summaries of the stages.

A section about a stage shows every stage whose summary has the fields of the section. No section knows the name of a
stage or a method, so a stage or a method of the user needs no change here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from recbole_gr2.console import markdown, pipe_table
from recbole_gr2.report.result import BASE, SCOPES, SPLITS, FinishedRun, in_scope, unchanged_methods
from recbole_gr2.report.tables import (
    GAP,
    comparisons_table,
    cost_table,
    curves_table,
    data_title,
    equal_metrics,
    metrics_table,
    published_tables,
    scope_title,
    settings_table,
    slices_table,
    truth_table,
)
from recbole_gr2.report.verdict import banner, verdict
from recbole_gr2.rerankers.base import stage_name
from recbole_gr2.sid.embed import textless_line
from recbole_gr2.sid.quality import neighbourhood_line

FEW_USERS = 1000  # The report warns of fewer hit users.
REAL = (int, float)


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the sections are made from.

    Attributes:
        result: content of result.json.
        runs: the finished run of each seed.
        names: names of methods in figures, if they differ from those in the tables.
    """

    result: Mapping[str, Any]
    runs: Sequence[FinishedRun]
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether the run has several seeds."""
        return len(self.runs) > 1

    def summaries(self, **fields: type | tuple[type, ...]) -> Iterator[tuple[list[str], str, Mapping[str, Any]]]:
        """Yield the summaries that have all these fields.

        Args:
            fields: name -> type of each field.

        Yields:
            The seed as a list of one cell ([] for a run of one seed), the name of the stage, and its summary.
        """
        for run in self.runs:
            for record in run.records:
                if all(isinstance(record.summary.get(field), kind) for field, kind in fields.items()):
                    yield ([str(run.seed)] if self.several else []), record.stage, record.summary

    def table(self, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
        """Return a table. With several seeds the first column is the seed."""
        return pipe_table([*(["seed"] if self.several else []), *header], lines)

    @property
    def language_models(self) -> list[str]:
        """The methods in which a language model answers a prompt."""
        return list(
            dict.fromkeys(
                str(summary.get("method", stage))
                for _, stage, summary in self.summaries(readable=REAL, statuses=Mapping, output_tokens=REAL)
            )
        )


def render_report(result: Mapping[str, Any], runs: Sequence[FinishedRun]) -> str:
    """Return report.md.

    Args:
        result: content of result.json.
        runs: the finished run of each seed.
    """
    page = Page(result=result, runs=runs)
    return "\n\n".join(filter(None, (section(page) for section in SECTIONS))) + "\n"


def title_section(page: Page) -> str:
    """Return the title, the verdict, the models, the seeds and the command."""
    result = page.result
    warning = f"**{banner(result)}**\n\n" if banner(result) else ""
    seeds = f"seed{'s' if page.several else ''} {', '.join(map(str, result['seeds']))}"
    models = f"Base model {result['base_model']}, language model {result['llm']}, preset {result['preset']}, {seeds}."
    sentences = " ".join(verdict(result, page.language_models))
    return f"# GR2 on {data_title(result)}\n\n{warning}{sentences}\n\n{models}\n\n    {result['command']}"


def metrics_section(page: Page) -> str:
    """Return the table of each scope."""
    parts = []
    for scope in SCOPES:
        if not in_scope(page.result, scope):
            continue
        parts.append(f"## {scope_title(page.result, scope)}\n\n{metrics_table(page.result, scope, pipe_table)}")
        if equal := equal_metrics(page.result, scope):
            parts.append(equal)
    return "\n\n".join(parts)


def reading_section(page: Page) -> str:
    """Return how to read the tables of metrics, the methods and the cautions."""
    notes = [
        "Hit users are the users whose candidate list contains their target. "
        "Ranking metrics of re-rankers depend on these users alone."
    ]
    if page.several:
        notes.append("Metrics are means over the seeds ± their standard deviation (n - 1).")
    notes.append(
        f"`gap closed` is the share of the difference between base and oracle in {GAP}. `unchanged` is the share of "
        "candidate lists in the base order. Intervals are 95 % bootstrap intervals over users. P-values are those of "
        f"two-sided paired randomization tests. {_family(page)}"
    )
    descriptions = {entry["method"]: entry["description"] for entry in page.result["methods"]}
    methods = "\n".join(f"- `{method}`: {markdown(text)}" for method, text in descriptions.items())
    warnings = "\n".join(f"- {text}" for text in cautions(page.result))
    return f"{' '.join(notes)}\n\nMethods:\n\n{methods}" + (f"\n\nCaution:\n\n{warnings}" if warnings else "")


def cautions(result: Mapping[str, Any]) -> list[str]:
    """Return the sentences about what limits the results."""
    hit = in_scope(result, "hit_users")
    sentences = ["These are results of one seed."] if len(result["seeds"]) == 1 else []
    if result["split"] == "valid":
        sentences.append(
            "These are figures of the validation split. It chose the epochs and weights of the base models, the steps "
            "of the prior and the trees of LambdaMART, so that the figures are slightly optimistic."
        )
    fewest = min((n for entry in hit for n in entry["n"]), default=0)
    if fewest < FEW_USERS:
        sentences.append(f"There are only {fewest:,} hit users.")
    unchanged = unchanged_methods(result)
    if unchanged:
        sentences.append(f"These methods returned every candidate list unchanged: {', '.join(unchanged)}.")
    unclear = [
        entry["method"]
        for entry in hit
        if not entry["diagnostic"]
        and "low" in (versus := entry["vs_base"].get(GAP, {}))
        and versus["low"] < 0 < versus["high"]
    ]
    if unclear:
        sentences.append(f"The interval of the {GAP} difference to base contains 0 for: {', '.join(unclear)}.")
    return sentences


def comparisons_section(page: Page) -> str:
    """Return the paired differences between methods."""
    compared = [entry for entry in in_scope(page.result, "hit_users") if entry["vs_base"] and not entry["diagnostic"]]
    if not compared and not page.result["comparisons"]:
        return ""
    unit = (
        "The unit of the intervals and tests is the user. The differences of a user are added over the seeds. A "
        "difference is the mean over the candidate lists of all seeds that contain their target."
        if page.several
        else "Differences are means over hit users."
    )
    return f"## Differences between methods\n\n{comparisons_table(page.result, pipe_table)}\n\n{unit} {_family(page)}"


def slices_section(page: Page) -> str:
    """Return NDCG@10 over parts of the hit users."""
    methods = [entry["method"] for entry in in_scope(page.result, "hit_users") if not entry["diagnostic"]]
    table = slices_table([run.per_user() for run in page.runs], methods, pipe_table)
    seeds = ", of all seeds" if page.several else ""
    parts = [f"## Slices\n\nNDCG@10 over parts of the hit users{seeds}.\n\n{table}"]
    lines: list[list[str]] = []
    for seed, _, summary in page.summaries(slices=list):
        for entry in summary["slices"]:
            figures = [entry["users"], f"{entry['share']:.1%}", f"{entry['listed']:.1%}"]
            lines.append(
                [*seed, entry["slice"], *map(_number, figures), *(_number(entry["ndcg@10"].get(m)) for m in methods)]
            )
    if lines:
        parts.append(
            "NDCG@10 over parts of all users, by the training data: how often the target occurs, and whether it "
            "follows an item of the history in the training items of any user. `listed` is the share of users whose "
            f"list contains the target.\n\n{page.table(['target', 'users', 'share', 'listed', *methods], lines)}"
        )
    return "\n\n".join(parts)


def moves_section(page: Page) -> str:
    """Return how often each method moves the target up or down."""
    frame = pd.concat([run.per_user() for run in page.runs])
    lines = []
    for method in ranked_methods(page.result):
        moved = frame[BASE] - frame[method]
        shares = [f"{float(each.mean()):.1%}" for each in (moved > 0, moved == 0, moved < 0)]
        lines.append([method, *shares, *(f"{float(q):.0f}" for q in frame[method].quantile([0.25, 0.5, 0.75]))])
    if not lines:
        return ""
    header = ["method", "target up", "same rank", "target down", "rank, 25 %", "rank, median", "rank, 75 %"]
    seeds = ", of all seeds" if page.several else ""
    quartiles = ", ".join(f"{float(q):.0f}" for q in frame[BASE].quantile([0.25, 0.5, 0.75]))
    return (
        f"## Rank before and after\n\nShare of the hit users{seeds} whose target has a better, the same or a worse "
        f"rank than in the base order, and the quartiles of the rank. Those of the base order are {quartiles}.\n\n"
        f"{pipe_table(header, lines)}"
    )


def ranked_methods(result: Mapping[str, Any]) -> list[str]:
    """Return the methods that rank the candidates, without the base order and diagnostic methods."""
    return [
        entry["method"]
        for entry in in_scope(result, "hit_users")
        if entry["method"] != BASE and not entry["diagnostic"]
    ]


def published_section(page: Page) -> str:
    """Return the figures of papers for this data set."""
    tables, sources = published_tables(page.result["dataset"], pipe_table)
    protocol = page.result["settings"].get("eval_args", {"value": {"split": {"LS": "valid_and_test"}}})["value"]
    files = page.result["settings"].get("benchmark_filename", {"value": None})["value"]
    # The figures are those of the test split of leave-one-out.
    if not tables or files or "LS" not in protocol["split"] or page.result["split"] != "test":
        return ""
    parts = [
        "## Published figures, for reference\n\n"
        "These are figures of papers, on the same data set with leave-one-out over the full catalogue. "
        "Their candidate lists and budgets differ from those of this run. `mask`: items of the history "
        "are excluded. `fit`: n-2 if the validation item of a user only chooses the model, n-1 if the "
        "model learns from it too. Empty: the source does not state it. Only rows with the protocol of "
        "this package (mask yes, fit n-2) can be compared with its figures, and only roughly."
    ]
    parts += [f"{SCOPES.get(scope, scope)}:\n\n{table}" for scope, table in tables.items()]
    parts.append("\n".join(f"- {name}: {text}." for name, text in sources.items()))
    return "\n\n".join(parts)


def answers_section(page: Page) -> str:
    """Return the form of the answers of language models."""
    lines = [
        [
            *seed,
            str(summary.get("method", stage)),
            _share(summary["readable"]),
            ", ".join(f"{status} {count}" for status, count in summary["statuses"].items()),
            str(summary["output_tokens"]),
            _share(summary["unchanged"]),
            _share(summary.get("as_prior")),
            _share(summary.get("first_as_prior")),
            _share(summary.get("cited_in_prompt")),
            _share(summary.get("grounded") if summary.get("cited") else None),
            str(summary["requests_per_second"]),
            *(
                " ".join(f"{place}:{count}" for place, count in summary.get(f"promoted_from_{what}", {}).items())
                for what in ("rank", "slot")
            ),
        ]
        for seed, stage, summary in page.summaries(
            readable=REAL, statuses=Mapping, output_tokens=REAL, unchanged=REAL, requests_per_second=REAL
        )
    ]
    if not lines:
        return ""
    header = [
        "method",
        "readable",
        "statuses",
        "tokens",
        "unchanged",
        "as prior",
        "first as prior",
        "cited in prompt",
        "cites its first",
        "requests/s",
        "base rank of the first item",
        "prompt slot of the first item",
    ]
    return (
        f"## Answers\n\n{page.table(header, lines)}\n\n"
        "`as prior` is the share of candidate lists in the order of the prior. `first as prior` is the share whose "
        "first item is that of the prior. `cited in prompt` is the share of the semantic IDs in the reasoning that the "
        "prompt contains. `cites its first` is the share of answers whose reasoning cites their first item. A policy "
        "has a position bias if it selects the first item from one slot of the prompt much more often than from others."
    )


def truth_section(page: Page) -> str:
    """Return how many statements of the answers are true."""
    if not page.result["truth"]:
        return ""
    return (
        f"## Truth of the reasoning\n\n{truth_table(page.result, pipe_table)}\n\n"
        "Share of the answers whose statements are true. Only statements in the form of the rules teacher can be "
        "checked; those of the rules teacher are always true. `habit`: the user interacts with such kinds of items. "
        "`kind`: the cited candidate is of the stated kind. `why`: the stated reason holds (brand, kind, "
        "co-occurrence). `all`: all of these are true."
    )


def examples_section(page: Page) -> str:
    """Return the examples that the evaluation of the first seed wrote."""
    run = page.runs[0]
    file = run.folders[run.evaluation.stage] / "examples.md"
    if not file.is_file():
        return ""
    seed = f" of seed {run.seed}" if page.several else ""
    return (
        f"## Examples\n\nThe candidate lists{seed} in which the target moved furthest up, and those in which it moved "
        "furthest down. Each example has the history items of the prompt, the candidates with their ranks, and the "
        "reasoning of the answer, with titles in place of semantic IDs.\n\n"
        f"{file.read_text(encoding='utf-8').strip()}"
    )


def protocol_section(page: Page) -> str:
    """Return what has to agree when the results of two runs are compared."""
    for _, _, summary in page.summaries(protocol=Mapping):
        named = {**summary["protocol"], "reported split": SPLITS[page.result["split"]]}
        lines = "\n".join(f"- {name}: {markdown(str(text))}" for name, text in named.items())
        return f"## Protocol\n\n{lines}\n\n{methods_table(page)}"
    return ""


def methods_table(page: Page) -> str:
    """Return which stages each method of the first run uses, directly or through other stages."""
    run = page.runs[0]
    needs = {record.stage: tuple(record.needs) for record in run.records}

    def closure(stage: str) -> set[str]:
        return {stage, *(each for need in needs.get(stage, ()) for each in closure(need))}

    lines = {}
    for entry in page.result["methods"]:
        method = entry["method"]
        names = (stage_name(method), method, f"base_model_{method}", *(["candidates"] if method == BASE else []))
        stage = next((name for name in names if name in needs), "")
        used = closure(stage) - {stage}
        lines[method] = [
            method,
            stage,
            ", ".join(each for each in needs if each in used),
            "" if not entry["diagnostic"] else "yes",
        ]
    header = ["method", "its stage", "earlier stages whose files it uses", "diagnostic"]
    return f"What each method learns from:\n\n{pipe_table(header, list(lines.values()))}"


def candidates_section(page: Page) -> str:
    """Return the figures of the candidate lists of each split. A report of validation has none of the test split."""
    reported = page.result["split"]
    lines: list[list[str]] = []
    header: list[str] = []
    for seed, _, summary in page.summaries(stats=Mapping):
        for split, figures in _maps(summary["stats"]):
            header = header or ["split", *figures]
            if split != "test" or reported == "test":
                lines.append([*seed, split, *(_number(figures.get(name)) for name in header[1:])])
    if not lines:
        return ""
    parts = [f"## Candidates\n\n{page.table(header, lines)}"]
    depths: list[list[str]] = []
    header = []
    weights: Mapping[str, Any] = {}
    for seed, _, summary in page.summaries(depth=Mapping):
        weights = summary.get("fusion", weights)  # Only the stage that makes the lists has them.
        for name, figures in _maps(summary["depth"]) if summary.get("split", "test") == reported else ():
            header = header or ["base model", "weight", *figures]
            depths.append([*seed, name, _number(weights.get(name)), *(_number(figures.get(key)) for key in header[2:])])
    if depths:
        parts.append(
            f"Recall of the base models by depth, over all users of the {SPLITS[reported]} split.\n\n"
            f"{page.table(header, depths)}"
        )
    return "\n\n".join(parts)


def semantic_ids_section(page: Page) -> str:
    """Return the quality of the semantic IDs, and of the embeddings that they come from."""
    paragraphs = [
        f"{_seed(seed)}Uniqueness {summary['uniqueness']:.4%} ({summary['uniqueness_without_random_level']:.2%} by "
        f"nearest codes alone), largest collision {summary['largest_collision']}, codes in use "
        f"{summary['used_codes']}, entropy {[round(entropy, 2) for entropy in summary['entropy']]} bits, "
        f"reconstruction (cosine) {summary['reconstruction']:.3f}. "
        f"Neighbourhood: {neighbourhood_line(summary.get('neighbourhood'))}."
        for seed, _, summary in page.summaries(
            uniqueness=REAL,
            uniqueness_without_random_level=REAL,
            largest_collision=int,
            used_codes=list,
            entropy=list,
            reconstruction=REAL,
        )
    ]
    texts = {
        textless_line(summary)
        for _, _, summary in page.summaries(items=int, textless=int, collaborative=int, token=int)
    }  # The embeddings do not depend on the seed.
    paragraphs += [f"Embeddings: {text}." for text in sorted(texts)] if paragraphs else []
    return "\n\n".join(["## Semantic IDs", *paragraphs]) if paragraphs else ""


def prior_section(page: Page) -> str:
    """Return the features and the quality of the prior."""
    lines: list[list[str]] = []
    header: list[str] = []
    features: list[str] = []
    steps = []
    for seed, _, summary in page.summaries(features=list, steps=list, quality=Mapping):
        features = list(summary["features"])
        steps.append(
            f"{_seed(seed)}Steps of the fits, chosen on validation lists: {', '.join(map(str, summary['steps']))}."
        )
        for split, figures in _maps(summary["quality"]):
            header = header or ["split", *figures]
            lines.append([*seed, split, *(_number(figures.get(name)) for name in header[1:])])
    if not lines:
        return ""
    return (
        f"## Prior\n\n{len(features)} features of each candidate: {', '.join(features)}. {' '.join(steps)} "
        f"The prior of a train list comes from fits that did not see the list.\n\n{page.table(header, lines)}"
    )


def traces_section(page: Page) -> str:
    """Return how many reasoning traces were accepted, and why others were rejected."""
    paragraphs = []
    for seed, _, summary in page.summaries(
        accepted=int, requests=int, accepted_share=REAL, tries_mean=REAL, rejected_for=Mapping
    ):
        sentences = [
            f"{_seed(seed)}{summary['accepted']:,} of {summary['requests']:,} train lists have an accepted trace "
            f"({summary['accepted_share']:.1%}), after {summary['tries_mean']:.1f} tries on average."
        ]
        if "grounded" in summary:
            sentences.append(f"{summary['grounded']:.1%} cite their first item.")
        if summary.get("cited"):
            sentences.append(f"The prompt contains {summary['cited_in_prompt']:.1%} of {summary['cited']:,} cited IDs.")
        if summary["rejected_for"]:
            reasons = ", ".join(f"{reason} ({_number(count)})" for reason, count in summary["rejected_for"].items())
            sentences.append(f"Reasons of rejection: {reasons}.")
        if summary.get("usage"):
            sentences.append("Endpoint: " + ", ".join(f"{k} {v}" for k, v in summary["usage"].items()) + ".")
        if summary.get("cost") is not None:
            sentences.append(f"Cost: {summary['cost']:,.2f}.")
        paragraphs.append(" ".join(sentences))
    return "\n\n".join(["## Traces", *paragraphs]) if paragraphs else ""


def rounds_section(page: Page) -> str:
    """Return the stages that train in rounds of generated answers."""
    lines = [
        [*seed, stage, f"{summary['rounds']:,}", f"{summary['requests']:,}"]
        for seed, stage, summary in page.summaries(rounds=int, requests=int)
    ]
    if not lines:
        return ""
    header = ["stage", "rounds", "candidate lists"]
    return f"## Reinforcement learning\n\n{page.table(header, lines)}"


def curves_section(page: Page) -> str:
    """Return the learning curves."""
    if not page.result["curves"]:
        return ""
    seeds = " and over the seeds" if page.several else ""
    return (
        f"## Learning curves\n\nMeans over equal parts of the training steps or rounds{seeds}, on training data.\n\n"
        f"{curves_table(page.result['curves'], pipe_table)}"
    )


def settings_section(page: Page) -> str:
    """Return the settings that differ from their defaults."""
    return (
        "## Settings\n\nThese settings differ from their defaults. config.yaml has all settings.\n\n"
        f"{settings_table(page.result['settings'], pipe_table)}"
    )


def cost_section(page: Page) -> str:
    """Return the cost of each stage."""
    return (
        f"## Cost\n\n{cost_table(page.result, pipe_table)}\n\n"
        "Wall time includes interrupted starts, up to the last file that each wrote. Peak memory and code version are "
        "those of the last start. A cached stage has the cost of the run that computed it."
    )


def runs_section(page: Page) -> str:
    """Return the folders of the runs of several seeds."""
    if not page.several:
        return ""
    return "Runs: " + ", ".join(run.path.parent.name for run in page.runs) + "."


SECTIONS: tuple[Callable[[Page], str], ...] = (
    title_section,
    metrics_section,
    reading_section,
    protocol_section,
    comparisons_section,
    slices_section,
    moves_section,
    published_section,
    answers_section,
    truth_section,
    examples_section,
    candidates_section,
    semantic_ids_section,
    prior_section,
    traces_section,
    rounds_section,
    curves_section,
    settings_section,
    cost_section,
    runs_section,
)


def _family(page: Page) -> str:
    """Return which tests the Holm adjustment covers."""
    separate = (
        f"all differences between methods over hit users, and separately all differences to {BASE} over all users"
        if page.several
        else f"all differences to {BASE} of a scope, and separately all other pairs of methods"
    )
    return (
        f"The Holm adjustment covers {separate}, with all compared metrics. It leaves out diagnostic methods, which "
        "have no adjusted p-value."
    )


def _maps(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the entries of a map whose values are maps; [] for anything else."""
    if not isinstance(value, Mapping) or not all(isinstance(entry, Mapping) for entry in value.values()):
        return []
    return [(str(name), entry) for name, entry in value.items()]


def _seed(cells: Sequence[str]) -> str:
    return f"Seed {cells[0]}: " if cells else ""


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
