"""The configs of the objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from luthier.api import Field, ObjectiveConfig, Schema
from pydantic import model_validator


class CrossEntropyConfig(ObjectiveConfig):
    """Nothing to choose."""

    schemas: ClassVar[tuple[Schema, ...]] = ("messages", "text")


DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "robust", "exo", "nca", "sppo", "apo_zero", "apo_down", "discopop", "nll"
]  # fmt: skip
"""The forms of DPO's loss."""
WITH_DIVERGENCES = frozenset({"sigmoid", "hinge", "ipo", "robust", "exo", "discopop", "nll"})
"""Losses that see the difference of two scores alone, which is what another divergence changes."""


class DpoConfig(ObjectiveConfig):
    """Preference optimization against a reference."""

    schemas: ClassVar[tuple[Schema, ...]] = ("preference",)

    loss: DpoLoss | dict[DpoLoss, float] = "sigmoid"
    """The form of the loss, or several with their weights, such as `{sigmoid: 1.0, nll: 0.2}`."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """The assumed share of pairs whose labels are swapped; for `sigmoid`, `robust` and `exo`."""
    length_normalized: bool = False
    """Whether answers are scored by token."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """What holds the model to the reference."""
    divergence_alpha: float = Field(default=0.5, gt=0)
    """The alpha of the divergence `alpha`; towards 0 it becomes `reverse_kl`."""
    discopop_tau: float = Field(default=0.05, gt=0)
    """The temperature of the blend in `discopop`."""

    @model_validator(mode="after")
    def _losses_fit(self) -> DpoConfig:
        if not self.losses:
            raise ValueError("`loss` names none")
        odd = sorted(set(self.losses) - WITH_DIVERGENCES) if self.divergence != "reverse_kl" else []
        if odd:
            raise ValueError(f"the loss {odd[0]} is defined for `divergence: reverse_kl` alone")
        if self.label_smoothing and not {"sigmoid", "robust", "exo"} & set(self.losses):
            raise ValueError(f"the loss {', '.join(self.losses)} has no `label_smoothing`")
        by_itself = sorted(set(self.losses) & {"nca", "sppo", "apo_zero", "apo_down"}) if self.length_normalized else []
        if by_itself:
            raise ValueError(f"the loss {by_itself[0]} compares whole answers with the reference: it has no lengths")
        return self

    @property
    def losses(self) -> Mapping[DpoLoss, float]:
        """The losses and their weights."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else self.loss


class SimpoConfig(ObjectiveConfig):
    """The SimPO loss; the defaults are the paper's for a tuned model."""

    schemas: ClassVar[tuple[Schema, ...]] = ("preference",)

    beta: float = Field(default=2.0, gt=0)
    """The scale of the mean log-probabilities."""
    gamma: float = Field(default=1.0, ge=0)
    """By how much the chosen answer has to be ahead."""


class CpoConfig(ObjectiveConfig):
    """The CPO loss."""

    schemas: ClassVar[tuple[Schema, ...]] = ("preference",)

    beta: float = Field(default=0.1, gt=0)
    """The scale of the log-probabilities."""
    alpha: float = Field(default=1.0, ge=0)
    """The weight of the chosen answers' own loss."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """The assumed share of pairs whose labels are swapped."""


class KtoConfig(ObjectiveConfig):
    """Good and bad answers that are no pairs."""

    schemas: ClassVar[tuple[Schema, ...]] = ("labelled",)

    loss: Literal["kto", "apo_zero"] = "kto"
    """`kto`: against how far the model has moved on the whole; `apo_zero`: against the reference alone."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the reference."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """The weight of good answers; where they are rarer, the paper lets both kinds weigh about the same in all."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """The weight of bad answers."""


class OrpoConfig(ObjectiveConfig):
    """The ORPO loss."""

    schemas: ClassVar[tuple[Schema, ...]] = ("preference",)

    beta: float = Field(default=0.1, gt=0)
    """The weight of the odds ratio beside the loss of the chosen answers (lambda in the paper)."""
