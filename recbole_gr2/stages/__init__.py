"""The stages, one file each. A stage is a function `run(context) -> facts`: it reads records, writes its folder, and
never calls another stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_gr2.types import StageRecord


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a stage is given.

    Attributes:
        stage: its name; that of a baseline is the model's.
        settings: the run's settings (a mapping).
        data: the data set behind the bridge: `items`, `sequences`, `train_sequences()`, `item_count`.
        folder: where to write; it exists, and holds what an interrupted run left.
        inputs: stage name -> record of what it needs.
        folders: stage name -> folder of what it needs.
        say: prints one progress line.
    """

    stage: str
    settings: Mapping[str, Any]
    data: Any
    folder: Path
    inputs: Mapping[str, StageRecord]
    folders: Mapping[str, Path]
    say: Callable[[str], None]
