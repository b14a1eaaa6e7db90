"""Writes a GGUF file in a stream: what is in memory is a few rows for each worker, whatever the model's size."""

from __future__ import annotations

import math
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from luthier.api import ModelError
from luthier.artifacts.json_files import read_json
from luthier.artifacts.tensors import TensorHeader, own_tensors, tensor_headers, with_true_ties
from luthier_plugins.gguf.architectures import ARCHITECTURES, Architecture, Planned, architecture_for
from luthier_plugins.gguf.config import FileType
from luthier_plugins.gguf.kernels import prepare, size_in_bytes, to_type
from luthier_plugins.gguf.mixes import (
    MOSTLY,
    NEEDS_IMATRIX,
    Layout,
    file_type_number,
    is_quantized,
    tensor_type,
)
from luthier_plugins.gguf.tokenizer import STRIPPING, TokenizerData, read_tokenizer
from safetensors import safe_open

import gguf
from gguf import GGMLQuantizationType

QUANTIZATION_VERSION = 2
ID_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "eot": "eot_token_id", "eom": "eom_token_id",
           "padding": "padding_token_id", "unknown": "unknown_token_id", "fim_pad": "fim_pad_token_id",
           "fim_rep": "fim_rep_token_id", "fim_sep": "fim_sep_token_id"}  # fmt: skip
ENTRIES = 1 << 20
"""Entries of a tensor that are read, converted and quantized at once, unless what belongs together is more."""
FLOATS = ("F64", "F32", "F16", "BF16")
Importances = Mapping[str, np.ndarray]
"""By name in GGUF: how much each column matters, shape (columns,), or (experts, columns)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one tensor of the file: how to get them as float32, and whose they are."""

    read: Callable[[], np.ndarray]
    source: int


