"""Parameters that several commands have, and tables on stdout."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from recbole_gr2.console import render_table
from recbole_gr2.progress import terminal_width


def complete_runs(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the names of runs that begin with a text, each with its data set; `latest` is the newest run."""
    from recbole_gr2.runs import LATEST, run_folders

    folders = run_folders(ctx.params.get("checkpoint_dir") or "saved")
    names = [(LATEST, "the newest run"), *((folder.name, folder.parents[1].name) for folder in folders)]
    return [(name, text) for name, text in names if name.startswith(incomplete)]


RUN = "Name of a run, path of its folder or result.json, or `latest` for the newest one."
Run = Annotated[str, typer.Argument(metavar="RUN", autocompletion=complete_runs, help=RUN)]
CheckpointDir = Annotated[
    str, typer.Option("--checkpoint_dir", metavar="DIR", help="Folder of all results, in which names are looked up.")
]
DataPath = Annotated[
    str | None,
    typer.Option("--data_path", metavar="DIR", help="Folder that contains the folder of the data set, if it moved."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def names(text: str | None) -> list[str]:
    """Return the names in an option such as `--methods sft,rl`. A name with a comma stands in quotation marks.

    >>> names("sft, rl"), names('ndcg@5, "sft - base, from"'), names(None)
    (['sft', 'rl'], ['ndcg@5', 'sft - base, from'], [])
    """
    return [name.strip() for row in csv.reader([text or ""], skipinitialspace=True) for name in row if name.strip()]


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout. It fits a terminal; elsewhere each row is one line.

    Args:
        header: name of each column.
        rows: cells of each line, as many as there are columns.
    """
    print(render_table(header, rows, width=terminal_width(sys.stdout)))
