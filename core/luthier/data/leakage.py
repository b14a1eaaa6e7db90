"""Whether what a model is tested on is in what it is trained on: the same prompts, and runs of words.

A test row leaks where most of the runs of 13 words (Brown et al., arXiv:2005.14165, appendix C) of its prompt, or of
its answer, are in rows that are trained on. A prompt that is shorter leaks where a row has the same one; an answer that
is short says nothing. System prompts do not count, nor do runs that many of the test rows share: they are the form of a
task, not its content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np

from luthier.api.artifact import Artifact
from luthier.api.data import SOURCE, Message, Row
from luthier.artifacts.datasets import iter_rows, row_at
from luthier.artifacts.rows import prompt_of
from luthier.data.shingles import shingles_of

REVISION = 1
"""Of what counts as a leak."""
WORDS = 13
"""Words of a run."""
LEAKS = 0.7
"""The share of a test row's runs that are trained on, from which on it leaks: what is left of a text when a word in
forty-five is another. Two word problems of one making, in GSM8K's two sides, have 0.56 in common."""
LEAST = 3 * WORDS
"""Words of an answer that is long enough to be told from others: two questions may have the same command or number."""
COMMON = 0.02
"""The share of test rows (and more than `FEW` of them) that have a run in common from which on it tells nothing."""
FEW = 10
BATCH = 1000
"""Rows that are read together."""
SHOWN = 200
"""Characters of a text that are kept of a leak."""


@dataclass(frozen=True, slots=True)
class Leak:
    """A row that is tested on and trained on.

    Attributes:
        part: What of it is: its ``prompt`` or its ``answer``.
        share: The share of that part's runs of words that is trained on.
        tested: Where the test row is from.
        trained: Where a row is from that has most of it.
        test_text: How that part of the test row begins.
        train_text: How the other row begins.
    """

    part: str
    share: float
    tested: str
    trained: str
    test_text: str
    train_text: str


