"""llama.cpp's own server, in this process, on 127.0.0.1."""

from __future__ import annotations

import gc
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Generator as Yields
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xllamacpp
from luthier.api import Completion, DataError, Generator, Message, ModelError, Request, Sampling

SECONDS = 600
NAMES = re.compile(r"[<\[|]")
"""What the names of control tokens have in them."""
# The wheel has no type stubs.
llama: Any = xllamacpp


class LlamaServer(Generator[Any]):
    """A GGUF file, loaded in llama.cpp.

    Args:
        file: The GGUF file.
        context_length: The longest prompt and answer together, in tokens.
        lora: An adapter to add.
        exact: Compute as exactly as llama.cpp can: keys and values in float32, a prompt in one piece; takes memory.

    Raises:
        ModelError: llama.cpp cannot load the file.
    """

    def __init__(
        self,
        file: Path,
        *,
        context_length: int,
        lora: Path | None = None,
        exact: bool = False,
    ) -> None:
        self.file = file
        self._lora = lora
        self._exact = exact
        self._context_length = context_length
        self._server: Any = None

    def __enter__(self) -> LlamaServer:
        options: Any = llama.CommonParams()
        options.model.path = str(self.file)
        if self._lora is not None:
            adapter: Any = llama.CommonAdapterLoraInfo()
            adapter.path = str(self._lora)
            adapter.scale = 1.0
            options.lora_adapters = [adapter]
        options.n_ctx = self._context_length
        options.n_parallel = 1
        options.cpuparams.n_threads = os.cpu_count() or 1
        options.n_gpu_layers = 0
        options.warmup = False
        options.embedding = False
        options.fit_params = False
        options.use_jinja = True
        options.ui = False
        options.cache_ram_mib = 0
        options.verbosity = -1
        options.hostnames = ["127.0.0.1"]
        # Any that is free.
        options.port = 0
        options.sampling.temp = 0
        # Otherwise a conversation that ends with the assistant would be taken as the answer's beginning.
        options.prefill_assistant = False
        if self._exact:
            # What is compared is the weights, not llama.cpp's shortcuts.
            options.n_batch = options.n_ubatch = self._context_length
            options.cache_type_k = options.cache_type_v = llama.ggml_type.GGML_TYPE_F32
            options.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.reasoning_format = llama.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
        try:
            self._server = llama.Server(options)
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"llama.cpp cannot load the file: {error}",
                where=str(self.file),
                hint=f"`llama-server -m {self.file.name}` says more; is it a GGUF file of an architecture that this "
                "version of llama.cpp knows, and is there memory for it?",
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return str(self._server.listening_address)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._server.listening_address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        # The environment's proxies are not used for this process's own server.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ModelError(f"llama.cpp refuses {path}: {error.read().decode()}", where=str(self.file)) from error

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are recognised, with nothing added."""
        return self._post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that llama.cpp makes of a conversation, open for the assistant."""
        body = {"messages": list(messages), "add_generation_prompt": True}
        return self._post("/apply-template", body)["prompt"]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Completion]]:
        """Answers to conversations, through ``/v1/chat/completions``, as a client would ask."""
        for messages in requests:
            self._refuse_control_tokens(messages)
            yield [self._completion(messages, sampling, number) for number in range(sampling.n)]

    def obeys(self, text: str) -> bool:
        """Whether llama.cpp would make a control token of a part of a text, as it does wherever one is named."""
        if not NAMES.search(text):
            return False
        body = {"content": text, "add_special": False}
        special, plain = (self._post("/tokenize", {**body, "parse_special": way})["tokens"] for way in (True, False))
        return special != plain

    def _refuse_control_tokens(self, messages: Request) -> None:
        """Refuse messages that would be obeyed.

        Raises:
            DataError: a message holds the name of a control token.
        """
        for message in messages:
            if self.obeys(message["content"]):
                raise DataError(
                    f"a message of the {message['role']} holds the name of a control token, which llama.cpp would obey",
                    hint="write the name in another way, or ask the model before its export",
                )

    def _completion(self, messages: Request, sampling: Sampling, number: int) -> Completion:
        body = {
            "messages": list(messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed + number,
            "max_tokens": sampling.max_new_tokens,
            "cache_prompt": False,
        }
        if sampling.json_schema is not None:
            schema = {"name": "answer", "schema": dict(sampling.json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        reply = self._post("/v1/chat/completions", body)
        choice: Any = reply["choices"][0]
        reason = choice.get("finish_reason")
        usage: Mapping[str, int] = reply.get("usage") or {}
        return Completion(
            choice["message"]["content"] or "",
            usage.get("completion_tokens"),
            reason if reason in ("stop", "length") else None,
            prompt_tokens=usage.get("prompt_tokens"),
        )

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """How many tokens a conversation is when a client asks with it."""
        body = {"messages": list(messages), "temperature": 0, "max_tokens": 1, "cache_prompt": False}
        return self._post("/v1/chat/completions", body)["usage"]["prompt_tokens"]

    def stops_on(self, token: int, prompt: Sequence[int]) -> bool:
        """Whether generation ends when the model says `token`."""
        body = {
            "prompt": list(prompt),
            "n_predict": 2,
            "temperature": 0,
            "logit_bias": [[token, 1000.0]],
            "cache_prompt": False,
        }
        return self._post("/completion", body)["stop_type"] == "eos"

    def ends(self, prompt: Sequence[int]) -> bool:
        """Whether the most likely token behind a text is one that ends generation."""
        body = {"prompt": list(prompt), "n_predict": 1, "temperature": 0, "cache_prompt": False}
        return self._post("/completion", body)["stop_type"] == "eos"

    def next_log_probabilities(
        self, ids: Sequence[int], vocabulary_size: int, stop: int, most: int | None = None
    ) -> np.ndarray:
        """log p of every token after `ids`, or of the `most` likely: shape (vocabulary_size,), -inf where llama.cpp
        reports none."""
        body = {
            "prompt": list(ids),
            "n_predict": 1,
            "n_probs": most or vocabulary_size,
            "temperature": 0,
            "cache_prompt": False,
            "post_sampling_probs": False,
            # Probabilities are left out when the sampled token is half a character: have it sample a whole one.
            "logit_bias": [[stop, 1000.0]],
        }
        found = np.full(vocabulary_size, -np.inf)
        with _no_collections():
            for entry in self._post("/completion", body)["completion_probabilities"][0]["top_logprobs"]:
                found[entry["id"]] = entry["logprob"]
        return found


@contextmanager
def _no_collections() -> Yields[None]:
    """One reply gives a million objects: checking them during parsing takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
