"""Threads that share out tensors: one compute thread each, so that the number of cores changes no bit."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

MEMORY = 2 << 30
"""Bytes that work on whole matrices may hold at once, unless one matrix alone needs more."""
MATRIX_COPIES = 6
"""How many copies of a matrix a decomposition needs beside its inputs, at most."""
Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(slots=True)
class Budget:
    """Admits work as far as the memory goes; one piece alone is always admitted."""

    limit: int
    used: int = 0
    condition: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Wait until so many bytes are left, and take them inside the context."""
        with self.condition:
            self.condition.wait_for(lambda: self.used == 0 or self.used + size <= self.limit)
            self.used += size
        try:
            yield
        finally:
            with self.condition:
                self.used -= size
                self.condition.notify_all()


@contextmanager
def threads(workers: int, begin: Callable[[], None] = lambda: None) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that compute with one core each.

    Args:
        workers: How many.
        begin: What each does first.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=begin) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[Job], Result], jobs: Sequence[Job], window: int
) -> Iterator[Result]:
    """The results in the order of the jobs, with at most `window` of them under way or waiting."""
    pending: list[Future[Result]] = []
    try:
        for job in jobs:
            pending.append(pool.submit(work, job))
            if len(pending) >= window:
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()
    finally:
        for future in pending:
            future.cancel()


def by_matrix(work: Callable[[Job], Result], jobs: Sequence[Job], entries: Callable[[Job], int]) -> Generator[Result]:
    """The results of work on whole matrices in the order of the jobs, from as many threads as there are cores.

    Args:
        work: Does one job.
        jobs: All jobs.
        entries: How many entries a job's matrices have.
    """
    budget = Budget(MEMORY)

    def admitted(job: Job) -> Result:
        with budget.of(4 * MATRIX_COPIES * entries(job)):
            return work(job)

    with threads(cores()) as pool:
        yield from ahead(pool, admitted, jobs, 2 * cores())
