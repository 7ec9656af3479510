"""Checkpoints from which a killed training continues.

transformers writes the files of a checkpoint one after another. A kill in between leaves an incomplete folder, often
the one with the highest step. So each checkpoint gets a list of its files once all of them are written, and only then
the checkpoint before it is deleted.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from recbole_gr2.distributed import RANK, wait_for_all
from recbole_gr2.store import write_json

CONTENTS = "contents.json"  # the sizes of the files of a complete checkpoint, in bytes


class CompleteCheckpoints(TrainerCallback):
    """Keep the last complete checkpoint. `save_total_limit` must be None."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """List the files of the new checkpoint, and delete all others."""
        wait_for_all()  # other processes write their random state
        if RANK > 0:
            return
        new = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(new / CONTENTS, _sizes(new))
        for other in _checkpoints(Path(args.output_dir)):
            if other != new:
                shutil.rmtree(other)


def last_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint in a folder, or None. Incomplete ones are deleted."""
    complete = [checkpoint for checkpoint in _checkpoints(folder) if _is_complete(checkpoint)]
    wait_for_all()  # every process has chosen
    if RANK == 0:
        for checkpoint in _checkpoints(folder):
            if checkpoint not in complete:
                shutil.rmtree(checkpoint)
    return str(max(complete, key=step_of)) if complete else None


def step_of(checkpoint: str | Path) -> int:
    """Return the optimizer step at which a checkpoint was written."""
    return int(Path(checkpoint).name.partition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.partition("-")[2].isdigit()]


def _is_complete(checkpoint: Path) -> bool:
    """Whether the listed files, and no others, are there with the listed sizes."""
    contents = checkpoint / CONTENTS
    try:
        return contents.is_file() and json.loads(contents.read_text(encoding="utf-8")) == _sizes(checkpoint)
    except ValueError:  # the list itself is damaged
        return False


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = [file for file in checkpoint.rglob("*") if file.is_file() and file.name != CONTENTS]
    return {str(file.relative_to(checkpoint)): file.stat().st_size for file in sorted(files)}
