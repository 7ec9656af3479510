"""`recbole-gr2 tune`: search settings on the validation split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

PROGRAM = "recbole-gr2 tune"


def tune(
    space: Annotated[Path, typer.Argument(metavar="SPACE.yaml", help="File with method, metric, trials and space.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OPTIONS]", help="Options and settings of a run, after the file, such as --dataset mine."
        ),
    ] = None,
    no_test: Annotated[
        bool, typer.Option("--no_test", help="Leave out the evaluation of the best configuration on the test split.")
    ] = False,
) -> None:
    """Search settings on the validation split, then evaluate the best configuration once on the test split.

    The same command continues a study that was stopped. A larger number of trials in the file continues it, too. The
    last line on stdout is the path of the study's result.json; report.md and best.yaml are beside it.

    \b
    Examples:
      recbole-gr2 tune space.yaml --dataset amazon-beauty
      recbole-gr2 tune space.yaml --preset smoke --no_test
      recbole-gr2 tune space.yaml --dataset mine --data_path data --config_files mine.yaml --dry_run
    """
    from recbole_gr2.console import Console
    from recbole_gr2.errors import ConfigurationError
    from recbole_gr2.quick_start import check_result, parse

    options, command_line = parse(words or [])
    chosen = ("stages", "from_stage", "force", "ablation", "seeds", "show_prompt", "name")
    if given := [f"--{name}" for name in chosen if getattr(options, name) not in (None, False, ())]:
        raise ConfigurationError(
            f"{', '.join(given)} cannot be used with tune",
            where=PROGRAM,
            why="a study chooses its own stages, and all trials have one seed",
            do="remove it; --seed changes the seed",
        )
    from recbole_gr2 import tuning

    path = tuning.tune(
        space,
        {"command_line": command_line, "config_files": options.config_files},
        command=" ".join([PROGRAM, str(space), *(words or []), *(["--no_test"] if no_test else [])]),
        console=Console(),
        test=not no_test,
        dry_run=options.dry_run,
    )
    if path is not None:
        print(path)
        for run in json.loads(path.read_text(encoding="utf-8"))["tests"][-1:]:
            if Path(run["result"]).is_file():
                check_result(Path(run["result"]))
