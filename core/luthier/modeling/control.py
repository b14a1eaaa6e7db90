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

SHIELDS = 0xF0000
"""Private characters that stand for a control token's name in a text while a template renders it, ..."""
MARKS = 0x100000
"""... and for the control tokens that the template writes, while both are encoded."""
FIRST = chr(MARKS)
PRIVATE = re.compile("[\U000f0000-\U0010ffff]")


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and others that are named.

    A text that holds the name of one is *shielded*: each name becomes one private character, which templates leave
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
        """The first control token of a text that a template wrote."""
        return self._pattern.search(text) if self._pattern else None

    def last_in(self, text: str) -> str | None:
        """The last control token of a text that a template wrote."""
        found = self._pattern.findall(text) if self._pattern else []
        return found[-1] if found else None

    def shielded(self, text: str) -> str:
        """A text with the names of control tokens as private characters; the same text where there are none.

        Raises:
            DataError: the text has these private characters itself, beside such names.
        """
        if self._pattern is None or self._pattern.search(text) is None:
            return text
        if PRIVATE.search(text):
            raise DataError("a text has the name of a control token and private characters as well")
        return self._pattern.sub(lambda match: chr(SHIELDS + self._order.index(match[0])), text)

    def unshielded(self, text: str) -> str:
        """The text as it was."""
        return PRIVATE.sub(lambda match: self._order[ord(match[0]) - SHIELDS], text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text whose contents were shielded.

        Raises:
            DataError: the tokenizer makes a control token of a name even where it is plain text.
        """
        if PRIVATE.search(text) is None:
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
        assert self._pattern is not None, "only names of control tokens are shielded"
        marked = self._pattern.sub(lambda match: chr(MARKS + self._order.index(match[0])), text)
        tokenizer, ids_by_place = self._renamed
        ids = [
            ids_by_place.get(item, item)
            for item in tokenizer.encode(self.unshielded_names(marked), add_special_tokens=False).ids
        ]
        written = sum(self.names[self._order[ord(letter) - MARKS]] in self._ids for letter in marked if letter >= FIRST)
        if sum(item in self._ids for item in ids) != written:
            raise DataError("the tokenizer reads the name of a control token in a text as that token")
        return ids

    def unshielded_names(self, marked: str) -> str:
        """A text with the names back in place of their private characters, the template's own marks left."""
        return re.sub("[\U000f0000-\U000fffff]", lambda match: self._order[ord(match[0]) - SHIELDS], marked)

    @cached_property
    def _ids(self) -> frozenset[int]:
        # The unknown token stands for letters that the vocabulary lacks.
        return frozenset(self.names.values()) - {self._tokenizer.unk_token_id}

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
                entry["content"] = chr(MARKS + self._order.index(entry["content"]))
            original[entry["content"]] = entry["id"]
        # It may name tokens that are gone; nothing is added here.
        content["post_processor"] = content["truncation"] = content["padding"] = None
        made = Tokenizer.from_str(json.dumps(content))
        return made, {cast("int", made.token_to_id(name)): number for name, number in original.items()}
