"""From raw rows to rows of a dataset: mapped, parsed, checked, with what identifies each and where it is from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from luthier.api import DataError, Format, Row
from luthier.api.data import ID, SOURCE, TOOLS, WEIGHT
from luthier.artifacts.rows import RESERVED, checked, id_of, weight_of
from luthier_plugins.data.config import DataConfig
from luthier_plugins.data.recognise import renamed

SHOWN = 20
"""Bad rows, and reasons for them, that an error names."""
NAMED = 20
"""Keys that a warning names."""
PLACES = ((re.compile(r"\bmessages \d+ and \d+\b"), "two messages"), (re.compile(r"\b(message|turn) \d+\b"), r"a \1"))
"""Where in a row something is wrong: reasons are counted without it."""
BATCH = 1000
"""Rows that are handed on together."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A file that is read, or a split of a dataset on the hub.

    Attributes:
        rows: Its raw rows, with their lines.
        place: Where it is, for messages.
        name: Its name in the rows' `source`.
    """

    rows: Iterable[tuple[int, Any]]
    place: str
    name: str


class Intake:
    """Makes rows of what files hold, and counts what becomes of each raw row.

    Args:
        config: What to keep, and other names for keys.
        form: The format of the rows.

    Attributes:
        read: Raw rows so far, bad ones included.
        rows: Rows made of them.
        dropped: Bad rows, by reason.
        files: Rows by file.
        unused: Keys of raw rows that nothing was made of, and in how many rows.
    """

    def __init__(self, config: DataConfig, form: Format[Any]) -> None:
        self.read = 0
        self.rows = 0
        self.dropped: Counter[str] = Counter()
        self.files: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self._config = config
        self._form = form
        self._examples: list[DataError] = []

    def batches(self, files: Iterable[Opened]) -> Iterator[list[tuple[Row, str | None]]]:
        """The rows of files, in batches, each with its group where rows are grouped; no more than `limit`.

        Args:
            files: What is read.

        Raises:
            DataError: a file cannot be read.
        """
        batch: list[tuple[Row, str | None]] = []
        for file in files:
            for line, raw in file.rows:
                for made in self._rows(file, line, raw):
                    batch.append(made)
                    self.rows += 1
                    self.files[file.name] += 1
                    if self.rows == self._config.limit:
                        yield batch
                        return
                if len(batch) >= BATCH:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _rows(self, file: Opened, line: int, raw: Any) -> list[tuple[Row, str | None]]:
        """The rows of a raw row; none of a bad one, which is counted."""
        self.read += 1
        try:
            if isinstance(raw, DataError):
                raise raw
            if not isinstance(raw, dict):
                raise DataError("is not a JSON object", hint='a row looks like {"messages": [...]}')
            values = renamed(cast("dict[str, Any]", raw), self._config.columns)
            made = self._made(values)
        except DataError as error:
            self._count(error, f"{file.place}:{line}")
            return []
        self.unused.update(_unread(values, {*self._form.keys_read(values), *self._used}))
        group = self._group(values)
        return [
            ({**row, ID: str(row[ID]) if ID in self._config.keep else id_of(row), SOURCE: f"{file.name}:{line}"}, group)
            for row in made
        ]

    @property
    def _used(self) -> Iterable[str]:
        return (*self._config.keep, WEIGHT, *([self._grouping] if self._grouping else []))

    @property
    def _grouping(self) -> str | None:
        return getattr(self._config.split, "group_by", None)

    def _made(self, values: dict[str, Any]) -> list[Row]:
        kept: dict[str, Any] = {}
        for key in self._config.keep:
            if values.get(key) is None:
                raise DataError(f"has nothing under '{key}'", hint="`keep` names keys that every row has")
            kept[key] = values[key]
        if self._grouping and values.get(self._grouping) is None:
            raise DataError(f"has nothing under '{self._grouping}'", hint="`group_by` names a key that every row has")
        weight = {WEIGHT: weight_of(values)} if values.get(WEIGHT) is not None else {}
        made: list[Row] = []
        try:
            for row in self._form.parse(values):
                beside = {key: value for key, value in row.items() if key not in RESERVED and key != TOOLS}
                made.append({**checked(self._form.schema, row), **beside, **kept, **weight})
        except DataError:
            if self._form.recognises(values):
                raise
            assert self._config.format is not None
            keys = ", ".join(sorted(values)[:NAMED])
            raise DataError(
                f"is no row of the format '{self._config.format.name}': its keys are {keys}",
                hint="a stage reads rows of one format: take these out, and read them in a stage of their own",
            ) from None
        return made

    def _group(self, values: Mapping[str, Any]) -> str | None:
        return None if self._grouping is None else str(values[self._grouping])

    def _count(self, error: DataError, where: str) -> None:
        reason = error.message
        for pattern, without in PLACES:
            reason = pattern.sub(without, reason)
        self.dropped[reason] += 1
        if len(self._examples) < SHOWN:
            self._examples.append(DataError(error.message, where=where, hint=error.hint))

    def came(self) -> list[tuple[str, int]]:
        """Where rows came from, for a ledger."""
        more = self.rows - self.read + sum(self.dropped.values())
        return [("rows were read", self.read), ("more were made of rows that hold several", more)]

    def check(self) -> None:
        """Refuse more bad rows than the recipe allows.

        Raises:
            DataError: names the first, and counts all by reason.
        """
        bad = sum(self.dropped.values())
        if not bad or bad <= self._config.bad_rows.drop_up_to * self.read:
            return
        lines = [str(error) for error in self._examples]
        if bad > len(lines):
            lines.append(f"... and {bad - len(lines)} more")
        if len(self.dropped) > 1 or bad > len(lines):
            lines += ["by reason:", *(f"  {count} x {reason}" for reason, count in self.dropped.most_common(SHOWN))]
        share = -(-bad * 1000 // self.read) / 1000
        hint = "fix these rows" + (
            f", or leave them out: `bad_rows: {{drop_up_to: {share}}}`" if bad < self.read else ""
        )
        raise DataError(f"{bad} of {self.read} rows are bad:\n" + "\n".join(lines), hint=hint)

    def unused_keys(self) -> str | None:
        """What to tell of keys that nothing was made of; None where all were used."""
        if not self.unused:
            return None
        order = sorted(self.unused.items(), key=lambda found: (-found[1], found[0]))
        named = ", ".join(f"{key} (in {count} rows)" for key, count in order[:NAMED])
        more = f" and {len(order) - NAMED} more" if len(order) > NAMED else ""
        return f"these keys of the data are not used: {named}{more}; `keep` carries keys along"


def _unread(raw: Mapping[str, Any], read: Iterable[str]) -> set[str]:
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
