"""Base models: found by name, trained by RecBole's trainer or loaded, and asked for scores of the whole catalogue."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recbole_gr2 import compat
from recbole_gr2.bridge.data import Data, exact_time_dataset, from_end
from recbole_gr2.config import recbole_config
from recbole_gr2.console import progress
from recbole_gr2.errors import ConfigurationError, GateError, GR2Error
from recbole_gr2.model import MODELS
from recbole_gr2.seeding import derive_seed
from recbole_gr2.types import Request

OTHER = "other_parameter."  # prefix of tensors that RecBole keeps outside state_dict


def find_model(name: str) -> type:
    """A base model by name: the plugin's own first, then RecBole's.

    Raises:
        ConfigurationError: neither has it.
    """
    compat.apply()
    import recbole_gr2.model as ours

    if name in ours.MODELS:
        return ours.load(name)
    from recbole.utils import get_model

    try:
        return get_model(name)
    except (ValueError, ImportError) as error:  # ImportError: its last guess is a folder that needs lightgbm
        raise ConfigurationError(
            f"there is no model named {name!r}",
            where="base_model, models",
            do=f"name one of RecBole's models, or one of the plugin's own: {', '.join(ours.MODELS)}, GR2Generator, "
            "among models also OneRecThink and OneRecThink-no-think",
        ) from error


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A trained RecBole model, in eval mode, that scores the rows of `Data`."""

    name: str
    model: object
    data: Data
    exclude_seen: bool
    facts: dict

    def scores(self, split: str, users: Sequence[int] | None = None) -> Iterator[tuple[np.ndarray, object]]:
        """Batches of (user ids (B,), scores (B, N + 1)), padding and, where asked, seen items at -inf."""
        import torch

        feat, row_users = self.data.rows(split)
        if users is not None:
            feat = feat[np.flatnonzero(np.isin(row_users, np.asarray(users)))]
        size = int(self.data.config["eval_batch_size"])
        for start in progress(range(0, len(feat), size), f"{split} rows"):
            rows = feat[start : start + size]
            with torch.no_grad():
                scores = self.score_rows(rows, split)
            yield rows[self.data.uid].numpy(), scores  # outside: two readers in turn would restore each other's mode

    def score_rows(self, rows, split: str):
        """Masked scores (B, N + 1) of these rows."""
        import torch

        scores = self.model.full_sort_predict(rows.to(self.data.config["device"]))
        scores = scores.view(-1, self.data.item_count + 1).float()
        scores[:, 0] = -torch.inf
        if self.exclude_seen:
            mask_seen(scores, rows[self.data.uid].tolist(), self.data, split)
        return scores

    def judged(self, scores, targets):
        """Scores as RecBole's evaluator gets them: see `judged`."""
        return judged(self.model, scores, targets)


def judged(model, scores, targets):
    """Score rows as RecBole's evaluator gets them, so that ties break as they do there, or by a model's own rule."""
    return model.judged(scores, targets) if hasattr(model, "judged") else scores


@dataclass(frozen=True, kw_only=True)
class ListedBase:
    """Imported candidate lists in the place of a base model: their order first, then the catalogue in id order."""

    data: Data
    requests: Sequence[Request]
    model: object = None

    def score_rows(self, rows, split: str):
        """Scores (B, N + 1): K .. 1 for a row's candidates, negative ids behind them."""
        import torch

        lists = {r.user_token: r.items for r in self.requests if r.split == split}
        scores = -torch.arange(self.data.item_count + 1).float().repeat(len(rows), 1)
        scores[:, 0] = -torch.inf
        for row, user in enumerate(rows[self.data.uid].tolist()):
            items = lists[self.data.user_tokens[user]]
            scores[row, list(items)] = torch.arange(len(items), 0, -1).float()
        return scores

    def judged(self, scores, targets):
        """See `BaseModel.judged`; there are no ties."""
        return scores


def mask_seen(scores, users: Sequence[int], data: Data, split: str) -> None:
    """Set every item of the users' histories to -inf, in place. Uses whole histories, not RecBole's cut lists."""
    import torch

    histories = [data.history(user, split) for user in users]
    row = np.repeat(np.arange(len(users)), [len(h) for h in histories])
    column = np.concatenate([np.asarray(h, dtype=np.int64) for h in histories])
    scores[torch.from_numpy(row), torch.from_numpy(column)] = -torch.inf


