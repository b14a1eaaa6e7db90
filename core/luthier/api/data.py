"""The protocols of data: formats and augmenters, and what a row is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NotRequired, TypedDict

from luthier.api.component import C, Implementation

Row = dict[str, Any]
"""The columns of a schema, and those that a recipe keeps beside them."""
Schema = Literal["text", "messages", "preference", "labelled", "prompt"]
"""What the rows of a dataset hold, see `luthier.artifacts.rows`."""
COLUMNS: dict[Schema, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "labelled": ("prompt", "completion", "label"),
    "prompt": ("prompt",),
}
"""The columns that every row of a schema has; there may be others."""
TOOLS = "tools"
"""The column of the functions that the assistant may call, as OpenAI describes them."""
WEIGHT = "weight"
"""The column that says how much a row weighs in the loss, beside rows of 1."""
ID = "id"
"""The column of what identifies a row: a digest of what it teaches with, see `luthier.artifacts.rows.id_of`."""
SOURCE = "source"
"""The column that says where a row is from: its file and line, or the augmenter that made it."""
PARENTS = "parents"
"""The column with the ids of the rows that a row was made from."""


class Message(TypedDict):
    """One turn of a conversation; `role` is ``system``, ``user``, ``assistant`` or ``tool``."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning: NotRequired[str]
    train: NotRequired[bool]


class Conversation(list[Message]):
    """Messages, with the functions that the assistant may call in them.

    Attributes:
        tools: The functions, as OpenAI describes them; none in most conversations.
    """

    def __init__(self, messages: Iterable[Message] = (), tools: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(messages)
        self.tools = list(tools)

    @classmethod
    def of(cls, messages: Iterable[Message]) -> Conversation:
        """Messages as a conversation: with their tools, where they are one."""
        return messages if isinstance(messages, Conversation) else cls(messages)

    def upto(self, end: int) -> Conversation:
        """The messages before a place."""
        return Conversation(self[:end], self.tools)

    def plus(self, *messages: Message) -> Conversation:
        """These messages, and others behind them."""
        return Conversation([*self, *messages], self.tools)


class Format(Implementation[C]):
    """Kind ``format``: how a raw row of a source becomes rows of a schema.

    Planning asks formats too, so their modules import neither torch nor transformers.
    """

    schema: ClassVar[Schema]
    """The schema of the rows it makes."""

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        """Whether a raw row looks like one of this format; asked where a recipe names none."""
        raise NotImplementedError

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        """The rows that a raw row stands for: one for most formats, several where it holds several.

        Rows are checked against the schema by who asked; a format need not.

        Raises:
            DataError: what is wrong with the row and what to do; the caller adds file and line.
        """
        raise NotImplementedError

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        """The keys of a raw row that it reads; users are warned of the others, which would be lost unseen.

        By default the schema's columns and every key that a text in the config names. For keys inside of a list, write
        ``messages.role``: where any such is named, users are warned of the others inside.
        """
        return {*COLUMNS[self.schema], *(value for _, value in self.config if isinstance(value, str))}


class Augmenter(Implementation[C]):
    """Kind ``augmenter``: new rows from rows, or from nothing."""

    replaces: ClassVar[bool] = False
    """Whether its rows are what is left of those given, as a filter's are, and not new ones beside them."""

    def makes(self, given: Schema) -> Schema:
        """The schema of the rows that it makes of those of a schema."""
        return given

    @property
    def dropped(self) -> Mapping[str, int]:
        """How many rows could not be made, by reason, so far; a stage stops when these are too many."""
        return {}

    def rows(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Yield new rows, made from those given, of the schema that the stage names. The same `context.seed` must give
        the same rows. A row that is made of others says so with their ids under ``parents``."""
        raise NotImplementedError
