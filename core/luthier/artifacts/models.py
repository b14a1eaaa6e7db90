"""Model folders, judged from their JSON files and safetensors headers alone. No torch."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from luthier.api.errors import ModelError
from luthier.artifacts.digest import digest_file, digest_value

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")  # fmt: skip
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""Those of them that hold tokens."""
NO_TOKENIZER = digest_value({})
"""The digest of the tokenizer of a folder without one."""
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
CARRIED = (*TOKENIZER_FILES, GENERATION)
"""What describes text and generation, and has to survive every stage byte for byte."""
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Under what conditions a model may be used: they hold for what is made of it, too."""
HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$|\.masked_bias$")
"""Buffers in old files: rotary frequencies, causal masks."""
PREFIXES = {"gpt2": "transformer.", "bloom": "transformer.", "falcon": "transformer.", "opt": "model.",
            "gpt_neox": "gpt_neox."}  # fmt: skip
"""What some old files leave out in front of all names but the head's."""
PIECE = 1 << 22
"""Bytes that are compared at a time."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length")
"""What configs call the most tokens that a model is made for."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as a safetensors header describes it.

    Attributes:
        dtype: The dtype's name there, such as ``BF16``.
        shape: The shape.
        file: The name of the file.
        start: The place of its first byte in the file.
        size: Its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int = 0
    size: int = 0


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.name} is missing", where=str(path.parent)) from error
    except ValueError as error:
        raise ModelError(f"is not valid JSON ({error})", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", where=str(path))
    return cast("dict[str, Any]", value)


def safetensors_header(path: Path) -> dict[str, TensorHeader]:
    """The header of one safetensors file.

    Raises:
        ModelError: the file is truncated or is not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError("is not a complete safetensors file", where=str(path), hint="copy or download it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise ModelError("has an unreadable header", where=str(path), hint="copy it again") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise ModelError(
            f"has {size} bytes where its header says {8 + length + end}", where=str(path), hint="copy it again"
        )
    found: dict[str, TensorHeader] = {}
    for name, entry in header.items():
        first, behind = entry["data_offsets"]
        found[name] = TensorHeader(entry["dtype"], tuple(entry["shape"]), path.name, 8 + length + first, behind - first)
    return found


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """All tensors of a model folder, from headers alone.

    Raises:
        ModelError: there are no weights, only pickle files, or a shard is missing.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
        if pickles:
            raise ModelError(
                f"has its weights as pickle files only ({', '.join(pickles[:3])})",
                where=str(folder),
                hint="pickle files can run code; convert them to safetensors if you trust them",
            )
        raise ModelError("has no weights (*.safetensors)", where=str(folder), hint="is this a model folder?")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = set(read_json(index)["weight_map"].values())
        missing = sorted(shards - {path.name for path in files})
        if missing:
            raise ModelError(f"lacks the shards {', '.join(missing)}", where=str(folder), hint="download them again")
        files = [path for path in files if path.name in shards]
    return {name: header for path in files for name, header in safetensors_header(path).items()}


def own_tensors(folder: Path, config: dict[str, Any], headers: dict[str, TensorHeader]) -> dict[str, TensorHeader]:
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
        name if not short or name == HEAD else prefix + name: header
        for name, header in headers.items()
        if not COMPUTED.search(f".{name}")
    }
    head = headers.get(HEAD)
    shared = next((header for name, header in headers.items() if name.endswith(EMBEDDINGS)), None)
    if head is None or shared is None or config.get("tie_word_embeddings") is False:
        return headers
    alike = (head.shape, head.dtype) == (shared.shape, shared.dtype) and _same_bytes(folder, head, shared)
    return {name: header for name, header in headers.items() if name != HEAD} if alike else headers


def _same_bytes(folder: Path, one: TensorHeader, other: TensorHeader) -> bool:
    with (folder / one.file).open("rb") as left, (folder / other.file).open("rb") as right:
        left.seek(one.start)
        right.seek(other.start)
        return all(
            left.read(min(PIECE, one.size - done)) == right.read(min(PIECE, one.size - done))
            for done in range(0, one.size, PIECE)
        )


def vocabulary_size(folder: Path) -> int | None:
    """How many tokens a folder's tokenizer has, gaps between ids included; None without a ``tokenizer.json``."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    tokenizer = read_json(path)
    vocabulary: dict[str, int] | list[Any] = tokenizer["model"].get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
    added = [entry["id"] for entry in tokenizer.get("added_tokens", [])]
    return max([*ids, *added], default=-1) + 1


def stop_token_ids(folder: Path) -> list[int]:
    """The ids on which generation stops: those of the generation config, else of the model config.

    Raises:
        ModelError: one of them is no number.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = read_json(path).get("eos_token_id") if path.exists() else None
        if ids is not None:
            found = cast("list[Any]", ids if isinstance(ids, list) else [ids])
            odd = [item for item in found if not isinstance(item, int) or isinstance(item, bool)]
            if odd:
                raise ModelError(
                    f"eos_token_id has {odd[0]!r}, which is no id of a token", where=str(path), hint="write its number"
                )
            return found
    return []


