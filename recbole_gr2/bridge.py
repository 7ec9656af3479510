"""The door to RecBole: data, base models, and its evaluator. Past this module nothing knows RecBole.

Rows are those of RecBole's SequentialDataset under leave-one-out (`LS: valid_and_test`, `TO`), whatever the base
model is: one test and one valid row per user, and as train row of a request the user's last training interaction.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from recbole_gr2 import compat
from recbole_gr2.config import Settings, recbole_config
from recbole_gr2.errors import ConfigurationError, GateError, GR2Error, MissingFileError
from recbole_gr2.model import MODELS
from recbole_gr2.seeding import derive_seed
from recbole_gr2.text import clean_text
from recbole_gr2.types import Item, Request

SPLITS = ("train", "valid", "test")
TEXTS = ("title", "categories", "brand", "description")
DESCRIPTION_CHARS = 1000  # the encoder reads 128 tokens, and a description comes last
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


class Data:
    """A RecBole data set: catalogue, user sequences in exact time order, and the rows of every split."""

    def __init__(self, settings: Settings) -> None:
        compat.apply()
        self.settings = settings
        # Any sequential model gives the same rows; SASRec's class is only asked for its type.
        self.config = recbole_config(settings, "SASRec", loss_type="CE")
        _check_protocol(self.config)
        _check_files(self.config)
        self.dataset = _exact_time_dataset(sequential=True)(self.config)
        self.uid, self.iid = self.dataset.uid_field, self.dataset.iid_field
        self.user_tokens = [str(token) for token in self.dataset.field2id_token[self.uid]]
        self.item_tokens = [str(token) for token in self.dataset.field2id_token[self.iid]]
        frame = self.dataset.inter_feat.sort_values([self.uid, self.dataset.time_field], kind="stable")
        self.sequences: dict[int, np.ndarray] = {
            int(user): group.to_numpy() for user, group in frame.groupby(self.uid)[self.iid]
        }
        self.train_targets: int = settings["train_targets"]
        if self.train_targets < 1:
            raise ConfigurationError(f"train_targets is {self.train_targets}", do="choose 1 or more")
        self._grades = _grades(frame, self.uid, settings["train_grades"])
        self.built = self.dataset.build()

    @property
    def item_count(self) -> int:
        """Items in the catalogue, padding not counted: N."""
        return len(self.item_tokens) - 1

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything the rows and texts depend on: ids, sequences in order, and cleaned item texts."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.user_tokens, self.item_tokens]).encode())
        for user in sorted(self.sequences):
            digest.update(np.asarray([user, *self.sequences[user]], dtype=np.int64).tobytes())
        digest.update(json.dumps([[getattr(i, text) for text in TEXTS] for i in self.items]).encode())
        digest.update(str(self.dataset.max_item_list_len).encode())
        if self.train_targets > 1:
            digest.update(f"{self.train_targets} targets".encode())
        for grades in self._grades.values():
            digest.update(grades.tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """The catalogue in id order; `items[item_id - 1]`. Texts come from the `.item` file, read beside RecBole."""
        file = Path(self.config["data_path"]) / f"{self.settings['dataset']}.item"
        texts = read_item_texts(file, self.settings, item_field=self.iid, encoding=self.config["encoding"],
                                separator=self.config["field_separator"])  # fmt: skip
        return tuple(
            Item(item_id=number, token=token, **texts.get(token, {"title": ""}))
            for number, token in enumerate(self.item_tokens)
            if number > 0
        )

    @property
    def graded(self) -> bool:
        """Whether a train list may hold several targets, or one that is not worth 1."""
        return self.train_targets > 1 or bool(self._grades)

    def reach(self, count: int) -> int:
        """How deep RecBole's evaluator looks into a row, and at least `count`."""
        return min(max(count, *self.config["topk"]), self.item_count + 1)

    def train_sequences(self) -> dict[int, np.ndarray]:
        """Every user's training items, oldest first: all but the valid and the test item."""
        return {user: items[:-2] for user, items in self.sequences.items() if len(items) > 2}

    def open_sequences(self) -> list[list[int]]:
        """Every user's training items in front of the targets of its train list, oldest first."""
        return [items[: -self.train_targets].tolist() for items in self.train_sequences().values()]

    def rows(self, split: str) -> tuple[object, np.ndarray]:
        """The split's rows as RecBole Interaction, one a user, and the user ids (B,).

        For `train` that is the training row that asks for the first target of the user's train list; it needs at least
        one item of history.
        """
        feat = self.built[SPLITS.index(split)].inter_feat
        if split == "train":
            feat = feat[np.flatnonzero(_from_end(feat[self.uid].numpy()) == self.train_targets)]
        return feat, feat[self.uid].numpy()

    def history(self, user: int, split: str) -> tuple[int, ...]:
        """Items before the split's target, oldest first, never cut."""
        items = self.sequences[user]
        return tuple(int(item) for item in items[: max(len(items) - self._behind(split), 0)])

    def targets(self, user: int, split: str) -> dict[int, int]:
        """The items that the split's row asks for, oldest first, with their grades, 1 where none are set.

        One item in valid and test, `train_targets` in train; none for a user with too few items to have that row.
        """
        items, behind = self.sequences[user], self._behind(split)
        if len(items) <= behind:
            return {}
        count = self.train_targets if split == "train" else 1
        asked = slice(len(items) - behind, len(items) - behind + count)
        grades = self._grades[user][asked] if split == "train" and self._grades else np.ones(count, dtype=int)
        return dict(zip(items[asked].tolist(), grades.tolist(), strict=True))

    def _behind(self, split: str) -> int:
        """Where a split's first target stands, counted from the end of a sequence."""
        return {"train": 2 + self.train_targets, "valid": 2, "test": 1}[split]


