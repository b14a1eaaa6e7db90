"""From rows of any schema to token ids and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.api.context import Context
from luthier.api.data import Row
from luthier.api.errors import DataError
from luthier.api.tuning import TuningConfig
from luthier.artifacts.rows import conversations, schema_of, trainable_text
from luthier.modeling.text import IGNORED, Encoded, encode_answer, encode_conversation, encode_text


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as tokens.

    Attributes:
        completions: Its completions, each after its prompt: one of a conversation or a text, the chosen and the
            rejected one of a preference.
        desirable: Whether a labelled completion is a good one; None for other rows.
    """

    completions: tuple[Encoded, ...]
    desirable: bool | None = None

    def __len__(self) -> int:
        return max(len(item.input_ids) for item in self.completions)

    @property
    def targets(self) -> int:
        """How many tokens are trained."""
        return sum(label != IGNORED for item in self.completions for label in item.labels)


def encode_row(tokenizer: Any, row: Row, stop_ids: Sequence[int]) -> EncodedRow:
    """Tokens of a row of any schema that can be trained on.

    Raises:
        DataError: the chat template cannot render it so that it could be trained; or the row is a prompt alone.
    """
    schema = schema_of(row)
    if not trainable_text(schema):
        raise DataError(f"a row of the schema {schema} has nothing to be trained on")
    if schema == "text":
        return EncodedRow((encode_text(tokenizer, row["text"]),))
    if schema == "messages":
        return EncodedRow((encode_conversation(tokenizer, row["messages"], stop_ids),))
    sides = [encode_answer(tokenizer, messages, stop_ids) for messages in conversations(row)]
    if len({tuple(_prompt_ids(side)) for side in sides}) > 1:
        raise DataError("the chat template renders the prompt differently for the two answers")
    return EncodedRow(tuple(sides), row.get("label"))


def _prompt_ids(encoded: Encoded) -> list[int]:
    return [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label == IGNORED]


def encode_rows(
    tokenizer: Any, rows: Iterable[Row], stop_ids: Sequence[int], config: TuningConfig, context: Context
) -> list[EncodedRow]:
    """Tokens of rows; those that are too long are reported, and left out or refused.

    Raises:
        DataError: a row cannot be encoded, none is short enough, or `on_long` says to stop.
    """
    encoded = [encode_row(tokenizer, row, stop_ids) for row in rows]
    short = [row for row in encoded if len(row) <= config.max_length]
    if len(short) < len(encoded):
        over, longest = len(encoded) - len(short), max(map(len, encoded))
        text = f"{over} of {len(encoded)} rows are longer than max_length={config.max_length}"
        if config.on_long == "fail" or not short:
            raise DataError(text, hint=f"the longest has {longest} tokens; raise `max_length` or shorten the rows")
        context.warn(f"{text} and were left out; the longest has {longest} tokens")
    return short


def packed_rows(streams: Iterable[Sequence[int]], length: int, separator: int | None) -> Iterator[EncodedRow]:
    """Blocks of exactly `length` tokens from concatenated documents; all tokens are trained.

    The last, shorter block is kept.
    """
    buffer: list[int] = []
    for ids in streams:
        buffer.extend(ids)
        if separator is not None:
            buffer.append(separator)
        while len(buffer) >= length:
            yield EncodedRow((Encoded(buffer[:length], buffer[:length]),))
            buffer = buffer[length:]
    if len(buffer) > 1:
        yield EncodedRow((Encoded(buffer, list(buffer)),))
