"""Run all stages: parse, plan, run, report.

`run_recbole_gr2.py`, the command `recbole-gr2 run` and `run()` do the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from recbole_gr2.distributed import choose_threads, describe_threads
from recbole_gr2.errors import ConfigurationError, GR2Error, QualityCheckError

if TYPE_CHECKING:
    from recbole_gr2.config import Settings
    from recbole_gr2.console import Console
    from recbole_gr2.pipeline import Planned


SCRIPT = "run_recbole_gr2.py"
EXAMPLES = """\
settings that most runs need:
  --data_path DIR         folder that contains the folder of the data set; default dataset/
  --checkpoint_dir DIR    folder of all results; default saved
  --seed N                seed of the run; default 2020
  --llm NAME              language model: a packaged one, a folder or a hub id

Every other setting is given in the same way, --key=value, and RecBole's options of the base model as --base_key=value.
`recbole-gr2 list settings` lists the settings with type, default and source, and so does docs/settings.md.

examples:
  %(prog)s --dataset ml-100k --preset smoke
  %(prog)s --dataset mine --data_path data --config_files mine.yaml --name first
  %(prog)s --dataset amazon-beauty --llm Qwen/Qwen3-0.6B --checkpoint_dir results --dry_run
  %(prog)s --base_model SASRec,TextEASE --base_learning_rate=0.003 --seed 7 --eval_rows=[lambdamart,sft]
  %(prog)s --dataset amazon-beauty --seeds 2020,2021,2022 --name three
"""


def main(argv: Sequence[str] | None = None, *, program: str = SCRIPT) -> int:
    """Run the command line and return the exit code, see `recbole_gr2.errors`.

    The last line on stdout is the path of result.json.

    Args:
        argv: the words of the command line; by default those of the process.
        program: the command as the user wrote it, for the report and for --help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    choose_threads()
    sys.path.insert(0, os.getcwd())  # modules of the user that settings name
    try:
        options, command_line = parse(argv, program=program)
        path = _run(
            command_line=command_line,
            config_files=options.config_files,
            stages=options.stages,
            from_stage=options.from_stage,
            force=options.force,
            ablation=options.ablation,
            seeds=options.seeds,
            show_prompt=options.show_prompt,
            dry_run=options.dry_run,
            name=options.name,
            command=" ".join([program, *argv]),
        )
        if path is not None:
            print(path)
            check_result(path)
    except GR2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        sys.path.remove(os.getcwd())
    return 0


def run(
    *,
    command_line: Mapping[str, Any] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    config_files: Sequence[str | Path] = (),
    stages: Sequence[str] = (),
    from_stage: str | None = None,
    force: bool = False,
    ablation: str | None = None,
    seeds: Sequence[int] = (),
    show_prompt: str | None = None,
    dry_run: bool = False,
    name: str | None = None,
    command: str = "recbole_gr2.quick_start.run()",
) -> Path | None:
    """Plan and run. Returns the path of result.json, or None if no methods were evaluated.

    Args:
        command_line, config_dict, config_files: settings, in descending precedence.
        stages: names of the stages to compute, with all that they need; by default all that the evaluation needs.
        from_stage: run this stage and all that depend on it again.
        force: run every stage again.
        ablation: name or file of an ablation, whose variants are run instead, see `recbole_gr2.ablation`.
        seeds: repeat the run with each of these seeds, and report them together, see `recbole_gr2.seeds`.
        show_prompt: print the prompt of this train request ("" for the first one) instead of running anything.
        dry_run: print the plan instead of running it.
        name: name of the folder of the run; by default the time. The same run replaces its earlier report.
        command: the command line that the report names.

    Raises:
        GR2Error: with four parts: what is wrong, where, why it matters, and what to do. Finished stages are kept.
        QualityCheckError: a language model left every list unchanged. The report exists nevertheless.

    >>> from recbole_gr2.quick_start import run
    >>> path = run(config_dict={"dataset": "ml-100k", "preset": "smoke"})  # doctest: +SKIP
    """
    path = _run(
        command_line=command_line,
        config_dict=config_dict,
        config_files=config_files,
        stages=stages,
        from_stage=from_stage,
        force=force,
        ablation=ablation,
        seeds=seeds,
        show_prompt=show_prompt,
        dry_run=dry_run,
        name=name,
        command=command,
    )
    if path is not None:
        check_result(path)
    return path


