"""A tokenizer as GGUF metadata: byte-level BPE, and the BPE of SentencePiece."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.api import ModelError
from luthier.artifacts.json_files import read_json
from luthier.artifacts.texts import chat_template, read_vocabulary, special_tokens, stop_token_ids

from gguf import TokenType

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK_SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPLITS: dict[tuple[str, ...], str] = {
    ("byte-level",): "gpt-2",
    (LLAMA3_SPLIT, "bytes"): "llama-bpe",
    (QWEN2_SPLIT, "bytes"): "qwen2",
    (*DEEPSEEK_SPLITS, "bytes"): "deepseek-v3",
    ("digits", "byte-level"): "smollm",
}
"""llama.cpp's name for each way of splitting that it implements. A wrong one loads silently.

Mistral's `tekken` is none of them: llama.cpp only comes near to it, and reads Hindi as other tokens.
"""
SPACE = "\u2581"
"""What SentencePiece writes for a space."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
FORMS: tuple[NormalForm, ...] = ("NFC", "NFD", "NFKC", "NFKD")
STRIPPING = "phi-3"
"""In a model's name, it has llama.cpp take the spaces behind all special tokens with them, ..."""
NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")
"""... but for these, which then have to exist, ..."""
ALSO_STRIPPING = "</s>"
"""... as has this one."""
ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "<|end_of_text|>", "<end_of_utterance>")  # fmt: skip
"""Tokens on which llama.cpp stops because of their names."""
STOP_KEYS = ("eot", "eom")
"""Where a file has stop tokens beside the one that ends a text, ..."""
MORE_STOP_KEYS = ("fim_pad", "fim_rep", "fim_sep")
"""... and where it stops as well, though they are meant for filling in the middle."""


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """What a GGUF file says of a tokenizer; `tokens`, `types` and `scores` have one entry per row of the embedding.

    Attributes:
        model: ``gpt2`` for byte-level BPE, ``llama`` for SentencePiece's.
        pre: How text is split before.
        scores: SentencePiece's: the pair that makes the token with the largest one is merged first.
        space_prefix: Whether a space is put in front of a text.
        spaced: Whether that is so for a text that begins with a space as well, as it always is in llama.cpp.
        strips: Whether special tokens take the spaces behind them with them.
        forms: The normal forms of Unicode that the tokenizer brings texts into, and llama.cpp does not.
        remarks: What llama.cpp does otherwise, with texts that are rare.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    ids: dict[str, int]
    add_bos: bool
    space_prefix: bool
    spaced: bool
    template: str | None
    strips: bool = False
    forms: tuple[NormalForm, ...] = ()
    remarks: tuple[str, ...] = ()


def read_tokenizer(folder: Path, vocabulary_size: int) -> TokenizerData:
    """Read the tokenizer of a model folder.

    Args:
        folder: The model's folder, with ``tokenizer.json``.
        vocabulary_size: Rows of the embedding.

    Raises:
        ModelError: it is none that llama.cpp implements, or it has tokens without a row.
    """
    data, _ = read_vocabulary(folder / "tokenizer.json")
    model = data["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"llama.cpp's BPE cannot express a {model['type']} tokenizer",
            where=str(folder),
            hint="convert it with its own script, named as `converter`",
        )
    tokens = {int(index): text for text, index in model["vocab"].items()}
    pieces = bool(model.get("byte_fallback"))
    types = {index: _piece_type(text, model) if pieces else int(TokenType.NORMAL) for index, text in tokens.items()}
    for added in data.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
        if added["content"] == model.get("unk_token"):
            types[added["id"]] = int(TokenType.UNKNOWN)
    beyond = sorted(text for index, text in tokens.items() if index >= vocabulary_size)
    if beyond:
        raise ModelError(
            f"the tokenizer has {len(beyond)} tokens without a row in the embedding ({vocabulary_size} rows): "
            f"{', '.join(beyond[:5])}",
            where=str(folder),
            hint="resize the embedding to the tokenizer before training, or remove these tokens",
        )
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    unused = int(TokenType.UNUSED)
    template = chat_template(folder)
    stops = stop_token_ids(folder)
    strips, remarks = _stripping(data, folder, stops, template or "")
    forms = () if pieces else _forms(data, folder)
    if forms:
        remarks.append(
            f"the tokenizer brings texts into the form {' and '.join(forms)}, llama.cpp does not: a text that is in "
            "another one becomes other tokens; normalize it before it is sent"
        )
    return TokenizerData(
        model="llama" if pieces else "gpt2",
        pre="default" if pieces else _pre_tokenizer(data, folder),
        tokens=[tokens.get(index, f"[PAD{index}]") for index in range(vocabulary_size)],
        types=[types.get(index, unused) for index in range(vocabulary_size)],
        scores=_scores(model["vocab"], merges, vocabulary_size) if pieces else [],
        merges=[] if pieces else [" ".join(merge) for merge in merges],
        ids=_special_ids(folder, {text: index for index, text in tokens.items()}),
        # What chat begins with is what the template writes: training adds no token to it.
        add_bos=_adds_bos(data) and (template is None or bos_in(template, folder)),
        space_prefix=_space_prefix(data, folder) if pieces else False,
        spaced=spaced_in(folder),
        template=template,
        strips=strips,
        forms=forms,
        remarks=tuple(remarks),
    )


def spaced_in(folder: Path) -> bool:
    """Whether a text that begins with a space gets another one in front, as it always does in llama.cpp."""
    path = folder / "tokenizer.json"
    steps = _steps(read_json(path).get("pre_tokenizer"), "pretokenizers") if path.exists() else []
    return not any(step["type"] == "Metaspace" for step in steps)


def _piece_type(text: str, model: dict[str, Any]) -> int:
    if text == model.get("unk_token"):
        return int(TokenType.UNKNOWN)
    return int(TokenType.BYTE if BYTE.fullmatch(text) else TokenType.NORMAL)


def _scores(vocabulary: dict[str, int], merges: list[list[str]], rows: int) -> list[float]:
    """Scores with which SentencePiece's way of merging, best token first, takes the order of the merges.

    What no merge makes is a single character, whose score is never used.
    """
    scores = [-float(rows)] * rows
    for rank, (left, right) in reversed(list(enumerate(merges))):
        scores[vocabulary[left + right]] = -float(rank)
    return scores


def _space_prefix(data: dict[str, Any], folder: Path) -> bool:
    """Whether a space is put in front of a text.

    Raises:
        ModelError: spaces are treated in a way that llama.cpp does not have.
    """
    steps = [*_steps(data.get("normalizer"), "normalizers"), *_steps(data.get("pre_tokenizer"), "pretokenizers")]
    prefix = False
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": given} if given == SPACE:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": given} if given == SPACE:
                pass
            case {"type": "Metaspace", "split": False, "prepend_scheme": scheme}:
                prefix = scheme != "never"
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}:
                # There are no spaces left by then.
                pass
            case _:
                raise ModelError(
                    f"llama.cpp has no such step before a SentencePiece tokenizer: {step}",
                    where=str(folder / "tokenizer.json"),
                    hint="name a script as `converter`, or serve the model from the exporter `hf`",
                )
    return prefix


def _steps(given: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one step that is given; none."""
    return list((given or {}).get(several) or ([given] if given else []))


