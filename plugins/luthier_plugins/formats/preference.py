"""The format ``preference``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from luthier.api import DataError, Format, Row, Schema
from luthier_plugins.formats.config import PreferenceConfig
from luthier_plugins.formats.parts import listed, role_keys


class Preference(Format[PreferenceConfig]):
    """Pairs of answers to one prompt."""

    schema: ClassVar[Schema] = "preference"

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        return {self.config.chosen, self.config.rejected} <= set(raw)

    def parse(self, raw: Mapping[str, Any]) -> Iterable[Row]:
        yield {**pair_of(raw, self.config), "tools": raw.get("tools")}

    def keys_read(self, raw: Mapping[str, Any]) -> Iterable[str]:
        return {*role_keys(self.config.prompt, self.config.chosen, self.config.rejected), "tools"}


def pair_of(raw: Mapping[str, Any], config: PreferenceConfig) -> Row:
    """The prompt and the two answers of a raw row; both answers may be whole conversations.

    Raises:
        DataError: there are no answers, or none of them says where the prompt ends.
    """
    chosen, rejected = (listed(raw.get(key), "assistant", key) for key in (config.chosen, config.rejected))
    if raw.get(config.prompt) is not None:
        prompt = listed(raw[config.prompt], "user", config.prompt)
        # Published sets repeat the prompt in both answers.
        chosen, rejected = (
            answer[len(prompt) :] if _begins(answer, prompt) else answer for answer in (chosen, rejected)
        )
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise DataError(
            f"has no '{config.prompt}', and its answers do not begin alike",
            hint="name the key of the prompt: `format: {uses: preference, prompt: ...}`",
        )
    # Two equal conversations differ nowhere: the last turn is the answer, and checking says that they are the same.
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _begins(answer: list[Any], prompt: list[Any]) -> bool:
    return len(answer) > len(prompt) and answer[: len(prompt)] == prompt
