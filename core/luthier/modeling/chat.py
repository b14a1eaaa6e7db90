"""From rows to token ids and labels: what is trained, and what is only read."""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from luthier.api.data import Conversation, Message, Row
from luthier.api.errors import DataError
from luthier.artifacts.rows import conversations
from luthier.modeling.control import ControlTokens
from luthier.modeling.text import IGNORED, Encoded, render, template_of
from luthier.modeling.thinking import USUAL, Thinking, thinking_of

Answers = Literal["all", "apart", "last"]
"""Which answers of a conversation are trained."""
PROBE = "zq0 probe"
"""An answer that no template treats in a way of its own."""

CONTROL = "the names of control tokens in contents are encoded as text"
TRIMMED = "the chat template changes white space of an answer"
CUT = "the chat template leaves out a part of an answer, such as its thinking: it is trained as the row has it"
UNOPENED = "the chat template opens thinking that the answer lacks: it is closed at once"
UNASKED = "the chat template opens no turn for the assistant: the model is trained to open it itself"
EMPTY = "an empty turn of the assistant is read, not trained"


class ChatEncoder:
    """Makes tokens of rows: prompts as a server makes them, and behind each the answer as the model has to say it.

    Nothing in a message becomes a control token: only the chat template sets those.

    Args:
        tokenizer: The model's tokenizer.
        stop_ids: The tokens on which its generation stops.
        date: See `render`.

    Attributes:
        notes: What was found in the rows that were encoded so far, and how often; whoever asks may clear it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int] = (),
        date: datetime.date | None = None,
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.stop_ids = tuple(stop_ids)
        self.date = date
        self.notes: Counter[str] = Counter()
        self._unseen_of: dict[tuple[str, ...], frozenset[int]] = {}

    @cached_property
    def controls(self) -> ControlTokens:
        """The tokens that only the template sets: special ones, those that stop, and those around a user's turn."""
        marks = list(self.stop_ids)
        if self.tokenizer.chat_template is not None:
            try:
                text = self._render([Message(role="user", content=PROBE)], open_turn=True)
                marks += self.tokenizer(text, add_special_tokens=False)["input_ids"]
            except DataError:
                # It refuses a plain question: rows will be refused one by one.
                return ControlTokens(self.tokenizer, marks)
        return ControlTokens(self.tokenizer, marks)

    @cached_property
    def thinking(self) -> Thinking:
        """The template's marks of thinking, or those that most models use."""
        found = thinking_of(template_of(self.tokenizer), self._render) or USUAL
        try:
            prompt = self._render([Message(role="user", content=PROBE)], open_turn=True)
        except DataError:
            return found
        return replace(found, opened=prompt.rstrip().endswith(found.opens))

    def _render(self, messages: Sequence[Message], *, open_turn: bool = False) -> str:
        return render(self.tokenizer, messages, open_turn=open_turn, date=self.date)

    def _shielded(self, messages: Sequence[Message]) -> Conversation:
        """What templates are told: what a server tells them, without names of control tokens."""
        given = Conversation.of(messages)
        found = [self._all_shielded({name: item[name] for name in item if name != "train"}) for item in given]
        tools = self._all_shielded(given.tools)
        if tools != given.tools or any(
            item[name] != said[name] for said, item in zip(given, found, strict=True) for name in item
        ):
            self.notes[CONTROL] += 1
        return Conversation([self._with_thinking(item) for item in found], tools)

    def _all_shielded(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.controls.shielded(value)
        if isinstance(value, dict):
            return {key: self._all_shielded(item) for key, item in value.items()}
        return [self._all_shielded(item) for item in value] if isinstance(value, list) else value

    def _with_thinking(self, message: dict[str, Any]) -> Message:
        """A message whose reasoning stands before its content, between the marks that the model writes."""
        thought = message.pop("reasoning", None)
        if thought:
            marks = self.thinking
            message["content"] = f"{marks.opens}\n{thought}\n{marks.closes}\n\n{message['content']}"
        return cast("Message", message)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation that waits for the assistant.

        Raises:
            DataError: the chat template refuses it, or leaves out its tools.
        """
        shielded = self._shielded(messages)
        text = self._render(shielded, open_turn=True)
        self._check_tools(shielded, text)
        return self.controls.encode(text)

    def holds_control(self, messages: Sequence[Message]) -> str | None:
        """The name of a control token that a message holds; None if none does."""
        found = (self.controls.first_in(message["content"]) for message in messages)
        return next((match[0] for match in found if match), None)

    # -- answers -----------------------------------------------------------------------------------

    def conversation(self, messages: Sequence[Message], answers: Answers = "all") -> list[Encoded]:
        """Tokens of a conversation in which each answer is trained, stop token included.

        Each stands behind the prompt that a server would have made for it. Where a template writes earlier turns in
        another way than when they were the last (without their thinking, say), no one sequence shows every prompt:
        there are several then.

        Args:
            messages: The conversation.
            answers: Which answers are trained: ``all``, all of them ``apart``, each in its own sequence, or the
                ``last``.

        Raises:
            DataError: the template refuses it, loses a message, or writes no stop token of its own after an answer.
        """
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        turns = turns[-1:] if answers == "last" else turns
        if len(turns) > 1 and answers == "all":
            self._check_ends()
        shielded = self._shielded(messages)
        made: list[Encoded] = []
        ids: list[int] = []
        labels: list[int] = []
        for place in turns:
            if messages[place].get("train") is False:
                continue
            if not shielded[place]["content"].strip() and not shielded[place].get("tool_calls"):
                self.notes[EMPTY] += 1
                continue
            before, said = self._answer(shielded.upto(place + 1))
            if answers == "apart" or before[: len(ids)] != ids:
                made += [Encoded(ids, labels)] if ids else []
                ids, labels = [], []
            labels = [*labels, *[IGNORED] * (len(before) - len(ids)), *said]
            ids = [*before, *said]
        return [*made, Encoded(ids, labels)] if ids else made

    def answer(self, messages: Sequence[Message]) -> Encoded:
        """Tokens of a conversation of which the last answer alone is trained.

        Raises:
            DataError: see `conversation`.
        """
        before, said = self._answer(self._shielded(messages))
        return Encoded([*before, *said], [*[IGNORED] * len(before), *said])

    def _answer(self, messages: Conversation) -> tuple[list[int], list[int]]:
        """Tokens of the prompt of the last message, and of the message with its stop token."""
        prompt, said = self._turn(messages)
        return self._joined(prompt, said)

    def _turn(self, messages: Conversation) -> tuple[str, str]:
        """What a server sends to the model for the last message, and what the model has to say."""
        content = messages[-1]["content"]
        before = messages.upto(-1)
        whole = self._render(messages)
        prompt = self._prompt_text(messages, whole)
        self._check_contents(before, prompt)
        if messages[-1].get("tool_calls"):
            return prompt, self._called(messages[-1], prompt, whole)
        opened = prompt.rstrip().endswith(self.thinking.opens)
        if self.thinking.unended(content):
            raise DataError(f"the answer opens its thinking with {self.thinking.opens} and never closes it")
        if opened and content.lstrip().startswith(self.thinking.opens):
            # The prompt has the mark already.
            content = content.lstrip().removeprefix(self.thinking.opens)
            content = content.removeprefix("\n") if prompt.endswith("\n") else content
        said = self._as_rendered(before, content, prompt, whole)
        if said is not None:
            return prompt, said
        if opened and self.thinking.closes not in content:
            content = f"\n{self.thinking.closes}\n\n{content}"
            self.notes[UNOPENED] += 1
        return prompt, content + self._closing(before)

    def _called(self, message: Message, prompt: str, whole: str) -> str:
        """An answer that calls tools, as the template writes it behind its prompt, up to its stop token.

        Raises:
            DataError: the template writes something else there, a part of it, or no stop token.
        """
        rest = self._behind(prompt, whole)
        ends = [match for match in self.controls.all_in(rest) if self.controls.names[match[0]] in self.stop_ids]
        if not ends:
            raise DataError(
                "the chat template writes no tool calls that could be trained: they do not stand behind their prompt, "
                "with a stop token at their end",
                hint="give the model a template that writes tool calls, or take these rows out",
            )
        said = rest[: ends[0].end()]
        self._check_calls(message, said)
        if _squeezed(message["content"]) not in _squeezed(said):
            raise DataError("the chat template leaves out what an answer says beside its tool calls")
        return said

    def _behind(self, prompt: str, whole: str) -> str:
        """What a conversation has behind the prompt of its last message, as a model says it; nothing where it goes on
        in another way."""
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        head = prompt.rstrip().removesuffix(self.thinking.opens)
        if not prompt.rstrip().endswith(self.thinking.opens) or not whole.startswith(head):
            return ""
        rest = whole[len(head) :]
        if rest.lstrip().startswith(self.thinking.opens):
            # The prompt has the mark already.
            return rest.lstrip().removeprefix(self.thinking.opens)
        self.notes[UNOPENED] += 1
        return f"\n{self.thinking.closes}\n\n{rest}"

    @staticmethod
    def _check_calls(message: Message, text: str) -> None:
        """Refuse a text in which a call is missing, or one of its arguments.

        Raises:
            DataError: names the function.
        """
        for call in message.get("tool_calls") or ():
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            parts = [name, *(str(part) for part in _leaves(arguments))]
            if not all(part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text for part in parts):
                raise DataError(
                    f"the chat template leaves out the call of {name}, or an argument of it",
                    hint="give the model a template that writes tool calls, or take these rows out",
                )

    def _as_rendered(self, before: Conversation, content: str, prompt: str, whole: str) -> str | None:
        """An answer as the template writes it behind its prompt, up to its stop token; None where that is not all of
        it, or more: thinking of the template's own before that of the answer."""
        if not whole.startswith(prompt):
            if _squeezed(content) not in _squeezed(whole):
                self.notes[CUT] += 1
            return None
        rest = whole[len(prompt) :]
        for closing in (self._usual_closing, None):
            if closing is None:
                closing = self._closing(before)
            for text in dict.fromkeys((content, content.strip())):
                place = rest.find(text + closing)
                if place >= 0 and not self._thinks_twice(rest[:place], content):
                    self.notes[UNASKED] += not self._opening and bool(rest[:place].strip())
                    self.notes[TRIMMED] += text != content
                    return rest[: place + len(text) + len(closing)]
            end = rest.rfind(closing)
            start, behind, _ = _squeezed(rest[:end]).rpartition(_squeezed(content)) if end >= 0 else ("", "", "")
            if behind and not self._thinks_twice(start, content):
                self.notes[TRIMMED] += 1
                return rest[: end + len(closing)]
        self.notes[CUT] += 1
        return None

    def _thinks_twice(self, before: str, content: str) -> bool:
        return self.thinking.closes in before and self.thinking.closes in content

    def _prompt_text(self, messages: Conversation, whole: str) -> str:
        try:
            return self._render(messages.upto(-1), open_turn=True)
        except DataError:
            # Templates refuse no messages at all, before an assistant that speaks first.
            opening = self._opening
            before, found, _ = whole.rpartition(messages[-1]["content"].strip())
            if not opening or not found or not before.endswith(opening):
                raise
            return before

    @cached_property
    def _opening(self) -> str:
        """What the template writes to open a turn of the assistant."""
        question = [Message(role="user", content=PROBE)]
        return self._render(question, open_turn=True).removeprefix(self._render(question))

    @cached_property
    def _usual_closing(self) -> str:
        return self._closing(Conversation([Message(role="user", content=PROBE)]))

    def _check_ends(self) -> None:
        """Refuse to train earlier answers where the template does not end them as it ends the last.

        Raises:
            DataError: names both ends.
        """
        if self._earlier_end is not None and not self._usual_closing.endswith(self._earlier_end):
            last = self._usual_closing.strip()
            raise DataError(
                f"the chat template ends an earlier answer with {self._earlier_end} and the last with {last}: the "
                "earlier one has no stop token of its own",
                hint="train each answer as the last of its own sequence with `answers: apart`, or `answers: last`",
            )

    @cached_property
    def _earlier_end(self) -> str | None:
        """The control token with which the template ends an answer that another turn follows."""
        question = Message(role="user", content=PROBE.upper())
        text = self._render([question, Message(role="assistant", content=PROBE), question], open_turn=True)
        found = self.controls.first_in(text.rpartition(PROBE)[2])
        return None if found is None else found[0]

    def _closing(self, before: Conversation) -> str:
        """What the template writes behind an answer, up to the stop token that ends the turn.

        Raises:
            DataError: it writes none, or another control token first.
        """
        whole = self._render(before.plus(Message(role="assistant", content=PROBE)))
        _, found, behind = whole.rpartition(PROBE)
        if not found:
            raise DataError(
                "the chat template does not write the text of an answer as it is",
                hint="it cannot be told where an answer ends: give the model another template",
            )
        first = self.controls.first_in(behind)
        hint = "set eos_token_id in the generation config to the token that ends a turn"
        if first is None:
            raise DataError(
                "the chat template writes no stop token after the assistant's turn: the model would never stop",
                hint=hint,
            )
        if self.controls.names[first[0]] not in self.stop_ids:
            stops = ", ".join(map(str, self.tokenizer.convert_ids_to_tokens(list(self.stop_ids)))) or "none"
            raise DataError(
                f"the chat template ends the assistant's turn with {first[0]}, which is no stop token of the model "
                f"({stops}): it would never stop there",
                hint=hint,
            )
        return behind[: first.end()]

    def _check_contents(self, messages: Conversation, text: str) -> None:
        """Refuse a prompt in which a message is missing, or a tool.

        Raises:
            DataError: names it.
        """
        self._check_tools(messages, text)
        squeezed: str | None = None
        unseen = self._unseen([message["role"] for message in messages])
        for place, message in enumerate(messages):
            content = message["content"].strip()
            self._check_calls(message, text)
            if message["role"] == "assistant":
                content = self.thinking.split(content)[1].strip()
            if content and place in unseen:
                found = False
            elif content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text:
                found = True
            else:
                squeezed = _squeezed(text) if squeezed is None else squeezed
                found = _squeezed(content) in squeezed
            if not found:
                raise DataError(
                    f"the chat template leaves out or changes message {place}, of the role {message['role']}",
                    hint="the model would be trained without what it answers to: give the model a template that "
                    "writes this role",
                )

    @staticmethod
    def _check_tools(messages: Conversation, text: str) -> None:
        for tool in messages.tools:
            name = tool["function"]["name"]
            if name not in text:
                raise DataError(
                    f"the chat template leaves out the tool {name}",
                    hint="give the model a template that writes tools, or take them out of the rows",
                )

    def _unseen(self, roles: Sequence[str]) -> frozenset[int]:
        """The places of messages that the template leaves out of a conversation of these roles, whatever they say:
        their text may stand elsewhere by chance."""
        key = tuple(roles)
        if key not in self._unseen_of:
            marks = [f"zq{place}mark" for place in range(len(key))]
            messages = [Message(role=role, content=mark) for role, mark in zip(key, marks, strict=True)]
            try:
                text = self._render(messages, open_turn=key[-1:] != ("assistant",)) if messages else ""
            # What it says of the messages themselves is asked for elsewhere.
            except DataError:
                text = " ".join(marks)
            self._unseen_of[key] = frozenset(place for place, mark in enumerate(marks) if mark not in text)
        return self._unseen_of[key]

    def _joined(self, prompt: str, said: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt as a server makes them, and of what the model says behind it.

        Raises:
            DataError: the two cannot be told apart.
        """
        encode = self.controls.encode
        before, whole = encode(prompt), encode(prompt + said)
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        # The answer begins with what would become one token with the end of the prompt, such as a line break: a model
        # that goes on from the prompt's tokens cannot say that token.
        for start in (self.controls.last_in(prompt), "a", "."):
            if start is None:
                continue
            first, both = encode(start), encode(start + said)
            behind = both[len(first) :]
            if both[: len(first)] == first and self._decoded([*before, *behind]) == self._decoded(whole):
                return before, behind
        raise DataError("the tokenizer does not tell where the prompt ends and the answer begins")

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # -- documents ---------------------------------------------------------------------------------

    def document(self, row: Row) -> list[int]:
        """Tokens of a text or a whole conversation, between those with which the tokenizer begins and ends one.

        Raises:
            DataError: the chat template refuses the conversation, or leaves a message out.
        """
        if "text" in row:
            text = self.controls.shielded(row["text"])
            self.notes[CONTROL] += text != row["text"]
        else:
            messages = self._shielded(conversations(row)[0])
            text = self._render(messages)
            self._check_contents(messages, text)
            squeezed = _squeezed(text)
            answers = [item["content"] for item in messages if item["role"] == "assistant"]
            lost = [content for content in answers if _squeezed(content) not in squeezed]
            if lost:
                raise DataError("the chat template leaves out a part of an answer, such as its thinking")
        ids = self.controls.encode(text)
        first, last = self._frame
        ids = ids if ids[: len(first)] == first else [*first, *ids]
        ended = text.rstrip().endswith(tuple(self._decoded([number]) for number in last)) if last else True
        return ids if ended else [*ids, *last]

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer sets before a document, and the one that ends it."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        framed: list[int] = self.tokenizer("a")["input_ids"]
        place = next(n for n in range(len(framed)) if framed[n : n + len(bare)] == bare)
        eos: int | None = self.tokenizer.eos_token_id
        return framed[:place], [] if eos is None else [eos]


def _leaves(value: Any) -> Iterator[str | int | float]:
    """The texts and numbers in a value."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        yield value


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)
