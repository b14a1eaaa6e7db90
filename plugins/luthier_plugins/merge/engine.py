"""Merges tensor by tensor, each in parts, with several workers.

Small parameters are shared out among the workers; a large one is split, and all workers work on it. A part is always
the same rows (`luthier.train.merging.Grid`), and sums are added up in the order of the parts: the result hangs
neither on the number of workers nor on who was faster. Memory is bounded by workers x (inputs + a few) x part. Methods
that look at a parameter before they merge it keep `KEPT` bytes more, those that select entries by rank another 160 MiB
at most, however many workers there are. A GPU is used where the method says so (`luthier.api.Merge`).
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import torch
from luthier.api import Merge, MergePart, ModelError
from luthier.train.merging import Grid, measured
from luthier_plugins.merge import on_gpu
from luthier_plugins.merge.devices import fastest, where_it_fits
from luthier_plugins.merge.files import SIZES, Scratch
from luthier_plugins.merge.pool import MATRIX_COPIES, MEMORY, Budget, ahead, threads
from luthier_plugins.merge.tasks import Look, ScanOf, Span, Task, read_part
from luthier_plugins.merge.writer import Output
from torch import Tensor

CHUNK = 1 << 21
"""Entries in a job on a large parameter, at least one part."""
KEPT = 1 << 27
"""Bytes that all workers together keep of parameters that are looked at twice, so that these are not read twice."""
COPY = 1 << 22
"""Bytes copied at once."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the engine works; none of it changes a bit of the result."""

    workers: int = 1
    chunk: int = CHUNK
    memory: int = MEMORY
    niceness: int = 0
    """How much further than this process the workers stand back behind others, as in nice(1)."""


