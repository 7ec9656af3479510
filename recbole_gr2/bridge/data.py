"""A data set: the catalogue, the users' sequences in exact time order, and the rows of each split.

The splits do not depend on the base model. Each user has at most one test row, one validation row and one training
request, or `train_requests` of them: the splits `train`, `train-2` and so on. `splits` defines them for leave-one-out
and for the temporal split. Under leave-one-out the rows are those of RecBole's `SequentialDataset`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_gr2 import compat
from recbole_gr2.bridge.atomic import AtomicFile
from recbole_gr2.bridge.item_text import clean_text
from recbole_gr2.bridge.loading import add_histories, filter_interactions, load_feature
from recbole_gr2.bridge.splits import (
    LEAVE_ONE_OUT,
    Split,
    from_end,
    leave_one_out,
    leave_one_out_rows,
    ready_made,
    temporal,
    train_splits,
)
from recbole_gr2.bridge.summary import DataSummary, summarise
from recbole_gr2.catalog import Catalog
from recbole_gr2.config import Settings, recbole_config
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.seeding import derive_seed
from recbole_gr2.types import Item

SPLITS = ("train", "valid", "test")
# Options of RecBole that name columns, and that only RecBole checks.
COLUMN_OPTIONS = (
    "threshold",
    "normalize_field",
    "numerical_features",
    "discretization",
    "preload_weight",
    "alias_of_user_id",
    "alias_of_item_id",
    "additional_feat_suffix",
    "seq_len",
)
# Scores of all items of one batch of rows on a CPU. 2^21 float32 numbers, 8 MB, stay in its cache, so that the fusion
# takes .5 to .6 of the time of 1024 rows for Amazon Beauty. A batch has more of them if it had fewer than `FEWEST_ROWS`
# rows otherwise, but at most `MOST_SCORES`, 134 MB, the limit on a GPU. Our choice.
BATCH_SCORES, MOST_SCORES, FEWEST_ROWS = 2**21, 2**25, 128
TEXTS = ("title", "categories", "brand", "description")
DESCRIPTION_CHARS = 1000  # The text encoder reads 128 tokens, and the description is the last part of its input.


class Data:
    """A RecBole data set with the catalogue, the users' sequences and the rows of each split.

    Args:
        settings: settings of the run.

    Attributes:
        config: RecBole's Config of a sequential model on this data set. `eval_batch_size` is limited for large
            catalogues, see `BATCH_SCORES`.
        dataset: RecBole's data set before the split.
        built: RecBole's data sets of training, validation and test.
        uid: name of the user field.
        iid: name of the item field.
        user_tokens: token of each internal user id, (U + 1,).
        item_tokens: token of each internal item id, (N + 1,).
        sequences: internal user id -> item ids of all interactions, oldest first.
        times: time of each interaction, in the order of `sequences`, (R,). Its unit is that of the file; seconds if the
            file has dates.
        train_targets: number of targets of a training request.
        train_requests: number of training requests of a user.
        split: which interactions of a user are known, and which are targets.

    Raises:
        ConfigurationError: a data file is malformed, a filter does not fit its column or leaves no interaction, or the
            column of `train_grades` has no grades.
        MissingFileError: the data set has no interactions or no item texts.
    """

    def __init__(self, settings: Settings) -> None:
        import torch

        compat.apply()
        self.settings = settings
        # All sequential models get the same rows. RecBole reads only the type of the model class here.
        self.config = recbole_config(settings, "SASRec", loss_type="CE")
        _check_files(self.config)
        self.dataset = exact_time_dataset(sequential=True)(self.config)
        self.uid: str = self.dataset.uid_field
        self.iid: str = self.dataset.iid_field
        self.user_tokens = [str(token) for token in self.dataset.field2id_token[self.uid]]
        self.item_tokens = [str(token) for token in self.dataset.field2id_token[self.iid]]
        width = len(self.item_tokens)
        most = max(1, MOST_SCORES // width)
        if torch.device(self.config["device"]).type == "cpu":
            most = min(most, max(BATCH_SCORES // width, FEWEST_ROWS))
        self.config["eval_batch_size"] = min(int(self.config["eval_batch_size"]), most)
        frame = self.dataset.inter_feat.sort_values([self.uid, self.dataset.time_field], kind="stable")
        users, firsts = np.unique(frame[self.uid].to_numpy(), return_index=True)
        items = np.split(frame[self.iid].to_numpy(), firsts[1:])
        self.sequences: dict[int, np.ndarray] = dict(zip(users.tolist(), items, strict=True))
        self.times: np.ndarray = self.dataset.exact_times[frame.index.to_numpy()]
        self.train_targets: int = settings["train_targets"]
        self.train_requests: int = settings["train_requests"]
        self._grades = _grades(frame, self.dataset, settings["train_grades"])
        self.split = self._make_split(frame)
        self.built = self.build(self.dataset)
        # Only the rows of the splits need their histories, which are most of the memory.
        for column in [name for name in self.dataset.inter_feat if name.endswith(self.config["LIST_SUFFIX"])]:
            self.dataset.inter_feat.drop(column)

    def _make_split(self, frame: pd.DataFrame) -> Split:
        """The split of `eval_args` or of `benchmark_filename`.

        Args:
            frame: the interactions in the order of `times`. The index is their place in the files.
        """
        users, numbers = frame[self.uid].to_numpy(), {"targets": self.train_targets, "requests": self.train_requests}
        if self.dataset.parts is not None:
            parts = self.dataset.parts[frame.index.to_numpy()]
            return ready_made(users, parts, tokens=self.user_tokens, **numbers)
        size, given = len(self.user_tokens), self.settings["eval_args"]["split"]
        if "LS" in given:
            return leave_one_out(np.bincount(users, minlength=size), **numbers)
        return temporal(users, self.times, size=size, given=given, **numbers)

    def build(self, dataset: Any) -> list[Any]:
        """Split a RecBole data set of these interactions into training, validation and test."""
        dataset.user_split = self.split
        return dataset.build()

    @property
    def item_count(self) -> int:
        """Number N of items in the catalogue, without padding."""
        return len(self.item_tokens) - 1

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the ids, the sequences in order and the item texts: all that the stages read from the data set."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.user_tokens, self.item_tokens]).encode())
        for user in sorted(self.sequences):
            digest.update(np.asarray([user, *self.sequences[user]], dtype=np.int64).tobytes())
        digest.update(json.dumps([[getattr(i, text) for text in TEXTS] for i in self.catalog]).encode())
        digest.update(str(self.dataset.max_item_list_len).encode())
        if self.train_targets > 1:
            digest.update(f"{self.train_targets} targets".encode())
        if self.settings["max_requests"]:
            digest.update(f"{self.settings['max_requests']} sampled requests".encode())
        if self.train_requests > 1:
            digest.update(f"{self.train_requests} requests".encode())
        for grades in self._grades.values():
            digest.update(grades.tobytes())
        if self.split.name != LEAVE_ONE_OUT:
            for name, starts in self.split.starts.items():
                digest.update(np.stack([starts, self.split.stops[name]]).astype(np.int64).tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def item_texts(self) -> dict[str, dict[str, str]]:
        """The texts of the `.item` file by item token, see `read_item_texts`; also of items without interactions."""
        return read_item_texts(
            Path(self.config["data_path"]) / f"{self.settings['dataset']}.item",
            self.settings,
            item_field=self.iid,
            separator=self.config["field_separator"],
            notes=self.dataset.notes,
            origin=self.settings.origin,
        )

    @cached_property
    def catalog(self) -> Catalog:
        """The catalogue with the texts of the `.item` file."""
        texts: Mapping[str, Any] = self.item_texts
        return Catalog(
            Item(item_id=number, token=token, **texts.get(token, {"title": ""}))
            for number, token in enumerate(self.item_tokens)
            if number > 0
        )

    def summary(self) -> DataSummary:
        """Return figures about the data set, and what was dropped or changed when it was read."""
        return summarise(self)

    @property
    def items(self) -> Catalog:
        """The catalogue. Use `catalog` in new code."""
        return self.catalog

    @property
    def graded(self) -> bool:
        """Whether a training list may contain several targets, or targets of different relevance."""
        return self.train_targets > 1 or bool(self._grades)

    @cached_property
    def has_repeats(self) -> bool:
        """Whether a user interacts with the same item more than once."""
        return any(len(np.unique(items)) < len(items) for items in self.sequences.values())

    def train_sequences(self) -> dict[int, np.ndarray]:
        """Training items of each user, oldest first. Users without training items are left out."""
        return self._first(self.sequences, "train")

    def known_items(self, interactions: str) -> list[list[int]]:
        """Item ids of the known interactions of each user, oldest first.

        Args:
            interactions: `train`, the training interactions; `hold_out`, those without the targets of the training
                requests; `refit`, all interactions before the test.
        """
        return [items.tolist() for items in self._first(self.sequences, interactions).values()]

    def known_times(self, interactions: str) -> list[np.ndarray]:
        """Times of the interactions of `known_items`."""
        return list(self._first(self.user_times, interactions).values())

    @cached_property
    def user_times(self) -> dict[int, np.ndarray]:
        """Internal user id -> times of all interactions, oldest first."""
        ends = np.cumsum([len(items) for items in self.sequences.values()])
        return dict(zip(self.sequences, np.split(self.times, ends[:-1]), strict=True))

    def _first(self, values: dict[int, np.ndarray], interactions: str) -> dict[int, np.ndarray]:
        known = self.split.known
        users = known["refit" if interactions == "refit" else "train"]
        return {user: each[: known[interactions][user]] for user, each in values.items() if users[user]}

    @property
    def train_splits(self) -> tuple[str, ...]:
        """Names of the splits of the training requests: `train`, then `train-2` and so on, from new to old."""
        return train_splits(self.train_requests)

    def rows(self, split: str) -> tuple[Any, np.ndarray]:
        """Rows of a split, at most one per user.

        The row of `train`, or of `train-2` and so on, is the one whose target is the first target of this training
        request. It exists if the request has at least one item of history. With `max_requests` these are the rows of
        the users that come first in a random order, which is the same for all splits.

        Returns:
            The rows as RecBole's Interaction, and their user ids (B,).
        """
        feat = self.built[SPLITS.index(split.partition("-")[0])].inter_feat
        if split in self.train_splits:
            users, starts = feat[self.uid].numpy(), self.split.starts[split]
            places = self.split.known["train"] - starts  # Place of the target, counted from the last training row.
            feat = feat[np.flatnonzero((from_end(users) == places[users]) & (starts[users] > 0))]
        limit = self.settings["max_requests"]
        if limit and limit < len(feat):
            seed = derive_seed(self.settings["seed"], "requests")
            places = np.random.default_rng(seed).permutation(len(self.user_tokens))[feat[self.uid].numpy()]
            feat = feat[np.sort(np.argsort(places)[:limit])]
        return feat, feat[self.uid].numpy()

    def validation(self) -> Any:
        """RecBole's data set of the validation rows that `rows` returns, for the choice of the number of epochs."""
        return self.built[1].copy(self.rows("valid")[0])

    @cached_property
    def user_counts(self) -> Counter[int]:
        """Number of training rows of each user id, as RecBole counts them."""
        return self.built[0].user_counter

    def history(self, user: int, split: str) -> tuple[int, ...]:
        """All item ids before the first target of a split, oldest first. RecBole's rows keep only the last ones."""
        return tuple(self.sequences[user][: self.split.starts[split][user]].tolist())

    def history_times(self, user: int, split: str) -> tuple[float, ...]:
        """Time of each item of a history, in the unit of the file."""
        return tuple(self.user_times[user][: self.split.starts[split][user]].tolist())

    def targets(self, user: int, split: str) -> dict[int, int]:
        """Target items of a user's row with their grades, oldest first.

        Validation and test have one target of grade 1, training has at most `train_targets`. The result is empty if the
        user has no such row.
        """
        start = self.split.starts[split][user]
        places = slice(start, self.split.stops[split][user] if start else 0)
        items = self.sequences[user][places]
        graded = split in self.train_splits and bool(self._grades)
        grades = self._grades[user][places] if graded else np.ones(len(items), dtype=int)
        return dict(zip(items.tolist(), grades.tolist(), strict=True))


