"""``luthier verify``: whether a running server says what the model said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from luthier.api.errors import GateError, ModelError
from luthier.artifacts.store import Store
from luthier.serving.golden import ServerError, Verdict, problem_of, verify

EXAMPLE = "Example: luthier verify http://127.0.0.1:8080 quickstart/gguf"


@click.command("verify", epilog=EXAMPLE)
@click.argument("url")
@click.argument("golden")
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
def verify_command(url: str, golden: str, store: Path | None) -> None:
    """Ask a running OpenAI-compatible server at URL what a golden file has, and compare tokens and answers.

    GOLDEN is such a file, or an export that has one: RECIPE/STAGE, a key or the beginning of one, or a folder.
    Ends with exit code 3 when they differ.
    """
    file = Path(golden)
    if not file.is_file():
        file = Store.at(store).resolve(golden).path / "serve" / "golden.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        least, _ = float(content["least"]), content["entries"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"is not a golden file ({error})", where=str(file), hint="an export with `serve:` writes one"
        ) from error
    verdicts: list[Verdict] = []
    try:
        for verdict in verify(url, content):
            verdicts.append(verdict)
            click.echo(f"{'same ' if verdict.same_answer else 'other'}  {verdict.question!r} -> {verdict.answer!r}")
            if not verdict.same_answer:
                click.echo(f"       expected {verdict.expected!r}")
    except ServerError as error:
        raise ModelError(str(error), hint="is the server running at this address?") from error
    problem = problem_of(verdicts, least)
    if problem:
        raise GateError(problem, where=url)
    same = sum(verdict.same_answer for verdict in verdicts)
    counted = all(verdict.tokens is not None for verdict in verdicts)
    prompts = (
        "all prompts have the expected number of tokens" if counted else "it does not report the prompts' token counts"
    )
    click.echo(f"{same} of {len(verdicts)} answers are the same; {prompts}")
