"""Ablations: variants of a run in one table, described by a YAML file.

`properties/ablation/NAME.yaml` has these keys:

- `stages`: the stages that each variant runs, with the stages that these need.
- `settings`: settings of all variants.
- `columns`: heading -> path of a figure in the summary of a stage, see `figure`.
- `variants`: a list of {name, settings, published}. `published` maps headings to figures or texts of a paper. They have
  columns of their own.
- `note`: what a reader has to know.

The figures are those of the test split; with `eval_split: valid`, of the validation split.

The settings of the user win over those of the file. The settings of a variant win over those of all variants. The user
must not give another value to a setting that a variant changes. Each variant is a plan of the pipeline. Finished stages
are cached, stages that variants share run once, and the same command continues an interrupted ablation.
"""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from recbole_gr2 import pipeline, preflight
from recbole_gr2.bridge.data import Data
from recbole_gr2.config import Settings, load_settings, properties_folder, read_yaml_file
from recbole_gr2.console import Console, pipe_table, quiet_libraries
from recbole_gr2.errors import ConfigurationError, GR2Error, QualityCheckError, nearest
from recbole_gr2.ranking import METRICS
from recbole_gr2.report.result import SCHEMA, SPLITS, new_folder, stage_entries
from recbole_gr2.report.tables import data_title, figures_table, variant_cost_table, variant_settings_table
from recbole_gr2.report.verdict import banner
from recbole_gr2.store import explained_disk_errors, read_json, read_manifest, write_json, write_text

