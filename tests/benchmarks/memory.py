"""How much memory a piece of work holds, for scripts that are measured in a separate process."""

from __future__ import annotations

import threading
import time
from types import TracebackType


def anonymous() -> float:
    """This process's anonymous memory, in MiB."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


class Watched:
    """A context manager; after it, `seconds` and `memory`: the peak in MiB above what was there before."""

    def __init__(self) -> None:
        self.seconds = self.memory = 0.0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.memory = max(self.memory, anonymous() - self._before)

    def __enter__(self) -> Watched:
        self._before = anonymous()
        self._started = time.perf_counter()
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._started
        self._done.set()
        self._watcher.join()
