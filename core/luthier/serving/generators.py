"""What answers for an artifact: a model in transformers, an export in its program."""

from __future__ import annotations

import tempfile
from collections.abc import Generator as Yields
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from luthier.api.artifact import Artifact
from luthier.api.context import Context
from luthier.api.errors import ModelError
from luthier.api.serving import Exporter, Generator
from luthier.registry import Registry


@contextmanager
def open_generator(
    artifact: Artifact, registry: Registry, context: Context, variant: str | None = None
) -> Yields[Generator[Any]]:
    """Something that answers: the model itself, or the program that an export is made for.

    Raises:
        ModelError: the artifact is not a model, adapter or export, or it has no variants.
    """
    if variant and artifact.kind != "export":
        raise ModelError(f"there is no variant {variant}: a {artifact.kind} has none", hint="leave it out")
    if artifact.kind == "export":
        # An export's key has its exporter and the revision already.
        exporter = cast("Exporter[Any]", registry.build(registry.use("exporter", artifact.facts["format"]), context))
        with exporter.open(artifact, variant) as program:
            yield program
    elif artifact.kind in ("model", "adapter"):
        # Only where a model is loaded, torch is.
        generate: Any = import_module("luthier.modeling.generate")
        with tempfile.TemporaryDirectory() as scratch:

            def progress(done: int, total: int) -> None:
                # How far all is, who asks knows; here, only whether the user wants to stop is.
                if context.stopping():
                    context.progress(done, total, "answers")

            with generate.TransformersGenerator(
                artifact, Path(scratch) / "floats", progress, date=context.date
            ) as program:
                yield program
    else:
        raise ModelError(f"a {artifact.kind} cannot be used for chat", hint="name a model, an adapter or an export")
