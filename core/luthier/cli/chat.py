"""``luthier chat``: talk with a model, an adapter or an exported file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import click

from luthier.api.artifact import Artifact
from luthier.api.errors import ModelError
from luthier.artifacts.store import Store
from luthier.running.slots import QUIET
from luthier.serving.golden import ServerError, model_of, streamed

Turns = list[dict[str, str]]
Answer = Callable[[Turns], Iterator[str]]
"""Gives the pieces of an answer to a conversation."""


@click.command("chat", epilog='Example: luthier chat support/tuned --ask "How do I reset it?"')
@click.argument("artifact")
@click.option("--ask", multiple=True, metavar="TEXT", help="Ask this, print the answer, and exit; may be repeated.")
@click.option("--system", help="A system message before the conversation.")
@click.option("--variant", default="", help="Which file of an export, such as Q4_K_M; by default its last.")
@click.option(
    "--max-new-tokens",
    "limit",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="The maximum number of tokens in an answer.",
)
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
def chat_command(
    artifact: str, ask: tuple[str, ...], system: str | None, variant: str, limit: int, store: Path | None
) -> None:
    """Chat with a model, an adapter, or an export in the program it is made for.

    ARTIFACT is RECIPE/STAGE, a key or the beginning of one, a folder, or the address of a running server such as
    http://127.0.0.1:8080, whose answers are shown as they come. Answers are greedy. An empty line ends.
    """
    start: Turns = [{"role": "system", "content": system}] if system else []
    if artifact.startswith(("http://", "https://")):
        _exchange(start, ask, partial(_over_http, artifact, limit))
        return
    found = Store.at(store).resolve(artifact)
    if variant and found.kind != "export":
        raise click.BadParameter(f"this is a {found.kind}, which has no variants", param_hint="--variant")
    with _talking(found, variant, limit) as answer:
        _exchange(start, ask, lambda turns: iter([answer(turns)]))


def _exchange(start: Turns, ask: tuple[str, ...], answer: Answer) -> None:
    """Ask what was given on the command line, or what is typed."""
    for text in ask:
        click.echo(f"> {text}")
        _shown(answer([*start, {"role": "user", "content": text}]))
    if not ask:
        _converse(start, answer)


def _shown(pieces: Iterator[str]) -> str:
    """Print an answer as it comes."""
    found: list[str] = []
    for piece in pieces:
        found.append(piece)
        click.echo(piece, nl=False)
    click.echo()
    return "".join(found)


def _over_http(url: str, limit: int, turns: Turns) -> Iterator[str]:
    try:
        yield from streamed(url, turns, limit, model_of(url))
    except ServerError as error:
        raise ModelError(str(error), hint="is the server running at this address?") from error


def _converse(turns: Turns, answer: Answer) -> None:
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
        reply = _shown(answer(turns))
        turns = [*turns, {"role": "assistant", "content": reply}]


@contextmanager
def _talking(artifact: Artifact, variant: str, limit: int) -> Generator[Any]:
    command = [sys.executable, "-m", "luthier.serving.talk", str(artifact.path), variant, str(limit)]
    environment = {**QUIET, **os.environ}
    # A file, because a library that writes much would block on a pipe without a reader.
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
