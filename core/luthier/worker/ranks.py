"""Stages that several processes compute together: torchrun starts the ranks, rank 0 alone reports.

``python -m luthier.worker.ranks JOB EVENTS`` is one rank. The event that ends the job comes from rank 0; a rank that
fails leaves its own in a file, so that the stage ends with that rank's error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

import psutil

from luthier.registry import default_registry
from luthier.worker.context import Listener
from luthier.worker.execute import execute
from luthier.worker.job import Job

POLL = 0.2
WORKER = "LUTHIER_WORKER_PID"
"""The variable with the process that takes a rank's events: a rank ends with it, and with the torchrun above it."""
ENDS = ("result", "failed", "interrupted")


def execute_with_ranks(job: Job, listener: Listener) -> dict[str, Any]:
    """Run a job in `job.ranks` processes.

    Returns:
        The event that says how it ended.
    """
    scratch = Path(job.scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    for path in scratch.glob("rank-*.failed.json"):
        path.unlink()
    described, pipe = scratch / "job.json", scratch / "events.pipe"
    described.write_text(json.dumps(job.to_json()), encoding="utf-8")
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    last: list[dict[str, Any]] = []
    # Opened for both, so that opening does not wait and reading ends only when it is closed here.
    reading = os.fdopen(os.open(pipe, os.O_RDWR), encoding="utf-8")
    reader = threading.Thread(target=_forward, args=(reading, listener, last), daemon=True)
    reader.start()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(job.ranks),
        "-m",
        "luthier.worker.ranks",
        str(described),
        str(pipe),
    ]
    # What ranks print goes to the log, like everything that is not an event.
    own = {**os.environ, WORKER: str(os.getpid())}
    process = subprocess.Popen(command, stdout=sys.stderr.fileno(), stderr=sys.stderr.fileno(), env=own)
    asked = False
    while process.poll() is None:
        if listener.stopping() and not asked:
            asked = True
            process.send_signal(signal.SIGTERM)
        threading.Event().wait(POLL)
    with pipe.open("w", encoding="utf-8") as end:
        end.write(json.dumps({"event": "end"}) + "\n")
    reader.join()
    reading.close()
    # The first is the reason: the others lost their connection to it.
    failed = sorted(scratch.glob("rank-*.failed.json"), key=lambda path: path.stat().st_mtime_ns)
    if failed:
        return json.loads(failed[0].read_text(encoding="utf-8"))
    if last and (process.returncode == 0 or last[0]["event"] != "result"):
        return last[0]
    if asked:
        return {"event": "interrupted", "stage": job.stage, "message": "stopped on request"}
    message = f"one of {job.ranks} ranks ended without reporting an error (exit code {process.returncode} of torchrun)"
    return {
        "event": "failed",
        "stage": job.stage,
        "known": True,
        "type": "StageError",
        "message": message,
        "where": None,
        "hint": "see the worker's log for its output",
        "traceback": message,
    }


def _forward(events: TextIO, listener: Listener, last: list[dict[str, Any]]) -> None:
    for line in events:
        event = json.loads(line)
        if event["event"] == "end":
            return
        if event["event"] in ENDS:
            last.append(event)
        else:
            listener.send(event)


class _Rank:
    """Where a rank's events go."""

    def __init__(self, pipe: str) -> None:
        self.stop = threading.Event()
        self._pipe = open(pipe, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - open as long as the process lives

    def send(self, event: dict[str, Any]) -> None:
        self._pipe.write(json.dumps(event, ensure_ascii=False, default=str) + "\n")

    def stopping(self) -> bool:
        return self.stop.is_set()


def _end_with(worker: int, torchrun: int) -> None:
    """End this process when one of those that started it is gone: no one would take what it computes."""
    while os.getppid() == torchrun and psutil.pid_exists(worker):
        threading.Event().wait(POLL)
    os._exit(1)


def main() -> None:
    """Entry point of one rank."""
    watched = (int(os.environ[WORKER]), os.getppid())
    threading.Thread(target=_end_with, args=watched, daemon=True).start()
    described, pipe = sys.argv[1:]
    job = Job(**json.loads(Path(described).read_text(encoding="utf-8")))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    listener = _Rank(pipe)
    signal.signal(signal.SIGTERM, lambda number, frame: listener.stop.set())
    ended = execute(job, default_registry(), listener, rank=rank, world=world)
    if ended["event"] == "failed":
        path = Path(job.scratch) / f"rank-{rank}.failed.json"
        path.write_text(json.dumps(ended), encoding="utf-8")
        # torchrun ends the other ranks, which would wait for this one.
        sys.exit(1)
    if rank == 0:
        listener.send(ended)


if __name__ == "__main__":
    main()
