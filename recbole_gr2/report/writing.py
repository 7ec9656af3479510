"""Writes the folder of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_gr2.console import Console
from recbole_gr2.report.latex import latex_tables
from recbole_gr2.report.page import Page, render_report
from recbole_gr2.report.result import SCOPES, FinishedRun, build_result, finished_run, in_scope, new_folder
from recbole_gr2.report.tables import equal_metrics, metrics_table, scope_title
from recbole_gr2.report.verdict import banner, verdict
from recbole_gr2.runs import check_same_run, named_folder
from recbole_gr2.store import explained_disk_errors, write_json, write_text
from recbole_gr2.types import StageRecord

if TYPE_CHECKING:
    from recbole_gr2.config import Settings
    from recbole_gr2.pipeline import Planned


def write_run(
    planned: Sequence[Planned],
    done: Sequence[tuple[StageRecord, bool]],
    settings: Settings,
    command: str,
    console: Console,
    name: str | None = None,
) -> Path:
    """Write `runs/<time>/`, or `runs/<name>/`, for a run of one seed and print its tables.

    Args:
        planned: the plan of the run.
        done: what `pipeline.execute` returned for it.
        settings: settings of the run.
        command: the command line.
        console: where the tables are printed.
        name: name of the run. An earlier report of the same run is replaced.

    Returns:
        The path of result.json.

    Raises:
        ConfigurationError: another run has this name.
    """
    if name is None:
        folder = new_folder(settings.results_folder / "runs")
    else:
        folder = named_folder(settings, name)
        check_same_run(folder, {"stages": {entry.stage.name: entry.folder for entry in planned}}, settings.as_yaml())
        with explained_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    run = finished_run(planned, done, settings, command, folder / "result.json")
    return write_report(folder, build_result([run], command), [run], console)


def report_files(
    result: Mapping[str, Any], runs: Sequence[FinishedRun], *, data_path: str | None = None
) -> dict[str, str]:
    """Return the text of each file of a report, by its name.

    Args:
        result: content of result.json.
        runs: the finished run of each seed.
        data_path: folder that contains the folder of the data set, if it is not that of the run any more.
    """
    from recbole_gr2.report.html import render_html  # matplotlib takes a second to import

    return {
        "report.md": render_report(result, runs),
        "report.html": render_html(result, runs, data_path=data_path),
        "table.tex": latex_tables(result),
    }


def write_report(folder: Path, result: Mapping[str, Any], runs: Sequence[FinishedRun], console: Console) -> Path:
    """Write config.yaml, run.json, result.json, the two reports and table.tex, and print the tables of metrics.

    run.json names the folders of the stages of a run of one seed, and the runs of a run of several seeds. config.yaml
    has the first seed.

    Args:
        folder: where to write. The folder exists.
        result: content of result.json.
        runs: the finished run of each seed.
        console: where the tables are printed.

    Returns:
        The path of result.json.
    """
    sources: dict[str, Any] = {"stages": {stage: str(path) for stage, path in runs[0].folders.items()}}
    config = runs[0].config
    if len(runs) > 1:
        sources = {"runs": [str(run.path) for run in runs]}
        config = f"# Run with --seeds {','.join(str(run.seed) for run in runs)}.\n{config}"
    with explained_disk_errors(folder):
        write_text(folder / "config.yaml", config)
        write_json(folder / "run.json", {"command": result["command"], **sources})
        for name, text in report_files(result, runs).items():
            write_text(folder / name, text)
        write_json(folder / "result.json", result)  # last: a folder with this file is complete
    for scope in SCOPES:
        if in_scope(result, scope):
            console.print(f"\n{scope_title(result, scope)}\n{metrics_table(result, scope, console.render)}")
            if equal := equal_metrics(result, scope):
                console.print(equal)
    page = Page(result=result, runs=runs)
    for sentence in [banner(result)] if banner(result) else verdict(result, page.language_models):
        console.print(sentence.replace("`", ""))
    console.say(f"report: {folder / 'report.html'}, and report.md")
    return folder / "result.json"
