"""The config of the stage ``mix``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from luthier.api import DatasetInputs, Field, StageConfig
from pydantic import model_validator

Share = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class MixConfig(StageConfig):
    """Joins datasets of one schema. Which rows are taken follows from each row and the seed: no row is taken twice
    unless `repeats` says so, and most stay the same when rows are added. Rows that are held out are all taken."""

    quick: ClassVar[bool] = True

    data: DatasetInputs
    """The datasets."""
    shares: list[Share] | None = None
    """What share of the result each dataset has, beside each other: `[3, 1]`. By default all rows of all are there."""
    by: Literal["rows", "tokens"] = "rows"
    """What is shared out; tokens are estimated from the texts."""
    size: int | None = Field(default=None, gt=0)
    """Rows (or tokens) of the result, of the split `train`; by default as many as the shares allow with what there
    is."""
    caps: list[Count | None] | None = None
    """The most rows that are taken of each dataset, each once."""
    repeats: list[Count] | None = None
    """How often each row of a dataset may be taken: `[1, 3]` takes those of the second up to three times."""

    @model_validator(mode="after")
    def _one_for_each(self) -> MixConfig:
        for name in ("shares", "caps", "repeats"):
            values: list[Any] | None = getattr(self, name)
            if values is not None and len(values) != len(self.data):
                raise ValueError(f"`{name}` has {len(values)} entries for {len(self.data)} datasets")
        if self.size is not None and self.shares is None:
            raise ValueError("`size` needs `shares`: which rows are left out?")
        return self

    def early_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        schemas = sorted({str(facts["schema"]) for facts in inputs.get("data", []) if "schema" in facts})
        return [f"datasets of different schemas ({', '.join(schemas)}) cannot be mixed"] if len(schemas) > 1 else []
