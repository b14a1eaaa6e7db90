"""The chat server and its client: what a broken answer looks like, and which model is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
from luthier.api import ModelError
from luthier.serving.chat_request import ChatRequest
from luthier.serving.chat_server import ChatServer
from luthier.serving.golden import ServerError, ask, model_of, streamed

ASKED: list[Any] = [{"role": "user", "content": "Who is there?"}]


class Answer:
    """Says two words; then it fails, or not."""

    tokens = 2
    finish_reason: Literal["stop", "length"] = "stop"

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def __iter__(self) -> Iterator[str]:
        yield from ["a ", "friend"]
        if self.fails:
            raise ModelError("the model fails")


class Backend:
    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def prompt(self, messages: list[Any]) -> list[int]:
        return [1, 2, 3]

    def answer(self, ids: list[int], request: ChatRequest, number: int, left: Callable[[], bool]) -> Answer:
        return Answer(self.fails)


@contextmanager
def running(speaker: Backend, name: str) -> Generator[str]:
    """The address of a server."""
    server = ChatServer(speaker, name, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_an_answer_that_breaks_off_is_none() -> None:
    with running(Backend(fails=False), "m") as url:
        assert "".join(streamed(url, ASKED, 9)) == "a friend"
        reply = ask(url, ASKED, 9)
        assert (reply.text, reply.prompt_tokens, reply.finish_reason) == ("a friend", 3, "stop")
    with running(Backend(fails=True), "m") as url:
        with pytest.raises(ServerError, match="the model fails"):
            list(streamed(url, ASKED, 9))
        with pytest.raises(ServerError, match="500"):
            ask(url, ASKED, 9)


def test_the_wanted_model_is_asked_for_by_the_name_that_the_server_has() -> None:
    with running(Backend(fails=False), "model:latest") as url:
        assert model_of(url, "model") == "model:latest"
        assert model_of(url, "another") == "model:latest"
