"""Training of RecBole models with RecBole's trainer, and loading of finished ones.

The folder of a model contains `model.safetensors` (parameters and buffers), `<name>.npz` (sparse matrices of RecBole's
traditional models) and `metadata.json`, which is written last. A folder without `metadata.json` is not finished.

Training reads no setting of the candidate lists and no metric of the report. Validation uses the metric and the cut-off
of `valid_metric`. It masks the items of the user's history if no user interacts with an item twice.
"""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_gr2.bridge.data import Data, exact_time_dataset
from recbole_gr2.bridge.models import BaseModel, PairScores, break_ties, find_model, mask_seen
from recbole_gr2.bridge.splits import LEAVE_ONE_OUT, from_end
from recbole_gr2.bridge.support import PRETRAINED, dataset_class
from recbole_gr2.config import recbole_config
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError, QualityCheckError
from recbole_gr2.model import MODELS
from recbole_gr2.progress import Loop, show_values
from recbole_gr2.seeding import derive_seed
from recbole_gr2.store import write_json
from recbole_gr2.tracking import track

METADATA = "metadata.json"
WEIGHTS = "model.safetensors"
OTHER = "other_parameter."  # prefix of tensors that RecBole stores outside of the state dict
DEFAULT_CUTOFF = 10  # of a valid_metric without a cut-off, such as GAUC


