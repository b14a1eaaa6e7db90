"""The output head on trained positions alone: log-probabilities, without ever holding all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TILE = 1 << 24
"""Logits that are held at a time: 64 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """What a model does to the products of its head: logits = softcap * tanh(scale * (W h + b) / softcap).

    Attributes:
        scale: What the products are multiplied by.
        softcap: What the logits are kept below (Gemma 2, arXiv:2408.00118); None where they are not.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Scaling:
        """That of a transformers config. Models that do anything else are recognized by their log-probabilities, see
        `luthier.training.proof`."""
        text = config.get_text_config()
        scale = next(
            (
                value
                for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
                if (value := _of(text, name))
            ),
            None,
        )
        if scale is None and (divisor := _of(text, "logits_scaling")):
            # HyperCLOVA X multiplies by what Granite and MiniCPM divide by.
            scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
        return cls(1.0 if scale is None else scale, _of(text, "final_logit_softcapping"))

    def apply(self, products: Tensor) -> Tensor:
        """The logits."""
        scaled = products if self.scale == 1 else products * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def _of(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and value else None


def is_plain(head: Any) -> bool:
    """Whether an output head is no more than its weight and bias: one with an adapter, a trained copy, or quantized
    weights is."""
    odd = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return (
        isinstance(head, nn.Linear)
        and not isinstance(head, odd)
        and head.weight.is_floating_point()
        and head.weight.ndim == 2
    )


def target_log_probabilities(
    head: nn.Module, hidden: Tensor, targets: Tensor, scaling: Scaling, *, alike: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets, in nats, tile by tile.

    Args:
        head: The output head.
        hidden: What it is applied to, shape (targets, features).
        targets: Token ids, shape (targets,).
        scaling: What the model does to its products.
        alike: Whether every target will weigh the same in the loss, as in the cross-entropy: gradients of a head that
            is trained are made in the forward pass then.

    Returns:
        log p of each target, float32, and whether it was the likeliest token, both of shape (targets,).
    """
    if is_plain(head):
        weight, bias = cast("Tensor", head.weight), cast("Tensor | None", getattr(head, "bias", None))
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return cast("Any", _Tiled.apply)(hidden, weight, bias, targets, scaling, alike)
    rows = _rows(_vocabulary(head))
    parts = [
        cast("Any", checkpoint)(_through, head, some, wanted, scaling, use_reentrant=False)
        for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat([logps for logps, _ in parts]), torch.cat([best for _, best in parts])


def _through(head: nn.Module, hidden: Tensor, targets: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    logits = scaling.apply(head(hidden)).float()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], logits.argmax(-1) == targets


def _vocabulary(head: nn.Module) -> int:
    return int(cast("Any", head).out_features if hasattr(head, "out_features") else cast("Any", head).weight.shape[0])


def _rows(vocabulary: int) -> int:
    """How many positions a tile has."""
    return max(1, TILE // vocabulary)


class _Tiled(torch.autograd.Function):
    """log p of targets under softmax(logits), the logits being those of `Scaling`.

    The gradient of one log p by its hidden state is (onehot - p) J W with J the scaling's slope: it needs nothing of
    what comes after, so it is made while the tile's logits are at hand, and the backward pass only multiplies. That of
    the weight adds up over positions, each weighed by what comes after; where all weigh the same it is made at once
    too, else its logits are made anew.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scaling: Scaling, alike: bool
    ) -> tuple[Tensor, Tensor]:
        rows = _rows(len(weight))
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        best = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        by_hidden = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        trains = ctx.needs_input_grad[1] or (bias is not None and ctx.needs_input_grad[2])
        sums = _Sums.like(weight, bias) if trains and alike else None
        for start in range(0, len(hidden), rows):
            place = slice(start, start + rows)
            slopes, logps[place], best[place] = _tile(hidden[place], weight, bias, targets[place], scaling)
            if by_hidden is not None or sums is not None:
                slopes = slopes.to(weight.dtype)
            if by_hidden is not None:
                by_hidden[place] = slopes @ weight
            if sums is not None:
                sums.add(slopes, hidden[place])
        ctx.scaling, ctx.sums = scaling, sums
        ctx.save_for_backward(hidden, weight, bias, targets, by_hidden)
        ctx.mark_non_differentiable(best)
        return logps, best

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        above: Tensor = grads[0]
        hidden, weight, bias, targets, by_hidden = ctx.saved_tensors
        to_hidden = None if by_hidden is None else (above[:, None] * by_hidden).to(hidden.dtype)
        if not ctx.needs_input_grad[1] and not (bias is not None and ctx.needs_input_grad[2]):
            return to_hidden, None, None, None, None, None
        if ctx.sums is not None and len(above) and bool((above == above[0]).all()):
            sums = ctx.sums.times(above[0])
        else:
            sums = _Sums.like(weight, bias)
            rows = _rows(len(weight))
            for start in range(0, len(hidden), rows):
                place = slice(start, start + rows)
                slopes = _tile(hidden[place], weight, bias, targets[place], ctx.scaling)[0]
                sums.add((slopes * above[place, None]).to(weight.dtype), hidden[place])
        to_weight = sums.weight.to(weight.dtype)
        return to_hidden, to_weight, None if bias is None else sums.bias.to(bias.dtype), None, None, None


@dataclass(slots=True)
class _Sums:
    """The gradients of a weight and a bias, as they add up, float32."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def like(cls, weight: Tensor, bias: Tensor | None) -> _Sums:
        """None yet."""
        zeros = torch.zeros(len(weight) if bias is not None else 0, dtype=torch.float32, device=weight.device)
        return cls(torch.zeros_like(weight, dtype=torch.float32), zeros)

    def add(self, slopes: Tensor, hidden: Tensor) -> None:
        """Add a tile's: slopes by its logits, shape (positions, vocabulary)."""
        if slopes.dtype == torch.float32:
            self.weight.addmm_(slopes.T, hidden)
        else:
            self.weight += slopes.T @ hidden
        if len(self.bias):
            self.bias += slopes.sum(0, dtype=torch.float32)

    def times(self, factor: Tensor) -> _Sums:
        """Those of a loss in which each log-probability weighs so much; these are used up."""
        return _Sums(self.weight.mul_(factor), self.bias.mul_(factor))


def _tile(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scaling: Scaling
) -> tuple[Tensor, Tensor, Tensor]:
    """For one tile: d log p / d (W h + b), shape (positions, vocabulary); log p; whether the target was likeliest."""
    products = torch.nn.functional.linear(hidden, weight, bias)
    # In place wherever it can be: a tile's time goes into moving it to and from memory.
    logits = products.float()
    if scaling.scale != 1:
        logits.mul_(scaling.scale)
    tanh: Tensor | None = None
    if scaling.softcap is not None:
        tanh = logits.div_(scaling.softcap).tanh_()
        logits = tanh * scaling.softcap
    wanted = targets[:, None]
    largest = logits.amax(1, keepdim=True)
    shifted = logits.sub_(largest)
    logps = shifted.gather(1, wanted)
    likeliest = (logps == 0)[:, 0]
    slopes = shifted.exp_()
    total = slopes.sum(1, keepdim=True)
    logps = (logps - total.log())[:, 0]
    slopes.div_(-total)
    slopes.scatter_add_(1, wanted, torch.ones_like(total))
    if tanh is not None:
        slopes.mul_(1 - tanh * tanh)
    if scaling.scale != 1:
        slopes.mul_(scaling.scale)
    return slopes, logps, likeliest
