"""Proves on the first rows, in every run, that what training computes is what the model says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from luthier.api.errors import ModelError
from luthier.api.training import TokenBatch
from luthier.modeling.text import IGNORED, Encoded
from luthier.training.batches import Reference, collate, evaluating, log_probabilities, unpacked
from luthier.training.encoding import EncodedRow

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


def sample_of(rows: Sequence[EncodedRow]) -> EncodedRow:
    """A few sequences with trained tokens, short ones, and those that several documents are packed into if any are.

    Each is cut to some trained tokens and what stands right before them: a model does not look ahead, and any context
    will do to compare with.
    """
    items = [item for row in rows[:LOOKED_AT] for item in row.completions]
    trained = [item for item in items if any(label != IGNORED for label in item.labels)] or items
    trained.sort(key=lambda item: (-len(item.lengths), len(item.input_ids)))
    # One of another length, so that something is padded.
    lengths = {len(item.input_ids): item for item in reversed(trained)}
    chosen = [trained[0], *[item for length, item in lengths.items() if length != len(trained[0].input_ids)][-1:]]
    found: list[Encoded] = []
    for item in [*chosen, *trained[1:]][:SEQUENCES]:
        documents = [_cut(document) for document in unpacked(item)[:DOCUMENTS]]
        lengths_of = tuple(len(document.input_ids) for document in documents)
        ids = [token for document in documents for token in document.input_ids]
        labels = [label for document in documents for label in document.labels]
        found.append(Encoded(ids, labels, lengths_of if item.lengths else ()))
    return EncodedRow(tuple(found))


def _cut(item: Encoded) -> Encoded:
    targets = [place for place, label in enumerate(item.labels) if label != IGNORED][:TARGETS]
    start, end = (max(0, targets[0] - CONTEXT), targets[-1] + 1) if targets else (0, min(len(item.labels), CONTEXT))
    return Encoded(item.input_ids[start:end], item.labels[start:end])


def can_fuse(model: Any) -> bool:
    """Whether the output head is a plain layer: a head with an adapter, or a copy that is trained, is more than its
    weight."""
    head = model.get_output_embeddings()
    odd = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return isinstance(head, nn.Module) and not isinstance(head, odd) and hasattr(head, "weight")


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
        self._row = sample_of(rows)
        self._padding = padding
        self._near = NEAR[precision]
        self._around = around
        broken = _broken(model)
        if broken:
            raise ModelError(f"the model has {broken}", hint="they were there before training: use other weights")
        with self._evaluating():
            self._own = torch.cat([self._alone(item) for side in self._row.completions for item in unpacked(side)])
        if not bool(torch.isfinite(self._own).all()):
            raise ModelError(
                "the model's log-probabilities are not finite before the first step",
                hint="do its weights overflow in this precision?",
            )

    def apart(self, *, fused: bool, packed: bool) -> float:
        """How far a way of computing is from the model's own logits, one document at a time; 0 within rounding."""
        batch = self._batch(packed=packed)
        try:
            with self._evaluating():
                found = log_probabilities(self._model, batch, fused=fused).completions.logps.float()
        except torch.OutOfMemoryError:
            raise
        # A shortcut may not know a model at all.
        except (AttributeError, TypeError, NotImplementedError, RuntimeError):
            if not fused and not packed:
                raise
            return float("inf")
        return self._distance(found, self._own)

    def check_reference(self, reference: Reference, *, fused: bool, packed: bool) -> None:
        """Refuse to go on unless the reference is the policy, before the first step.

        Raises:
            ModelError: it is not.
        """
        batch = self._batch(packed=packed)
        training = self._model.training
        self._model.train()
        with torch.no_grad(), self._around():
            found = log_probabilities(self._model, batch, reference, fused=fused).completions
        self._model.train(training)
        assert found.reference_logps is not None, "there is a reference"
        distance = self._distance(found.logps.float(), found.reference_logps.float())
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

    def _batch(self, *, packed: bool) -> TokenBatch:
        batch = collate([self._row], self._padding, packed=packed)
        device = next(self._model.parameters()).device
        values = {name: getattr(batch, name) for name in batch.__slots__}
        moved: dict[str, Any] = {name: item if item is None else item.to(device) for name, item in values.items()}
        return TokenBatch(**moved)

    def _alone(self, item: Encoded) -> Tensor:
        device = next(self._model.parameters()).device
        labels = torch.tensor(item.labels[1:], device=device)
        trained = labels != IGNORED
        if not bool(trained.any()):
            return torch.zeros(0, device=device)
        logits = self._model(input_ids=torch.tensor([item.input_ids], device=device)).logits[0, :-1][trained].float()
        return logits.log_softmax(-1).gather(1, labels[trained][:, None])[:, 0]

    def _distance(self, found: Tensor, right: Tensor) -> float:
        """The mean distance; 0 where it is rounding."""
        distance = float((found - right).abs().mean())
        return 0.0 if distance <= self._near * max(1.0, float(right.abs().mean())) else distance


def _broken(model: nn.Module) -> str:
    """Which weights are not finite, in words; nothing where all are."""
    names = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"NaN or infinite values in {names[0]}{more}" if names else ""