def train_or_load(
    data: Data,
    folder: Path,
    *,
    hold_out: bool = False,
    refit: bool = False,
    epochs: int | None = None,
    model: str | None = None,
    base: bool = True,
    inputs: Mapping[str, Any] | None = None,
    exclude_seen: bool | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> BaseModel:
    """Load the model of a folder, or train it if the folder is not finished. See `train_model` for the arguments."""
    if not is_finished(folder):
        train_model(
            data,
            folder,
            hold_out=hold_out,
            refit=refit,
            epochs=epochs,
            model=model,
            base=base,
            inputs=inputs,
            say=say,
        )
    return load_model(data, folder, model=model, base=base, inputs=inputs, exclude_seen=exclude_seen)


def is_traditional(model_class: Any) -> bool:
    """Whether a model of this package is computed in one pass by its method `fit`, without gradient training."""
    return hasattr(model_class, "fit")


def is_finished(folder: Path) -> bool:
    """Whether a folder contains a trained model."""
    return (folder / METADATA).is_file()


def read_metadata(folder: Path) -> dict[str, Any]:
    """Metadata of a finished folder, see `train_model`."""
    return json.loads((folder / METADATA).read_text(encoding="utf-8"))


def train_model(
    data: Data,
    folder: Path,
    *,
    hold_out: bool = False,
    refit: bool = False,
    epochs: int | None = None,
    model: str | None = None,
    base: bool = True,
    inputs: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train a RecBole model with RecBole's trainer and write its folder.

    Args:
        data: the data set.
        folder: the folder of the model.
        hold_out: whether to leave out each user's last training interactions that are targets of its training
            requests.
        refit: whether to add the validation items, for the lists of the test split. It requires `epochs`.
        epochs: number of epochs without validation. By default early stopping by `valid_metric` chooses it. A hold-out
            base model is trained for as many epochs as the base model, so that its targets do not choose the number.
        model: name of the model; by default the first base model.
        base: whether it is a base model, see `Settings.options_of`.
        inputs: what the model reads besides RecBole's training data, as values of its configuration, see `model.READS`.
        say: prints a line for each validation. On a terminal only the last one is printed.

    Returns:
        The metadata: `model`, `hold_out`, `refit`, `epochs`, `training_rows`, and `best_valid` with early stopping.

    Raises:
        ConfigurationError: the model is neither sequential nor general, or its state cannot be stored.
        QualityCheckError: no validation score is finite.
        GR2Error: a model of RecBole stops with an error.
    """
    from recbole.data.utils import create_samplers, get_dataloader
    from recbole.utils import ModelType, get_trainer

    setup = _set_up(data, folder, hold_out=hold_out, refit=refit, epochs=epochs, model=model, base=base, inputs=inputs)
    config = setup.config
    with _reported(setup.name):  # RecBole refuses users who interacted with all items.
        samplers = create_samplers(config, setup.dataset, [setup.train, *setup.built[1:]])
        loader = get_dataloader(config, "train")(config, setup.train, samplers[0], shuffle=config["shuffle"])
    valid_loader = get_dataloader(config, "valid")(data.config, data.validation(), None, shuffle=False)
    folder.mkdir(parents=True, exist_ok=True)
    metric = str(config["valid_metric"])
    kind = ModelType.TRADITIONAL if is_traditional(setup.model_class) else config["MODEL_TYPE"]
    trainer_class = get_trainer(kind, config["model"])
    with _reported(setup.name):
        network = _network(setup, data)
        if note := getattr(network, "note", ""):
            say(note)
        for stage in PRETRAINED.get(setup.name, ())[1:]:
            say(f"{setup.name}: {config['train_stage']}, {config['pretrain_epochs']} epochs without validation")
            _make_trainer(trainer_class, config, network, data, folder / WEIGHTS).fit(loader, verbose=False)
            network = _next_stage(setup, network, stage, data)
        if setup.sequential and setup.name not in MODELS:  # The models of the plugin cut their padding themselves.
            network.calculate_loss = BucketedLoss(network, say)
        trainer = _make_trainer(trainer_class, config, network, data, folder / WEIGHTS)
        score, _ = trainer.fit(
            loader,
            None if epochs else valid_loader,
            verbose=False,
            callback_fn=lambda epoch, value: show_values(
                f"{config['model']} epoch {epoch + 1}: {metric.lower()} {value:.4f}", say
            ),
        )
    if epochs is None and not np.isfinite(float(score)):
        raise QualityCheckError(
            f"training has no finite {metric} on the validation rows",
            where=f"model {config['model']}",
            why="early stopping cannot choose an epoch",
            do="lower the learning rate (base_learning_rate, or models_options for a model of `models`)",
        )
    metadata: dict[str, Any] = {
        "model": setup.name,
        "hold_out": hold_out,
        "refit": refit,
        "epochs": trainer.saved_epoch + 1,
        "training_rows": len(setup.train),
    }
    if epochs is None:
        metadata["best_valid"] = {metric: float(score)}
    write_json(folder / METADATA, metadata)
    return metadata


def load_model(
    data: Data,
    folder: Path,
    *,
    model: str | None = None,
    base: bool = True,
    inputs: Mapping[str, Any] | None = None,
    exclude_seen: bool | None = None,
) -> BaseModel:
    """Load a trained model. This creates the network on its training rows, but no sampler and no loader.

    Args:
        data: the data set.
        folder: the folder of the model.
        model: name of the model; by default the first base model.
        base: whether it is a base model, see `Settings.options_of`.
        inputs: what the model reads besides RecBole's training data, as values of its configuration, see `model.READS`.
        exclude_seen: whether its scores mask the items of the user's history; `cand_exclude_seen` by default.

    Raises:
        MissingFileError: the folder is not finished.
    """
    if not is_finished(folder):
        raise MissingFileError(
            "the model has not been trained",
            where=str(folder / METADATA),
            why="the file is written when the training ends",
            do="run the stage that trains it",
        )
    metadata = read_metadata(folder)
    setup = _set_up(
        data,
        folder,
        hold_out=metadata["hold_out"],
        refit=metadata["refit"],
        epochs=None,
        model=model,
        base=base,
        inputs=inputs,
    )
    with _reported(setup.name):
        network = _network(setup, data)
    _load_weights(network, folder / WEIGHTS)
    mask = data.settings["cand_exclude_seen"] if exclude_seen is None else exclude_seen
    return BaseModel(name=setup.name, model=network.eval(), data=data, exclude_seen=mask, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class _SetUp:
    """What RecBole needs to create a network: its class, its Config and its training rows."""

    name: str
    model_class: Any
    config: Any
    sequential: bool
    dataset: Any
    built: Any
    train: Any


def _set_up(
    data: Data,
    folder: Path,
    *,
    hold_out: bool,
    refit: bool,
    epochs: int | None,
    model: str | None,
    base: bool,
    inputs: Mapping[str, Any] | None,
) -> _SetUp:
    """Seed RecBole and prepare the Config and the training rows of a model.

    Raises:
        ConfigurationError: the model is neither sequential nor general.
        GR2Error: RecBole numbers users or items of the model's own data set in another way.
    """
    from recbole.utils import ModelType, init_seed

    settings, name = data.settings, model or data.settings["base_model"][0]
    model_class: Any = find_model(name)
    config = recbole_config(
        settings,
        model_class,
        base=base,
        **_overrides(data, folder, model_class, epochs=epochs, inputs=inputs),
    )
    sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    purpose = ("base", hold_out) if base else ("models", name)
    init_seed(derive_seed(settings["seed"], *purpose), config["reproducibility"])
    own = None if name in MODELS else dataset_class(name)
    dataset, built = (data.dataset, data.built) if sequential and own is None else _own_rows(data, config, own)
    train = built[0]
    if refit:
        whole = data.split.name == LEAVE_ONE_OUT
        train = _with_validation(built[0], built[1], data.uid) if whole else dataset.before_test
    keep = np.arange(len(train.inter_feat))
    if hold_out:
        users = train.inter_feat[data.uid].numpy()
        keep = np.flatnonzero(from_end(users) > data.split.held_out[users])
    if hasattr(model_class, "training_rows"):
        keep = keep[model_class.training_rows(train.inter_feat[keep], config)]
    return _SetUp(
        name=name,
        model_class=model_class,
        config=config,
        sequential=sequential,
        dataset=dataset,
        built=built,
        train=train.copy(train.inter_feat[keep]),
    )


def _with_validation(train: Any, valid: Any, user: str) -> Any:
    """RecBole's data set with the rows of training and validation, those of each user together and in time order."""
    from recbole.data.interaction import cat_interactions

    rows = cat_interactions([train.inter_feat, valid.inter_feat])
    return train.copy(rows[np.argsort(rows[user].numpy(), kind="stable")])


def _overrides(
    data: Data,
    folder: Path,
    model_class: Any,
    *,
    epochs: int | None,
    inputs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """RecBole options that training sets itself."""
    from recbole.utils import ModelType

    metric, _, cutoff = str(data.config["valid_metric"]).partition("@")
    overrides: dict[str, Any] = {
        "checkpoint_dir": str(folder),
        "show_progress": False,
        "metrics": [metric],
        "topk": [int(cutoff or DEFAULT_CUTOFF)],
    }
    if epochs is not None:
        overrides |= {"epochs": epochs, "eval_step": 0}
    elif is_traditional(model_class):
        overrides["eval_step"] = 1
    if stages := PRETRAINED.get(model_class.__name__):
        overrides["train_stage"] = stages[0]
    if model_class.type != ModelType.SEQUENTIAL:
        # If `repeatable` is set, RecBole draws negatives from the user's training items (sampler.py:371).
        overrides["repeatable"] = False
    return overrides | dict(inputs or {})


def _own_rows(data: Data, config: Any, own: type | None) -> tuple[Any, Any]:
    """RecBole's data set of a model, before and after the split, with the ids of the sequential data set.

    Args:
        data: the data set.
        config: the model's configuration.
        own: RecBole's data set class of this model alone; None for that of general models.
    """
    dataset: Any = exact_time_dataset(sequential=False, base=own)(config)
    for field in (data.uid, data.iid):
        if list(dataset.field2id_token[field]) != list(data.dataset.field2id_token[field]):
            raise GR2Error(
                f"the internal ids of {field} differ between the model's own and the sequential data set",
                where=f"model {config['model']}",
                why="scores and rows would belong to different users or items",
                do="report this as a bug, with the options for RecBole's data filters",
            )
    return dataset, data.build(dataset)


def _network(setup: _SetUp, data: Data) -> Any:
    """Create the network of a model, with a `full_sort_predict` if its class has none."""
    network = setup.model_class(setup.config, setup.train).to(setup.config["device"])
    if PairScores.needed(setup.model_class):
        network.full_sort_predict = PairScores(network, data.item_count + 1, int(setup.config["eval_batch_size"]))
    return network


def _next_stage(setup: _SetUp, network: Any, stage: str, data: Data) -> Any:
    """Create the network of the next training stage from the weights of the last one.

    RecBole would read them from a file that pickles its Config.
    """
    from unittest.mock import patch

    state = network.state_dict()
    setup.config["train_stage"] = stage
    with patch("torch.load", lambda *args, **kwargs: {"state_dict": state}):
        return _network(setup, data)


@contextlib.contextmanager
def _reported(name: str) -> Iterator[None]:
    """Report an error of a RecBole model as a GR2Error that names the model and the line.

    An error of a model of this package is a bug and stays as it is. An error of the disk is not one of the model.
    """
    try:
        yield
    except Exception as error:
        if str(error) == "Training loss is nan":  # trainer.py:346
            raise QualityCheckError(
                f"the training loss of {name} is not a number",
                where=f"model {name}",
                why="the weights became too large",
                do="lower the learning rate or the initial weights (base_learning_rate, base_initializer_range, or "
                "models_options for a model of `models`)",
            ) from error
        if name in MODELS or isinstance(error, GR2Error | OSError):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise GR2Error(
            f"{name} stops with {type(error).__name__}: {error}",
            where=f"{last.filename}:{last.lineno}",
            why="this model of RecBole cannot be trained on this data set with these options",
            do="change its options, choose another model, or see docs/base-models.md",
        ) from error


class BucketedLoss:
    """Loss of a sequential model, computed in length buckets without the padding of the shorter rows.

    RecBole's training rows are all prefixes of all sequences. Most of them are much shorter than MAX_ITEM_LIST_LENGTH.
    The result equals the loss of the whole batch, up to rounding, if that loss is a mean over rows, or over masked
    positions as in BERT4Rec. The first batch tests this without dropout; if the values differ, the model keeps its
    loss. A step of 256 rows of Amazon Beauty is 3.6 times as fast for SASRec, 2.1 for GRU4Rec and 6.7 for BERT4Rec
    (benchmarks/by_length.py).

    Args:
        model: a RecBole model.
        say: prints a line if the model keeps its loss.

    Attributes:
        whole: the loss of the model.
        exact: whether the buckets give the same loss; None before the first batch.
    """

    def __init__(self, model: Any, say: Callable[[str], None]) -> None:
        self.model, self.whole, self.say = model, model.calculate_loss, say
        self.exact: bool | None = None

    def __call__(self, batch: Any) -> Any:
        """Mean loss of a batch of rows."""
        if self.exact is None:
            self._compare(batch)
        return self.in_buckets(batch) if self.exact else self.whole(batch)

    def _compare(self, batch: Any) -> None:
        """Set `exact` by the two losses of a batch."""
        import torch

        in_buckets: float | Exception
        if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in self.model.modules()):
            self.exact = False  # Batch normalisation depends on the whole batch, but not while it is evaluated.
            self.say(f"{type(self.model).__name__} trains with padding, because it normalises batches")
            return
        self.model.eval()
        with torch.no_grad():
            whole = float(self.whole(batch))
            try:
                in_buckets = float(self.in_buckets(batch))
                self.exact = abs(whole - in_buckets) <= 1e-4 * abs(whole)
            # Some models need rows of full length (HGN), or whole batches (FEARec).
            except (IndexError, RuntimeError, ValueError) as error:
                in_buckets, self.exact = error, False
        self.model.train()
        if not self.exact:
            self.say(f"{type(self.model).__name__} trains with padding: loss {whole}, in length buckets {in_buckets}")

    def in_buckets(self, batch: Any) -> Any:
        """Mean loss of a batch, computed for rows of up to 4, 8, 16, ... items at a time."""
        model, lengths = self.model, batch[self.model.ITEM_SEQ_LEN]
        width, masked = batch[model.ITEM_SEQ].size(1), getattr(model, "MASK_INDEX", None)
        weights = (batch[masked] > 0).sum(1) if masked else lengths.new_ones(len(lengths))
        total, shortest, longest = 0.0, 0, 4
        while shortest < width:
            longest = min(longest, width)
            rows = ((lengths > shortest) & (lengths <= longest)).nonzero().flatten()
            if weights[rows].sum():
                part = batch[rows]
                for name, values in part.interaction.items():
                    if values.dim() == 2 and values.size(1) == width:
                        part.interaction[name] = values[:, :longest]
                if masked:  # RecBole pads masked positions in front.
                    for name in (masked, model.POS_ITEMS, model.NEG_ITEMS):
                        part.interaction[name] = part.interaction[name][:, -int(weights[rows].max()) :].contiguous()
                total = total + self.whole(part) * (weights[rows].sum() / weights.sum())
            shortest, longest = longest, 2 * longest
        return total


TAGS = {"Loss/Train": "loss", "Vaild_score": "valid_score"}  # RecBole's names of these metrics


class _Writer:
    """Replaces RecBole's SummaryWriter, which writes `log_tensorboard/` to the current folder, by the trackers."""

    def add_scalar(self, tag: str, value: float, epoch: int) -> None:
        """Report the loss or the validation score of an epoch, which RecBole counts from 0."""
        track({TAGS.get(tag, tag): float(value)}, epoch + 1)

    def add_hparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


def _make_trainer(trainer_class: Any, config: Any, network: Any, data: Data, weights: Path) -> Any:
    """RecBole's trainer of a model with five differences.

    Validation uses the mask and the tie rule of the evaluation. Checkpoints are safetensors without an optimizer,
    because RecBole pickles the whole Config, which torch >= 2.6 refuses to load (trainer.py:323, 583). Losses and
    validation scores are reported to the trackers. A traditional model of this package is fitted instead of trained.
    Epochs and batches are reported to the progress of the stage.
    """
    from unittest.mock import patch

    mask = not data.has_repeats

    class PluginTrainer(trainer_class):
        def fit(self, train_data: Any, valid_data: Any = None, **kwargs: Any) -> Any:
            pretraining = config["train_stage"] == "pretrain"
            epochs = config["pretrain_epochs"] if pretraining else self.epochs
            with Loop(f"{config['model']}, epoch", epochs, at_most=valid_data is not None) as self.loop:
                return super().fit(train_data, valid_data, **kwargs)

        def _train_epoch(self, train_data: Any, epoch_idx: int, *args: Any, **kwargs: Any) -> Any:
            if is_traditional(self.model):
                self.model.fit(train_data._dataset)
                return 0.0
            batch, loop = 1 / len(train_data), self.loop
            # Some models make several steps per batch.
            hook = self.optimizer.register_step_post_hook(lambda *call: loop.at(min(loop.done + batch, epoch_idx + 1)))
            loss = super()._train_epoch(train_data, epoch_idx, *args, **kwargs)
            hook.remove()
            loop.at(epoch_idx + 1)
            return loss

        def _full_sort_batch_eval(self, batched_data: Any) -> Any:
            interaction, scores, positive_u, positive_i = super()._full_sort_batch_eval(batched_data)
            if mask:
                mask_seen(scores, [data.history(user, "valid") for user in interaction[data.uid].tolist()])
            return interaction, break_ties(self.model, scores, positive_i), positive_u, positive_i

        def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
            self.saved_epoch = epoch
            _save_weights(self.model, weights)

        def save_pretrained_model(self, epoch: int, saved_model_file: str) -> None:
            """Do nothing. RecBole would pickle its Config; `_next_stage` passes the weights on."""

    with patch("recbole.trainer.trainer.get_tensorboard", lambda logger: _Writer()):
        return PluginTrainer(config, network)


def _save_weights(model: Any, file: Path) -> None:
    """Write parameters, buffers and other tensors as safetensors, and matrices of traditional models as .npz files."""
    import scipy.sparse
    import torch
    from safetensors.torch import save_file

    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    for name, value in (model.other_parameter() or {}).items():
        if isinstance(value, torch.Tensor):
            state[OTHER + name] = value.contiguous().clone()
        elif isinstance(value, torch.nn.Module):
            continue  # Its parameters are in the state dict.
        elif scipy.sparse.issparse(value) or isinstance(value, np.ndarray):
            scipy.sparse.save_npz(file.with_name(f"{name}.npz"), scipy.sparse.csr_matrix(value))
        elif value is not None:
            raise ConfigurationError(
                f"{type(model).__name__} stores {name} as {type(value).__name__} outside of its parameters",
                where="base_model, models",
                why="it could not be restored for evaluation",
                do="choose another model",
            )
    save_file(state, file)


def _load_weights(model: Any, file: Path) -> None:
    """Restore what `_save_weights` wrote."""
    import scipy.sparse
    from safetensors.torch import load_file

    state = load_file(file)
    device = next(model.parameters()).device
    other: dict[str, Any] = {n.removeprefix(OTHER): state.pop(n).to(device) for n in list(state) if n.startswith(OTHER)}
    model.load_state_dict(state)
    for name, value in (model.other_parameter() or {}).items():
        matrix_file = file.with_name(f"{name}.npz")
        if matrix_file.is_file():
            matrix = scipy.sparse.load_npz(matrix_file)
            other[name] = matrix.toarray() if isinstance(value, np.ndarray) else matrix
    if other:
        model.load_other_parameter(other)
