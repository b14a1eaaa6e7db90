"""The text files of model folders: tokenizer, chat templates, stop tokens. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from luthier.api.errors import ModelError
from luthier.artifacts.digest import digest_file, digest_value
from luthier.artifacts.json_files import read_json, write_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")  # fmt: skip
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""Those of them that hold tokens."""
NO_TOKENIZER = digest_value({})
"""The digest of the tokenizer of a folder without one."""
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
"""A folder with a file for each further template, named after it."""
DEFAULT = "default"
"""The name of the template for conversations without tools."""
GENERATION = "generation_config.json"
CARRIED = (*TOKENIZER_FILES, GENERATION)
"""What describes text and generation, and has to survive every stage byte for byte, `MORE_TEMPLATES` with it."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def read_vocabulary(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The content of a ``tokenizer.json``, and the id of every token, added ones included.

    Raises:
        ModelError: it is no such file, or an id in it is no number.
    """
    tokenizer = read_json(path)
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        raise ModelError("has no `model`: it is not a tokenizer", where=str(path), hint="copy or download it again")
    vocabulary: Any = cast("dict[str, Any]", model).get("vocab") or {}
    added: Any = tokenizer.get("added_tokens") or []
    try:
        if isinstance(vocabulary, dict):
            ids = dict(cast("dict[str, Any]", vocabulary))
        else:
            # Unigram: pairs of a token and its score, in the order of their ids.
            ids = {str(pair[0]): place for place, pair in enumerate(vocabulary)}
        ids |= {str(entry["content"]): entry["id"] for entry in added}
        merges: Any = cast("dict[str, Any]", model).get("merges") or []
        # Texts first: there are hundreds of thousands, and a look at each as a text costs next to nothing.
        odd = next((pair for pair in merges if not (type(pair) is str and " " in pair) and not _is_merge(pair)), None)
    except (KeyError, IndexError, TypeError) as error:
        raise ModelError(
            "its tokens are not listed as in a tokenizer", where=str(path), hint="copy or download it again"
        ) from error
    if odd is not None:
        raise ModelError(f"{str(odd)[:40]!r} is no pair of tokens to merge", where=str(path), hint="download it again")
    for token, place in ids.items():
        if not isinstance(place, int) or isinstance(place, bool) or place < 0:
            raise ModelError(f"the id of the token {token!r} is {str(place)[:40]!r}, not a number", where=str(path))
    return tokenizer, ids


def _is_merge(value: Any) -> bool:
    """Whether it is two tokens: as one text with a space between, or as a pair."""
    if isinstance(value, str):
        return " " in value
    pair = cast("list[Any]", value) if isinstance(value, list) else []
    return len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str)


def vocabulary_size(folder: Path) -> int | None:
    """How many tokens a folder's tokenizer has, gaps between ids included; None without a ``tokenizer.json``."""
    path = folder / "tokenizer.json"
    return _about(path).size if path.exists() else None


def stop_token_ids(folder: Path) -> list[int]:
    """The ids on which generation stops: those of the generation config, else of the model config.

    Raises:
        ModelError: one of them is no number.
    """
    for name in (GENERATION, "config.json"):
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
    added = _about(path).added
    return [added[item] for item in stop_token_ids(folder) if item in added]


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of the tokens with a task, such as ``eos_token``, by the task."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        values = read_json(folder / name) if (folder / name).exists() else {}
        for task in SPECIAL_TOKENS:
            token: Any = values.get(task)
            text = cast("dict[str, Any]", token).get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found[task] = text
    return found


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a folder by name, as transformers finds them: in files of their own, or else inside the
    tokenizer config, as one text or as a list of named ones.

    Raises:
        ModelError: they are neither.
    """
    single = folder / TEMPLATE
    files = {DEFAULT: single} if single.exists() else {}
    files |= {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    path = folder / TOKENIZER_CONFIG
    known: Any = read_json(path).get("chat_template") if path.exists() else None
    if known is None:
        return {}
    if isinstance(known, str):
        return {DEFAULT: known}
    named: dict[Any, Any]
    try:
        named = cast("Any", known) if isinstance(known, dict) else {item["name"]: item["template"] for item in known}
    except (KeyError, TypeError):
        named = {}
    found = {str(name): text for name, text in named.items() if isinstance(text, str)}
    if not found or len(found) != len(named):
        raise ModelError(
            "`chat_template` is neither a text nor a list of named templates",
            where=str(path),
            hint='write the text, or [{"name": "default", "template": ...}]',
        )
    return found


def chat_template(folder: Path) -> str | None:
    """The chat template of a folder: its only one, or of several the one for conversations without tools."""
    return chat_templates(folder).get(DEFAULT)


def write_chat_template(folder: Path, template: str) -> None:
    """Make a text the only chat template of a folder."""
    remove_chat_templates(folder)
    (folder / TEMPLATE).write_text(template, encoding="utf-8")


def take_chat_templates(source: Path, out: Path) -> None:
    """Give a folder the chat templates of another one, all of them, in files of their own."""
    templates = chat_templates(source)
    if not templates:
        return
    remove_chat_templates(out)
    for name, template in templates.items():
        path = out / TEMPLATE if name == DEFAULT else out / MORE_TEMPLATES / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8")


def remove_chat_templates(folder: Path) -> None:
    """Remove all chat templates of a folder, wherever they are."""
    (folder / TEMPLATE).unlink(missing_ok=True)
    if (folder / MORE_TEMPLATES).exists():
        shutil.rmtree(folder / MORE_TEMPLATES)
    path = folder / TOKENIZER_CONFIG
    if path.exists() and "chat_template" in (settings := read_json(path)):
        write_json(path, {key: value for key, value in settings.items() if key != "chat_template"})


def copy_text_files(source: Path, out: Path) -> None:
    """Copy tokenizer, chat templates and generation config unchanged."""
    for name in CARRIED:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    templates = source / MORE_TEMPLATES
    if templates.is_dir():
        (out / MORE_TEMPLATES).mkdir(exist_ok=True)
        for path in sorted(templates.glob("*.jinja")):
            shutil.copyfile(path, out / MORE_TEMPLATES / path.name)


def remove_tokenizer(folder: Path) -> None:
    """Remove a tokenizer with its chat templates."""
    remove_chat_templates(folder)
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)


def tokenizer_digest(folder: Path) -> str:
    """One digest over which token has which id, and over how tokens are put together.

    Trainers write a tokenizer anew, with the same tokens in other bytes: with settings for padding, or merges as pairs.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        return _about(path).digest
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


@dataclass(frozen=True, slots=True)
class _About:
    """What is asked of a ``tokenizer.json`` again and again.

    Attributes:
        size: How many tokens it has, gaps between ids included.
        digest: See `tokenizer_digest`.
        added: Its added tokens, by id.
    """

    size: int
    digest: str
    added: Mapping[int, str]


_KNOWN: dict[str, _About] = {}
"""By the digests of the files: reading one with many merges takes most of a second, and models share it."""


def _about(path: Path) -> _About:
    content = digest_file(path)
    if content not in _KNOWN:
        tokenizer, ids = read_vocabulary(path)
        pairs: list[str | list[str]] = tokenizer["model"].get("merges") or []
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
        entries: list[dict[str, Any]] = tokenizer.get("added_tokens") or []
        added = {entry["id"]: entry["content"] for entry in entries}
        digest = digest_value({"ids": ids, "merges": merges})
        _KNOWN[content] = _About(max(ids.values(), default=-1) + 1, digest, added)
    return _KNOWN[content]
