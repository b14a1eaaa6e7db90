"""Stands before llama.cpp's server, which obeys the names of control tokens wherever a message has them."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import urllib.parse
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from luthier.serving.http_body import BodyError, has_left, read_body

HOST = "127.0.0.1"
SECONDS = 600
WATCHED = 0.2
"""Seconds between two looks at whether a client is still there."""
PIECE = 1 << 16
"""Bytes of an answer that are passed on at a time, at most."""
RAW = ("/completion", "/completions", "/tokenize", "/detokenize", "/embedding", "/embeddings", "/infill")
"""Ends of paths at which a client says by itself what control tokens there are: no message is rendered."""
OWN = ("connection", "content-length", "host", "transfer-encoding")
"""Headers that hold for one connection alone."""


@contextmanager
def guarded(server: str, port: int, obeys: Callable[[str], bool]) -> Generator[str]:
    """A server that passes requests on, but for messages that would be obeyed; gives its address.

    Args:
        server: The address of llama.cpp's server.
        port: Where this one listens.
        obeys: Whether llama.cpp would make a control token of a part of a text.
    """
    guard = _Guard(server, port, obeys)
    thread = threading.Thread(target=guard.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{guard.server_port}"
    finally:
        guard.shutdown()
        guard.server_close()
        thread.join()


@contextmanager
def _left_behind(client: socket.socket, connection: http.client.HTTPConnection) -> Generator[None]:
    """Hang up on llama.cpp as soon as the client has left, while its answer is waited for."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(WATCHED):
            if has_left(client) and connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Guard(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, server: str, port: int, obeys: Callable[[str], bool]) -> None:
        super().__init__((HOST, port), _Handler)
        self.behind = urllib.parse.urlsplit(server).netloc
        self.obeys = obeys


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def _guard(self) -> _Guard:
        return cast("_Guard", self.server)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what users ask is theirs alone."""

    def do_GET(self) -> None:
        self._pass_on(None)

    def do_OPTIONS(self) -> None:
        self._pass_on(None)

    def do_POST(self) -> None:
        try:
            body = read_body(self)
        except BodyError as error:
            self._refuse(error.status, str(error))
            return
        if not self.path.partition("?")[0].endswith(RAW) or self.path.endswith("/chat/completions"):
            try:
                odd = next((text for text in _texts(json.loads(body)) if self._guard.obeys(text)), None)
            except (ValueError, RecursionError):
                # llama.cpp says what is wrong with it.
                odd = None
            if odd is not None:
                self._refuse(400, "a text of the request holds the name of a control token, which would be obeyed")
                return
        self._pass_on(body)

    def _pass_on(self, body: bytes | None) -> None:
        connection = http.client.HTTPConnection(self._guard.behind, timeout=SECONDS)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in OWN}
        try:
            connection.request(self.command, self.path, body, headers)
            with _left_behind(self.connection, connection):
                reply = connection.getresponse()
            self.send_response(reply.status)
            for name, value in reply.getheaders():
                if name.lower() not in OWN:
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.close_connection = True
            self.end_headers()
            while piece := reply.read1(PIECE):
                self.wfile.write(piece)
                self.wfile.flush()
        except (OSError, http.client.HTTPException):
            # Whoever of the two is gone: llama.cpp stops when its reader has left.
            self.close_connection = True
        finally:
            connection.close()

    def _refuse(self, code: int, message: str) -> None:
        data = json.dumps({"error": {"message": message, "code": code}}).encode()
        self.close_connection = True
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _texts(value: Any) -> Iterator[str]:
    """Every text of a request but those to stop at, which stand in no prompt."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in cast("dict[str, Any]", value).items():
            if key != "stop":
                yield from _texts(item)
    elif isinstance(value, list):
        for item in cast("list[Any]", value):
            yield from _texts(item)
