"""Rows that repeat others: which are left out, and which belong on one side of a split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from luthier.api import Row
from luthier.artifacts.rows import compared_text, content_of
from luthier.data.similar import Similar
from luthier_plugins.data.config import DataConfig, SplitConfig

SAME = "is the same as an earlier row"
SAMPLES = 1000
"""Rows that were left out which are kept beside the ones that they repeat."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of repetitions once all rows are.

    Attributes:
        kept: Whether each row stays: bool, shape (rows,).
        tied: The place of the first row that each is similar to, or its own: int64, shape (rows,).
        dropped: How many rows do not stay, by reason.
        samples: Some of those, each after the one that it repeats, and how similar they are.
    """

    kept: np.ndarray
    tied: np.ndarray
    dropped: dict[str, int]
    samples: list[tuple[int, int, float]]


class Duplicates:
    """Looks for repetitions among rows as far as a recipe asks for it. A context manager.

    Args:
        config: What counts.
        scratch: A folder.
    """

    def __init__(self, config: DataConfig, scratch: Path) -> None:
        self._dedupe = config.dedupe
        split = config.split if isinstance(config.split, SplitConfig) else SplitConfig(near_duplicates=False)
        apart = split.near_duplicates if split.test or split.validation else False
        near = config.dedupe.near if config.dedupe else None
        # Where similar rows are left out, none are left that could be on two sides.
        apart = False if near is not None and apart is not False and near <= apart else apart
        self._digests: list[bytes] = []
        self._stack = ExitStack()
        self._near = None if near is None else self._stack.enter_context(Similar(scratch / "near.bin", near))
        self._apart = None if apart is False else self._stack.enter_context(Similar(scratch / "apart.bin", apart))
        self._count = 0

    def __enter__(self) -> Duplicates:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows, in the order of their places."""
        self._count += len(rows)
        if self._dedupe is not None:
            self._digests += [hashlib.blake2b(content_of(row).encode(), digest_size=16).digest() for row in rows]
        texts = [compared_text(row) for row in rows] if self._near or self._apart else []
        for similar in (self._near, self._apart):
            if similar is not None:
                similar.add(texts)

    def verdict(self) -> Verdict:
        """What all rows are to each other."""
        places = np.arange(self._count)
        first = self._first_alike()
        dropped = {SAME: int((first != places).sum())} if self._dedupe is not None else {}
        samples = [(int(first[place]), int(place), 1.0) for place in np.flatnonzero(first != places)[: SAMPLES // 2]]
        if self._near is not None and self._dedupe is not None:
            similar = self._near.tied()
            fresh = (similar != places) & (first == places)
            dropped[f"is similar to an earlier row ({self._dedupe.near} or more)"] = int(fresh.sum())
            samples += [pair for pair in self._near.pairs if fresh[pair[1]]][: SAMPLES - len(samples)]
            first = np.where(first == places, similar, first)
        tied = self._apart.tied() if self._apart is not None else places
        return Verdict(first == places, tied, {reason: count for reason, count in dropped.items() if count}, samples)

    def _first_alike(self) -> np.ndarray:
        """The place of the first row that is the same as each."""
        if not self._digests:
            return np.arange(self._count)
        digests = np.frombuffer(b"".join(self._digests), dtype="V16")
        _, firsts, inverse = np.unique(digests, return_index=True, return_inverse=True)
        return firsts[inverse]
