"""A server with OpenAI's chat completions that a test writes the answers of, good ones or bad ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Request = dict[str, Any]


@dataclass
class Reply:
    """What the server sends, in place of a completion."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    cut: int | None = None
    """Bytes after which the connection breaks."""


def error(status: int, message: str, **headers: str) -> Reply:
    """An error as OpenAI's servers send it."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": None}}).encode()
    return Reply(status, body, {"Content-Type": "application/json", **headers})


def completion(text: str, reason: str = "stop", prompt_tokens: int = 10) -> Reply:
    """A completion; its tokens are its words."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(text.split()),
        "total_tokens": prompt_tokens + len(text.split()),
    }
    about = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return Reply(body=json.dumps(about).encode())


@dataclass
class Server:
    """The server, and what it was asked."""

    url: str
    requests: list[Request] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0

    @property
    def texts(self) -> list[str]:
        """The last turn of each request."""
        return [request["messages"][-1]["content"] for request in self.requests]


@contextmanager
def chat_api(answer: Callable[[Request], Reply | str]) -> Iterator[Server]:
    """A server on 127.0.0.1 that answers each request with what a function says."""
    lock = threading.Lock()
    now = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(Reply(body=json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()))

        def do_POST(self) -> None:
            nonlocal now
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                now += 1
                server.most_at_once = max(server.most_at_once, now)
                server.requests.append(request)
                server.keys.append(self.headers.get("Authorization"))
            try:
                found = answer(request)
                self._send(completion(found) if isinstance(found, str) else found)
            finally:
                with lock:
                    now -= 1

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body[: reply.cut])
            self.close_connection = reply.cut is not None

        def log_message(self, *parts: Any) -> None:
            """Nothing is printed."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
