"""Control tokens: those that a chat template sets between texts, and that no text may set itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any, cast

from tokenizers import Tokenizer

from luthier.api.errors import DataError
from luthier.modeling.thinking import KNOWN

PRIVATE = "\U0010fffd"
"""A private character that no text may have: between two of them stands which control token is meant."""
NAME = re.compile(f"{PRIVATE}0(\\d+){PRIVATE}")
"""The name of a control token in a text, while a template renders it."""


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and others that are named.

    A text that holds the name of one is *shielded*: each name becomes a few private characters, which templates leave
    alone. `encode` then makes control tokens of what the template wrote, and plain tokens of the names.

    Args:
        tokenizer: The tokenizer.
        others: Ids of further added tokens that end or begin turns, whether or not the tokenizer calls them special.
    """

    def __init__(self, tokenizer: Any, others: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        wanted = {number for number, token in added.items() if token.special} | set(others)
        # Models write the marks of their thinking themselves: a row may have them.
        thinking = {mark for marks in KNOWN for mark in marks}
        names = {added[number].content: number for number in sorted(wanted & added.keys())}
        self.names = {name: number for name, number in names.items() if name.strip() and name not in thinking}
        self._order = list(self.names)
        pattern = "|".join(re.escape(name) for name in sorted(self.names, key=len, reverse=True))
        self._pattern = re.compile(pattern) if pattern else None

    def first_in(self, text: str) -> re.Match[str] | None:
        """The first control token that is named in a text."""
        return self._pattern.search(text) if self._pattern else None

    def all_in(self, text: str) -> list[re.Match[str]]:
        """All control tokens that are named in a text."""
        return list(self._pattern.finditer(text)) if self._pattern else []

    def last_in(self, text: str) -> str | None:
        """The last control token that is named in a text."""
        found = self._pattern.findall(text) if self._pattern else []
        return found[-1] if found else None

    def shielded(self, text: str) -> str:
        """A text with private characters for the names of control tokens; the same text where there are none.

        Raises:
            DataError: the text has such a private character itself.
        """
        if PRIVATE in text:
            raise DataError("a text has the private character U+10FFFD", hint="remove it: nothing shows it")
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: f"{PRIVATE}0{self._order.index(match[0])}{PRIVATE}", text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text whose contents were shielded.

        Raises:
            DataError: the tokenizer makes a control token of a name even where it is plain text.
        """
        if PRIVATE not in text:
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
        assert self._pattern is not None, "only names of control tokens are shielded"
        written = [self.names[name] for name in self._pattern.findall(text)]
        marked = self._pattern.sub(lambda match: self._mark(match[0]), text)
        plain = NAME.sub(lambda match: self._order[int(match[1])], marked)
        tokenizer, ids_by_place = self._renamed
        ids = [ids_by_place.get(item, item) for item in tokenizer.encode(plain, add_special_tokens=False).ids]
        # The unknown token stands for letters that the vocabulary lacks.
        known = set(self.names.values()) - {self._tokenizer.unk_token_id}
        if [item for item in ids if item in known] != [item for item in written if item in known]:
            raise DataError("the tokenizer reads the name of a control token in a text as that token")
        return ids

    def _mark(self, name: str) -> str:
        """What stands for a control token that a template wrote."""
        return f"{PRIVATE}1{self._order.index(name)}{PRIVATE}"

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer with private characters as its control tokens, and the ids that its added tokens stand for."""
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                "a text has the name of a control token, and this tokenizer cannot read it as plain text",
                hint="write the name in another way",
            )
        content: dict[str, Any] = json.loads(backend.to_str())
        original: dict[str, int] = {}
        for entry in content["added_tokens"]:
            if entry["content"] in self.names:
                entry["content"] = self._mark(entry["content"])
            original[entry["content"]] = entry["id"]
        # It may name tokens that are gone; nothing is added here.
        content["post_processor"] = content["truncation"] = content["padding"] = None
        made = Tokenizer.from_str(json.dumps(content))
        return made, {cast("int", made.token_to_id(name)): number for name, number in original.items()}
