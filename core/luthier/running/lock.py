"""One lock per key, so that two runs never make the same artifact at once."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from luthier.api.errors import StoreError

HEARTBEAT = 5.0
STALE_AFTER = 60.0
"""Seconds without a heartbeat after which the lock of another host counts as abandoned."""


class Lock:
    """A lock file with host, pid and heartbeat; a stale one is taken over, and says so.

    Args:
        folder: Where lock files are.
        key: What is locked.
        say: Takes messages for the user.
    """

    def __init__(self, folder: Path, key: str, say: Callable[[str], None]) -> None:
        self.path = folder / f"{key}.lock"
        self._say = say
        self._said = False
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None

    def acquire(self) -> bool:
        """Take the lock if it is free; what it waits for is said once.

        Raises:
            StoreError: the lock file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            taken = self._try()
        except OSError as error:
            raise StoreError(
                f"the lock cannot be written: {error.strerror}",
                where=str(self.path),
                hint="is the store read-only or the disk full? choose another store with --store",
            ) from error
        if taken:
            self._beat = threading.Thread(target=self._keep_beating, daemon=True)
            self._beat.start()
        elif not self._said:
            self._said = True
            self._say(f"waiting for {_who(_read(self.path))}, which makes the same artifact")
        return taken

    def release(self) -> None:
        """Give it back."""
        assert self._beat is not None, "only what was taken is given back"
        self._stop.set()
        self._beat.join()
        with self._guard():
            self.path.unlink(missing_ok=True)

    def _try(self) -> bool:
        with self._guard():
            if self.path.exists():
                owner = _read(self.path)
                if not _stale(owner, self.path):
                    return False
                self._say(f"taking over the lock that {_who(owner)} left behind")
            me = psutil.Process()
            owner = {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}
            self.path.write_text(json.dumps(owner), encoding="utf-8")
            return True

    @contextmanager
    def _guard(self) -> Generator[None]:
        """Makes "read, decide, take" one step among processes that share the file system."""
        with (self.path.parent / ".guard").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            yield

    def _keep_beating(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            # Somebody may have removed the store under a run; the commit will say so.
            with suppress(FileNotFoundError):
                os.utime(self.path)


def is_held(path: Path) -> bool:
    """Whether a lock file belongs to a run that is alive."""
    try:
        return not _stale(_read(path), path)
    except FileNotFoundError:
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _stale(owner: dict[str, Any], path: Path) -> bool:
    if owner.get("host") == socket.gethostname():
        try:
            # The same pid may belong to another process by now: compare its start time too.
            return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > 1.0
        except psutil.NoSuchProcess:
            return True
    return time.time() - path.stat().st_mtime > STALE_AFTER


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
