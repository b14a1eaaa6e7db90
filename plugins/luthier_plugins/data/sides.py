"""On which side of a split a row belongs: told from the row itself, so that it stays there when others come."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from luthier.api import DataError, Row
from luthier.artifacts.datasets import SPLITS, Split
from luthier.artifacts.rows import asked_by
from luthier_plugins.data.config import SplitConfig

TRAIN, VALIDATION, TEST = (SPLITS.index(name) for name in ("train", "validation", "test"))


def draws_of(rows: Sequence[tuple[Row, str | None]], seed: int) -> np.ndarray:
    """Three numbers for each row, drawn by what it answers to, or by its group: uint64, shape (rows, 3)."""
    digests = [
        hashlib.blake2b(
            (asked_by(row) if group is None else group).encode(), digest_size=24, key=seed.to_bytes(8, "little")
        ).digest()
        for row, group in rows
    ]
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 3)


def shared(draws: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """The numbers of rows that are tied to each other, made the same: those of the one with the smallest third number,
    which says nothing of its side, and is seldom another one when rows are added.

    Args:
        draws: See `draws_of`.
        tied: The place of the first row that each is tied to, shape (rows,).
    """
    order = np.lexsort((draws[:, 2], tied))
    heads = order[np.flatnonzero(np.diff(tied[order], prepend=-1))]
    found = draws.copy()
    found[order] = draws[np.repeat(heads, np.bincount(tied)[tied[heads]])]
    return found


def sides_of(draws: np.ndarray, split: SplitConfig | Split) -> np.ndarray:
    """The place in `SPLITS` of each row's side: int8, shape (rows,).

    A row is held out where its number is below the share, whatever other rows there are. Where chance would hold out
    nothing of a share that was asked for, the row with the smallest number is; and one is always left to train on.

    Args:
        draws: See `draws_of`.
        split: The shares, or the one side of all rows.

    Raises:
        DataError: there are too few different ones.
    """
    if not isinstance(split, SplitConfig):
        return np.full(len(draws), SPLITS.index(split), np.int8)
    sides = np.full(len(draws), TRAIN, np.int8)
    for side, share, numbers in ((TEST, split.test, draws[:, 0]), (VALIDATION, split.validation, draws[:, 1])):
        free = np.flatnonzero(sides == TRAIN)
        if not share or not len(free):
            continue
        numbers = numbers[free]
        # The validation share is one of all rows, too.
        rest = share / (1 - split.test) if side == VALIDATION else share
        chosen = numbers < np.uint64(min(rest, 1.0) * (2**64 - 1))
        sides[free[chosen if chosen.any() else numbers == numbers.min()]] = side
    if not (sides == TRAIN).any():
        # By chance: the side with more rows gives up the one that is furthest from being held out.
        fuller = TEST if (sides == TEST).sum() > (sides == VALIDATION).sum() else VALIDATION
        numbers = draws[:, 0]
        sides[numbers == numbers[sides == fuller].max()] = TRAIN
    missing = (split.test and not (sides == TEST).any()) or (split.validation and not (sides == VALIDATION).any())
    if missing or not (sides == TRAIN).any():
        raise DataError(
            f"{len(np.unique(draws[:, 0]))} different prompts are too few for these shares",
            hint="rows with the same prompt are on one side; name a `split` of all rows, or add rows",
        )
    return sides
