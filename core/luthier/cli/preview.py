"""``luthier preview``: what a stage would train on, before it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from luthier.cli.reading import planned

if TYPE_CHECKING:
    from rich.text import Text

    from luthier.running.preview import Preview

STOP = "\u23f9"


@click.command("preview", epilog="Example: luthier preview recipe.yaml tuned --rows 5")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("stage")
@click.option("--rows", type=click.IntRange(min=1), default=3, show_default=True, help="How many rows are shown.")
@click.option("--tokens", is_flag=True, help="Show the ids of the tokens.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Replace one value.")
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
@click.option("--json", "as_json", is_flag=True, help="JSON for machines, with the ids of all tokens.")
def preview_command(
    recipe: Path, stage: str, rows: int, tokens: bool, overrides: tuple[str, ...], store: Path | None, as_json: bool
) -> None:
    """Show what a stage trains on, exactly as the trainer sees it: rendered, cut into tokens, and which of them are
    trained. The data is prepared for it; no weights are loaded, and nothing is trained.

    Rows that training would refuse, this refuses too.
    """
    from luthier.cli.display import Display, make_console
    from luthier.running.preview import preview

    made = planned(recipe, store, overrides)
    if as_json:
        found = preview(made, stage, rows)
        click.echo(json.dumps({**found.facts, "warnings": found.warnings, "instead": found.instead}))
        return
    console = make_console()
    with Display(console) as display:
        found = preview(made, stage, rows, [display])
    for line in _counts(found):
        console.print(line)
    for number, completions in enumerate(found.facts["rows"], 1):
        console.print()
        for side, item in enumerate(completions, 1):
            which = f"row {number}" + (f", {side} of {len(completions)}" if len(completions) > 1 else "")
            console.print(_shown(which, item, tokens), soft_wrap=True)


def _counts(found: Preview) -> list[str]:
    """What is told before rows are shown."""
    facts = found.facts
    lines = [
        f"'{name}' is not made yet: tokens are those of '{stand}', from which it will be made"
        for name, stand in found.instead.items()
    ]
    for name, split in facts["splits"].items():
        tokens = sum(source["tokens"] for source in split["sources"])
        lines.append(
            f"{name}: {split['rows']:,} rows of up to {split['longest']:,} tokens (median {split['median']:,}); "
            f"{split['trained'] / max(1, tokens):.0%} of {tokens:,} tokens are trained"
        )
        if len(split["sources"]) > 1:
            whole = max(1, split["trained"])
            lines += [
                f"  {source['stage']}: {source['rows']:,} rows, {source['trained'] / whole:.0%} of what is trained"
                for source in split["sources"]
            ]
    lines.append(f"an epoch: {facts['steps']:,} steps of {facts['batch_size']} rows")
    lines += [f"left out: {count:,} x {reason}" for reason, count in facts["left_out"].items()]
    return [*lines, f"trained: \u27e6so\u27e7, stop tokens: {STOP}"]


def _shown(which: str, item: dict[str, Any], tokens: bool) -> Text:
    """A sequence; what is trained can be told without colours too."""
    from rich.text import Text

    line = Text(f"{which}: ", style="bold")
    if item["documents"]:
        line.append(f"({' + '.join(map(str, item['documents']))} tokens of documents) ", "dim")
    for part in item["parts"]:
        text = " ".join(map(str, part["ids"])) if tokens else part["text"].replace("\n", "\\n")
        if part["trained"]:
            line.append(f"\u27e6{text}\u27e7", "bold magenta" if part["stop"] else "green")
            line.append(STOP if part["stop"] else "", "bold magenta")
        else:
            line.append(f" {text} " if tokens else text, "dim")
    return line
