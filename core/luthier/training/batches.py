"""Batches: padded tokens that go into the model, and ragged log-probabilities that come out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from luthier.api.training import CompletionBatch, TokenBatch, Unit
from luthier.modeling.text import IGNORED
from luthier.training.encoding import EncodedRow


def collate(rows: Sequence[EncodedRow], padding: int) -> TokenBatch:
    """Rows as a batch: first the first completion of every row, then the second ones, padded at the right.

    Args:
        rows: Rows with equally many completions.
        padding: The id of the padding token; it is masked out of attention and loss.
    """
    count = len(rows[0].completions)
    completions = [row.completions[side] for side in range(count) for row in rows]
    width = max(len(item.input_ids) for item in completions)
    ids = [[*item.input_ids, *[padding] * (width - len(item.input_ids))] for item in completions]
    labels = [[*item.labels, *[IGNORED] * (width - len(item.labels))] for item in completions]
    mask = [[1] * len(item.input_ids) + [0] * (width - len(item.input_ids)) for item in completions]
    pairs = [[place, len(rows) + place] for place in range(len(rows))] if count == 2 else None
    desirable = None if rows[0].desirable is None else torch.tensor([bool(row.desirable) for row in rows])
    return TokenBatch(
        torch.tensor(ids),
        torch.tensor(mask),
        torch.tensor(labels),
        torch.tensor(pairs) if pairs else None,
        desirable,
    )


def units_in(batch: TokenBatch, unit: Unit) -> int:
    """How many units of an objective a batch has."""
    if unit == "token":
        return int((batch.labels[:, 1:] != IGNORED).sum())
    if unit == "completion":
        return len(batch.labels)
    assert batch.pairs is not None, "an objective on pairs reads rows of the schema `preference`"
    return len(batch.pairs)


def log_probabilities(
    model: Any, batch: TokenBatch, reference: AbstractContextManager[Any] | None = None
) -> tuple[CompletionBatch, Tensor]:
    """Run a model that `trl.trainer.add_fused_lm_head` has given its head on a batch.

    Args:
        model: The model.
        batch: The batch.
        reference: Makes the model the reference while it is entered; None where it is not needed.

    Returns:
        The log-probabilities, and whether the target was the likeliest token, shape (targets,).
    """
    before: Any = None
    if reference is not None:
        # Before the policy's own pass: its graph must not see other weights.
        with torch.no_grad(), reference:
            before = _forward(model, batch)
    output = _forward(model, batch)
    mask: Tensor = output.label_mask
    made = CompletionBatch(
        logps=output.log_probs[mask],
        owner=mask.nonzero()[:, 0],
        sums=output.log_probs.sum(1),
        lengths=mask.sum(1),
        reference_logps=None if before is None else before.log_probs[mask],
        reference_sums=None if before is None else before.log_probs.sum(1),
        pairs=batch.pairs,
        desirable=batch.desirable,
    )
    return made, output.is_top1[mask]


def _forward(model: Any, batch: TokenBatch) -> Any:
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        use_cache=False,
        fused_lm_head=True,
    )


class Reference(AbstractContextManager[None]):
    """The model as it was given: while entered, its trained parameters have the values they had at the beginning.

    One copy of what is trained, whatever that is: all weights, or an adapter on a frozen base.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._values = [parameter.detach().clone() for parameter in self._parameters]
        self._training = False

    def __enter__(self) -> None:
        self._training = self._model.training
        self._model.eval()
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()
        self._model.train(self._training)

    def _swap(self) -> None:
        for place, parameter in enumerate(self._parameters):
            parameter.data, self._values[place] = self._values[place], parameter.data
