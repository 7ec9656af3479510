"""The steps in which a RecBole data set reads and filters its files, strict and with a count of what they change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_gr2.bridge.atomic import MISSING, AtomicFile
from recbole_gr2.bridge.splits import from_end
from recbole_gr2.errors import ConfigurationError

FILTERS = {  # RecBole's steps that drop interactions, in their order: the options that cause them
    "_remove_duplication": ("rm_dup_inter",),
    "_filter_by_field_value": ("val_interval",),
    "_filter_inter_by_user_or_item": ("filter_inter_by_user_or_item",),
    "_filter_by_inter_num": ("user_inter_num_interval", "item_inter_num_interval"),
}
ALL_NUMBERS = "[0,inf)"  # RecBole's default for the number of interactions


def load_feature(dataset: Any, file: Path, source: Any) -> pd.DataFrame | None:
    """Return the columns of an atomic file as RecBole's `_load_feat` does, and set their properties.

    The columns with users, items and times of an `.inter` file are always loaded. Times may be numbers or ISO dates,
    whatever type the header declares.

    Args:
        dataset: RecBole's data set.
        file: path of the file.
        source: RecBole's name of the file's content.

    Returns:
        The frame; None if no column is loaded.

    Raises:
        ConfigurationError: the file is malformed, or it lacks a column that has to be loaded.
    """
    from recbole.utils import FeatureSource, FeatureType

    ending = source.value if isinstance(source, FeatureSource) else source
    chosen, left_out = _columns(dataset.config, ending)
    needed = {
        "inter": {
            "USER_ID_FIELD": dataset.uid_field,
            "ITEM_ID_FIELD": dataset.iid_field,
            "TIME_FIELD": dataset.time_field,
        },
        "user": {"USER_ID_FIELD": dataset.uid_field},
        "item": {"ITEM_ID_FIELD": dataset.iid_field},
    }.get(ending, {})
    if chosen == [] and ending != "inter":
        return None
    atomic = AtomicFile(file, dataset.config["field_separator"])
    atomic.require(needed)
    keys = list(needed.values())
    names = [
        name for name in atomic.names if name in keys or ((chosen is None or name in chosen) and name not in left_out)
    ]
    absent = sorted(set(chosen or ()) - set(atomic.names) - {"user_id", "item_id", "timestamp"})  # the default columns
    if absent:
        raise ConfigurationError(
            f"load_col names {', '.join(map(repr, absent))}, and the file has the columns {atomic.names}",
            where=f"load_col, {file}",
            why="the column would be missing without a message",
            do="correct load_col or the header of the file",
        )
    frame: Any = pd.DataFrame(atomic.read(names))
    for name in names:
        kind = FeatureType(atomic.kind(name))
        if name in (dataset.uid_field, dataset.iid_field):
            if kind != FeatureType.TOKEN:
                raise atomic.error(
                    f"ids are declared as {kind.value}",
                    line=1,
                    column=name,
                    why="ids are names, and not quantities",
                    do=f"declare {name}:token",
                )
            frame[name] = atomic.ids(name, frame[name].to_numpy())
        elif name == dataset.time_field and ending == "inter":
            kind = FeatureType.FLOAT
            frame[name] = atomic.times(name, frame[name].to_numpy())
        elif kind == FeatureType.FLOAT:
            frame[name] = _numbers(dataset, atomic, name, frame[name].to_numpy())
        elif kind == FeatureType.TOKEN:
            frame[name] = [np.nan if value in MISSING else value for value in frame[name]]
        else:
            frame[name] = _sequences(dataset, atomic, name, frame[name], kind.value == "float_seq")
        if ending == "link":  # RecBole does not declare these columns.
            continue
        dataset.field2source[name] = source
        dataset.field2type[name] = kind
        if not kind.value.endswith("seq"):
            dataset.field2seqlen[name] = 1
        if "float" in kind.value:
            dataset.field2bucketnum[name] = 2
    if ending == "inter":
        dataset.input_lines += len(frame)
    dataset.notes.update({f"{file.name}: {note}": count for note, count in atomic.notes.items()})
    return frame


def add_histories(dataset: Any) -> None:
    """Replace the interactions of a sequential data set by RecBole's training rows: each item after its history.

    The result is that of RecBole's `data_augmentation`, which loops over the rows. The columns of the histories are
    filled position by position.

    Args:
        dataset: RecBole's sequential data set.
    """
    import torch
    from recbole.data.interaction import Interaction
    from recbole.utils import FeatureType

    dataset._aug_presets()
    dataset._check_field("uid_field", "time_field")
    dataset.sort(by=[dataset.uid_field, dataset.time_field], ascending=True)
    feat, longest = dataset.inter_feat, dataset.config["MAX_ITEM_LIST_LENGTH"]
    places = from_end(feat[dataset.uid_field].numpy()[::-1])[::-1] - 1  # from 0 for the first interaction of a user
    targets = np.flatnonzero(places)  # The first interaction of a user has no history.
    lengths = np.minimum(places[targets], longest)
    columns: dict[str, Any] = {dataset.item_list_length_field: torch.from_numpy(lengths)}
    for field in feat:
        if field == dataset.uid_field:
            continue
        name, values = getattr(dataset, f"{field}_list_field"), feat[field]
        size = dataset.field2seqlen[name]
        shape = (len(targets), size) if isinstance(size, int) else (len(targets), *size)
        if (
            dataset.field2type[field] in (FeatureType.FLOAT, FeatureType.FLOAT_SEQ)
            and field in (dataset.config["numerical_features"])
        ):
            shape += (2,)
        columns[name] = torch.zeros(shape, dtype=values.dtype)
        for place in range(longest):
            rows = np.flatnonzero(lengths > place)
            columns[name][rows, place] = values[targets[rows] - lengths[rows] + place]
    rows = feat[targets]
    rows.update(Interaction(columns))
    dataset.inter_feat = rows


def filter_interactions(dataset: Any) -> None:
    """Run RecBole's filters, and count the interactions that each drops in `dataset.dropped`.

    Raises:
        ConfigurationError: a filter is invalid, or leaves no interaction.
    """
    _check_filters(dataset)
    for step, options in FILTERS.items():
        before = len(dataset.inter_feat)
        getattr(dataset, step)()
        values = {key: dataset.config[key] for key in options if dataset.config[key] not in (None, ALL_NUMBERS)}
        if dataset.inter_feat.empty:
            raise ConfigurationError(
                f"no interaction is left: {before:,} interactions were dropped",
                where=", ".join(f"{key}: {value}" for key, value in values.items()),
                why="there is nothing to learn from",
                do="choose a weaker filter"
                if step != "_filter_inter_by_user_or_item"
                else "use the same ids in all files, or set filter_inter_by_user_or_item: False",
            )
        if before > len(dataset.inter_feat):
            dataset.dropped[", ".join(values)] = before - len(dataset.inter_feat)
    dataset._reset_index()


def _columns(config: Any, source: str) -> tuple[list[str] | None, list[str]]:
    """Columns that `load_col` names for a file, None for all, and those that `unload_col` leaves out."""
    chosen, left_out = config["load_col"].get(source), (config["unload_col"] or {}).get(source)
    if chosen not in (None, "*") and left_out:
        raise ConfigurationError(
            f"load_col and unload_col both choose columns of the .{source} file",
            where="load_col, unload_col",
            why="one of them would have no effect",
            do=f"remove unload_col, or write load_col: {{{source}: '*'}}",
        )
    return None if chosen == "*" else list(chosen or ()), list(left_out or ())


def _numbers(dataset: Any, atomic: AtomicFile, name: str, values: np.ndarray) -> np.ndarray:
    numbers = atomic.numbers(name, values)
    missing = np.flatnonzero(np.isnan(numbers))
    if len(missing):
        dataset.missing[name] = int(atomic.lines[missing[0]])
        atomic.notes[f"missing values of {name} replaced by the mean"] = len(missing)
    return numbers


def _sequences(
    dataset: Any, atomic: AtomicFile, name: str, values: Sequence[str], are_numbers: bool
) -> list[np.ndarray]:
    """Values of a column of sequences, as in RecBole."""
    sequences = []
    for row, value in enumerate(values):
        parts = [part for part in value.split(dataset.config["seq_separator"]) if part] if value not in MISSING else []
        try:
            sequences.append(np.array([float(part) for part in parts] if are_numbers else parts))
        except ValueError as error:
            raise atomic.error(
                f"{value!r} is no sequence of numbers",
                line=int(atomic.lines[row]),
                column=name,
                why=f"the header declares {name}:float_seq",
                do=f"separate numbers by {dataset.config['seq_separator']!r}, or declare {name}:token_seq",
            ) from error
    longest = max(map(len, sequences))
    limit = (dataset.config["seq_len"] or {}).get(name, longest)
    dataset.field2seqlen[name] = min(limit, longest)
    return [sequence[:limit] for sequence in sequences]


def _check_filters(dataset: Any) -> None:
    """Raise a ConfigurationError for a filter that RecBole would ignore, or that would stop it with a traceback."""
    from recbole.utils import FeatureType

    for column, wanted in (dataset.config["val_interval"] or {}).items():
        where, kind = f"val_interval: {column}", dataset.field2type.get(column)
        if kind is None:
            raise ConfigurationError(
                f"val_interval names the column {column!r}, which is not loaded",
                where=where,
                why="interactions cannot be filtered by it",
                do=f"choose from {sorted(dataset.field2type)}, or load it: load_col: {{inter: [..., {column}]}}",
            )
        if kind == FeatureType.FLOAT and isinstance(wanted, list):
            raise _filter_error(where, wanted, 'write an interval such as "[3,inf)"')
        if kind == FeatureType.TOKEN and not isinstance(wanted, list):
            raise _filter_error(
                where, wanted, f"write a list of values, because {column} is a token, or declare {column}:float"
            )
        if kind not in (FeatureType.FLOAT, FeatureType.TOKEN):
            raise _filter_error(where, wanted, f"choose another column: {column} is a sequence")
        if column in dataset.missing:
            raise ConfigurationError(
                f"the column {column!r} has missing values, the first on line {dataset.missing[column]}",
                where=where,
                why="these lines would be dropped without a message",
                do="complete the values, or remove the lines",
            )


def _filter_error(where: str, value: Any, do: str) -> ConfigurationError:
    return ConfigurationError(
        f"{value!r} cannot filter interactions", where=where, why="RecBole would ignore it or drop other lines", do=do
    )
