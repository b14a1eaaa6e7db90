"""A child process that serves one artifact on 127.0.0.1, as OpenAI's chat completions: for trying a model out.

An export is served by the program that it is made for, where that has a server of its own; a model or an adapter by
transformers, one answer at a time.
"""

from __future__ import annotations

import datetime
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast

from luthier.api.artifact import Artifact
from luthier.api.errors import LuthierError, ModelError, StoreError
from luthier.api.serving import Exporter
from luthier.artifacts.rows import messages as checked_messages
from luthier.registry import default_registry
from luthier.serving.alone import AloneContext
from luthier.serving.chat_request import ChatRequest
from luthier.serving.chat_server import HOST, ChatServer

UNBOUNDED = 1 << 20
SEEDS = 1 << 63
WAITED = 0.2
"""Seconds after which an answer that waits for its turn looks whether its client is still there."""


class TransformersBackend:
    """A model or adapter in transformers that says its answers piece by piece."""

    def __init__(self, artifact: Artifact) -> None:
        # Only this child process loads torch.
        self._torch: Any = import_module("torch")
        self._transformers: Any = import_module("transformers")
        chat: Any = import_module("luthier.modeling.chat")
        loading: Any = import_module("luthier.modeling.loading")
        self._tokenizer: Any = loading.load_tokenizer(artifact)
        self._scratch = tempfile.TemporaryDirectory()
        self._padding: int = loading.padding_of(self._tokenizer)
        self._model: Any = loading.load_client(artifact, Path(self._scratch.name) / "floats")
        self._model.eval()
        self._stops: list[int] = artifact.facts["stop_token_ids"]
        # Who chats today is told today's date, as by other servers.
        self._encoder: Any = chat.ChatEncoder(self._tokenizer, self._stops, datetime.date.today())
        self._length: int = getattr(self._model.config, "max_position_embeddings", None) or UNBOUNDED
        # The model answers one at a time.
        self._lock = threading.Lock()

    def prompt(self, messages: list[Any]) -> list[int]:
        """The tokens of a conversation, open for the assistant.

        Raises:
            DataError: the chat template refuses it.
            ModelError: it is longer than the model's context.
        """
        ids: list[int] = self._encoder.prompt(checked_messages(messages, "messages"))
        if len(ids) >= self._length:
            raise ModelError(f"the prompt has {len(ids)} tokens, the context is {self._length}")
        return ids

    def answer(self, ids: list[int], request: ChatRequest, number: int, left: Callable[[], bool]) -> StreamedAnswer:
        """Answer as a request says; greedily where the temperature is 0."""
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if not request.greedy:
            sampling = {
                "do_sample": True,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "top_k": 0,
            }
        options = {
            "max_new_tokens": min(request.limit, self._length - len(ids)),
            "eos_token_id": self._stops or None,
            "pad_token_id": self._padding,
            "repetition_penalty": None,
            **sampling,
        }
        seed = None if request.seed is None else (request.seed + number) % SEEDS
        return StreamedAnswer(self, ids, options, request.stop, seed, left)

    def pieces(self, ids: list[int], options: dict[str, Any], answer: StreamedAnswer) -> Iterator[str]:
        """Have the model write what `answer` is; it ends early when the reader has left."""
        while not self._lock.acquire(timeout=WAITED):
            if answer.left():
                raise ConnectionAbortedError("the client has left")
        try:
            if answer.left():
                raise ConnectionAbortedError("the client has left")
            yield from answer.cut(self._written(ids, options, answer))
        finally:
            self._lock.release()

    def _written(self, ids: list[int], options: dict[str, Any], answer: StreamedAnswer) -> Iterator[str]:
        torch = self._torch
        gone = threading.Event()
        failures: list[BaseException] = []
        streamer = self._transformers.TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)

        def given_up(so_far: Any, scores: Any) -> Any:
            if answer.left():
                gone.set()
            done = gone.is_set()
            if answer.stops and not done:
                text = self._tokenizer.decode(so_far[0, len(ids) :], skip_special_tokens=True)
                done = any(stop in text for stop in answer.stops)
            return torch.full((so_far.shape[0],), done, device=so_far.device)

        def work() -> None:
            try:
                with torch.no_grad(), torch.random.fork_rng(enabled=answer.seed is not None):
                    if answer.seed is not None:
                        torch.manual_seed(answer.seed)
                    (written,) = self._model.generate(
                        input_ids=torch.tensor([ids], device=self._model.device),
                        streamer=streamer,
                        stopping_criteria=[given_up],
                        **options,
                    ).tolist()
                answer.tokens = len(written) - len(ids)
                answer.finish_reason = "stop" if written[-1] in self._stops else "length"
            # It is raised where the answer is read.
            except BaseException as error:  # noqa: BLE001
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield from streamer
        finally:
            gone.set()
            thread.join()
        if failures:
            raise ModelError(f"the model fails: {failures[0]}")


