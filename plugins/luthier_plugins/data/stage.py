"""Reads, checks, splits and stores rows, a batch at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
from luthier.api import DataError, Facts, Format, Stage
from luthier.api.data import SOURCE
from luthier.artifacts.datasets import SPLITS, ParquetRows, Sizes, ledger_of
from luthier.artifacts.rows import compared_text
from luthier.data.files import data_files, named
from luthier.data.hub import hub_rows
from luthier.data.raw import raw_rows
from luthier.data.spool import Spool
from luthier_plugins.data.config import DataConfig
from luthier_plugins.data.duplicates import Duplicates, Verdict
from luthier_plugins.data.intake import Intake, Opened
from luthier_plugins.data.sides import draws_of, shared, sides_of

NOWHERE = -1
"""The side of a row that is left out."""
FEW, MANY = 10, 0.05
"""Rows, and the share of all rows, that may be tied to each other without a word."""
DUPLICATES = "duplicates.jsonl"
"""Some rows that were left out, beside those that they repeat."""


class Data(Stage[DataConfig]):
    """The stage ``data``."""

    def run(self) -> Facts:
        config, context = self.config, self.context
        assert config.format is not None, "planning recognises the format where the recipe names none"
        form: Format[Any] = context.build(config.format)
        intake = Intake(config, form)
        sizes, lengths, draws = Sizes(), list[int](), list[np.ndarray]()
        with Duplicates(config, context.scratch) as duplicates:
            with Spool(context.scratch / "rows.parquet", form.schema, config.keep) as spool:
                for batch in intake.batches(self._files()):
                    rows = [row for row, _ in batch]
                    lengths += sizes.add(rows)
                    draws.append(draws_of(batch, context.seed))
                    duplicates.add(rows)
                    spool.write(rows)
                    context.progress(intake.rows, None, "rows")
            intake.check()
            if not intake.rows:
                raise DataError("has no rows", where=config.source[0], hint="an empty file cannot be trained on")
            verdict = duplicates.verdict()
        self._tell(intake, form)
        self._tell_of_duplicates(verdict, spool)
        sides = np.full(intake.rows, NOWHERE, np.int8)
        sides[verdict.kept] = sides_of(shared(np.concatenate(draws), verdict.tied)[verdict.kept], config.split)
        self._deal(spool, sides)
        return {
            "schema": form.schema,
            "rows": {name: count for place, name in enumerate(SPLITS) if (count := int((sides == place).sum()))},
            **sizes.facts(),
            "characters": int(np.asarray(lengths)[verdict.kept].sum()),
            "dropped": (dropped := {**intake.dropped, **verdict.dropped}),
            "ledger": ledger_of(intake.came(), dropped),
            "columns": sorted(spool.columns),
            "format": config.format.name,
            "read": intake.read,
            "files": dict(intake.files.most_common(100)),
        }

    def _files(self) -> Iterator[Opened]:
        for value in self.config.source:
            place = self.context.path(value)
            if value in self.config.from_hub:
                rows = hub_rows(place, self.config.hub.config, self.config.hub.split)
                yield Opened(rows, value, value)
                continue
            files, others = data_files(place)
            if others:
                some = ", ".join(path.name for path in others[:5])
                self.context.warn(f"{len(others)} files of {value} are no data files and are not read, such as {some}")
            for path, name in zip(files, named(files, place), strict=True):
                yield Opened(raw_rows(path), str(path), name)

    def _tell(self, intake: Intake, form: Format[Any]) -> None:
        """Say what became of the rows."""
        assert self.config.format is not None
        self.context.log(f"read as '{self.config.format.name}': {intake.rows} rows of the schema {form.schema}")
        if intake.dropped:
            self.context.warn(f"{sum(intake.dropped.values())} rows were dropped: {dict(intake.dropped)}")
        unused = intake.unused_keys()
        if unused is not None:
            self.context.warn(unused)

    def _tell_of_duplicates(self, verdict: Verdict, spool: Spool) -> None:
        """Say which rows repeat others, and write some of them beside those."""
        counts = np.bincount(verdict.tied)
        largest = int(counts.max())
        if largest > max(FEW, MANY * len(verdict.tied)):
            self.context.warn(
                f"{largest} of {len(verdict.tied)} rows are similar to each other, one by one, and are on one side of "
                "the split: shares may be far from what was asked for; `near_duplicates: false` deals them out, "
                "`dedupe: {near: ...}` keeps one of each kind"
            )
        if not verdict.samples:
            return
        for reason, count in verdict.dropped.items():
            self.context.log(f"left out: {count} rows, each {reason}")
        found = spool.rows_at({place for pair in verdict.samples for place in pair[:2]})
        with (self.context.out / DUPLICATES).open("w", encoding="utf-8") as file:
            for first, place, likeness in verdict.samples:
                pair = {
                    name: {SOURCE: found[at][SOURCE], "text": compared_text(found[at])}
                    for name, at in (("kept", first), ("left_out", place))
                }
                file.write(json.dumps({**pair, "similarity": round(likeness, 3)}, ensure_ascii=False) + "\n")

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
