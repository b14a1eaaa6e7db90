"""A format of labelled answers."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from luthier.api import Format, Row, Schema
from luthier.artifacts.rows import checked

from luthier_thirdparty.config import ThumbsConfig


class Thumbs(Format[ThumbsConfig]):
    """``{"asked": ..., "said": ..., "thumb": "up"}``."""

    schema: ClassVar[Schema] = "labelled"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        return "thumb" in raw

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        values = {"prompt": raw.get("asked"), "completion": raw.get("said"), "label": raw.get("thumb") == "up"}
        yield checked("labelled", values)

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        return {"asked", "said", "thumb"}
