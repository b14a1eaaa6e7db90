"""Rows that are nearly the same, among any number of them: candidates by MinHash, each verified by real similarity.

Signatures are rensa's; which rows are candidates is told by bands of them (locality-sensitive hashing: Leskovec,
Rajaraman and Ullman, Mining of Massive Datasets, chapter 3). Rows of a public corpus had a thousand times as many
candidates as duplicates: what counts is the Jaccard similarity of the rows' own shingles, which are kept on disk for
it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from luthier.data.shingles import shingles_of

PERMUTATIONS = 128
RECALL = 0.99
"""The share of pairs at the threshold that become candidates, at least."""
SEED = 1
WIDTH = 8
"""Bytes of a shingle."""
LEADERS = 64
"""Rows of a band's bucket that are unlike each other, to which others are compared."""


def bands_of(threshold: float) -> tuple[int, int]:
    """How many bands of how many rows: the longest bands that still find `RECALL` of the pairs at a threshold.

    A pair of similarity s agrees in a band of r rows with probability s**r (chapter 3.4.2).
    """
    for rows in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return PERMUTATIONS, 1


class Similar:
    """Finds texts of which a share of the shingles are the same. A context manager, which removes what it keeps.

    Args:
        path: A file that it writes: eight bytes for each word of all texts.
        threshold: The Jaccard similarity from which on two texts count.

    Attributes:
        count: Texts so far.
        candidates: Pairs that were compared.
        pairs: Those that count: two places and their similarity. Not all of them: enough to tell which are tied.
    """

    def __init__(self, path: Path, threshold: float) -> None:
        self.count = 0
        self.candidates = 0
        self.pairs: list[tuple[int, int, float]] = []
        self._threshold = threshold
        self._bands, self._rows = bands_of(threshold)
        self._keys: list[list[np.ndarray]] = [[] for _ in range(self._bands)]
        self._starts: list[np.ndarray] = []
        self._size = 0
        self._path = path
        self._file = path.open("w+b")

    def __enter__(self) -> Similar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def add(self, texts: Sequence[str]) -> None:
        """Take texts, in the order of their places."""
        minhash: Any = import_module("rensa").RMinHash
        found = shingles_of(texts)
        self._file.write(found.hashes.tobytes())
        self._starts.append(found.starts[:-1] + self._size)
        self._size += len(found.hashes)
        matrix = minhash.digest_matrix_from_flat_token_hashes(
            found.hashes, found.starts.astype(np.uint64), PERMUTATIONS, SEED
        )
        signatures = np.array(matrix.to_rows(), np.uint64)
        # Texts without words are like nothing: each gets keys of its own.
        empty = np.flatnonzero(np.diff(found.starts) == 0)
        for band in range(self._bands):
            keys = _folded(signatures[:, band * self._rows : (band + 1) * self._rows])
            keys[empty] = np.arange(self.count, self.count + len(texts), dtype=np.uint64)[empty]
            self._keys[band].append(keys)
        self.count += len(texts)

    def tied(self) -> np.ndarray:
        """For each text the place of the first that it is tied to, itself where there is none: int64, shape (count,).

        Texts are tied when they count as similar, or are tied to the same.
        """
        self._file.flush()
        starts = np.append(np.concatenate([np.zeros(0, np.int64), *self._starts]), self._size)

        @lru_cache(maxsize=4 * LEADERS)
        def of(place: int) -> np.ndarray:
            # Not mapped: pages that were looked at would count as memory.
            first, end = WIDTH * int(starts[place]), WIDTH * int(starts[place + 1])
            return np.unique(np.frombuffer(os.pread(self._file.fileno(), end - first, first), np.uint64))

        first = np.arange(self.count)
        for band in range(self._bands):
            for bucket in _buckets(np.concatenate([np.zeros(0, np.uint64), *self._keys[band]])):
                self._compare(bucket, first, of)
        # Places were tied to smaller ones only: one look at each in order finds the first.
        for place in np.flatnonzero(first != np.arange(self.count)):
            first[place] = first[first[place]]
        return first

    def _compare(self, bucket: np.ndarray, first: np.ndarray, of: Any) -> None:
        """Tie the texts of a bucket that are similar."""
        leaders: list[int] = []
        for place in bucket.tolist():
            mine = _first(first, place)
            if any(_first(first, leader) == mine for leader in leaders):
                continue
            for leader in leaders:
                self.candidates += 1
                likeness = jaccard(of(place), of(leader))
                if likeness >= self._threshold:
                    self.pairs.append((leader, place, likeness))
                    one, other = sorted((_first(first, leader), _first(first, place)))
                    first[other] = one
                    break
            else:
                if len(leaders) < LEADERS:
                    leaders.append(place)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """The share of what either of two sets has that both have.

    Args:
        one: Sorted, each value once.
        other: The same.
    """
    if not len(one) or not len(other):
        return 0.0
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def _first(first: np.ndarray, place: int) -> int:
    """The first place that one is tied to, as far as it is known."""
    while first[place] != place:
        first[place] = first[first[place]]
        place = int(first[place])
    return place


def _folded(parts: np.ndarray) -> np.ndarray:
    """One number for each row of numbers."""
    found = np.zeros(len(parts), np.uint64)
    with np.errstate(over="ignore"):
        for column in parts.T:
            found = (found ^ column) * np.uint64(0x100000001B3)
            found ^= found >> np.uint64(29)
    return found


def _buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The places of equal keys, in order, for every key that several have."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    edges = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] + np.uint64(1))) if len(keys) else []
    for start, end in zip(edges, [*edges[1:], len(keys)], strict=True):
        if end - start > 1:
            yield order[start:end]
