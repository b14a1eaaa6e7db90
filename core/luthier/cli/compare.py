"""``luthier compare``: people judge two models' answers, without knowing whose they are."""

from __future__ import annotations

import os
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import click

from luthier.api.errors import DataError
from luthier.artifacts.store import Store
from luthier.reporting.verdicts import Comparison, comparison_of, outcome, read_verdicts, told
from luthier.serving.http_body import BodyError, read_body

EXAMPLE = "Example: luthier compare support/quality --rows 40"


@click.command("compare", epilog=EXAMPLE)
@click.argument("report")
@click.option("--against", type=click.IntRange(min=1), default=1, show_default=True, help="Which of the others.")
@click.option("--rows", type=click.IntRange(min=1), help="How many pairs; by default all that differ.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws their order and sides.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write a page to send, instead of serving it.")
@click.option("--judge", default="", help="Who judges.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="The page's port; by default a free one.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("verdicts"), help="Where verdicts are kept.")
@click.option(
    "--verdicts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file of verdicts to count.",
)
@click.option("--store", type=click.Path(path_type=Path), help="The store; by default ./.luthier.")
def compare_command(
    report: str,
    against: int,
    rows: int | None,
    seed: int,
    output: Path | None,
    judge: str,
    port: int,
    folder: Path,
    verdicts: tuple[Path, ...],
    store: Path | None,
) -> None:
    """Have people judge the answers of two models, side by side, without knowing whose they are.

    REPORT is what a stage `evaluate` with `against` made: RECIPE/STAGE, or a key. The page is served on 127.0.0.1, and
    each verdict is kept at once in a file; with -o it is one file to send to somebody, who sends verdicts back. With
    --verdicts (several times for several judges), say what came of it.
    """
    found = comparison_of(Store.at(store).resolve(report), against, seed, rows)
    if verdicts:
        judged = [read_verdicts(path.read_text(encoding="utf-8"), found, str(path)) for path in verdicts]
        for line in told(found, outcome(found, judged)):
            click.echo(line)
    elif output is not None:
        from luthier.reporting.judging_page import page

        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page(found, judge), encoding="utf-8")
        click.echo(f"{output}  ({len(found.pairs):,} pairs, {output.stat().st_size / 1e3:,.0f} kB)")
    else:
        with server_of(found, folder, judge, port) as server:
            click.echo(f"{len(found.pairs):,} pairs at http://127.0.0.1:{server.server_address[1]}/  (Ctrl-C ends)")
            click.echo(f"verdicts are kept in {folder}")
            try:
                server.serve_forever(0.2)
            except KeyboardInterrupt:
                click.echo()


def server_of(found: Comparison, folder: Path, judge: str, port: int) -> ThreadingHTTPServer:
    """A server of the page on 127.0.0.1.

    Args:
        found: What is compared.
        folder: Where verdicts are kept, a file for each judge.
        judge: Who judges, where that is known.
        port: The port; 0: a free one.
    """
    from luthier.reporting.judging_page import page

    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                known = _known(folder, judge, found) if judge else {}
                self._send(200, page(found, judge, known, served=True), "text/html")
            elif self.path == "/outcome":
                judged = [
                    read_verdicts(path.read_text(encoding="utf-8"), found, path.name)
                    for path in sorted(folder.glob(f"{found.digest}-*.json"))
                ]
                try:
                    self._send(200, "\n".join(told(found, outcome(found, judged))))
                except DataError as error:
                    self._send(200, str(error))
            else:
                self._send(404, "there is nothing here")

        def do_POST(self) -> None:
            host = self.headers.get("Host", "")
            # Another page in the same browser may not write here.
            foreign = self.headers.get("Origin", f"http://{host}") != f"http://{host}"
            if self.path != "/verdicts" or foreign or host.partition(":")[0] not in ("127.0.0.1", "localhost"):
                self._send(403, "only this page may say what was judged")
                return
            try:
                text = read_body(self).decode("utf-8")
                name, _ = read_verdicts(text, found, "verdicts")
            except (BodyError, UnicodeDecodeError, DataError) as error:
                self._send(400, str(error))
                return
            path = _file(folder, name, found)
            with lock:
                folder.mkdir(parents=True, exist_ok=True)
                new = path.with_suffix(".new")
                new.write_text(text, encoding="utf-8")
                os.replace(new, path)
            self._send(200, "kept")

        def _send(self, status: int, text: str, kind: str = "text/plain") -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    return server


def _file(folder: Path, judge: str, found: Comparison) -> Path:
    """Where the verdicts of a judge are kept."""
    plain = re.sub(r"[^\w-]+", "_", judge)[:40] or "somebody"
    return folder / f"{found.digest}-{plain}.json"


def _known(folder: Path, judge: str, found: Comparison) -> dict[int, str]:
    """What a judge said before."""
    path = _file(folder, judge, found)
    return read_verdicts(path.read_text(encoding="utf-8"), found, str(path))[1] if path.exists() else {}
