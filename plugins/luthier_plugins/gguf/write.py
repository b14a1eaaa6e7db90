"""Writes a GGUF file, one tensor in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from luthier.artifacts.models import read_json, tensor_headers
from luthier_plugins.gguf.architectures import Architecture, architecture_for
from luthier_plugins.gguf.config import FileType
from luthier_plugins.gguf.kernels import size_in_bytes, to_type
from luthier_plugins.gguf.mixes import FILE_TYPES, Layout, tensor_type
from luthier_plugins.gguf.tokenizer import TokenizerData, read_tokenizer
from safetensors import safe_open

import gguf
from gguf import GGMLQuantizationType

QUANTIZATION_VERSION = 2
ID_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "eot": "eot_token_id", "eom": "eom_token_id",
           "padding": "padding_token_id", "unknown": "unknown_token_id"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the file to be: its name there, its shape, and how to get it as float32."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Source:
    """A model folder, ready to be written as GGUF files of any type.

    Args:
        folder: Full-precision weights, ``config.json`` and tokenizer.
        stack: Keeps the safetensors files open as long as it is.

    Raises:
        ModelError: the architecture or the tokenizer cannot be exported.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self.architecture: Architecture = architecture_for(self.config)
        headers = tensor_headers(folder)
        files = {name: stack.enter_context(safe_open(folder / name, framework="pt"))
                 for name in sorted({header.file for header in headers.values()})}  # fmt: skip
        tied = bool(self.config.get("tie_word_embeddings"))
        parts: list[Part] = []
        rows = 0
        for name, header in headers.items():
            if tied and name == "lm_head.weight":
                continue
            target = self.architecture.tensor_name(name)
            rows = header.shape[0] if target == "token_embd.weight" else rows
            parts.append(Part(target, header.shape, self._reader(files[header.file], name)))
        for name, tensor in self.architecture.extra_tensors().items():
            parts.append(Part(name, tensor.shape, lambda tensor=tensor: tensor))
        self.parts = sorted(parts, key=lambda part: (_layer(part.name), part.name))
        self.tokenizer: TokenizerData = read_tokenizer(folder, rows)
        self.layout = Layout(
            layers=self.config["num_hidden_layers"],
            heads=self.config["num_attention_heads"],
            kv_heads=self.config.get("num_key_value_heads") or self.config["num_attention_heads"],
            tied=tied,
        )

    def _reader(self, file: Any, name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            return self.architecture.convert(name, file.get_tensor(name).float().numpy())

        return read

    def write(self, path: Path, file_type: FileType, name: str) -> Iterator[int]:
        """Write the file, yielding how many tensors are done.

        Args:
            path: Where to.
            file_type: The type of the weights.
            name: What the model is called in the file.
        """
        writer = gguf.GGUFWriter(path, self.architecture.name)
        self._metadata(writer, file_type, name)
        types = [self.type_of(part, file_type) for part in self.parts]
        for part, kind in zip(self.parts, types, strict=True):
            nothing = np.dtype(np.float32)
            writer.add_tensor_info(part.name, part.shape, nothing, size_in_bytes(part.shape, kind), raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, (part, kind) in enumerate(zip(self.parts, types, strict=True), 1):
                writer.write_tensor_data(to_type(part.read(), kind, part.name))
                yield done
        finally:
            writer.close()

    def type_of(self, part: Part, file_type: FileType) -> GGMLQuantizationType:
        """The type of one tensor in a file of that type."""
        return tensor_type(file_type, part.name, part.shape, self.layout)

    def mix(self, file_type: FileType) -> dict[str, int]:
        """How many tensors have which type in a file of that type."""
        return dict(Counter(self.type_of(part, file_type).name for part in self.parts))

    def _metadata(self, writer: gguf.GGUFWriter, file_type: FileType, name: str) -> None:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_quantization_version(QUANTIZATION_VERSION)
        writer.add_file_type(FILE_TYPES[file_type][0])
        for key, value in self.architecture.metadata().items():
            _add(writer, f"{self.architecture.name}.{key}", value)
        tokenizer = self.tokenizer
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(tokenizer.pre)
        writer.add_token_list(tokenizer.tokens)
        writer.add_token_types(tokenizer.types)
        writer.add_token_merges(tokenizer.merges)
        for key, index in tokenizer.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{ID_KEYS[key]}", index)
        # Said in any case: `llama-bpe` adds one where the file is silent.
        writer.add_add_bos_token(tokenizer.add_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(False)
        if tokenizer.template is not None:
            writer.add_chat_template(tokenizer.template)


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def _add(writer: gguf.GGUFWriter, key: str, value: int | float | str | bool) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
