"""Runs an augmenter over the training split."""

from __future__ import annotations

import json

from luthier.api import Augmenter, DataError, Facts, Format, Row, StageContext
from luthier.artifacts.datasets import SPLITS, Split, dataset_facts, read_split, write_split
from luthier_plugins.augment.config import AugmentConfig


class Augment:
    """The stage ``augment``."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        dataset = context.input("data") if self.config.data else None
        splits: dict[Split, list[Row]] = {
            split: read_split(dataset, split) if dataset else list[Row]() for split in SPLITS
        }
        name = self.config.format.name if self.config.format else str(dataset.facts["format"]) if dataset else ""
        if not name:
            raise DataError("the format of the new rows is unknown", hint="give `data` or `format`")
        parser: Format = context.component(self.config.format) if self.config.format else context.make("format", name)
        augmenter: Augmenter = context.component(self.config.method)
        held_out = {_text(row, parser) for split in ("validation", "test") for row in splits[split]}
        train = list(splits["train"]) if self.config.keep_original else []
        seen = {_text(row, parser) for row in train}
        known = splits["train"]
        extra = [key for key in (known[0] if known else {}) if key not in parser.columns]
        dropped = {"repeats another row": 0, "is held out": 0}
        for raw in augmenter.rows(splits["train"], context.seed):
            row = parser.parse(raw) | {key: raw[key] for key in extra if key in raw}
            text = _text(row, parser)
            if text in held_out or text in seen:
                dropped["is held out" if text in held_out else "repeats another row"] += 1
                continue
            seen.add(text)
            train.append(row)
            context.progress(len(train), None, "rows")
        splits["train"] = train
        for split, rows in splits.items():
            write_split(context.out, split, rows)
        return dataset_facts(name, splits, dropped)


def _text(row: Row, parser: Format) -> str:
    return json.dumps({column: row[column] for column in parser.columns}, sort_keys=True)
