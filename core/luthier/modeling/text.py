"""From rows to token ids and labels: what is trained, and what is only read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier.api.data import Message
from luthier.api.errors import DataError

IGNORED = -100
"""The label of a token that is not trained on."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as tokens: `labels` repeats the ids that are trained on, and is -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, open_turn: bool = False, **variables: str
) -> str:
    """The text of a conversation in the model's chat template.

    Args:
        open_turn: End with the opening of an assistant turn, for the model to go on from.
        **variables: What the template may use beside the messages, such as `date_string`.

    Raises:
        DataError: the tokenizer has no chat template, or it refuses these messages.
    """
    template: Any = tokenizer
    if template.chat_template is None:
        raise DataError("the model has no chat template", hint="tune a model that has one, or train on `text`")
    try:
        return template.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=open_turn, **variables
        )
    # Templates may raise anything: jinja2.TemplateError, TypeError, ValueError.
    except Exception as error:
        raise DataError(f"the chat template refuses the messages: {error}") from error


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], stop_ids: Sequence[int]
) -> Encoded:
    """Tokens of a conversation in which each assistant turn is trained, stop token included.

    A turn's span is found by rendering the conversation up to the turn, open and whole: templates need no
    marks for it. What follows the stop token (often a line break) is not trained.

    Raises:
        DataError: the template renders a prefix of a conversation differently, or writes no stop token
            after an assistant turn.
    """
    text = render(tokenizer, messages)
    spans = [
        _turn_span(tokenizer, messages, index, text)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    encoding: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoding["input_ids"]
    labels = [IGNORED] * len(ids)
    stops = set(stop_ids)
    for start, end in spans:
        inside = [place for place, (first, _) in enumerate(encoding["offset_mapping"]) if start <= first < end]
        stop = next((place for place in inside if ids[place] in stops), None)
        if stop is None:
            raise DataError(
                "the chat template writes no stop token after the assistant's turn: the model would never stop",
                hint="set eos_token_id in the generation config to the token that ends a turn",
            )
        for place in inside:
            if place <= stop:
                labels[place] = ids[place]
    return Encoded(ids, labels)


def _turn_span(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], index: int, text: str
) -> tuple[int, int]:
    opened = render(tokenizer, messages[:index], open_turn=True)
    closed = render(tokenizer, messages[: index + 1])
    if not text.startswith(opened):
        raise DataError(f"the chat template renders the turns before message {index} differently on their own")
    # Templates that treat the last turn differently still agree up to where the next turn begins.
    return len(opened), len(closed) if text.startswith(closed) else len(text)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Tokens of a plain text, all of them trained on."""
    encoding: Any = tokenizer(text, add_special_tokens=False)
    return Encoded(encoding["input_ids"], list(encoding["input_ids"]))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation that waits for the assistant."""
    encoding: Any = tokenizer(render(tokenizer, messages, open_turn=True), add_special_tokens=False)
    return encoding["input_ids"]


def encode_answer(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], stop_ids: Sequence[int]) -> Encoded:
    """Tokens of a conversation of which the last answer alone is trained, also where the prompt holds earlier turns of
    the assistant; what follows its stop token is left out.

    Raises:
        DataError: see `encode_conversation`.
    """
    encoded = encode_conversation(tokenizer, messages, stop_ids)
    last = max(place for place, label in enumerate(encoded.labels) if label != IGNORED)
    first = last
    while first > 0 and encoded.labels[first - 1] != IGNORED:
        first -= 1
    ids = encoded.input_ids[: last + 1]
    return Encoded(ids, [IGNORED] * first + ids[first:])
