"""A byte-level BPE tokenizer as GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.api import ModelError
from luthier.artifacts.models import chat_template, read_json, stop_token_ids

from gguf import TokenType

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {LLAMA3_SPLIT: "llama-bpe", QWEN2_SPLIT: "qwen2"}
"""llama.cpp's name for each split expression that it implements. A wrong one loads without a word."""


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """What a GGUF file says of a tokenizer; `tokens` and `types` have one entry per row of the embedding."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: dict[str, int]
    add_bos: bool
    template: str | None


def read_tokenizer(folder: Path, vocabulary_size: int) -> TokenizerData:
    """Read the tokenizer of a model folder.

    Args:
        folder: The model's folder, with ``tokenizer.json``.
        vocabulary_size: Rows of the embedding.

    Raises:
        ModelError: it is not a byte-level BPE whose splitting llama.cpp implements.
    """
    data = read_json(folder / "tokenizer.json")
    model = data["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ModelError("the tokenizer is not a byte-level BPE: it cannot be exported to GGUF yet", where=str(folder))
    tokens = {int(index): text for text, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, int(TokenType.NORMAL))
    for added in data.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    unused = int(TokenType.UNUSED)
    return TokenizerData(
        pre=_pre_tokenizer(data, folder),
        tokens=[tokens.get(index, f"[PAD{index}]") for index in range(vocabulary_size)],
        types=[types.get(index, unused) for index in range(vocabulary_size)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        ids=_special_ids(folder, {text: index for index, text in tokens.items()}),
        add_bos=_adds_bos(data),
        template=chat_template(folder),
    )


def _pre_tokenizer(data: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for the way in which text is split before BPE."""
    given: dict[str, Any] = data.get("pre_tokenizer") or {}
    parts: list[dict[str, Any]] = given.get("pretokenizers", [given])
    for part in parts:
        if part.get("type") == "Split":
            expression = part["pattern"].get("Regex")
            if expression in SPLITS and part["behavior"] == "Isolated" and not part["invert"]:
                return SPLITS[expression]
            raise ModelError(
                f"llama.cpp does not know this tokenizer's split expression: {expression}",
                where=str(folder / "tokenizer.json"),
                hint="another one would load without a word and read text differently",
            )
        if part.get("type") == "ByteLevel" and part.get("use_regex", True) and not part.get("add_prefix_space"):
            return "gpt-2"
    raise ModelError("the tokenizer's pre_tokenizer is none that llama.cpp knows", where=str(folder / "tokenizer.json"))


def _special_ids(folder: Path, ids: dict[str, int]) -> dict[str, int]:
    """GGUF's special tokens; the stop tokens come first, because they decide where generation ends."""
    config = read_json(folder / "tokenizer_config.json")
    found: dict[str, int] = {}
    stops = stop_token_ids(folder)
    for key, stop in zip(("eos", "eot", "eom"), stops, strict=False):
        found[key] = stop
    found.setdefault("eot", found.get("eos", -1))
    for key in ("bos", "pad", "unk", "eos"):
        token = config.get(f"{key}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            found.setdefault({"pad": "padding", "unk": "unknown"}.get(key, key), ids[text])
    model_config = read_json(folder / "config.json")
    if "bos" not in found:
        # Without this key llama.cpp takes token 11 for it.
        bos = model_config.get("bos_token_id")
        found["bos"] = bos if isinstance(bos, int) else found.get("eos", 0)
    return {key: index for key, index in found.items() if index >= 0}


def _adds_bos(data: dict[str, Any]) -> bool:
    """Whether the tokenizer itself puts a token in front of every text."""
    post: dict[str, Any] = data.get("post_processor") or {}
    parts: list[dict[str, Any]] = post.get("processors", [post])
    return any(
        part.get("type") == "TemplateProcessing" and "SpecialToken" in (part.get("single") or [{}])[0] for part in parts
    )
