"""Which precision to compute in, on the machine that computes."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Literal

import torch

from luthier.artifacts.digest import digest_value

Precision = Literal["fp32", "bf16"]
PAYS = 1.5
"""How many times faster bf16 has to multiply matrices on a CPU: what surrounds them is slower in it."""
SMALL = 512
"""Matrices below this width spend their time on other things."""
ROWS = 512
"""Rows of the matrices that are timed."""
SECONDS = 0.4
"""How long each precision is timed."""


def best_precision(device: str, width: int, cache: Path) -> Precision:
    """bf16 where the device computes faster in it.

    A GPU says so itself. A CPU is timed for about a second, once for each store, so that all stages of it compute in
    the same way.

    Args:
        device: ``cpu`` or ``cuda``.
        width: The model's hidden size.
        cache: A folder that keeps what was found.
    """
    if device != "cpu":
        return "bf16" if has_bf16() else "fp32"
    if width < SMALL:
        return "fp32"
    about = [
        platform.machine(),
        platform.processor(),
        os.cpu_count(),
        torch.get_num_threads(),
        torch.__version__,
        width,
    ]
    file = cache / "probes" / f"{digest_value(about)}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))["precision"]
    ratio = _seconds(torch.float32, width) / _seconds(torch.bfloat16, width)
    found: Precision = "bf16" if ratio > PAYS else "fp32"
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps({"precision": found, "faster": ratio}), encoding="utf-8")
    new.replace(file)
    return found


def has_bf16() -> bool:
    """Whether the GPU computes in bfloat16 itself."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _seconds(dtype: torch.dtype, width: int) -> float:
    """The shortest time of one product."""
    values, weight = torch.ones(ROWS, width, dtype=dtype), torch.ones(2 * width, width, dtype=dtype)
    best = float("inf")
    until = time.perf_counter() + SECONDS
    while (started := time.perf_counter()) < until or best == float("inf"):
        torch.nn.functional.linear(values, weight)
        best = min(best, time.perf_counter() - started)
    return best
