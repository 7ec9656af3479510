"""`recbole-gr2 compare`: two runs on the same users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from recbole_gr2.commands.output import RUN, AsJson, CheckpointDir, complete_runs, names, print_json, print_table
from recbole_gr2.runs import find_run


def compare(
    first: Annotated[str, typer.Argument(metavar="A", autocompletion=complete_runs, help=RUN)],
    second: Annotated[str, typer.Argument(metavar="B", autocompletion=complete_runs, help="The other run.")],
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="A,B", help="Methods to compare; by default all that both have.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="A,B", help="Metrics to compare, for example ndcg@10.")
    ] = None,
    checkpoint_dir: CheckpointDir = "saved",
    as_json: AsJson = False,
) -> None:
    """Compare two runs on the same data set.

    The command prints the settings that differ, and the metrics of each method that both runs have, over all users. The
    difference is that of the second run to the first one. It has a 95 % interval over users, the p-value of a paired
    randomization test, and the p-value with Holm's correction over the table. A metric with a cut-off above the length
    of the lists, and a method that does not rank the lists, have no test.

    \b
    Examples:
      recbole-gr2 compare first second
      recbole-gr2 compare saved/gr2/ml-100k/runs/first latest --methods prior,sft --metric ndcg@10
      recbole-gr2 compare first second --json
    """
    folders = find_run(first, checkpoint_dir), find_run(second, checkpoint_dir)
    from recbole_gr2.run_comparison import compare_runs

    compared = compare_runs(*folders, methods=names(methods), metrics=names(metric))
    if as_json:
        print_json(compared)
        return
    print(f"{compared['dataset']}, {compared['users']:,} users")
    print(f"A: {compared['runs'][0]}\nB: {compared['runs'][1]}\n")
    if compared["settings"]:
        changed = compared["settings"].items()
        print_table(["setting", "A", "B"], [[key, _value(one), _value(other)] for key, (one, other) in changed])
    else:
        print("All settings that can change a result are equal.")
    print()
    header = ["method and metric", "A", "B", "B - A", "95 % interval", "p", "Holm"]
    print_table(header, [_row(entry) for entry in compared["methods"]])
    if not all("p" in entry for entry in compared["methods"]):
        print(
            f"\nLines without a test: the cut-off is above the length of the lists, {compared['list_length']}, or the "
            "method or the metric has no value of each user."
        )


def _value(value: Any) -> str:
    return "" if value is None else str(value)


def _row(entry: Mapping[str, Any]) -> list[str]:
    tested = ["", "", "", ""]
    if "p" in entry:
        interval = f"[{entry['low']:+.4f}, {entry['high']:+.4f}]"
        tested = [f"{entry['diff']:+.4f}", interval, f"{entry['p']:.4f}", f"{entry['p_holm']:.4f}"]
    return [f"{entry['method']} {entry['metric']}", f"{entry['first']:.4f}", f"{entry['second']:.4f}", *tested]
