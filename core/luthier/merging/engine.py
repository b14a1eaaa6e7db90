"""Merges tensor by tensor, each in parts, with several workers.

Small parameters are shared out among the workers; a large one is split, and all workers work on it. A part is always
the same rows (`luthier.merging.parts.Grid`), and sums are added up in the order of the parts: the result hangs
neither on the number of workers nor on who was faster. Memory is bounded by workers x (inputs + a few) x part. Methods
that scan a parameter before they merge it keep `KEPT` bytes more, those that select entries by rank another 160 MiB
at most, however many workers there are. A GPU is used where the method says so (`luthier.merging.api.Merge`).
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
from torch import Tensor

from luthier.api import ModelError
from luthier.artifacts.tensors import SIZES
from luthier.merging import gpu_parts
from luthier.merging.api import MergeMethod, MergePart
from luthier.merging.devices import best_device, with_cpu_fallback
from luthier.merging.files import Scratch
from luthier.merging.jobs import PartFunction, ScanOf, Span, TensorJob, read_part
from luthier.merging.parts import Grid, measured
from luthier.merging.pool import MATRIX_COPIES, MEMORY, Budget, ahead, threads
from luthier.merging.writer import Output

CHUNK = 1 << 21
"""Entries in a job on a large parameter, at least one part."""
KEPT = 1 << 27
"""Bytes that all workers together keep of parameters that are needed twice, so that these are not read twice."""
COPY = 1 << 22
"""Bytes copied at once."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the engine works; none of it changes a bit of the result."""

    workers: int = 1
    chunk: int = CHUNK
    memory: int = MEMORY
    niceness: int = 0
    """By how much the workers' priority is below this process's, as in nice(1)."""


