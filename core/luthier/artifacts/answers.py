"""Answers that are kept: each is on disk before anything is done with it, and nobody pays for it a second time."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

from luthier.api.data import Conversation
from luthier.api.errors import StoreError
from luthier.api.serving import Completion, Request, Sampling

ANSWERS = "answers"
"""The folder of a store's cache that holds them."""


class KeptAnswers:
    """Answers to requests, in a folder that several processes may write to. A context manager.

    Every answer is a line of its own, flushed to the disk before it is handed on. A process appends to a file that is
    its alone; a line that a crash cut off is left out.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Completion] = {}
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        for path in sorted(folder.glob("*.jsonl")):
            self._read(path)

    def _read(self, path: Path) -> None:
        with path.open("rb") as lines:
            for line in lines:
                try:
                    found: Any = json.loads(line)
                    self._known.setdefault(found.pop("request"), Completion(**found))
                except (ValueError, AttributeError, KeyError, TypeError):
                    if line.endswith(b"\n"):
                        raise StoreError(
                            "a kept answer cannot be read", where=str(path), hint="move the file away, and run again"
                        ) from None

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Completion | None:
        """The answer that is kept under a key, see `key_of`."""
        return self._known.get(key)

    def keep(self, key: str, completion: Completion) -> None:
        """Write an answer to the disk; threads may call it side by side."""
        # Escaped: a lone surrogate, which an answer may hold, is no UTF-8.
        line = json.dumps({"request": key, **asdict(completion)}) + "\n"
        with self._lock:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = (self._folder / f"{os.getpid()}-{secrets.token_hex(4)}.jsonl").open("xb")
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._known[key] = completion

    def close(self) -> None:
        """Close the file that it writes."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def key_of(request: Request, sampling: Sampling, number: int) -> str:
    """What an answer is kept under: its request, how it was drawn, and which of several it is."""
    talk = Conversation.of(request)
    asked: Mapping[str, Any] = {
        "messages": cast("Sequence[Any]", list(talk)),
        "tools": talk.tools,
        "sampling": asdict(replace(sampling, n=1)),
        "number": number,
    }
    text = json.dumps(asked, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
