"""The augmenter ``filter``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jinja2 import TemplateError
from luthier.api import Augmenter, DataError, Row
from luthier.artifacts.rows import conversations, prompt_of, reference_of
from luthier_plugins.augmenters.asking import scores
from luthier_plugins.augmenters.config import FilterConfig
from luthier_plugins.augmenters.rules import compiled


class Filter(Augmenter[FilterConfig]):
    """The augmenter ``filter``."""

    replaces = True
    _unmarked = 0

    @property
    def dropped(self) -> Mapping[str, int]:
        return {"got no mark": self._unmarked} if self._unmarked else {}

    def rows(self, rows: Sequence[Row]) -> Iterator[Row]:
        if self.config.rule is not None:
            good = compiled(self.config.rule)
            for number, row in enumerate(rows, 1):
                prompt = prompt_of(row)
                about = {
                    "prompt": prompt[-1]["content"] if prompt else "",
                    "answer": reference_of(row) or row.get("text", ""),
                }
                try:
                    if good(**about, row=row):
                        yield row
                # A rule may do anything that an expression can.
                except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
                    raise DataError(f"the rule fails for row {number}: {error}") from error
            return
        silent = [number for number, row in enumerate(rows, 1) if not conversations(row)]
        if silent:
            raise DataError(f"row {silent[0]} has no answer to judge", hint="take a rule instead")
        talks = [conversations(row)[0] for row in rows]
        least = self.config.at_least
        assert least is not None
        for row, mark in zip(
            rows, scores(self.context, self.config.judge, self.config.reward, talks, rows), strict=True
        ):
            if mark is None:
                self._unmarked += 1
            elif mark >= least:
                yield row
