"""The config of the stage ``augment``."""

from __future__ import annotations

from typing import ClassVar

from luthier.api import AugmenterUse, DatasetInput, Schema, StageConfig
from pydantic import model_validator


class AugmentConfig(StageConfig):
    """Makes new training rows; validation and test rows pass through untouched."""

    dated: ClassVar[bool] = True

    data: DatasetInput | None = None
    """The dataset to start from; some augmenters make rows from nothing."""
    method: AugmenterUse
    """How new rows are made."""
    row_schema: Schema | None = None
    """The schema of the rows; needed where there is no `data`, whose schema it is otherwise."""
    keep_original: bool = True
    """Whether the rows of `data` stay in the training split."""

    @model_validator(mode="after")
    def _schema_is_known(self) -> AugmentConfig:
        if (self.data is None) == (self.row_schema is None):
            raise ValueError("give `data`, whose schema the new rows have, or `row_schema`: one of them")
        return self
