"""OpenAI's chat completions over HTTP, on this machine, for one model that gives one answer at a time."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Protocol, cast

from luthier.api.errors import LuthierError
from luthier.serving.chat_request import ChatRequest, RequestError, chat_request
from luthier.serving.http_body import BodyError, has_left, read_object

HOST = "127.0.0.1"
COMPLETIONS = "/v1/chat/completions"


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

    def answer(self, ids: list[int], request: ChatRequest, number: int, left: Callable[[], bool]) -> Answer:
        """Answer a prompt.

        Args:
            ids: Its tokens.
            request: What is asked for.
            number: Which of its answers.
            left: Whether the client has left: nobody reads the answer then.
        """
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

    daemon_threads = True

    def __init__(self, backend: ChatBackend, name: str, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.backend = backend
        self.name = name


@dataclass(frozen=True, slots=True)
class _Reply:
    """What all objects of one reply have."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**about, "choices": choices, **more}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def _chat(self) -> ChatServer:
        return cast("ChatServer", self.server)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what users ask is theirs alone."""

    def do_GET(self) -> None:
        model = {"id": self._chat.name, "object": "model", "owned_by": "luthier"}
        if self.path == "/health":
            self._reply(200, {"status": "ok"})
        elif self.path == "/v1/models":
            self._reply(200, {"object": "list", "data": [model]})
        elif self.path == f"/v1/models/{self._chat.name}":
            self._reply(200, model)
        else:
            self._refuse(404, f"there is no {self.path}")

    def do_POST(self) -> None:
        if self.path != COMPLETIONS:
            self._refuse(404, f"there is no {self.path}, only {COMPLETIONS}")
            return
        try:
            request = chat_request(read_object(self), self._chat.name)
            ids = self._chat.backend.prompt(request.messages)
        except (BodyError, RequestError) as error:
            self._refuse(error.status, str(error))
            return
        except LuthierError as error:
            self._refuse(400, str(error))
            return
        try:
            if request.stream:
                self._stream(ids, request)
            else:
                self._whole(ids, request)
        except (ConnectionError, TimeoutError):
            # Nobody is there any more.
            self.close_connection = True

    def _answer(self, ids: list[int], request: ChatRequest, number: int) -> Answer:
        return self._chat.backend.answer(ids, request, number, lambda: has_left(self.connection))

    def _whole(self, ids: list[int], request: ChatRequest) -> None:
        choices: list[dict[str, Any]] = []
        tokens = 0
        for number in range(request.n):
            answer = self._answer(ids, request, number)
            try:
                text = "".join(answer)
            except LuthierError as error:
                self._refuse(500, str(error))
                return
            message = {"role": "assistant", "content": text}
            choices.append({"index": number, "message": message, "finish_reason": answer.finish_reason})
            tokens += answer.tokens
        self._reply(200, _Reply(self._chat.name).object("chat.completion", choices, usage=_usage(ids, tokens)))

    def _stream(self, ids: list[int], request: ChatRequest) -> None:
        answer = self._answer(ids, request, 0)
        reply = _Reply(self._chat.name)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

        def say(delta: dict[str, Any], reason: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            more = {"usage": None} if request.usage else {}
            self._data(reply.object("chat.completion.chunk", [choice], **more))

        say({"role": "assistant", "content": ""})
        try:
            for piece in answer:
                say({"content": piece})
        except LuthierError as error:
            # Without the end that clients wait for: it is none.
            self._data({"error": {"message": str(error), "code": 500}})
            return
        say({}, answer.finish_reason)
        if request.usage:
            self._data(reply.object("chat.completion.chunk", [], usage=_usage(ids, answer.tokens)))
        self.wfile.write(b"data: [DONE]\n\n")

    def _data(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()

    def _refuse(self, code: int, message: str) -> None:
        # What was sent may not have been read.
        self.close_connection = True
        self._reply(code, {"error": {"message": message, "code": code}})

    def _reply(self, code: int, value: dict[str, Any]) -> None:
        data = json.dumps(value, ensure_ascii=False).encode(errors="replace")
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _usage(ids: list[int], tokens: int) -> dict[str, int]:
    return {"prompt_tokens": len(ids), "completion_tokens": tokens, "total_tokens": len(ids) + tokens}
