"""The descriptor that a plugin hands over: cheap to import, the heavy code behind a string."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "stage",
    "adapter",
    "regularizer",
    "preference_loss",
    "merge",
    "quantizer",
    "exporter",
    "augmenter",
    "teacher",
    "format",
    "metric",
    "reward",
    "tracker",
    "executor",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """What a plugin provides under a kind and a name.

    Attributes:
        kind: What it is; decides the protocol in `luthier.api` that `impl` follows.
        name: What a recipe says after ``uses:``.
        summary: One line, shown by ``luthier plugins``.
        config: ``"module:Class"`` of a `luthier.api.Config`. The module imports pydantic at most.
        impl: ``"module:Class"`` of the work. The module may import torch; only the worker loads it.
        revision: Raise it when the same config would give another result.
    """

    kind: Kind
    name: str
    summary: str
    config: str
    impl: str
    revision: int = 1
