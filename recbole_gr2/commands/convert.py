"""The command `recbole-gr2 data convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

COLUMN = "Column of {}: a name, or a number from 1 if the file has no header."


def convert(
    interactions: Annotated[Path, typer.Argument(help="File with one line for each interaction.")],
    name: Annotated[str, typer.Option("--name", help="Name of the data set.")],
    items: Annotated[Path | None, typer.Option("--items", help="File with one line for each item.")] = None,
    user: Annotated[str | None, typer.Option("--user", help=COLUMN.format("the user ids"))] = None,
    item: Annotated[str | None, typer.Option("--item", help=COLUMN.format("the item ids"))] = None,
    time: Annotated[str | None, typer.Option("--time", help=COLUMN.format("the times"))] = None,
    rating: Annotated[str | None, typer.Option("--rating", help=COLUMN.format("the ratings"))] = None,
    title: Annotated[str | None, typer.Option("--title", help=COLUMN.format("the item titles"))] = None,
    brand: Annotated[str | None, typer.Option("--brand", help=COLUMN.format("the brands"))] = None,
    categories: Annotated[str | None, typer.Option("--categories", help=COLUMN.format("the categories"))] = None,
    description: Annotated[str | None, typer.Option("--description", help=COLUMN.format("the descriptions"))] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder of data sets.")] = Path("dataset"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of an existing data set.")] = False,
    skip_malformed: Annotated[
        bool, typer.Option("--skip_malformed", help="Count malformed lines and leave them out.")
    ] = False,
    min_interactions: Annotated[
        int | None,
        typer.Option("--min_interactions", help="Least number of interactions of each user and item that a run uses."),
    ] = None,
    time_format: Annotated[
        str | None, typer.Option("--time_format", help="Form of the times as for strptime, such as %d/%m/%Y.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option("--encoding", help="Encoding of text files, such as cp1252. Default: UTF-8.")
    ] = None,
    release: Annotated[
        str | None,
        typer.Option(
            "--release", help="Amazon release: 2014, 2018 or 2023. By default the fields of the files tell it."
        ),
    ] = None,
) -> None:
    """Convert files of interactions and items into a data set.

    The files are text with separators, JSON lines or Parquet, packed or not, or raw files of Amazon or MovieLens.
    Columns with usual names need not be named. The last line on stdout is the command that runs the data set.

    \b
    Examples:
      recbole-gr2 data convert ratings.csv --items items.csv --name mine
      recbole-gr2 data convert ratings.csv --items items.csv --user userId --item itemId --time timestamp --name mine
      recbole-gr2 data convert ml-1m/ratings.dat --items ml-1m/movies.dat --name ml-1m
      recbole-gr2 data convert Video_Games.jsonl.gz --items meta_Video_Games.jsonl.gz --name games
    """
    from recbole_gr2.convert import convert as convert_files

    report = convert_files(
        interactions,
        items,
        name=name,
        user=user,
        item=item,
        time=time,
        rating=rating,
        title=title,
        brand=brand,
        categories=categories,
        description=description,
        output=output,
        overwrite=overwrite,
        skip_malformed=skip_malformed,
        min_interactions=min_interactions,
        time_format=time_format,
        encoding=encoding,
        release=release,
    )
    typer.echo(report, err=True)
    typer.echo(report.command)