def _grades(frame: pd.DataFrame, user_field: str, by: Mapping[str, Sequence[float]] | None) -> dict[int, np.ndarray]:
    """Grade of every interaction of each user in the order of `frame`: how many of a column's thresholds it reaches.

    Raises:
        ConfigurationError: the setting is not one column with rising thresholds, or the column is not loaded.
    """
    if by is None:
        return {}
    (column, thresholds), *more = by.items() or [("", [])]
    if more or not isinstance(thresholds, list) or not thresholds or thresholds != sorted(set(thresholds)):
        raise ConfigurationError(f"train_grades is {by!r}", do="name a column and rising thresholds: {rating: [3, 5]}")
    if column not in frame:
        raise ConfigurationError(f"the interactions have no column {column!r}", where="train_grades",
                                 do=f"load it: load_col: {{inter: [..., {column}]}}")  # fmt: skip
    grades = np.searchsorted(np.asarray(thresholds, dtype=float), frame[column].to_numpy(dtype=float), side="right")
    return {int(user): grades[rows] for user, rows in frame.groupby(user_field).indices.items()}


def _check_protocol(config) -> None:
    split, order = config["eval_args"]["split"], config["eval_args"]["order"]
    if config["benchmark_filename"] is not None:
        raise ConfigurationError(
            f"benchmark_filename names ready-made splits {config['benchmark_filename']}",
            where="benchmark_filename",
            why="candidates without leakage are defined for leave-one-out in time order, one row per user and split",
            do="give one .inter file with all interactions",
        )
    if split != {"LS": "valid_and_test"} or order != "TO":
        raise ConfigurationError(
            f"eval_args asks for split {split}, order {order}",
            where="eval_args",
            why="candidates without leakage are defined for leave-one-out in time order, one row per user and split",
            do="leave eval_args at {split: {LS: valid_and_test}, order: TO, mode: full}",
        )


def _check_files(config) -> None:
    """A folder without interactions; where there is no folder at all, RecBole downloads."""
    folder, name = Path(config["data_path"]), f"{config['dataset']}.inter"
    if folder.is_dir() and not (folder / name).is_file():
        raise MissingFileError(
            f"the data set's folder has no {name}",
            where=str(folder.resolve()),
            do=f"put {name} (RecBole atomic file) there, or remove the folder to download",
        )


def _exact_time_dataset(*, sequential: bool) -> type:
    """RecBole's Dataset class with time order kept exact and a download that works outside torch.distributed."""
    from recbole.data.dataset import Dataset, SequentialDataset

    class ExactTime(SequentialDataset if sequential else Dataset):
        def _normalize(self):
            # RecBole stores Unix seconds as float32, which loses up to 128 s and with them the order of events
            # (dataset.py:2207): 149 of 943 ml-100k test targets come out wrong. A per-user rank is exact.
            frame = self.inter_feat
            if self.time_field not in frame:
                raise ConfigurationError(
                    f"the interactions have no column {self.time_field!r}", where="TIME_FIELD, load_col",
                    why="histories, splits and targets are made by time", do=f"choose from {list(frame.columns)}",
                )  # fmt: skip
            exact = frame[self.time_field].to_numpy(dtype=np.float64)
            order = np.lexsort((np.arange(len(frame)), exact, frame[self.uid_field].to_numpy()))
            users = frame[self.uid_field].to_numpy()[order]
            starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
            rank = np.empty(len(frame))
            rank[order] = np.arange(len(frame)) - np.repeat(starts, np.diff(np.r_[starts, len(frame)]))
            super()._normalize()
            self.inter_feat[self.time_field] = rank

        def _download(self):
            _download(self, super()._download)

    return ExactTime


