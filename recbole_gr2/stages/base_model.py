"""Stages `base_model_<name>`: each trains one base model and its hold-out base model.

The base model is trained on the training interactions. It proposes the candidates of validation and test requests. The
hold-out base model is trained without each user's last training interactions that are targets of the
training requests, and proposes their candidates. A model that was trained on a target ranks it first far too often, and
a re-ranker that learns from such lists keeps their order. With `refit` a third model is trained on the training and
validation interactions, and proposes the candidates of test requests.
"""

from __future__ import annotations

from typing import Any

from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.training import is_finished, read_metadata, train_model
from recbole_gr2.config import GENERATOR, Settings
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.recommenders import (
    BASE,
    HOLD_OUT,
    REFIT,
    base_stage,
    check_model,
    check_model_size,
    model_inputs,
    stages_of,
    training_options,
)
from recbole_gr2.types import Context, Stage


def stages(settings: Settings) -> list[Stage]:
    """Declare a stage for each base model. Imported candidates and the mid-trained model need none."""
    if settings["cand_file"]:
        return []
    return [_stage(name, settings) for name in settings["base_model"] if name != GENERATOR]


def _stage(name: str, settings: Settings) -> Stage:
    def run(context: Context) -> dict[str, Any]:
        """Train the models. Write base/, hold_out/ and, with `refit`, refit/. Finished models stay."""
        inputs = model_inputs(context, name, base=True)
        base, hold_out, refit = (context.folder / kind for kind in (BASE, HOLD_OUT, REFIT))
        if not is_finished(base):
            train_model(context.data, base, model=name, inputs=inputs, say=context.say)
        metadata = read_metadata(base)
        context.say(f"base model {name}: best epoch {metadata['epochs']}, validation {metadata.get('best_valid')}")
        epochs = metadata["epochs"]
        if not is_finished(hold_out):
            context.say(f"hold-out base model: {epochs} epochs without the targets of the training requests")
            train_model(
                context.data, hold_out, hold_out=True, epochs=epochs, model=name, inputs=inputs, say=context.say
            )
        summary = {BASE: metadata, HOLD_OUT: read_metadata(hold_out)}
        if context.settings["refit"]:
            if not is_finished(refit):
                context.say(f"refitted base model: {epochs} epochs with the validation items")
                train_model(context.data, refit, refit=True, epochs=epochs, model=name, inputs=inputs, say=context.say)
            summary[REFIT] = read_metadata(refit)
        return summary

    def key_values(settings: Settings) -> dict[str, Any]:
        return training_options(settings, name, base=True)

    def check_settings(settings: Settings) -> None:
        check_model(name, settings, base=True)

    def check_data(settings: Settings, data: Data) -> None:
        check_model_size(name, data, base=True)
        if data.split.known["hold_out"].max() < 2:
            raise ConfigurationError(
                "without the targets of the training requests no user has two training items",
                where=f"train_requests {settings['train_requests']}, train_targets {settings['train_targets']}",
                why="the hold-out models, which propose the training lists, have nothing to learn from",
                do="lower train_requests or train_targets",
            )

    return Stage(
        name=base_stage(name),
        version=2,
        run=run,
        settings=("cand_beams", "refit", "seed", "train_"),
        needs=stages_of(name, settings, base=True),
        check=check_settings,
        check_data=check_data,
        key_values=key_values,
    )
