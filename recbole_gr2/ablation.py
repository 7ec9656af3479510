"""Ablations: variants of a run side by side, described by a data file.

`properties/ablation/NAME.yaml` says which `stages` every variant runs, the `settings` common to all, the `columns` of
the table as `heading: path` into a stage's facts (see `figure`), the `variants` as {name, settings, published}, and, as
`note`, what a reader has to know. `published` holds a paper's figure or words for a column; they stand in columns of
their own.

The user's settings win over the file's, and those of a variant win over the file's common ones. A setting that a
variant varies is not the user's to give: that is an error, unless it is the same value. A variant is a plan of the
pipeline like any other, so what is finished is cached, shared stages run once, and the same command continues.
"""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_gr2 import pipeline
from recbole_gr2.bridge.data import Data
from recbole_gr2.config import Settings, load_settings, properties_folder, read_yaml
from recbole_gr2.console import Console, render_table
from recbole_gr2.errors import ConfigurationError, GateError, GR2Error, MissingFileError
from recbole_gr2.report import new_folder
from recbole_gr2.store import read_manifest, write_json


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table: what it sets, and a paper's figures (or words) by column heading."""

    name: str
    settings: dict = field(default_factory=dict)
    published: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """An ablation file; `columns` is heading -> path into stage -> facts."""

    name: str
    stages: list
    columns: dict
    variants: tuple[Variant, ...]
    settings: dict = field(default_factory=dict)
    note: str = ""


