"""The kinds of components, one row each.

Fields of configs (`AdapterUse`, ...), conformance checks, scaffolds, ``luthier plugins`` and the generated reference
are derived from this table: a new kind is one row here and one protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

CONFIG = "luthier.api.config:Config"


@dataclass(frozen=True, slots=True)
class KindInfo:
    """One kind of component.

    Attributes:
        name: What descriptors call it.
        protocol: ``module:Class`` of the class that implementations derive from.
        summary: What it is for, in a line.
        required: The members that every implementation has to define itself.
        config: ``module:Class`` that configs derive from.
        light: Whether implementations are also imported outside of the worker, and must not load torch.
        example: ``module:function`` of the conformance check on a small example; empty where each plugin's own tests
            have to show it.
    """

    name: str
    protocol: str
    summary: str
    required: tuple[str, ...]
    config: str = CONFIG
    light: bool = False
    example: str = ""

    @property
    def protocol_class(self) -> type[Any]:
        """The protocol, imported."""
        return imported(self.protocol)

    @property
    def config_base(self) -> type[Any]:
        """The base of its configs, imported."""
        return imported(self.config)

    @property
    def use(self) -> str:
        """The name of the config field's type that chooses such a component, as ``MergeMethodUse``."""
        return f"{''.join(part.title() for part in self.name.split('_'))}Use"


_EXAMPLES = "luthier.testing.behaviour"
_ROWS = (
    KindInfo(
        "stage",
        "luthier.api.stages:Stage",
        "A step of a recipe: takes artifacts in, makes one artifact",
        ("run",),
        config="luthier.api.config:StageConfig",
    ),
    KindInfo(
        "format",
        "luthier.api.data:Format",
        "How a raw row of a source becomes rows of a schema",
        ("schema", "recognises", "parse"),
        light=True,
        example=f"{_EXAMPLES}:check_format",
    ),
    KindInfo(
        "augmenter",
        "luthier.api.data:Augmenter",
        "New rows from rows, or from nothing",
        ("rows",),
        example=f"{_EXAMPLES}:check_augmenter",
    ),
    KindInfo(
        "generator",
        "luthier.api.serving:Generator",
        "Something that answers: a teacher, a judge, a server, a rollout engine",
        ("generate",),
        example=f"{_EXAMPLES}:check_generator",
    ),
    KindInfo(
        "adapter",
        "luthier.api.training:Adapter",
        "A parameter-efficient way to train a model",
        ("wrap",),
        example=f"{_EXAMPLES}:check_adapter",
    ),
    KindInfo(
        "objective",
        "luthier.api.training:Objective",
        "What training minimises: a loss of completions",
        ("unit", "loss"),
        config="luthier.api.tuning:ObjectiveConfig",
        example=f"{_EXAMPLES}:check_objective",
    ),
    KindInfo(
        "regularizer",
        "luthier.api.training:Regularizer",
        "A term added to the training loss",
        ("penalty",),
        example=f"{_EXAMPLES}:check_regularizer",
    ),
    KindInfo(
        "optimizer",
        "luthier.api.training:Optimizer",
        "How weights follow their gradients, and how fast",
        ("make",),
        example=f"{_EXAMPLES}:check_optimizer",
    ),
    KindInfo(
        "reward",
        "luthier.api.training:Reward",
        "A score for a completion, for training from rewards",
        ("score",),
        example=f"{_EXAMPLES}:check_reward",
    ),
    KindInfo(
        "merge_method",
        "luthier.merging.api:MergeMethod",
        "How the tensors of several models become one",
        ("granularity", "merge"),
        config="luthier.merging.api:MergeMethodConfig",
        example=f"{_EXAMPLES}:check_merge_method",
    ),
    KindInfo("quantizer", "luthier.api.serving:Quantizer", "Weights with fewer bits", ("quantize",)),
    KindInfo(
        "exporter",
        "luthier.api.serving:Exporter",
        "A model as files for the program that will serve it",
        ("export", "open"),
    ),
    KindInfo(
        "metric",
        "luthier.api.evaluation:Metric",
        "A number for a model's quality, with a value for each row",
        ("higher_is_better", "needs", "score"),
        config="luthier.api.evaluation:MetricConfig",
        example=f"{_EXAMPLES}:check_metric",
    ),
    KindInfo(
        "tracker",
        "luthier.api.execution:Tracker",
        "Where metrics go while a stage runs",
        ("log",),
        example=f"{_EXAMPLES}:check_tracker",
    ),
    KindInfo(
        "executor",
        "luthier.api.execution:Executor",
        "Where workers run",
        ("slots", "open"),
        light=True,
        example=f"{_EXAMPLES}:check_executor",
    ),
)
KINDS: dict[str, KindInfo] = {row.name: row for row in _ROWS}
"""Every kind by its name."""


@cache
def kind_of_use(name: str) -> str | None:
    """The kind that a type such as ``MergeMethodUse`` chooses; None for other names."""
    return next((row.name for row in _ROWS if row.use == name), None)


def imported(reference: str) -> Any:
    """What ``module:name`` refers to."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