T = TypeVar("T")
Plans = Mapping[str, list[pipeline.Planned]]  # name of a variant -> its plan


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of the table.

    Attributes:
        name: name of the variant.
        settings: the settings that it changes.
        published: figures or texts of a paper, by heading.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The content of an ablation file. The module describes the attributes."""

    name: str
    stages: list[str]
    columns: dict[str, str]
    variants: tuple[Variant, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def read_ablation(name: str) -> Ablation:
    """Read an ablation.

    Args:
        name: name of an ablation of the package, or path of a YAML file.

    Raises:
        ConfigurationError: there is no ablation of this name, or the file is not valid.
        MissingFileError: the file does not exist.
    """
    packaged = {file.stem: file for file in (properties_folder() / "ablation").glob("*.yaml")}
    file = packaged.get(name, Path(name))
    if file.suffix not in (".yaml", ".yml"):
        near = nearest(name, packaged)
        raise ConfigurationError(
            f"there is no ablation named {name!r}",
            where="--ablation",
            why="The name is neither an ablation of the package nor the path of a YAML file.",
            do=(f"did you mean {', '.join(near)}? " if near else "")
            + f"choose from {sorted(packaged)}, or give the path of a YAML file",
        )
    values = read_yaml_file(file, where="--ablation", what="ablation file")
    problem = _wrong_keys(values, Ablation, "the file", given={"name"})
    if not problem and not isinstance(values["variants"], list):
        problem = "variants must be a list: each entry begins with `- name: ...`"
    for number, variant in enumerate(() if problem else values["variants"], start=1):
        problem = problem or _wrong_keys(variant, Variant, f"variant {number}")
    if problem:
        raise ConfigurationError(
            problem,
            where=str(file),
            why="a key is missing, unknown or of the wrong type",
            do="write stages, columns and variants with names; settings, published and note are optional",
        )
    variants = tuple(Variant(**variant) for variant in values["variants"])
    ablation = Ablation(**{**values, "variants": variants, "name": file.stem})
    settings = [part for variant in ablation.variants for part in (variant.settings, variant.published)]
    rules = {
        "stages must be a list": isinstance(ablation.stages, list),
        "settings, columns and published must be maps": all(
            isinstance(part, dict) for part in (ablation.settings, ablation.columns, *settings)
        ),
        "there must be variants with different names": len({variant.name for variant in ablation.variants})
        == len(ablation.variants)
        > 0,
        "each published figure must have the heading of a column": all(
            set(variant.published) <= set(ablation.columns) for variant in ablation.variants
        ),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ConfigurationError(
            "; ".join(broken),
            where=str(file),
            why="The table has one line per variant and one column per heading.",
            do="correct the file",
        )
    return ablation


def _wrong_keys(values: Any, kind: type, what: str, given: Collection[str] = ()) -> str:
    """Return what is wrong with the keys of a part of an ablation file, or "".

    Args:
        values: the part.
        kind: the dataclass that it describes.
        what: the part in words.
        given: fields that the file does not contain.
    """
    if not isinstance(values, dict):
        return f"{what} is {values!r:.80}, expected keys with values"
    known = {each.name: each for each in fields(kind) if each.name not in given}
    if unknown := [key for key in values if key not in known]:
        return f"{what} has the unknown keys {unknown}; known keys: {', '.join(known)}"
    needed = [name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    return f"{what} has no {' and no '.join(missing)}" if missing else ""


def run_ablation(
    ablation: Ablation,
    given: Mapping[str, Any],
    *,
    command: str,
    console: Console,
    dry_run: bool = False,
    name: str | None = None,
) -> Path | None:
    """Run each variant and write `ablations/<time>/`, or `ablations/<name>/`.

    A variant whose quality check fails keeps its line, with the figures of the stages that it finished.

    Args:
        ablation: the ablation.
        given: `command_line`, `config_dict` and `config_files` of `load_settings`.
        command: the command line.
        console: where progress and tables are printed.
        dry_run: whether to print the plan and stop.
        name: name of the folder. An earlier report of the same ablation is replaced.

    Returns:
        The path of result.json, or None for a dry run.

    Raises:
        ConfigurationError: settings or columns are not valid. The settings of all variants, and the columns as far as
            stages are cached, are checked before anything runs. Or another ablation has this name.
    """
    common = load_settings(**given, layers=_layers(ablation))
    console.say(
        f"ablation {ablation.name} on {common['dataset']}: {len(ablation.variants)} variants, "
        f"preset {common['preset']}, seed {common['seed']}"
    )
    settings = _for_each(ablation, lambda variant: load_variant(ablation, variant, given))
    splits = sorted({each["eval_split"] for each in settings.values()})
    if len(splits) > 1:
        raise ConfigurationError(
            f"variants report the splits {' and '.join(splits)}",
            where=f"ablation {ablation.name}",
            why="Figures of different splits cannot be compared in one table.",
            do="remove eval_split from the variants; the command line or the settings of all variants may set it",
        )
    quiet_libraries()
    data = data_for(common)

    def plan(variant: Variant) -> list[pipeline.Planned]:
        nonlocal data
        data = data_for(settings[variant.name], data)
        planned = pipeline.plan(settings[variant.name], data, stages=ablation.stages)
        pipeline.check_data(planned, settings[variant.name], data)
        return planned

    plans = _for_each(ablation, plan)
    _check_columns(ablation, plans, settings)
    if name is not None:
        _check_same_ablation(common.results_folder / "ablations" / name, plans)
    console.table(["variant", "stage", "key", "plan", "why"], _plan_lines(plans))
    entries = {entry.folder: entry for planned in plans.values() for entry in planned}
    console.say(f"expected time: {preflight.expected_total(list(entries.values()))}")
    for variant_name, planned in plans.items():
        preflight.check_resources(planned, settings[variant_name], lambda text: None, dry_run=dry_run)
    if dry_run:
        return None
    variants = []
    for number, variant in enumerate(ablation.variants, start=1):
        console.say(f"variant {number} of {len(ablation.variants)}: {variant.name}")
        planned, failed = plans[variant.name], ""
        cached = {entry.stage.name for entry in planned if read_manifest(entry.folder)}
        data = data_for(settings[variant.name], data)
        try:
            pipeline.execute(planned, settings[variant.name], data, console)
        except QualityCheckError as error:
            failed = str(error)
            console.say(f"variant {variant.name!r} failed: {failed}")
        variants.append(_variant(ablation, variant, planned, cached, failed))
    for heading, path in ablation.columns.items():
        if all(variant["figures"][heading] is None for variant in variants):
            console.say(f"column {heading!r} is empty: no variant has {path}")
    result = {
        "schema": SCHEMA,
        "ablation": ablation.name,
        "dataset": common["dataset"],
        "split": splits[0],
        "preset": common["preset"],
        "seeds": [common["seed"]],
        "command": command,
        "columns": ablation.columns,
        "note": ablation.note,
        "variants": variants,
    }
    if name is None:
        folder = new_folder(common.results_folder / "ablations")
    else:
        folder = common.results_folder / "ablations" / name
    with explained_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "report.md", render_ablation(result))
        write_json(folder / "result.json", result)
    console.print(f"\nablation {ablation.name}, {data_title(result)}\n{figures_table(result, console.render)}")
    if banner(result):
        console.print(banner(result))
    console.say(f"report: {folder / 'report.md'}")
    return folder / "result.json"


def load_variant(ablation: Ablation, variant: Variant, given: Mapping[str, Any]) -> Settings:
    """Return the settings of a variant, checked as far as this is possible without data.

    Args:
        ablation: the ablation.
        variant: one of its variants.
        given: `command_line`, `config_dict` and `config_files` of `load_settings`.

    Raises:
        ConfigurationError: a setting is not valid, or the user gives another value to a setting of the variant.
    """
    settings = load_settings(**given, layers=_layers(ablation, variant))
    preflight.check(settings, ablation.stages)
    pipeline.check(settings)
    for key, value in variant.settings.items():
        used = settings[key] if key in settings else settings.recbole[key.removeprefix("base_")]
        if used != value:
            raise ConfigurationError(
                f"the variant sets {key} to {value!r}, the {settings.origin[key]} to {used!r}",
                where=f"ablation {ablation.name}",
                why="The variant would not differ from the others as its name says.",
                do=f"leave {key} to the ablation",
            )
    return settings


def data_for(settings: Settings, before: Data | None = None) -> Data:
    """Return the data set under these settings.

    Args:
        settings: settings of the next variant.
        before: a data set that is loaded. It is used again if the settings of RecBole and of the texts are the same.
    """

    def options(chosen: Settings) -> tuple[Any, ...]:
        return chosen["dataset"], chosen.recbole, chosen.results(["text_"])

    if before is None or options(before.settings) != options(settings):
        data = Data(settings)
    else:
        data = copy.copy(before)
        data.settings = settings
    data.summary().check()
    return data


def figure(summaries: Mapping[str, Any], path: str) -> Any:
    """Return the value at a path.

    A path is the name of a stage and then keys of its summary, separated by full stops. In a list, a part is a position
    from 0 or a condition such as `method=sft&scope=hit_users`, which selects the first entry that fulfils it.

    Args:
        summaries: the summary of each finished stage, by name.
        path: the path.

    Returns:
        The value. None if the stage is not finished, if a value on the path is None, and if a list has no such entry.

    Raises:
        ConfigurationError: the summary has no such field.

    >>> figure({"tokenizer": {"entropy": [7.5, 6.0]}}, "tokenizer.entropy.1")
    6.0
    >>> methods = [{"method": "sft", "scope": "all_users", "n": 90}, {"method": "sft", "scope": "hit_users", "n": 9}]
    >>> figure({"evaluate": {"methods": methods}}, "evaluate.methods.method=sft&scope=hit_users.n")
    9
    """
    stage, *parts = path.split(".")
    value = summaries.get(stage)
    for part in parts:
        if value is None:
            return None
        if isinstance(value, list) and part.isdigit():
            value = dict(enumerate(value)).get(int(part))
        elif isinstance(value, list) and "=" in part:
            conditions = [condition.partition("=")[::2] for condition in part.split("&")]
            entries = [entry for entry in value if isinstance(entry, dict)]
            value = next((entry for entry in entries if all(entry.get(key) == v for key, v in conditions)), None)
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            raise ConfigurationError(
                f"there is no figure {path!r}: the summary of the {stage} stage has no {part!r}",
                where="columns of the ablation",
                why="The column would be empty.",
                do=f"choose from {sorted(value)}" if isinstance(value, dict) else "shorten the path",
            )
    return value


def render_ablation(result: Mapping[str, Any]) -> str:
    """Return report.md, a function of result.json."""
    parts = [
        f"# Ablation {result['ablation']} on {data_title(result)}",
        f"**{banner(result)}**" if banner(result) else "",
        f"Preset {result['preset']}, seed {result['seeds'][0]}. {_split_sentence(result)}\n\n    {result['command']}",
        figures_table(result, pipe_table),
        textwrap.fill(result["note"], 120),
    ]
    failed = [
        f"- `{variant['name']}` failed:\n\n{textwrap.indent(variant['failed'], '      ')}"
        for variant in result["variants"]
        if variant["failed"]
    ]
    parts += ["## Failed", *failed] if failed else []
    parts.append(f"## Settings\n\n{variant_settings_table(result, pipe_table)}")
    parts.append(
        "## Wall time\n\nWall time includes interrupted starts. The time of a stage that variants share is in the line "
        f"of each of them.\n\n{variant_cost_table(result, pipe_table)}"
    )
    return "\n\n".join(filter(None, parts)) + "\n"


def _split_sentence(result: Mapping[str, Any]) -> str:
    """Return which split the figures are of."""
    sentence = f"Figures of methods are those of the {SPLITS[result['split']]} split."
    if result["split"] == "valid" and any(variant["published"] for variant in result["variants"]):
        sentence += " Published figures are those of the test split."
    return sentence


def _layers(ablation: Ablation, *variants: Variant) -> dict[str, dict[str, Any]]:
    """Return the settings of the ablation and of variants, by the name of their origin."""
    return {f"ablation {ablation.name}": ablation.settings, **{f"variant {v.name!r}": v.settings for v in variants}}


def _for_each(ablation: Ablation, make: Callable[[Variant], T]) -> dict[str, T]:
    """Return `make(variant)` of each variant, by name.

    Raises:
        ConfigurationError: `make` failed for some variants. The message has the errors of all of them.
    """
    made: dict[str, T] = {}
    problems: dict[str, list[str]] = {}
    for variant in ablation.variants:
        try:
            made[variant.name] = make(variant)
        except GR2Error as error:
            problems.setdefault(str(error), []).append(variant.name)
    if problems:
        listed = "\n".join(f"{', '.join(map(repr, names))}: {problem}" for problem, names in problems.items())
        raise ConfigurationError(
            f"these variants cannot run:\n{textwrap.indent(listed, '    ')}",
            where=f"ablation {ablation.name}",
            why="All variants are checked before the first one runs.",
            do="correct the ablation or the command line",
        )
    return made


def _check_columns(ablation: Ablation, plans: Plans, settings: Mapping[str, Settings]) -> None:
    """Check the paths of the columns against the stages of the plans, the metrics and the summaries of cached stages.

    Args:
        ablation: the ablation.
        plans: the plan of each variant.
        settings: settings of each variant.

    Raises:
        ConfigurationError: a column names a stage that no variant runs, a metric that `evaluate` does not compute, or a
            field that a cached stage does not have.
    """
    stages = {entry.stage.name for planned in plans.values() for entry in planned}
    unknown = {heading: path for heading, path in ablation.columns.items() if path.split(".")[0] not in stages}
    if unknown:
        raise ConfigurationError(
            f"columns of stages that no variant runs: {unknown}",
            where=f"ablation {ablation.name}",
            why="The columns would be empty.",
            do=f"choose from {sorted(stages)}",
        )
    known = {
        "metrics": [f"{m.lower()}@{k}" for each in settings.values() for m in each["metrics"] for k in each["topk"]],
        "vs_base": list(METRICS),
    }
    for heading, path in ablation.columns.items():
        parts = path.split(".")
        for part, metric in pairwise(parts):
            # RecBole's metrics without a cut-off have no "@".
            if parts[0] == "evaluate" and part in known and "@" in metric and metric not in known[part]:
                names = list(dict.fromkeys(known[part]))
                near = nearest(metric, names)
                raise ConfigurationError(
                    f"the column {heading!r} has the metric {metric!r}, which {part} does not contain",
                    where=f"ablation {ablation.name}",
                    why="The column would be empty.",
                    do=(f"did you mean {' or '.join(near)}? " if near else "") + f"Choose from {', '.join(names)}",
                )
    for planned in plans.values():
        records = {entry.stage.name: read_manifest(entry.folder) for entry in planned if entry.finished}
        summaries = {stage: record.summary for stage, record in records.items() if record}
        for path in ablation.columns.values():
            figure(summaries, path)


def _check_same_ablation(folder: Path, plans: Plans) -> None:
    """Check that the ablation in a folder, if there is one, has the variants and stages of the plans.

    Raises:
        ConfigurationError: it is another ablation.
        GR2Error: its result.json is damaged.
    """
    if not (folder / "result.json").is_file():
        return
    variants = read_json(folder / "result.json")["variants"]
    earlier = {(each["name"], stage["stage"]): stage["key"][0] for each in variants for stage in each["stages"]}
    now = {(name, entry.stage.name): entry.key for name, planned in plans.items() for entry in planned}
    other = [place for place in earlier if earlier[place] != now.get(place)]
    if other or [each["name"] for each in variants] != list(plans):
        raise ConfigurationError(
            f"the ablation {folder.name!r} exists and is another one"
            + (f": the stage {other[0][1]} of the variant {other[0][0]!r} has another key" if other else ""),
            where=str(folder),
            why="its report would be replaced by that of a different ablation",
            do="choose another --name, or remove the folder",
        )


def _plan_lines(plans: Plans) -> list[list[str]]:
    """Return the lines of the plan: variant, stage, key, action and its cause."""
    lines = []
    first: dict[str, str] = {}
    for name, planned in plans.items():
        for entry in planned:
            owner = first.setdefault(entry.key, name)
            how = [entry.action, entry.why] if owner == name or entry.finished else ["shared", owner]
            lines.append([name, entry.stage.name, entry.key, *how])
    return lines


def _variant(
    ablation: Ablation, variant: Variant, planned: list[pipeline.Planned], cached: set[str], failed: str
) -> dict[str, Any]:
    """Return the entry of a variant in result.json."""
    records = [record for entry in planned if (record := read_manifest(entry.folder))]
    summaries = {record.stage: record.summary for record in records}
    return {
        "name": variant.name,
        "settings": variant.settings,
        "published": variant.published,
        "failed": failed,
        "figures": {heading: figure(summaries, path) for heading, path in ablation.columns.items()},
        "stages": stage_entries([[(record, record.stage in cached) for record in records]]),
    }
