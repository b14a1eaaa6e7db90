"""The metric ``exact_match``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from luthier.api import Prediction
from luthier_plugins.metrics.config import ExactMatchConfig


class ExactMatch:
    """The share of predictions equal to their reference, from 0 to 1."""

    needs: Literal["predictions"] = "predictions"

    def __init__(self, config: ExactMatchConfig) -> None:
        self.config = config

    def score(self, items: Sequence[Prediction]) -> float:
        equal = sum(self._normal(item.prediction) == self._normal(item.reference) for item in items)
        return equal / len(items)

    def _normal(self, text: str) -> str:
        text = text.strip() if self.config.strip else text
        return text.casefold() if self.config.ignore_case else text