def stop_tokens(folder: Path) -> list[str]:
    """The texts of the stop tokens."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return []
    added = {entry["id"]: entry["content"] for entry in read_json(path).get("added_tokens", [])}
    return [added[item] for item in stop_token_ids(folder) if item in added]


def positions_of(folder: Path) -> int | None:
    """How many tokens a model was made for at once, see `positions_in`."""
    return positions_in(read_json(folder / "config.json"))


def positions_in(config: dict[str, Any]) -> int | None:
    """How many tokens a model was made for at once, by its config; None where it says nothing, as of recurrent ones."""
    config = config.get("text_config") or config
    known = next((config[name] for name in POSITIONS if isinstance(config.get(name), int)), None)
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if known is not None and original and factor:
        # Stretched positions are written in either of the two.
        return max(known, int(original * factor))
    return known


def chat_template(folder: Path) -> str | None:
    """The chat template of a folder, from its own file or from inside the tokenizer config."""
    path = folder / TEMPLATE
    if path.exists():
        return path.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.exists() else None
    return template if isinstance(template, str) else None


def carry_text_files(source: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence unchanged."""
    for name in CARRIED:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    carry_licences(source, out)


def carry_licences(source: Path, out: Path, label: str = "") -> None:
    """Copy what is said of the model's licence; what is there already stays.

    Args:
        label: What to call a file whose name is taken by another text: ``LICENSE`` becomes ``LICENSE.label``.
    """
    for path in {path for pattern in LICENCES for path in source.glob(pattern) if path.is_file()}:
        content = path.read_bytes()
        target = out / path.name
        if label and target.exists() and target.read_bytes() != content:
            target = out / f"{path.name}.{label}"
        if not target.exists():
            target.write_bytes(content)


def tokenizer_digest(folder: Path) -> str:
    """One digest over which token has which id, and over how tokens are put together.

    Trainers write a tokenizer anew, with the same tokens in other bytes: with settings for padding, or merges as pairs.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        return _vocabulary_digest(digest_file(path), path)
    names = [name for name in VOCABULARY_FILES[1:] if (folder / name).exists()]
    return digest_value({name: digest_file(folder / name) for name in names})


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of any kind."""
    return any((folder / name).exists() for name in VOCABULARY_FILES)


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two folders have tokenizers of the same digest; reads no large file for what is the same in bytes."""
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if all(path.exists() for path in files) and len({digest_file(path) for path in files}) == 1:
        return True
    return tokenizer_digest(one) == tokenizer_digest(other)


@lru_cache(maxsize=32)
def _vocabulary_digest(content: str, path: Path) -> str:
    """See `tokenizer_digest`; kept by the `content` of the file."""
    tokenizer = read_json(path)
    model: dict[str, Any] = tokenizer["model"]
    vocabulary: dict[str, int] | list[Any] = model.get("vocab", {})
    ids = vocabulary if isinstance(vocabulary, dict) else {str(token): place for place, token in enumerate(vocabulary)}
    added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    return digest_value({"ids": {**ids, **added}, "merges": merges})


def check_model_folder(folder: Path) -> dict[str, TensorHeader]:
    """Check a model folder before anything is loaded.

    Raises:
        ModelError: config or weights are missing or broken, or the tokenizer has more tokens than the
            embedding has rows.
    """
    config = read_json(folder / "config.json")
    headers = tensor_headers(folder)
    embedding = next((header for name, header in headers.items() if name.endswith(EMBEDDINGS)), None)
    vocabulary = vocabulary_size(folder)
    declared = config.get("vocab_size")
    if embedding is not None and isinstance(declared, int) and declared != embedding.shape[0]:
        raise ModelError(
            f"config.json says vocab_size {declared}, the embedding has {embedding.shape[0]} rows",
            where=str(folder),
            hint="one of the two was changed without the other",
        )
    if embedding is not None and vocabulary is not None and vocabulary > embedding.shape[0]:
        raise ModelError(
            f"the tokenizer has {vocabulary} tokens, the embedding only {embedding.shape[0]} rows",
            where=str(folder),
            hint="tokens were added without resizing the embedding; use the tokenizer that belongs to the weights",
        )
    return headers


def model_facts(folder: Path) -> dict[str, Any]:
    """What a model artifact's manifest says of it, read from its headers.

    Raises:
        ModelError: see `check_model_folder`.
    """
    headers = check_model_folder(folder)
    config = read_json(folder / "config.json")
    own = own_tensors(folder, config, headers)
    template = chat_template(folder)
    sizes: dict[str, int] = {}
    for header in own.values():
        sizes[header.dtype] = sizes.get(header.dtype, 0) + math.prod(header.shape)
    quantized: dict[str, Any] = config.get("quantization_config") or {}
    return {
        **({"quantization": {"method": quantized.get("quant_method", "unknown")}} if quantized else {}),
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "dtype": max(sizes, key=lambda dtype: sizes[dtype]),
        "parameters": sum(sizes.values()),
        "tensors": len(own),
        "vocab_size": config.get("vocab_size"),
        "tokenizer": tokenizer_digest(folder),
        "chat_template": digest_value(template) if template is not None else None,
        "stop_tokens": stop_tokens(folder),
        "stop_token_ids": stop_token_ids(folder),
    }
