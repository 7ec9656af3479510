"""Metrics of a running training for TensorBoard, Weights & Biases and Trackio. Nothing in this module changes a result.

`report_to` names the trackers. A stage opens a `Tracking`, and its trainings report with `track`. A metric has the key
`<stage>/<metric>`, and a stage is a run of the tracker. The trackers are those of accelerate.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from recbole_gr2.distributed import RANK
from recbole_gr2.errors import DependencyError

PROJECT = "recbole-gr2"  # of Weights & Biases and Trackio


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed.

    Args:
        names: names of trackers.

    Raises:
        DependencyError: a package is missing.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"the trackers {', '.join(missing)} are not installed",
            where="report_to",
            why="the metrics of a training are sent to them while it runs",
            do=f"pip install {' '.join(missing)}, or remove them from report_to; log.json has the same metrics",
        )


class Tracking:
    """The trackers of a stage, in a `with` block. They start with the first metric. Only the first process reports.

    Args:
        names: names of trackers: tensorboard, wandb, trackio.
        stage: name of the stage, which begins the keys.
        run: name of the run of the trackers.
        folder: folder of the TensorBoard logs.
    """

    current: ClassVar[Tracking | None] = None

    def __init__(self, names: Sequence[str], *, stage: str, run: str, folder: Path) -> None:
        self.names, self.stage, self.run, self.folder = names if RANK == 0 else (), stage, run, folder
        self.trackers: list[Any] = []
        self.first = self.last = 0  # steps of the trainings before this one, and the last step

    @classmethod
    def of(cls, settings: Any, stage: str, key: str) -> Tracking:
        """Return the trackers of a stage.

        Args:
            settings: settings of the run.
            stage: name of the stage.
            key: key of the stage.
        """
        return cls(
            settings["report_to"],
            stage=stage,
            run=f"{settings['dataset']}-{stage}-{key}",
            folder=settings.results_folder / "tensorboard",
        )

    def __enter__(self) -> Tracking:
        Tracking.current = self
        return self

    def __exit__(self, *raised: Any) -> None:
        Tracking.current = None
        with redirect_stdout(sys.stderr):
            for name, tracker in zip(self.names, self.trackers, strict=False):
                _finish(name, tracker)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Report the numbers among some values.

        Args:
            values: the values by metric.
            step: number of steps of the training. A smaller number than the last one begins a further training of the
                stage, whose steps follow.
        """
        numbers = {f"{self.stage}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        if not self.names or not numbers:
            return
        if not self.trackers:
            self.trackers = [self._start(name) for name in self.names]
        if self.first + step < self.last:
            self.first = self.last
        self.last = self.first + step
        for tracker in self.trackers:
            tracker.log(numbers, step=self.last)

    def _start(self, name: str) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # the trackers of accelerate need it
        kind = LOGGER_TYPE_TO_CLASS[name]
        try:
            if kind.requires_logging_directory:
                self.folder.mkdir(parents=True, exist_ok=True)
                tracker = kind(self.run, logging_dir=str(self.folder))
            else:
                tracker = kind(PROJECT, name=self.run)
            with redirect_stdout(sys.stderr):  # Trackio prints. Stdout is for the path of result.json.
                tracker.start()
        except Exception as error:  # of any kind: it is that of another package, or of its server
            raise DependencyError(
                f"the tracker {name} cannot start: {type(error).__name__}: {error}",
                where="report_to",
                why="the metrics of the training could not be seen while it runs",
                do=f"log in to {name} or correct its configuration, or remove it from report_to",
            ) from error
        return tracker


def _finish(name: str, tracker: Any) -> None:
    """Finish a tracker. Trackio finishes a run a second time when Python exits unless its own function finished it."""
    if name == "trackio":
        import trackio

        trackio.finish()
    else:
        tracker.finish()


def track(values: Mapping[str, Any], step: int) -> None:
    """Report metrics of the stage that runs, see `Tracking.log`. Without a stage nothing happens."""
    if Tracking.current:
        Tracking.current.log(values, step)
