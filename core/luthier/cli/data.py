"""``luthier data``: looks at datasets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from luthier.api.artifact import Artifact
from luthier.api.errors import StoreError
from luthier.artifacts.store import Store

CUT = 110
"""Characters of an example on a terminal."""


@click.group("data", epilog="Example: luthier data report chats.jsonl")
def data_command() -> None:
    """Look at datasets."""


@data_command.command("report", epilog="Example: luthier data report support/chats --html chats.html")
@click.argument("what")
@click.option("--html", "page_file", type=click.Path(path_type=Path), help="Write a page with charts to this file.")
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
@click.option("--json", "as_json", is_flag=True, help="JSON for machines.")
def report_command(what: str, page_file: Path | None, store: Path | None, as_json: bool) -> None:
    """Show what rows are like and what is odd about them: duplicates, contradictions, refusals, code that does not
    parse, personal data; with the numbers of the rows, and what to do.

    WHAT is a dataset (RECIPE/STAGE, a key or the beginning of one, a folder), or a data file, which is read first.
    """
    from rich.markup import escape

    from luthier.cli.display import make_console
    from luthier.data.examine import examine, plain

    place = Store.at(store)
    console = make_console()
    dataset = _dataset(what, place)
    live = sys.stderr.isatty() and not as_json
    found = examine(dataset, _progress if live else lambda done, total: None)
    if as_json:
        click.echo(json.dumps(plain(found), ensure_ascii=False))
    else:
        console.print(f"[bold]{escape(found.name)}[/]  {escape(found.schema)}, "
                      + ", ".join(f"{count:,} {split}" for split, count in found.rows.items()))  # fmt: skip
        for line in _about(plain(found)):
            console.print(escape(line))
        for finding in found.findings:
            share = f" ({finding.count / finding.of:.1%} of {finding.of:,})" if finding.of else ""
            console.print(f"\n[yellow]{escape(finding.name)}: {finding.count:,}[/]{share}")
            console.print(f"  {escape(finding.advice)}")
            for example in finding.examples[:3]:
                console.print(f"  [dim]{escape(example.place)}[/]  {escape(example.text[:CUT])}", soft_wrap=True)
        if not found.findings:
            console.print("\nnothing odd was found")
    if page_file is not None:
        # Only where a page is written.
        from luthier.reporting.data_page import page

        page_file.parent.mkdir(parents=True, exist_ok=True)
        page_file.write_text(page(found), encoding="utf-8")
        if not as_json:
            click.echo(f"\nwith charts: {page_file}")


def _progress(done: int, total: int) -> None:
    end = "\r" if done < total else "\r\033[K"
    print(f"{done:,} of {total:,} rows", end=end, file=sys.stderr, flush=True)


def _about(found: Any) -> list[str]:
    """Lengths, languages and roles."""
    lines = [
        f"  {name}: median {spread['median']:,.0f}, longest {spread['longest']:,}"
        for name, spread in found["lengths"].items()
    ]
    for name in ("roles", "languages"):
        whole = max(1, sum(found[name].values()))
        some = [f"{item} {count / whole:.0%}" for item, count in list(found[name].items())[:6]]
        lines += [f"  {name}: {', '.join(some)}"] if some else []
    return lines


def _dataset(what: str, store: Store) -> Artifact:
    """The dataset that is meant; a file is read first.

    Raises:
        StoreError: it is something else.
    """
    path = Path(what)
    if path.exists() and not (path / "manifest.json").exists():
        # Only here: reading a file is a run of its own.
        from luthier.cli.do import run_alone

        result = run_alone("data", {"uses": "data", "source": str(path.absolute())}, 0, store)
        error = result.stages["data"].error
        if error is not None:
            raise error
        return result.artifact("data")
    try:
        found = store.resolve(what)
    except StoreError as error:
        if not path.suffix:
            raise
        raise StoreError("there is no such file, and no artifact is called so", where=what, hint=error.hint) from error
    if found.kind != "dataset":
        raise StoreError(f"'{what}' is a {found.kind}, no dataset", hint="name a stage that makes one, or a data file")
    return found
