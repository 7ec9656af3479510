"""`recbole-gr2 run`: the same as `python run_recbole_gr2.py`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

PROGRAM = "recbole-gr2 run"


class PassThrough(TyperCommand):
    """A command whose words are read by `quick_start.parse`. Its argument completes options too."""

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Return the completions of the command's argument for a word that begins like an option."""
        return [item for parameter in self.params for item in parameter.shell_complete(ctx, incomplete)]


def complete(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return options, settings or values that can continue a command, each with a help text.

    Args:
        ctx: the words before the incomplete one.
        incomplete: the beginning of an option, or of the value of the option before it.
    """
    from recbole_gr2.config import declarations, properties_folder
    from recbole_gr2.config.recbole_options import candidate_models
    from recbole_gr2.quick_start import option_parser

    declared = declarations()
    words = [word for word in ctx.params.get("words") or [] if word != "="]
    if incomplete.startswith("-") or not words or not words[-1].startswith("--"):
        options = {f"--{key}": "" for key in vars(option_parser().parse_args([]))}
        options |= {f"--{key}": entry.text for key, entry in declared.items()}
        return [(option, text) for option, text in options.items() if option.startswith(incomplete)]
    key = words[-1].removeprefix("--")
    if key in ("base_model", "models"):
        return [(name, "") for name in candidate_models()]
    if key in ("dataset", "preset", "ablation"):
        return [(file.stem, "") for file in sorted((properties_folder() / key).glob("*.yaml"))]
    return [(choice, "") for choice in declared[key].choices] if key in declared else []


Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="SETTINGS", autocompletion=complete, help="Options and settings of a run."),
]


def run(words: Words = None) -> None:
    """Train and evaluate on a data set; `recbole-gr2 run --help` shows the options."""
    from recbole_gr2.quick_start import main

    raise typer.Exit(main(words or [], program=PROGRAM))
