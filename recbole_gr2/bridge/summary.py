"""The data summary of a run: figures about the data set, and the checks that stop a run without a usable result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from recbole_gr2.bridge.atomic import MISSING
from recbole_gr2.errors import ConfigurationError

if TYPE_CHECKING:
    from recbole_gr2.bridge.data import Data

# Above this share of users, targets or items, a warning or an error follows. The limit is a choice of this package.
MOST = 0.5


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Figures about a data set after RecBole's filters.

    Attributes:
        users, items, interactions: their numbers.
        density: share of the pairs of a user and an item that are interactions; a repeated pair counts once.
        repeats: share of the interactions whose item the user had before.
        duplicates: number of interactions that equal another one in user, item and time.
        times: number of distinct times.
        tied_users: share of the users with several interactions whose last two have the same time.
        test_users: number of users with a test target.
        valid_users: number of users with a validation target.
        train_lists: number of users with a training list.
        train_targets: number of targets of a training list.
        split: leave-one-out, temporal or ready-made.
        cuts: first time of each period of a temporal split; empty for leave-one-out.
        new_users: share of the users of `reported` without a training interaction.
        future: share of the training interactions, of all users, that happened after a test interaction; the mean over
            the test interactions. A temporal split has none.
        reported: the split that the run reports (`eval_split`), test or validation.
        masked_targets: share of its targets that are in the user's own history.
        reachable_targets: number of its targets that occur in training interactions and, if seen items are masked, not
            in the user's history. A base model that learns items from interactions has at most as many hit users.
        masks_seen: whether candidates exclude the items of the history.
        without_text: number of items without title, categories, brand and description, or with a word for a missing
            value such as `nan`, for the columns that are read.
        without_line: number of items with interactions that the `.item` file does not contain.
        without_interactions: number of items in the `.item` file that have no interactions.
        input_lines: number of lines of the `.inter` file with an interaction.
        dropped: number of interactions that were dropped, by RecBole's option.
        notes: number of lines that were skipped or changed, by file and reason.
    """

    users: int
    items: int
    interactions: int
    density: float
    repeats: float
    duplicates: int
    times: int
    tied_users: float
    test_users: int
    valid_users: int
    train_lists: int
    train_targets: int
    split: str
    cuts: Mapping[str, float]
    new_users: float
    reported: str
    future: float
    masked_targets: float
    reachable_targets: int
    masks_seen: bool
    without_text: Mapping[str, int]
    without_line: int
    without_interactions: int
    input_lines: int
    dropped: Mapping[str, int]
    notes: Mapping[str, int]

    def lines(self) -> list[tuple[str, str]]:
        """Return name and value of each line of the printed summary."""
        lists = (
            f"{self.train_lists:,} users have a training list, {self.valid_users:,} a validation target, "
            f"{self.test_users:,} a test target"
        )
        if self.cuts:
            cuts = ", ".join(f"{name} from {time:.15g}" for name, time in self.cuts.items())
            split = f"temporal: {cuts}; {self.new_users:.1%} of the {self.reported} users have no training interaction"
        else:
            split = (
                f"{self.split}; on average {self.future:.1%} of the training interactions are later than a test "
                "interaction"
            )
        mask = "occur in training and are not masked as seen" if self.masks_seen else "occur in training"
        changed = {**{f"dropped by {option}": n for option, n in self.dropped.items()}, **self.notes}
        return [
            ("density", f"{self.density:.3%}; {self.interactions / self.users:.1f} interactions per user"),
            ("repeats", f"{self.repeats:.1%} of the interactions have an item that the user had before"),
            ("ties in time", f"{self.tied_users:.1%} of the users have one time for their last two interactions"),
            ("split", split),
            ("lists", lists),
            ("hit users", f"at most {self.reachable_targets:,}: so many {self.reported} targets {mask}"),
            ("missing texts", ", ".join(f"{n:,} items without {text}" for text, n in self.without_text.items())),
            (
                "item file",
                f"lacks {self.without_line:,} of the items, has {self.without_interactions:,} without interactions",
            ),
            ("input lines", f"{self.input_lines:,} interactions, {sum(self.dropped.values()):,} dropped by filters"),
            *((f"{n:,} lines", reason) for reason, n in changed.items()),
        ]

    def text(self) -> str:
        """Return the summary as aligned lines, with warnings at the end."""
        first = f"{self.users:,} users, {self.items:,} items, {self.interactions:,} interactions"
        lines = self.lines()
        width = max(len(name) for name, _ in lines)
        return "\n".join([first, *(f"        {name:{width}}  {value}" for name, value in lines), *self.warnings()])

    def warnings(self) -> list[str]:
        """Return a sentence for each property of the data that makes a result doubtful."""
        warnings = []
        if self.duplicates:
            warnings.append(
                f"{self.duplicates:,} interactions equal another one in user, item and time; "
                "rm_dup_inter: first removes them"
            )
        if self.masked_targets and self.masks_seen:
            warnings.append(
                f"{self.masked_targets:.1%} of the {self.reported} targets are in the user's history and masked; "
                "set cand_exclude_seen: False to recommend seen items, or rm_dup_inter: first to remove repeats"
            )
        if self.tied_users > MOST:
            warnings.append(
                f"{self.tied_users:.1%} of the users have one time for their last two interactions, so that the order "
                "of the file decides which one is the test target"
            )
        empty = [f"text_{text}" for text, count in self.without_text.items() if count == self.items]
        if empty:
            warnings.append(f"no item has a text in the column of {', '.join(empty)}")
        if self.without_line:
            warnings.append(f"{self.without_line:,} items have no line in the .item file, and therefore no texts")
        return [f"warning: {warning}" for warning in warnings]

    def check(self) -> None:
        """Raise an error if no run on these data can have a usable result.

        Raises:
            ConfigurationError: the time is constant, no user has a training list, most targets are masked, or most
                items have no line in the `.item` file or no text.
        """
        if self.times == 1 and self.interactions > 1:
            raise ConfigurationError(
                "all interactions have the same time",
                where="TIME_FIELD, the .inter file",
                why="histories, splits and targets are defined by time",
                do="give the interactions their times; if the lines are in the order of time, number them",
            )
        if self.cuts and not (self.train_lists and self.valid_users and self.test_users):
            raise ConfigurationError(
                f"{self.train_lists:,} users have a training list, {self.valid_users:,} a validation target and "
                f"{self.test_users:,} a test target",
                where="eval_args: split",
                why="a target is the first interaction of a user in a period, and needs an earlier one as history",
                do="choose other shares or dates, so that each period has users with earlier interactions",
            )
        if not self.train_lists:
            raise ConfigurationError(
                f"no user has {3 + self.train_targets} or more interactions",
                where="the .inter file, after RecBole's filters",
                why=f"the {self.train_targets + 2} last ones are targets of training, validation and test, and a "
                "training list needs a history of at least one interaction before them",
                do="use a data set with longer histories"
                + (", or a smaller train_targets" if self.train_targets > 1 else ""),
            )
        if self.masks_seen and self.masked_targets > MOST:
            raise ConfigurationError(
                f"{self.masked_targets:.1%} of the {self.reported} targets are in the user's history and masked"
                + (f"; {self.duplicates:,} interactions equal another one" if self.duplicates else ""),
                where="cand_exclude_seen",
                why="the mask of seen items removes these targets from every list, so that recall is close to 0",
                do="set cand_exclude_seen: False to recommend seen items, or rm_dup_inter: first to remove repeated "
                f"interactions. More than {MOST:.0%} is the limit of this package",
            )
        if self.without_line > MOST * self.items:
            raise ConfigurationError(
                f"{self.without_line:,} of {self.items:,} items have no line in the .item file",
                where="ITEM_ID_FIELD, the .inter file and the .item file",
                why="semantic IDs and prompts are computed from item texts",
                do="write the ids of items in the same way in both files; more than "
                f"{MOST:.0%} is the limit of this package",
            )
        if self.without_text and min(self.without_text.values()) == self.items:
            raise ConfigurationError(
                "no item has a text",
                where=", ".join(f"text_{text}" for text in self.without_text),
                why="semantic IDs and prompts are computed from item texts",
                do="fill these columns of the .item file, or name other ones",
            )


