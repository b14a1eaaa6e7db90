"""Ctrl-C and SIGTERM during a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any


class Signals:
    """Routes SIGINT and SIGTERM to a callback during a run, in the main thread only."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._received)

    def _received(self, number: int, frame: object) -> None:
        self._callback()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
