"""Events: what a run reports as it proceeds, as JSON lines and to listeners."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from luthier.api.execution import Event

Listener = Callable[[Event], None]


class Events:
    """Writes every event to ``events.jsonl`` and hands it to the listeners."""

    def __init__(self, path: Path, listeners: list[Listener]) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._listeners = listeners
        self._full = False

    def __call__(self, event: str, **values: Any) -> None:
        """Send one event."""
        line: Event = {"time": round(time.time(), 3), "event": event, **values}
        self._write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        for listener in self._listeners:
            listener(line)

    def _write(self, text: str) -> None:
        # A disk that is full ends stages, with a message; it must not end the telling of it.
        try:
            self._file.write(text)
        except OSError as error:
            if not self._full:
                self._full = True
                warning = f"the run's events can no longer be written: {error.strerror}"
                for listener in self._listeners:
                    listener({"time": round(time.time(), 3), "event": "warning", "message": warning})

    def close(self) -> None:
        """No more events."""
        with suppress(OSError):
            self._file.close()
