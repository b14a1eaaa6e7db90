"""The schemas of dataset rows, and what everybody asks of a row: its conversation, its prompt, its texts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast, get_args

import orjson

from luthier.api.data import COLUMNS, ID, PARENTS, SOURCE, TOOLS, WEIGHT, Conversation, Message, Row, Schema
from luthier.api.errors import DataError
from luthier.artifacts.messages import messages, tools

__all__ = [
    "COLUMNS",
    "SCHEMAS",
    "asked_by",
    "compared_text",
    "content_of",
    "checked",
    "conversation",
    "conversations",
    "id_of",
    "messages",
    "prompt_of",
    "reference_of",
    "schema_of",
    "taught_by",
    "texts_of",
    "trainable_text",
    "weight_of",
]
SCHEMAS: tuple[Schema, ...] = get_args(Schema)
RESERVED = frozenset(column for columns in COLUMNS.values() for column in columns)
"""Names that mean the same in every dataset: a row has those of its schema, and no others."""
MEANT = frozenset((TOOLS, WEIGHT, ID, SOURCE, PARENTS))
"""Names with a meaning that rows of any schema may have beside its columns."""


def checked(schema: Schema, values: Mapping[str, Any]) -> Row:
    """A row with exactly the columns of a schema, and its tools where it has some; prompts and answers may be texts
    instead of messages.

    Raises:
        DataError: what is wrong with it.
    """
    if schema == "text":
        return {"text": _text(values)}
    row: Row = {}
    if values.get(TOOLS):
        row[TOOLS] = tools(values[TOOLS])
    if schema == "messages":
        return {"messages": conversation(values.get("messages"), "messages"), **row}
    row = {"prompt": _prompt(values.get("prompt"), "prompt"), **row}
    if schema == "preference":
        row |= {key: _answer(values.get(key), key) for key in ("chosen", "rejected")}
        if row["chosen"] == row["rejected"]:
            raise DataError("the chosen and the rejected answer are the same", hint="such a pair teaches nothing")
    if schema == "labelled":
        row |= {"completion": _answer(values.get("completion"), "completion"), "label": values.get("label")}
        if not isinstance(row["label"], bool):
            raise DataError("has no true or false under 'label'")
    return row


def _text(values: Mapping[str, Any]) -> str:
    value = values.get("text")
    if not isinstance(value, str) or not value.strip():
        raise DataError("has no text under 'text'")
    return value


def id_of(row: Row) -> str:
    """What identifies a row by what it holds: 16 hex digits of the SHA-256 of its schema's columns and its tools."""
    held = {key: value for key, value in row.items() if key in RESERVED or key == TOOLS}
    return hashlib.sha256(orjson.dumps(held, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def conversation(value: Any, field: str) -> list[Message]:
    """Messages that end with a turn of the assistant, which is what is trained.

    Raises:
        DataError: the last turn is not the assistant's, or is empty.
    """
    found = messages(value, field)
    last = found[-1]
    if last["role"] != "assistant":
        raise DataError(f"ends with a turn of the {last['role']}", hint="the last turn has to be the assistant's")
    if not last["content"].strip() and not last.get("tool_calls"):
        raise DataError("the assistant's last turn is empty")
    return found


def _prompt(value: Any, field: str) -> list[Message]:
    if isinstance(value, str) and value:
        return [Message(role="user", content=value)]
    found = messages(value, field)
    if found[-1]["role"] == "assistant":
        raise DataError("the prompt ends with a turn of the assistant", hint="it has to end with the user's")
    return found


def _answer(value: Any, field: str) -> list[Message]:
    if isinstance(value, str) and value:
        value = [Message(role="assistant", content=value)]
    found = conversation(value, field)
    if len(found) != 1:
        raise DataError(f"'{field}' has {len(found)} messages", hint="one assistant message is expected")
    return found


# -- what is asked of rows -------------------------------------------------------------------------


def schema_of(row: Row) -> Schema:
    """The schema that a stored row is of.

    Raises:
        DataError: of none.
    """
    own = RESERVED & row.keys()
    for schema, columns in COLUMNS.items():
        if own == frozenset(columns):
            return schema
    raise DataError(f"a row with the columns {', '.join(sorted(row))} matches no schema")


def conversations(row: Row) -> list[Conversation]:
    """The whole conversations of a row, each ending with an answer; none of a text or a prompt alone.

    Of a preference the chosen answer comes first.
    """
    if "messages" in row:
        return [Conversation(row["messages"], row.get(TOOLS) or ())]
    answers = [row[key] for key in ("chosen", "rejected", "completion") if key in row]
    return [Conversation([*row["prompt"], *answer], row.get(TOOLS) or ()) for answer in answers]


def weight_of(row: Mapping[str, Any]) -> float:
    """How much a row weighs in the loss; 1 where it does not say.

    Raises:
        DataError: it is no number from 0 up.
    """
    value = row.get(WEIGHT)
    if value is None:
        return 1.0
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise DataError(f"has {value!r} under '{WEIGHT}', which is no number from 0 up")
    return float(value)


def prompt_of(row: Row) -> Conversation:
    """The conversation that waits for an answer; empty for a text."""
    messages: list[Message] = row["messages"][:-1] if "messages" in row else row.get("prompt") or []
    return Conversation(messages, row.get(TOOLS) or ())


def reference_of(row: Row) -> str | None:
    """The text of the row's own (good) answer; None where it has none."""
    found = conversations(row)
    return found[0][-1]["content"] if found else None


def taught_by(row: Row) -> str:
    """What a row teaches, as one text: two rows with the same are twins, whatever else they hold.

    Of a conversation these are its messages, of a preference or a labelled answer the prompt (several answers to one
    prompt belong together), of a text the text. White space and upper case do not count.
    """
    schema = schema_of(row)
    column = {"text": "text", "messages": "messages"}.get(schema, "prompt")
    return _normalized(row[column])


def asked_by(row: Row) -> str:
    """What a row answers to, as one text, or what it teaches where it answers to nothing: rows with the same belong on
    one side of a split. White space and upper case do not count."""
    prompt = prompt_of(row)
    return _normalized(prompt) if prompt else taught_by(row)


def content_of(row: Row) -> str:
    """All that a row holds of its schema, as one text; white space and upper case do not count."""
    return _normalized({key: value for key, value in row.items() if key in RESERVED or key == TOOLS})


def compared_text(row: Row) -> str:
    """What is compared to find rows that are nearly the same: all but system prompts and tools, which many share."""
    if "text" in row:
        return row["text"]
    parts: list[str] = []
    for column in ("messages", "prompt", "chosen", "rejected", "completion"):
        for message in cast("list[Message]", row.get(column) or []):
            if message["role"] != "system":
                parts += [text for text in (message.get("reasoning"), message["content"]) if text]
                parts += [orjson.dumps(call["function"]).decode() for call in message.get("tool_calls") or ()]
    return "\n".join(parts)


def _normalized(value: Any) -> str:
    return orjson.dumps(_normal(value), option=orjson.OPT_SORT_KEYS).decode()


def _normal(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split()).casefold()
    if isinstance(value, Mapping):
        return {key: _normal(item) for key, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, Sequence):
        return [_normal(item) for item in cast("Sequence[Any]", value)]
    return value


def texts_of(row: Row) -> Iterator[str]:
    """Every text that a row of a schema holds: what a tokenizer is trained on, and what characters are counted of."""
    if "text" in row:
        yield row["text"]
    for part in ("messages", "prompt", "chosen", "rejected", "completion"):
        for message in cast("list[Message]", row.get(part) or []):
            if "reasoning" in message:
                yield message["reasoning"]
            yield message["content"]
            if "tool_calls" in message:
                yield orjson.dumps(message["tool_calls"]).decode()
    if TOOLS in row:
        yield orjson.dumps(row[TOOLS]).decode()


def trainable_text(schema: Schema) -> bool:
    """Whether rows of a schema hold what a model is trained to say."""
    return schema != "prompt"
