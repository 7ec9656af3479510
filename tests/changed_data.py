"""Copies of the data set `tiny` in which some targets of each user are other items."""

import random
import shutil
from pathlib import Path


def copy_tiny(folder: Path, copy: Path, *, scrambled: int, from_end: int = 1) -> None:
    """Copy the data set, and replace items of each user by other ones.

    Two further users have all items, in the first lines. So the internal ids, and the order of ties, are equal in all
    copies.

    Args:
        folder: the folder that holds tiny/.
        copy: the folder for the copy.
        scrambled: number of adjacent interactions of each user that get another item.
        from_end: place of the last of them, counted from the end, from 1.
    """
    shutil.copytree(folder / "tiny", copy / "tiny")
    file = copy / "tiny" / "tiny.inter"
    header, *lines = file.read_text().splitlines()
    rows, rng = [line.split("\t") for line in lines], random.Random(1)
    user, item, time = (
        next(i for i, name in enumerate(header.split("\t")) if name.startswith(part))
        for part in ("user", "item", "time")
    )
    items = sorted({row[item] for row in rows})
    for name in dict.fromkeys(row[user] for row in rows):
        own = sorted((row for row in rows if row[user] == name), key=lambda row: float(row[time]))
        known = {row[item] for row in own}
        for row in own[len(own) - from_end - scrambled + 1 : len(own) - from_end + 1]:
            row[item] = rng.choice([other for other in items if other not in known])
            known.add(row[item])
    first = []
    for number, token in enumerate(items):
        row = ["" for _ in rows[0]]
        row[user], row[item], row[time] = ("first" if number % 2 else "second"), token, str(number)
        first.append(row)
    file.write_text("\n".join([header, *("\t".join(row) for row in [*first, *rows])]) + "\n")