def summarise(data: Data) -> DataSummary:
    """Compute the summary of a data set."""
    settings, dataset = data.settings, data.dataset
    users = np.repeat(list(data.sequences), [len(items) for items in data.sequences.values()])
    items = np.concatenate(list(data.sequences.values()))
    frame = pd.DataFrame({"user": users, "item": items, "time": data.times})
    repeated = frame.duplicated(["user", "item"]).to_numpy()
    lengths = np.array([len(items) for items in data.sequences.values()])
    ends = np.cumsum(lengths)
    several = ends[lengths > 1] - 1
    first = dict(zip(data.sequences, (ends - lengths).tolist(), strict=True))  # place of a user's first interaction
    test_users, valid_users = data.rows("test")[1], data.rows("valid")[1]
    reported, users_of = ("test", test_users) if settings["eval_split"] == "test" else ("valid", valid_users)
    targets = np.array([first[user] + data.split.starts[reported][user] for user in users_of.tolist()], dtype=int)
    tested = np.array([first[user] + data.split.starts["test"][user] for user in test_users.tolist()], dtype=int)
    known = data.split.known["train"]
    is_training = np.arange(len(frame)) - np.repeat(ends - lengths, lengths) < known[users]
    trained = np.unique(items[is_training])
    training_times = np.sort(data.times[is_training])
    later = 1 - np.searchsorted(training_times, data.times[tested], side="right") / max(len(training_times), 1)
    masks_seen = bool(settings["cand_exclude_seen"]) and not settings["cand_file"]
    reachable = np.isin(items[targets], trained) & ~(repeated[targets] & masks_seen)
    texts: dict[str, Any] = {
        text: sum(getattr(item, text) in MISSING for item in data.catalog)
        for text in ("title", "categories", "brand", "description")
        if settings[f"text_{text}"]
    }
    tokens = set(data.item_tokens[1:])
    return DataSummary(
        users=len(lengths),
        items=data.item_count,
        interactions=len(frame),
        density=float((~repeated).sum() / (len(lengths) * data.item_count)),
        repeats=float(repeated.mean()),
        duplicates=int(frame.duplicated(["user", "item", "time"]).sum()),
        times=len(np.unique(data.times)),
        tied_users=float(np.mean(data.times[several] == data.times[several - 1])) if len(several) else 0.0,
        test_users=len(tested),
        valid_users=len(valid_users),
        train_lists=min(int((data.split.starts["train"] > 0).sum()), settings["max_requests"] or len(lengths)),
        train_targets=data.train_targets,
        split=data.split.name,
        cuts=data.split.cuts,
        new_users=float((known[users_of] == 0).mean()) if len(targets) else 0.0,
        reported="test" if reported == "test" else "validation",
        future=float(later.mean()) if len(tested) else 0.0,
        masked_targets=float(repeated[targets].mean()) if len(targets) else 0.0,
        reachable_targets=int(reachable.sum()),
        masks_seen=masks_seen,
        without_text=texts,
        without_line=len(tokens - set(data.item_texts)),
        without_interactions=len(set(data.item_texts) - {data.item_tokens[i] for i in np.unique(items)}),
        input_lines=dataset.input_lines,
        dropped=dict(dataset.dropped),
        notes=dict(dataset.notes),
    )
