"""Stage `base_model`: trains the base model and the hold-out base model.

The base model is trained on the training interactions. It proposes the candidates of validation and test requests. The
hold-out base model is trained without each user's last `train_targets` training interactions, the targets of the
training requests, and proposes their candidates. A model that was trained on a target ranks it first far too often, and
a re-ranker that learns from such lists keeps their order.
"""

from __future__ import annotations

from typing import Any

from recbole_gr2.bridge.data import Data
from recbole_gr2.bridge.training import is_finished, read_metadata, train_model
from recbole_gr2.config import GENERATOR, Settings
from recbole_gr2.recommenders import check_model, check_model_size, model_inputs, stages_of, training_options
from recbole_gr2.types import Context, Stage

BASE, HOLD_OUT = "base", "hold_out"  # folders of the two models


def run(context: Context) -> dict[str, Any]:
    """Train both models. Write base/ and hold_out/ with weights and metadata. A finished model is not trained again."""
    name = context.settings["base_model"]
    inputs = model_inputs(context, name, base=True)
    base, hold_out = context.folder / BASE, context.folder / HOLD_OUT
    if not is_finished(base):
        train_model(context.data, base, inputs=inputs, say=context.say)
    metadata = read_metadata(base)
    context.say(f"base model {name}: best epoch {metadata['epochs']}, validation {metadata.get('best_valid')}")
    if not is_finished(hold_out):
        context.say(f"hold-out base model: {metadata['epochs']} epochs without the targets of the training requests")
        train_model(context.data, hold_out, hold_out=True, epochs=metadata["epochs"], inputs=inputs, say=context.say)
    return {BASE: metadata, HOLD_OUT: read_metadata(hold_out)}


def key_values(settings: Settings) -> dict[str, Any]:
    """Return RecBole's options and the defaults of the base model."""
    return training_options(settings, settings["base_model"], base=True)


def check_settings(settings: Settings) -> None:
    """Check that there is such a base model, and that it has what it needs."""
    check_model(settings["base_model"], settings, base=True)


def check_data(settings: Settings, data: Data) -> None:
    """Check that the data set is large enough for the base model."""
    check_model_size(settings["base_model"], data, base=True)


def stages(settings: Settings) -> list[Stage]:
    """Declare the stage. Imported candidates and the mid-trained model need no base model."""
    needed = not settings["cand_file"] and settings["base_model"] != GENERATOR
    return [
        Stage(
            name="base_model",
            version=1,
            run=run,
            settings=("base_model", "cand_beams", "seed", "train_"),
            needs=stages_of(settings["base_model"], settings, base=True) if needed else (),
            check=check_settings,
            check_data=check_data,
            key_values=key_values,
        )
    ]
