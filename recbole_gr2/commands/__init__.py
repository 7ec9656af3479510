"""The command line `recbole-gr2`, one module for each command or group of commands.

`app` lists the commands and starts them. A command is a function whose parameters Typer reads from the command line. It
imports large libraries itself, so that `--help` and mistakes in names are answered at once.
"""

from recbole_gr2.commands.app import main

__all__ = ["main"]
