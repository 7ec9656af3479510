"""`recbole-gr2 report`: the report of a run again, LaTeX tables, and figures as PDF."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from recbole_gr2.commands.output import CheckpointDir, DataPath, complete_runs, names
from recbole_gr2.errors import ConfigurationError, nearest
from recbole_gr2.runs import find_ablation, find_run, read_ablation, read_result

SCOPES = ("all_users", "hit_users")


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            autocompletion=complete_runs,
            help="Name or path of a run, or `latest`; several runs, or an ablation, with --latex.",
        ),
    ],
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the page to this file.")] = None,
    latex: Annotated[
        Path | None, typer.Option("--latex", metavar="FILE", help="Write a table for one column of a paper.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", metavar="DIR", help="Write the figures as PDF to this folder.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="A,B", help="Methods of the table and the figures, in order.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option("--metrics", metavar="A,B", help="Metrics of the table, for example recall@5,ndcg@10.")
    ] = None,
    scope: Annotated[
        str | None, typer.Option("--scope", metavar="NAME", help="Users of the table: all_users, or hit_users.")
    ] = None,
    versus: Annotated[
        str | None, typer.Option("--versus", metavar="NAME", help="Also mark differences to this method.")
    ] = None,
    caption: Annotated[str | None, typer.Option("--caption", metavar="TEXT", help="Caption of the table.")] = None,
    label: Annotated[str | None, typer.Option("--label", metavar="TEXT", help="Label of the table.")] = None,
    data_path: DataPath = None,
    checkpoint_dir: CheckpointDir = "saved",
) -> None:
    """Write the report of a run again, or tables and figures for a paper.

    Without --html, --latex and --figures the command writes report.html, report.md and table.tex in the folder of each
    run. No stage runs again. Several runs become blocks of one LaTeX table, and the variants of an ablation its lines.

    \b
    Examples:
      recbole-gr2 report latest
      recbole-gr2 report first --html first.html
      recbole-gr2 report first --latex table.tex --methods base,lambdamart,sft --metrics recall@5,ndcg@10
      recbole-gr2 report first second --latex table.tex --scope hit_users --versus prior
      recbole-gr2 report first --figures figures/
    """
    asked = {"--html": html, "--latex": latex, "--figures": figures}
    _check_options(
        {"--metrics": metrics, "--scope": scope, "--versus": versus, "--caption": caption, "--label": label}, latex
    )
    if methods and not (latex or figures):
        _without("--methods", "--latex or --figures")
    if scope is not None and scope not in SCOPES:
        near = nearest(scope, SCOPES)
        raise ConfigurationError(
            f"there is no scope {scope!r:.200}",
            where="--scope",
            why="a table is about all users, or about the users whose list contains their target",
            do=(f"did you mean {near[0]}? " if near else "") + f"Choose from {', '.join(SCOPES)}",
        )
    ablation = find_ablation(runs[0], checkpoint_dir) if len(runs) == 1 else None
    if ablation is not None:
        if html or figures or versus or not latex:
            raise ConfigurationError(
                f"{ablation.name} is an ablation",
                where=str(ablation),
                why="only a run has a page, figures, and tests between methods",
                do="write --latex FILE, without --html, --figures and --versus",
            )
        from recbole_gr2.report.latex import ablation_table

        options: dict[str, Any] = {"caption": caption, "label": label, "scope": scope}
        _write(
            latex, ablation_table(read_ablation(ablation), methods=names(methods), metrics=names(metrics), **options)
        )
        return
    folders = [find_run(name, checkpoint_dir) for name in runs]
    if len(set(folders)) < len(folders) or (len(folders) > 1 and (html or figures)):
        raise ConfigurationError(
            f"{len(folders)} runs are named" + (", one of them twice" if len(set(folders)) < len(folders) else ""),
            where="RUN",
            why="a page and figures are those of one run, and a table has each run once",
            do="name one run with --html or --figures, and different ones with --latex",
        )
    results = {folder: read_result(folder) for folder in folders}
    if latex:
        from recbole_gr2.report.latex import latex_table

        text = latex_table(
            _titles(results),
            methods=names(methods),
            metrics=names(metrics),
            scope=scope or "all_users",
            versus=versus,
            caption=caption,
            label=label,
        )
        _write(latex, text)
    if html or figures or not any(asked.values()):
        _write_reports(results, html, figures, names(methods), data_path, every=not any(asked.values()))


def _write_reports(
    results: Mapping[Path, Mapping[str, Any]],
    html: Path | None,
    figures: Path | None,
    methods: Sequence[str],
    data_path: str | None,
    *,
    every: bool,
) -> None:
    """Write what needs the files of the stages."""
    from recbole_gr2.report.figures import save_figures
    from recbole_gr2.report.html import render_html
    from recbole_gr2.report.result import read_seeds
    from recbole_gr2.report.writing import report_files

    for folder, result in results.items():
        read = read_seeds(folder)
        if every:
            for name, text in report_files(result, read, data_path=data_path).items():
                _write(folder / name, text)
        if html:
            _write(html, render_html(result, read, data_path=data_path))
        if figures:
            with _written(figures):
                for path in save_figures(result, read, figures, methods=methods):
                    print(path)


def _titles(results: Mapping[Path, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The title of each block of a table: none for one run, the data set, or the name of the run."""
    if len(results) == 1:
        return {"": next(iter(results.values()))}
    datasets = [result["dataset"] for result in results.values()]
    if len(set(datasets)) == len(datasets):
        return {result["dataset"]: result for result in results.values()}
    same = len({folder.name for folder in results}) == len(results)
    return {
        folder.name if same else f"{result['dataset']}, {folder.name}": result for folder, result in results.items()
    }


def _check_options(options: Mapping[str, str | None], latex: Path | None) -> None:
    for option, value in options.items():
        if value and not latex:
            _without(option, "--latex")


def _without(option: str, needed: str) -> None:
    raise ConfigurationError(
        f"{option} is given without {needed}",
        where=option,
        why="it would have no effect",
        do=f"add {needed}, or leave {option} out",
    )


def _write(file: Path, text: str) -> None:
    from recbole_gr2.store import write_text

    with _written(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    print(file)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Within this context, a path that cannot be written is an error of this package."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {path}: {error.strerror}",
            where=str(error.filename or path),
            why="the command writes this path",
            do="name a path that can be written, on a disk with free space",
        ) from error
