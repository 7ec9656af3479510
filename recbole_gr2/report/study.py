"""report.md of a study: a function of its result.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_gr2.console import render_table
from recbole_gr2.report.result import SCOPES
from recbole_gr2.report.tables import Render


def trials_table(result: Mapping[str, Any], render: Render = render_table) -> str:
    """Return the trials, the best first, then the failed ones.

    Args:
        result: content of result.json.
        render: makes the table of its header and its lines.
    """
    names = list(dict.fromkeys(name for trial in result["trials"] for name in trial["settings"]))
    sign = 1 if result["direction"] == "minimize" else -1
    ordered = sorted(result["trials"], key=lambda each: (each["value"] is None, sign * (each["value"] or 0)))
    lines = [
        [
            str(trial["trial"]),
            "" if trial["value"] is None else f"{trial['value']:.4f}",
            *(_shown(trial["settings"].get(name)) for name in names),
            f"{trial['seconds']:,.0f} s",
            trial["state"],
        ]
        for trial in ordered
    ]
    return render(["trial", result["metric"], *names, "time", "state"], lines)


def render_study(result: Mapping[str, Any], folder: Path) -> str:
    """Return report.md.

    Args:
        result: content of result.json.
        folder: the folder of the study, from which links start.
    """
    parts = [
        f"# Tuning of {result['method']} on {result['dataset']}, validation",
        f"{result['metric']} of the validation split, {SCOPES[result['scope']]}. Preset {result['preset']}, seed "
        f"{result['seeds'][0]}, sampler {result['sampler']}, {len(result['trials'])} trials.\n\n"
        f"    {result['command']}",
        "No trial reads a test target. The validation split also chooses the epochs and weights of the base models, "
        "the steps of the prior and the trees of LambdaMART, and it chose the best of these trials. Its best value is "
        "therefore optimistic.",
    ]
    best = next((trial for trial in result["trials"] if trial["trial"] == result["best"]), None)
    if best:
        changed = "\n".join(f"- `{name}: {_shown(value)}`" for name, value in best["settings"].items())
        parts.append(
            f"## Best configuration\n\nTrial {best['trial']} has {result['metric']} {best['value']:.4f}. "
            f"[best.yaml](best.yaml) has its settings, for `--config_files`.\n\n{changed}"
        )
    tests = [
        f"- Trial {each['trial']}: {result['metric']} of {result['method']} "
        f"{'unknown' if each['value'] is None else format(each['value'], '.4f')}, "
        f"[report.md]({Path(os.path.relpath(each['result'], folder)).with_name('report.md').as_posix()})"
        for each in result["tests"]
    ]
    if tests:
        several = "" if len(tests) == 1 else " The study was continued after the first of these evaluations."
        parts.append(f"## Test\n\nThe best configuration on the test split.{several}\n\n" + "\n".join(tests))
    else:
        parts.append("## Test\n\nNo configuration has been evaluated on the test split.")
    parts.append(
        f"## Trials\n\n```\n{trials_table(result)}\n```\n\nTime is the wall time of the last start of a trial."
    )
    if result["importance"]:
        lines = [[name, f"{share:.1%}"] for name, share in result["importance"].items()]
        parts.append(
            "## Importance\n\nShare of the variance of the values that each setting explains (fANOVA). Few trials give "
            f"a rough estimate.\n\n```\n{render_table(['setting', 'share'], lines)}\n```"
        )
    failed = [f"- Trial {trial['trial']}: {trial['failed']}" for trial in result["trials"] if trial["failed"]]
    parts += ["## Failed trials", *failed] if failed else []
    return "\n\n".join(parts) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value) if value is not None else "~"
