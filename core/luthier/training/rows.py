"""The rows that a stage trains on: tokens of its datasets, and what was left out of them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from luthier.api.artifact import Artifact
from luthier.api.context import Context
from luthier.api.errors import DataError
from luthier.api.tuning import TrainingConfig
from luthier.artifacts.datasets import Split, row_at
from luthier.modeling.text import IGNORED, Encoded
from luthier.training.encoding import EncodedRow
from luthier.training.token_files import EXAMPLES, Labelling, TokenFile, TokenRows, quoted, token_file


class RowSource:
    """Gives a stage its rows as tokens; those that cannot be trained on are reported, and left out or refused.

    Args:
        source: The model or adapter that is trained.
        config: The stage's config: what may be left out, and how long a row may be.
        context: Is told of it.
        positions: The most tokens that the model can see; None: any number.

    Attributes:
        left_out: How many rows were left out, by reason.
        notes: In how many rows something was found that is trained on all the same, by what it is.
        stops: The ids of the stop tokens.
        sources: Of each split, for each dataset: its stage, the rows that are trained on, their tokens, and how many of
            these are trained.
    """

    def __init__(self, source: Artifact, config: TrainingConfig, context: Context, positions: int | None) -> None:
        self.left_out: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.sources: dict[Split, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
        date = None if context.date is None else context.date.isoformat()
        stops: tuple[int, ...] = tuple(source.facts["stop_token_ids"])
        self.stops = stops
        self._labelling = Labelling(source.path, stops, date, "answers", config.trained_answers)
        self._config = config
        self._context = context
        self._positions = positions

    def answers(self, datasets: Sequence[Artifact], split: Split) -> TokenRows:
        """Rows of any schema whose answers are trained, each short enough for the stage and the model.

        Raises:
            DataError: more rows than `bad_rows` allows cannot be encoded, none is short enough, or `on_long` says to
                stop.
        """
        limit = min(self._config.max_length, self._positions or self._config.max_length)
        return self._rows(datasets, split, "answers", limit)

    def documents(self, datasets: Sequence[Artifact], split: Split) -> TokenRows:
        """Texts and whole conversations, of any length, of which every token is trained.

        Raises:
            DataError: more rows than `bad_rows` allows cannot be encoded.
        """
        return self._rows(datasets, split, "documents", None)

    def block_length(self) -> int:
        """The length of packed blocks.

        Raises:
            DataError: the model cannot see that many tokens.
        """
        if self._positions is not None and self._config.max_length > self._positions:
            raise DataError(
                f"max_length={self._config.max_length} is longer than the model's context of {self._positions} tokens",
                hint=f"`max_length: {self._positions}` at most",
            )
        return self._config.max_length

    def _rows(
        self, datasets: Sequence[Artifact], split: Split, of: Literal["answers", "documents"], limit: int | None
    ) -> TokenRows:
        labelling = replace(self._labelling, of=of)
        datasets = [item for item in datasets if item.facts["rows"].get(split)]
        files = [token_file(item, split, labelling, self._context) for item in datasets]
        kept = [self._kept(*pair, split, limit) for pair in zip(datasets, files, strict=True)]
        for item, file, places in zip(datasets, files, kept, strict=True):
            self._take_down(item, split, file, places)
        return TokenRows(files, kept)

    def _take_down(self, dataset: Artifact, split: Split, file: TokenFile, kept: np.ndarray) -> None:
        """Note what a dataset gives.

        Raises:
            DataError: fewer of its tokens are trained than `min_trained` says.
        """
        tokens = int(file.tokens_of[kept].sum(dtype=np.int64))
        trained = int(file.targets[kept].sum(dtype=np.int64))
        name = dataset.manifest["stage"]
        self.sources[split].append({"stage": name, "rows": len(kept), "tokens": tokens, "trained": trained})
        least = self._config.min_trained
        if least is not None and trained < least * tokens:
            raise DataError(
                f"{trained / tokens:.1%} of the tokens of '{name}' (split '{split}') are trained, `min_trained` asks "
                f"for {least:.1%}",
                hint="`luthier preview RECIPE STAGE` shows which; are prompts long, or answers marked as not to train?",
            )

    def _kept(self, dataset: Artifact, file: TokenFile, split: Split, limit: int | None) -> np.ndarray:
        """Which rows of a file are trained on."""
        name = f"'{dataset.manifest['stage']}' (split '{split}')"
        self._report_bad(file, name)
        kept = np.arange(len(file))
        if limit is not None:
            kept = np.flatnonzero(file.lengths <= limit)
            long = np.flatnonzero(file.lengths > limit)
            self._report_long(file, dataset, split, long, name, limit)
        if file.rows and not len(kept):
            raise DataError(f"no row of {name} can be trained on")
        for note, count in file.notes.items():
            self._context.warn(f"{count} of {file.rows} rows of {name}: {note}")
        self.notes.update(file.notes)
        return kept

    def _report_bad(self, file: TokenFile, name: str) -> None:
        bad = file.bad
        if not bad.count:
            return
        counted = f"{bad.count} of {file.rows} rows of {name} cannot be trained on as they are"
        if bad.count > self._config.bad_rows.drop_up_to * file.rows:
            lines = [f"row {number} ({text}): {message}" for number, text, message, _ in bad.examples]
            lines += [f"... and {bad.count - EXAMPLES} more"] if bad.count > EXAMPLES else []
            hint = next((f"{hint}; or " for *_, hint in bad.examples if hint), "")
            share = math.ceil(1000 * bad.count / file.rows) / 1000
            raise DataError(
                "\n".join([f"{counted}:", *lines]), hint=f"{hint}leave them out: `bad_rows: {{drop_up_to: {share}}}`"
            )
        self.left_out.update(bad.reasons)
        why = "; ".join(f"{count} times: {reason}" for reason, count in bad.reasons.most_common())
        number, text, *_ = bad.examples[0]
        self._context.warn(f"{counted} and were left out, the first is row {number} ({text}): {why}")

    def _report_long(
        self, file: TokenFile, dataset: Artifact, split: Split, long: np.ndarray, name: str, limit: int
    ) -> None:
        if not len(long):
            return
        asked = limit == self._config.max_length
        what = f"max_length={limit}" if asked else f"the model's context of {limit} tokens"
        text = f"{len(long)} of {file.rows} rows of {name} are longer than {what}"
        number = int(file.numbers[long[0]])
        first = (
            f"the first is row {number + 1} ({quoted(row_at(dataset, split, number))}), the longest has "
            f"{int(file.lengths[long].max())} tokens"
        )
        if self._config.fails_on_long or len(long) == len(file):
            hint = "raise `max_length` or shorten the rows" if asked else "shorten the rows"
            raise DataError(f"{text}: {first}", hint=hint)
        most = self._config.max_long
        if most is not None and len(long) > most * file.rows:
            raise DataError(
                f"{text}: {len(long) / file.rows:.1%} where `max_long` allows for {most:.1%}; {first}",
                hint="raise `max_length` or `max_long`, or shorten the rows",
            )
        self.left_out[f"longer than {what}"] += len(long)
        self._context.warn(f"{text} and were left out; {first}")


class Joined(Sequence[EncodedRow]):
    """Blocks of several datasets, one behind the other.

    Args:
        several: Those of each.

    Attributes:
        lengths: See `Blocks`.
        targets: See `Blocks`.
        parts: How many are of each.
    """

    def __init__(self, several: Sequence[Blocks]) -> None:
        self._several = several
        self.parts = [len(blocks) for blocks in several]
        self.lengths = np.concatenate([blocks.lengths for blocks in several])
        self.targets = np.concatenate([blocks.targets for blocks in several])
        self._ends = np.cumsum(self.parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        which = int(np.searchsorted(self._ends, place, side="right"))
        return self._several[which][place - int(self._ends[which]) + self.parts[which]]


class Blocks(Sequence[EncodedRow]):
    """Blocks of exactly `length` tokens from documents in a row; the last, shorter block is kept.

    All tokens are trained but those that begin a document, or the part of one that a block begins with: nothing of
    their own stands before them.

    Args:
        documents: The documents, each a row of one completion.
        lengths: Their tokens, shape (documents,).
        length: Tokens of a block.
        seed: Documents are shuffled with it; None: they stay in their order.
        across: Whether tokens see the documents before theirs, as if all were one.

    Attributes:
        lengths: Tokens of each block, shape (blocks,).
    """

    def __init__(
        self, documents: Sequence[EncodedRow], lengths: np.ndarray, length: int, seed: int | None, *, across: bool
    ) -> None:
        order = list(range(len(documents)))
        if seed is not None:
            random.Random(seed).shuffle(order)
        self._documents, self._length, self._across = documents, length, across
        self._order = np.asarray(order, np.int64)
        self._ends = np.cumsum(lengths[self._order], dtype=np.int64)
        total = int(self._ends[-1]) if len(self._ends) else 0
        count = -(-total // length)
        sizes = np.full(count, length, np.int32)
        if count and total % length:
            sizes[-1] = total % length
            # What is left may be beginnings of documents alone.
            if not any(label != IGNORED for label in self._block(count - 1).labels):
                sizes = sizes[:-1]
        self.lengths = sizes

    @property
    def targets(self) -> np.ndarray:
        """How many tokens of each block are trained, shape (blocks,)."""
        if self._across:
            return self.lengths - 1
        starts = np.arange(len(self.lengths), dtype=np.int64) * self._length
        first, last = (
            np.searchsorted(self._ends, places, side="right") for places in (starts, starts + self.lengths - 1)
        )
        # The first token of each document, or of the part of one that a block begins with, is not.
        return self.lengths - (last - first + 1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return EncodedRow((self._block(int(place)),))

    def _block(self, place: int) -> Encoded:
        start, end = place * self._length, min((place + 1) * self._length, int(self._ends[-1]))
        ids: list[int] = []
        labels: list[int] = []
        lengths: list[int] = []
        which = int(np.searchsorted(self._ends, start, side="right"))
        while start < end:
            document: list[int] = self._documents[int(self._order[which])].completions[0].input_ids
            begin = int(self._ends[which]) - len(document)
            piece = document[start - begin : end - begin]
            ids += piece
            labels += [IGNORED, *piece[1:]]
            lengths.append(len(piece))
            start += len(piece)
            which += 1
        if self._across:
            return Encoded(ids, [IGNORED, *ids[1:]], (len(ids),))
        return Encoded(ids, labels, tuple(lengths))