def _grades(
    frame: pd.DataFrame, dataset: Any, thresholds_by_column: Mapping[str, Sequence[float]] | None
) -> dict[int, np.ndarray]:
    """Grades of each user's interactions in the order of `frame`: the number of thresholds that the column reaches.

    Raises:
        ConfigurationError: the column is not loaded, contains the times, is not of type float, or has missing values.
    """
    if thresholds_by_column is None:
        return {}
    ((column, thresholds),) = thresholds_by_column.items()
    if column not in frame:
        raise ConfigurationError(
            f"the interactions have no column {column!r}",
            where="train_grades",
            why="the grades are computed from this column",
            do=f"load it: load_col: {{inter: [..., {column}]}}",
        )
    kind = dataset.field2type[column].value
    problem = ""
    if column == dataset.time_field:
        problem = "contains the times"  # They are replaced by their ranks.
    elif kind != "float":
        problem = f"is of type {kind}, and not of type float"
    elif column in dataset.missing:
        problem = f"has missing values, the first on line {dataset.missing[column]}"
    if problem:
        raise ConfigurationError(
            f"the column {column!r} {problem}",
            where=f"train_grades, column {column!r} of the .inter file",
            why="the grades are computed from the numbers in this column",
            do="name a column that is declared as float in the header and has a number in every line",
        )
    grades = np.searchsorted(np.asarray(thresholds, dtype=float), frame[column].to_numpy(dtype=float), side="right")
    places: Any = frame.groupby(dataset.uid_field).indices
    return {int(user): grades[rows] for user, rows in places.items()}


