"""Imports transformers without what only compiling and distributed training need: half of its import.

transformers imports torch's compiler for a few decorators, and torch's distributed tensors for its type checks; with
them come inductor, FSDP and hundreds of modules more that a look at a model on one machine never uses. A short-lived
process that does nothing else goes without them. Who asks more of the compiler's module later gets the real one; an
import of a part of it fails before that, and the look begins again with everything (`luthier_plugins.merge.look`).

This changes what other code in the process sees: never call it where training may follow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
INDEXING = "torch._dynamo._trace_wrapped_higher_order_op"
DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")
"""What tells the compiler something about a function, and is nothing without one."""


def import_transformers() -> ModuleType:
    """The module transformers, with its models' common code."""
    # It would be imported for the losses of object detection alone.
    sys.modules.setdefault("scipy", None)  # type: ignore[arg-type]
    import torch

    if COMPILER not in sys.modules:
        stand_ins = {name: _StandIn(name) for name in (COMPILER, INDEXING)}
        sys.modules.update(stand_ins)
        torch.compiler.disable = torch.compile = _undecorated  # type: ignore[assignment]
        torch.distributed.is_available = lambda: False
    import transformers
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    return transformers


class _StandIn(ModuleType):
    """Stands for a module of the compiler until more is needed of it than decorators."""

    def __getattr__(self, name: str) -> Any:
        if name in DECORATORS:
            return _undecorated
        if name == "TransformGetItemToIndex":
            return lambda: getattr(_real(self.__name__), name)()
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _real(name: str) -> ModuleType:
    """The module itself, in the place of what stands for it."""
    for module in (COMPILER, INDEXING):
        if isinstance(sys.modules.get(module), _StandIn):
            del sys.modules[module]
    return import_module(name)


def _undecorated(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that leaves a function as it is."""
    return function if function is not None else lambda decorated: decorated
