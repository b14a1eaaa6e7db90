"""Runs an augmenter over the training split."""

from __future__ import annotations

import json
from typing import Any

from luthier.api import Augmenter, DataError, Facts, Row, Schema, Stage
from luthier.api.data import ID, PARENTS, SOURCE
from luthier.artifacts.datasets import SPLITS, Split, dataset_facts, read_split, write_split
from luthier.artifacts.rows import COLUMNS, MEANT, checked, id_of, taught_by
from luthier_plugins.augment.config import AugmentConfig


class Augment(Stage[AugmentConfig]):
    """The stage ``augment``."""

    def run(self) -> Facts:
        context = self.context
        dataset = context.artifact(self.config.data) if self.config.data else None
        splits: dict[Split, list[Row]] = {
            split: read_split(dataset, split) if dataset else list[Row]() for split in SPLITS
        }
        schema: Any = dataset.facts["schema"] if dataset else self.config.row_schema
        augmenter: Augmenter[Any] = context.build(self.config.method)
        held_out = {taught_by(row) for split in ("validation", "test") for row in splits[split]}
        known = splits["train"]
        train = list(known) if self.config.keep_original else []
        old, made = sum(map(len, splits.values())), 0
        seen = {_text(row, schema) for row in train}
        extra = {key for row in known[:1] for key in row} - {*COLUMNS[schema], *MEANT}
        dropped = {"repeats another row": 0, "is held out": 0}
        for raw in augmenter.rows(known):
            made += 1
            try:
                row = checked(schema, raw) | {key: raw[key] for key in sorted(extra & raw.keys())}
            except DataError as error:
                name = self.config.method.name
                raise DataError(f"the augmenter '{name}' made a row that {error.message}", hint=error.hint) from error
            text = _text(row, schema)
            is_held_out = taught_by(row) in held_out
            if is_held_out or text in seen:
                dropped["is held out" if is_held_out else "repeats another row"] += 1
                continue
            seen.add(text)
            parents = {PARENTS: list(raw[PARENTS])} if raw.get(PARENTS) else {}
            train.append({**row, ID: id_of(row), SOURCE: self.config.method.name, **parents})
            context.progress(len(train), None, "rows")
        splits["train"] = train
        for split, rows in splits.items():
            write_split(context.out, split, rows)
        if not self.config.keep_original:
            dropped["is of `data`, which is not kept"] = len(known)
        came = [("rows of `data`", old), (f"were made by '{self.config.method.name}'", made)]
        return dataset_facts(schema, splits, dropped, came)


def _text(row: Row, schema: Schema) -> str:
    return json.dumps({column: row[column] for column in COLUMNS[schema]}, sort_keys=True)
