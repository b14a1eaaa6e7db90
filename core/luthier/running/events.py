"""Events: what a run says while it goes on, as JSON lines and to listeners."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Listener = Callable[[Event], None]


class Events:
    """Writes every event to ``events.jsonl`` and hands it to the listeners."""

    def __init__(self, path: Path, listeners: list[Listener]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._listeners = listeners

    def __call__(self, event: str, **values: Any) -> None:
        """Send one event."""
        line: Event = {"time": round(time.time(), 3), "event": event, **values}
        self._file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        for listener in self._listeners:
            listener(line)

    def close(self) -> None:
        """No more events."""
        self._file.close()
