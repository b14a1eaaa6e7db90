"""Runs an augmenter over the training split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from luthier.api import Augmenter, DataError, Facts, Row, Schema, Stage
from luthier.api.data import ID, PARENTS, SOURCE, WEIGHT
from luthier.artifacts.datasets import SPLITS, Split, dataset_facts, read_split, write_split
from luthier.artifacts.rows import COLUMNS, MEANT, asked_by, checked, compared_text, id_of
from luthier.data.shingles import shingles_of
from luthier.data.similar import Similar
from luthier_plugins.augment.config import AugmentConfig

HELD_OUT: tuple[Split, ...] = ("validation", "test")
BATCH = 1000
LOOKED_AT = 20_000
"""Rows of which the wordings are compared, to tell how much is new."""


class Augment(Stage[AugmentConfig]):
    """The stage ``augment``."""

    def run(self) -> Facts:
        dataset = self.context.artifact(self.config.data) if self.config.data else None
        given: dict[Split, list[Row]] = {
            split: read_split(dataset, split) if dataset else list[Row]() for split in SPLITS
        }
        of_data: Any = dataset.facts["schema"] if dataset else None
        augmenter: Augmenter[Any] = self.context.build(self.config.method)
        schema: Schema = self.config.row_schema or augmenter.makes(of_data)
        if (makes := augmenter.makes(schema)) != schema:
            raise DataError(
                f"'{self.config.method.name}' makes rows of the schema {makes} here, not {schema}",
                hint=f"leave `row_schema` out, or `row_schema: {makes}`",
            )
        stays = self.config.keep_original and not augmenter.replaces
        if of_data is not None and schema != of_data and stays:
            raise DataError(
                f"the new rows are of the schema {schema}, those of `data` are {of_data}: they cannot be in one split",
                hint="keep_original: false",
            )
        self._dropped: Counter[str] = Counter()
        known = given["train"]
        kept = known if stays else []
        made = self._made(augmenter, schema, known, kept, [row for split in HELD_OUT for row in given[split]])
        new = self._unlike(made, [row for split in SPLITS for row in given[split]], augmenter)
        splits: dict[Split, list[Row]] = {split: given[split] if schema == of_data else [] for split in HELD_OUT}
        splits = {"train": [*kept, *new], **splits}
        for split, rows in splits.items():
            write_split(self.context.out, split, rows)
        return self._facts(augmenter, schema, given, splits, new)

    def _made(
        self, augmenter: Augmenter[Any], schema: Schema, known: list[Row], kept: list[Row], held_out: list[Row]
    ) -> list[Row]:
        """The augmenter's rows, without those that repeat another one or what is held out."""
        name = self.config.method.name
        asked = {asked_by(row) for row in held_out}
        # Exactly: a wording in capitals is another one.
        seen = {id_of(row) for row in kept}
        extra = {key for row in known[:1] for key in row} - {*COLUMNS[schema], *MEANT}
        made: list[Row] = []
        self._yielded = 0
        for raw in augmenter.rows(known):
            self._yielded += 1
            try:
                row = checked(schema, raw) | {key: raw[key] for key in sorted(extra & raw.keys())}
            except DataError as error:
                raise DataError(f"the augmenter '{name}' made a row that {error.message}", hint=error.hint) from error
            if augmenter.replaces:
                # With all that it has: its id, where it is from, its weight.
                made.append(raw)
                continue
            row[ID] = id_of(row)
            is_held_out = asked_by(row) in asked
            if is_held_out or row[ID] in seen:
                self._dropped["is held out" if is_held_out else "repeats another row"] += 1
                continue
            seen.add(row[ID])
            beside = {key: raw[key] for key in (PARENTS, WEIGHT) if raw.get(key) is not None}
            made.append({**row, SOURCE: name, **beside})
            self.context.progress(len(made), None, "rows")
        self._check_failed(augmenter)
        return made

    def _check_failed(self, augmenter: Augmenter[Any]) -> None:
        """Refuse more failed rows than the recipe allows."""
        failed = Counter(augmenter.dropped)
        tried = failed.total() + self._yielded
        self._dropped.update(failed)
        if failed.total() <= self.config.bad_rows.drop_up_to * tried:
            return
        reasons = "\n".join(f"  {count} x {reason}" for reason, count in failed.most_common())
        raise DataError(
            f"{failed.total()} of {tried} rows could not be made:\n{reasons}",
            hint="mend that, or allow for it: `bad_rows: {drop_up_to: ...}`; answers are kept, and not asked for again",
        )

    def _unlike(self, made: list[Row], old: Sequence[Row], augmenter: Augmenter[Any]) -> list[Row]:
        """The rows that are not much like one before them."""
        if self.config.similar is None or augmenter.replaces:
            return made
        with Similar(self.context.scratch / "shingles", self.config.similar) as similar:
            for rows in (old, made):
                for batch in _batches(rows):
                    similar.add([compared_text(row) for row in batch])
            tied = similar.tied()[len(old) :]
        own = np.arange(len(old), len(old) + len(made))
        unlike = [row for row, first, place in zip(made, tied.tolist(), own.tolist(), strict=True) if first == place]
        self._dropped["is like another row"] += len(made) - len(unlike)
        return unlike

    def _facts(
        self,
        augmenter: Augmenter[Any],
        schema: Schema,
        given: dict[Split, list[Row]],
        splits: dict[Split, list[Row]],
        new: list[Row],
    ) -> Facts:
        name = self.config.method.name
        came = [("rows of `data`", sum(map(len, given.values())))]
        if augmenter.replaces:
            left_out = len(given["train"]) - self._yielded - Counter(augmenter.dropped).total()
            self._dropped[f"was left out by '{name}'"] += left_out
        else:
            came.append((f"were made by '{name}'", self._yielded + Counter(augmenter.dropped).total()))
            if not self.config.keep_original:
                self._dropped["is of `data`, which is not kept"] += len(given["train"])
            gone = sum(len(given[split]) - len(splits[split]) for split in HELD_OUT)
            self._dropped[f"is held out, and not of the schema {schema}"] += gone
        facts = dataset_facts(schema, splits, +self._dropped, came)
        if given["train"] and new and not augmenter.replaces:
            facts["new_wordings"] = _new_wordings(given["train"], new)
            self.context.log(f"{facts['new_wordings']:.0%} of the new rows' runs of five words are new")
        return facts


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


def _new_wordings(old: Sequence[Row], new: Sequence[Row]) -> float:
    """The share of new rows' different runs of five words that no old row has: how much diversity was gained."""
    before, after = (
        np.unique(shingles_of([compared_text(row) for row in rows[:LOOKED_AT]]).hashes) for rows in (old, new)
    )
    return float(np.isin(after, before, invert=True).mean()) if len(after) else 0.0
