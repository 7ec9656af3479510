"""The run folder: result.json for programs, report.md for people. Both are functions of what the stages wrote."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_gr2.config import Settings, properties_folder, read_yaml
from recbole_gr2.console import Console, render_table
from recbole_gr2.pipeline import Planned
from recbole_gr2.ranking import ndcg_at
from recbole_gr2.sid.embed import textless_line
from recbole_gr2.sid.quality import neighbourhood_line
from recbole_gr2.stages.evaluate import DIAGNOSTIC, read_per_user
from recbole_gr2.stages.rerank import PREFIX
from recbole_gr2.stages.rl import FIGURES, curve
from recbole_gr2.store import write_json
from recbole_gr2.types import StageRecord

SCOPES = {"all": "all users", "in_list": "users whose list holds their target (in_list)"}
ROWS = (
    "Rows: `base` is the base model's own order, `oracle` the target first, `evidence` the order of the prior that sft "
    "and rl start from, without a language model; `lambdamart` is LightGBM over the same evidence and the same train "
    "lists; `shuffled` is the RL model on shuffled candidates. `gap closed` is the share of the way from base to oracle "
    "(NDCG@5)."
)
COST = (
    "Wall time of the run that computed it, with that of starts before it that were stopped, up to the last file each "
    "left; peak memory, and the version and commit of its code, are of the last start."
)
SHOWN = ("recall@1", "recall@3", "recall@5", "recall@10", "ndcg@5", "ndcg@10")


def write_run(
    planned: Sequence[Planned],
    done: Sequence[tuple[StageRecord, bool]],
    settings: Settings,
    command: str,
    console: Console,
) -> Path:
    """Write `runs/<name>/` and print the table; returns the path of result.json."""
    folder = new_folder(Path(settings["checkpoint_dir"]) / "gr2" / settings["dataset"] / "runs")
    result = build_result(done, settings, command, {p.stage.name: p.folder for p in planned})
    (folder / "config.yaml").write_text(settings.as_yaml(), encoding="utf-8")
    write_json(folder / "run.json", {"command": command, "stages": {p.stage.name: str(p.folder) for p in planned}})
    write_json(folder / "result.json", result)
    (folder / "report.md").write_text(render_report(result, done, planned[-1].folder), encoding="utf-8")
    (folder / "table.tex").write_text(latex_tables(result), encoding="utf-8")
    for scope in ("all", "in_list"):
        print(f"\n{scope_title(result, scope)}\n{metrics_table(result, scope)}", flush=True, file=console.stream)
    console.say(f"report: {folder / 'report.md'}")
    return folder / "result.json"


def new_folder(parent: Path) -> Path:
    """An empty folder in `parent`, named by the time; a number tells two of the same second apart."""
    parent.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y%m%d-%H%M%S")
    folder = parent / f"{name}-{len(list(parent.glob(name + '*'))) + 1}" if (parent / name).exists() else parent / name
    folder.mkdir()
    return folder


def build_result(
    done: Sequence[tuple[StageRecord, bool]], settings: Settings, command: str, folders: Mapping[str, Path]
) -> dict:
    """result.json: rows with metrics per scope, comparisons, truth of the answers, tokenizer health, learning curves,
    and cost per stage."""
    records = {record.stage: record for record, _ in done}
    return {
        "dataset": settings["dataset"],
        "base_model": settings["base_model"],
        "llm": settings["llm"],
        "preset": settings["preset"],
        "seeds": [settings["seed"]],
        "command": command,
        "settings": settings.chosen(),
        "rows": records["evaluate"].facts["rows"],
        "pairs": records["evaluate"].facts["pairs"],
        "truth": records["evaluate"].facts["truth"],
        "tokenizer": {"uniqueness": records["tokenizer"].facts["uniqueness"]},
        "curves": learning_curves(folders),
        "stages": [
            {
                "stage": record.stage,
                "key": record.key,
                "seconds": record.seconds,
                "peak_memory_mb": record.peak_memory_mb,
                "cached": cached,
                "code": record.code,
            }
            for record, cached in done
        ],
    }


def scope_title(result: dict, scope: str) -> str:
    """Which users a table is over."""
    count = next(row["n"] for row in result["rows"] if row["scope"] == scope)
    return f"{result['dataset']}, {SCOPES[scope]}, n = {count:,}"


def metrics_table(result: dict, scope: str) -> str:
    """One line a row: metrics, difference to base in NDCG@5 with interval and adjusted p, unchanged share."""
    rows = [row for row in result["rows"] if row["scope"] == scope]
    shown = [metric for metric in SHOWN if metric in rows[0]["metrics"]]
    # The differences: RecBole rounds its metrics, and of two rounded ones little is left.
    gap = next(row["vs_base"] for row in rows if row["row"] == "oracle").get("ndcg@5", {"diff": 0.0})["diff"]
    lines = []
    for row in rows:
        versus = row["vs_base"].get("ndcg@5")
        change = f"{versus['diff']:+.4f} [{versus['low']:+.4f}, {versus['high']:+.4f}]" if versus else ""
        p = f"{versus['p_holm']:.4f}" if versus and "p_holm" in versus else ""
        closed = f"{versus['diff'] / gap:+.1%}" if versus and gap else ""
        lines.append(
            [
                row["row"],
                *(f"{row['metrics'][m]:.4f}" for m in shown),
                change,
                p,
                closed,
                "" if row["unchanged"] is None else f"{row['unchanged']:.1%}",
            ]
        )
    return render_table(["row", *shown, "ndcg@5 vs base [95 %]", "p (Holm)", "gap closed", "unchanged"], lines)


def latex_tables(result: Mapping) -> str:
    """table.tex: a tabular (booktabs) of each scope with the best figure of each column bold, rows that make no claim
    left out of that; with several seeds the means, and their standard deviations behind them."""
    parts, several = [], len(result["seeds"]) > 1
    for scope, who in SCOPES.items():
        rows = [row for row in result["rows"] if row["scope"] == scope]
        shown = [metric for metric in SHOWN if len({str(row["metrics"].get(metric)) for row in rows}) > 1]
        names = [row["row"] for row in rows]
        cells = pd.DataFrame([[row["metrics"][metric] for metric in shown] for row in rows], names, shown)
        means = cells.map(lambda cell: cell["mean"]) if several else cells
        best = means.drop(index=[name for name in names if name in DIAGNOSTIC]).round(4).max()
        bold = means.round(4).eq(best) & ~means.index.isin(DIAGNOSTIC)[:, None]
        text = cells.map(lambda cell: f"{cell['mean']:.4f} $\\pm$ {cell['sd']:.4f}" if several else f"{cell:.4f}")
        style = text.style.apply(lambda _: bold.replace({True: "textbf:--rwrap;", False: ""}), axis=None)
        style.format_index(escape="latex")
        columns = "l" + "r" * len(shown)
        parts.append(f"% {result['dataset']}, {who}\n{style.to_latex(hrules=True, column_format=columns)}")
    return "\n".join(parts)


def pairs_table(result: dict) -> str:
    """One line a pair of re-rankers: differences in R@1 and NDCG@5, with interval and adjusted p."""
    shown, lines = ("recall@1", "ndcg@5"), []
    for pair in result["pairs"]:
        line = [f"{pair['row']} - {pair['versus']}"]
        for metric in shown:
            found = pair["metrics"][metric]
            line += [
                f"{found['diff']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]",
                f"{found['p_holm']:.4f}" if "p_holm" in found else "",
            ]
        lines.append(line)
    return render_table(["rows", *(cell for metric in shown for cell in (f"{metric} [95 %]", "p (Holm)"))], lines)


def truth_section(result: dict) -> list[str]:
    """What the answers' statements are worth, or nothing where none can be checked."""
    if not result["truth"]:
        return []
    header = ["row", "habit", "kind", "why", "all"]
    lines = [[row, *(f"{shares[name]:.1%}" for name in header[1:])] for row, shares in result["truth"].items()]
    return [
        f"## Is the reasoning true?\n\n```\n{render_table(header, lines)}\n```\n\nShare of the answers whose statements "
        "are true, in the words of the rules teacher, whose own always are: `habit`, the shopper takes such kinds of "
        "items; `kind`, the cited candidate is of the kind that is named; `why`, the reason given for it holds (brand, "
        "kind, what it goes with); `all` of these."
    ]