class Source:
    """A model folder, ready to be written as GGUF files of any type.

    Args:
        folder: Full-precision weights, ``config.json`` and tokenizer.
        stack: Keeps the safetensors files open as long as it is.
        architectures: Converters as ``module:Class`` by the architecture's name; by default the built-in ones.

    Raises:
        ModelError: the architecture or the tokenizer cannot be exported, or the weights are quantized already.
    """

    def __init__(self, folder: Path, stack: ExitStack, architectures: Mapping[str, str] | None = None) -> None:
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self.folder = folder
        stored = tensor_headers(folder)
        self._headers = _floats(own_tensors(folder, self.config, stored), self.config, folder)
        self.config = with_true_ties(self.config, stored, self._headers)
        self.architecture: Architecture = architecture_for(self.config, architectures or ARCHITECTURES)
        self._files = {
            name: stack.enter_context(safe_open(folder / name, framework="pt"))
            for name in sorted({header.file for header in self._headers.values()})
        }
        planned = list(self.architecture.planned({name: header.shape for name, header in self._headers.items()}))
        self._extras = self.architecture.extra_tensors()
        planned += [Planned(name, tensor.shape, ()) for name, tensor in self._extras.items()]
        self.parts = sorted(planned, key=lambda part: (_layer(part.name), part.name))
        rows = next(part.shape[0] for part in planned if part.name == "token_embd.weight")
        self.tokenizer: TokenizerData = read_tokenizer(folder, rows)
        metadata = self.architecture.metadata()
        self.layout = Layout(
            layers=self.config["num_hidden_layers"],
            heads=self.config["num_attention_heads"],
            kv_heads=int(metadata["attention.head_count_kv"]),
            tied=not any(part.name == "output.weight" for part in planned),
            experts=int(metadata.get("expert_count", 0)),
            downs=[part.name for part in self.parts if ".ffn_down" in part.name and part.name.endswith(".weight")],
        )
        self.context_length = int(metadata["context_length"])
        sizes: Counter[str] = Counter()
        for header in self._headers.values():
            sizes[header.dtype] += header.size
        self.dtype = sizes.most_common(1)[0][0]
        self.importances: Importances = {}

    def weigh(self, importances: Importances) -> None:
        """Quantize with these importances from now on."""
        self.importances = importances
        self.layout = replace(self.layout, imatrix=bool(importances))

    def override(self, overrides: Mapping[str, str]) -> None:
        """Give tensors other types from now on.

        Raises:
            ModelError: a pattern is found in no tensor's name.
        """
        self.layout = replace(self.layout, overrides=dict(overrides))
        names = [part.name for part in self.parts if is_quantized(part.name, part.shape)]
        for pattern in overrides:
            if not any(re.search(pattern, name) for name in names):
                raise ModelError(
                    f"`overrides` has {pattern!r}, which matches no tensor that is quantized",
                    hint=f"names are like {', '.join(name for name in names[:8] if name.startswith('blk.'))}",
                )

    def read(self, part: Planned) -> np.ndarray:
        """A whole tensor of the file in float32."""
        return np.concatenate([piece.read() for piece in self.pieces(part)]).reshape(part.shape)

    def pieces(self, part: Planned) -> Iterator[Piece]:
        """A tensor in pieces, in order."""
        if not part.sources:
            yield Piece(lambda: self._extras[part.name], 0)
        for place, name in enumerate(part.sources):
            header = self._headers[name]
            file = self._files[header.file]
            columns = math.prod(header.shape[1:])
            rows = int(header.shape[0])
            height = max(1, ENTRIES // columns // part.unit) * part.unit if len(header.shape) > 1 else rows
            for first in range(0, rows, height):
                yield Piece(_reader(file, header.name, first, first + height, part), place)

    def write(self, path: Path, file_type: FileType, key: str, workers: int | None = None) -> Iterator[int]:
        """Write the file, yielding how many tensors are done.

        Args:
            path: Where to.
            file_type: The type of the weights.
            key: What identifies the model.
            workers: Threads that read, convert and quantize.

        Raises:
            ModelError: a weight is not finite or does not fit, or a type needs importances that there are not.
        """
        types = [self.type_of(part, file_type) for part in self.parts]
        for part, kind in zip(self.parts, types, strict=True):
            if kind in NEEDS_IMATRIX and part.name not in self.importances and part.name != "token_embd.weight":
                raise ModelError(
                    f"{kind.name} needs importances, and there are none for this tensor",
                    where=part.name,
                    hint="set `imatrix: true` and name `calibration` data",
                )
        prepare(set(types))
        writer = gguf.GGUFWriter(path, self.architecture.name)
        self._metadata(writer, file_type, f"{STRIPPING} {key}" if self.tokenizer.strips else key)
        for part, kind in zip(self.parts, types, strict=True):
            nothing = np.dtype(np.float32)
            writer.add_tensor_info(part.name, part.shape, nothing, size_in_bytes(part.shape, kind), raw_dtype=kind)
        threads = workers or len(os.sched_getaffinity(0))
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (file,) = writer.fout or []
            writer.write_padding(file, file.tell())
            with ThreadPoolExecutor(threads) as pool:
                for done, size in enumerate(self._written(pool, 2 * threads, types, file), 1):
                    writer.write_padding(file, size)
                    yield done
        finally:
            torch.set_num_threads(before)
            writer.close()

    def _written(
        self, pool: ThreadPoolExecutor, window: int, types: list[GGMLQuantizationType], file: Any
    ) -> Iterator[int]:
        """Write one tensor after the other, yielding each one's size; the pool works a few pieces ahead."""
        waiting: deque[tuple[Future[np.ndarray], bool]] = deque()
        size = 0

        def drained(until: int) -> Iterator[int]:
            nonlocal size
            while len(waiting) > until:
                future, last = waiting.popleft()
                data = future.result()
                file.write(data.reshape(-1).view(np.uint8))
                size += data.nbytes
                if last:
                    yield size
                    size = 0

        try:
            for part, kind in zip(self.parts, types, strict=True):
                pieces = list(self.pieces(part))
                for place, piece in enumerate(pieces, 1):
                    importance = self._importance(part, piece.source, kind)
                    waiting.append((pool.submit(_quantized, piece, kind, part.name, importance), place == len(pieces)))
                    yield from drained(window)
            yield from drained(0)
        finally:
            for future, _ in waiting:
                future.cancel()

    def _importance(self, part: Planned, place: int, kind: GGMLQuantizationType) -> np.ndarray | None:
        found = self.importances.get(part.name)
        if found is None or kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16):
            return None
        return found[place] if found.ndim == 2 else found

    def type_of(self, part: Planned, file_type: FileType) -> GGMLQuantizationType:
        """The type of one tensor in a file of that type."""
        return tensor_type(file_type, part.name, part.shape, self.layout)

    def bytes(self, file_type: FileType) -> int:
        """How many bytes the tensors of a file of that type have."""
        return sum(size_in_bytes(part.shape, self.type_of(part, file_type)) for part in self.parts)

    def mix(self, file_type: FileType) -> dict[str, int]:
        """How many tensors have which type in a file of that type."""
        return dict(Counter(self.type_of(part, file_type).name for part in self.parts))

    def fallbacks(self, file_type: FileType) -> dict[str, str]:
        """Tensors whose rows cannot be divided into the blocks of their type, and the type they get instead."""
        wide = [replace(part, shape=(*part.shape[:-1], 256)) for part in self.parts if len(part.shape) > 1]
        wanted = {part.name: self.type_of(part, file_type) for part in wide}
        return {
            part.name: self.type_of(part, file_type).name
            for part in self.parts
            if part.name in wanted
            and self.type_of(part, file_type) != wanted[part.name]
            and is_quantized(part.name, part.shape)
            and MOSTLY[file_type].name not in FLOATS
        }

    def _metadata(self, writer: gguf.GGUFWriter, file_type: FileType, name: str) -> None:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_quantization_version(QUANTIZATION_VERSION)
        writer.add_file_type(file_type_number(file_type))
        for key, value in self.architecture.metadata().items():
            _add(writer, f"{self.architecture.name}.{key}", value)
        tokenizer = self.tokenizer
        writer.add_tokenizer_model(tokenizer.model)
        writer.add_tokenizer_pre(tokenizer.pre)
        writer.add_token_list(tokenizer.tokens)
        writer.add_token_types(tokenizer.types)
        if tokenizer.scores:
            writer.add_token_scores(tokenizer.scores)
        if tokenizer.merges:
            writer.add_token_merges(tokenizer.merges)
        for key, index in tokenizer.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{ID_KEYS[key]}", index)
        # Said in any case: `llama-bpe` adds one where the file is silent.
        writer.add_add_bos_token(tokenizer.add_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(tokenizer.space_prefix)
        if tokenizer.template is not None:
            writer.add_chat_template(tokenizer.template)


def _floats(headers: dict[str, TensorHeader], config: Mapping[str, Any], folder: Path) -> dict[str, TensorHeader]:
    """The headers, all of them of floats.

    Raises:
        ModelError: the model is quantized already.
    """
    odd = [name for name, header in headers.items() if header.dtype not in FLOATS]
    if config.get("quantization_config") or odd:
        about = f"{odd[0]} is {headers[odd[0]].dtype}" if odd else "its config has a quantization_config"
        raise ModelError(
            f"the model is quantized already: {about}",
            where=str(folder),
            hint="export the full-precision model that it was made from",
        )
    return headers


def _reader(file: Any, name: str, first: int, last: int, part: Planned) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        return part.convert(file.get_slice(name)[first:last].float().numpy())

    return read


def _quantized(piece: Piece, kind: GGMLQuantizationType, name: str, importance: np.ndarray | None) -> np.ndarray:
    return np.ascontiguousarray(to_type(np.ascontiguousarray(piece.read()), kind, name, importance))


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
