"""The descriptor that a plugin provides: cheap to import, the heavy code named by a string."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from luthier.api.config import Config
    from luthier.api.context import Context

Kind = str
"""A key of the table `luthier.api.kinds.KINDS`."""
C = TypeVar("C", bound="Config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """What a plugin provides under a kind and a name.

    Attributes:
        kind: What it is; decides the protocol that `impl` follows, see `luthier.api.kinds.KINDS`.
        name: What a recipe says after ``uses:``.
        summary: One line, shown by ``luthier plugins``.
        config: ``"module:Class"`` of a `luthier.api.Config`. The module imports pydantic at most.
        impl: ``"module:Class"`` of the work. The module may import torch; only the worker loads it.
        revision: Raise it when the same config would give another result: it is part of keys, so artifacts that were
            made before are made again.
    """

    kind: Kind
    name: str
    summary: str
    config: str
    impl: str
    revision: int = 1


class Implementation(Generic[C]):
    """What every component's `impl` class has in common: it is made from its config and a context.

    The protocols of all kinds derive from it, and implementations derive from the protocol of their kind: that brings
    them the defaults of its optional members.

    Attributes:
        config: The component's validated config.
        context: The way to artifacts, files, sub-components, the seed and the log.
    """

    def __init__(self, config: C, context: Context) -> None:
        self.config = config
        self.context = context
