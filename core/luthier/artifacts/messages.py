"""Messages as they come in data: with texts or parts, tool calls in any of the usual spellings, thinking, flags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from luthier.api.data import Message
from luthier.api.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {"developer": "system", "function": "tool"}
"""Other names of roles, as OpenAI has or had them."""
REASONING = ("reasoning", "reasoning_content", "thinking")
"""Under which keys a message may have what was thought before its content."""
KEYS = ("role", "content", "tool_calls", "function_call", "tool_call_id", "name", "train", "weight", *REASONING)
"""What is read of a message."""


def messages(value: Any, field: str) -> list[Message]:
    """A list of messages with known roles and texts, in an order that makes sense.

    Raises:
        DataError: what is wrong, and at which message.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        # As tables hold them.
        value = _parsed(value, f"'{field}'")
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"has no messages under '{field}'", hint='a row looks like {"messages": [{"role": "user", ...')
    found = [message(item, index) for index, item in enumerate(cast("Sequence[Any]", value))]
    check_order(found)
    return found


def message(item: Any, index: int) -> Message:
    """One message.

    Args:
        item: The message as it is in the data.
        index: Its place, for errors.

    Raises:
        DataError: what is wrong.
    """
    if not isinstance(item, Mapping):
        raise DataError(f"message {index} is not an object with 'role' and 'content'")
    given = cast("Mapping[str, Any]", item)
    role = given.get("role")
    role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise DataError(f"message {index} has the unknown role {role!r}", hint=f"roles are {', '.join(ROLES)}")
    calls = _calls(given, index)
    content = _content(given.get("content"), index, optional=bool(calls))
    made = Message(role=role, content=content)
    if calls:
        if role != "assistant":
            raise DataError(f"message {index} has tool calls, and is none of the assistant's")
        made["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if given.get(key) is not None:
            made[key] = _text(given[key], key, index)
    thought = [_text(given[key], key, index) for key in REASONING if given.get(key)]
    if len(set(thought)) > 1:
        raise DataError(f"message {index} has two different texts of its thinking")
    if thought:
        made["reasoning"] = thought[0]
    train = _train(given, index)
    if train is not None:
        made["train"] = train
    return made


def _text(value: Any, key: str, index: int) -> str:
    if not isinstance(value, str):
        raise DataError(f"message {index} has no text under '{key}'")
    return value


def _train(given: Mapping[str, Any], index: int) -> bool | None:
    """Whether a turn is trained, where it says so; OpenAI's `weight` of a message is 0 or 1."""
    train, weight = given.get("train"), given.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"message {index} has no true or false under 'train'")
    if weight is None:
        return train
    if weight not in (0, 1) or (train is not None and train != bool(weight)):
        raise DataError(f"message {index} has {weight!r} under 'weight'", hint="it is 0 or 1: whether it is trained")
    return bool(weight)


def _content(value: Any, index: int, *, optional: bool) -> str:
    if value is None and optional:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        parts = cast("Sequence[Any]", value)
        return "".join(_part(part, index) for part in parts)
    raise DataError(f"message {index} has no text under 'content'")


def _part(part: Any, index: int) -> str:
    if isinstance(part, str):
        return part
    about = _mapping(part)
    if isinstance(about.get("text"), str) and about.get("type", "text") in ("text", "input_text", "output_text"):
        return about["text"]
    kind = about.get("type", "without a type")
    raise DataError(
        f"message {index} has a part that is no text ({kind})", hint="models of text cannot read it: remove the row"
    )


def _calls(given: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
    calls: Any = given.get("tool_calls") or []
    if isinstance(calls, str):
        calls = _parsed(calls, f"message {index} under 'tool_calls'")
    if given.get("function_call"):
        calls = [*calls, {"function": given["function_call"]}]
    if not isinstance(calls, Sequence):
        raise DataError(f"message {index} has tool calls that are no list")
    return [tool_call(call, f"message {index}") for call in cast("Sequence[Any]", calls)]


def tool_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call as chat templates read it: its arguments an object.

    Args:
        call: As OpenAI spells it, or the function alone, with arguments that are an object or its JSON.
        where: Which message it is of, for errors.

    Raises:
        DataError: what is wrong.
    """
    about = _mapping(call)
    function = _mapping(about.get("function", about))
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} has a tool call without the name of a function")
    arguments: Any = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", f"the arguments of {name} in {where}")
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where} calls {name} with arguments that are no object")
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": dict(_mapping(arguments))}}
    if isinstance(about.get("id"), str):
        made["id"] = about["id"]
    return made


def tools(value: Any) -> list[dict[str, Any]]:
    """The functions that the assistant may call, as OpenAI describes them.

    Args:
        value: A list of them, each as a tool or as the function alone; or its JSON.

    Raises:
        DataError: what is wrong.
    """
    if isinstance(value, str):
        value = _parsed(value, "'tools'")
    if not isinstance(value, Sequence):
        raise DataError("has no list under 'tools'")
    made: list[dict[str, Any]] = []
    for item in cast("Sequence[Any]", value):
        about = _mapping(item)
        function = _mapping(about.get("function", about))
        if not isinstance(function.get("name"), str):
            raise DataError("has a tool without the name of a function")
        made.append({"type": "function", "function": dict(function)})
    return made


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} cannot be read as JSON ({error})") from error


def check_order(found: Sequence[Message]) -> None:
    """Refuse turns in an order that no server and no template has.

    Raises:
        DataError: which message is out of place, and why.
    """
    waiting: list[str | None] = []
    for index, item in enumerate(found):
        role = item["role"]
        before = found[index - 1]["role"] if index else None
        if role == "system" and index:
            raise DataError(f"message {index} is of the system, which speaks first or not at all")
        if role == "tool":
            if not waiting:
                raise DataError(f"message {index} is a tool's result, and no call waits for one")
            name = item.get("tool_call_id")
            if name is not None and name not in waiting and None not in waiting:
                raise DataError(f"message {index} is the result of the call {name!r}, which no message made")
            waiting.remove(name if name in waiting else None if None in waiting else waiting[0])
            continue
        if waiting:
            raise DataError(f"message {index} follows tool calls of which {len(waiting)} have no result")
        if role == before and role in ("user", "assistant"):
            raise DataError(f"messages {index - 1} and {index} are both of the {role}", hint="join them into one turn")
        waiting = [call.get("id") for call in item.get("tool_calls") or ()]