def _check_files(config: Any) -> None:
    """Raise a MissingFileError if the folder exists without interactions. RecBole downloads if there is no folder."""
    folder, files = Path(config["data_path"]), interaction_files(config)
    name = next((each for each in files if not (folder / each).is_file()), files[0])
    file = folder / name
    if not folder.exists() or file.is_file():
        return
    packed = [path.name for path in folder.glob(f"{name}.*")] if folder.is_dir() else []
    raise MissingFileError(
        f"the data set's folder has no {name}"
        if folder.is_dir() and not file.exists()
        else f"{file if file.exists() else folder} is not a {'file' if file.exists() else 'folder'}",
        where=str(folder.resolve()),
        why="the interactions are read from this file",
        do=f"unpack {packed[0]}"
        if packed
        else f"put {name} (RecBole atomic file) there; recbole-gr2 data convert makes it from CSV, JSON lines or "
        "Parquet",
    )


def interaction_files(config: Any) -> list[str]:
    """Return the names of the files with the interactions: those of a ready-made split, or one."""
    dataset, parts = config["dataset"], config["ready_made"]
    return [f"{dataset}.{part}.inter" for part in parts] if parts else [f"{dataset}.inter"]


def exact_time_dataset(*, sequential: bool, base: type | None = None) -> type:
    """RecBole's data set class with strict reading, an exact time order, and a download that works in one process.

    An instance has `input_lines`, `notes`, `dropped` and `missing`, and `exact_times` of its interactions, (R,).
    `parts` is None, or under a ready-made split the number of the file of each interaction, (R,). A temporal or
    ready-made split needs `user_split`, see `splits.Split`, before `build`. Then `before_test` is the data set of all
    rows before the test, for `refit`.

    Args:
        sequential: whether it is the class of sequential models, else that of general models.
        base: another data set class of RecBole instead of these two.
    """
    from recbole.data.dataset import Dataset, SequentialDataset
    from recbole.utils import FeatureSource

    parent: Any = base or (SequentialDataset if sequential else Dataset)

    class ExactTime(parent):
        def __init__(self, config: Any) -> None:
            self.input_lines = 0  # lines of the .inter file with an interaction
            self.notes: Counter[str] = Counter()  # lines that were skipped or changed, by file and reason
            self.dropped: dict[str, int] = {}  # interactions that were dropped, by RecBole's option
            self.missing: dict[str, int] = {}  # first line with a missing value, by column of numbers
            self.parts: np.ndarray | None = None
            try:
                super().__init__(config)
            except (KeyError, TypeError, ValueError) as error:
                given = [f"{option}: {config[option]}" for option in COLUMN_OPTIONS if config[option]]
                if not given:
                    raise
                raise ConfigurationError(
                    f"RecBole cannot apply these options to the data ({error})",
                    where=", ".join(given),
                    why="they name columns of the data files and how to use them",
                    do="correct them, and load the columns with load_col",
                ) from error

        def _load_feat(self, filepath: str, source: Any) -> pd.DataFrame | None:
            return load_feature(self, Path(filepath), source)

        def _load_inter_feat(self, token: str, dataset_path: str) -> None:
            files = [Path(dataset_path) / name for name in interaction_files(self.config)]
            frames: list[Any] = []
            widths: Counter[str] = Counter()
            for file in files:
                frames.append(load_feature(self, file, FeatureSource.INTERACTION))
                widths |= Counter(self.field2seqlen)
            whole: Any = pd.concat(frames, ignore_index=True)
            self.inter_feat = whole
            self.field2seqlen.update(widths)
            if len(files) > 1:
                self.parts = np.repeat(np.arange(len(files)), [len(frame) for frame in frames])

        def _data_filtering(self) -> None:
            if self.parts is None:  # As in RecBole, a ready-made split is not filtered.
                filter_interactions(self)

        def _normalize(self) -> None:
            # RecBole stores Unix seconds as float32, which has steps of 128 s at today's dates. This changes the order
            # of events (dataset.py:2207): 149 of 943 test targets of ml-100k are wrong. A rank per user is exact.
            frame = self.inter_feat
            exact = frame[self.time_field].to_numpy(dtype=np.float64)
            self.exact_times = exact
            order = np.lexsort((np.arange(len(frame)), exact, frame[self.uid_field].to_numpy()))
            users = frame[self.uid_field].to_numpy()[order]
            starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
            rank = np.empty(len(frame))
            rank[order] = np.arange(len(frame)) - np.repeat(starts, np.diff(np.r_[starts, len(frame)]))
            super()._normalize()
            self.inter_feat[self.time_field] = rank

        def data_augmentation(self) -> None:
            if parent.data_augmentation is not SequentialDataset.data_augmentation:
                super().data_augmentation()  # A data set class of one model, which adds more columns.
            else:
                add_histories(self)

        def leave_one_out(self, group_by: str, leave_one_mode: str) -> list[Any]:
            if leave_one_mode != "valid_and_test":
                return super().leave_one_out(group_by, leave_one_mode)
            self._drop_unused_col()
            parts = leave_one_out_rows(self.inter_feat[group_by].numpy())
            return [self.copy(self.inter_feat[rows]) for rows in parts]

        def split_by_ratio(self, ratios: Any, group_by: Any = None) -> list[Any]:
            split: Split = self.user_split
            users = self.inter_feat[self.uid_field].numpy()
            places = self.inter_feat[self.time_field].numpy().astype(int)  # positions in the sequence, see `_normalize`
            order = np.lexsort((places, users))
            users, places = users[order], places[order]
            self._drop_unused_col()
            rows = [places < split.known["train"][users]]
            rows += [(places == split.starts[name][users]) & (places > 0) for name in ("valid", "test")]
            self.before_test = self.copy(self.inter_feat[order[places < split.known["refit"][users]]])
            return [self.copy(self.inter_feat[order[selected]]) for selected in rows]

        def _download(self) -> None:
            _download(self, super()._download)

    return ExactTime


