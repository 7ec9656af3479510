"""The folder of a run: result.json for programs, report.html, report.md and table.tex for people."""

from recbole_gr2.report.latex import latex_tables
from recbole_gr2.report.page import render_report
from recbole_gr2.report.result import (
    FinishedRun,
    build_result,
    finished_run,
    learning_curves,
    new_folder,
    read_run,
    unchanged_methods,
)
from recbole_gr2.report.tables import metrics_table
from recbole_gr2.report.writing import write_report, write_run

__all__ = [
    "FinishedRun",
    "build_result",
    "finished_run",
    "latex_tables",
    "learning_curves",
    "metrics_table",
    "new_folder",
    "read_run",
    "render_report",
    "unchanged_methods",
    "write_report",
    "write_run",
]
