"""A child process that loads one artifact and answers conversations: JSON lines in, JSON lines out.

Out come ``{"ready": true}``, then one ``{"answer": text}`` or ``{"error": ..., "hint": ...}`` per line in.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO, cast

from luthier.api.artifact import Artifact
from luthier.api.errors import LuthierError, ModelError
from luthier.api.protocols import Exporter, Message, Teacher
from luthier.registry import default_registry


class _Model:
    """A model or adapter as a `Teacher`, answering greedily."""

    def __init__(self, artifact: Artifact, limit: int) -> None:
        # Only this child process loads torch.
        self._generate: Any = import_module("luthier.modeling.generate")
        self._text: Any = import_module("luthier.modeling.text")
        loading: Any = import_module("luthier.modeling.loading")
        self._tokenizer: Any = loading.load_tokenizer(artifact)
        self._model: Any = loading.to_best_device(loading.load_model(artifact))
        self._stops: list[int] = artifact.facts["stop_token_ids"]
        self._limit = limit

    def answer(self, prompts: Any) -> Iterator[str]:
        """One answer per conversation."""
        ids = [self._text.encode_prompt(self._tokenizer, messages) for messages in prompts]
        yield from self._generate.greedy_answers(self._model, self._tokenizer, ids, self._stops, self._limit)


@contextmanager
def teacher_of(artifact: Artifact, variant: str | None, limit: int) -> Generator[Teacher]:
    """Something that answers: the model itself, or the program that an export is made for.

    Raises:
        ModelError: the artifact is no model, adapter or export.
    """
    if artifact.kind == "export":
        registry = default_registry()
        component = registry.get("exporter", artifact.facts["format"])
        config = registry.config_class(component).model_validate({}, context={"components": registry})
        exporter = cast("Exporter", registry.impl_class(component)(config))
        with exporter.serve(artifact, variant, limit) as program:
            yield program
    elif artifact.kind in ("model", "adapter"):
        yield _Model(artifact, limit)
    else:
        raise ModelError(f"a {artifact.kind} cannot be talked to", hint="name a model, an adapter or an export")


def serve(artifact: Artifact, variant: str | None, limit: int, lines: TextIO, out: TextIO) -> None:
    """Answer every line until there are no more."""

    def say(**values: Any) -> None:
        out.write(json.dumps(values, ensure_ascii=False) + "\n")
        out.flush()

    try:
        with teacher_of(artifact, variant, limit) as teacher:
            say(ready=True)
            for line in lines:
                messages = cast("list[Message]", json.loads(line))
                say(answer=next(iter(teacher.answer([messages]))))
    except LuthierError as error:
        say(error=str(error))


def main() -> None:
    """Entry point of ``python -m luthier.serving.talk FOLDER VARIANT LIMIT``."""
    folder, variant, limit = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What libraries print must not get between the answers.
    os.dup2(2, 1)
    serve(Artifact.load(Path(folder)), variant or None, int(limit), sys.stdin, out)


if __name__ == "__main__":
    main()
