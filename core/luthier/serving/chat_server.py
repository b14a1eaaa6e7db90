"""OpenAI's chat completions over HTTP, on this machine, for one model that gives one answer at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Protocol, cast

from luthier.api.errors import LuthierError

HOST = "127.0.0.1"
LARGEST_BODY = 1 << 24
USUAL_ANSWER = 256
"""Tokens of an answer, at most, where the request does not say."""


class Answer(Protocol):
    """An answer in pieces; what it was is known once it is read."""

    tokens: int
    finish_reason: Literal["stop", "length"]

    def __iter__(self) -> Iterator[str]: ...


class ChatBackend(Protocol):
    """What answers.

    Its methods raise a `LuthierError` for what it cannot answer.
    """

    def prompt(self, messages: list[Any]) -> list[int]:
        """The tokens of a conversation, open for the assistant."""
        ...

    def answer(self, ids: list[int], limit: int, temperature: float, top_p: float) -> Answer:
        """Answer with at most so many tokens."""
        ...


class ChatServer(ThreadingHTTPServer):
    """Serves a backend on 127.0.0.1.

    Args:
        backend: What answers.
        name: What the model is called.
        port: Where; 0 is any that is free.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, backend: ChatBackend, name: str, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.backend = backend
        self.name = name


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def _chat(self) -> ChatServer:
        return cast("ChatServer", self.server)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what users ask is theirs alone."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(200, {"status": "ok"})
        elif self.path == "/v1/models":
            model = {"id": self._chat.name, "object": "model", "owned_by": "luthier"}
            self._reply(200, {"object": "list", "data": [model]})
        else:
            self._refuse(404, f"there is no {self.path}")

    def do_POST(self) -> None:
        if self.path != "/v1/chat/completions":
            self._refuse(404, f"there is no {self.path}")
            return
        try:
            body = self._body()
            limit = int(body.get("max_tokens") or body.get("max_completion_tokens") or USUAL_ANSWER)
            temperature, top_p = float(body.get("temperature") or 0), float(body.get("top_p") or 1)
            ids = self._chat.backend.prompt(body["messages"])
        except (ValueError, LookupError, TypeError) as error:
            self._refuse(400, f"the request cannot be read: {type(error).__name__}: {error}")
            return
        except LuthierError as error:
            self._refuse(400, str(error))
            return
        answer = self._chat.backend.answer(ids, max(1, limit), temperature, top_p)
        if body.get("stream"):
            self._stream(answer)
        else:
            self._whole(answer, len(ids))

    def _body(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= LARGEST_BODY:
            raise ValueError("the body is empty or too large")
        found = json.loads(self.rfile.read(length))
        if not isinstance(found, dict):
            raise TypeError("the body is not an object")
        return cast("dict[str, Any]", found)

    def _whole(self, answer: Answer, prompt: int) -> None:
        try:
            text = "".join(answer)
        except LuthierError as error:
            self._refuse(500, str(error))
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": answer.finish_reason}
        usage = {"prompt_tokens": prompt, "completion_tokens": answer.tokens, "total_tokens": prompt + answer.tokens}
        self._reply(
            200,
            {
                "object": "chat.completion",
                "created": int(time.time()),
                "model": self._chat.name,
                "choices": [choice],
                "usage": usage,
            },
        )

    def _stream(self, answer: Answer) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for piece in answer:
                self._event({"delta": {"content": piece}, "finish_reason": None})
        except LuthierError as error:
            # Without the end that clients wait for: it is none.
            self._data({"error": {"message": str(error), "code": 500}})
            return
        self._event({"delta": {}, "finish_reason": answer.finish_reason})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, choice: dict[str, Any]) -> None:
        value = {
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": self._chat.name,
            "choices": [{"index": 0, **choice}],
        }
        self._data(value)

    def _data(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()

    def _refuse(self, code: int, message: str) -> None:
        # What was sent may not have been read.
        self.close_connection = True
        self._reply(code, {"error": {"message": message, "code": code}})

    def _reply(self, code: int, value: dict[str, Any]) -> None:
        data = json.dumps(value, ensure_ascii=False).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
