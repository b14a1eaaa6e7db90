"""The config of the stage ``data``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from luthier.api import Config, Field, FileSource, FormatUse, Schema, StageConfig
from luthier.api.config import Components
from luthier.artifacts.rows import RESERVED
from pydantic import PrivateAttr, field_validator


class SplitConfig(Config):
    """Shares of the rows that are held out of training."""

    validation: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The share of rows that training stages evaluate on."""
    test: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The share of rows that `evaluate` reads."""


class DataConfig(StageConfig):
    """Reads a data file into a dataset; every row is checked."""

    quick: ClassVar[bool] = True

    source: FileSource
    """The file: ``.jsonl`` with one row per line, or ``.txt`` with one text per paragraph."""
    format: FormatUse | None = None
    """What a row looks like; by default recognised from the first rows, when the recipe is planned."""
    split: SplitConfig | Literal["train", "validation", "test"] = SplitConfig()
    """Shares to hold out, or the one split that all rows belong to."""
    keep: list[str] = []
    """Further text keys to keep as columns, such as the name of a slice; not those that are columns of a schema, such
    as ``text`` or ``prompt``."""
    on_error: Literal["fail", "drop"] = "fail"
    """What to do with a bad row: stop (all are listed), or drop it (all are counted by reason)."""
    limit: int | None = Field(default=None, gt=0)
    """Read only that many rows."""

    _schema: Schema | None = PrivateAttr(default=None)

    @field_validator("keep")
    @classmethod
    def _not_reserved(cls, value: list[str]) -> list[str]:
        reserved = sorted(RESERVED & set(value))
        if reserved:
            raise ValueError(f"'{reserved[0]}' is a column of a schema and would change what rows mean: rename the key")
        return value

    def resolved(self, sources: Mapping[str, Sequence[str]], components: Components) -> StageConfig:
        files = [Path(place) for place in sources.get("source", [])]
        if self.format is not None or not files:
            return self._of_schema(components)
        # Only where it is needed: a recipe that names its formats reads no data to be planned.
        from luthier_plugins.data.recognise import recognised

        return self.model_copy(update={"format": recognised(files[0], components)})._of_schema(components)

    def _of_schema(self, components: Components) -> DataConfig:
        """This config, which knows the schema of the rows that it makes."""
        if self.format is None:
            return self
        made = self.model_copy()
        made._schema = getattr(components.build(self.format, None), "schema", None)
        return made

    def expected_facts(
        self, inputs: Mapping[str, Sequence[Mapping[str, Any]]], sources: Mapping[str, Sequence[str]]
    ) -> Mapping[str, Any]:
        (path,) = [Path(place) for place in sources["source"]] or [Path()]
        if not path.is_file():
            return {}
        with path.open("rb") as file:
            there = sum(1 for line in file if line.strip())
        rows = min(there, self.limit or there)
        return {
            "rows": self._expected_rows(rows),
            "characters": path.stat().st_size * rows // max(1, there),
            **({} if self._schema is None else {"schema": self._schema}),
        }

    def _expected_rows(self, rows: int) -> dict[str, int]:
        """About how many rows each split will have; a split that is not named will have none."""
        if not isinstance(self.split, SplitConfig):
            return {self.split: rows}
        shares = {"validation": self.split.validation, "test": self.split.test}
        held_out = {name: max(1, round(rows * share)) for name, share in shares.items() if share}
        return {"train": rows - sum(held_out.values()), **held_out}