class Engine:
    """Runs the tasks of one merge.

    Args:
        method: The merge method of all tensors that have none of their own.
        output: Where results go.
        settings: How to work.
        progress: Called with the entries done and their number.
    """

    def __init__(self, method: Merge, output: Output, settings: Settings, progress: Callable[[int, int], None]) -> None:
        self.method = method
        self.output = output
        self.settings = settings
        self.progress = progress
        self._local = threading.local()
        self._budget = Budget(settings.memory)
        self._gpu = Budget(0)

    def run(self, tasks: Sequence[Task]) -> None:
        """Merge all tensors. What a method raises is raised here; the other jobs are given up then."""
        with threads(self.settings.workers, self._stand_back) as pool:
            self._run(pool, tasks)

    def _stand_back(self) -> None:
        # Elsewhere it would be the whole process, and for good.
        if self.settings.niceness and sys.platform == "linux":
            thread = threading.get_native_id()
            own = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, own + self.settings.niceness)

    def _run(self, pool: ThreadPoolExecutor, tasks: Sequence[Task]) -> None:
        total = sum(task.entries for task in tasks)
        done = 0
        if sum(task.entries for task in tasks if self._suits_gpu(task)) >= on_gpu.WORTH_IT:
            self._gpu = Budget(on_gpu.room())
        small: list[Task] = []
        for task in tasks:
            whole = task.copied or self._method(task).granularity == "matrix" or self._fits_gpu(task)
            if whole or task.entries <= 2 * self.settings.chunk:
                small.append(task)
                continue
            self._split(pool, task)
            done += task.entries
            self.progress(done, total)
        # The largest first, so that no worker is left with one at the end.
        small.sort(key=lambda task: -task.entries)
        pending: set[Future[int]] = {pool.submit(self._whole, task) for task in small}
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                done += sum(future.result() for future in finished)
                self.progress(done, total)
        except BaseException:
            for future in pending:
                future.cancel()
            raise

    def _method(self, task: Task) -> Merge:
        return task.method or self.method

    # -- one worker, one tensor -------------------------------------------------------------------

    def _whole(self, task: Task) -> int:
        """Merge a tensor in this thread."""
        if task.copied:
            self._copy(task)
        elif self._method(task).granularity == "matrix":
            self._matrix(task)
        elif self._fits_gpu(task):
            with self._gpu.of(on_gpu.size_of(task)):
                where_it_fits(lambda device: self._by_parts(task, device), "cuda")
        else:
            self._by_parts(task, "cpu")
        return task.entries

    def _by_parts(self, task: Task, device: str) -> None:
        spans = list(Grid.of(task.place.shape).spans())
        parts: Sequence[MergePart] | None = None
        scratch = self._scratch
        if device != "cpu":
            scratch = self._scratch_on_gpu
            parts = on_gpu.uploaded(task, scratch)
        elif self._keeps(task):
            parts = self._kept(task, spans)

        def walk(look: Look, every: int, add: bool) -> Iterator[Tensor]:
            return (look(part) for part in (parts[::every] if parts else self._parts(task, spans[::every])))

        found = measured(self._method(task), ScanOf(task, walk, on_gpu=device != "cpu"))
        for part in parts or self._parts(task, spans):
            self._write(task, part, found, scratch)

    def _device(self, task: Task) -> str:
        """Where a parameter is worked on, as far as there is memory."""
        method = self._method(task)
        suits = getattr(method, "suits_gpu", method.granularity == "matrix")
        return fastest(task.entries) if suits else "cpu"

    def _suits_gpu(self, task: Task) -> bool:
        """Whether a parameter's parts may be worked on on a GPU."""
        matrix = self._method(task).granularity == "matrix"
        return not (task.copied or matrix or task.extras) and self._device(task) != "cpu"

    def _fits_gpu(self, task: Task) -> bool:
        """Whether they are."""
        return self._suits_gpu(task) and on_gpu.size_of(task) <= self._gpu.limit

    def _keeps(self, task: Task) -> bool:
        """Whether a parameter is read into memory once, because it is looked at twice."""
        size = 4 * task.entries * (len(task.roles) + (task.base is not None) + len(task.extras))
        return self._method(task).granularity == "statistics" and size <= KEPT // self.settings.workers

    def _kept(self, task: Task, spans: Sequence[Span]) -> list[MergePart]:
        """All parts at once, each in buffers of its own that are used again for the next parameter."""
        held: list[Scratch] = self._local.__dict__.setdefault("held", [])
        held.extend(Scratch() for _ in range(len(spans) - len(held)))
        return [read_part(task, span, scratch) for span, scratch in zip(spans, held, strict=False)]

    def _write(self, task: Task, part: MergePart, found: Any, scratch: Scratch) -> None:
        merged = self._method(task).merge(replace(part, found=found))
        _check_size(merged, part.tensors[0].numel(), task)
        self.output.write(task.place.name, part.start, merged, scratch)

    def _copy(self, task: Task) -> None:
        role = task.roles[0]
        size = task.entries * SIZES[role.weights.headers[role.name].dtype]
        for first in range(0, size, COPY):
            raw = self._scratch.raw(min(COPY, size - first))
            role.weights.raw(role.name, first, raw)
            self.output.raw(task.place.name, first, raw)

    def _matrix(self, task: Task) -> None:
        if not task.entries:
            return
        prepared = sum(math.prod(files.headers[name].shape) for files, name in task.extras)
        size = 4 * (task.entries * (len(task.roles) + (task.base is not None) + MATRIX_COPIES) + 3 * prepared)
        with self._budget.of(size):
            grid = Grid.of(task.place.shape)
            whole = read_part(task, (0, grid.rows), Scratch(), whole=True)
            shape = task.place.shape

            def work(device: str) -> Tensor:
                part = MergePart(
                    task.place, 0, [tensor.view(shape).to(device) for tensor in whole.tensors], task.numbers,
                    None if whole.base is None else whole.base.view(shape).to(device), None,
                    [files.whole(name).to(device) for files, name in task.extras], task.noise,
                )  # fmt: skip
                return self._method(task).merge(part).cpu().reshape(-1)

            merged = where_it_fits(work, self._device(task))
            _check_size(merged, task.entries, task)
            for first in range(0, merged.numel(), self.settings.chunk):
                self.output.write(task.place.name, first, merged[first : first + self.settings.chunk], self._scratch)

    # -- all workers, one tensor ------------------------------------------------------------------

    def _split(self, pool: ThreadPoolExecutor, task: Task) -> None:
        """Merge a large tensor with all workers."""
        grid = Grid.of(task.place.shape)
        spans = list(grid.spans())
        several = max(1, self.settings.chunk // (grid.height * grid.columns))

        def jobs(spans: Sequence[Span]) -> list[Sequence[Span]]:
            return [spans[first : first + several] for first in range(0, len(spans), several)]

        def walk(look: Look, every: int, add: bool) -> Iterator[Tensor]:
            def work(job: Sequence[Span]) -> list[Tensor]:
                looks = (look(part) for part in self._parts(task, job))
                return _condensed(looks) if add else list(looks)

            for found in ahead(pool, work, jobs(spans[::every]), 2 * self.settings.workers):
                yield from found

        found = measured(self._method(task), ScanOf(task, walk))

        def work(job: Sequence[Span]) -> None:
            for part in self._parts(task, job):
                self._write(task, part, found, self._scratch)

        for _ in ahead(pool, work, jobs(spans), 2 * self.settings.workers):
            pass

    # -- parts ------------------------------------------------------------------------------------

    @property
    def _scratch(self) -> Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        return self._local.scratch

    @property
    def _scratch_on_gpu(self) -> on_gpu.OnGpu:
        if not hasattr(self._local, "on_gpu"):
            self._local.on_gpu = on_gpu.OnGpu()
        return self._local.on_gpu

    def _parts(self, task: Task, spans: Iterable[Span]) -> Iterator[MergePart]:
        for span in spans:
            yield read_part(task, span, self._scratch)


def _check_size(merged: Tensor, entries: int, task: Task) -> None:
    """Methods are plugins: one that returns more would write into the next tensor."""
    if merged.numel() != entries:
        raise ModelError(f"the merge method returned {merged.numel()} entries instead of {entries}",
                         where=task.place.name, hint="tell the method's author")  # fmt: skip


def _condensed(values: Iterator[Tensor]) -> list[Tensor]:
    """The values of one job; whole numbers are added up at once, since their order does not matter."""
    found: list[Tensor] = []
    for value in values:
        if found and value.dtype == torch.int64:
            found[0] += value
        else:
            found.append(value)
    return found
