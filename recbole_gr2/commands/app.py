"""The application: its commands, and what happens to their errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from recbole_gr2 import __version__
from recbole_gr2.commands.clean import clean
from recbole_gr2.commands.compare import compare
from recbole_gr2.commands.convert import convert
from recbole_gr2.commands.data import check
from recbole_gr2.commands.doctor import doctor
from recbole_gr2.commands.listing import data, methods, presets, settings
from recbole_gr2.commands.report import report
from recbole_gr2.commands.rerank import rerank
from recbole_gr2.commands.run import PassThrough, run
from recbole_gr2.commands.runs import runs
from recbole_gr2.commands.show import show
from recbole_gr2.commands.tune import tune
from recbole_gr2.distributed import choose_threads
from recbole_gr2.errors import ConfigurationError, GR2Error, nearest

PROGRAM = "recbole-gr2"
OPTIONS = ("--help", "-h", "--version", "--install-completion", "--show-completion")  # those of the application itself
INTERRUPTED = "interrupted; what is finished is kept, and the same command continues"


class Commands(TyperGroup):
    """A group of commands. An unknown command is an error of this package that names the nearest ones."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first word names, as Typer does."""
        if args[0] not in self.commands and not ctx.resilient_parsing:
            near = nearest(args[0], self.commands)
            raise ConfigurationError(
                f"there is no command {args[0]!r:.200}",
                where=ctx.command_path,
                why="the first word names the command",
                do=(f"did you mean {' or '.join(near)}? " if near else "") + f"Choose from {', '.join(self.commands)}",
            )
        return super().resolve_command(ctx, args)


def _group(text: str) -> typer.Typer:
    return typer.Typer(cls=Commands, help=text, rich_markup_mode=None)


app = typer.Typer(
    cls=Commands,
    help="Train, evaluate and inspect GR2, a generative reasoning re-ranker for the lists of RecBole models.",
    epilog=f"`{PROGRAM} COMMAND --help` shows the options and examples of a command.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)
data_app = _group(
    """Prepare and check data sets.

    \b
    Examples:
      recbole-gr2 data convert ratings.csv --items items.csv --name mine
      recbole-gr2 data check --dataset mine
    """
)
list_app = _group(
    """List what settings can name.

    \b
    Examples:
      recbole-gr2 list methods
      recbole-gr2 list settings
    """
)

# Each command is registered here, in the order of --help.
# Settings are options of any name. With -h as an option, a word such as -dhotels would ask for help.
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]}
app.command(
    cls=PassThrough,
    add_help_option=False,
    context_settings=PASS_THROUGH,
    short_help="Train and evaluate on a data set.",
)(run)
app.command()(runs)
app.command()(compare)
app.command()(show)
app.command()(report)
app.command()(rerank)
app.command(cls=PassThrough, context_settings=PASS_THROUGH)(tune)
app.add_typer(data_app, name="data")
data_app.command(cls=PassThrough, context_settings=PASS_THROUGH)(check)
data_app.command()(convert)
app.command()(clean)
app.command()(doctor)
app.add_typer(list_app, name="list")
list_app.command()(methods)
list_app.command()(data)
list_app.command()(settings)
list_app.command()(presets)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Read the options of the application itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code, see `recbole_gr2.errors`; 130 after Ctrl-C.

    A command line that begins with an option of `run`, such as `--dataset ml-100k`, is one of `run`.
    """
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if argv[0].startswith("-") and argv[0] not in OPTIONS:
        argv = ["run", *argv]
    choose_threads()
    sys.path.insert(0, os.getcwd())  # modules of the user that settings name
    try:
        code = app(argv, prog_name=PROGRAM, standalone_mode=False) or 0
        if code == 130 and argv[0] != "run":  # typer returns 130 after Ctrl-C. `run` prints its own message.
            print(INTERRUPTED if argv[0] == "tune" else "interrupted", file=sys.stderr)
        return code
    except GR2Error as error:
        return _failed(error)
    except typer.TyperException as error:
        return _failed(_usage_error(error))
    except typer.Abort:  # Ctrl-C, or the end of the input, at a question
        print("\nstopped; nothing was changed", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        sys.path.remove(os.getcwd())


def _failed(error: GR2Error) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _usage_error(error: typer.TyperException) -> ConfigurationError:
    """Return a mistake in the command line that Typer found as an error of this package."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else PROGRAM
    text = error.format_message().rstrip(".")
    return ConfigurationError(
        f"cannot read the command: {text[:1].lower()}{text[1:]}",
        where=command,
        why="a part of the command is missing, or would be ignored",
        do=f"{command} --help shows the options and examples",
    )
