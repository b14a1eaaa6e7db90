"""The config of the stage ``data``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from luthier.api import BadRows, Config, DataError, DataSources, Field, FormatUse, Schema, StageConfig
from luthier.api.config import Components
from luthier.api.data import ID
from luthier.artifacts.rows import MEANT, RESERVED
from pydantic import PrivateAttr, field_validator, model_validator

HUB = "hf:"


class SplitConfig(Config):
    """Shares of the rows that are held out of training. Which rows is told from each row itself: a row stays on its
    side when others are added, and rows with the same prompt are always on the same side."""

    validation: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The share of rows that training stages evaluate on."""
    test: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The share of rows that `evaluate` reads."""
    group_by: str | None = None
    """A key of the rows, such as an author's name: rows with the same value are on the same side."""

    near_duplicates: Annotated[float, Field(gt=0, le=1)] | Literal[False] = 0.8
    """How similar rows are, at least, that are always on one side: the share of their runs of five words that both
    have; system prompts do not count. `false` looks for none."""

    @model_validator(mode="after")
    def _something_is_left(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError("the shares of validation and test leave nothing to train on")
        return self


class DedupeConfig(Config):
    """Leaves out rows that repeat another one; the first of them stays."""

    near: Annotated[float, Field(gt=0, le=1)] | None = None
    """How similar a row is to another one, at least, to count as its repetition: the share of their runs of five words
    that both have. By default only rows that are the same count, but for white space and upper case."""


class HubConfig(Config):
    """Which rows of a dataset on the Hugging Face hub are read."""

    config: str | None = None
    """The configuration, as its card calls it; by default its only one, or the default."""
    split: str = "train"
    """The split there, such as ``train`` or ``train[:10%]``; how the rows are split here, `split` says."""


class DataConfig(StageConfig):
    """Reads data files into a dataset; every row is checked, and gets an `id` and the place that it is from."""

    quick: ClassVar[bool] = True

    source: DataSources
    """Files, one or several: each a file, a folder, or a pattern such as ``chats/*.jsonl``. JSON lines or arrays
    (``.jsonl``, ``.json``), tables (``.csv``, ``.tsv``, ``.parquet``, ``.arrow``), texts (``.txt``, a row for each
    paragraph; ``.md``, one for each file), all but Parquet and Arrow also as ``.gz`` or ``.zst``. Or datasets of the
    Hugging Face hub: ``hf:org/name``, ``hf:org/name@revision``."""
    hub: HubConfig = HubConfig()
    """Which rows are read of datasets on the hub."""
    format: FormatUse | None = None
    """What a row looks like; by default recognised from the first rows, when the recipe is planned. What is on the hub
    is not read then: such a stage names it."""
    columns: dict[str, str] = {}
    """Other names for keys of the rows, such as ``{question: prompt, answer: completion}``, before anything is read
    of them."""
    split: SplitConfig | Literal["train", "validation", "test"] = SplitConfig()
    """Shares to hold out, or the one split that all rows belong to."""
    keep: list[str] = []
    """Further keys to keep as columns, such as the name of a slice; `id`: rows have the ids of the data, in place of
    digests of what they hold. Not those that mean something else, such as ``text`` or ``prompt``: give them another
    name with `columns`."""
    dedupe: DedupeConfig | None = None
    """Whether rows that repeat another one are left out: `{}` those that are the same, `{near: 0.8}` similar ones
    too."""
    bad_rows: BadRows = BadRows(drop_up_to=0.0)
    """The share of rows that may be bad: they are left out, counted by reason. By default one stops the stage."""
    limit: Annotated[int | None, Field(gt=0)] = None
    """Read only that many rows."""

    _schema: Schema | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _hub_is_read(self) -> DataConfig:
        if self.hub != HubConfig() and not self.from_hub:
            raise ValueError("`hub` is for sources such as hf:org/name, and there are none")
        return self

    @field_validator("keep")
    @classmethod
    def _not_reserved(cls, value: list[str]) -> list[str]:
        reserved = sorted((RESERVED | MEANT - {ID}) & set(value))
        if reserved:
            raise ValueError(
                f"'{reserved[0]}' is a column with a meaning of its own, and would change what rows mean: rename the "
                f"key with `columns: {{{reserved[0]}: ...}}`"
            )
        return value

    @property
    def from_hub(self) -> list[str]:
        """The sources that are on the hub."""
        return [value for value in self.source if value.startswith(HUB)]

    def resolved(self, sources: Mapping[str, Sequence[str]], components: Components) -> StageConfig:
        if self.format is None and self.from_hub:
            raise DataError(
                f"what is in {self.from_hub[0]} is not read to plan a recipe",
                hint="name what its rows look like: `format: messages`, or another one of `luthier plugins`",
            )
        if self.format is not None or len(sources.get("source", [])) < len(self.source):
            return self._of_schema(components)
        # Only where it is needed: a recipe that names its formats reads no data to be planned.
        from luthier_plugins.data.recognise import recognised

        found = recognised([Path(place) for place in sources["source"]], self.columns, components)
        return self.model_copy(update={"format": found})._of_schema(components)

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
        # Only here: a module that validates recipes loads no libraries of data.
        from luthier.data.sizes import size_of

        known: dict[str, Any] = {} if self._schema is None else {"schema": self._schema}
        found = [size_of(Path(place)) for place in sources.get("source", [])]
        if not found or None in found:
            return known
        there = sum(size.rows for size in found if size)
        rows = min(there, self.limit or there)
        characters = sum(size.characters for size in found if size) * rows // max(1, there)
        return {**known, "rows": self._expected_rows(rows), "characters": characters}

    def _expected_rows(self, rows: int) -> dict[str, int]:
        """About how many rows each split will have; a split that is not named will have none."""
        if not isinstance(self.split, SplitConfig):
            return {self.split: rows}
        shares = {"validation": self.split.validation, "test": self.split.test}
        held_out = {name: max(1, round(rows * share)) for name, share in shares.items() if share}
        return {"train": rows - sum(held_out.values()), **held_out}
