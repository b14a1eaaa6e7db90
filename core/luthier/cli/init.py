"""``luthier init``: a starter recipe for a data file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import click

from luthier.api.errors import DataError

HEAD = """\
# Made by `luthier init`. Change what you like; `luthier plan {name}.yaml` says what a change reruns.
luthier: 1
name: {name}
seed: 7

stages:
  base:
    uses: base
    source: {base}
  data:
    uses: data
    source: {data}
    split: {{test: {share}}}
"""
TUNED = """\
  tuned:
    uses: sft
    model: base
    data: data
    adapter: {uses: lora, r: 16}     # leave it out to tune all weights
    epochs: 3
    learning_rate: 2e-4
  quality:
    uses: evaluate
    model: tuned
    against: base
    data: data
    metrics: [perplexity, exact_match]
"""
PREFERRED = """\
  tuned:
    uses: dpo
    model: base
    data: data
    beta: 0.1
    learning_rate: 5e-6
"""
TEXT = """\
  tuned:
    uses: pretrain
    model: base
    data: [data]
    learning_rate: 1e-4
"""
EXPORT = """\
  file:
    uses: export
    model: tuned
    format: {uses: gguf, types: [Q8_0, Q4_K_M]}
"""


@click.command("init", epilog="Example: luthier init chats.jsonl --base hf:meta-llama/Llama-3.2-1B-Instruct")
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--base", default="embedded:nano-base", show_default=True, help="A model folder or hub id to start from.")
@click.option("--out", type=click.Path(path_type=Path), help="The recipe's file; by default DATA's name with .yaml.")
def init_command(data: Path, base: str, out: Path | None) -> None:
    """Write a recipe that tunes, measures and exports a model on your data file."""
    out = out or Path(f"{data.stem}.yaml")
    if out.exists():
        raise click.BadParameter(f"'{out}' exists already", param_hint="--out")
    form, count = _look(data)
    body = {"messages": TUNED, "preference": PREFERRED, "text": TEXT}[form]
    if count < 2:
        raise DataError("has only one row", where=str(data), hint="a test split needs a second one")
    where = data if data.is_absolute() else Path(os.path.relpath(data, out.parent))
    if Path(base).is_dir() and not Path(base).is_absolute():
        base = os.path.relpath(base, out.parent)
        base = base if base.startswith(".") else f"./{base}"
    name = re.sub(r"[^A-Za-z0-9_-]", "-", out.stem)
    name = name if name[:1].isascii() and name[:1].isalpha() else f"recipe-{name}"
    share = 0.1 if count >= 20 else 0.3
    # JSON's quotes are YAML's too: a path may hold anything.
    head = HEAD.format(name=name, base=_quoted(base), data=_quoted(str(where)), share=share)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(head + body + EXPORT, encoding="utf-8")
    click.echo(f"{out}: {count} rows of the schema '{form}'")
    click.echo(f"next: luthier plan {out}\n      luthier run {out}\n      luthier chat {name}/tuned")


def _quoted(text: str) -> str:
    """A text as YAML, in quotes only where it needs them."""
    return text if re.fullmatch(r"[A-Za-z0-9_./:-]*[A-Za-z0-9_./-]", text) else json.dumps(text, ensure_ascii=False)


def _look(data: Path) -> tuple[str, int]:
    """The format of a data file, judged by its first row, and its number of rows."""
    try:
        text = data.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8 text", where=str(data), hint="save the file as UTF-8") from error
    if data.suffix == ".txt":
        return "text", sum(1 for block in text.split("\n\n") if block.strip())
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError("has no rows", where=str(data))
    try:
        row: Any = json.loads(lines[0])
    except ValueError as error:
        raise DataError(f"is not valid JSON ({error})", where=f"{data}:1", hint="one JSON object per line") from error
    keys = {"messages": ("messages",), "preference": ("prompt", "chosen", "rejected"), "text": ("text",)}
    for form, needed in keys.items():
        if isinstance(row, dict) and all(key in row for key in needed):
            return form, len(lines)
    raise DataError(
        "its rows match no known format",
        where=f"{data}:1",
        hint="a row has `messages`; or `prompt`, `chosen` and `rejected`; or `text`",
    )
