"""Digests of values, files and folders: what keys are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def canonical(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_value(value: Any) -> str:
    """The sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def digest_file(path: Path, read: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file's bytes.

    Args:
        path: The file.
        read: Is told of so many bytes more, from time to time.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if read is not None:
                read(count)
    return digest.hexdigest()


def files_in(folder: Path, *, sort: bool = True) -> Iterator[Path]:
    """All files below a folder, by default sorted by relative path; hidden files and folders are left out."""
    found = folder.rglob("*")
    for path in sorted(found) if sort else found:
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path