def check_result(path: Path) -> None:
    """Check that no language model left every list unchanged. A run of several seeds, or an ablation, has several runs.

    Raises:
        QualityCheckError: a language model returned the base order for every request.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    if "methods" not in result:  # an ablation reports its variants
        return
    from recbole_gr2.report import unchanged_methods
    from recbole_gr2.rerankers.registry import RERANKERS

    runs = [json.loads(Path(run).read_text(encoding="utf-8")) for run in result["runs"]]
    unchanged = dict.fromkeys(name for run in runs for name in unchanged_methods(run))
    methods = [name for name in unchanged if name in RERANKERS and RERANKERS[name].needs]
    if methods:
        raise QualityCheckError(
            f"{', '.join(methods)} left every list unchanged",
            where=str(path),
            why="a re-ranker that copies its input has learned nothing, and its metrics are those of the base order",
            do="look at log.json and samples.json of its stage: reward, unchanged and entropy show when it collapsed",
        )


def parse(argv: Sequence[str], *, program: str = SCRIPT) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the options of the command, and every other `--key=value` or `--key value` as a setting."""
    parser = option_parser(program)
    options, rest = parser.parse_known_args(argv)
    # argparse reads a word with a blank, such as "--eval_rows=[midtrain, sft]", as one more config file.
    rest += [word for word in options.config_files if word.startswith("--")]
    options.config_files = [word for word in options.config_files if not word.startswith("--")]
    named = {key: getattr(options, key) for key in ("model", "dataset", "preset")}
    settings = {key: value for key, value in named.items() if value is not None}
    for key in ("base_model", "models"):
        if getattr(options, key) is not None:
            from recbole_gr2.config import read_value

            names = read_value(getattr(options, key))  # A,B or, as in a file, [A, B]
            settings[key] = [name.strip() for name in names.split(",")] if isinstance(names, str) else names or []
    return options, settings | _settings(rest)


def option_parser(program: str = SCRIPT) -> argparse.ArgumentParser:
    """Return the parser of the options that are no settings.

    Args:
        program: the command as the user wrote it.
    """
    parser = _Parser(
        prog=program,
        description="Train and evaluate GR2, a generative reasoning re-ranker, on the candidates of a RecBole model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-m", "--model", help="the re-ranker (GR2)")
    parser.add_argument("-d", "--dataset", help="folder of RecBole atomic files under data_path, or ml-100k")
    parser.add_argument("--base_model", metavar="A,B", help="models that propose the candidates, one or several")
    parser.add_argument("--models", metavar="A,B", help="other recommenders for the same table")
    parser.add_argument("--preset", help="smoke, quick, laptop, gpu or paper; by default what fits the machine")
    parser.add_argument(
        "--config_files", nargs="+", action="extend", default=[], metavar="FILE", help="YAML files with settings"
    )
    parser.add_argument(
        "--stages", metavar="A,B", type=_names, default=(), help="compute only these stages, and those that they need"
    )
    parser.add_argument(
        "--from_stage",
        metavar="A",
        type=_name,
        help="run this stage and all that depend on it again; after a stop the same command continues",
    )
    parser.add_argument("--force", action="store_true", help="run every stage again")
    parser.add_argument(
        "--ablation", metavar="NAME", type=_name, help="variants in a table: rerank, reward, tokenizer, or a file"
    )
    parser.add_argument("--seeds", metavar="1,2,3", type=_seeds, default=(), help="repeat the run with each seed")
    parser.add_argument(
        "--show_prompt",
        nargs="?",
        const="",
        metavar="REQUEST",
        help="print the prompt of a train request, by default the first, and stop",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="check everything, print the plan with the expected time, and stop"
    )
    parser.add_argument(
        "--name",
        type=_name,
        help="name of the folder of results, by default the time; the same run replaces its earlier report",
    )
    return parser


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as errors of this package."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(
            f"cannot read the command: {message}",
            where="command line",
            do="--help lists the options, docs/settings.md the settings",
        )


def _seeds(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9})*\s*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers such as 2020,2021")
    return tuple(map(int, text.split(",")))


def _names(text: str) -> tuple[str, ...]:
    return tuple(map(_name, text.split(",")))


