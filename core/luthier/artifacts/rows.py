"""The schemas of dataset rows, and what everybody asks of a row: its conversation, its prompt, its texts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast, get_args

from luthier.api.data import COLUMNS, Message, Row, Schema
from luthier.api.errors import DataError

__all__ = [
    "COLUMNS",
    "SCHEMAS",
    "checked",
    "conversation",
    "conversations",
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
WEIGHT = "weight"
"""The column that says how much a row weighs in the loss, beside rows of 1."""
ROLES = ("system", "user", "assistant", "tool")


def checked(schema: Schema, values: Mapping[str, Any]) -> Row:
    """A row with exactly the columns of a schema; prompts and answers may be texts instead of messages.

    Raises:
        DataError: what is wrong with it.
    """
    if schema == "text":
        return {"text": _text(values)}
    if schema == "messages":
        return {"messages": conversation(values.get("messages"), "messages")}
    row: Row = {"prompt": _prompt(values.get("prompt"), "prompt")}
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


def messages(value: Any, field: str) -> list[Message]:
    """A list of messages with known roles and texts.

    Raises:
        DataError: what is wrong, and at which message.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"has no messages under '{field}'", hint='a row looks like {"messages": [{"role": "user", ...')
    return [_message(item, index) for index, item in enumerate(cast("Sequence[Any]", value))]


def _message(item: Any, index: int) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"message {index} is not an object with 'role' and 'content'")
    message = cast("Mapping[str, Any]", item)
    for key, calls in (("tool_calls", "tool calls"), ("function_call", "a function_call")):
        if message.get(key):
            raise DataError(
                f"message {index} has {calls}, which would be lost", hint="write them into its content, as text"
            )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"message {index} has the unknown role {role!r}", hint=f"roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"message {index} has no text under 'content'")
    made = Message(role=role, content=content)
    if message.get("train") is not None:
        if not isinstance(message["train"], bool):
            raise DataError(f"message {index} has no true or false under 'train'")
        made["train"] = message["train"]
    return made


def conversation(value: Any, field: str) -> list[Message]:
    """Messages that end with a turn of the assistant, which is what is trained.

    Raises:
        DataError: the last turn is not the assistant's, or is empty.
    """
    found = messages(value, field)
    last = found[-1]
    if last["role"] != "assistant":
        raise DataError(f"ends with a turn of the {last['role']}", hint="the last turn has to be the assistant's")
    if not last["content"].strip():
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


def conversations(row: Row) -> list[list[Message]]:
    """The whole conversations of a row, each ending with an answer; none of a text or a prompt alone.

    Of a preference the chosen answer comes first.
    """
    if "messages" in row:
        return [row["messages"]]
    answers = [row[key] for key in ("chosen", "rejected", "completion") if key in row]
    return [[*row["prompt"], *answer] for answer in answers]


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


def prompt_of(row: Row) -> list[Message]:
    """The conversation that waits for an answer; empty for a text."""
    return row["messages"][:-1] if "messages" in row else row.get("prompt") or []


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
    return json.dumps(_normal(row[column]), sort_keys=True, ensure_ascii=False)


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
        yield from (message["content"] for message in cast("list[Message]", row.get(part) or []))


def trainable_text(schema: Schema) -> bool:
    """Whether rows of a schema hold what a model is trained to say."""
    return schema != "prompt"