def learning_curves(folders: Mapping[str, Path]) -> dict[str, dict[str, list[float]]]:
    """What training logged: stage -> figure -> its means over five equal parts of the steps, first to last.

    Args:
        folders: of finished stages; those that train a language model have a log.json.
    """
    curves = {}
    for stage, folder in folders.items():
        if not (folder / "log.json").is_file():
            continue
        logged = json.loads((folder / "log.json").read_text(encoding="utf-8"))
        for part, log in ({"": logged} if isinstance(logged, list) else logged).items():
            # midtrain's steps on new tokens alone, which come first and count from 1 like those behind them, are left out
            start = max(n for n, line in enumerate(log) if n == 0 or line["step"] <= log[n - 1]["step"])
            names = FIGURES if "reward" in log[-1] else [name for name in log[-1] if name.startswith("loss")]
            curves[f"{stage} {part}".strip()] = curve(log[start:], names)
    return curves


def curves_table(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """One line a stage and figure: its means over equal parts of the steps."""
    lines = [
        [stage, name, *(f"{v:.4f}" for v in values)]
        for stage, figures in curves.items()
        for name, values in figures.items()
    ]
    parts = max(map(len, lines)) - 2
    header = ["stage", "figure", *(f"{n} of {parts}" for n in range(1, parts + 1))]
    return render_table(header, [line + [""] * (len(header) - len(line)) for line in lines])


def settings_table(settings: Mapping[str, Mapping]) -> str:
    """One line a setting that differs from its default."""
    return render_table(["setting", "value", "from"], [[k, str(s["value"]), s["from"]] for k, s in settings.items()])


def render_report(result: dict, done: Sequence[tuple[StageRecord, bool]], evaluated: Path) -> str:
    """report.md; `evaluated` is the folder of the evaluate stage."""
    records = {record.stage: record for record, _ in done}
    sids = records["tokenizer"].facts
    rankings = {stage.removeprefix(PREFIX): r.facts for stage, r in records.items() if stage.startswith(PREFIX)}
    parts = [
        f"# GR2 on {result['dataset']}",
        f"Base model {result['base_model']}, language model {result['llm']}, preset {result['preset']}, "
        f"seed {result['seeds'][0]}.\n\n    {result['command']}",
    ]
    for scope in ("all", "in_list"):
        parts.append(f"## {scope_title(result, scope)}\n\n```\n{metrics_table(result, scope)}\n```")
    parts.append(
        f"{ROWS} Intervals are 95 % bootstrap intervals over users, p-values two-sided paired randomisation tests, "
        f"Holm-adjusted over the rows and metrics of a scope. Caution: one seed{caveat(result)}."
    )
    if result["pairs"]:
        parts.append(
            "## Re-rankers against each other\n\nPaired differences over the users of the in_list scope, with 95 % "
            "bootstrap intervals; p-values of two-sided paired randomisation tests, Holm-adjusted over this table and "
            f"its metrics.\n\n```\n{pairs_table(result)}\n```"
        )
    parts.append(f"## Slices\n\nNDCG@5 of the in_list scope.\n\n```\n{slices_table([read_per_user(evaluated)])}\n```")
    parts += published(result["dataset"])
    answers = [
        [
            row,
            f"{facts['readable']:.1%}",
            str(facts["statuses"]),
            str(facts["output_tokens"]),
            f"{facts['unchanged']:.1%}",
            f"{facts['as_evidence']:.1%}",
            f"{facts['first_as_evidence']:.1%}",
            _share(facts["cited_in_prompt"]),
            _share(facts["grounded"] if facts["cited"] else None),
            str(facts["lists_per_second"]),
            *(" ".join(f"{k}:{v}" for k, v in facts[f"promoted_from_{where}"].items()) for where in ("rank", "slot")),
        ]
        for row, facts in rankings.items()
        if "readable" in facts
    ]
    if answers:
        header = [
            "row",
            "readable",
            "statuses",
            "tokens",
            "unchanged",
            "as evidence",
            "its first",
            "cited in prompt",
            "cites its first",
            "lists/s",
            "first place goes to base rank",
            "to slot of the prompt",
        ]
        parts.append(
            f"## Answers\n\n```\n{render_table(header, answers)}\n```\n\n`as evidence` is the share of lists in the "
            "very order of the prior, `its first` the share with the same item in front, `cited in prompt` the share "
            "of the semantic IDs in the reasoning that the prompt shows, `cites its first` the share of answers whose "
            "reasoning cites the item that they put first. A slot that takes far more first places than others is a "
            "position bias."
        )
    parts += truth_section(result)
    if (evaluated / "examples.md").is_file():
        parts.append(
            "## Examples\n\nThe lists in which the target moved furthest up, and those in which furthest down: the items "
            "that the prompt shows, the candidates with their places, and the answer's reasoning with titles in place of "
            f"IDs.\n\n{(evaluated / 'examples.md').read_text(encoding='utf-8').strip()}"
        )
    stats = records["candidates"].facts["stats"]
    lists = [
        [split, *(f"{v:.4f}" if isinstance(v, float) else f"{v:,}" for v in facts.values())]
        for split, facts in stats.items()
    ]
    parts.append(f"## Candidates\n\n```\n{render_table(['split', *next(iter(stats.values()))], lists)}\n```")
    parts.append(
        f"## Semantic IDs\n\nUniqueness {sids['uniqueness']:.4%} ({sids['uniqueness_without_random_level']:.2%} "
        f"by nearest codes alone), largest collision {sids['largest_collision']}, codes in use {sids['used_codes']}, "
        f"entropy {[round(e, 2) for e in sids['entropy']]} bits, reconstruction (cosine) {sids['reconstruction']:.3f}. "
        f"Neighbourhood: {neighbourhood_line(sids['neighbourhood'])}. "
        f"Embeddings: {textless_line(records['embeddings'].facts)}."
    )
    evidence = records["evidence"].facts
    if evidence["facts"]:
        found = [
            [split, f"{q['lists']:,}", *(f"{q[name]:.4f}" for name in list(q)[1:])]
            for split, q in evidence["quality"].items()
        ]
        header = ["split", *next(iter(evidence["quality"].values()))]
        parts.append(
            f"## Evidence\n\n{len(evidence['facts'])} facts about each candidate: {', '.join(evidence['facts'])}. "
            f"The prior's fits took {', '.join(map(str, evidence['steps']))} steps, chosen by validation lists; its "
            f"orders of train lists come from fits that did not see them.\n\n```\n{render_table(header, found)}\n```"
        )
    if "traces" in records:
        traces = records["traces"].facts
        parts.append(
            f"## Traces\n\n{traces['accepted']:,} of {traces['requests']:,} train lists have an accepted trace "
            f"({traces['accepted_share']:.1%}), after {traces['tries_mean']:.1f} tries on average; "
            f"{traces['grounded']:.1%} cite the item they put first"
            + (
                f", and {traces['cited_in_prompt']:.1%} of {traces['cited']:,} cited IDs stand in the prompt. "
                if traces["cited"]
                else ". "
            )
            + f"Rejected for: {traces['rejected_for']}."
            + (f" Endpoint: {traces['usage']}." if traces["usage"] else "")
            + (f" Cost: {traces['cost']:,.2f}." if traces["cost"] is not None else "")
        )
    for title, stage in (("On-policy distillation", "distill"), ("RL", "rl"), ("RL without reasoning", "internalise")):
        if stage not in records:
            continue
        rl = records[stage].facts
        injected = f", {rl['injected']:,} of them with their target put in" if rl["injected"] else ""
        parts.append(f"## {title}\n\n{rl['rounds']} rounds on {rl['requests']:,} lists{injected}.")
    if result["curves"]:
        parts.append(
            "## Learning curves\n\nMeans over equal parts of the steps or rounds, of what was trained on.\n\n"
            f"```\n{curves_table(result['curves'])}\n```"
        )
    parts.append(
        "## Settings\n\nThose that differ from their defaults; all are in config.yaml.\n\n"
        f"```\n{settings_table(result['settings'])}\n```"
    )
    cost = [
        [
            s["stage"],
            f"{s['seconds']:,.0f} s",
            f"{s['peak_memory_mb']:,.0f} MiB",
            "yes" if s["cached"] else "",
            s["code"],
        ]
        for s in result["stages"]
    ]
    cost = render_table(["stage", "wall time", "peak memory", "cached", "code"], cost)
    parts.append(f"## Cost\n\n```\n{cost}\n```\n\n{COST}")
    return "\n\n".join(parts) + "\n"


def published(dataset: str) -> list[str]:
    """Reference figures of papers for this data set, apart from the run's own rows; nothing where there are none."""
    figures = read_yaml((properties_folder() / "published.yaml").read_text(encoding="utf-8")).get(dataset)
    if figures is None:
        return []
    parts = ["## Published figures, for reference\n\nThose of papers, on their own lists, splits and budgets."]
    for scope, rows in figures.items():
        names = [metric for metric in SHOWN if any(metric in row for row in rows.values())]
        lines = [[name, *(f"{row[m]:.4f}" if m in row else "" for m in names)] for name, row in rows.items()]
        parts.append(f"{scope}:\n\n```\n{render_table(['published', *names], lines)}\n```")
    return parts


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def slices_table(frames: Sequence[pd.DataFrame]) -> str:
    """NDCG@5 of each re-ranker by the target's base rank, the history's length and the target's popularity."""
    lists = pd.concat(frames)
    rows = [name for name in lists.columns if name not in ("user", "history", "popularity", *DIAGNOSTIC)]
    cuts = {
        "base": pd.cut(lists["base"], [0, 1, 3, 5, np.inf], duplicates="drop"),
        "history": pd.qcut(lists["history"], 3, duplicates="drop"),
        "popularity": pd.qcut(lists["popularity"], 3, duplicates="drop"),
    }
    lines = []
    for column, cut in cuts.items():
        for _, part in lists.groupby(cut, observed=True):
            low, high = part[column].min(), part[column].max()
            what = {"base": "base rank", "history": "items of history", "popularity": "target taken"}[column]
            lines.append(
                [
                    f"{what} {low}" + (f" to {high}" if high > low else ""),
                    f"{len(part):,}",
                    *(f"{ndcg_at(part[row].to_numpy(), 5).mean():.4f}" for row in rows),
                ]
            )
    return render_table(["lists", "n", *rows], lines)


def copies(result: dict) -> list[str]:
    """Rows of re-rankers that left every list as it was."""
    return sorted({r["row"] for r in result["rows"] if r["row"] not in ("base", "oracle") and r["unchanged"] == 1.0})


def caveat(result: dict) -> str:
    """What the numbers themselves warn of."""
    row = next(r for r in result["rows"] if r["scope"] == "in_list")
    small = f", {row['n']} users in_list" if row["n"] < 1000 else ""
    crossing = [
        r["row"]
        for r in result["rows"]
        if r["scope"] == "in_list"
        and r["row"] not in ("base", "oracle", "shuffled")
        and r["vs_base"]["ndcg@5"]["low"] < 0 < r["vs_base"]["ndcg@5"]["high"]
    ]
    unmoved = copies(result)
    small += f"; {', '.join(unmoved)} left every list as it was" if unmoved else ""
    return small + (f"; the interval of {', '.join(crossing)} holds 0" if crossing else "")
