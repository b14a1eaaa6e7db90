"""Exporting to GGUF beside llama.cpp, in one run: time and memory.

    LUTHIER_ORACLES=FOLDER python tests/benchmarks/export.py --converter convert_hf_to_gguf.py --tokenizer FOLDER

A Qwen2 of 0.5 B parameters in bfloat16, two threads. `--converter` is llama.cpp's script (with the packages that it
needs in its interpreter, see `--converter-python`), `--tokenizer` a folder with a tokenizer that it knows, such as that
of Qwen 2.5. The environment `llama-cpp` in the folder of the oracles has llama-cpp-python, for `llama_model_quantize`.
Memory is anonymous memory above that after the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORK = """
import json, sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from luthier_plugins.gguf.write import Source
from memory import Watched

folder, out, kind = sys.argv[1:]
with Watched() as watched, ExitStack() as stack:
    for _ in Source(Path(folder), stack).write(Path(out), kind, "x", workers=2):
        pass
print(json.dumps({"seconds": watched.seconds, "memory": watched.memory}))
"""


def make_model(folder: Path, tokenizer: Path, layers: int) -> int:
    """Write the model; its size in bytes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        eos_token_id=151645,
    )
    model: Any = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in tokenizer.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def timed(command: list[str], **environment: str) -> float:
    """The seconds that a process takes."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def ours(folder: Path, out: Path, kind: str) -> dict[str, float]:
    """Seconds of a whole process, of the export in it, and its memory in MiB."""
    from luthier.running.slots import ALLOCATOR

    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(folder), str(out), kind],
        capture_output=True,
        text=True,
        check=True,
        env={**ALLOCATOR, **os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    return {**json.loads(done.stdout), "whole": time.perf_counter() - started}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--converter", type=Path, required=True)
    parser.add_argument("--converter-python", default=sys.executable)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=25)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/luthier-export-benchmark"))
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    model = options.folder / "model"
    size = make_model(model, options.tokenizer, options.layers)
    print(f"the model: {size / 2e6:,.0f} M parameters, {size / (1 << 20):,.0f} MiB")
    f16 = options.folder / "theirs-F16.gguf"
    theirs = timed(
        [options.converter_python, str(options.converter), str(model), "--outfile", str(f16), "--outtype", "f16"]
    )
    ours(model, options.folder / "ours.gguf", "F16")
    found = ours(model, options.folder / "ours.gguf", "F16")
    print(
        f"F16: llama.cpp's converter {theirs:.1f} s; ours {found['whole']:.1f} s ({found['seconds']:.1f} s without "
        f"imports), {found['memory']:.0f} MiB ({found['memory'] * (1 << 20) / size:.0%} of the model)"
    )
    python = Path(os.environ["LUTHIER_ORACLES"]) / "llama-cpp" / "bin" / "python"
    script = Path(__file__).parents[1] / "oracle" / "quantize.py"
    for kind in ("Q8_0", "Q4_K_M"):
        theirs = timed([str(python), str(script), str(f16), str(options.folder), kind])
        found = ours(model, options.folder / "ours.gguf", kind)
        print(
            f"{kind}: llama_model_quantize {theirs:.1f} s from F16; ours {found['whole']:.1f} s "
            f"({found['seconds']:.1f} s without imports) from safetensors, {found['memory']:.0f} MiB "
            f"({found['memory'] * (1 << 20) / size:.0%} of the model)"
        )
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