def train_base(
    data: Data,
    folder: Path,
    *,
    hold_out: bool,
    epochs: int | None = None,
    model: str | None = None,
    sids: np.ndarray | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> BaseModel:
    """Train a RecBole model with RecBole's trainer, or load it from `folder` if it is complete there.

    Args:
        data: the data set.
        folder: where `model.safetensors` and `facts.json` go; facts are written last.
        hold_out: train without each user's last training interactions, the targets of the train requests.
        epochs: train exactly so long without validation; None stops early by `valid_metric` on the valid rows.
            A hold-out base trains as long as the base did, so that its targets do not choose it.
        model: another model than the base model; it gets RecBole's words without those of the base model.
        sids: codes (N, L) of items 1..N, for a model that reads semantic IDs (`model.READS_SIDS`).
        say: told of every validation.

    Raises:
        ConfigurationError: the model is neither sequential nor general.
        GateError: training ended without a finite validation score.
    """
    from recbole.data.utils import create_samplers, get_dataloader
    from recbole.utils import ModelType, get_trainer, init_seed

    settings, name = data.settings, model or data.settings["base_model"]
    model_class = find_model(name)
    overrides = {"checkpoint_dir": str(folder), "show_progress": False}
    if model:
        overrides |= settings["models_words"]
    if epochs is not None:
        overrides |= {"epochs": epochs, "eval_step": 0}
    if model_class.type != ModelType.SEQUENTIAL:
        overrides["repeatable"] = False  # with True RecBole draws negatives from the user's own items (sampler.py:371)
    if sids is not None:
        overrides |= {"sids": sids, "cand_beams": settings["cand_beams"]}
    config = recbole_config(settings, model_class, base=model is None, **overrides)
    sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    if not sequential and config["MODEL_TYPE"] not in (ModelType.GENERAL, ModelType.TRADITIONAL):
        raise ConfigurationError(
            f"{name} is a {config['MODEL_TYPE'].name.lower()} model",
            where="models" if model else "base_model",
            why="candidates need scores for the whole catalogue from a user and a history alone",
            do="choose a sequential or a general model, e.g. SASRec, GRU4Rec, BPR, ItemKNN",
        )
    purpose = ("base", hold_out) if model is None else ("models", name)
    init_seed(derive_seed(settings["seed"], *purpose), config["reproducibility"])
    if sequential:
        dataset, built = data.dataset, data.built
    else:
        dataset = exact_time_dataset(sequential=False)(config)
        for field in (data.uid, data.iid):
            if list(dataset.field2id_token[field]) != list(data.dataset.field2id_token[field]):
                raise GR2Error(f"the {field} maps of the general and the sequential data set differ", where="bridge")
        built = dataset.build()
    train, valid, test = built
    keep = np.arange(len(train.inter_feat))
    if hold_out:
        keep = np.flatnonzero(from_end(train.inter_feat[data.uid].numpy()) > data.train_targets)
    if hasattr(model_class, "training_rows"):
        rows = model_class.training_rows(train.inter_feat[keep], config)
        keep = keep[rows]
    train = train.copy(train.inter_feat[keep])
    samplers = create_samplers(config, dataset, [train, valid, test])
    loader = get_dataloader(config, "train")(config, train, samplers[0], shuffle=config["shuffle"])
    valid_loader = get_dataloader(config, "valid")(data.config, data.built[1], None, shuffle=False)

    network = model_class(config, train).to(config["device"])
    weights, facts_file = folder / "model.safetensors", folder / "facts.json"
    exclude_seen = settings["cand_exclude_seen"]
    if facts_file.is_file():
        _load_weights(network, weights, folder)
        facts = json.loads(facts_file.read_text())
        return BaseModel(name=name, model=network.eval(), data=data, exclude_seen=exclude_seen, facts=facts)

    folder.mkdir(parents=True, exist_ok=True)
    if sequential and name not in MODELS:  # the plugin's own cut their padding themselves
        network.calculate_loss = ByLength(network, say)
    trainer_class = _plugin_trainer(get_trainer(config["MODEL_TYPE"], config["model"]), data, exclude_seen, weights)
    trainer = trainer_class(config, network)
    metric = str(config["valid_metric"]).lower()
    score, _ = trainer.fit(
        loader,
        None if epochs else valid_loader,
        verbose=False,
        callback_fn=lambda epoch, value: say(f"{config['model']} epoch {epoch + 1}: {metric} {value:.4f}"),
    )
    if epochs is None and not np.isfinite(float(score)):
        raise GateError("training has no finite validation score", where=f"model {config['model']}")
    _load_weights(network, weights, folder)
    best_epoch = trainer.saved_epoch + 1
    facts = {"model": name, "hold_out": hold_out, "epochs": best_epoch, "training_rows": len(train)}
    if epochs is None:
        facts["best_valid"] = {str(config["valid_metric"]): float(score)}
    facts_file.write_text(json.dumps(facts, indent=1))
    return BaseModel(name=name, model=network.eval(), data=data, exclude_seen=exclude_seen, facts=facts)


class ByLength:
    """A sequential model's loss over rows of similar length at a time, without the padding behind them.

    RecBole's training rows are every prefix of every sequence, most of them a fraction of MAX_ITEM_LIST_LENGTH long. A
    loss that is a mean over rows, or over masked places as BERT4Rec's, stays the same but for float noise; whether it
    is one is tried on the first batch, without dropout, and where it is not the loss stays whole. A step of 256 rows of
    Amazon Beauty is 3.6 times as fast for SASRec, 2.1 for GRU4Rec, 6.7 for BERT4Rec (benchmarks/by_length.py).
    """

    def __init__(self, model, say: Callable[[str], None]) -> None:
        self.model, self.whole, self.say = model, model.calculate_loss, say
        self.exact: bool | None = None

    def __call__(self, batch):
        """Mean loss of a batch of rows."""
        if self.exact is None:
            self._try(batch)
        return self.in_parts(batch) if self.exact else self.whole(batch)

    def _try(self, batch) -> None:
        import torch

        self.model.eval()
        with torch.no_grad():
            whole = float(self.whole(batch))
            try:
                parts = float(self.in_parts(batch))
                self.exact = abs(whole - parts) <= 1e-4 * abs(whole)
            except RuntimeError as error:  # weights with a place for every item, as HGN's
                parts, self.exact = error, False
        self.model.train()
        if not self.exact:
            self.say(f"{type(self.model).__name__} trains with padding: loss {whole} whole, in parts {parts}")

    def in_parts(self, batch):
        """The same, part by part: rows of up to 4, 8, 16, ... items."""
        model, lengths = self.model, batch[self.model.ITEM_SEQ_LEN]
        width, places = batch[model.ITEM_SEQ].size(1), getattr(model, "MASK_INDEX", None)
        weights = (batch[places] > 0).sum(1) if places else lengths.new_ones(len(lengths))
        total, shortest, longest = 0.0, 0, 4
        while shortest < width:
            longest = min(longest, width)
            rows = ((lengths > shortest) & (lengths <= longest)).nonzero().flatten()
            if weights[rows].sum():
                part = batch[rows]
                for name, values in part.interaction.items():
                    if values.dim() == 2 and values.size(1) == width:
                        part.interaction[name] = values[:, :longest]
                if places:  # padded in front
                    for name in (places, model.POS_ITEMS, model.NEG_ITEMS):
                        part.interaction[name] = part.interaction[name][:, -int(weights[rows].max()) :].contiguous()
                total = total + self.whole(part) * (weights[rows].sum() / weights.sum())
            shortest, longest = longest, 2 * longest
        return total


def _plugin_trainer(trainer_class: type, data: Data, exclude_seen: bool, weights: Path) -> type:
    """RecBole's trainer of a model, with two differences.

    It validates on the sequential rows, under the mask and with the ties that evaluation has. Its checkpoint is
    safetensors without an optimizer: RecBole pickles the whole Config, which torch >= 2.6 refuses to load again
    (trainer.py:323, 583).
    """

    class PluginTrainer(trainer_class):
        def _full_sort_batch_eval(self, batched_data):
            interaction, scores, positive_u, positive_i = super()._full_sort_batch_eval(batched_data)
            if exclude_seen:
                mask_seen(scores, interaction[data.uid].tolist(), data, "valid")
            return interaction, judged(self.model, scores, positive_i), positive_u, positive_i

        def _save_checkpoint(self, epoch, verbose=True, **kwargs):
            self.saved_epoch = epoch
            _save_weights(self.model, weights, weights.parent)

    return PluginTrainer


def _save_weights(model, weights: Path, folder: Path) -> None:
    """Parameters, buffers and other tensors as safetensors; the matrices of traditional models beside it as .npz."""
    import scipy.sparse
    import torch
    from safetensors.torch import save_file

    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    for name, value in (model.other_parameter() or {}).items():
        if isinstance(value, torch.Tensor):
            state[OTHER + name] = value.contiguous().clone()
        elif scipy.sparse.issparse(value) or isinstance(value, np.ndarray):
            scipy.sparse.save_npz(folder / f"{name}.npz", scipy.sparse.csr_matrix(value))
        elif value is not None:
            raise ConfigurationError(
                f"{type(model).__name__} keeps {name} as {type(value).__name__} outside its parameters",
                where="base_model",
                why="it could not be restored for evaluation",
                do="choose another base model",
            )
    save_file(state, weights)


def _load_weights(model, weights: Path, folder: Path) -> None:
    import scipy.sparse
    from safetensors.torch import load_file

    state = load_file(weights)
    device = next(model.parameters()).device
    other = {n.removeprefix(OTHER): state.pop(n).to(device) for n in list(state) if n.startswith(OTHER)}
    model.load_state_dict(state)
    for name, value in (model.other_parameter() or {}).items():
        if (folder / f"{name}.npz").is_file():
            matrix = scipy.sparse.load_npz(folder / f"{name}.npz")
            other[name] = matrix.toarray() if isinstance(value, np.ndarray) else matrix
    if other:
        model.load_other_parameter(other)
