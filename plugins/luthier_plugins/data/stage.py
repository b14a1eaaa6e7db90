"""Reads, checks, splits and stores rows, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from luthier.api import DataError, Facts, Format, Stage
from luthier.artifacts.datasets import SPLITS, ParquetRows, Sizes
from luthier.data.files import data_files, named
from luthier.data.spool import Spool
from luthier_plugins.data.config import DataConfig
from luthier_plugins.data.intake import Intake
from luthier_plugins.data.sides import draws_of, sides_of


class Data(Stage[DataConfig]):
    """The stage ``data``."""

    def run(self) -> Facts:
        config, context = self.config, self.context
        assert config.format is not None, "planning recognises the format where the recipe names none"
        form: Format[Any] = context.build(config.format)
        intake = Intake(config, form)
        sizes, draws = Sizes(), list[np.ndarray]()
        with Spool(context.scratch / "rows.parquet", form.schema, config.keep) as spool:
            for batch in intake.batches(self._files()):
                rows = [row for row, _ in batch]
                sizes.add(rows)
                draws.append(draws_of(batch, context.seed))
                spool.write(rows)
                context.progress(intake.rows, None, "rows")
        intake.check()
        if not intake.rows:
            raise DataError("has no rows", where=config.source[0], hint="an empty file cannot be trained on")
        self._tell(intake, form)
        sides = sides_of(np.concatenate(draws), config.split)
        self._deal(spool, sides)
        return {
            "schema": form.schema,
            "rows": {name: count for place, name in enumerate(SPLITS) if (count := int((sides == place).sum()))},
            **sizes.facts(),
            "dropped": dict(intake.dropped),
            "columns": sorted(spool.columns),
            "format": config.format.name,
            "read": intake.read,
            "files": dict(intake.files.most_common(100)),
        }

    def _files(self) -> Iterator[tuple[Path, str]]:
        for value in self.config.source:
            place = self.context.path(value)
            files, others = data_files(place)
            if others:
                some = ", ".join(path.name for path in others[:5])
                self.context.warn(f"{len(others)} files of {value} are no data files and are not read, such as {some}")
            yield from zip(files, named(files, place), strict=True)

    def _tell(self, intake: Intake, form: Format[Any]) -> None:
        """Say what became of the rows."""
        assert self.config.format is not None
        self.context.log(f"read as '{self.config.format.name}': {intake.rows} rows of the schema {form.schema}")
        if intake.dropped:
            self.context.warn(f"{sum(intake.dropped.values())} rows were dropped: {dict(intake.dropped)}")
        unused = intake.unused_keys()
        if unused is not None:
            self.context.warn(unused)

    def _deal(self, spool: Spool, sides: np.ndarray) -> None:
        """Write each row to the file of its side."""
        arrow: Any = import_module("pyarrow")
        for place, name in enumerate(SPLITS):
            if not (sides == place).any():
                continue
            with ParquetRows(self.context.out / f"{name}.parquet", spool.schema) as file:
                start = 0
                for batch in spool.batches():
                    mine = sides[start : start + batch.num_rows] == place
                    start += batch.num_rows
                    if mine.any():
                        file.write(batch.filter(arrow.array(mine)))
                    self.context.progress(start, len(sides), f"rows dealt to {name}")
