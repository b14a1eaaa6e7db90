"""Random models of real size, written in seconds: what benchmarks at real size work on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from luthier.merging.files import Scratch
from luthier.merging.writer import Described, Output
from transformers import Qwen2Config, Qwen2ForCausalLM

TILE = (1 << 26) + 3
"""Random numbers that are drawn once; tensors begin at other places in them."""
STEP = 1 << 22


def config_of(layers: int = 24) -> Qwen2Config:
    """A Qwen2 of 2.06 B parameters; each layer has 59.8 M of them, embedding and head 622 M."""
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        eos_token_id=151645,
        bos_token_id=151643,
        dtype="bfloat16",
    )


def make_model(folder: Path, tokenizer: Path, config: Any, seed: int, near: float = 0.1) -> int:
    """Write a model in bfloat16.

    Args:
        folder: Where to; it is made.
        tokenizer: A folder whose text files the model gets.
        config: Its config.
        seed: Models of other seeds differ by `near` times their weights: they are as if tuned from the same one.
        near: See `seed`.

    Returns:
        Its parameters.
    """
    folder.mkdir(parents=True)
    for path in tokenizer.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Qwen2ForCausalLM(config).state_dict().items()}
    tile = torch.randn(TILE, generator=torch.Generator().manual_seed(0)) * 0.02
    if seed:
        tile += near * 0.02 * torch.randn(TILE, generator=torch.Generator().manual_seed(seed))
    tile = torch.cat([tile, tile[:STEP]])
    output = Output(folder, {name: Described("BF16", shape) for name, shape in shapes.items()}, 5_000_000_000)
    scratch, place, total = Scratch(), 0, 0
    for name, shape in shapes.items():
        size = int(torch.Size(shape).numel())
        for start in range(0, size, STEP):
            count = min(STEP, size - start)
            values = torch.ones(count) if name.endswith("norm.weight") else tile[place : place + count]
            output.write(name, start, values, scratch)
            place = (place + count) % TILE
        total += size
    output.sync()
    output.close()
    return total
