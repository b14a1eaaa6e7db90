"""From rows of any schema to token ids and labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from luthier.api.artifact import Artifact
from luthier.api.context import Context
from luthier.api.data import Row
from luthier.api.errors import DataError
from luthier.api.tuning import TrainingConfig
from luthier.artifacts.datasets import Split
from luthier.artifacts.rows import conversations, schema_of, texts_of, trainable_text
from luthier.modeling.chat import Answers, ChatEncoder
from luthier.modeling.text import IGNORED, Encoded

SHOWN = 20
"""Bad rows that an error names."""
QUOTED = 60
"""Characters of a row that are quoted to find it by."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as tokens.

    Attributes:
        completions: Its completions, each after its prompt: the chosen and the rejected one of a preference; one of a
            conversation or a text, or several where no one sequence shows every prompt of it.
        desirable: Whether a labelled completion is a good one; None for other rows.
        paired: Whether the completions are the two sides of a preference.
    """

    completions: tuple[Encoded, ...]
    desirable: bool | None = None
    paired: bool = False

    def __len__(self) -> int:
        return max(len(item.input_ids) for item in self.completions)

    @property
    def targets(self) -> int:
        """How many tokens are trained."""
        # Nothing stands before the first one, to say it from.
        return sum(label != IGNORED for item in self.completions for label in item.labels[1:])


def encode_row(encoder: ChatEncoder, row: Row, answers: Answers = "all") -> EncodedRow:
    """Tokens of a row of any schema that can be trained on.

    Args:
        encoder: What encodes it.
        row: The row.
        answers: Which answers of a conversation are trained.

    Raises:
        DataError: the chat template cannot render it so that it could be trained; or it teaches nothing: it is a prompt
            alone, or a pair whose sides are the same tokens.
    """
    schema = schema_of(row)
    if not trainable_text(schema):
        raise DataError(f"a row of the schema {schema} has nothing to be trained on")
    if schema == "text":
        ids = encoder.document(row)
        return block_of(ids)
    if schema == "messages":
        made = encoder.conversation(row["messages"], answers)
        if not made:
            raise DataError("no turn of the assistant says anything")
        return EncodedRow(tuple(made))
    sides = [encoder.answer(messages) for messages in conversations(row)]
    if len(sides) == 2 and sides[0].input_ids == sides[1].input_ids:
        raise DataError(
            "the chosen and the rejected answer are the same tokens in the chat template",
            hint="they differ only in what it changes or leaves out, such as white space at the ends",
        )
    return EncodedRow(tuple(sides), row.get("label"), paired=len(sides) == 2)


class RowEncoder:
    """Makes tokens of the rows of datasets; those that cannot be trained on are reported, and left out or refused.

    Args:
        chat: What it encodes with.
        config: The stage's config: what may be left out, and how long a row may be.
        context: Is told of it.
        positions: The most tokens that the model can see; None: any number.

    Attributes:
        left_out: How many rows were left out, by reason.
        notes: In how many rows something was found that is trained on all the same, by what it is.
    """

    def __init__(self, chat: ChatEncoder, config: TrainingConfig, context: Context, positions: int | None) -> None:
        self.chat = chat
        self.left_out: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._config = config
        self._context = context
        self._positions = positions

    def answers(self, dataset: Artifact, split: Split, rows: Sequence[Row]) -> list[EncodedRow]:
        """Rows of any schema whose answers are trained, each short enough for the stage and the model.

        Raises:
            DataError: more rows than `bad_rows` allows cannot be encoded, none is short enough, or `on_long` says to
                stop.
        """
        limit = min(self._config.max_length, self._positions or self._config.max_length)
        return self._encoded(
            lambda row: encode_row(self.chat, row, self._config.trained_answers), dataset, split, rows, limit
        )

    def documents(self, dataset: Artifact, split: Split, rows: Sequence[Row]) -> list[EncodedRow]:
        """Texts and whole conversations, of any length, of which every token is trained.

        Raises:
            DataError: more rows than `bad_rows` allows cannot be encoded.
        """
        return self._encoded(lambda row: block_of(self.chat.document(row)), dataset, split, rows, None)

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

    def _encoded(
        self,
        encode: Callable[[Row], EncodedRow],
        dataset: Artifact,
        split: Split,
        rows: Sequence[Row],
        limit: int | None,
    ) -> list[EncodedRow]:
        made: list[EncodedRow] = []
        bad: list[tuple[int, DataError]] = []
        long: list[tuple[int, int]] = []
        notes: Counter[str] = Counter()
        for number, row in enumerate(rows, 1):
            self.chat.notes.clear()
            try:
                encoded = encode(row)
            except DataError as error:
                bad.append((number, error))
                continue
            if limit is not None and len(encoded) > limit:
                long.append((number, len(encoded)))
                continue
            made.append(encoded)
            notes.update(note for note, count in self.chat.notes.items() if count)
        name = f"'{dataset.manifest['stage']}' (split '{split}')"
        self._report_bad(bad, rows, name)
        self._report_long(long, rows, name, limit or 0, none_left=not made)
        if rows and not made:
            raise DataError(f"no row of {name} can be trained on")
        for note, count in notes.items():
            self._context.warn(f"{count} of {len(rows)} rows of {name}: {note}")
        self.notes.update(notes)
        return made

    def _report_bad(self, bad: list[tuple[int, DataError]], rows: Sequence[Row], name: str) -> None:
        if not bad:
            return
        reasons = Counter(error.message for _, error in bad)
        counted = f"{len(bad)} of {len(rows)} rows of {name} cannot be trained on as they are"
        if len(bad) > self._config.bad_rows.drop_up_to * len(rows):
            lines = [f"{_named(number, rows)}: {error.message}" for number, error in bad[:SHOWN]]
            lines += [f"... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
            hint = next((f"{error.hint}; or " for _, error in bad if error.hint), "")
            share = math.ceil(1000 * len(bad) / len(rows)) / 1000
            raise DataError(
                "\n".join([f"{counted}:", *lines]), hint=f"{hint}leave them out: `bad_rows: {{drop_up_to: {share}}}`"
            )
        self.left_out.update(reasons)
        why = "; ".join(f"{count} times: {reason}" for reason, count in reasons.most_common())
        self._context.warn(f"{counted} and were left out, the first is {_named(bad[0][0], rows)}: {why}")

    def _report_long(
        self, long: list[tuple[int, int]], rows: Sequence[Row], name: str, limit: int, *, none_left: bool
    ) -> None:
        if not long:
            return
        asked = limit == self._config.max_length
        what = f"max_length={limit}" if asked else f"the model's context of {limit} tokens"
        text = f"{len(long)} of {len(rows)} rows of {name} are longer than {what}"
        first = f"the first is {_named(long[0][0], rows)}, the longest has {max(size for _, size in long)} tokens"
        if self._config.fails_on_long or none_left:
            hint = "raise `max_length` or shorten the rows" if asked else "shorten the rows"
            raise DataError(f"{text}: {first}", hint=hint)
        self.left_out[f"longer than {what}"] += len(long)
        self._context.warn(f"{text} and were left out; {first}")


def _named(number: int, rows: Sequence[Row]) -> str:
    """A row as its number and how it begins: what it is found by in a file."""
    text = " ".join(next(texts_of(rows[number - 1]), "").split())
    return f'row {number} ("{text[:QUOTED]}{"..." if len(text) > QUOTED else ""}")'


def packed_rows(documents: Iterable[Sequence[int]], length: int) -> Iterator[EncodedRow]:
    """Blocks of exactly `length` tokens from documents in a row; the last, shorter block is kept.

    All tokens are trained but those that begin a document, or the part of one that a block begins with: nothing of
    their own stands before them.
    """
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for document in documents:
        rest = list(document)
        while rest:
            piece, rest = rest[: length - len(ids)], rest[length - len(ids) :]
            ids += piece
            labels += [IGNORED, *piece[1:]]
            lengths.append(len(piece))
            if len(ids) == length:
                yield EncodedRow((Encoded(ids, labels, tuple(lengths)),))
                ids, labels, lengths = [], [], []
    if any(label != IGNORED for label in labels):
        yield EncodedRow((Encoded(ids, labels, tuple(lengths)),))


def block_of(ids: Sequence[int]) -> EncodedRow:
    """A block of tokens that see each other, whatever they are of; all are trained."""
    return EncodedRow((Encoded(list(ids), list(ids)),))
