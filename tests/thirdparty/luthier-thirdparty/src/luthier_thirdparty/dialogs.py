"""A format with several rows in one, under keys that no built-in format has."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from luthier.api import DataError, Format, Message, Row, Schema

from luthier_thirdparty.config import DialogsConfig


class Dialogs(Format[DialogsConfig]):
    """``{"dialogs": [["question", "answer", ...], ...]}``."""

    schema: ClassVar[Schema] = "messages"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        return "dialogs" in raw

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        for turns in raw["dialogs"]:
            if len(turns) % 2:
                raise DataError("a dialog ends with a question")
            roles = ["user", "assistant"] * (len(turns) // 2)
            yield {"messages": [Message(role=role, content=text) for role, text in zip(roles, turns, strict=True)]}

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        return {"dialogs"}
