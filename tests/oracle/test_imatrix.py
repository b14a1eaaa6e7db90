"""The importances that `llama-imatrix` computes from the same text."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_models import make_model
from luthier.modeling.streamed import Streamed
from luthier_plugins.gguf.imatrix import importances_of
from luthier_plugins.gguf.write import Source
from transformers import AutoTokenizer

TEXT = "the quick brown fox jumps over the lazy dog and the cat. " * 120
CONTEXT = 64
FEW = 100
"""Tokens of an expert below which one that is routed elsewhere, by another rounding, shows."""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "mixtral", "qwen2-moe", "qwen3-moe"])
def test_importances_are_those_of_llama_imatrix(name: str, llama_imatrix: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", name)
    with ExitStack() as stack:
        source = Source(folder, stack)
        list(source.write(tmp_path / "f32.gguf", "F32", "x"))
    (tmp_path / "text.txt").write_text(TEXT)
    size = str(CONTEXT)
    command = [
        str(llama_imatrix),
        "-m",
        "f32.gguf",
        "-f",
        "text.txt",
        "-c",
        size,
        "-b",
        size,
        "-ub",
        size,
        "-o",
        "theirs.gguf",
        "-t",
        "2",
        "--no-ppl",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    theirs = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors}
    ids = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    blocks = [ids[first : first + CONTEXT] for first in range(0, len(ids) - CONTEXT + 1, CONTEXT)]
    ours, _ = importances_of(Streamed(folder), source.parts, blocks)
    names = {key.removesuffix(".in_sum2") for key in theirs if key.endswith(".in_sum2")}
    # What chooses experts is never quantized.
    assert {key for key in names if "ffn_gate_inp" not in key} <= set(ours)
    for key in names & set(ours):
        sums, counts = theirs[f"{key}.in_sum2"], theirs[f"{key}.counts"].reshape(-1, 1)
        # Each token comes to two experts.
        assert counts.sum() == len(blocks) * CONTEXT * (2 if len(counts) > 1 else 1)
        right = (sums.reshape(len(counts), -1) / counts.clip(1))[counts[:, 0] > FEW]
        found = ours[key].reshape(len(counts), -1)[counts[:, 0] > FEW]
        difference = np.abs(found - right).max() / np.abs(right).max()
        assert difference < (0.03 if "exps" in key or "moe" in name else 0.002), (key, difference)
