"""How fast the shell is, and what Luthier adds to a run: ``python tests/benchmarks/shell.py``.

Not a test: it prints medians beside a bare interpreter's start on the same machine, in the same run. Needs the
quickstart in the store (``make quickstart``).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from luthier import Recipe, plan
from luthier.artifacts.store import Store
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
PROGRAM = str(Path(sys.executable).parent / "luthier")
TIMES = 9
COMMANDS = {
    "bare python": ([sys.executable, "-c", "pass"], None),
    "luthier --help": ([PROGRAM, "--help"], 0.25),
    "luthier plugins": ([PROGRAM, "plugins"], 0.5),
    "luthier plan recipes/quickstart.yaml": ([PROGRAM, "plan", str(QUICKSTART)], 0.6),
    "luthier run recipes/quickstart.yaml, cached": ([PROGRAM, "run", str(QUICKSTART)], 1.5),
}


def median_seconds(command: list[str]) -> float:
    """The median wall time of a command, after one run to warm the file cache."""
    times: list[float] = []
    for _ in range(TIMES + 1):
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def shell(console: Console) -> None:
    """Start-up times."""
    table = Table("command", "median s", "times bare python", "goal s")
    bare = 0.0
    for name, (command, goal) in COMMANDS.items():
        seconds = median_seconds(command)
        bare = bare or seconds
        table.add_row(name, f"{seconds:.3f}", f"{seconds / bare:.1f}", str(goal or ""))
    console.print(table)


def overhead(console: Console) -> None:
    """Where the time of the last whole quickstart went.

    A stage's manifest splits its time: `run` is the stage's own work, `load` the import of its libraries and what
    comes with it; the rest, up to the wall time of the run, is Luthier's.
    """
    store = Store.at(ROOT / ".luthier")
    nodes = plan(Recipe.load(QUICKSTART), store).nodes
    stages = {name: artifact.manifest for name, node in nodes.items() if (artifact := store.find(node.key))}
    work = sum(manifest["seconds"]["run"] for manifest in stages.values())
    load = sum(manifest["seconds"]["load"] for manifest in stages.values())
    runs = [
        events
        for path in store.runs.glob("*-quickstart-*/events.jsonl")
        if (events := [json.loads(line) for line in path.read_text().splitlines()])
    ]
    whole = [events for events in runs if sum(event["event"] == "stage_finished" for event in events) == len(nodes)]
    if not whole:
        console.print("no whole run of the quickstart in the store: remove .luthier and run `make quickstart`")
        return
    wall = whole[-1][-1]["time"] - whole[-1][0]["time"]
    table = Table("where", "seconds", "share")
    rest = wall - work - load
    for name, seconds in (("stages' own work", work), ("loading their libraries", load), ("Luthier", rest)):
        table.add_row(name, f"{seconds:.2f}", f"{seconds / wall:.1%}")
    table.add_row("whole run", f"{wall:.2f}", "100 %")
    console.print(table)


if __name__ == "__main__":
    terminal = Console(width=110)
    shell(terminal)
    overhead(terminal)