class StreamedAnswer:
    """An answer of `TransformersBackend`, written while it is read."""

    def __init__(
        self,
        backend: TransformersBackend,
        ids: list[int],
        options: dict[str, Any],
        stops: tuple[str, ...],
        seed: int | None,
        left: Callable[[], bool],
    ) -> None:
        self.tokens = 0
        self.finish_reason: Literal["stop", "length"] = "length"
        self.stops = stops
        self.seed = seed
        self.left = left
        self._backend, self._ids, self._options = backend, ids, options

    def __iter__(self) -> Iterator[str]:
        return self._backend.pieces(self._ids, self._options, self)

    def cut(self, pieces: Iterator[str]) -> Iterator[str]:
        """The pieces up to the first of the texts that end an answer."""
        if not self.stops:
            yield from pieces
            return
        waiting = ""
        for piece in pieces:
            waiting += piece
            found = [place for stop in self.stops if (place := waiting.find(stop)) >= 0]
            if found:
                yield waiting[: min(found)]
                # The model ends by itself: the number of tokens is known then.
                for _ in pieces:
                    pass
                self.finish_reason = "stop"
                return
            kept = _beginning(waiting, self.stops)
            yield waiting[: len(waiting) - kept]
            waiting = waiting[len(waiting) - kept :]
        yield waiting


def _beginning(text: str, stops: Sequence[str]) -> int:
    """How many of a text's last characters may be the beginning of one of these texts."""
    longest = max(map(len, stops)) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((length for length in lengths if any(stop.startswith(text[-length:]) for stop in stops)), 0)


def serve_artifact(artifact: Artifact, variant: str | None, port: int) -> None:
    """Serve until the process is ended; the address is printed once it answers.

    Raises:
        ModelError: the artifact is not a model, adapter or export, or its program has no server.
        StoreError: the port is taken.
    """
    _check_port(port)
    if artifact.kind == "export":
        registry = default_registry()
        use = registry.use("exporter", artifact.facts["format"])
        exporter = cast("Exporter[Any]", registry.build(use, AloneContext(registry)))
        if exporter.serves:
            with exporter.listen(artifact, variant, port) as url:
                _wait(url)
            return
        artifact = Artifact(artifact.key, "model", artifact.path, artifact.facts, artifact.manifest)
    if artifact.kind not in ("model", "adapter"):
        raise ModelError(f"a {artifact.kind} cannot be served", hint="name a model, an adapter or an export")
    if variant:
        raise ModelError(f"there is no variant {variant}: it is one model", hint="leave --variant out")
    name = str(artifact.manifest.get("stage", "model"))
    server = ChatServer(TransformersBackend(artifact), name, port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _wait(f"http://{HOST}:{server.server_port}")


def _check_port(port: int) -> None:
    """Refuse a port that is taken, before a model is loaded.

    Raises:
        StoreError: it is.
    """
    try:
        # As the servers will take it: one that was just given back counts as free.
        socket.create_server((HOST, port), reuse_port=False).close()
    except OSError as error:
        raise StoreError(f"the port {port} cannot be used: {error}", hint="choose another one with --port") from error


def _wait(url: str) -> None:
    print(f"{url}/v1 answers; Ctrl-C ends it", flush=True)
    threading.Event().wait()


def main() -> None:
    """Entry point of ``python -m luthier.serving.serve FOLDER VARIANT PORT``."""
    folder, variant, port = sys.argv[1:]
    # Ended from a script as cleanly as with Ctrl-C, which programs started in the background do not get.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve_artifact(Artifact.load(Path(folder)), variant or None, int(port))
    except KeyboardInterrupt:
        return
    except LuthierError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
