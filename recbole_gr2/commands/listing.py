"""`recbole-gr2 list`: what settings can name."""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path
from typing import Annotated

import typer

from recbole_gr2.commands.output import print_table
from recbole_gr2.errors import ConfigurationError, nearest


def methods() -> None:
    """List the re-rankers that --eval_rows can name, and the methods that are part of every run.

    \b
    Example:
      recbole-gr2 list methods
    """
    from recbole_gr2.rerankers.registry import ORDERS, RERANKERS

    rows = [[order.name, "part of every run", order.description] for order in ORDERS]
    rows += [[name, "--eval_rows", reranker.description] for name, reranker in RERANKERS.items()]
    print_table(["method", "where", "order of the candidates"], rows)


def data(
    data_path: Annotated[str, typer.Option("--data_path", metavar="DIR", help="Folder of the data sets.")] = "dataset/",
) -> None:
    """List the data sets that --dataset can name.

    These are the folders of --data_path, the data sets with a file of settings in this package, and those that RecBole
    downloads.

    \b
    Examples:
      recbole-gr2 list data
      recbole-gr2 list data --data_path data
    """
    from recbole_gr2.config import first_comment, properties_folder, read_yaml, recbole_properties
    from recbole_gr2.preflight import PACKAGED_DATASET

    folder = Path(data_path)
    here = {each.parent.name for each in folder.glob("*/*.inter")} if folder.is_dir() else set()
    described = {file.stem: first_comment(file) for file in (properties_folder() / "dataset").glob("*.yaml")}
    url = recbole_properties() / "dataset" / "url.yaml"
    downloads = set(read_yaml(url.read_text(encoding="utf-8"))) - {PACKAGED_DATASET}
    places = {
        f"in {folder}": here,
        "part of RecBole": {PACKAGED_DATASET},
        "RecBole downloads it": downloads - here,
    }
    rows = [[name, place, described.get(name, "")] for place, names in places.items() for name in sorted(names)]
    listed = {row[0] for row in rows}
    rows += [[name, "settings only", text] for name, text in sorted(described.items()) if name not in listed]
    print_table(["data set", "files", "settings of this package"], rows)


def settings(
    pattern: Annotated[
        str | None, typer.Argument(metavar="[PATTERN]", help="Part of a name, or a pattern such as 'rl_*'.")
    ] = None,
) -> None:
    """List the settings with type, default, meaning and source.

    A setting is given as --key=value or in a file of --config_files; base_<option> is an option of the base model.
    docs/settings.md has the same content. A terminal does not show the files in which settings are declared.

    \b
    Examples:
      recbole-gr2 list settings
      recbole-gr2 list settings rl_
      recbole-gr2 list settings '*steps'
    """
    import yaml

    from recbole_gr2.config import declarations, properties_folder, read_declarations
    from recbole_gr2.config.declaration import recbole_declarations
    from recbole_gr2.config.recbole_options import RECBOLE_TRAINING

    recbole = recbole_declarations()
    entries = {f"base_{key}" if key in RECBOLE_TRAINING else key: entry for key, entry in recbole.items()}
    entries |= declarations()
    for file in sorted((properties_folder() / "model").glob("*.yaml")):
        for key, entry in read_declarations(file).items():
            entries.setdefault(f"base_{key}", entry)
    glob = f"*{pattern or ''}*" if not set(pattern or "") & set("*?[") else pattern or ""
    chosen = {key: entries[key] for key in sorted(entries) if fnmatch.fnmatch(key, glob)}
    if not chosen:
        near = nearest(pattern or "", entries)
        raise ConfigurationError(
            f"no setting has a name like {pattern!r:.200}",
            where="PATTERN",
            why=f"{len(entries)} settings were searched",
            do=(f"did you mean {', '.join(near)}? " if near else "")
            + "recbole-gr2 list settings without a pattern lists all of them",
        )
    rows = []
    for key, entry in chosen.items():
        default = yaml.safe_dump(entry.default, default_flow_style=True, width=10**6, sort_keys=False).split("\n")[0]
        kind = entry.type_name + (f" {entry.allowed}" if entry.allowed else "")
        rows.append([key, kind, "" if entry.default is None else default, entry.text, entry.file])
    header = ["setting", "type", "default", "meaning and source", "declared in"]
    shown = 4 if sys.stdout.isatty() else 5  # A terminal has little room for the names of files.
    print_table(header[:shown], [row[:shown] for row in rows])


def presets() -> None:
    """List the presets and the settings that each of them changes.

    \b
    Example:
      recbole-gr2 list presets
    """
    from recbole_gr2.config import first_comment, properties_folder, read_yaml

    rows = []
    for file in sorted((properties_folder() / "preset").glob("*.yaml")):
        values = read_yaml(file.read_text(encoding="utf-8"))
        rows.append([file.stem, first_comment(file), ", ".join(f"{key}: {value}" for key, value in values.items())])
    print_table(["preset", "purpose", "settings"], rows)
