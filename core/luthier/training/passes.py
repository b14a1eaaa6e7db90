"""An optimizer step as passes through the model: the objective's loss, penalties, and what is logged of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from luthier.api.errors import ModelError
from luthier.api.training import Objective, Regularizer, TokenBatch, Unit
from luthier.training.batches import Outputs, evaluating, log_probabilities
from luthier.training.encoding import EncodedRow
from luthier.training.layout import Layout

SMALLEST = 1
"""Tokens of the smallest pass: one row, however long it is."""


def units_of(rows: Sequence[EncodedRow], unit: Unit) -> float:
    """How many units of an objective rows have, each counted as its row weighs."""
    if unit == "token":
        return sum(row.weight * row.targets for row in rows)
    if unit == "completion":
        return sum(row.weight * len(row.completions) for row in rows)
    return sum(row.weight for row in rows)


@dataclass(slots=True)
class Limits:
    """How much one pass takes; it changes memory and speed, and nothing else but rounding.

    Attributes:
        tokens: The most tokens, unless one row has more; None: any number.
        rows: The most rows; None: any number.
    """

    tokens: int | None = None
    rows: int | None = None


@dataclass(slots=True)
class Logged:
    """Means of what was computed, over units."""

    _values: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict[str, "list[tuple[float, float]]"](list)
    )

    def add(self, name: str, value: float, units: float) -> None:
        """A mean over so many units."""
        self._values[name].append((value, units))

    def means(self) -> dict[str, float]:
        """By name; what had no unit is not there."""
        totals = {name: sum(units for _, units in values) for name, values in self._values.items()}
        return {
            name: sum(value * units for value, units in self._values[name]) / total
            for name, total in totals.items()
            if total
        }

    def join(self, other: Logged) -> None:
        """Add what another has."""
        for name, values in other._values.items():
            self._values[name] += values

    def clear(self) -> None:
        """Begin anew."""
        self._values.clear()


class Passes:
    """Computes the loss of an optimizer step, in as many passes as memory wants.

    The loss of a step is the mean over all of its units (tokens, completions or pairs), however it is cut; penalties,
    and what the model adds itself, are weighed by each pass's share of the units.

    Args:
        model: The model.
        layout: How rows lie in batches.
        limits: How much one pass takes.
        objective: What is minimised.
        regularizers: What is added to it.
        around: Makes the context that passes are computed in: their precision.

    Attributes:
        fused: Whether the output head is applied to trained positions alone.
        may_save_memory: Whether `save_memory` may be called where memory does not suffice.
        saves_memory: Whether it was.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        limits: Limits,
        objective: Objective[Any],
        regularizers: Sequence[Regularizer[Any]],
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model = model
        self.layout = layout
        self.limits = limits
        self.objective = objective
        self.regularizers = regularizers
        self.around = around
        self.fused = True
        self.may_save_memory = False
        self.saves_memory = False

    def save_memory(self) -> None:
        """Compute activations twice instead of keeping them, from now on."""
        self.saves_memory, self.may_save_memory = True, False
        inside: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        inside.gradient_checkpointing_enable({"use_reentrant": False})

    def batches(self, rows: Sequence[EncodedRow]) -> Iterator[TokenBatch]:
        """The batches of a step."""
        device = next(self.model.parameters()).device
        for group in self.layout.cut(rows, self.limits.tokens, self.limits.rows):
            yield self.layout.batch([rows[place] for place in group]).to(device)

    def step(self, rows: Sequence[EncodedRow], backward: Callable[[Tensor], None]) -> tuple[float, Logged]:
        """Compute a step's loss and its gradients.

        Args:
            rows: The rows of the step.
            backward: Called with each pass's share of the loss.

        Returns:
            The objective's mean loss, and what is logged.
        """
        total = units_of(rows, self.objective.unit)
        logged = Logged()
        mismatch = self._mismatch(rows)
        for batch in self.batches(rows):
            with self.around():
                outputs, losses, weights = self._losses(batch, logged, mismatch)
                added = self._added(batch, outputs, logged)
                loss = (losses if weights is None else losses * weights).sum() / max(total, 1e-9)
                share = (len(losses) if weights is None else float(weights.sum())) / max(total, 1e-9)
                # A pass without a unit has nothing to go back through.
                loss = loss if isinstance(added, float) else loss + share * added
            if loss.requires_grad:
                backward(loss)
        return logged.means().get("loss", 0.0), logged

    def evaluate(self, rows: Sequence[EncodedRow]) -> tuple[float, Logged]:
        """The objective's mean loss of rows that are not trained on, and what is logged."""
        logged = Logged()
        mismatch = self._mismatch(rows)
        with evaluating(self.model), torch.no_grad(), self.around():
            for batch in self.batches(rows):
                self._losses(batch, logged, mismatch)
        return logged.means().get("loss", 0.0), logged

    def _mismatch(self, rows: Sequence[EncodedRow]) -> Tensor | None:
        """What `CompletionBatch.mismatch` says of a step."""
        others = [row.mismatched for row in rows if row.mismatched is not None]
        if not others:
            return None
        ratios: list[Tensor] = []
        with torch.no_grad(), self.around():
            for batch in self.batches(others):
                made = log_probabilities(self.model, batch, fused=self.fused).completions
                assert made.reference_sums is not None, "it is computed together with that of the rows"
                ratios.append(made.sums - made.reference_sums)
        return torch.cat(ratios).mean()

    def _losses(
        self, batch: TokenBatch, logged: Logged, mismatch: Tensor | None
    ) -> tuple[Outputs, Tensor, Tensor | None]:
        unit = self.objective.unit
        outputs = log_probabilities(self.model, batch, fused=self.fused, alike=unit == "token")
        result = self.objective.loss(replace(outputs.completions, mismatch=mismatch))
        units = outputs.completions.count(unit)
        if tuple(result.losses.shape) != (units,):
            raise ModelError(
                f"the objective '{type(self.objective).__name__}' of {type(self.objective).__module__} gave losses "
                f"of the shape {tuple(result.losses.shape)} for {units} {unit}s",
                hint="report this to its author",
            )
        weights = outputs.completions.unit_weights(unit)
        counted = float(units if weights is None else weights.sum())
        if counted:
            logged.add("loss", _mean(result.losses, weights), counted)
            for name, value in result.logs.items():
                logged.add(name, _mean(value, weights if value.ndim else None), counted)
        if len(outputs.likeliest):
            logged.add("token_accuracy", float(outputs.likeliest.float().mean()), len(outputs.likeliest))
        return outputs, result.losses, weights

    def _added(self, batch: TokenBatch, outputs: Outputs, logged: Logged) -> Tensor | float:
        """What is added to the objective's loss: penalties, and what the model asks for itself."""
        total: Tensor | float = 0.0
        if outputs.auxiliary is not None:
            logged.add("auxiliary_loss", float(outputs.auxiliary.detach()), 1)
            total = total + outputs.auxiliary
        for item in self.regularizers:
            penalty = item.penalty(self.model, batch, outputs.completions)
            logged.add("penalty", float(penalty.detach()), 1)
            total = total + penalty
        return total


def _mean(values: Tensor, weights: Tensor | None) -> float:
    values = values.detach().float()
    if weights is None or values.shape != weights.shape:
        return float(values.mean())
    return float((values * weights).sum() / weights.sum())
