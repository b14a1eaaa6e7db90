"""The weights of model folders, judged from safetensors headers alone. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from luthier.api.errors import ModelError
from luthier.artifacts.json_files import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HEADS = ("lm_head.weight", "embed_out.weight")
"""What output heads are called."""
HEAD = HEADS[0]
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$|\.masked_bias$")
"""Buffers in old files: rotary frequencies, causal masks."""
PREFIXES = {"gpt2": "transformer.", "bloom": "transformer.", "falcon": "transformer.", "opt": "model.",
            "gpt_neox": "gpt_neox."}  # fmt: skip
"""What some old files leave out in front of all names but the head's."""
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
         "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
"""Bytes of an entry, by the dtype's name in safetensors."""
LARGEST_HEADER = 100_000_000
"""Bytes of a header that safetensors itself reads at most."""
PIECE = 1 << 22
"""Bytes that are compared at a time."""
TIES = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as a safetensors header describes it.

    Attributes:
        dtype: The dtype's name there, such as ``BF16``.
        shape: The shape.
        file: The name of the file.
        start: The place of its first byte in the file.
        size: Its bytes.
        name: What it is called in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int = 0
    size: int = 0
    name: str = ""


def safetensors_header(path: Path) -> dict[str, TensorHeader]:
    """The header of one safetensors file.

    Raises:
        ModelError: the file is truncated or is not a safetensors file.
    """
    again = "copy or download it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ModelError("is not a complete safetensors file", where=str(path), hint=again)
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ModelError("has an unreadable header", where=str(path), hint=again) from error
    if not isinstance(header, dict):
        raise ModelError("has an unreadable header", where=str(path), hint=again)
    entries = cast("dict[str, Any]", header)
    entries.pop("__metadata__", None)
    found = {name: _described(name, entry, path, 8 + length) for name, entry in entries.items()}
    end = 8 + length
    for about in sorted(found.values(), key=lambda about: (about.start, about.size)):
        if about.start != end:
            raise ModelError(f"its header says that {about.name} is where another tensor is, or nothing",
                             where=str(path), hint=again)  # fmt: skip
        end += about.size
    if end != size:
        raise ModelError(f"has {size} bytes where its header says {end}", where=str(path), hint=again)
    return found


def _described(name: str, entry: Any, path: Path, start: int) -> TensorHeader:
    """An entry of a header; what is odd in it is refused."""
    try:
        dtype, shape, (first, behind) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"its header does not describe {name}: a dtype, a shape and two offsets belong to it", where=str(path)
        ) from error
    numbers = [*shape, first, behind]
    if any(not isinstance(number, int) or isinstance(number, bool) or number < 0 for number in numbers):
        raise ModelError(f"its header describes {name} with something else than whole numbers", where=str(path))
    wanted = math.prod(shape) * SIZES[dtype] if dtype in SIZES else behind - first
    if behind - first != wanted:
        raise ModelError(
            f"its header gives {name} {behind - first} bytes, {dtype} of the shape {list(shape)} takes {wanted}",
            where=str(path),
        )
    return TensorHeader(dtype, shape, path.name, start + first, behind - first, name)


def weight_files(folder: Path) -> list[Path]:
    """The files that a model folder's weights are in: ``model.safetensors``, or the shards that the index names.

    Raises:
        ModelError: there are none, or two sets of them, or a shard is missing.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if not index.exists():
        if single.exists():
            return [single]
        _check_links([single])
        raise _without_weights(folder)
    shards = sorted(set(_weight_map(index).values()))
    if single.exists() and shards != [WEIGHTS]:
        raise ModelError(
            f"has two sets of weights: {WEIGHTS}, which transformers reads, and the shards that {INDEX} names, which "
            "vLLM and mergekit read",
            where=str(folder),
            hint=f"move the set that is out of date to another folder: {INDEX} with its shards, or {WEIGHTS}",
        )
    _check_links([folder / name for name in shards])
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"lacks the shards {', '.join(missing)}", where=str(folder), hint="download them again")
    return [folder / name for name in shards]


def _check_links(files: Sequence[Path]) -> None:
    """Refuse links that lead nowhere.

    Raises:
        ModelError: names the first.
    """
    for path in files:
        if path.is_symlink() and not path.exists():
            raise ModelError(
                f"is a link to {path.readlink()}, which is not there",
                where=str(path),
                hint="was a cache pruned, or a folder moved? download it again, or mend the link",
            )


def _weight_map(index: Path) -> dict[str, str]:
    """Which tensor is in which file, by an index."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ModelError("has no `weight_map`", where=str(index), hint="copy or download it again")
    for name, file in cast("dict[str, Any]", found).items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise ModelError(f"names no file beside it for {name}", where=str(index))
    return cast("dict[str, str]", found)


