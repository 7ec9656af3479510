"""The page docs/settings.md, generated from the property files."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from recbole_gr2.config.declaration import declaring_files, properties_folder, read_declarations

PAGE = """# Settings

`python -m recbole_gr2.config > docs/settings.md` generates this page from the declarations in `properties/`. Do not
edit it by hand.

Set a value with `--key=value` on the command line, in a YAML file for `--config_files`, or in `config_dict`. A preset
(`properties/preset/`) and a data set file (`<data_path>/<dataset>/<dataset>.yaml`, else `properties/dataset/`) override
the defaults below. "Optional" settings accept an empty value, written `~`. "Speed" settings never change a result, so a
change of one repeats no stage. RecBole's own options are listed under recbole.yaml; `base_<option>` sets one, or an
option of the base model, for the base model alone.
[migration.md](migration.md) lists the keys of earlier versions.
"""


def settings_page() -> str:
    """Return the text of docs/settings.md: one table for each property file that declares settings."""
    models = sorted((properties_folder() / "model").glob("*.yaml"))
    parts = [PAGE, *(_table(file) for file in [*declaring_files(), properties_folder() / "recbole.yaml"])]
    parts += [_table(file, prefix="base_") for file in models]
    return "\n".join(parts)


def _table(file: Path, prefix: str = "") -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    introduction = []
    for line in lines:
        if not line.startswith("#"):
            break
        introduction.append(line.removeprefix("#").strip())
    cells = [("Setting", "Type", "Allowed", "Default", "Optional", "Speed", "Meaning"), ("---",) * 7]
    for entry in read_declarations(file).values():
        default = yaml.safe_dump(entry.default, default_flow_style=True, width=10**6, sort_keys=False).split("\n")[0]
        cells.append(
            (
                f"`{prefix}{entry.key}`",
                entry.type_name,
                _escaped(entry.allowed),
                "" if entry.default is None else f"`{default}`",
                "yes" if entry.optional else "",
                "yes" if entry.speed else "",
                _escaped(entry.text),
            )
        )
    title = file.name if file.parent == properties_folder() else f"{file.parent.name}/{file.name}"
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
    return f"## {title}\n\n" + "\n".join(introduction) + f"\n\n{table}\n"


def _escaped(text: str) -> str:
    """Return `text` with the characters escaped that Markdown would read as markup."""
    return re.sub(r"([<*])", r"\\\1", text)
