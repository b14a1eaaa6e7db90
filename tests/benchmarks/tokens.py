"""Making tokens of many rows: python tests/benchmarks/tokens.py --data ROWS.jsonl --tokenizer FOLDER [--rows N]

Conversations of a file are repeated, each with a number of its own, up to so many rows. Reported are rows per second of
Luthier, which renders each answer behind the prompt of a server and checks it, and of `datasets.map` with the same
tokenizer's chat template and as many processes; and by how much the training process grows that reads the tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import psutil
from luthier.api import Artifact
from luthier.artifacts.datasets import write_split
from luthier.artifacts.store import Store
from luthier.modeling.loading import load_tokenizer
from luthier.running.commit import commit
from luthier.testing import TestContext
from luthier.testing.stages import tiny_model
from luthier.training.mixing import Mix
from luthier.training.token_files import Labelling, token_file
from transformers import AutoTokenizer


def rows_of(file: Path, count: int) -> list[dict[str, Any]]:
    """So many conversations, no two alike."""
    # Not `splitlines`: a text may hold other characters that end lines.
    with file.open(encoding="utf-8") as lines:
        known = [json.loads(line)["messages"] for line in lines]
    return [
        {"messages": [{**messages[0], "content": f"{number}: {messages[0]['content']}"}, *messages[1:]]}
        for number, messages in zip(range(count), itertools.cycle(known), strict=False)
    ]


def stored(folder: Path, rows: list[dict[str, Any]]) -> Artifact:
    """A dataset artifact of rows that are not looked at one by one."""
    store = Store(folder)
    out = store.work("d" * 64) / "out"
    out.mkdir(parents=True)
    write_split(out, "train", rows)
    facts = {
        "schema": "messages",
        "rows": {"train": len(rows)},
        "characters": 0,
        "dropped": {},
        "columns": ["messages"],
    }
    return commit(store, "d" * 64, "dataset", out, {"stage": "data", "facts": facts, "warnings": [], "inputs": {}})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--without-datasets", action="store_true", help="Leave out datasets.map.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = tiny_model(folder / "store")
        tokenizer: Any = AutoTokenizer.from_pretrained(arguments.tokenizer)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (model.path / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(model.path)
        data = stored(folder / "store", rows_of(arguments.data, arguments.rows))
        if not arguments.without_datasets:
            raw = datasets.load_dataset("parquet", data_files=str(data.path / "train.parquet"), split="train")
            started = time.perf_counter()
            raw.map(
                lambda row: tokenizer.apply_chat_template(row["messages"], return_dict=True),
                num_proc=os.cpu_count(),
            )
            print(f"datasets.map: {arguments.rows / (time.perf_counter() - started):.0f} rows/s", flush=True)
        stops = tuple(tokenizer.convert_tokens_to_ids([tokenizer.eos_token]))
        how = Labelling(model.path, stops, None, "answers")
        load_tokenizer(model)
        process = psutil.Process()
        before = process.memory_info().rss
        started = time.perf_counter()
        found = token_file(data, "train", how, TestContext(folder / "work"))
        seconds = time.perf_counter() - started
        print(f"Luthier: {arguments.rows / seconds:.0f} rows/s ({seconds:.0f} s)", flush=True)
        made = process.memory_info().rss
        read = sum(len(found[place]) for place in Mix.of([len(found)], None).order(0, 0)[:100_000].tolist())
        after = process.memory_info().rss
        print(
            f"{len(found)} rows, {found.tokens / 1e6:.1f} M trained tokens; resident memory grew by "
            f"{(made - before) / 1e6:.0f} MB while they were made, by {(after - before) / 1e6:.0f} MB after "
            f"{min(len(found), 100_000)} rows were read at random ({read / 1e6:.1f} M tokens)"
        )


if __name__ == "__main__":
    main()
