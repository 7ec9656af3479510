"""`recbole-gr2 show`: one candidate list, and what each method of a run made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from recbole_gr2.commands.output import AsJson, CheckpointDir, DataPath, Run, print_json, print_table
from recbole_gr2.runs import find_run, finished_stages, one_seed, read_result

TITLE_CHARS = 60


def show(
    run: Run,
    user: Annotated[str, typer.Argument(metavar="USER", help="Id of a user, as in the data files.")],
    method: Annotated[str | None, typer.Option("--method", metavar="NAME", help="Only this method.")] = None,
    data_path: DataPath = None,
    checkpoint_dir: CheckpointDir = "saved",
    as_json: AsJson = False,
) -> None:
    """Show the test list of a user: history, candidates, the order of each method, and its reasoning.

    In the reasoning, titles replace the semantic IDs. Statements are checked if the traces of the run are those of the
    rules teacher, because only its sentences can be checked. Nothing is trained.

    \b
    Examples:
      recbole-gr2 show latest 196
      recbole-gr2 show first A2CG5Y82ZZNY6W --method rl --data_path data
      recbole-gr2 show first 196 --json
    """
    folder = one_seed(find_run(run, checkpoint_dir))
    stages = finished_stages(folder)
    from recbole_gr2.config import load_settings
    from recbole_gr2.report.answers import describe

    moved = {} if data_path is None else {"data_path": data_path}
    settings = load_settings(config_files=[folder / "config.yaml"], command_line=moved)
    shown = describe(read_result(folder), stages, settings, user, method)
    if as_json:
        print_json({"run": str(folder), **shown})
    else:
        _print(shown)


def _print(shown: Mapping[str, Any]) -> None:
    from recbole_gr2.prompts import shorten

    def title(item: Mapping[str, Any]) -> str:
        return shorten(item["title"], TITLE_CHARS)

    def sid(item: Mapping[str, Any]) -> str:
        return " ".join(map(str, item["sid"]))

    print(f"user {shown['user']}, list {shown['request']}\n")
    if shown["earlier"]:
        print(f"The {len(shown['history'])} last items of the history, after {shown['earlier']} earlier ones:")
    print_table(["history", "title", "semantic ID"], [[i["item"], title(i), sid(i)] for i in shown["history"]])
    target = shown["target"]
    place = f"rank {target['rank']} of the base order" if target["rank"] else "not among the candidates"
    print(f"\ntarget: {target['item']}, {title(target)} ({place})\n")
    methods = list(shown["answers"])
    print_table(
        [*methods, "candidate", "title", "semantic ID", "target"],
        [
            [
                *(str(candidate["ranks"][name]) for name in methods),
                candidate["item"],
                title(candidate),
                sid(candidate),
                "target" if candidate["target"] else "",
            ]
            for candidate in shown["candidates"]
        ],
    )
    if shown["not_ranked"]:
        print(f"\nnot ranked by {', '.join(shown['not_ranked'])}: eval_scope and eval_max_lists choose the lists")
        if shown["ranked_users"]:
            print(f"  users with a ranked list: {', '.join(shown['ranked_users'])}")
    for name, answer in shown["answers"].items():
        if answer["reasoning"]:
            print(f"\n{name}, {answer['status']}: {answer['reasoning']}")
            if answer["statements"] is None:
                print("  not checked: only sentences of the rules teacher can be checked")
            else:
                checks = [f"{kind} {'true' if true else 'false'}" for kind, true in answer["statements"].items()]
                print(f"  statements: {', '.join(checks)}")
