"""``luthier chat``: talk with a model, an adapter or an exported file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click

from luthier.api.artifact import Artifact
from luthier.api.errors import ModelError
from luthier.artifacts.store import Store
from luthier.running.process import QUIET

Turns = list[dict[str, str]]


@click.command("chat", epilog='Example: luthier chat support/tuned --ask "How do I reset it?"')
@click.argument("artifact")
@click.option("--ask", multiple=True, metavar="TEXT", help="Ask this, print the answer, and end; may be repeated.")
@click.option("--system", help="A system message in front of the conversation.")
@click.option("--variant", default="", help="Which file of an export, such as Q4_K_M; by default its last.")
@click.option(
    "--max-new-tokens",
    "limit",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="The most tokens of an answer.",
)
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
def chat_command(
    artifact: str, ask: tuple[str, ...], system: str | None, variant: str, limit: int, store: Path | None
) -> None:
    """Talk with a model, an adapter, or an export in the program it is made for.

    ARTIFACT is RECIPE/STAGE, a key or the beginning of one, or a folder. Answers are greedy. An empty line ends.
    """
    found = Store.at(store).resolve(artifact)
    if variant and found.kind != "export":
        raise click.BadParameter(f"this is a {found.kind}, which has no variants", param_hint="--variant")
    start: Turns = [{"role": "system", "content": system}] if system else []
    with _talking(found, variant, limit) as answer:
        for text in ask:
            click.echo(f"> {text}")
            click.echo(answer([*start, {"role": "user", "content": text}]))
        if not ask:
            _converse(start, answer)


def _converse(turns: Turns, answer: Any) -> None:
    while True:
        try:
            text = click.prompt(">", prompt_suffix=" ", default="", show_default=False)
        except click.Abort:
            # The end of piped input is the end of the talk; Ctrl-C is still an interrupt.
            if sys.stdin.isatty():
                raise
            return
        if not text:
            return
        turns = [*turns, {"role": "user", "content": text}]
        reply = answer(turns)
        click.echo(reply)
        turns = [*turns, {"role": "assistant", "content": reply}]


@contextmanager
def _talking(artifact: Artifact, variant: str, limit: int) -> Generator[Any]:
    command = [sys.executable, "-m", "luthier.running.talk", str(artifact.path), variant, str(limit)]
    environment = {**QUIET, **os.environ}
    # A file, because a pipe that nobody reads would stop a library that has much to say.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process,
    ):
        assert process.stdin is not None
        _receive(process, log)

        def answer(turns: Turns) -> str:
            assert process.stdin is not None
            process.stdin.write(json.dumps(turns) + "\n")
            process.stdin.flush()
            return str(_receive(process, log)["answer"])

        yield answer
        process.stdin.close()


def _receive(process: subprocess.Popen[str], log: IO[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        log.seek(0)
        last = log.read().strip().rpartition("\n")[2]
        raise ModelError(f"the process that holds the model ended: {last}")
    found: dict[str, Any] = json.loads(line)
    if "error" in found:
        raise ModelError(found["error"])
    return found
