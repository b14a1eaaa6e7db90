"""Joins datasets, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from luthier.api import Artifact, DataError, Facts, Row, Stage
from luthier.api.data import ID
from luthier.api.estimates import tokens_in
from luthier.artifacts.columns import arrow_schema, columns_of, json_columns, optional_in, to_arrow
from luthier.artifacts.datasets import SPLITS, ParquetRows, Sizes, Split, iter_rows, ledger_of
from luthier.artifacts.rows import id_of, texts_of
from luthier_plugins.mix.config import MixConfig
from luthier_plugins.mix.taking import order_of, times_of

BATCH = 1000
"""Rows that are read together."""


class Mix(Stage[MixConfig]):
    """The stage ``mix``."""

    def run(self) -> Facts:
        data = self.context.artifacts(self.config.data)
        schema: Any = data[0].facts["schema"]
        columns, optional, as_json = set[str](), set[str](), set[str]()
        orders, tokens = list[np.ndarray](), list[np.ndarray]()
        for name, dataset in zip(self.config.data, data, strict=True):
            ids, sizes = list[str](), list[int]()
            for split in SPLITS:
                for rows in iter_rows(dataset, split, BATCH):
                    columns |= {key for row in rows for key in row}
                    optional |= optional_in(rows)
                    as_json |= json_columns(rows)
                    if split == "train":
                        ids += [str(row.get(ID) or id_of(row)) for row in rows]
                        sizes += [sum(map(tokens_in, texts_of(row))) for row in rows]
                    self.context.progress(len(ids), None, f"rows of {name} looked at")
            orders.append(order_of(ids, self.context.seed))
            tokens.append(np.asarray(sizes, np.int64))
        times = times_of(self.config, orders, tokens)
        if not any(some.any() for some in times):
            raise DataError("nothing is taken of these datasets", hint="do they have rows in the split 'train'?")
        written = arrow_schema(columns_of(schema, columns), optional, as_json)
        found = Sizes()
        counts = {split: self._write(split, data, times, written, found) for split in SPLITS}
        return {
            "schema": schema,
            "rows": {split: count for split, count in counts.items() if count},
            **found.facts(),
            "dropped": (left := self._left_out(times)),
            "ledger": ledger_of(self._came(data, times), left),
            "columns": sorted(columns),
            "mixed": _mixed(times, tokens),
        }

    def _write(
        self, split: Split, data: Sequence[Artifact], times: Sequence[np.ndarray], schema: Any, found: Sizes
    ) -> int:
        """Write what is taken of a split; gives how many rows that are."""
        count = 0
        batches = _taken(data, split, times)
        first = next(batches, None)
        if first is None:
            return 0
        with ParquetRows(self.context.out / f"{split}.parquet", schema) as file:
            for rows in chain([first], batches):
                file.write(to_arrow(rows, schema))
                found.add(rows)
                count += len(rows)
                self.context.progress(count, None, f"rows of {split} written")
        return count

    def _came(self, data: Sequence[Artifact], times: Sequence[np.ndarray]) -> list[tuple[str, int]]:
        rows = [
            (f"rows of '{name}'", sum(item.facts["rows"].values()))
            for name, item in zip(self.config.data, data, strict=True)
        ]
        again = int(sum(np.maximum(some - 1, 0).sum() for some in times))
        return [*rows, ("are taken once more", again)]

    def _left_out(self, times: Sequence[np.ndarray]) -> dict[str, int]:
        return {
            f"are more than the share of '{name}'": count
            for name, some in zip(self.config.data, times, strict=True)
            if (count := int((some == 0).sum()))
        }


def _taken(data: Sequence[Artifact], split: Split, times: Sequence[np.ndarray]) -> Iterator[list[Row]]:
    """The rows of a split that are taken, those that are taken often beside each other; none of empty batches."""
    for dataset, some in zip(data, times, strict=True):
        place = 0
        for rows in iter_rows(dataset, split, BATCH):
            often = some[place : place + len(rows)].tolist() if split == "train" else [1] * len(rows)
            place += len(rows)
            made = [row for row, count in zip(rows, often, strict=True) for _ in range(count)]
            if made:
                yield made


def _mixed(times: Sequence[np.ndarray], tokens: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """What the result is made of, dataset by dataset."""
    rows = [int(some.sum()) for some in times]
    sizes = [int((some * size).sum()) for some, size in zip(times, tokens, strict=True)]
    return [
        {
            "rows": count,
            "share_of_rows": count / sum(rows),
            "tokens": size,
            "share_of_tokens": size / max(1, sum(sizes)),
        }
        for count, size in zip(rows, sizes, strict=True)
    ]
