"""Where whole matrices are worked on: on a GPU where there is one and it is faster, with the CPU as a fallback."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

WORTH_IT = 1 << 16
"""Entries from which on a GPU decomposes a matrix faster than a core does, the copies included."""
SHORT = ("out of memory", "ALLOC_FAILED", "cusolverDnCreate")
"""What errors of CUDA and its libraries say when memory is short: not all of them are `torch.OutOfMemoryError`."""
Result = TypeVar("Result")

_local = threading.local()


def best_device(entries: int) -> str:
    """The device for a matrix of so many entries."""
    return "cuda" if entries >= WORTH_IT and torch.cuda.is_available() else "cpu"


def with_cpu_fallback(work: Callable[[str], Result], device: str) -> Result:
    """What `work` returns on a device; on the CPU where the GPU has too little memory left for it."""
    if device != "cpu":
        try:
            # A stream for each thread: a decomposition alone leaves most of a GPU idle.
            with torch.cuda.stream(_stream()):
                return work(device)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in SHORT):
                raise
        # Here, because the error holds on to what was on the GPU.
        torch.cuda.empty_cache()
    return work("cpu")


def _stream() -> Any:
    if torch.cuda.is_available() and not hasattr(_local, "stream"):
        _local.stream = torch.cuda.Stream()
    return getattr(_local, "stream", None)