def _name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return text.strip()


def _settings(words: Sequence[str]) -> dict[str, Any]:
    """Settings of the command line."""
    from recbole_gr2.config import read_value

    settings: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word = words[position]
        key, equals, value = word.removeprefix("--").partition("=")
        position += 1
        if not equals and position < len(words) and not words[position].startswith("--"):
            value, equals = words[position], "="
            position += 1
        if not word.startswith("--") or not equals:
            raise ConfigurationError(f"cannot read {word!r}", where="command line", do="write settings as --key=value")
        read = read_value(value)
        if key in settings and settings[key] != read:
            raise ConfigurationError(
                f"{key} has two values, {settings[key]!r:.200} and {read!r:.200}",
                where="command line",
                do="give each setting once",
            )
        settings[key] = read
    return settings


def _run(
    *,
    command_line: Mapping[str, Any] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    config_files: Sequence[str | Path] = (),
    stages: Sequence[str] = (),
    from_stage: str | None = None,
    force: bool = False,
    ablation: str | None = None,
    seeds: Sequence[int] = (),
    show_prompt: str | None = None,
    dry_run: bool = False,
    name: str | None = None,
    command: str = "",
) -> Path | None:
    """`run` without the check of the result."""
    if name is not None:
        from recbole_gr2.runs import check_run_name

        check_run_name(name)
    from recbole_gr2 import preflight
    from recbole_gr2.config import load_settings
    from recbole_gr2.console import Console

    given: dict[str, Any] = {"command_line": command_line, "config_dict": config_dict, "config_files": config_files}
    console = Console()
    if ablation is not None:
        if stages or from_stage or force or seeds:
            raise ConfigurationError(
                "an ablation chooses its own stages and has one seed",
                where="--stages, --from_stage, --force, --seeds",
                do="remove these options; --checkpoint_dir DIR computes everything again in another folder",
            )
        from recbole_gr2.ablation import read_ablation, run_ablation

        return run_ablation(
            read_ablation(ablation), given, command=command, console=console, dry_run=dry_run, name=name
        )
    preflight.check(load_settings(**given, machine=False), [*stages, *([from_stage] if from_stage is not None else [])])
    if not seeds:
        return _run_once(
            load_settings(**given), console, stages, from_stage, force, show_prompt, dry_run, name, command
        )
    if show_prompt is not None or "seed" in {**(command_line or {}), **(config_dict or {})}:
        raise ConfigurationError(
            "--seeds replaces the seed of a run", where="--seeds", do="remove --seed and --show_prompt"
        )
    from recbole_gr2.seeds import run_seeds

    def of_seed(seed: int) -> Settings:
        return load_settings(**{**given, "command_line": {**(command_line or {}), "seed": seed}})

    folder = None if name is None else _check_seed_names({seed: of_seed(seed) for seed in seeds}, name, stages)

    def one(seed: int) -> Path | None:
        same = re.sub(r"--seeds[ =]\S+", f"--seed={seed}", command)
        own_name = None if name is None else f"{name}-{seed}"
        return _run_once(of_seed(seed), console, stages, from_stage, force, None, dry_run, own_name, same)

    draws = load_settings(**given)["eval_draws"]
    return run_seeds(seeds, one, draws=draws, command=command, console=console, folder=folder)


def _check_seed_names(settings: Mapping[int, Settings], name: str, stages: Sequence[str]) -> Path:
    """Return the folder of a run of several seeds, and check that its runs replace no other ones.

    The run of a seed has the name of the whole run with the seed after a hyphen.

    Args:
        settings: the settings of each seed.
        name: name of the whole run.
        stages: names of stages that the command contains.

    Raises:
        ConfigurationError: one of the names belongs to another run.
    """
    from recbole_gr2.runs import RESULT, check_same_run, named_folder

    folders = {seed: named_folder(each, f"{name}-{seed}") for seed, each in settings.items()}
    first = next(iter(settings.values()))
    folder = named_folder(first, name)
    check_same_run(folder, {"runs": [str(each / RESULT) for each in folders.values()]}, first.as_yaml())
    for seed, own in folders.items():
        if own.exists():
            from recbole_gr2 import pipeline
            from recbole_gr2.bridge.data import Data

            planned = pipeline.plan(settings[seed], Data(settings[seed]), stages=stages)
            _check_name(planned, settings[seed], f"{name}-{seed}")
    return folder


