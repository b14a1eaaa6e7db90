"""Importances beside `llama-imatrix`, in one run: tokens per second.

    python tests/benchmarks/imatrix.py --program llama-imatrix --tokenizer FOLDER

The Qwen2 of 0.5 B parameters of `export.py`, two threads, blocks of 512 tokens. Both are timed without loading the
model: ours by the clock around the work, the program by how much longer twice as many tokens take.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from export import make_model

BLOCK = 512


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/luthier-imatrix-benchmark"))
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    model = options.folder / "model"
    make_model(model, options.tokenizer, 25)

    import torch
    from luthier.modeling.streamed import Streamed
    from luthier_plugins.gguf.imatrix import importances_of
    from luthier_plugins.gguf.write import Source
    from transformers import AutoTokenizer

    torch.set_num_threads(2)
    with ExitStack() as stack:
        source = Source(model, stack)
        list(source.write(options.folder / "f16.gguf", "F16", "x", workers=2))
    chance = random.Random(0)
    words = ["wood", "glue", "spruce", "a", "the", "string", "peg", "neck", "is", "bow", "varnish", "and", "."]
    text = " ".join(chance.choice(words) for _ in range(3 * BLOCK * options.blocks))
    (options.folder / "text.txt").write_text(text)
    ids = AutoTokenizer.from_pretrained(model)(text).input_ids
    blocks = [ids[first : first + BLOCK] for first in range(0, BLOCK * options.blocks, BLOCK)]

    def theirs(chunks: int) -> float:
        command = [
            str(options.program),
            "-m",
            "f16.gguf",
            "-f",
            "text.txt",
            "-c",
            str(BLOCK),
            "-t",
            "2",
            "--no-ppl",
            "--chunks",
            str(chunks),
            "-o",
            "theirs.gguf",
        ]
        started = time.perf_counter()
        subprocess.run(command, cwd=options.folder, check=True, capture_output=True)
        return time.perf_counter() - started

    theirs(1)
    more = theirs(2 * options.blocks) - theirs(options.blocks)
    importances_of(Streamed(model), source.parts, blocks[:1])
    started = time.perf_counter()
    importances_of(Streamed(model), source.parts, blocks)
    ours = time.perf_counter() - started
    tokens = BLOCK * options.blocks
    print(f"tokens per second: llama-imatrix {tokens / more:.0f}, ours {tokens / ours:.0f} ({more / ours:.2f} times)")
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
