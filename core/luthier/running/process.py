"""The worker's process as the runner sees it: jobs go in, events come out, and how it ended."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from luthier.api.protocols import Executor
from luthier.running.events import Event
from luthier.worker.job import Job

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
ALLOCATOR = {
    # glibc gives tensors of 128 KB and more back to the system at once, and takes them anew for the next operation;
    # clearing these pages again and again takes up to a tenth of a small model's training.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20), "MALLOC_TOP_PAD_": str(4 << 20),
}  # fmt: skip


class WorkerProcess:
    """The worker's process and the thread that reads its events."""

    def __init__(self, executor: Executor, log: Path) -> None:
        environment = {**QUIET, **ALLOCATOR, **os.environ}
        command = [sys.executable, "-m", "luthier.worker.worker"]
        self._process = executor.launch(command, environment, log)
        self._log = log
        self._events: queue.Queue[Event] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put(json.loads(line))
        code = self._process.wait()
        self._events.put({"event": "died", **_exit_report(code, self._log)})

    def send(self, job: Job) -> None:
        assert self._process.stdin is not None
        # A worker that died meanwhile is reported through its events.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job.to_json()) + "\n")
            self._process.stdin.flush()

    def next_event(self) -> Event | None:
        """The next event, or None after a moment without one."""
        try:
            return self._events.get(timeout=0.2)
        except queue.Empty:
            return None

    def stop(self) -> None:
        """Ask for a checkpoint and the end of the running stage."""
        self._process.terminate()

    def kill(self) -> None:
        """End it now."""
        self._process.kill()

    def close(self) -> None:
        """No more jobs."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def _exit_report(code: int, log: Path) -> dict[str, str]:
    if code >= 0:
        return {"message": f"the worker ended with exit code {code}", "hint": f"its log: {log}"}
    name = signal.Signals(-code).name
    why = " (often the sign of too little memory)" if name == "SIGKILL" else ""
    return {
        "message": f"the worker was ended by {name}{why}",
        "hint": f"run again: finished stages are kept, training resumes from its checkpoint; log: {log}",
    }
