"""Parameters whose parts lie in a GPU's memory: for methods that do much with each entry."""

from __future__ import annotations

import torch
from luthier.api import MergePart
from luthier.train.merging import Grid
from luthier_plugins.merge.files import Scratch
from luthier_plugins.merge.tasks import Task, read_part
from torch import Tensor

PARTS = 16
"""How many of the CPU's parts are one there: launching work on less takes longer than the work."""
COPIES = 4
"""How many copies of a part methods make beside it, at most, input by input."""
SHARE = 0.8
"""The share of the free memory that may be taken."""


def room() -> int:
    """Bytes that may be taken."""
    free, _ = torch.cuda.mem_get_info()
    return int(SHARE * free)


def size_of(task: Task) -> int:
    """Bytes that merging a parameter takes there."""
    grid = Grid.of(task.place.shape)
    at_once = min(task.entries, PARTS * grid.height * grid.columns)
    return 4 * (len(task.roles) + (task.base is not None)) * (task.entries + COPIES * at_once)


def uploaded(task: Task, scratch: Scratch) -> list[MergePart]:
    """All parts of a parameter, in the GPU's memory; the CPU holds no more than one of its own parts meanwhile."""
    grid = Grid.of(task.place.shape)
    there = [torch.empty(grid.rows, grid.columns, device="cuda")
             for _ in range(len(task.roles) + (task.base is not None))]  # fmt: skip
    for first, last in grid.spans():
        read = read_part(task, (first, last), scratch)
        for whole, part in zip(there, [*read.tensors, *_given(read.base)], strict=True):
            whole[first:last].copy_(part)
    base = there.pop() if task.base else None
    return [
        MergePart(task.place, first * grid.columns, [whole[first:last] for whole in there], task.numbers,
                  None if base is None else base[first:last], draw=task.noise)
        for first, last in grid.spans(PARTS)
    ]  # fmt: skip


def _given(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]
