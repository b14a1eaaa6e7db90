"""A child process that serves one artifact on 127.0.0.1, as OpenAI's chat completions: for trying a model out.

An export is served by the program that it is made for, where that has a server of its own; a model or an adapter by
transformers, one answer at a time.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from luthier.api.artifact import Artifact
from luthier.api.errors import LuthierError, ModelError, StoreError
from luthier.registry import default_registry

HOST = "127.0.0.1"
LARGEST_BODY = 1 << 24
UNBOUNDED = 1 << 20


class Speaker:
    """A model or adapter in transformers that says its answers piece by piece."""

    def __init__(self, artifact: Artifact) -> None:
        # Only this child process loads torch.
        self._torch: Any = import_module("torch")
        self._transformers: Any = import_module("transformers")
        self._text: Any = import_module("luthier.train.text")
        loading: Any = import_module("luthier.train.loading")
        self._tokenizer: Any = loading.load_tokenizer(artifact)
        self._scratch = tempfile.TemporaryDirectory()
        self._model: Any = loading.load_model(loading.usable(artifact, Path(self._scratch.name) / "floats"))
        self._model.eval()
        self._stops: list[int] = artifact.facts["stop_token_ids"]
        self._length: int = getattr(self._model.config, "max_position_embeddings", None) or UNBOUNDED
        # The model answers one at a time.
        self._lock = threading.Lock()

    def prompt(self, messages: list[Any]) -> list[int]:
        """The tokens of a conversation, open for the assistant.

        Raises:
            DataError: the chat template refuses it.
            ModelError: it is longer than the model's context.
        """
        ids: list[int] = self._text.encode_prompt(self._tokenizer, messages)
        if len(ids) >= self._length:
            raise ModelError(f"the prompt has {len(ids)} tokens, the context is {self._length}")
        return ids

    def say(self, ids: list[int], limit: int, temperature: float, top_p: float) -> Iterator[str]:
        """Pieces of an answer."""
        torch = self._torch
        with self._lock:
            streamer = self._transformers.TextIteratorStreamer(
                self._tokenizer, skip_prompt=True, skip_special_tokens=True
            )
            sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            if temperature > 0:
                sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
            options = {"input_ids": torch.tensor([ids], device=self._model.device), "streamer": streamer,
                       "max_new_tokens": min(limit, self._length - len(ids)), "eos_token_id": self._stops or None,
                       "pad_token_id": self._tokenizer.pad_token_id, "repetition_penalty": None,
                       **sampling}  # fmt: skip
            failures: list[BaseException] = []

            def work() -> None:
                try:
                    with torch.no_grad():
                        self._model.generate(**options)
                # It is raised where the answer is read.
                except BaseException as error:  # noqa: BLE001
                    failures.append(error)
                    streamer.end()

            thread = threading.Thread(target=work)
            thread.start()
            try:
                yield from streamer
            finally:
                thread.join()
            if failures:
                raise ModelError(f"the model fails: {failures[0]}")


def handler_of(speaker: Any, name: str) -> type[BaseHTTPRequestHandler]:
    """The handler of a server's requests."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: what is asked is nobody's matter."""

        def do_GET(self) -> None:
            if self.path == "/health":
                self._reply(200, {"status": "ok"})
            elif self.path == "/v1/models":
                self._reply(200, {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "luthier"}]})
            else:
                self._refuse(404, f"there is no {self.path}")

        def do_POST(self) -> None:
            if self.path != "/v1/chat/completions":
                self._refuse(404, f"there is no {self.path}")
                return
            try:
                body = self._body()
                messages = body["messages"]
                limit = int(body.get("max_tokens") or body.get("max_completion_tokens") or 256)
                temperature, top_p = float(body.get("temperature") or 0), float(body.get("top_p") or 1)
                ids = speaker.prompt(messages)
            except (ValueError, LookupError, TypeError) as error:
                self._refuse(400, f"the request cannot be read: {type(error).__name__}: {error}")
                return
            except LuthierError as error:
                self._refuse(400, str(error))
                return
            pieces = speaker.say(ids, max(1, limit), temperature, top_p)
            if body.get("stream"):
                self._stream(pieces)
            else:
                self._whole(pieces, len(ids))

        def _body(self) -> dict[str, Any]:
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 < length <= LARGEST_BODY:
                raise ValueError("the body is empty or too large")
            found = json.loads(self.rfile.read(length))
            if not isinstance(found, dict):
                raise TypeError("the body is no object")
            return cast("dict[str, Any]", found)

        def _whole(self, pieces: Iterator[str], prompt: int) -> None:
            try:
                text = "".join(pieces)
            except LuthierError as error:
                self._refuse(500, str(error))
                return
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self._reply(200, {"object": "chat.completion", "created": int(time.time()), "model": name,
                              "choices": [choice], "usage": {"prompt_tokens": prompt}})  # fmt: skip

        def _stream(self, pieces: Iterator[str]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            for piece in pieces:
                self._event({"delta": {"content": piece}, "finish_reason": None})
            self._event({"delta": {}, "finish_reason": "stop"})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, choice: dict[str, Any]) -> None:
            value = {"object": "chat.completion.chunk", "created": int(time.time()), "model": name,
                     "choices": [{"index": 0, **choice}]}  # fmt: skip
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

    return Handler


def serve_artifact(artifact: Artifact, variant: str | None, port: int) -> None:
    """Serve until the process is ended; the address is printed once it answers.

    Raises:
        ModelError: the artifact is no model, adapter or export, or its program has no server.
        StoreError: the port is taken.
    """
    if artifact.kind == "export":
        registry = default_registry()
        component = registry.get("exporter", artifact.facts["format"])
        config = registry.config_class(component).model_validate({}, context={"components": registry})
        listen = getattr(registry.impl_class(component)(config), "listen", None)
        if listen is not None:
            with listen(artifact, variant, port) as url:
                _wait(url)
            return
        artifact = Artifact(artifact.key, "model", artifact.path, artifact.facts, artifact.manifest)
    if artifact.kind not in ("model", "adapter"):
        raise ModelError(f"a {artifact.kind} cannot be served", hint="name a model, an adapter or an export")
    name = str(artifact.manifest.get("stage", "model"))
    try:
        server = ThreadingHTTPServer((HOST, port), handler_of(Speaker(artifact), name))
    except OSError as error:
        raise StoreError(f"the port {port} cannot be used: {error}", hint="choose another one with --port") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _wait(f"http://{HOST}:{server.server_port}")


def _wait(url: str) -> None:
    print(f"{url}/v1 answers; Ctrl-C ends it", flush=True)
    threading.Event().wait()


def main() -> None:
    """Entry point of ``python -m luthier.running.serve FOLDER VARIANT PORT``."""
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
