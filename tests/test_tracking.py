"""Metrics of a running training for trackers."""

import json

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker
from conftest import called
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recbole_gr2.errors import DependencyError
from recbole_gr2.preflight import check
from recbole_gr2.tracking import Tracking, track


def scalars(folder, run):
    events = EventAccumulator(str(folder / run))
    events.Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_steps_of_a_further_training_follow(tmp_path):
    with Tracking(["tensorboard"], stage="sft", run="one", folder=tmp_path):
        for step, loss in ((1, 3.0), (4, 2.0), (4, 1.5), (2, 1.0), (3, 0.5)):
            track({"loss": loss, "text": "is no metric"}, step)
    assert scalars(tmp_path, "one") == {"sft/loss": [(1, 3.0), (4, 2.0), (4, 1.5), (6, 1.0), (7, 0.5)]}
    track({"loss": 1.0}, 1)  # without a stage
    with Tracking([], stage="sft", run="two", folder=tmp_path):
        track({"loss": 1.0}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_missing_package_is_an_error_before_the_run(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr("recbole_gr2.tracking.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="trackers wandb are not installed"):
        check(tiny_settings(tmp_path, report_to=["wandb"]))


def test_a_tracker_that_cannot_start_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with Tracking(["tensorboard"], stage="sft", run="one", folder=tmp_path / "file"), pytest.raises(DependencyError):
        track({"loss": 1.0}, 1)


def test_what_a_tracker_prints_goes_to_stderr(tmp_path, monkeypatch, capsys):
    class Printing(TensorBoardTracker):
        def start(self):
            print("started")
            super().start()

        def finish(self):
            super().finish()
            print("finished")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Printing)
    with Tracking(["tensorboard"], stage="sft", run="one", folder=tmp_path):
        track({"loss": 1.0}, 1)
    out, err = capsys.readouterr()
    assert out == "" and err.count("started") == err.count("finished") == 1


@pytest.mark.slow
def test_metrics_are_those_of_the_logs(finished_command, tmp_path):
    """A run again with a tracker has the same keys. The stages that are computed again report."""
    argv = finished_command.copy(tmp_path / "saved")
    code, _, stderr = called([*argv, "--report_to=[tensorboard]", "--stages=sft", "--force"])
    assert code == 0, stderr
    folder = tmp_path / "saved" / "gr2" / "tiny"
    key = finished_command.stages["sft"].name
    found = scalars(folder / "tensorboard", f"tiny-sft-{key}")
    log = json.loads((folder / "stages" / "sft" / key / "log.json").read_text())
    for name in ("loss", "loss/ranking", "learning_rate", "grad_norm"):
        assert found[f"sft/{name}"] == [(line["step"], pytest.approx(line[name], abs=1e-4)) for line in log]
    (base,) = [run.name for run in (folder / "tensorboard").iterdir() if "base_model" in run.name]
    base_model = scalars(folder / "tensorboard", base)
    epochs = len(base_model["base_model_CausalSASRec/loss"])
    assert [step for step, _ in base_model["base_model_CausalSASRec/loss"]] == list(range(1, epochs + 1)) and epochs > 3
    assert base_model["base_model_CausalSASRec/valid_score"]