def _download(dataset, download: Callable[[], None]) -> None:
    """RecBole's own download, without the barrier that a single process cannot pass (dataset.py:252)."""
    import shutil
    from unittest.mock import patch

    folder = Path(dataset.dataset_path)
    try:
        with patch("torch.distributed.barrier", lambda *args, **kwargs: None):
            download()
    except (OSError, ValueError) as error:  # URLError is an OSError; an unknown name is RecBole's ValueError
        shutil.rmtree(folder, ignore_errors=True)  # an empty folder would stop the next try
        name = dataset.dataset_name
        raise MissingFileError(
            f"data set {name!r} is neither on disk nor could it be downloaded ({error})",
            where=str(folder.resolve()),
            do=f"put {name}.inter and {name}.item (RecBole atomic files) into {folder}/, or name the folder that holds "
            f"{name}/ with --data_path DIR",
        ) from error


def read_item_texts(
    file: Path, settings: Settings, *, item_field: str = "item_id", encoding: str = "utf-8", separator: str = "\t"
) -> dict[str, dict[str, str]]:
    """Title, categories, brand and description of every item of an atomic `.item` file, by item token.

    RecBole would split text on blanks, add items nobody touched to the id space, and stop at a title that starts with a
    quotation mark; so the file is read beside it, and its texts are cleaned (`text.clean_text`). Bytes that are not of
    the encoding become U+FFFD. Of a description the beginning is kept.

    Args:
        item_field: column with the item id; the first one where there is none of that name.
        encoding, separator: RecBole's words `encoding` and `field_separator`.

    Raises:
        MissingFileError: there is no such file.
        ConfigurationError: a text field that the settings name is not in it.
    """
    if not file.is_file():
        raise MissingFileError(
            "the data set has no item texts", where=str(file), why="semantic IDs and prompts are made of them",
            do="add the .item file, tab-separated, with an item id and a title column",
        )  # fmt: skip
    import csv

    frame = pd.read_csv(
        file, sep=separator, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE, na_filter=False,
        encoding=encoding, encoding_errors="replace",
    )  # fmt: skip
    frame.columns = [str(column).split(":")[0] for column in frame.columns]
    fields = {name: settings[f"text_{name}"] for name in TEXTS}
    missing = [f"text_{name}: {field}" for name, field in fields.items() if field and field not in frame.columns]
    if missing:
        raise ConfigurationError(
            f"fields that {file.name} does not have: {', '.join(missing)}",
            do=f"choose from {list(frame.columns)} in properties/dataset/{settings['dataset']}.yaml, or ~ for none",
        )
    clean = {name: _description if name == "description" else clean_text for name in TEXTS}
    columns = {name: [clean[name](unquote(v)) for v in frame[field]] if field else [""] * len(frame)
               for name, field in fields.items()}  # fmt: skip
    tokens = [unquote(token) for token in frame[item_field if item_field in frame else frame.columns[0]]]
    return {token: {name: columns[name][row] for name in columns} for row, token in enumerate(tokens)}


def unquote(text: str) -> str:
    """A CSV-quoted field as plain text.

    >>> unquote('"a ""b"" c"'), unquote('5" pipe')
    ('a "b" c', '5" pipe')
    """
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1].replace('""', '"')
    return text


def _description(text: str) -> str:
    """The beginning of a description, its paragraphs joined; where most is markup, a piece of a tag may end it."""
    if not text.startswith("["):  # a list in Python notation can only be read whole
        text = text[: 4 * DESCRIPTION_CHARS]
    return clean_text(text, " ")[:DESCRIPTION_CHARS].rstrip()


def _from_end(users: np.ndarray) -> np.ndarray:
    """Number of each row among its user's, (B,), counted from the last, 1; rows of a user are in time order."""
    numbers, counts = np.empty(len(users), dtype=np.int64), Counter()
    for row, user in reversed(list(enumerate(users.tolist()))):
        counts[user] += 1
        numbers[row] = counts[user]
    return numbers


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
        for start in range(0, len(feat), size):
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


def train_base(data: Data, folder: Path, *, hold_out: bool, epochs: int | None = None, model: str | None = None,
               sids: np.ndarray | None = None,
               say: Callable[[str], None] = lambda text: None) -> BaseModel:  # fmt: skip
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
        dataset = _exact_time_dataset(sequential=False)(config)
        for field in (data.uid, data.iid):
            if list(dataset.field2id_token[field]) != list(data.dataset.field2id_token[field]):
                raise GR2Error(f"the {field} maps of the general and the sequential data set differ", where="bridge")
        built = dataset.build()
    train, valid, test = built
    keep = np.arange(len(train.inter_feat))
    if hold_out:
        keep = np.flatnonzero(_from_end(train.inter_feat[data.uid].numpy()) > data.train_targets)
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
        loader, None if epochs else valid_loader, verbose=False,
        callback_fn=lambda epoch, value: say(f"{config['model']} epoch {epoch + 1}: {metric} {value:.4f}"),
    )  # fmt: skip
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
                where="base_model", why="it could not be restored for evaluation", do="choose another base model",
            )  # fmt: skip
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


