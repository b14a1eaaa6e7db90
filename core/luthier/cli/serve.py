"""``luthier serve``: try a model out with any client."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from luthier.artifacts.store import Store
from luthier.running.slots import QUIET

EXAMPLE = "Example: luthier serve quickstart/gguf --variant Q4_K_M --port 8080"


@click.command("serve", epilog=EXAMPLE)
@click.argument("artifact")
@click.option("--variant", default="", help="Which file of an export, such as Q4_K_M; by default its last.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 picks a free one.")
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
def serve_command(artifact: str, variant: str, port: int, store: Path | None) -> None:
    """Serve a model, an adapter or an export on 127.0.0.1 as OpenAI's chat completions.

    ARTIFACT is RECIPE/STAGE, a key or the beginning of one, or a folder. A GGUF is served by llama.cpp, a model by
    transformers. It is for trying out: one answer at a time, without authentication.
    """
    found = Store.at(store).resolve(artifact)
    command = [sys.executable, "-m", "luthier.serving.serve", str(found.path), variant, str(port)]
    # In place of this process: ending it ends the server.
    os.execve(sys.executable, command, {**QUIET, **os.environ})