def _download(dataset: Any, download: Callable[[], None]) -> None:
    """Run RecBole's download without the barrier that needs `torch.distributed` (dataset.py:252)."""
    import shutil
    from unittest.mock import patch

    folder = Path(dataset.dataset_path)
    try:
        with patch("torch.distributed.barrier", lambda *args, **kwargs: None):
            download()
    except (OSError, ValueError) as error:  # URLError is an OSError. RecBole raises ValueError for an unknown name.
        shutil.rmtree(folder, ignore_errors=True)  # RecBole would not download again into an existing folder.
        name = dataset.dataset_name
        raise MissingFileError(
            f"data set {name!r} is neither on disk nor could it be downloaded ({error})",
            where=str(folder.resolve()),
            why="the run needs interactions and item texts",
            do=f"put {name}.inter and {name}.item (RecBole atomic files) into {folder}/, or name the folder that holds "
            f"{name}/ with --data_path DIR",
        ) from error


def read_item_texts(
    file: Path,
    settings: Mapping[str, Any],
    *,
    item_field: str = "item_id",
    separator: str = "\t",
    notes: Counter[str] | None = None,
    origin: Mapping[str, str] | None = None,
) -> dict[str, dict[str, str]]:
    """Title, categories, brand and description of each item of an atomic `.item` file.

    The plugin reads this file itself for two reasons. RecBole splits text at blanks, and it adds items without
    interactions to the id space. The texts are cleaned by `item_text.clean_text`. A description is cut to its
    beginning.

    Args:
        file: the `.item` file.
        settings: `text_title`, `text_categories`, `text_brand` and `text_description` name the columns.
        item_field: column with the item id. If there is none of that name, the first column is used.
        separator: RecBole's option `field_separator`.
        notes: where to count the lines that were skipped or changed.
        origin: source of each setting, for the error message.

    Returns:
        The texts by name, by item token.

    Raises:
        MissingFileError: there is no such file.
        ConfigurationError: the file is malformed, lacks a column that the settings name, or describes an item twice in
            different ways.
    """
    if not file.is_file():
        raise MissingFileError(
            "the data set has no item texts",
            where=str(file),
            why="semantic IDs and prompts are computed from item texts",
            do="add the .item file, tab-separated, with an item id and a title column",
        )
    atomic = AtomicFile(file, separator)
    fields = {name: settings[f"text_{name}"] for name in TEXTS}
    sources = {name: f" ({source})" for name, source in (origin or {}).items()}
    missing = [
        f"text_{name}: {field}{sources.get(f'text_{name}', '')}"
        for name, field in fields.items()
        if field and field not in atomic.names
    ]
    if missing:
        raise ConfigurationError(
            f"fields that {file.name} does not have: {', '.join(missing)}",
            where=str(file),
            why="item texts are read from these fields",
            do=f"choose from {atomic.names}, or ~ for none",
        )
    id_column = item_field if item_field in atomic.names else atomic.names[0]
    values = atomic.read(list(dict.fromkeys([id_column, *filter(None, fields.values())])))
    tokens = atomic.ids(id_column, values[id_column])
    clean = {name: _description if name == "description" else clean_text for name in TEXTS}
    columns = {
        name: [clean[name](value) for value in values[field]] if field else [""] * len(tokens)
        for name, field in fields.items()
    }
    texts: dict[str, dict[str, str]] = {}
    for row, token in enumerate(tokens.tolist()):
        text = {name: columns[name][row] for name in TEXTS}
        if texts.setdefault(token, text) != text:
            raise atomic.error(
                f"the item {token!r} has other texts on line {atomic.lines[tokens.tolist().index(token)]}",
                line=int(atomic.lines[row]),
                why="it is undefined which of them describe the item",
                do="keep one line for each item",
            )
    if notes is not None:
        notes.update({f"{file.name}: {note}": count for note, count in atomic.notes.items()})
        if len(texts) < len(tokens):
            notes[f"{file.name}: repeated lines of an item skipped"] += len(tokens) - len(texts)
    return texts


def _description(text: str) -> str:
    """The beginning of a description with its paragraphs joined. It can end in a part of a tag if most is markup."""
    if not text.startswith("["):  # A list in Python notation can be parsed only as a whole.
        text = text[: 4 * DESCRIPTION_CHARS]
    return clean_text(text, " ")[:DESCRIPTION_CHARS].rstrip()
