"""The worker process: imports the heavy libraries once and runs stages in turn.

Jobs come in on stdin, events go out on what was stdout; whatever libraries print goes to the log.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from queue import Queue
from typing import Any, TextIO

from luthier.registry import default_registry
from luthier.worker.execute import execute
from luthier.worker.job import Job


class Worker:
    """Runs the jobs that come in until stdin closes."""

    def __init__(self, events: TextIO) -> None:
        self.stop = threading.Event()
        self._events = events
        self._jobs: Queue[dict[str, Any]] = Queue()

    def send(self, event: dict[str, Any]) -> None:
        """Send one event to the runner."""
        self._events.write(json.dumps(event, ensure_ascii=False, default=str) + "\n")
        self._events.flush()

    def stopping(self) -> bool:
        """Whether the runner asked for a checkpoint and the end."""
        return self.stop.is_set()

    def serve(self) -> None:
        """Run jobs in turn."""
        threading.Thread(target=self._read, daemon=True).start()
        registry = default_registry()
        while True:
            job = Job(**self._jobs.get())
            if job.ranks > 1:
                # Only where it is needed: it starts its own processes.
                from luthier.worker.ranks import execute_with_ranks

                self.send(execute_with_ranks(job, self))
            else:
                self.send(execute(job, registry, self))

    def _read(self) -> None:
        for line in sys.stdin:
            self._jobs.put(json.loads(line))
        # The runner is gone (or is done): no one would take a result, so stop.
        os._exit(0)


def main() -> None:
    """Entry point of ``python -m luthier.worker.worker``."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(events)
    # Libraries make hundreds of thousands of objects that stay: looking through them again and again while they are
    # imported takes as much as a fifth of the time.
    gc.set_threshold(10_000)
    signal.signal(signal.SIGTERM, lambda number, frame: worker.stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker.serve()


if __name__ == "__main__":
    main()
