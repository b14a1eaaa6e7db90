"""What reading, checking, splitting, near-deduplicating and writing of many chat rows takes, and what bounds it.

    python tests/benchmarks/data.py --rows 1000000

Rows are generated: a question and an answer of random words, about 1 KB; one in ten nearly repeats an earlier one.
Beside the whole stage it times reading alone, by Luthier, `datasets` and polars, and finding near-duplicates alone, by
Luthier and by datasketch as its documentation has it, on fewer rows. What is not installed is left out. Each runs in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

STAGE = """
import sys
from pathlib import Path
from luthier.testing import run_stage
made = run_stage(Path(sys.argv[2]), "data", {"source": sys.argv[1], "split": {"test": 0.01}, "dedupe": {"near": 0.8}})
note = str({**made.facts["rows"], **made.facts["dropped"]})
"""
READ = """
import sys
from pathlib import Path
from luthier.data.raw import raw_rows
note = sum(len(row["messages"]) for _, row in raw_rows(Path(sys.argv[1])))
"""
DATASETS = """
import sys
from datasets import load_dataset
rows = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
note = sum(len(row["messages"]) for row in rows)
"""
POLARS = """
import sys
import polars
note = polars.read_ndjson(sys.argv[1])["messages"].list.len().sum()
"""
SIMILAR = """
import json, sys
from pathlib import Path
import numpy as np
from luthier.data.similar import Similar
texts = [" ".join(item["content"] for item in json.loads(line)["messages"]) for line in open(sys.argv[1])]
with Similar(Path(sys.argv[2]) / "shingles", 0.8) as similar:
    for start in range(0, len(texts), 1000):
        similar.add(texts[start:start + 1000])
    note = f"{int((similar.tied() != np.arange(len(texts))).sum())} found"
"""
DATASKETCH = """
import json, sys
from datasketch import MinHash, MinHashLSH
texts = [" ".join(item["content"] for item in json.loads(line)["messages"]) for line in open(sys.argv[1])]
index, found = MinHashLSH(threshold=0.8, num_perm=128), 0
for place, text in enumerate(texts):
    words = text.lower().split()
    sketch = MinHash(num_perm=128)
    sketch.update_batch([" ".join(words[n:n + 5]).encode() for n in range(max(1, len(words) - 4))])
    if index.query(sketch):
        found += 1
    else:
        index.insert(str(place), sketch)
note = f"{found} found"
"""
AROUND = """
import resource, time
began = time.perf_counter()
{code}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(time.perf_counter() - began, peak, note, sep="\\t")
"""


def generate(path: Path, rows: int, seed: int = 7) -> None:
    """Write chat rows; the same for the same arguments."""
    draw = random.Random(seed)
    letters = "etaoinshrdlcumwfgypbvk"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(20_000)]
    kept: list[list[str]] = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            if kept and draw.random() < 0.1:
                said = list(draw.choice(kept))
                said[draw.randrange(len(said))] = draw.choice(words)
            else:
                said = draw.choices(words, k=draw.randint(80, 220))
                if len(kept) < 5000:
                    kept.append(said)
            question = " ".join(draw.choices(words, k=12)) if number % 2 else " ".join(said[:12])
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": " ".join(said)}]
            file.write(json.dumps({"messages": messages}) + "\n")


def timed(code: str, source: Path, folder: Path) -> tuple[float, float, str] | str:
    """Seconds, gigabytes at the peak, and what it found; or why it failed."""
    done = subprocess.run(
        [sys.executable, "-c", AROUND.format(code=code), str(source), str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        return done.stderr.strip().rsplit("\n", 1)[-1]
    seconds, peak, note = done.stdout.strip().split("\n")[-1].split("\t")
    return float(seconds), float(peak), note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--sketched", type=int, default=20_000, help="rows of the comparison with datasketch")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        many, few, half = folder / "rows.jsonl", folder / "few.jsonl", folder / "half.jsonl"
        for path, rows in ((many, given.rows), (few, given.sketched), (half, given.rows // 4)):
            generate(path, rows)
        print(f"{given.rows} rows, {many.stat().st_size / 1e9:.2f} GB")
        measured = (
            ("the stage, a quarter of the rows", STAGE, half, given.rows // 4),
            ("the stage", STAGE, many, given.rows),
            ("reading alone", READ, many, given.rows),
            ("reading by datasets", DATASETS, many, given.rows),
            ("reading by polars", POLARS, many, given.rows),
            ("near-duplicates alone", SIMILAR, few, given.sketched),
            ("near-duplicates by datasketch", DATASKETCH, few, given.sketched),
        )
        for name, code, source, rows in measured:
            found = timed(code, source, Path(tempfile.mkdtemp(dir=folder)))
            if isinstance(found, str):
                print(f"{name:34} not measured: {found}")
            else:
                seconds, peak, note = found
                print(f"{name:34} {seconds:8.1f} s {rows / seconds:9.0f} rows/s {peak:6.2f} GB  {note}")


if __name__ == "__main__":
    main()