def _check_name(planned: Sequence[Planned], settings: Settings, name: str) -> None:
    """Check that a planned run is the one that has this name already, or that there is none.

    Raises:
        ConfigurationError: the name belongs to another run.
    """
    from recbole_gr2.runs import check_same_run, named_folder

    sources = {"stages": {entry.stage.name: entry.folder for entry in planned}}
    check_same_run(named_folder(settings, name), sources, settings.as_yaml())


def _run_once(
    settings: Settings,
    console: Console,
    stages: Sequence[str],
    from_stage: str | None,
    force: bool,
    show_prompt: str | None,
    dry_run: bool,
    name: str | None,
    command: str,
) -> Path | None:
    """Plan and run one seed; returns the path of result.json, or None if no methods were evaluated."""
    from recbole_gr2 import pipeline, preflight
    from recbole_gr2.console import quiet_libraries
    from recbole_gr2.distributed import RANK, check_launch

    check_launch()
    quiet_libraries()
    from recbole_gr2.bridge.data import Data

    console.say(
        f"GR2 on {settings['dataset']}, base model {' + '.join(settings['base_model'])}, LLM {settings['llm']}, "
        f"preset {settings['preset']}, seed {settings['seed']}"
    )
    console.say(describe_threads())
    pipeline.check(settings)
    data = Data(settings)
    summary = data.summary()
    console.say(summary.text())
    summary.check()
    if show_prompt is not None:
        print(prompt_of(settings, data, show_prompt))
        return None
    planned = pipeline.plan(settings, data, stages=stages, from_stage=from_stage, force=force)
    if name is not None:
        _check_name(planned, settings, name)
    console.table(
        ["stage", "key", "plan", "time", "why"],
        [[p.stage.name, p.key, p.action, preflight.expected_time(p, planned), p.why] for p in planned],
    )
    if any(entry.action == pipeline.OUTDATED for entry in planned):
        console.say("outdated: made by different code, and used as it is; --from_stage STAGE computes it again")
    console.say(f"expected time: {preflight.expected_total(planned)}")
    if preflight.is_first_run(planned):
        console.say(preflight.preset_purpose(settings))
    pipeline.check_data(planned, settings, data)
    preflight.check_resources(planned, settings, console.say, dry_run=dry_run)
    if dry_run:
        return None
    done = pipeline.execute(planned, settings, data, console)
    if not any("methods" in record.summary for record, _ in done) or RANK > 0:
        return None
    from recbole_gr2.report import write_run

    return write_run(planned, done, settings, command, console, name)


def prompt_of(settings: Settings, data: Any, request_id: str) -> str:
    """Return the prompt of a train request that contains its target, as the language model gets it.

    Args:
        settings: settings of the run.
        data: the data set.
        request_id: the request; "" for the first one.

    Raises:
        ConfigurationError: the stages that it needs have not run, or there is no such request.
    """
    from recbole_gr2 import pipeline
    from recbole_gr2.artifacts import load_catalog
    from recbole_gr2.lists import training_requests
    from recbole_gr2.prompts import PromptMaker
    from recbole_gr2.types import Context

    stages = ("tokenizer", "prior")
    planned = pipeline.plan(settings, data, stages=stages)
    missing = [entry.stage.name for entry in planned if not entry.finished]
    if missing:
        raise ConfigurationError(
            f"the stages {', '.join(missing)} have not run",
            where="--show_prompt",
            why="a prompt contains candidates and semantic IDs",
            do=f"run --stages {','.join(stages)} first",
        )
    folders = {entry.stage.name: entry.folder for entry in planned}
    context = Context(stage="", settings=settings, data=data, folder=Path(), inputs={}, folders=folders, say=print)
    requests = {request.request_id: request for request in training_requests(context)}
    if request_id and request_id not in requests:
        raise ConfigurationError(
            f"there is no train request {request_id!r} that contains its target",
            where="--show_prompt",
            do=f"choose from {', '.join(list(requests)[:5])}, ...",
        )
    prompt = PromptMaker.of(settings, load_catalog(context)).render(requests[request_id or next(iter(requests))])
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt.messages)
