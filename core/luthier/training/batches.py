"""Batches: padded tokens that go into the model, and ragged log-probabilities that come out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.api.training import CompletionBatch, TokenBatch, Unit
from luthier.modeling.text import IGNORED, Encoded
from luthier.training.encoding import EncodedRow

DRAWS = re.compile(r"dropout|jitter")
"""What attributes of modules are called that hold a chance, or the size of a noise."""


def collate(rows: Sequence[EncodedRow], padding: int, *, packed: bool = True) -> TokenBatch:
    """Rows as a batch, padded at the right. Of pairs the chosen completions come first, then the rejected ones; of
    other rows all completions, one after the other.

    Args:
        rows: Rows, all of which are pairs or none is.
        padding: The id of the padding token; it is masked out of attention and loss.
        packed: Whether documents that were packed into a row stay in it; else each is a row of its own.
    """
    paired = rows[0].paired
    sides = (
        [row.completions[side] for side in range(2) for row in rows]
        if paired
        else [item for row in rows for item in row.completions]
    )
    completions = sides if packed else [item for side in sides for item in unpacked(side)]
    width = max(len(item.input_ids) for item in completions)
    ids = [[*item.input_ids, *[padding] * (width - len(item.input_ids))] for item in completions]
    labels = [[*item.labels, *[IGNORED] * (width - len(item.labels))] for item in completions]
    mask = [[1] * len(item.input_ids) + [0] * (width - len(item.input_ids)) for item in completions]
    desirable = None if rows[0].desirable is None else torch.tensor([bool(row.desirable) for row in rows])
    positions = [_positions(item, width) for item in completions] if any(item.lengths for item in completions) else None
    return TokenBatch(
        torch.tensor(ids),
        torch.tensor(mask),
        torch.tensor(labels),
        torch.tensor([[place, len(rows) + place] for place in range(len(rows))]) if paired else None,
        desirable,
        torch.tensor(positions) if positions else None,
    )


def _positions(item: Encoded, width: int) -> list[int]:
    """Each token's place in its document; padding is one of its own."""
    lengths = [*(item.lengths or (len(item.input_ids),)), width - len(item.input_ids)]
    return [place for length in lengths for place in range(length)]


def unpacked(item: Encoded) -> list[Encoded]:
    """The documents of a packed row, each alone."""
    found: list[Encoded] = []
    start = 0
    for length in item.lengths or (len(item.input_ids),):
        found.append(Encoded(item.input_ids[start : start + length], item.labels[start : start + length]))
        start += length
    return found


def units_in(batch: TokenBatch, unit: Unit) -> int:
    """How many units of an objective a batch has."""
    if unit == "token":
        return int((batch.labels[:, 1:] != IGNORED).sum())
    if unit == "completion":
        return len(batch.labels)
    assert batch.pairs is not None, "an objective on pairs reads rows of the schema `preference`"
    return len(batch.pairs)


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one pass through the model gives: all of shape (completions, length - 1) but the last.

    Attributes:
        logps: log p of the targets, 0 elsewhere.
        mask: Where there are targets.
        likeliest: Whether a target was the likeliest token.
        auxiliary: The model's own further loss, weighted as its config says: a scalar; None where it has none.
    """

    logps: Tensor
    mask: Tensor
    likeliest: Tensor
    auxiliary: Tensor | None


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the model makes of a batch.

    Attributes:
        completions: The log-probabilities.
        likeliest: Whether the target was the likeliest token, shape (targets,).
        auxiliary: What the model adds to the loss itself, such as the balance of its experts: a scalar, or None.
    """

    completions: CompletionBatch
    likeliest: Tensor
    auxiliary: Tensor | None


def log_probabilities(
    model: Any, batch: TokenBatch, reference: AbstractContextManager[Any] | None = None, *, fused: bool = True
) -> Outputs:
    """Run a model on a batch.

    Args:
        model: The model; `trl.trainer.add_fused_lm_head` has given it its head if `fused`.
        batch: The batch.
        reference: Makes the model the reference while it is entered; None where it is not needed.
        fused: Whether the output head is applied to trained positions alone; else the model's own logits are taken.
    """
    forward = _fused if fused else _plain
    before: _Pass | None = None
    if reference is not None:
        # Before the policy's own pass: its graph must not see other weights.
        with torch.no_grad(), reference:
            before = forward(model, batch)
    found = forward(model, batch)
    made = CompletionBatch(
        logps=found.logps[found.mask],
        owner=found.mask.nonzero()[:, 0],
        sums=found.logps.sum(1),
        lengths=found.mask.sum(1),
        reference_logps=None if before is None else before.logps[found.mask],
        reference_sums=None if before is None else before.logps.sum(1),
        pairs=batch.pairs,
        desirable=batch.desirable,
    )
    return Outputs(made, found.likeliest[found.mask], found.auxiliary)


def _fused(model: Any, batch: TokenBatch) -> _Pass:
    output = model(**batch.model_inputs(), labels=batch.labels, use_cache=False, fused_lm_head=True)
    return _Pass(output.log_probs, output.label_mask, output.is_top1, _weighted(model, output))


def _plain(model: Any, batch: TokenBatch) -> _Pass:
    output = model(**batch.model_inputs(), use_cache=False)
    labels = batch.labels[:, 1:]
    mask = labels != IGNORED
    logits = output.logits[:, :-1][mask].float()
    logps = logits.log_softmax(-1).gather(1, labels[mask][:, None])[:, 0]
    sums, likeliest = logps.new_zeros(mask.shape), torch.zeros_like(mask)
    sums = sums.masked_scatter(mask, logps)
    likeliest[mask] = logits.argmax(-1) == labels[mask]
    return _Pass(sums, mask, likeliest, _weighted(model, output))


def _weighted(model: Any, output: Any) -> Tensor | None:
    """The loss that balances experts, where the model's config asks for it."""
    config = model.config.get_text_config()
    auxiliary: Any = getattr(output, "aux_loss", None)
    if not isinstance(auxiliary, Tensor) or not getattr(config, "output_router_logits", False):
        return None
    return getattr(config, "router_aux_loss_coef", 0.0) * auxiliary


def draws(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, float]]:
    """What a model draws random numbers for while it is trained: dropout, also where attention takes it as a number,
    and noise of routers. Each as a module, the name of the attribute, and its value."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float)
        and value > 0
        and (DRAWS.search(name) or (name == "p" and isinstance(module, torch.nn.Dropout)))
    ]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model without anything random, for as long as it is entered."""
    training = model.training
    if any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        # bitsandbytes takes evaluation as a sign to repack its weights for another kernel, which rounds otherwise.
        model.train()
        found = draws(model)
        for module, name, _ in found:
            setattr(module, name, 0.0)
    else:
        found = []
        model.eval()
    try:
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)
        model.train(training)


class Reference(AbstractContextManager[None]):
    """The model as it was given: while entered, its trained parameters have the values they had at the beginning.

    One copy of what is trained, whatever that is: all weights, or an adapter on a frozen base.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._values = [parameter.detach().clone() for parameter in self._parameters]
        self._stack = ExitStack()

    def __enter__(self) -> None:
        self._stack.enter_context(evaluating(self._model))
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()
        self._stack.close()

    def _swap(self) -> None:
        for place, parameter in enumerate(self._parameters):
            parameter.data, self._values[place] = self._values[place], parameter.data
