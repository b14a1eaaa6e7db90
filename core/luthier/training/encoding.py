"""From rows of any schema to token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from luthier.api.data import Row
from luthier.api.errors import DataError
from luthier.artifacts.rows import conversations, schema_of, trainable_text, weight_of
from luthier.modeling.chat import Answers, ChatEncoder
from luthier.modeling.text import IGNORED, Encoded


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as tokens.

    Attributes:
        completions: Its completions, each after its prompt: the chosen and the rejected one of a preference; one of a
            conversation or a text, or several where no one sequence shows every prompt of it.
        desirable: Whether a labelled completion is a good one; None for other rows.
        paired: Whether the completions are the two sides of a preference.
        weight: How much it weighs in the loss, beside rows of 1.
        reference_logps: Of each completion's trained tokens under the reference, in nats; None where it is not known.
        mismatched: Its prompt with the answer to another one; None where no objective asks for it.
    """

    completions: tuple[Encoded, ...]
    desirable: bool | None = None
    paired: bool = False
    weight: float = 1.0
    reference_logps: tuple[Sequence[float], ...] | None = None
    mismatched: EncodedRow | None = None

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
    schema, weight = schema_of(row), weight_of(row)
    if not trainable_text(schema):
        raise DataError(f"a row of the schema {schema} has nothing to be trained on")
    if schema == "text":
        return replace(block_of(encoder.document(row)), weight=weight)
    if schema == "messages":
        made = encoder.conversation(conversations(row)[0], answers)
        if not made:
            raise DataError("no turn of the assistant says anything that is trained")
        return EncodedRow(tuple(made), weight=weight)
    sides = [encoder.answer(messages) for messages in conversations(row)]
    if len(sides) == 2 and sides[0].input_ids == sides[1].input_ids:
        raise DataError(
            "the chosen and the rejected answer are the same tokens in the chat template",
            hint="they differ only in what it changes or leaves out, such as white space at the ends",
        )
    return EncodedRow(tuple(sides), row.get("label"), paired=len(sides) == 2, weight=weight)


def block_of(ids: Sequence[int]) -> EncodedRow:
    """A block of tokens that see each other, whatever they are of; all are trained."""
    return EncodedRow((Encoded(list(ids), list(ids)),))