def evaluate_rows(data: Data, base: BaseModel | ListedBase, rows: Mapping[str, Mapping[int, Sequence[int]] | None], *,
                  split: str, users: Sequence[int] | None = None,
                  watch: Callable[[object, object], None] = lambda batch, scores: None,
                  ) -> dict[str, dict[str, float]]:  # fmt: skip
    """RecBole's metrics of several rankings of the same lists, scored together.

    Args:
        rows: for each row of the table, user id -> item ids (K,), a permutation of the base model's first K; users
            without one keep their order; None hands RecBole the base model's own score rows: untouched beside
            such rankings, else as the model is judged by its own.
        users: evaluate these users alone (the in_list scope); None for all.
        watch: given each batch of rows and its scores (B, N + 1), so that nothing has to be scored a second time.

    Returns:
        For each row RecBole's metrics in its lower case, e.g. `ndcg@5`.
    """
    import torch
    from recbole.evaluator import Collector, Evaluator

    lists = any(rankings is not None for rankings in rows.values())  # they stand in the order they were proposed in
    collectors = {name: Collector(data.config) for name in rows}
    for collector in collectors.values():
        collector.data_collect(SimpleNamespace(dataset=data.built[0]))  # item counts, for coverage and popularity
    feat, row_users = data.rows(split)
    if users is not None:
        feat = feat[np.flatnonzero(np.isin(row_users, np.asarray(sorted(users))))]
    size, reach = int(data.config["eval_batch_size"]), data.reach(data.settings["cand_num"])
    for start in range(0, len(feat), size):
        batch = feat[start : start + size]
        with torch.no_grad():
            scores = base.score_rows(batch, split)
            if not lists:
                scores = base.judged(scores, batch[data.iid])
        watch(batch, scores)
        order = base_order(scores, reach)
        for name, rankings in rows.items():
            given = scores
            if rankings is not None:
                given = tie_free(order, [rankings.get(user) for user in batch[data.uid].tolist()])
                # RecBole's GAUC counts a row's items up to the first at -inf (collector.py:183), so they stay there.
                given.masked_fill_(scores == -torch.inf, -torch.inf)
            collectors[name].eval_batch_collect(given, batch, torch.arange(len(batch)), batch[data.iid])
    evaluator, metrics = Evaluator(data.config), {}
    for name, collector in collectors.items():
        collector.model_collect(base.model)
        metrics[name] = {m: float(v) for m, v in evaluator.evaluate(collector.get_data_struct()).items()}
    return metrics


def base_order(scores, reach: int):
    """Item ids by descending score, (B, N + 1).

    The first `reach` are those of `torch.topk`, as RecBole's evaluator takes them, so that ties break as they break
    there.

    >>> import torch
    >>> base_order(torch.tensor([[-torch.inf, 5.0, 4.0, 9.0]]), reach=2)
    tensor([[3, 1, 2, 0]])
    """
    import torch

    first = torch.topk(scores, reach, dim=-1).indices
    rest = scores.clone()
    rest.scatter_(1, first, torch.inf)  # +inf, then skipped: other items may be at -inf
    order = torch.sort(rest, dim=-1, descending=True, stable=True).indices[:, reach:]
    return torch.cat([first, order], dim=1)


def tie_free(order, heads: Sequence[Sequence[int] | None]):
    """Score rows (B, N + 1) that put each head first, in its order, and leave the rest in base order, without ties.

    Ties in a score row would let `torch.topk` pick the target by position.

    Raises:
        GR2Error: a head is not a permutation of the first items of its row.

    >>> import torch
    >>> tie_free(torch.tensor([[3, 1, 2, 0]]), [(1, 3)])
    tensor([[-4., -1., -3., -2.]])
    """
    import torch

    order = order.clone()
    for row, head in enumerate(heads):
        if head is not None:
            if set(order[row, : len(head)].tolist()) != set(head):
                raise GR2Error(
                    "a ranking is no permutation of the base model's list",
                    where=f"row {row}", why="re-ranking K items must not change Recall@K",
                    do="re-run from the candidates stage: --from_stage candidates",
                )  # fmt: skip
            order[row, : len(head)] = torch.as_tensor(head, dtype=order.dtype)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(1, order.size(1) + 1, device=order.device).expand_as(order).contiguous())
    return -ranks.float()  # integers below 2 ** 24 are exact in float32