def read_ablation(name: str) -> Ablation:
    """A packaged ablation by name, or a file of your own by path.

    Raises:
        ConfigurationError: there is no such ablation, or the file is not as the module says.
        MissingFileError: there is no such file.
    """
    packaged = {file.stem: file for file in (properties_folder() / "ablation").glob("*.yaml")}
    file = packaged.get(name, Path(name))
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigurationError(
            f"there is no ablation named {name!r}",
            where="--ablation",
            do=f"choose from {sorted(packaged)}, or give a YAML file",
        )
    if not file.is_file():
        raise MissingFileError(f"there is no ablation file {file}", where="--ablation", do="check the path")
    try:
        values = read_yaml(file.read_text(encoding="utf-8"))
        found = Ablation(**{**values, "variants": tuple(Variant(**v) for v in values["variants"]), "name": file.stem})
    except (TypeError, KeyError) as error:
        raise ConfigurationError(
            f"cannot read the ablation: {error}",
            where=str(file),
            do="give stages, columns and variants, each with a name; settings, published and note if you like",
        ) from error
    maps = [found.settings, found.columns, *(part for v in found.variants for part in (v.settings, v.published))]
    rules = {
        "stages must be a list": isinstance(found.stages, list),
        "settings, columns and published must be maps": all(isinstance(part, dict) for part in maps),
        "each variant must have a name of its own": len({v.name for v in found.variants}) == len(found.variants) > 0,
        "published figures must be of columns": all(set(v.published) <= set(found.columns) for v in found.variants),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ConfigurationError("; ".join(broken), where=str(file), do="correct the file")
    return found


def run_ablation(
    ablation: Ablation, given: Mapping[str, Any], *, command: str, console: Console, dry_run: bool = False
) -> Path | None:
    """Run every variant and write `ablations/<time>/`; returns the path of result.json, None for a dry run.

    A variant that stops at a gate keeps its row, with the figures of the stages that it finished.

    Args:
        given: `command_line`, `config_dict` and `config_files` of `load_settings`.

    Raises:
        ConfigurationError: settings or columns that cannot be used: those of all variants together, before any runs.
    """
    ground = load_settings(**given, layers=_layers(ablation))
    console.say(
        f"ablation {ablation.name} on {ground['dataset']}: {len(ablation.variants)} variants, "
        f"preset {ground['preset']}, seed {ground['seed']}"
    )
    chosen = _for_each(ablation, lambda variant: load_variant(ablation, variant, given))
    data = data_for(ground)

    def plan(variant: Variant) -> list[pipeline.Planned]:
        nonlocal data
        data = data_for(chosen[variant.name], data)
        return pipeline.plan(chosen[variant.name], data, stages=ablation.stages)

    plans = _for_each(ablation, plan)
    _check_columns(ablation, {entry.stage.name for planned in plans.values() for entry in planned})
    console.table(["variant", "stage", "key", "plan", "why"], _plan_rows(plans))
    if dry_run:
        return None
    rows = []
    for number, variant in enumerate(ablation.variants, start=1):
        console.say(f"variant {number} of {len(ablation.variants)}: {variant.name}")
        planned, failed = plans[variant.name], ""
        data = data_for(chosen[variant.name], data)
        try:
            pipeline.execute(planned, chosen[variant.name], data, console)
        except GateError as error:
            failed = str(error)
            console.say(f"variant {variant.name!r} failed: {failed}")
        rows.append(_row(ablation, variant, planned, failed))
    result = {
        "ablation": ablation.name,
        "dataset": ground["dataset"],
        "preset": ground["preset"],
        "seeds": [ground["seed"]],
        "command": command,
        "columns": ablation.columns,
        "note": ablation.note,
        "variants": rows,
    }
    folder = new_folder(Path(ground["checkpoint_dir"]) / "gr2" / ground["dataset"] / "ablations")
    write_json(folder / "result.json", result)
    (folder / "report.md").write_text(render_ablation(result), encoding="utf-8")
    print(f"\n{figures_table(result)}", flush=True, file=console.stream)
    console.say(f"report: {folder / 'report.md'}")
    return folder / "result.json"


def load_variant(ablation: Ablation, variant: Variant, given: Mapping[str, Any]) -> Settings:
    """A variant's settings, checked as far as that goes without data.

    Args:
        given: what `run_ablation` is given.

    Raises:
        ConfigurationError: they cannot be used, or the user gives a key that the variant varies another value.
    """
    settings = load_settings(**given, layers=_layers(ablation, variant))
    pipeline.check(settings)
    for key, value in variant.settings.items():
        used = settings[key] if key in settings else settings.recbole[key.removeprefix("base_")]
        if used != value:
            raise ConfigurationError(
                f"the variant sets {key} to {value!r}, the {settings.origin[key]} to {used!r}",
                do=f"leave {key} to the ablation",
            )
    return settings


def data_for(settings: Settings, before: Data | None = None) -> Data:
    """The data set under these settings: what is loaded already, wherever RecBole and the texts get the same words."""

    def words(chosen: Settings) -> tuple:
        return chosen["dataset"], chosen.recbole, chosen.results(["text_"])

    if before is None or words(before.settings) != words(settings):
        return Data(settings)
    data = copy.copy(before)
    data.settings = settings
    return data


def figure(facts: Mapping[str, Any], path: str) -> Any:
    """What a column's path leads to in stage -> facts; None where nothing was measured.

    A path is the stage, then keys; in a list, a position from 0, or what the first fitting entry says of itself.
    Nothing was measured in a stage which the variant did not finish or does not have, in a fact that is None, and where
    a list has no such entry.

    Raises:
        ConfigurationError: the stage has no such fact.

    >>> figure({"tokenizer": {"entropy": [7.5, 6.0]}}, "tokenizer.entropy.1")
    6.0
    >>> rows = [{"row": "sft", "scope": "all", "n": 90}, {"row": "sft", "scope": "in_list", "n": 9}]
    >>> figure({"evaluate": {"rows": rows}}, "evaluate.rows.row=sft&scope=in_list.n")
    9
    """
    stage, *parts = path.split(".")
    value = facts.get(stage)
    for part in parts:
        if value is None:
            return None
        if isinstance(value, list) and part.isdigit():
            value = dict(enumerate(value)).get(int(part))
        elif isinstance(value, list) and "=" in part:
            wanted = [said.partition("=")[::2] for said in part.split("&")]
            entries = [entry for entry in value if isinstance(entry, dict)]
            value = next((entry for entry in entries if all(entry.get(key) == word for key, word in wanted)), None)
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            raise ConfigurationError(
                f"no fact {path!r}: {part!r} is not in what the {stage} stage says",
                where="columns of the ablation",
                do=f"choose from {sorted(value)}" if isinstance(value, dict) else "shorten the path",
            )
    return value


def figures_table(result: dict) -> str:
    """One line a variant: its figures, then a paper's for the columns that have any."""
    variants = result["variants"]
    published = [heading for heading in result["columns"] if any(heading in row["published"] for row in variants)]
    header = ["variant", *result["columns"], *(f"published: {heading}" for heading in published)]
    return render_table(
        header,
        [
            [
                row["name"] + (" (failed)" if row["failed"] else ""),
                *(_cell(v) for v in row["figures"].values()),
                *(_cell(row["published"].get(heading)) for heading in published),
            ]
            for row in variants
        ],
    )


def render_ablation(result: dict) -> str:
    """report.md, a function of result.json."""
    variants = result["variants"]
    parts = [
        f"# Ablation {result['ablation']} on {result['dataset']}",
        f"Preset {result['preset']}, seed {result['seeds'][0]}.\n\n    {result['command']}",
        f"```\n{figures_table(result)}\n```",
        textwrap.fill(result["note"], 120),
    ]
    failed = [
        f"- `{row['name']}` failed:\n\n{textwrap.indent(row['failed'], '      ')}" for row in variants if row["failed"]
    ]
    parts += ["## Failed", *failed] if failed else []
    changes = [[row["name"], ", ".join(f"{k}: {v}" for k, v in row["settings"].items())] for row in variants]
    parts.append(f"## Settings\n\n```\n{render_table(['variant', 'sets'], changes)}\n```")
    stages = list(dict.fromkeys(stage for row in variants for stage in row["seconds"]))
    cost = [
        [
            row["name"],
            *(_seconds(row["seconds"].get(stage)) for stage in stages),
            _seconds(sum(filter(None, row["seconds"].values()))),
        ]
        for row in variants
    ]
    parts.append(
        "## Wall time\n\nOf the run that computed it, with starts before it that were stopped; a stage that several "
        "variants share took that time once.\n\n"
        f"```\n{render_table(['variant', *stages, 'all'], cost)}\n```"
    )
    return "\n\n".join(filter(None, parts)) + "\n"


def _layers(ablation: Ablation, *variants: Variant) -> dict[str, dict]:
    return {f"ablation {ablation.name}": ablation.settings, **{f"variant {v.name!r}": v.settings for v in variants}}


def _for_each(ablation: Ablation, make: Any) -> dict[str, Any]:
    """Variant's name -> `make(variant)`; what goes wrong with any of them is told together."""
    made, problems = {}, {}
    for variant in ablation.variants:
        try:
            made[variant.name] = make(variant)
        except GR2Error as error:
            problems.setdefault(str(error), []).append(variant.name)
    if problems:
        told = "\n".join(f"{', '.join(map(repr, names))}: {problem}" for problem, names in problems.items())
        raise ConfigurationError(
            f"variants that cannot run:\n{textwrap.indent(told, '    ')}", do="correct the ablation or the command line"
        )
    return made


def _check_columns(ablation: Ablation, stages: set[str]) -> None:
    strangers = {heading: path for heading, path in ablation.columns.items() if path.split(".")[0] not in stages}
    if strangers:
        raise ConfigurationError(
            f"columns of stages that no variant runs: {strangers}",
            where=f"ablation {ablation.name}",
            do=f"choose from {sorted(stages)}",
        )


def _plan_rows(plans: Mapping[str, list[pipeline.Planned]]) -> list[list[str]]:
    rows, first = [], {}
    for name, planned in plans.items():
        for entry in planned:
            owner = first.setdefault(entry.key, name)
            how = [entry.action, entry.why] if owner == name or entry.action == "cached" else ["shared", owner]
            rows.append([name, entry.stage.name, entry.key, *how])
    return rows


def _row(ablation: Ablation, variant: Variant, planned: list[pipeline.Planned], failed: str) -> dict:
    records = {entry.stage.name: read_manifest(entry.folder) for entry in planned}
    facts = {stage: record.facts for stage, record in records.items() if record}
    return {
        "name": variant.name,
        "settings": variant.settings,
        "published": variant.published,
        "failed": failed,
        "figures": {heading: figure(facts, path) for heading, path in ablation.columns.items()},
        "keys": {entry.stage.name: entry.key for entry in planned},
        "seconds": {stage: record.seconds if record else None for stage, record in records.items()},
    }


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f} s"