@dataclass(frozen=True, slots=True)
class Leakage:
    """What was found.

    Attributes:
        rows: Test rows.
        leaking: Those that leak.
        unchecked: Those of which nothing could be told: short ones, or only what many share.
        worst: Some of the leaks, the worst first.
    """

    rows: int
    leaking: int
    unchecked: int
    worst: tuple[Leak, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which it can be made again."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Leakage:
        """What `to_json` gave."""
        return cls(**{**values, "worst": tuple(Leak(**leak) for leak in values["worst"])})


def leakage(
    trained: Sequence[Artifact], tested: Artifact, told: Callable[[int, int], None] = lambda done, total: None
) -> Leakage:
    """What of a dataset's split `test` is in the split `train` of others.

    Args:
        trained: Datasets that are trained on.
        tested: The dataset that is tested on.
        told: Hears how many rows of how many were looked at.
    """
    tests = _Tests(tested)
    total = sum(data.facts["rows"].get("train", 0) for data in trained)
    done = 0
    for which, data in enumerate(trained):
        for place, rows in _batches(data, "train"):
            tests.look_at(rows, which, place)
            done += len(rows)
            told(done, total)
    return tests.verdict(trained)


def _batches(data: Artifact, split: Any) -> Iterator[tuple[int, list[Row]]]:
    place = 0
    for rows in iter_rows(data, split, BATCH):
        yield place, rows
        place += len(rows)


class _Tests:
    """The runs of words of all test rows, and which of them were seen.

    Each row has two parts, its prompt and its answer: part 2 n and 2 n + 1 of row n.
    """

    def __init__(self, tested: Artifact) -> None:
        self._data = tested
        parts = [_parts(data, rows) for data, rows in ((tested, rows) for _, rows in _batches(tested, "test"))]
        hashes = np.concatenate([np.zeros(0, np.uint64), *(hashes for hashes, _ in parts)])
        counts = np.concatenate([np.zeros(0, np.int64), *(counts for _, counts in parts)])
        self.rows = len(counts) // 2
        # The place of each run among all different ones, and the part that it is of; each once in a part.
        self._runs, places = np.unique(hashes, return_inverse=True)
        owners = np.repeat(np.arange(len(counts)), counts)
        pairs = np.unique(np.stack([owners, places]), axis=1)
        in_rows = np.bincount(np.unique(np.stack([pairs[0] // 2, pairs[1]]), axis=1)[1], minlength=len(self._runs))
        telling = in_rows <= max(FEW, COMMON * self.rows)
        self._owners, self._places = pairs[:, telling[pairs[1]]]
        self._seen_in = np.full(len(self._runs), -1, np.int64)
        self._seen_at = np.zeros(len(self._runs), np.int64)

    def look_at(self, rows: Sequence[Row], which: int, first: int) -> None:
        """Note which runs are in rows that are trained on.

        Args:
            rows: The rows.
            which: The dataset that they are of.
            first: The place of the first in it.
        """
        if not len(self._runs):
            return
        for found in (shingles_of([_prompt(row) for row in rows], WORDS), shingles_of(list(map(_whole, rows)), WORDS)):
            places = np.searchsorted(self._runs, found.hashes)
            places[places == len(self._runs)] = 0
            hits = np.flatnonzero((self._runs[places] == found.hashes) & (self._seen_in[places] < 0))
            self._seen_in[places[hits]] = which
            self._seen_at[places[hits]] = first + np.searchsorted(found.starts, hits, side="right") - 1

    def verdict(self, trained: Sequence[Artifact]) -> Leakage:
        """What was found, once all rows were looked at."""
        seen = self._seen_in[self._places] >= 0
        runs = np.bincount(self._owners, minlength=2 * self.rows)
        shares = np.bincount(self._owners, weights=seen, minlength=2 * self.rows) / np.maximum(runs, 1)
        by_row = shares.reshape(-1, 2)
        leaking = np.flatnonzero(by_row.max(axis=1, initial=0) >= LEAKS)
        order = leaking[np.argsort(-by_row[leaking].max(axis=1), kind="stable")]
        worst = tuple(self._leak(int(row), by_row[row], trained) for row in order[:FEW])
        unchecked = int((runs.reshape(-1, 2).sum(axis=1) == 0).sum())
        return Leakage(self.rows, len(leaking), unchecked, worst)

    def _leak(self, row: int, shares: np.ndarray, trained: Sequence[Artifact]) -> Leak:
        part = int(shares.argmax())
        mine = self._places[self._owners == 2 * row + part]
        mine = mine[self._seen_in[mine] >= 0]
        seen = Counter(zip(self._seen_in[mine].tolist(), self._seen_at[mine].tolist(), strict=True))
        (which, place), _ = seen.most_common(1)[0]
        test, train = row_at(self._data, "test", row), row_at(trained[which], "train", place)
        return Leak(
            part=("prompt", "answer")[part],
            share=round(float(shares[part]), 3),
            tested=_place(test, row),
            trained=_place(train, place),
            test_text=_shown((_prompt, _answer)[part](test)),
            train_text=_shown((_prompt if part == 0 else _answer)(train) or _whole(train)),
        )


def _parts(data: Artifact, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """The runs of prompts and answers, and how many each part has: none for an answer that is short, or for a text's
    prompt."""
    texts = [part for row in rows for part in (_prompt(row), _answer(row))]
    found = shingles_of(texts, WORDS)
    counts = np.diff(found.starts)
    short = np.array(
        [place % 2 == 1 and len(shingles_of([text], 1).hashes) < LEAST for place, text in enumerate(texts)]
    )
    keep = np.repeat(~short, counts)
    return found.hashes[keep], np.where(short, 0, counts)


def _prompt(row: Row) -> str:
    return "" if "text" in row else _said(prompt_of(row))


def _answer(row: Row) -> str:
    if "text" in row:
        return row["text"]
    columns = ("messages", "chosen", "rejected", "completion")
    return _said([item for column in columns for item in cast("list[Message]", row.get(column) or [])[-1:]])


def _whole(row: Row) -> str:
    if "text" in row:
        return row["text"]
    columns = ("messages", "prompt", "chosen", "rejected", "completion")
    return _said([item for column in columns for item in cast("list[Message]", row.get(column) or [])])


def _said(messages: Sequence[Message]) -> str:
    return "\n".join(item["content"] for item in messages if item["role"] != "system")


def _place(row: Row, number: int) -> str:
    return str(row.get(SOURCE) or f"row {number + 1}")


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
