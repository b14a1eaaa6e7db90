"""Reads, checks, splits and stores rows."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from luthier.api import DataError, Facts, Format, Row, StageContext
from luthier.artifacts.datasets import SPLITS, Split, dataset_facts, write_split
from luthier_plugins.data.config import DataConfig, SplitConfig
from luthier_plugins.data.recognise import recognised

SHOWN = 10
TURN = ("role", "content")


class Data:
    """The stage ``data``."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def run(self, context: StageContext) -> Facts:
        path = context.source("source")
        rows, name, dropped = self._read(path, context)
        if not rows:
            raise DataError("has no rows", where=str(path), hint="an empty file cannot be trained on")
        if dropped:
            context.warn(f"{sum(dropped.values())} rows were dropped: {dict(dropped)}")
        splits = split_rows(rows, self.config.split, context.seed)
        for split, part in splits.items():
            write_split(context.out, split, part)
        return dataset_facts(name, splits, dict(dropped))

    def _read(self, path: Path, context: StageContext) -> tuple[list[Row], str, Counter[str]]:
        rows: list[Row] = []
        errors: list[DataError] = []
        dropped: Counter[str] = Counter()
        parser: Format | None = context.component(self.config.format) if self.config.format else None
        name = self.config.format.name if self.config.format else ""
        ignored: Counter[str] = Counter()
        for line, raw in _raw_rows(path, errors):
            context.progress(len(rows), None, "rows")
            try:
                if parser is None:
                    name, parser = recognised(raw, context)
                rows.append(self._row(raw, parser))
                ignored.update(_ignored(raw, rows[-1]))
            except DataError as error:
                errors.append(DataError(error.message, where=f"{path}:{line}", hint=error.hint))
            if self.config.limit is not None and len(rows) >= self.config.limit:
                break
        if errors and self.config.on_error == "fail":
            raise _all_of(errors)
        for error in errors:
            dropped[error.message] += 1
        if ignored:
            named = ", ".join(f"{key} (in {count} rows)" for key, count in ignored.most_common(SHOWN))
            context.warn(f"these keys of the data are not used: {named}; `keep` carries texts along")
        return rows, name, dropped

    def _row(self, raw: Any, parser: Format) -> Row:
        if not isinstance(raw, dict):
            raise DataError("is not a JSON object", hint='a row looks like {"messages": [...]}')
        values = cast("dict[str, Any]", raw)
        row = parser.parse(values)
        for key in self.config.keep:
            if not isinstance(values.get(key), str):
                raise DataError(f"has no text under '{key}'", hint="`keep` names keys that every row has")
            row[key] = values[key]
        return row


def _ignored(raw: Mapping[str, Any], row: Row) -> set[str]:
    """The keys of a row and of its messages that did not become part of the dataset."""
    messages = [item for item in (raw.get("messages") or []) if isinstance(item, dict)]
    inside = {f"messages.{key}" for item in messages for key in cast("dict[str, Any]", item) if key not in TURN}
    return {key for key in raw if key not in row} | inside


def _raw_rows(path: Path, errors: list[DataError]) -> Iterator[tuple[int, Any]]:
    if path.is_dir():
        raise DataError("is a folder", where=str(path), hint="name one .jsonl or .txt file")
    text = path.read_bytes()
    try:
        lines = text.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise DataError("is not UTF-8 text", where=f"{path}:{line}", hint="save the file as UTF-8") from error
    if path.suffix == ".txt":
        yield from _paragraphs(lines)
        return
    _refuse_other_files(path, lines)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            # Half a surrogate pair is valid JSON, but no text that can be stored.
            json.dumps(raw, ensure_ascii=False).encode("utf-8")
            yield number, raw
        except ValueError as error:
            errors.append(
                DataError(
                    f"is not valid JSON ({error})", where=f"{path}:{number}", hint="each line has to be one JSON object"
                )
            )


def _refuse_other_files(path: Path, lines: list[str]) -> None:
    """One message instead of one for each line where a file is something else altogether."""
    first = next((line.strip() for line in lines if line.strip()), "")
    if first.startswith("["):
        raise DataError("is one JSON array", where=str(path), hint="write one object a line (JSON Lines)")
    if path.suffix in (".csv", ".tsv", ".parquet"):
        raise DataError(f"is a {path.suffix} file", where=str(path), hint="convert it to JSON Lines, one object a line")


def _paragraphs(lines: list[str]) -> Iterator[tuple[int, Row]]:
    start, block = 1, list[str]()
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            start = number if not block else start
            block.append(line)
        elif block:
            yield start, {"text": "\n".join(block)}
            block = []


def _all_of(errors: list[DataError]) -> DataError:
    lines = [str(error) for error in errors[:SHOWN]]
    if len(errors) > SHOWN:
        lines.append(f"... and {len(errors) - SHOWN} more")
    hint = "mend these rows, or drop them with `on_error: drop`"
    return DataError(f"{len(errors)} bad rows:\n" + "\n".join(lines), hint=hint)


def split_rows(rows: list[Row], split: SplitConfig | Split, seed: int) -> dict[Split, list[Row]]:
    """Deal rows out to splits at random; rows that are equal always land in the same split."""
    if not isinstance(split, SplitConfig):
        return {split: rows}
    if split.validation + split.test >= 1:
        raise DataError("the shares of validation and test leave nothing to train on")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row, sort_keys=True), []).append(row)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    total = len(order)
    # A share that was asked for is never rounded away to nothing.
    test = max(1, round(split.test * total)) if split.test else 0
    validation = max(1, round(split.validation * total)) if split.validation else 0
    bounds = {"test": (0, test), "validation": (test, test + validation), "train": (test + validation, total)}
    dealt: dict[Split, list[Row]] = {
        name: [row for key in order[slice(*bounds[name])] for row in groups[key]] for name in SPLITS
    }
    if not dealt["train"]:
        raise DataError(f"{total} different rows are too few for these shares: none is left to train on")
    return {name: part for name, part in dealt.items() if part}
