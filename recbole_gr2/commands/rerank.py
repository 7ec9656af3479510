"""`recbole-gr2 rerank`: apply a method of a finished run to lists of your own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from recbole_gr2.commands.output import CheckpointDir, DataPath, Run
from recbole_gr2.errors import MissingFileError
from recbole_gr2.runs import find_run


def rerank(
    run: Run,
    lists: Annotated[Path, typer.Argument(metavar="LISTS", help="JSON lines with `history` and `candidates`.")],
    method: Annotated[str | None, typer.Option("--method", metavar="NAME", help="Method of the run.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; by default stdout.")] = None,
    data_path: DataPath = None,
    checkpoint_dir: CheckpointDir = "saved",
) -> None:
    """Re-rank your own lists with a method of a finished run. Nothing is trained.

    \b
    Examples:
      recbole-gr2 rerank latest lists.jsonl
      recbole-gr2 rerank first lists.jsonl --method rl --output ranked.jsonl
    """
    folder = find_run(run, checkpoint_dir)
    if not lists.is_file():
        raise MissingFileError(
            f"there is no file {str(lists)!r:.200}",
            where="LISTS",
            why="it contains the lists to re-rank",
            do="name a file with JSON lines",
        )
    api = importlib.import_module("recbole_gr2.api")  # here, because it imports torch
    api.rerank_file(folder, lists, output, method=method, data_path=data_path)
