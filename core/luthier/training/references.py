"""Log-probabilities under the reference: the model as the stage was given it, computed once and kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.api.context import Context
from luthier.modeling.text import IGNORED
from luthier.training.batches import evaluating, log_probabilities
from luthier.training.encoding import EncodedRow
from luthier.training.passes import Passes

ROWS = 32
"""Rows that are computed together; they are shared out in the same way however often it is interrupted."""


class ReferencedRows(Sequence[EncodedRow]):
    """Rows with the log-probabilities of their trained tokens under the reference.

    Args:
        rows: The rows.
        targets: How many tokens of each are trained, shape (rows,).
        logps: Of all trained tokens, row by row, in nats.
    """

    def __init__(self, rows: Sequence[EncodedRow], targets: np.ndarray, logps: np.ndarray) -> None:
        self._rows, self._logps = rows, logps
        self._starts = np.concatenate([[0], np.cumsum(targets, dtype=np.int64)])

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each row's longest completion, shape (rows,)."""
        known = getattr(self._rows, "lengths", None)
        return np.array([len(row) for row in self._rows]) if known is None else known

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        row = self._rows[place]
        start = int(self._starts[place])
        found: list[np.ndarray] = []
        for item in row.completions:
            count = sum(label != IGNORED for label in item.labels[1:])
            found.append(self._logps[start : start + count])
            start += count
        return replace(row, reference_logps=tuple(found))


def with_reference(
    rows: Sequence[EncodedRow], needed: np.ndarray, passes: Passes, key: str, context: Context
) -> ReferencedRows:
    """Rows with the log-probabilities of the model as it is now.

    Args:
        rows: The rows.
        needed: The places of those that will be trained on.
        passes: How the model is run.
        key: Identifies the model, the rows and what is needed of them: the same log-probabilities are made once.
        context: Keeps them, and is told how far it is.

    Raises:
        Interrupted: the user asked to stop; what was computed is kept.
    """
    targets = np.asarray(getattr(rows, "targets", None) if hasattr(rows, "targets") else [row.targets for row in rows])
    file = context.cache / "references" / f"{key}.npy"
    if not file.exists():
        _compute(rows, targets, needed, passes, context, file)
    return ReferencedRows(rows, targets, np.load(file, mmap_mode="r"))


def _compute(
    rows: Sequence[EncodedRow], targets: np.ndarray, needed: np.ndarray, passes: Passes, context: Context, file: Path
) -> None:
    unfinished = context.scratch / f"{file.stem}.unfinished.npy"
    total = int(targets.sum())
    if unfinished.exists():
        values = np.lib.format.open_memmap(unfinished, mode="r+")
    else:
        values = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=(total,))
        # What is not computed yet.
        values[:] = np.nan
    starts = np.concatenate([[0], np.cumsum(targets, dtype=np.int64)])
    needed = np.sort(needed)
    for first in range(0, len(needed), ROWS):
        places = needed[first : first + ROWS]
        if any(targets[place] and np.isnan(values[starts[place]]) for place in places):
            found = _logps([rows[int(place)] for place in places], passes)
            for place, item in zip(places, found, strict=True):
                values[starts[place] : starts[place + 1]] = item
        context.progress(first + len(places), len(needed), "rows under the reference")
    values.flush()
    file.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unfinished, file)


def _logps(rows: Sequence[EncodedRow], passes: Passes) -> list[np.ndarray]:
    """log p of the trained tokens of each row."""
    found: dict[int, np.ndarray] = {}
    device = next(passes.model.parameters()).device
    for group in passes.layout.cut(rows, passes.limits.tokens, passes.limits.rows):
        some = [rows[place] for place in group]
        with evaluating(passes.model), torch.no_grad(), passes.around():
            made = log_probabilities(passes.model, passes.layout.batch(some).to(device), fused=passes.fused).completions
        order = torch.argsort(made.owner, stable=True)
        logps = made.logps.float()[order].cpu().numpy()
        ends = np.cumsum([row.targets for row in some])
        found |= dict(zip(group, np.split(logps, ends[:-1]), strict=True))
    return [found[place] for place in range(len(rows))]
