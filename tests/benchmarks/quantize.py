"""Quantizing with AWQ's and GPTQ's layout: seconds per layer, and what rounding on data is worth.

    python tests/benchmarks/quantize.py [--layers 4] [--tokens 4096]

A Qwen2 of the sizes of Qwen 2.5 0.5B with random weights and random tokens; seconds are per decoder layer (seven linear
layers), on all cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from luthier.modeling.streamed import Streamed
from luthier_plugins.quantizers.rounding import Grid, round_on_data, to_nearest
from transformers import Qwen2Config, Qwen2ForCausalLM


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=options.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    model = Qwen2ForCausalLM(config).eval()
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    ]
    ids = torch.randint(0, 1024, (options.tokens // 512, 512))
    grid = Grid(4, 128, symmetric=False)
    started = time.perf_counter()
    for name in names:
        to_nearest(model.get_parameter(name).detach(), grid)
    nearest = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        started = time.perf_counter()
        round_on_data(Streamed(Path(folder)), names, ids.tolist(), grid, lambda name, found: None)
    feedback = time.perf_counter() - started
    print(
        f"{options.layers} layers, {options.tokens:,} tokens: to nearest {nearest / options.layers:.2f} s a layer, "
        f"on data {feedback / options.layers:.1f} s a layer"
    )


if __name__ == "__main__":
    main()
