"""Reads what a client sends over HTTP, with a length or in chunks; and notices when it has left."""

from __future__ import annotations

import json
import select
import socket
from http.server import BaseHTTPRequestHandler
from typing import Any, cast

LARGEST = 1 << 24
"""Bytes of a body, at most."""
LONGEST_LINE = 1 << 12


class BodyError(Exception):
    """A body that cannot be read.

    Attributes:
        status: HTTP's number for the reason.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def read_body(handler: BaseHTTPRequestHandler) -> bytes:
    """The body of a request.

    Raises:
        BodyError: it is too large, or not sent as HTTP says.
    """
    coding = (handler.headers.get("Transfer-Encoding") or "").strip().lower()
    length = handler.headers.get("Content-Length")
    if coding:
        if coding != "chunked" or length is not None:
            raise BodyError(400, "a body has a Content-Length, or is in chunks: not both, and in no other encoding")
        return _chunks(handler)
    if length is None:
        raise BodyError(411, "the request says no Content-Length")
    if not length.strip().isdecimal():
        raise BodyError(400, f"the Content-Length {length!r} is no number")
    if int(length) > LARGEST:
        raise BodyError(413, f"the body has {length} bytes, at most {LARGEST} are read")
    body = handler.rfile.read(int(length))
    if len(body) < int(length):
        raise BodyError(400, "the body ends before its Content-Length")
    return body


def _chunks(handler: BaseHTTPRequestHandler) -> bytes:
    """A body in chunks (RFC 9112, section 7.1)."""
    parts: list[bytes] = []
    size = 0
    while True:
        line = handler.rfile.readline(LONGEST_LINE).partition(b";")[0].strip()
        try:
            count = int(line, 16)
        except ValueError as error:
            raise BodyError(400, "a chunk does not begin with its size") from error
        size += count
        if count < 0 or size > LARGEST:
            raise BodyError(413, f"the body is larger than the {LARGEST} bytes that are read")
        if count == 0:
            break
        part = handler.rfile.read(count)
        if len(part) < count or handler.rfile.readline(LONGEST_LINE).strip():
            raise BodyError(400, "a chunk is not as long as it says")
        parts.append(part)
    # What may follow the last chunk, up to an empty line.
    while handler.rfile.readline(LONGEST_LINE).strip():
        pass
    return b"".join(parts)


def read_object(handler: BaseHTTPRequestHandler) -> dict[str, Any]:
    """The JSON object that a request sends.

    Raises:
        BodyError: it sends none.
    """
    body = read_body(handler)

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no number in JSON")

    try:
        found = json.loads(body, parse_constant=refuse)
    except RecursionError as error:
        raise BodyError(400, "the body is nested too deep") from error
    except ValueError as error:
        raise BodyError(400, f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BodyError(400, "the body is not an object")
    return cast("dict[str, Any]", found)


def has_left(client: socket.socket) -> bool:
    """Whether a client has closed its connection."""
    try:
        ready, _, _ = select.select([client], [], [], 0)
        return bool(ready) and client.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        # It was closed from this side.
        return True
