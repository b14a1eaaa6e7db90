"""Reads, checks, splits and stores rows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from luthier.api import DataError, Facts, Format, Row, Stage
from luthier.artifacts.datasets import SPLITS, Split, dataset_facts, write_split
from luthier.artifacts.rows import RESERVED, WEIGHT, checked, taught_by, weight_of
from luthier_plugins.data.config import DataConfig, SplitConfig
from luthier_plugins.data.reading import raw_rows

SHOWN = 10


class Data(Stage[DataConfig]):
    """The stage ``data``."""

    def run(self) -> Facts:
        path = self.context.path(self.config.source)
        assert self.config.format is not None, "planning recognises the format where the recipe names none"
        form: Format[Any] = self.context.build(self.config.format)
        rows, dropped = self._read(path, form)
        if not rows:
            raise DataError("has no rows", where=str(path), hint="an empty file cannot be trained on")
        if dropped:
            self.context.warn(f"{sum(dropped.values())} rows were dropped: {dict(dropped)}")
        splits = split_rows(rows, self.config.split, self.context.seed)
        for split, part in splits.items():
            write_split(self.context.out, split, part)
        return {**dataset_facts(form.schema, splits, dict(dropped)), "format": self.config.format.name}

    def _read(self, path: Path, form: Format[Any]) -> tuple[list[Row], Counter[str]]:
        rows: list[Row] = []
        errors: list[DataError] = []
        dropped: Counter[str] = Counter()
        ignored: Counter[str] = Counter()
        for line, raw in raw_rows(path, errors):
            self.context.progress(len(rows), None, "rows")
            try:
                rows += self._rows(raw, form)
                ignored.update(_unread(raw, {*form.keys_read(raw), *self.config.keep, WEIGHT}))
            except DataError as error:
                errors.append(DataError(error.message, where=f"{path}:{line}", hint=error.hint))
            if self.config.limit is not None and len(rows) >= self.config.limit:
                del rows[self.config.limit :]
                break
        if errors and self.config.on_error == "fail":
            raise _all_of(errors)
        for error in errors:
            dropped[error.message] += 1
        if ignored:
            order = sorted(ignored.items(), key=lambda found: (-found[1], found[0]))
            named = ", ".join(f"{key} (in {count} rows)" for key, count in order)
            self.context.warn(f"these keys of the data are not used: {named}; `keep` carries texts along")
        return rows, dropped

    def _rows(self, raw: Any, form: Format[Any]) -> list[Row]:
        if not isinstance(raw, dict):
            raise DataError("is not a JSON object", hint='a row looks like {"messages": [...]}')
        values = cast("dict[str, Any]", raw)
        kept: dict[str, str] = {}
        for key in self.config.keep:
            if not isinstance(values.get(key), str):
                raise DataError(f"has no text under '{key}'", hint="`keep` names keys that every row has")
            kept[key] = values[key]
        made: list[Row] = []
        weight = {WEIGHT: weight_of(values)} if values.get(WEIGHT) is not None else {}
        for row in form.parse(values):
            beside = {key: value for key, value in row.items() if key not in RESERVED}
            made.append({**checked(form.schema, row), **beside, **kept, **weight})
        return made


def _unread(raw: Any, read: Iterable[str]) -> set[str]:
    """The keys of a raw row, and of the objects in its lists, that its format does not use."""
    known = set(read)
    found = {key for key in raw if key not in known}
    for outer in {key.partition(".")[0] for key in known if "." in key}:
        value = raw.get(outer)
        items = (
            [item for item in cast("list[Any]", value) if isinstance(item, Mapping)] if isinstance(value, list) else []
        )
        found |= {f"{outer}.{key}" for item in items for key in item if f"{outer}.{key}" not in known}
    return found


def _all_of(errors: list[DataError]) -> DataError:
    lines = [str(error) for error in errors[:SHOWN]]
    if len(errors) > SHOWN:
        lines.append(f"... and {len(errors) - SHOWN} more")
    hint = "fix these rows, or drop them with `on_error: drop`"
    return DataError(f"{len(errors)} bad rows:\n" + "\n".join(lines), hint=hint)


def split_rows(rows: list[Row], split: SplitConfig | Split, seed: int) -> dict[Split, list[Row]]:
    """Deal rows out to splits at random, and keep their order in each; rows that teach the same, whatever is kept
    beside it, always land in the same split."""
    if not isinstance(split, SplitConfig):
        return {split: rows}
    if split.validation + split.test >= 1:
        raise DataError("the shares of validation and test leave nothing to train on")
    taught = [taught_by(row) for row in rows]
    order = sorted(set(taught))
    random.Random(seed).shuffle(order)
    total = len(order)
    # A share that was asked for is never rounded away to nothing.
    test = max(1, round(split.test * total)) if split.test else 0
    validation = max(1, round(split.validation * total)) if split.validation else 0
    held_out: dict[str, Split] = dict.fromkeys(order[:test], "test")
    held_out |= dict.fromkeys(order[test : test + validation], "validation")
    dealt: dict[Split, list[Row]] = {name: [] for name in SPLITS}
    for row, key in zip(rows, taught, strict=True):
        dealt[held_out.get(key, "train")].append(row)
    if not dealt["train"]:
        raise DataError(f"{total} different rows are too few for these shares: none is left to train on")
    return {name: part for name, part in dealt.items() if part}