class Engine:
    """Runs the jobs of one merge.

    Args:
        method: The merge method of all tensors without their own.
        output: Where results go.
        settings: How to work.
        progress: Called with the entries done and their number.
    """

    def __init__(
        self, method: MergeMethod[Any], output: Output, settings: Settings, progress: Callable[[int, int], None]
    ) -> None:
        self.method = method
        self.output = output
        self.settings = settings
        self.progress = progress
        self._local = threading.local()
        self._budget = Budget(settings.memory)
        self._gpu = Budget(0)

    def run(self, jobs: Sequence[TensorJob]) -> None:
        """Merge all tensors. What a method raises is raised here; the other jobs are given up then."""
        with threads(self.settings.workers, self._lower_priority) as pool:
            self._run(pool, jobs)

    def _lower_priority(self) -> None:
        # Elsewhere it would be the whole process, and for good.
        if self.settings.niceness and sys.platform == "linux":
            thread = threading.get_native_id()
            own = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, own + self.settings.niceness)

    def _run(self, pool: ThreadPoolExecutor, jobs: Sequence[TensorJob]) -> None:
        total = sum(job.entries for job in jobs)
        done = 0
        if sum(job.entries for job in jobs if self._suits_gpu(job)) >= gpu_parts.WORTH_IT:
            self._gpu = Budget(gpu_parts.room())
        small: list[TensorJob] = []
        for job in jobs:
            whole = job.copied or self._method(job).granularity == "matrix" or self._fits_gpu(job)
            if whole or job.entries <= 2 * self.settings.chunk:
                small.append(job)
                continue
            self._split(pool, job)
            done += job.entries
            self.progress(done, total)
        # The largest first, so that no worker is left with one at the end.
        small.sort(key=lambda job: -job.entries)
        pending: set[Future[int]] = {pool.submit(self._whole, job) for job in small}
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                done += sum(future.result() for future in finished)
                self.progress(done, total)
        except BaseException:
            for future in pending:
                future.cancel()
            raise

    def _method(self, job: TensorJob) -> MergeMethod[Any]:
        return job.method or self.method

    # -- one worker, one tensor -------------------------------------------------------------------

    def _whole(self, job: TensorJob) -> int:
        """Merge a tensor in this thread."""
        if job.copied:
            self._copy(job)
        elif self._method(job).granularity == "matrix":
            self._matrix(job)
        elif self._fits_gpu(job):
            with self._gpu.of(gpu_parts.size_of(job)):
                with_cpu_fallback(lambda device: self._by_parts(job, device), "cuda")
        else:
            self._by_parts(job, "cpu")
        return job.entries

    def _by_parts(self, job: TensorJob, device: str) -> None:
        spans = list(Grid.of(job.parameter.shape).spans())
        parts: Sequence[MergePart] | None = None
        scratch = self._scratch
        if device != "cpu":
            scratch = self._scratch_on_gpu
            parts = gpu_parts.uploaded(job, scratch)
        elif self._keeps(job):
            parts = self._kept(job, spans)

        def walk(function: PartFunction, every: int, add: bool) -> Iterator[Tensor]:
            return (function(part) for part in (parts[::every] if parts else self._parts(job, spans[::every])))

        found = measured(self._method(job), ScanOf(job, walk, on_gpu=device != "cpu"))
        for part in parts or self._parts(job, spans):
            self._write(job, part, found, scratch)

    def _device(self, job: TensorJob) -> str:
        """Where a parameter is worked on, as far as there is memory."""
        method = self._method(job)
        suits = method.granularity == "matrix" if method.suits_gpu is None else method.suits_gpu
        return best_device(job.entries) if suits else "cpu"

    def _suits_gpu(self, job: TensorJob) -> bool:
        """Whether a parameter's parts may be worked on on a GPU."""
        matrix = self._method(job).granularity == "matrix"
        return not (job.copied or matrix or job.extras) and self._device(job) != "cpu"

    def _fits_gpu(self, job: TensorJob) -> bool:
        """Whether they are."""
        return self._suits_gpu(job) and gpu_parts.size_of(job) <= self._gpu.limit

    def _keeps(self, job: TensorJob) -> bool:
        """Whether a parameter is read into memory once, because it is needed twice."""
        size = 4 * job.entries * (len(job.operands) + (job.base is not None) + len(job.extras))
        return self._method(job).granularity == "statistics" and size <= KEPT // self.settings.workers

    def _kept(self, job: TensorJob, spans: Sequence[Span]) -> list[MergePart]:
        """All parts at once, each in its own buffers, which are used again for the next parameter."""
        held: list[Scratch] = self._local.__dict__.setdefault("held", [])
        held.extend(Scratch() for _ in range(len(spans) - len(held)))
        return [read_part(job, span, scratch) for span, scratch in zip(spans, held, strict=False)]

    def _write(self, job: TensorJob, part: MergePart, found: Any, scratch: Scratch) -> None:
        merged = self._method(job).merge(replace(part, found=found))
        _check_size(merged, part.tensors[0].numel(), job)
        self.output.write(job.parameter.name, part.start, merged, scratch)

    def _copy(self, job: TensorJob) -> None:
        operand = job.operands[0]
        size = job.entries * SIZES[operand.weights.headers[operand.name].dtype]
        for first in range(0, size, COPY):
            raw = self._scratch.raw(min(COPY, size - first))
            operand.weights.raw(operand.name, first, raw)
            self.output.raw(job.parameter.name, first, raw)

    def _matrix(self, job: TensorJob) -> None:
        if not job.entries:
            return
        prepared = sum(math.prod(files.headers[name].shape) for files, name in job.extras)
        size = 4 * (job.entries * (len(job.operands) + (job.base is not None) + MATRIX_COPIES) + 3 * prepared)
        with self._budget.of(size):
            grid = Grid.of(job.parameter.shape)
            whole = read_part(job, (0, grid.rows), Scratch(), whole=True)
            shape = job.parameter.shape

            def work(device: str) -> Tensor:
                part = MergePart(
                    job.parameter,
                    0,
                    [tensor.view(shape).to(device) for tensor in whole.tensors],
                    job.numbers,
                    None if whole.base is None else whole.base.view(shape).to(device),
                    None,
                    [files.whole(name).to(device) for files, name in job.extras],
                    job.noise,
                )
                return self._method(job).merge(part).cpu().reshape(-1)

            merged = with_cpu_fallback(work, self._device(job))
            _check_size(merged, job.entries, job)
            for first in range(0, merged.numel(), self.settings.chunk):
                self.output.write(job.parameter.name, first, merged[first : first + self.settings.chunk], self._scratch)

    # -- all workers, one tensor ------------------------------------------------------------------

    def _split(self, pool: ThreadPoolExecutor, job: TensorJob) -> None:
        """Merge a large tensor with all workers."""
        grid = Grid.of(job.parameter.shape)
        spans = list(grid.spans())
        several = max(1, self.settings.chunk // (grid.height * grid.columns))

        def batches(spans: Sequence[Span]) -> list[Sequence[Span]]:
            return [spans[first : first + several] for first in range(0, len(spans), several)]

        def walk(function: PartFunction, every: int, add: bool) -> Iterator[Tensor]:
            def work(batch: Sequence[Span]) -> list[Tensor]:
                values = (function(part) for part in self._parts(job, batch))
                return _condensed(values) if add else list(values)

            for found in ahead(pool, work, batches(spans[::every]), 2 * self.settings.workers):
                yield from found

        found = measured(self._method(job), ScanOf(job, walk))

        def work(batch: Sequence[Span]) -> None:
            for part in self._parts(job, batch):
                self._write(job, part, found, self._scratch)

        for _ in ahead(pool, work, batches(spans), 2 * self.settings.workers):
            pass

    # -- parts ------------------------------------------------------------------------------------

    @property
    def _scratch(self) -> Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        return self._local.scratch

    @property
    def _scratch_on_gpu(self) -> gpu_parts.OnGpu:
        if not hasattr(self._local, "on_gpu"):
            self._local.on_gpu = gpu_parts.OnGpu()
        return self._local.on_gpu

    def _parts(self, job: TensorJob, spans: Iterable[Span]) -> Iterator[MergePart]:
        for span in spans:
            yield read_part(job, span, self._scratch)


def _check_size(merged: Tensor, entries: int, job: TensorJob) -> None:
    """Methods are plugins: one that returns more would write into the next tensor."""
    if merged.numel() != entries:
        raise ModelError(
            f"the merge method returned {merged.numel()} entries instead of {entries}",
            where=job.parameter.name,
            hint="report this to the method's author",
        )


def _condensed(values: Iterator[Tensor]) -> list[Tensor]:
    """The values of one job; whole numbers are added up at once, since their order does not matter."""
    found: list[Tensor] = []
    for value in values:
        if found and value.dtype == torch.int64:
            found[0] += value
        else:
            found.append(value)
    return found
