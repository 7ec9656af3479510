"""The command: parse, plan, run, report.

`run_recbole_gr2.py`, the console script `recbole-gr2` and `run()` are one and the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_gr2.errors import ConfigurationError, GateError, GR2Error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (errors.py lists them)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        options, command_line = parse(argv)
        result = run(
            command_line=command_line,
            config_files=options.config_files,
            stages=tuple(filter(None, (options.stages or "").split(","))),
            from_stage=options.from_stage,
            force=options.force,
            ablation=options.ablation,
            seeds=options.seeds,
            show_prompt=options.show_prompt,
            dry_run=options.dry_run,
            command=" ".join(["run_recbole_gr2.py", *argv]),
        )
        if result is not None:
            print(result)
            if not options.ablation:
                for path in json.loads(result.read_text(encoding="utf-8")).get("runs", [result]):
                    check_result(Path(path))
    except GR2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def check_result(path: Path) -> None:
    """Refuse to call a run a success in which a model copied its input; its table and report are written all the same.

    Raises:
        GateError: a model left every list as it was.
    """
    from recbole_gr2.report import copies

    ours = ("midtrain", "sft", "rl", "distilled", "internalised")
    found = [row for row in copies(json.loads(path.read_text(encoding="utf-8"))) if row in ours]
    if found:
        raise GateError(
            f"{', '.join(found)} left every list as it was",
            where=str(path),
            why="a re-ranker that copies its input has learnt nothing: its row is the base row again",
            do="look at log.json and samples.json of its stage: reward, unchanged and entropy say when it gave up",
        )


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Options of the command, and every other `--key=value` or `--key value` as a setting."""
    parser = argparse.ArgumentParser(
        prog="run_recbole_gr2.py",
        description="Train and evaluate GR2, a generative reasoning re-ranker, on the lists of a RecBole base model.",
        epilog="Any setting of properties/*.yaml as --key=value; RecBole words of the base model as --base_key=value.",
        allow_abbrev=False,
    )
    parser.add_argument("-m", "--model", help="the re-ranker (GR2)")
    parser.add_argument("-d", "--dataset", help="folder of RecBole atomic files under data_path, or ml-100k")
    parser.add_argument("--base_model", help="RecBole model that proposes the candidates")
    parser.add_argument("--models", metavar="A,B", help="other RecBole models for the same table")
    parser.add_argument("--preset", help="smoke, laptop, gpu or paper; by default what fits the machine")
    parser.add_argument("--config_files", nargs="+", default=[], metavar="FILE", help="YAML files with settings")
    parser.add_argument("--stages", metavar="A,B", help="run these stages alone, with what they need")
    parser.add_argument("--from_stage", metavar="A", help="run this stage and what depends on it again")
    parser.add_argument("--force", action="store_true", help="run every stage again")
    parser.add_argument("--ablation", metavar="NAME", help="variants in a table: rerank, reward, tokenizer, or a file")
    parser.add_argument("--seeds", metavar="1,2,3", type=_numbers, default=(), help="run each and report them together")
    parser.add_argument(
        "--show_prompt",
        nargs="?",
        const="",
        metavar="REQUEST",
        help="print the prompt of a train list, by default the first, and stop",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the plan and stop")
    options, rest = parser.parse_known_args(argv)
    # argparse takes a word with a blank, e.g. "--eval_rows=[midtrain, sft]", for one more config file.
    rest += [word for word in options.config_files if word.startswith("--")]
    options.config_files = [word for word in options.config_files if not word.startswith("--")]
    settings = {k: getattr(options, k) for k in ("model", "dataset", "base_model", "preset") if getattr(options, k)}
    if options.models:
        from recbole_gr2.config import read_yaml

        models = read_yaml(options.models)  # A,B or, as a setting, [A, B]
        settings["models"] = [name.strip() for name in models.split(",")] if isinstance(models, str) else models
    return options, settings | _extra_settings(rest)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _extra_settings(words: Sequence[str]) -> dict[str, Any]:
    from recbole_gr2.config import read_yaml

    settings, position = {}, 0
    while position < len(words):
        word = words[position]
        key, equals, value = word.removeprefix("--").partition("=")
        position += 1
        if not equals and position < len(words) and not words[position].startswith("--"):
            value, equals = words[position], "="
            position += 1
        if not word.startswith("--") or not equals:
            raise ConfigurationError(f"cannot read {word!r}", where="command line", do="write settings as --key=value")
        settings[key] = read_yaml(value)
    return settings


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
    command: str = "recbole_gr2.quick_start.run()",
) -> Path | None:
    """Plan and run; returns the path of `result.json`, or None if the evaluate stage was not asked for.

    With `ablation`, a name or a file, it is variants of the run that are planned and run (`recbole_gr2.ablation`). With
    `seeds`, the run is repeated for each, and they are put together in one report (`recbole_gr2.seeds`). With
    `show_prompt`, a request id or "" for the first train list, its prompt is printed and nothing is run.

    Raises:
        GR2Error: with what, where, why and do; nothing that is finished is lost.
    """
    # Huge pages on the CPU; torch reads this at its first allocation. Generation becomes 1.4 times as fast on two
    # cores, with a third of the kernel's time and the same numbers. No effect where the kernel does not offer them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from recbole_gr2.config import load_settings
    from recbole_gr2.console import Console

    given = {"command_line": command_line, "config_dict": config_dict, "config_files": config_files}
    console = Console()
    if ablation:
        if stages or from_stage or force or seeds:
            raise ConfigurationError(
                "an ablation chooses its own stages, for one seed",
                where="--stages, --from_stage, --force, --seeds",
                do="leave them out; --checkpoint_dir DIR starts anew elsewhere",
            )
        _quiet_libraries()
        from recbole_gr2.ablation import read_ablation, run_ablation

        return run_ablation(read_ablation(ablation), given, command=command, console=console, dry_run=dry_run)
    if seeds:
        if show_prompt is not None or "seed" in {**(command_line or {}), **(config_dict or {})}:
            raise ConfigurationError(
                "--seeds stands for the seed of a whole run", where="--seeds", do="leave out --seed and --show_prompt"
            )
        from recbole_gr2.seeds import run_seeds

        def one(seed: int) -> Path | None:
            return run(
                command_line={**(command_line or {}), "seed": seed},
                config_dict=config_dict,
                config_files=config_files,
                stages=stages,
                from_stage=from_stage,
                force=force,
                dry_run=dry_run,
                command=re.sub(r"--seeds[ =]\S+", f"--seed={seed}", command),
            )

        draws = load_settings(**given)["eval_draws"]
        return run_seeds(seeds, one, draws=draws, command=command, console=console)
    settings = load_settings(**given)
    _quiet_libraries()
    from recbole_gr2 import pipeline
    from recbole_gr2.bridge.data import Data
    from recbole_gr2.processes import PLACE

    console.say(
        f"GR2 on {settings['dataset']}, base model {settings['base_model']}, LLM {settings['llm']}, "
        f"preset {settings['preset']}, seed {settings['seed']}"
    )
    pipeline.check(settings)
    data = Data(settings)
    console.say(
        f"{len(data.sequences):,} users, {data.item_count:,} items, "
        f"{sum(map(len, data.sequences.values())):,} interactions"
    )
    if show_prompt is not None:
        print(prompt_of(settings, data, show_prompt))
        return None
    planned = pipeline.plan(settings, data, stages=stages, from_stage=from_stage, force=force)
    console.table(["stage", "key", "plan", "why"], [[p.stage.name, p.key, p.action, p.why] for p in planned])
    if dry_run:
        return None
    done = pipeline.execute(planned, settings, data, console)
    if planned[-1].stage.name != "evaluate" or PLACE > 0:
        return None
    from recbole_gr2.report import write_run

    return write_run(planned, done, settings, command, console)


