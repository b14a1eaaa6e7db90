"""Proves on the first rows, in every run, that what training computes is what the model says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.api.errors import ModelError
from luthier.modeling.text import IGNORED, Encoded
from luthier.training.batches import evaluating, log_probabilities
from luthier.training.encoding import EncodedRow
from luthier.training.layout import Layout, unpacked

LOOKED_AT = 256
"""Rows among which those to compare with are chosen."""
SEQUENCES = 2
"""Sequences that are compared, so that the shorter one is padded, ..."""
DOCUMENTS = 3
"""... documents of each, where they are packed, ..."""
TARGETS = 64
"""... trained tokens of each document, ..."""
CONTEXT = 256
"""... and tokens before the first of them."""
NEAR = {"fp32": 1e-4, "bf16": 3e-2}
"""How far log-probabilities may lie apart in the mean, as a share of their mean size, by precision: rounding, since
sums are taken in another order."""


def sample_of(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    """A few rows with trained tokens, short ones, and those that several documents are packed into if any are.

    Each completion is cut to some trained tokens and what stands right before them: a model does not look ahead, and
    any context will do to compare with.
    """
    looked_at = rows[:LOOKED_AT]
    trained = [row for row in looked_at if row.targets] or list(looked_at)
    trained.sort(key=lambda row: (-len(row.completions[0].lengths), len(row)))
    # One of another length, so that something is padded.
    lengths = {len(row): row for row in reversed(trained)}
    chosen = [trained[0], *[row for length, row in lengths.items() if length != len(trained[0])][-1:]]
    return [_cut_row(row) for row in [*chosen, *trained[1:]][:SEQUENCES]]


def _cut_row(row: EncodedRow) -> EncodedRow:
    """A row with less before its first target, and fewer targets."""
    if row.paired:
        # Both sides lose the same of their prompt.
        firsts = [next((n for n, label in enumerate(item.labels) if label != IGNORED), 0) for item in row.completions]
        start = max(0, min(firsts) - CONTEXT)
        sides = [_cut(Encoded(item.input_ids[start:], item.labels[start:]), whole=True) for item in row.completions]
        return replace(row, completions=tuple(sides), reference_logps=None)
    return replace(row, completions=tuple(map(_cut_documents, row.completions)), reference_logps=None)


def _cut_documents(item: Encoded) -> Encoded:
    documents = [_cut(document) for document in unpacked(item)[:DOCUMENTS]]
    lengths = tuple(len(document.input_ids) for document in documents)
    ids = [token for document in documents for token in document.input_ids]
    labels = [label for document in documents for label in document.labels]
    return Encoded(ids, labels, lengths if item.lengths else ())


def _cut(item: Encoded, *, whole: bool = False) -> Encoded:
    targets = [place for place, label in enumerate(item.labels) if label != IGNORED][:TARGETS]
    start, end = (max(0, targets[0] - CONTEXT), targets[-1] + 1) if targets else (0, min(len(item.labels), CONTEXT))
    start = 0 if whole else start
    return Encoded(item.input_ids[start:end], item.labels[start:end])


class Proof:
    """Compares ways of computing the log-probabilities of a few trained tokens.

    Args:
        model: The model, before its first step.
        rows: The training rows.
        padding: The id of the padding token.
        precision: That of the passes.
        around: Makes the context that passes are computed in.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[EncodedRow],
        padding: int,
        precision: str,
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._model = model
        self._rows = sample_of(rows)
        self._layout = Layout(padding, packed=False, shared=False)
        self._near = NEAR[precision]
        self._around = around
        self._device = next(model.parameters()).device
        broken = _broken(model)
        if broken:
            raise ModelError(f"the model has {broken}", hint="they were there before training: use other weights")
        alone = [item for row in self._rows for side in row.completions for item in unpacked(side)]
        with self._evaluating():
            self._own = torch.cat([self._alone(item) for item in alone])
        if not bool(torch.isfinite(self._own).all()):
            raise ModelError(
                "the model's log-probabilities are not finite before the first step",
                hint="do its weights overflow in this precision?",
            )

    @property
    def sequences(self) -> int:
        """How many sequences there are to pack."""
        return sum(len(row.completions) for row in self._rows)

    def apart(self, *, fused: bool, packed: bool = False, shared: bool = False, segments: bool = False) -> float:
        """How far a way of computing is from the model's own logits, one document at a time; 0 within rounding."""
        try:
            with self._evaluating():
                found = self._logps(fused=fused, packed=packed, shared=shared, segments=segments)
        except torch.OutOfMemoryError:
            raise
        # A shortcut may not know a model at all.
        except (AttributeError, TypeError, NotImplementedError, RuntimeError, KeyError):
            if not fused and not packed and not shared:
                raise
            return float("inf")
        return self._distance(found, self._own)

    def check_steady(self, *, fused: bool) -> None:
        """Refuse to compare with a reference what changes by itself: while it is trained, the model has to say what it
        says when it is not.

        Raises:
            ModelError: it does not.
        """
        training = self._model.training
        self._model.train()
        try:
            with torch.no_grad(), self._around():
                found = self._logps(fused=fused)
        finally:
            self._model.train(training)
        distance = self._distance(found, self._own)
        if distance:
            raise ModelError(
                f"the reference is not the model that training begins with: their log-probabilities differ by "
                f"{distance:.3g} in the mean",
                hint="does the model draw random numbers, or change parts of itself, while it is trained?",
            )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with evaluating(self._model), torch.no_grad(), self._around():
            yield

    def _logps(self, *, fused: bool, packed: bool = False, shared: bool = False, segments: bool = False) -> Tensor:
        """log p of all targets, in the order of the rows."""
        layout = replace(self._layout, packed=packed, shared=shared, segments=segments)
        batch = layout.batch(self._rows).to(self._device)
        made = log_probabilities(self._model, batch, fused=fused).completions
        return made.logps.float()[torch.argsort(made.owner, stable=True)]

    def _alone(self, item: Encoded) -> Tensor:
        labels = torch.tensor(item.labels[1:], device=self._device)
        trained = labels != IGNORED
        if not bool(trained.any()):
            return torch.zeros(0, device=self._device)
        ids = torch.tensor([item.input_ids], device=self._device)
        logits = self._model(input_ids=ids).logits[0, :-1][trained].float()
        return logits.log_softmax(-1).gather(1, labels[trained][:, None])[:, 0]

    def _distance(self, found: Tensor, right: Tensor) -> float:
        """The mean distance; 0 where it is rounding."""
        if not len(right):
            return 0.0
        distance = float((found - right).abs().mean())
        return 0.0 if distance <= self._near * max(1.0, float(right.abs().mean())) else distance


def _broken(model: nn.Module) -> str:
    """Which weights are not finite, in words; nothing where all are."""
    names = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"NaN or infinite values in {names[0]}{more}" if names else ""
