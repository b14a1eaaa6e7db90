"""One lock per key, so that two runs never make the same artifact at once."""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
        self._owner: Owner | None = None
        self._seen: tuple[float, float] | None = None
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
            self._say(f"waiting for {self._owner}, which makes the same artifact")
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
            with suppress(FileNotFoundError):
                self._owner = _read(self.path)
                if self._owner is not None and not self._owner.ended and not self._silent():
                    return False
                self._say(f"taking over the lock that {self._owner or 'an unknown process'} left behind")
            me = psutil.Process()
            owner = {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}
            self.path.write_text(json.dumps(owner), encoding="utf-8")
            return True

    def _silent(self) -> bool:
        """Whether the owner, on another machine, has given no sign for so long that it counts as gone.

        What counts is that the time of the file changes, whatever it is: clocks differ.
        """
        if self._owner is None or self._owner.host == socket.gethostname():
            return False
        stamp, now = self.path.stat().st_mtime, time.monotonic()
        if self._seen is None or self._seen[0] != stamp:
            self._seen = (stamp, now)
        age = time.time() - stamp
        return age > STALE_AFTER or now - self._seen[1] > STALE_AFTER

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
        owner = _read(path)
        if owner is None or owner.ended:
            return False
        if owner.host == socket.gethostname():
            return True
        stamp = path.stat().st_mtime
        if stamp > time.time() + STALE_AFTER:
            # From the future: only whether it goes on says whether anybody is there.
            time.sleep(2 * HEARTBEAT)
            return path.stat().st_mtime != stamp
        return time.time() - stamp <= STALE_AFTER
    except FileNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a lock, as the lock file says.

    Attributes:
        host: The machine.
        pid: The process.
        started: When it was started, in seconds since 1970: the same number may be another process by now.
    """

    host: str
    pid: int
    started: float

    @property
    def ended(self) -> bool:
        """Whether it is a process of this machine that is no more, or has ended and was not waited for."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 1.0
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _read(path: Path) -> Owner | None:
    """The owner of a lock; None where the file says none, which only a process leaves that ended while it wrote.

    Raises:
        FileNotFoundError: there is no lock.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        owner = Owner(str(found["host"]), int(found["pid"]), float(found["started"]))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None
    return owner if owner.pid > 0 and math.isfinite(owner.started) else None
