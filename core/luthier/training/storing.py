"""What trained weights are stored in: so that what is stored is what was trained."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from luthier.api.errors import ModelError

SURVIVES = 0.95
"""The share of a change that has to outlast rounding, where nobody forces a dtype."""
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIECE = 1 << 22
"""Values that are looked at together: whole embeddings in float64 would take more memory than training does."""
BITS: dict[torch.dtype, torch.dtype] = {torch.bfloat16: torch.int16, torch.float16: torch.int16}


@dataclass(slots=True)
class Survival:
    """How much of a change of weights outlasts their rounding to a dtype.

    A change d that rounding makes to d' survives by <d', d> / <d, d>: to first order, the share of what the change did
    to the loss. What rounding adds beside it is noise.
    """

    kept: float = 0.0
    change: float = 0.0
    size: float = 0.0

    def add(self, before: Tensor, after: Tensor, rounded: Tensor) -> None:
        """Take one tensor: as it was, as it was trained, and as it would be stored."""
        for was, new, near in zip(*(pieces(item) for item in (before, after, rounded)), strict=True):
            change = new.double() - was.double()
            self.kept += float(((near.double() - was.double()) * change).sum())
            self.change += float((change * change).sum())
            self.size += float((was.double() ** 2).sum())

    @property
    def norms(self) -> dict[str, float]:
        """The norm of the change, and of what was changed."""
        return {"change": math.sqrt(self.change), "before": math.sqrt(self.size)}

    @property
    def share(self) -> float:
        """1 where all of the change is kept, or where there was none."""
        return self.kept / self.change if self.change else 1.0


def pieces(value: Tensor) -> Sequence[Tensor]:
    """A tensor's values, some at a time."""
    return value.reshape(-1).split(PIECE)


def rounded(value: Tensor, dtype: torch.dtype, draws: torch.Generator | None = None) -> Tensor:
    """A tensor in a dtype of fewer bits.

    Args:
        value: float32.
        dtype: bfloat16, float16 or float32.
        draws: Round up or down at random, so that the mean is the value; None: to the nearest.
    """
    near = value.to(dtype)
    if draws is None or dtype not in BITS:
        return near
    error = value - near.to(value.dtype)
    # Neighbours of a float are the neighbours of its bits, read as a number: away from zero is one more.
    bits = near.view(BITS[dtype])
    away = (error > 0) == (near >= 0)
    step = torch.where(away, torch.ones_like(bits), -torch.ones_like(bits))
    other = (bits + step).view(dtype)
    # From zero, one less would be NaN: the neighbour below zero is the smallest negative number.
    smallest = torch.full_like(bits, 1).view(dtype)
    other = torch.where(near == 0, torch.where(error > 0, smallest, -smallest), other)
    gap = (other.to(value.dtype) - near.to(value.dtype)).abs()
    chance = torch.where(gap > 0, error.abs() / gap, torch.zeros_like(gap))
    drawn = torch.rand(value.shape, generator=draws)
    moved = (drawn < chance.cpu()).to(value.device) & torch.isfinite(other)
    return torch.where(moved, other, near)


def trained(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters that are trained, by their names."""
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def check_finite_weights(model: Any, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
    """Refuse to store what is not a number.

    Args:
        model: The model; only what is trained is looked at.
        dtypes: What each parameter is stored in, whose range may be smaller.

    Raises:
        ModelError: names the first tensor.
    """
    for name, parameter in trained(model):
        value = parameter.detach()
        dtype = value.dtype if dtypes is None else dtypes[name]
        bad = sum(int((~torch.isfinite(piece.to(dtype))).sum()) for piece in pieces(value))
        if bad:
            beyond = bool(torch.isfinite(value).all())
            raise ModelError(
                f"{bad} of {value.numel()} values of {name} are not finite"
                + (f" in {str(dtype).removeprefix('torch.')}" if beyond else ""),
                hint="store it in a dtype with a larger range: `save_dtype: fp32`"
                if beyond
                else "lower the `learning_rate`",
            )


@dataclass(frozen=True, slots=True)
class Storage:
    """A decision.

    Attributes:
        dtypes: What each trained parameter is stored in, by its name.
        dtype: What most of them are stored in.
        receipt: What the manifest says of it.
    """

    dtypes: Mapping[str, torch.dtype]
    dtype: torch.dtype
    receipt: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rounding:
    """How weights are rounded to fewer bits.

    Attributes:
        how: To the nearest, or at random so that the mean is right.
        seed: Of what is drawn.
    """

    how: Literal["nearest", "stochastic"]
    seed: int

    def __call__(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """One tensor, float32 on the CPU; the same each time it is asked for."""
        if self.how == "nearest":
            return rounded(value, dtype)
        return rounded(value, dtype, torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode())))


def storage_of(
    model: Any,
    before: Iterable[tuple[str, Tensor]],
    natural: Mapping[str, torch.dtype],
    usual: torch.dtype,
    wanted: Literal["auto", "fp32", "bf16", "fp16"],
    rounding: Rounding,
) -> Storage:
    """Decide on dtypes, and round the trained weights to them, in place.

    Args:
        model: The trained model.
        before: What was trained as it was before, float32, by the same names.
        natural: The dtypes that parameters came in, by their names, ...
        usual: ... and that of those of other names.
        wanted: What the recipe says.
        rounding: How to round.

    Raises:
        ModelError: a weight is not finite, or not in its dtype.
    """
    check_finite_weights(model)
    parameters = dict(trained(model))
    whole = dict.fromkeys(parameters, torch.float32)
    if wanted == "auto":
        dtypes, dtype = {name: natural.get(name, usual) for name in parameters}, usual
    else:
        dtype = DTYPES[wanted]
        dtypes = dict.fromkeys(parameters, dtype)
    survival = Survival()
    for name, value in before:
        if name in parameters:
            after = parameters[name].detach().cpu().float()
            stored = after if dtypes[name] == torch.float32 else rounding(name, after, dtypes[name])
            survival.add(value.cpu().float(), after, stored)
    norms = survival.norms
    if set(dtypes.values()) == {torch.float32}:
        return Storage(whole, torch.float32, {"dtype": "float32", "survived": 1.0, "norms": norms})
    receipt = {
        "dtype": str(dtype).removeprefix("torch."),
        "survived": survival.share,
        "rounding": rounding.how,
        "norms": norms,
    }
    # It is infinite, or no number, where a value is beyond the dtype's range.
    if wanted == "auto" and not SURVIVES <= survival.share < math.inf:
        told = {name: value for name, value in receipt.items() if name != "norms"}
        told["survived"] = survival.share if math.isfinite(survival.share) else 0.0
        kept = {"dtype": "float32", "survived": 1.0, "instead_of": told, "norms": norms}
        return Storage(whole, torch.float32, kept)
    check_finite_weights(model, dtypes)
    for name, parameter in parameters.items():
        value = parameter.detach()
        parameter.data = rounding(name, value.cpu().float(), dtypes[name]).to(parameter)
    return Storage(dtypes, dtype, receipt)
