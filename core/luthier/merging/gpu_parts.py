"""Parameters whose parts are in a GPU's memory: for methods that compute a lot per entry."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.merging.api import MergePart
from luthier.merging.files import Scratch
from luthier.merging.jobs import TensorJob, read_part
from luthier.merging.parts import Grid

PARTS = 16
"""How many of the CPU's parts are one there: launching work on less takes longer than the work."""
COPIES = 4
"""How many copies of a part methods make beside it, at most, input by input."""
SORTED = 32
"""Bytes an entry that sorting one model's values takes, for methods that read a whole parameter."""
WORTH_IT = 1 << 26
"""Entries that must be merged there all in all: below, starting a GPU takes longer than it saves."""
SHARE = 0.8
"""The share of the free memory that may be taken."""


def room() -> int:
    """Bytes that may be taken; none where the GPU cannot be asked, because others have all of it."""
    try:
        free, _ = torch.cuda.mem_get_info()
    except RuntimeError:
        return 0
    # What torch keeps for later counts as taken there.
    return int(SHARE * (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()))


def size_of(job: TensorJob) -> int:
    """Bytes that merging a parameter takes there."""
    grid = Grid.of(job.parameter.shape)
    at_once = min(job.entries, PARTS * grid.height * grid.columns)
    return 4 * (len(job.operands) + (job.base is not None)) * (job.entries + COPIES * at_once) + SORTED * job.entries


class OnGpu(Scratch):
    """Buffers in the GPU's memory, never the same one twice: what was read stays."""

    def __init__(self) -> None:
        super().__init__(pinned=True)

    def floats(self, place: int, count: int) -> Tensor:
        return torch.empty(count, device="cuda")


def uploaded(job: TensorJob, scratch: OnGpu) -> list[MergePart]:
    """All parts of a parameter; the CPU holds the bytes of one of them in one model meanwhile."""
    return [read_part(job, span, scratch) for span in Grid.of(job.parameter.shape).spans(PARTS)]
