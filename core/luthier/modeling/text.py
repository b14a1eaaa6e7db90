"""Texts in a chat template, and as tokens."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase

from luthier.api.data import Conversation, Message
from luthier.api.errors import DataError

IGNORED = -100
"""The label of a token that is not trained on."""
UNDATED = datetime.date(2024, 7, 26)
"""The day that a template is told which asks for it, where a recipe names none: the one that Llama 3's has built in."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens in the order in which a model sees them.

    Attributes:
        input_ids: The tokens.
        labels: The ids that are trained on, and -100 elsewhere.
        lengths: The tokens of each document, where several are packed together.
    """

    input_ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...] = ()


def template_of(tokenizer: Any, tools: Sequence[Mapping[str, Any]] = ()) -> str | None:
    """The chat template of a tokenizer: its only one, or of several the one for conversations without tools, or with
    these."""
    known = tokenizer.chat_template
    if isinstance(known, dict) and "default" not in known:
        return None
    return None if known is None else tokenizer.get_chat_template(tools=list(tools) or None)


def uses_clock(template: str | None) -> bool:
    """Whether a chat template asks for the day."""
    return template is not None and "strftime_now" in template


CLOCK = (
    "{%- macro strftime_now(format) -%}{{ days[format] if format in days else "
    "raise_exception('the day is asked for in a form that the template does not spell out') }}{%- endmacro %}{{ '' }}"
)
"""Takes the place of transformers' own clock; functions cannot be handed to a template."""
LEXER = jinja2.Environment()
"""Reads the texts in a template's code."""


def _dated(template: str, date: datetime.date) -> dict[str, Any]:
    """What has a template write a day instead of asking the clock."""
    texts = (text[1:-1] for _, kind, text in LEXER.lex(template) if kind == "string")
    formats = {text for text in texts if "%" in text}
    return {"chat_template": CLOCK + template, "days": {text: date.strftime(text) for text in sorted(formats)}}


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    open_turn: bool = False,
    date: datetime.date | None = None,
    **variables: str,
) -> str:
    """The text of a conversation in the model's chat template.

    Args:
        messages: The messages; the tools of a `Conversation` are told to the template.
        open_turn: End with the opening of an assistant turn, for the model to go on from.
        date: The day that a template is told which asks for it; by default the same day always.
        **variables: What the template may use beside the messages, such as `date_string`.

    Raises:
        DataError: the tokenizer has no chat template, or it refuses these messages.
    """
    tools = Conversation.of(messages).tools
    template = template_of(tokenizer, tools)
    if template is None:
        raise DataError("the model has no chat template", hint="tune a model that has one, or train on `text`")
    clock = _dated(template, date or UNDATED) if uses_clock(template) else {}

    def rendered(messages: Sequence[Message]) -> str:
        return cast("Any", tokenizer).apply_chat_template(
            list(messages),
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=open_turn,
            **clock,
            **variables,
        )

    # Templates may raise anything: jinja2.TemplateError, TypeError, ValueError.
    try:
        return rendered(messages)
    except Exception as error:
        if any("tool_calls" in message for message in messages):
            # Some, such as DeepSeek V3's, join arguments to texts: they want JSON.
            with suppress(Exception):
                return rendered([_with_json(message) for message in messages])
        raise DataError(f"the chat template refuses the messages: {error}") from error


def _with_json(message: Message) -> Message:
    """A message whose tool calls have their arguments as JSON."""
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message.get("tool_calls") or ()
    ]
    return cast("Message", {**message, "tool_calls": calls}) if calls else message


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Tokens of a plain text, all of them trained on."""
    encoding: Any = tokenizer(text, add_special_tokens=False)
    return Encoded(encoding["input_ids"], list(encoding["input_ids"]))
