"""A child process that loads one artifact and answers conversations: JSON lines in, JSON lines out.

Out come ``{"ready": true}``, then one ``{"answer": text}`` or ``{"error": ..., "hint": ...}`` per line in.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO, cast

from luthier.api.artifact import Artifact
from luthier.api.data import Message
from luthier.api.errors import LuthierError
from luthier.api.serving import Sampling
from luthier.registry import default_registry
from luthier.serving.alone import AloneContext
from luthier.serving.generators import open_generator


def serve(artifact: Artifact, variant: str | None, limit: int, lines: TextIO, out: TextIO) -> None:
    """Answer every line until there are no more."""

    def say(**values: Any) -> None:
        out.write(json.dumps(values, ensure_ascii=False) + "\n")
        out.flush()

    registry = default_registry()
    try:
        with open_generator(artifact, registry, AloneContext(registry), variant) as generator:
            say(ready=True)
            for line in lines:
                messages = cast("list[Message]", json.loads(line))
                ((answer,),) = generator.generate([messages], Sampling(max_new_tokens=limit))
                say(answer=answer.text)
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
