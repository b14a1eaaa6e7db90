"""Rules over rows, as Jinja expressions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


def compiled(rule: str) -> Callable[..., Any]:
    """An expression that can be asked, in Jinja's sandbox.

    Raises:
        ValueError: it is none.
    """
    try:
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        return environment.compile_expression(rule, undefined_to_none=False)
    except TemplateError as error:
        raise ValueError(f"{rule!r} is not an expression: {error}") from error