def prompt_of(settings: Mapping[str, Any], data: Any, request_id: str) -> str:
    """The prompt of a train list that holds its target, the first if `request_id` is "", as the model gets it.

    Raises:
        ConfigurationError: the stages before it have not run, or there is no such list.
    """
    from recbole_gr2 import pipeline
    from recbole_gr2.prompts import PromptMaker
    from recbole_gr2.stages import Context
    from recbole_gr2.stages.tokenizer import load_items
    from recbole_gr2.stages.traces import training_requests

    planned = pipeline.plan(settings, data, stages=("tokenizer", "evidence"))
    missing = [entry.stage.name for entry in planned if entry.action != "cached"]
    if missing:
        raise ConfigurationError(
            f"{', '.join(missing)} have not run",
            where="--show_prompt",
            why="a prompt shows candidates and semantic IDs",
            do="run --stages tokenizer,evidence first",
        )
    folders = {entry.stage.name: entry.folder for entry in planned}
    context = Context(stage="", settings=settings, data=data, folder=Path(), inputs={}, folders=folders, say=print)
    items = load_items(folders["tokenizer"], data.items)
    requests = {request.request_id: request for request in training_requests(context, items, None, "")}
    if request_id and request_id not in requests:
        raise ConfigurationError(
            f"there is no train list {request_id!r} that holds its target",
            where="--show_prompt",
            do=f"choose from {', '.join(list(requests)[:5])}, ...",
        )
    prompt = PromptMaker.of(settings, items).render(requests[request_id or next(iter(requests))])
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt.messages)


def _quiet_libraries() -> None:
    """Progress and warnings of libraries that say nothing about this run."""
    import warnings

    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    for module in ("recbole", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
