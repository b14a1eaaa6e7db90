"""How much of a run goes into checking what it reads from the store: python tests/benchmarks/reading.py [--gigabytes G]

A model of some size is taken in, trained for a step by LoRA and quantized, in one run in this process with every check
of the store timed: names and sizes at each read, and the digest of each file once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from luthier.api.artifact import Artifact
from luthier.artifacts.store import Store
from luthier.cli.main import luthier
from luthier.testing import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

RECIPE = """
luthier: 1
name: reading
stages:
  base: {uses: base, source: ./model}
  data: {uses: data, source: ./rows.jsonl}
  tuned: {uses: sft, model: base, data: data, adapter: {uses: lora, r: 4}, steps: 1, batch_size: 1}
  small: {uses: quantize, model: tuned, method: int8}
"""
CHECKS = {Store: ("damage", "broken", "find"), Artifact: ("damage",)}


def timed(spent: dict[str, float], depth: list[int], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose time is added to `spent`, but for calls from another one."""

    def call(*arguments: Any, **named: Any) -> Any:
        depth[0] += 1
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            depth[0] -= 1
            if not depth[0]:
                spent[name] += time.perf_counter() - started

    return call


def make_model(folder: Path, gigabytes: float) -> None:
    """A Llama of about so many gigabytes in bfloat16."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model(folder.parent / "tiny").path)
    width = 2048
    layers = max(1, round(gigabytes * 1e9 / 2 / (4 * width * width + 3 * width * 4 * width)))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    arguments = parser.parse_args()
    spent: dict[str, float] = defaultdict(float)
    depth = [0]
    for owner, names in CHECKS.items():
        for name in names:
            setattr(owner, name, timed(spent, depth, f"{owner.__name__}.{name}", getattr(owner, name)))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model", arguments.gigabytes)
        turn = [{"role": "user", "content": "Where is the map?"}, {"role": "assistant", "content": "In the drawer."}]
        rows = [json.dumps({"messages": [*turn, {"role": "user", "content": str(n)}, turn[1]]}) for n in range(40)]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        for run in ("first run", "again, everything cached"):
            spent.clear()
            started = time.perf_counter()
            result = CliRunner().invoke(luthier, ["run", str(folder / "recipe.yaml"), "--store", str(folder / "store")])
            seconds = time.perf_counter() - started
            assert result.exit_code == 0, result.output
            checks = sum(spent.values())
            print(f"{run}: {seconds:.1f} s, checks {checks:.3f} s ({checks / seconds:.2%}): {dict(spent)}")


if __name__ == "__main__":
    main()