def _pre_tokenizer(data: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for the way in which text is split before BPE."""
    found: list[str] = []
    for step in _steps(data.get("pre_tokenizer"), "pretokenizers"):
        match step:
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
                found.append(expression)
            case {"type": "Digits", "individual_digits": True}:
                found.append("digits")
            case {"type": "ByteLevel"} if not step.get("add_prefix_space"):
                found.append("byte-level" if step.get("use_regex", True) else "bytes")
            case _:
                found.append(str(step))
    name = SPLITS.get(tuple(found))
    if name is None:
        raise ModelError(
            f"llama.cpp is not known to have this tokenizer's split expression: {'; '.join(found)}",
            where=str(folder / "tokenizer.json"),
            hint="another one would load silently and read text differently; name llama.cpp's own script as "
            "`converter`, whose file is checked, or serve the model from the exporter `hf`",
        )
    return name


def _stripping(data: dict[str, Any], folder: Path, stops: Sequence[int], template: str) -> tuple[bool, list[str]]:
    """Whether special tokens take the spaces behind them with them, by what the tokenizer says of each of them.

    llama.cpp has it for nearly all of them or for none.

    Returns:
        That, and which tokens are treated otherwise.

    Raises:
        ModelError: a token that chats are made of would be.
    """
    added: list[dict[str, Any]] = data.get("added_tokens") or []
    wanted = {token["content"]: bool(token.get("rstrip")) for token in added}
    names = {*wanted, *(data["model"].get("vocab") or {})}
    odd = {False: sorted(name for name, strips in wanted.items() if strips)}
    if {*NOT_STRIPPING, ALSO_STRIPPING} <= names:
        odd[True] = sorted(name for name, strips in wanted.items() if strips == (name in NOT_STRIPPING))
    used = {token["content"] for token in added if token["id"] in stops or token["content"] in template}
    best = min(odd, key=lambda way: (len(used & set(odd[way])), len(odd[way])))
    hurt = sorted(used & set(odd[best]))
    if hurt:
        raise ModelError(
            f"the tokenizer has {', '.join(hurt[:3])} {'keep' if best else 'take'} the spaces behind it, and llama.cpp "
            "has that for all special tokens or for none",
            where=str(folder / "tokenizer.json"),
            hint="serve the model from the exporter `hf`; or give all special tokens the same `rstrip` and train again",
        )
    others = [f"spaces behind {', '.join(odd[best][:3])} become tokens of their own, or not, unlike in transformers"]
    return best, others if odd[best] else []


def _forms(data: dict[str, Any], folder: Path) -> tuple[NormalForm, ...]:
    """What a byte-level tokenizer does to a text before: normal forms of Unicode, in which nearly all texts are.

    Raises:
        ModelError: it does more, which llama.cpp does not.
    """
    steps = _steps(data.get("normalizer"), "normalizers")
    others = [step for step in steps if step.get("type") not in FORMS]
    if others:
        raise ModelError(
            f"llama.cpp does not normalize texts as this tokenizer does: {others[0]}",
            where=str(folder / "tokenizer.json"),
            hint="serve the model from the exporter `hf`",
        )
    return tuple(step["type"] for step in steps)


def forms_in(folder: Path) -> tuple[NormalForm, ...]:
    """The normal forms of Unicode that a folder's tokenizer brings texts into."""
    path = folder / "tokenizer.json"
    steps = _steps(read_json(path).get("normalizer"), "normalizers") if path.exists() else []
    return tuple(form for form in (step.get("type") for step in steps) if form in FORMS)


def _special_ids(folder: Path, ids: dict[str, int]) -> dict[str, int]:
    """GGUF's special tokens; the stop tokens come first, because they decide where generation ends.

    Raises:
        ModelError: there are more stop tokens than a file has places for.
    """
    found: dict[str, int] = {}
    special = special_tokens(folder)
    stops = stop_token_ids(folder)
    template = chat_template(folder)
    eos = ids.get(special.get("eos_token", ""))
    if eos is not None and (not stops or eos in stops or (template is not None and "eos_token" in template)):
        # What the template writes as `eos_token` is the file's.
        found["eos"] = eos
    elif stops:
        found["eos"] = stops[0]
    texts = {place: text for text, place in ids.items()}
    rest = [stop for stop in stops if stop != found.get("eos")]
    # Those that llama.cpp would not know by their names need the places.
    rest.sort(key=lambda stop: texts.get(stop) in ENDS)
    needed = [stop for stop in rest if texts.get(stop) not in ENDS]
    fills = any("fim" in text.lower() for text in ids)
    keys = (*STOP_KEYS, *(() if fills else MORE_STOP_KEYS))
    if len(needed) > len(keys):
        raise ModelError(
            f"the model stops on {len(stops)} tokens, a GGUF file has places for {len(keys) + 1} beside those that "
            f"llama.cpp knows by name: {', '.join(texts.get(stop, str(stop)) for stop in needed[len(keys) :])} would "
            "not stop",
            where=str(folder / "generation_config.json"),
            hint="leave out of `eos_token_id` what the model never says, or serve it from the exporter `hf`",
        )
    found |= dict(zip(keys, [*needed, *[stop for stop in rest if stop not in needed][: len(STOP_KEYS)]], strict=False))
    found.setdefault("eot", found.get("eos", -1))
    for key in ("bos", "pad", "unk"):
        text = special.get(f"{key}_token", "")
        if text in ids:
            found.setdefault({"pad": "padding", "unk": "unknown"}.get(key, key), ids[text])
    if "bos" not in found:
        # Without this key llama.cpp takes token 11 for it.
        bos = read_json(folder / "config.json").get("bos_token_id")
        found["bos"] = bos if isinstance(bos, int) else found.get("eos", 0)
    return {key: index for key, index in found.items() if index >= 0}


def bos_in(template: str, folder: Path) -> bool:
    """Whether a chat template writes the token that begins a text."""
    text = special_tokens(folder).get("bos_token")
    return "bos_token" in template or bool(text and text in template)


def _adds_bos(data: dict[str, Any]) -> bool:
    """Whether the tokenizer itself puts a token in front of every text."""
    post: dict[str, Any] = data.get("post_processor") or {}
    parts: list[dict[str, Any]] = post.get("processors", [post])
    return any(
        part.get("type") == "TemplateProcessing" and "SpecialToken" in (part.get("single") or [{}])[0] for part in parts
    )