def _without_weights(folder: Path) -> ModelError:
    others = [path.name for path in sorted(folder.glob("*.safetensors"))]
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if others:
        return ModelError(
            f"has neither {WEIGHTS} nor {INDEX}, only {', '.join(others[:3])}",
            where=str(folder),
            hint=f"one file of weights with transformers' names has to be called {WEIGHTS}; several need their index",
        )
    if pickles:
        return ModelError(
            f"has its weights as pickle files only ({', '.join(pickles[:3])})",
            where=str(folder),
            hint="pickle files can run code; convert them to safetensors if you trust them",
        )
    return ModelError("has no weights (*.safetensors)", where=str(folder), hint="is this a model folder?")


def stray_files(folder: Path) -> list[str]:
    """The safetensors files of a model folder that are none of its weights."""
    used = {path.name for path in weight_files(folder)}
    return sorted(path.name for path in folder.glob("*.safetensors") if path.name not in used)


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """All tensors of a model folder, from headers alone.

    Raises:
        ModelError: see `weight_files`; or index and shards do not say the same.
    """
    found: dict[str, TensorHeader] = {}
    for path in weight_files(folder):
        header = safetensors_header(path)
        twice = sorted(found.keys() & header.keys())
        if twice:
            raise ModelError(
                f"{twice[0]} is in two files, {found[twice[0]].file} and {path.name}",
                where=str(folder),
                hint="the shards are of two models; download them again",
            )
        found |= header
    index = folder / INDEX
    if index.exists():
        named = _weight_map(index)
        odd = sorted(name for name, file in named.items() if name not in found or found[name].file != file)
        unnamed = sorted(found.keys() - named.keys())
        if odd or unnamed:
            what = f"says that {odd[0]} is in {named[odd[0]]}, and it is not" if odd else f"does not name {unnamed[0]}"
            raise ModelError(
                f"{INDEX} {what}",
                where=str(folder),
                hint="index and shards are of two models; download them again, or load the model with transformers and "
                "save it anew",
            )
    return found


def own_tensors(folder: Path, config: Mapping[str, Any], headers: dict[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The parameters of a model folder, by their full names: all tensors but an output head that repeats the embedding
    it is tied to, and but buffers that every program computes itself.

    Some files have them, those that transformers writes of the same model do not. A head with other values is one of
    its own: transformers does not tie it either.

    Args:
        folder: The model's folder.
        config: Its ``config.json``, which leaves the tie out only where it is the architecture's own way.
        headers: All its tensors, see `tensor_headers`.
    """
    prefix = PREFIXES.get(str(config.get("model_type")), "")
    short = not any(name.startswith(prefix) for name in headers)
    headers = {
        name if not short or name in HEADS else prefix + name: header
        for name, header in headers.items()
        if not COMPUTED.search(f".{name}")
    }
    head, shared = head_of(headers), embedding_of(headers)
    if head is None or shared is None or not ties(config):
        return headers
    alike = (head.shape, head.dtype) == (shared.shape, shared.dtype) and _same_bytes(folder, head, shared)
    return {name: header for name, header in headers.items() if header is not head} if alike else headers


def head_of(headers: Mapping[str, TensorHeader]) -> TensorHeader | None:
    """The output head, where it is a tensor of its own."""
    return next((headers[name] for name in HEADS if name in headers), None)


def embedding_of(headers: Mapping[str, TensorHeader]) -> TensorHeader | None:
    """The embedding of the tokens."""
    return next((header for name, header in headers.items() if name.endswith(EMBEDDINGS)), None)


def ties(config: Mapping[str, Any]) -> bool:
    """Whether a config has the output head be the embedding; one that says nothing leaves it to the architecture."""
    return config.get(TIES) is not False


def model_tensors(folder: Path) -> dict[str, TensorHeader]:
    """The parameters of a model folder, see `own_tensors`: what is merged, exported and quantized."""
    return own_tensors(folder, read_json(folder / "config.json"), tensor_headers(folder))


def with_true_ties(
    config: Mapping[str, Any], stored: Mapping[str, TensorHeader], own: Mapping[str, TensorHeader]
) -> dict[str, Any]:
    """A config that says of the output head what the weights say: programs other than transformers 5 go by it alone.

    Args:
        config: The ``config.json``.
        stored: All tensors of the model it came with.
        own: Those that are written, see `own_tensors`.
    """
    if head_of(own) is not None:
        return {**config, TIES: False} if ties(config) else dict(config)
    return {**config, TIES: True} if head_of(stored) is not None else dict(config)


def _same_bytes(folder: Path, one: TensorHeader, other: TensorHeader) -> bool:
    with (folder / one.file).open("rb") as left, (folder / other.file).open("rb") as right:
        left.seek(one.start)
        right.seek(other.start)
        return all(
            left.read(min(PIECE, one.size - done)) == right.read(min(PIECE, one.size - done))
            for done in range(0, one.size, PIECE)
        )
