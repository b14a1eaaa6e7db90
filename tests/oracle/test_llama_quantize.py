"""Byte for byte what `llama_model_quantize` makes, for every type and with importances."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_models import MODELS, make_model
from luthier_plugins.gguf.config import NEED_IMATRIX, FileType
from luthier_plugins.gguf.mixes import MOSTLY, is_quantized
from luthier_plugins.gguf.write import Source

SCRIPT = Path(__file__).parent / "quantize.py"
TYPES: list[FileType] = [name for name in MOSTLY if name not in ("F32", "F16", "BF16")]


@pytest.fixture(scope="module")
def python(environment: Callable[..., Path]) -> Path:
    return environment("llama-cpp", "llama-cpp-python==0.3.36")


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *((name, 0) for name in MODELS if name not in ("gemma", "deepseek-v2-lite")),
        # Deep enough that the first and the last eighths of the layers are some.
        ("llama", 17),
        ("qwen2-moe", 17),
        ("deepseek-v2", 17),
    ],
)
def test_every_tensor_is_the_same_byte_for_byte(
    name: str, layers: int, weighed: bool, python: Path, tmp_path: Path
) -> None:
    types = [kind for kind in TYPES if weighed or kind not in NEED_IMATRIX]
    folder = make_model(tmp_path / "model", name, **({"num_hidden_layers": layers} if layers else {}))
    command = [str(python), str(SCRIPT), str(tmp_path / "f32.gguf"), str(tmp_path)]
    with ExitStack() as stack:
        source = Source(folder, stack)
        list(source.write(tmp_path / "f32.gguf", "F32", "x"))
        if weighed:
            random = np.random.default_rng(0)
            importances = {
                part.name: random.random(
                    (len(part.sources), part.shape[-1]) if len(part.sources) > 1 else part.shape[-1], dtype=np.float32
                )
                + 0.01
                for part in source.parts
                if is_quantized(part.name, part.shape) and part.name != "token_embd.weight"
            }
            # llama.cpp wants them for each matrix of a stack, of heads too.
            stacked = {
                part.name: np.broadcast_to(importances[part.name], (*part.shape[:-2], part.shape[-1]))
                for part in source.parts
                if part.name in importances
            }
            np.savez(tmp_path / "imatrix.npz", **stacked)
            command += ["--imatrix", str(tmp_path / "imatrix.npz")]
            source.weigh(importances)
        done = subprocess.run([*command, *types], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        for kind in types:
            list(source.write(tmp_path / "ours.gguf", kind, "x"))
            ours = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "ours.gguf").tensors}
            theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors}
            assert {name: tensor.tensor_type for name, tensor in ours.items()} == {
                name: tensor.tensor_type for name, tensor in theirs.items()
            }, kind
            differ = [name for name, tensor in ours.items() if not np.array_equal(tensor.data, theirs[name].data)]
            assert not differ, (kind, differ)
