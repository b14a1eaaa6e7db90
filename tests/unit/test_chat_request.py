"""Every field of a request is honoured or refused, and every body is read or refused."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
from luthier.serving.chat_request import ChatRequest, RequestError, chat_request
from luthier.serving.chat_server import ChatServer
from luthier.serving.serve import StreamedAnswer

ASKED: list[Any] = [{"role": "user", "content": "Who is there?"}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logprobs": True}, "`logprobs`"),
        ({"top_logprobs": 2}, "`top_logprobs`"),
        ({"tools": [{}]}, "`tools`"),
        ({"tool_choice": "required"}, "`tool_choice`"),
        ({"response_format": {"type": "json_object"}}, "`response_format`"),
        ({"presence_penalty": 0.5}, "`presence_penalty`"),
        ({"logit_bias": {"5": 1}}, "`logit_bias`"),
        ({"top_k": 5}, "`top_k` is no field"),
        ({"stream_options": {"include_usage": True}}, "belongs to `stream: true`"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        ({"stream": 1}, "`stream` is 1"),
        ({"stream": True, "n": 2}, "several answers are not streamed"),
        ({"n": 0}, "`n` is 0"),
        ({"n": 2.0}, "not a whole number"),
        ({"n": True}, "not a whole number"),
        ({"max_tokens": 0}, "`max_tokens` is 0"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "two names for one limit"),
        ({"temperature": -1}, "`temperature` is -1"),
        ({"temperature": float("nan")}, "not a number"),
        ({"temperature": "0.5"}, "not a number"),
        ({"top_p": 1.5}, "`top_p` is 1.5"),
        ({"seed": 1.5}, "`seed` is 1.5"),
        ({"stop": ""}, "`stop` is a text"),
        ({"stop": ["a", 3]}, "`stop` is a text"),
        ({"model": "another"}, "there is no model 'another'"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": [3]}, "message 0 is not an object"),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, "has `name`"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text \\('image_url'\\)"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "no text"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        chat_request({"messages": ASKED, **fields}, "m")


def test_what_asks_for_nothing_is_taken() -> None:
    neutral = {
        "model": "m", "user": "me", "metadata": {"a": 1}, "frequency_penalty": 0.0, "logprobs": False, "tools": [],
        "tool_choice": "auto", "response_format": {"type": "text"}, "n": 1, "stop": None, "seed": None, "stream": False,
    }  # fmt: skip
    found = chat_request({"messages": ASKED, **neutral}, "m")
    assert (found.n, found.stop, found.seed, found.stream, found.greedy) == (1, (), None, False, True)


def test_what_is_asked_for_is_understood() -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "is there?"}]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "max_completion_tokens": 7,
        "temperature": 2,
        "top_p": 0,
        "n": 3,
        "seed": -4,
        "stop": "x",
    }
    found = chat_request(body, "m")
    assert found == ChatRequest(ASKED, 7, 2.0, 0.0, 3, -4, ("x",), False, False)
    # Nothing but the best token is left to draw from.
    assert found.greedy


def cut(pieces: list[str], *stops: str) -> tuple[str, str]:
    answer = StreamedAnswer(None, [], {}, stops, None, lambda: False)  # type: ignore[arg-type]
    return "".join(answer.cut(iter(pieces))), answer.finish_reason


def test_an_answer_ends_before_the_first_stop_however_it_comes() -> None:
    text = "one two END three STOP"
    for size in range(1, len(text)):
        pieces = [text[place : place + size] for place in range(0, len(text), size)]
        assert cut(pieces, "STOP", "END") == ("one two ", "stop")
        assert cut(pieces, "none") == (text, "length")
    assert cut(["a EN", "D"], "END") == ("a ", "stop")
    assert cut(["a EN", "T"], "END") == ("a ENT", "length")


class Slow:
    """Answers word by word until its client has left."""

    def __init__(self, left: Callable[[], bool], seen: list[str]) -> None:
        self.tokens = 0
        self.finish_reason: Literal["stop", "length"] = "stop"
        self._left, self._seen = left, seen

    def __iter__(self) -> Iterator[str]:
        while not self._left() and self.tokens < 200:
            self.tokens += 1
            time.sleep(0.02)
            yield "word "
        self._seen.append("left" if self._left() else "done")


class Backend:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def prompt(self, messages: list[Any]) -> list[int]:
        return [1, 2]

    def answer(self, ids: list[int], request: ChatRequest, number: int, left: Callable[[], bool]) -> Slow:
        return Slow(left if request.limit == 1000 else lambda: True, self.seen)


@contextmanager
def running(backend: Backend) -> Generator[int]:
    """The port of a server."""
    server = ChatServer(backend, "m", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sent(port: int, body: Any, headers: dict[str, str], **options: Any) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", "/v1/chat/completions", body, headers, **options)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def test_bodies_come_whole_or_in_chunks_or_are_refused() -> None:
    body = json.dumps({"messages": ASKED}).encode()
    with running(Backend()) as port:
        whole, text = sent(port, body, {})
        assert whole == 200
        assert json.loads(text)["id"].startswith("chatcmpl-")
        chunked = {"Transfer-Encoding": "chunked"}
        assert sent(port, iter([body[:9], body[9:]]), chunked, encode_chunked=True)[0] == 200
        for odd, headers, status in (
            (b"zz\r\n", chunked, 400),
            (b"ffffffff\r\n", chunked, 413),
            (b"", {"Content-Length": "-1"}, 400),
            (b"", {"Content-Length": "x"}, 400),
            (b"", {"Content-Length": str(1 << 40)}, 413),
            (b"[" * 100_000, {}, 400),
            (b"[]", {}, 400),
            (b"{", {}, 400),
            (b'{"messages": [], "temperature": NaN}', {}, 400),
        ):
            found, text = sent(port, odd, headers)
            assert found == status, (odd[:20], text)
            assert json.loads(text)["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_left_frees_the_model(stream: bool) -> None:
    backend = Backend()
    with running(backend) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request(
            "POST", "/v1/chat/completions", json.dumps({"messages": ASKED, "max_tokens": 1000, "stream": stream})
        )
        time.sleep(0.2)
        connection.close()
        for _ in range(100):
            if backend.seen:
                break
            time.sleep(0.02)
        # A stream may end with the write that fails.
        assert backend.seen == ["left"] or (stream and not backend.seen)
