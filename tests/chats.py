"""Rows of different lengths, and what they are as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.api import Artifact
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import load_tokenizer
from luthier.training.encoding import EncodedRow, encode_row

WORDS = ["the", "map", "lies", "in", "a", "drawer", "below", "12", "old", "keys", "and", "nobody", "knows"]


def text_of(count: int, start: int) -> str:
    """So many words."""
    return " ".join(WORDS[(start + 3 * n) % len(WORDS)] for n in range(count))


CHATS = [
    {
        "messages": [
            {"role": "user", "content": text_of(1 + (7 * n) % 19, n)},
            {"role": "assistant", "content": text_of(1 + (5 * n) % 13, n + 1)},
        ]
    }
    for n in range(8)
]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": text_of(2 + (7 * n) % 19, n)}],
        "chosen": [{"role": "assistant", "content": text_of(1 + (5 * n) % 13, n + 1)}],
        "rejected": [{"role": "assistant", "content": text_of(1 + (3 * n) % 11, n + 2)}],
    }
    for n in range(8)
]


def rows_of(model: Artifact, rows: Sequence[Any]) -> list[EncodedRow]:
    encoder = ChatEncoder(load_tokenizer(model), model.facts["stop_token_ids"])
    return [encode_row(encoder, row) for row in rows]
