"""A plan's memory beside what training takes: python tests/benchmarks/estimates.py --data FILE --tokenizer FOLDER

Each case is trained in a process of its own; measured is the growth of its resident memory from when all libraries are
loaded to its peak.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import training
from luthier.api import Artifact
from luthier.artifacts.store import Store
from luthier.registry import default_registry
from luthier.running.slots import ALLOCATOR
from luthier.testing import run_stage

LORA = {"uses": "lora", "r": 16}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "all weights": (1, {}),
    "all weights, long rows": (8, {}),
    "all weights, 8-bit moments": (1, {"optimizer": "adamw8bit"}),
    "lora": (1, {"adapter": LORA}),
    "lora, long rows": (8, {"adapter": LORA}),
    "lora, long rows, checkpointing": (8, {"adapter": LORA, "gradient_checkpointing": True}),
    "qlora, long rows": (8, {"adapter": {**LORA, "uses": "qlora"}}),
}
"""How many times longer rows are than those of the file, and how the model is trained."""


def longer(folder: Path, file: Path, times: int) -> Artifact:
    """Rows whose answers are repeated."""
    with file.open(encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = [json.loads(line) for line in itertools.islice(lines, 16)]
    for row in rows:
        row["messages"][-1]["content"] *= times
    target = folder / f"longer-{times}.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return training.make_data(folder, target, 16, False, f"rows-{times}")


def config_of(case: str) -> dict[str, Any]:
    """A case's config."""
    return {"steps": 2, "batch_size": 8, "max_length": 4096, "precision": "fp32", **CASES[case][1]}


def train(case: str, folder: Path, model: str, data: str) -> None:
    """Train in this process, and print by how many bytes it grew."""
    store = Store(folder)
    inputs = [store.find(key) for key in (model, data)]
    assert all(inputs), "both are made"
    before = psutil.Process().memory_info().rss
    run_stage(folder, "sft", config_of(case), inputs={"model": inputs[0], "data": [inputs[1]]})  # type: ignore[dict-item, list-item]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--case", nargs=4, help="Used by the script itself.")
    arguments = parser.parse_args()
    if arguments.case is not None:
        train(arguments.case[0], Path(arguments.case[1]), *arguments.case[2:])
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = training.make_model(folder, arguments.tokenizer, arguments)
        sizes = {times for times, _ in CASES.values()}
        data = {times: longer(folder, arguments.data, times) for times in sizes}
        for name, (times, _) in ((name, case) for name, case in CASES.items() if name in arguments.cases):
            use = default_registry().use("stage", {"uses": "sft", "model": "m", "data": ["d"], **config_of(name)})
            config: Any = use.config
            estimate: int = config.estimate({"model": [model.facts], "data": [data[times].facts]}).memory
            command = [sys.executable, __file__, "--case", name, str(folder / "store"), model.key, data[times].key]
            environment = {**ALLOCATOR, **os.environ}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            taken = int(done.stdout.splitlines()[-1])
            shown = f"{estimate / 1e9:6.2f} GB estimated, {taken / 1e9:6.2f} GB taken: {estimate / taken - 1:+.0%}"
            print(f"{name:32} {shown}", flush=True)


if __name__ == "__main__":
    main()
