"""The config of the stage ``augment``."""

from __future__ import annotations

from luthier.api import AugmenterUse, DatasetInput, FormatUse, StageConfig


class AugmentConfig(StageConfig):
    """Makes new training rows; validation and test rows pass through untouched."""

    data: DatasetInput | None = None
    """The dataset to start from; some augmenters make rows from nothing."""
    method: AugmenterUse
    """How new rows are made."""
    format: FormatUse | None = None
    """The format of the new rows; by default that of `data`."""
    keep_original: bool = True
    """Whether the rows of `data` stay in the training split."""
