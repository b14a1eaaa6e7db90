"""From floats to whole numbers with scales: to nearest, or with the error made up for by the later columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from luthier.api import ModelError
from luthier.modeling.quantized import Grouped
from luthier.modeling.streamed import Streamed
from torch import Tensor, nn

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean (Frantar et al. 2022, section 3.3)."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How a group of weights becomes whole numbers."""

    bits: int
    group_size: int
    symmetric: bool

    @property
    def top(self) -> int:
        """The largest whole number."""
        return (1 << self.bits) - 1

    def fit(self, group: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of a group, each of shape (rows, 1); the scale is what float16 makes of it.

        Args:
            group: Weights, shape (rows, columns).
        """
        low = group.amin(dim=1, keepdim=True).clamp(max=0)
        high = group.amax(dim=1, keepdim=True).clamp(min=0)
        if self.symmetric:
            size = torch.maximum(-low, high)
            scale = _half(2 * size / self.top)
            return scale, torch.full_like(scale, 1 << (self.bits - 1))
        scale = _half((high - low) / self.top)
        # GPTQ stores zero points minus one: there is no 0.
        return scale, (-low / scale).round().clamp(1, self.top)

    def whole(self, weights: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The whole numbers of weights."""
        return ((weights / scale).round() + zero).clamp(0, self.top)


def _half(scale: Tensor) -> Tensor:
    """The scale as it will be stored; a group of zeros has one too."""
    return scale.clamp(min=1e-6).half().float()


def to_nearest(weight: Tensor, grid: Grid) -> Grouped:
    """Round each weight to the nearest whole number of its group."""
    rows, columns = weight.shape
    groups = weight.reshape(-1, grid.group_size)
    scale, zero = grid.fit(groups)
    values = grid.whole(groups, scale, zero)
    return Grouped(values.view(rows, columns).int(), scale.view(rows, -1).half(), zero.view(rows, -1).int(), grid.bits)


def with_feedback(weight: Tensor, hessian: Tensor, grid: Grid) -> Grouped:
    """Round column by column; what a column loses is made up for by the later ones, as far as the inputs go together
    (GPTQ: Frantar et al. 2022, arXiv:2210.17323, algorithm 1, one block for each group).

    Args:
        weight: Shape (rows, columns); where it is, is where this computes.
        hessian: Inner products of the inputs, shape (columns, columns).

    Raises:
        ModelError: these are not finite.
    """
    weight = weight.clone().float()
    hessian = hessian.to(weight.device, copy=True)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    inverse = _inverse_root(hessian)
    rows, columns = weight.shape
    values = torch.empty(rows, columns, device=weight.device)
    scales, zeros = [], []
    for first in range(0, columns, grid.group_size):
        last = first + grid.group_size
        block = weight[:, first:last]
        scale, zero = grid.fit(block)
        scales.append(scale)
        zeros.append(zero)
        errors = torch.empty_like(block)
        corner = inverse[first:last, first:last]
        for place in range(grid.group_size):
            column = block[:, place : place + 1]
            whole = grid.whole(column, scale, zero)
            values[:, first + place] = whole[:, 0]
            error = (column - (whole - zero) * scale) / corner[place, place]
            block[:, place:].sub_(error * corner[place : place + 1, place:])
            errors[:, place : place + 1] = error
        weight[:, last:].sub_(errors @ inverse[first:last, last:])
    return Grouped(
        values.int().cpu(), torch.cat(scales, dim=1).half().cpu(), torch.cat(zeros, dim=1).int().cpu(), grid.bits
    )


def _inverse_root(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse; damped more, where rounding made it singular."""
    mean = hessian.diagonal().mean()
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        with suppress(RuntimeError):
            return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    raise ModelError(
        "what a layer is given on the calibration data is not finite: the model overflows on it",
        hint="name other `calibration` data, or set `rounding: nearest`",
    )


def round_on_data(
    model: Streamed,
    names: Sequence[str],
    blocks: Sequence[Sequence[int]],
    grid: Grid,
    take: Callable[[str, Grouped], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Round the linear layers of a model, decoder layer by decoder layer, on what the rounded ones before make of the
    data. One of them is in memory, with the inner products of its inputs.

    Args:
        model: The model; it is not asked again.
        names: The weights.
        blocks: Token ids.
        take: Is given each weight's name and what became of it.
        progress: Called with the layers done and their number.
    """
    modules: dict[str, nn.Linear] = {name: model.model.get_submodule(name.removesuffix(".weight")) for name in names}
    hessians: dict[str, Tensor] = {}
    # These are not measured when the texts come again.
    finished: set[str] = set()

    def revise(inside: str) -> None:
        for name in [name for name in hessians if name.startswith(f"{inside}.")]:
            found = with_feedback(modules[name].weight.detach(), hessians.pop(name), grid)
            modules[name].weight.data.copy_(found.floats())
            finished.add(name)
            progress(len(finished), len(names))
            take(name, found)

    model.revised([name.removesuffix(".weight") for name in names])
    given = [torch.tensor([list(block)], device=model.device) for block in blocks]
    with _summing(modules, hessians, finished):
        for _ in model.walk([partial(_passed, model.model, ids) for ids in given], revise):
            pass


def _passed(model: Any, ids: Tensor) -> None:
    # Logits of a large vocabulary would take longer than a layer, and nobody looks at them.
    few = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    model(input_ids=ids, use_cache=False, **few)


@contextmanager
def _summing(modules: dict[str, nn.Linear], hessians: dict[str, Tensor], finished: set[str]) -> Iterator[None]:
    """Add up the inner products of inputs while it lasts, of each module until it is among the finished ones."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name in finished:
                return
            seen = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            if name not in hessians:
                hessians[name] = torch.zeros(seen.shape[-1], seen.shape[-1])
            hessians[name].add_((seen.T @ seen).cpu())

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
