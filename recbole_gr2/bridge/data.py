"""The data set: catalogue, user sequences in exact time order, item texts, and the rows of every split.

Rows are those of RecBole's SequentialDataset under leave-one-out (`LS: valid_and_test`, `TO`), whatever the base
model is: one test and one valid row per user, and as train row of a request the user's last training interaction.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_gr2 import compat
from recbole_gr2.config import Settings, recbole_config
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.text import clean_text
from recbole_gr2.types import Item

SPLITS = ("train", "valid", "test")
TEXTS = ("title", "categories", "brand", "description")
DESCRIPTION_CHARS = 1000  # the encoder reads 128 tokens, and a description comes last


class Data:
    """A RecBole data set: catalogue, user sequences in exact time order, and the rows of every split."""

    def __init__(self, settings: Settings) -> None:
        compat.apply()
        self.settings = settings
        # Any sequential model gives the same rows; SASRec's class is only asked for its type.
        self.config = recbole_config(settings, "SASRec", loss_type="CE")
        _check_protocol(self.config)
        _check_files(self.config)
        self.dataset = exact_time_dataset(sequential=True)(self.config)
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
        texts = read_item_texts(
            file,
            self.settings,
            item_field=self.iid,
            encoding=self.config["encoding"],
            separator=self.config["field_separator"],
        )
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
            feat = feat[np.flatnonzero(from_end(feat[self.uid].numpy()) == self.train_targets)]
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
        raise ConfigurationError(
            f"the interactions have no column {column!r}",
            where="train_grades",
            do=f"load it: load_col: {{inter: [..., {column}]}}",
        )
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


def exact_time_dataset(*, sequential: bool) -> type:
    """RecBole's Dataset class with time order kept exact and a download that works outside torch.distributed."""
    from recbole.data.dataset import Dataset, SequentialDataset

    class ExactTime(SequentialDataset if sequential else Dataset):
        def _normalize(self):
            # RecBole stores Unix seconds as float32, which loses up to 128 s and with them the order of events
            # (dataset.py:2207): 149 of 943 ml-100k test targets come out wrong. A per-user rank is exact.
            frame = self.inter_feat
            if self.time_field not in frame:
                raise ConfigurationError(
                    f"the interactions have no column {self.time_field!r}",
                    where="TIME_FIELD, load_col",
                    why="histories, splits and targets are made by time",
                    do=f"choose from {list(frame.columns)}",
                )
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
            "the data set has no item texts",
            where=str(file),
            why="semantic IDs and prompts are made of them",
            do="add the .item file, tab-separated, with an item id and a title column",
        )
    import csv

    frame = pd.read_csv(
        file,
        sep=separator,
        dtype=str,
        keep_default_na=False,
        quoting=csv.QUOTE_NONE,
        na_filter=False,
        encoding=encoding,
        encoding_errors="replace",
    )
    frame.columns = [str(column).split(":")[0] for column in frame.columns]
    fields = {name: settings[f"text_{name}"] for name in TEXTS}
    missing = [f"text_{name}: {field}" for name, field in fields.items() if field and field not in frame.columns]
    if missing:
        raise ConfigurationError(
            f"fields that {file.name} does not have: {', '.join(missing)}",
            do=f"choose from {list(frame.columns)} in properties/dataset/{settings['dataset']}.yaml, or ~ for none",
        )
    clean = {name: _description if name == "description" else clean_text for name in TEXTS}
    columns = {
        name: [clean[name](unquote(v)) for v in frame[field]] if field else [""] * len(frame)
        for name, field in fields.items()
    }
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


def from_end(users: np.ndarray) -> np.ndarray:
    """Number of each row among its user's, (B,), counted from the last, 1; rows of a user are in time order."""
    numbers, counts = np.empty(len(users), dtype=np.int64), Counter()
    for row, user in reversed(list(enumerate(users.tolist()))):
        counts[user] += 1
        numbers[row] = counts[user]
    return numbers
