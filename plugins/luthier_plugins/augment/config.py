"""The config of the stage ``augment``."""

from __future__ import annotations

from typing import Annotated, ClassVar

from luthier.api import AugmenterUse, BadRows, DatasetInput, Field, Schema, StageConfig
from pydantic import model_validator


class AugmentConfig(StageConfig):
    """Makes new training rows, or leaves some out; validation and test rows pass through untouched, where new rows are
    of their schema."""

    dated: ClassVar[bool] = True

    data: DatasetInput | None = None
    """The dataset to start from; some augmenters make rows from nothing."""
    method: AugmenterUse
    """How new rows are made."""
    row_schema: Schema | None = None
    """The schema of the new rows; needed where there is no `data`. Otherwise the method knows it: that of `data`, or
    another one, such as `preference` of pairs."""
    keep_original: bool = True
    """Whether the rows of `data` stay in the training split; not those that a filter leaves out."""
    similar: Annotated[float | None, Field(gt=0, le=1)] = None
    """Leave new rows out that share so much with a row of the training split, or with one of those held out: the
    share of common runs of five words (Jaccard), such as 0.8. Those that hold the same as another row, or the prompt
    of one held out, always are."""
    bad_rows: BadRows = BadRows(drop_up_to=0.2)
    """The share of new rows that may fail, such as answers that are cut off; more of them stop the stage. They are
    counted by reason."""

    @model_validator(mode="after")
    def _schema_is_known(self) -> AugmentConfig:
        if self.data is None and self.row_schema is None:
            raise ValueError("give `data`, whose schema the new rows have, or `row_schema`")
        return self
