"""Splits: which interactions of a user are known to the models, and which are the targets of its requests.

Leave-one-out (RecBole's `eval_args: {split: {LS: valid_and_test}}`) tests on the last interaction of each user and
validates on the one before. The interactions of different users overlap in time, so models learn from interactions that
happened after a test interaction.

The temporal split (`eval_args: {split: {RS: [.8, .1, .1]}, order: TO, group_by: none}`, or `split: {date: [VALID,
TEST]}`) cuts the time of all users at the same points. The periods are: training, validation, test. The target of a
user in a period is the user's first interaction of this period. The history is everything before it, so that it ends
before the cut. The targets of the training requests come from a further period at the end of the training interactions.
It has as many interactions as the period of validation, and the hold-out models learn only from what happened before.
Each period has at most one request per user.

A ready-made split (`benchmark_filename`) has a file for each of training, validation and test. A user has at most one
interaction in the files of validation and of test, which is the target, and it is not older than those of the file
before. The targets of the training requests are those of leave-one-out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from recbole_gr2.errors import ConfigurationError

WHERE = "eval_args: split"
LEAVE_ONE_OUT, TEMPORAL, READY_MADE = "leave-one-out", "temporal", "ready-made"
PARTS = ("training", "validation", "test")  # of a ready-made split, in the order of its files


@dataclass(frozen=True, kw_only=True)
class Split:
    """Positions in the sequence of each user, by user id, each (U + 1,). The id 0 is padding.

    Attributes:
        name: leave-one-out, temporal or ready-made.
        starts: position of the first target of a request, by split (`train`, `train-2`, ..., `valid`, `test`). 0 if the
            user has no such request, because a request has at least one item of history.
        stops: position after the last target of a request, by split.
        known: number of first interactions that a model may learn from: `train`, those before validation; `hold_out`,
            those before the targets of the training requests; `refit`, those before the test.
        held_out: number of last training rows of RecBole that a hold-out model leaves out.
        cuts: first time of each period of a temporal split, by split; else empty.
    """

    name: str
    starts: Mapping[str, np.ndarray]
    stops: Mapping[str, np.ndarray]
    known: Mapping[str, np.ndarray]
    held_out: np.ndarray
    cuts: Mapping[str, float]


def train_splits(requests: int) -> tuple[str, ...]:
    """Return the names of the splits of the training requests, from new to old.

    >>> train_splits(3)
    ('train', 'train-2', 'train-3')
    """
    return "train", *(f"train-{number}" for number in range(2, requests + 1))


def leave_one_out(lengths: np.ndarray, *, targets: int, requests: int) -> Split:
    """Split by the position from the end of the sequence.

    A user with too few interactions for validation and training has none.

    Args:
        lengths: number of interactions of each user, (U + 1,).
        targets: number of targets of a training request.
        requests: number of training requests of a user. They start 1, 2, ... interactions before validation.

    >>> split = leave_one_out(np.array([0, 6, 2]), targets=1, requests=2)
    >>> {name: starts.tolist() for name, starts in split.starts.items()}
    {'train': [0, 3, 0], 'train-2': [0, 2, 0], 'valid': [0, 4, 0], 'test': [0, 5, 1]}
    """
    train, test = (lengths - 2).clip(min=0), (lengths - 1).clip(min=0)
    refit = np.where(lengths > 2, lengths - 1, 0)
    return _by_position(LEAVE_ONE_OUT, train, train, test, refit, targets=targets, requests=requests)


def from_end(users: np.ndarray) -> np.ndarray:
    """Position of each row among the rows of its user, counted from the last, from 1, (B,).

    Args:
        users: user id of each row, (B,). The rows of a user are in time order.

    >>> from_end(np.array([4, 4, 2, 4, 2])), from_end(np.array([], dtype=int))
    (array([3, 2, 2, 1, 1]), array([], dtype=int64))
    """
    reverse = users[::-1]
    order = np.argsort(reverse, kind="stable")
    starts = np.flatnonzero(np.r_[True, reverse[order][1:] != reverse[order][:-1]][: len(users)])
    numbers = np.empty(len(users), dtype=np.int64)
    numbers[order] = np.arange(1, len(users) + 1) - np.repeat(starts, np.diff(np.r_[starts, len(users)]))
    return numbers[::-1].copy()


def leave_one_out_rows(users: np.ndarray) -> list[np.ndarray]:
    """Return the rows of training, validation and test, as RecBole's `leave_one_out` does with a loop over the rows.

    The users are in the order of their first rows. The last row of a user is for the test and the one before it for
    validation. A user with two rows has no validation, and the only row of a user is for training.

    Args:
        users: user of each row, (B,). The rows of a user are in time order.

    >>> [rows.tolist() for rows in leave_one_out_rows(np.array([7, 5, 7, 7, 7, 5, 3]))]
    [[0, 2, 1, 6], [3], [4, 5]]
    """
    codes, _ = pd.factorize(users)
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes)
    place, size = from_end(codes)[order], sizes[codes[order]]
    test, valid = (place == 1) & (size > 1), (place == 2) & (size > 2)
    return [order[~test & ~valid], order[valid], order[test]]


def _by_position(
    name: str,
    train: np.ndarray,
    valid: np.ndarray,
    test: np.ndarray,
    refit: np.ndarray,
    *,
    targets: int,
    requests: int,
) -> Split:
    """A split whose training targets are the last training interactions of each user.

    Args:
        name: name of the split.
        train: number of training interactions of each user, (U + 1,).
        valid, test: position of the target, or 0 if there is none, (U + 1,).
        refit: number of interactions before the test that a refitted model may learn from, (U + 1,).
        targets: number of targets of a training request.
        requests: number of training requests of a user.
    """
    starts = {split: (train - targets - number).clip(min=0) for number, split in enumerate(train_splits(requests))}
    starts |= {"valid": valid, "test": test}
    most = max(targets, requests)
    return Split(
        name=name,
        starts=starts,
        stops={split: start + (targets if split.startswith("train") else 1) for split, start in starts.items()},
        known={"train": train, "hold_out": (train - most).clip(min=0), "refit": refit},
        held_out=np.full(len(train), most),
        cuts={},
    )


def ready_made(users: np.ndarray, parts: np.ndarray, *, tokens: Sequence[str], targets: int, requests: int) -> Split:
    """Split by the file that contains an interaction.

    Args:
        users: user id of each interaction, (R,), in the order of users and time.
        parts: number of the file of each interaction: 0 training, 1 validation, 2 test, (R,).
        tokens: name of each user id, (U + 1,).
        targets: number of targets of a training request.
        requests: number of training requests of a user. They start 0, 1, ... interactions before the last one of
            training.

    Raises:
        ConfigurationError: a user has several targets in a file, or a target that is older than an interaction of an
            earlier file.

    >>> split = ready_made(np.array([1, 1, 1, 1, 2, 2]), np.array([0, 0, 1, 2, 0, 2]), tokens=["", "a", "b"],
    ...                    targets=1, requests=1)
    >>> {name: starts.tolist() for name, starts in split.starts.items()}
    {'train': [0, 1, 0], 'valid': [0, 2, 0], 'test': [0, 3, 1]}
    """
    train, valid, test = (np.bincount(users[parts == part], minlength=len(tokens)) for part in range(3))
    why = "a user has one target in validation and one in the test, and the history before a target is the past"
    for part, counts in zip(PARTS[1:], (valid, test), strict=True):
        if counts.max() > 1:
            raise ConfigurationError(
                f"the user {tokens[int(counts.argmax())]!r} has {counts.max()} interactions in the file of {part}",
                where="benchmark_filename",
                why=why,
                do="keep one target for each user, or give one .inter file and choose a split with eval_args",
            )
    earlier = np.flatnonzero((users[1:] == users[:-1]) & (parts[1:] < parts[:-1]))
    if len(earlier):
        place = earlier[0]
        raise ConfigurationError(
            f"the user {tokens[users[place]]!r} has an interaction in the file of {PARTS[parts[place]]} that is older "
            f"than one in the file of {PARTS[parts[place + 1]]}",
            where="benchmark_filename",
            why=why,
            do="correct the files, or give one .inter file and choose a split with eval_args",
        )
    starts = np.where(valid > 0, train, 0), np.where(test > 0, train + valid, 0)
    return _by_position(READY_MADE, train, *starts, train + valid, targets=targets, requests=requests)


def temporal(
    users: np.ndarray,
    times: np.ndarray,
    *,
    size: int,
    given: Mapping[str, Sequence[float | str]],
    targets: int,
    requests: int,
) -> Split:
    """Split by the time of all interactions.

    Args:
        users: user id of each interaction, (R,), in the order of users and time.
        times: time of each interaction, (R,).
        size: number of user ids with padding, U + 1.
        given: `RS` with the shares of training, validation and test, or `date` with the first times of validation and
            test: numbers in the unit of the file, or dates.
        targets: largest number of targets of a training request.
        requests: number of training requests of a user. Each has a period of its own.

    Raises:
        ConfigurationError: a period has no interaction.

    >>> split = temporal(np.array([1, 1, 1, 1, 2, 2]), np.array([1, 3, 5, 6, 2, 4.0]), size=3,
    ...                  given={"date": [4, 5]}, targets=1, requests=1)
    >>> split.cuts, {name: starts.tolist() for name, starts in split.starts.items()}
    ({'train': 3.0, 'valid': 4.0, 'test': 5.0}, {'train': [0, 1, 0], 'valid': [0, 0, 1], 'test': [0, 2, 0]})
    """
    cuts = _cuts(np.sort(times), given, requests)
    before = {name: np.bincount(users[times < cut], minlength=size) for name, cut in cuts.items()}
    before["end"] = np.bincount(users, minlength=size)
    starts, stops = {}, {}
    for name, following in zip(cuts, (*list(cuts)[1:], "end"), strict=True):
        has_target = (before[following] > before[name]) & (before[name] > 0)
        starts[name] = np.where(has_target, before[name], 0)
        most = targets if name.startswith("train") else 1
        stops[name] = np.minimum(starts[name] + most, before[following])
    known = {"train": before["valid"], "hold_out": before[next(iter(cuts))], "refit": before["test"]}
    order = (*train_splits(requests), "valid", "test")
    return Split(
        name=TEMPORAL,
        starts={name: starts[name] for name in order},
        stops={name: stops[name] for name in order},
        known=known,
        held_out=known["train"] - known["hold_out"],
        cuts=cuts,
    )


def _cuts(times: np.ndarray, given: Mapping[str, Sequence[float | str]], requests: int) -> dict[str, float]:
    """First time of each period, the oldest first.

    Args:
        times: times of all interactions, ascending, (R,).
        given: see `temporal`.
        requests: number of periods of training requests.
    """
    count = len(times)
    if "RS" in given:
        shares = np.array(given["RS"], dtype=float) / sum(map(float, given["RS"]))
        size = int(shares[1] * count)  # RecBole rounds the parts of validation and test down.
        test = count - int(shares[2] * count)
        valid = test - size
    else:
        valid, test = (int(np.searchsorted(times, timestamp(value))) for value in given["date"])
        size = test - valid
    cuts, place = {"test": _time_at(times, test), "valid": _time_at(times, valid)}, valid
    for name in train_splits(requests):
        place = int(np.searchsorted(times, times[min(place, count - 1)])) - size  # Equal times are in one period.
        cuts[name] = _time_at(times, place)
    cuts = dict(reversed(cuts.items()))
    if np.isnan(list(cuts.values())).any() or np.any(np.diff([times[0], *cuts.values()]) <= 0):
        raise ConfigurationError(
            f"a period has no interaction: they start at {cuts}, and the times are {times[0]:.15g} to {times[-1]:.15g}",
            where=WHERE,
            why="validation, test and each of train_requests need a period of their own, after the first interaction; "
            "the period of a training request has as many interactions as the one of validation",
            do="give larger shares or other dates, or a smaller train_requests",
        )
    return cuts


def _time_at(times: np.ndarray, place: int) -> float:
    """The time of an interaction, or NaN if there is none before or none after."""
    return float(times[place]) if 0 < place < len(times) else np.nan


def timestamp(value: float | str) -> float:
    """Return a date as seconds since 1970 (UTC). A number stays as it is.

    Raises:
        ConfigurationError: the text is not a date.

    >>> timestamp("1970-01-02"), timestamp(5)
    (86400.0, 5.0)
    """
    import pandas as pd

    if isinstance(value, int | float):
        return float(value)
    try:
        return pd.Timestamp(str(value), tz="UTC").timestamp()
    except ValueError as error:
        raise ConfigurationError(
            f"{value!r} is no date",
            where=WHERE,
            why="it is the first time of validation or of test",
            do="write a date such as '2014-01-31', or a number in the unit of the time column",
        ) from error
