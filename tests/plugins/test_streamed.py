"""Models read layer by layer: what the whole model computes, and never all of it in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from gguf_models import MODELS, make_gpt2, make_model
from luthier.api import ModelError
from luthier.modeling.loading import load_folder
from luthier.modeling.streamed import Streamed
from safetensors.torch import load_file, save_file

TEXTS = [[3, 7, 11, 200, 5, 9, 40], [8, 1], list(range(2, 60)), [17], [4, 5, 6, 7, 8], list(range(40, 90))]
"""Some are of about one length: they go through the model together, padded."""


@pytest.mark.parametrize("name", [*MODELS, "gpt2", "gpt2-short"])
def test_every_architecture_is_computed_as_the_whole_model_is(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if name.startswith("gpt2"):
        make_gpt2(folder, short=name.endswith("short"))
    else:
        make_model(folder, name)
    whole = load_folder(folder).eval()
    streamed = Streamed(folder)
    # Twice: what was dropped is read again.
    for _ in range(2):
        found = dict(streamed.logits(TEXTS))
        assert sorted(found) == list(range(len(TEXTS)))
        for place, logits in found.items():
            with torch.no_grad():
                right = whole(torch.tensor([TEXTS[place]])).logits[0]
            torch.testing.assert_close(logits, right, rtol=1e-4, atol=2e-6)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


LIMITED = """
import resource, sys
from pathlib import Path
import psutil, torch
from luthier.modeling.loading import load_folder
from luthier.modeling.streamed import Streamed

folder, room = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
streamed = Streamed(folder)
most = psutil.Process().memory_info().vms + room
resource.setrlimit(resource.RLIMIT_AS, (most, most))
texts = [[3, 7, 11, 20], list(range(2, 40))]
print(sum(float(logits.sum()) for _, logits in streamed.logits(texts)))
try:
    load_folder(folder)
except (MemoryError, RuntimeError) as error:
    print("too large", type(error).__name__)
"""


def test_no_more_than_a_layer_is_in_memory(tmp_path: Path) -> None:
    folder = make_model(
        tmp_path / "model", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=16, head_dim=64
    )
    size = 4 * sum(value.numel() for value in Streamed(folder).model.parameters())
    assert size > 200_000_000
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", LIMITED, str(folder), str(size // 2)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found, whole = done.stdout.splitlines()
    texts = [[3, 7, 11, 20], list(range(2, 40))]
    right = sum(float(logits.sum()) for _, logits in Streamed(folder).logits(texts))
    assert float(found) == pytest.approx(right, rel=1e-3)
    # The same limit is too low for the whole model.
    assert whole.startswith("too large")


def test_a_text_that_cannot_be_computed_stops_all(tmp_path: Path) -> None:
    streamed = Streamed(make_model(tmp_path / "model", "llama"))
    before = threading.active_count()
    with pytest.raises(IndexError):
        list(streamed.logits([[3, 4, 5], [10**6] * 9]))
    assert threading.active_count() == before
    # It can be asked again, and given up in between.
    found = streamed.logits([[3, 4, 5], [6] * 9])
    next(found)
    found.close()
    assert threading.active_count() == before
    assert len(list(streamed.logits([[3, 4, 5]]))) == 1


def test_too_little_memory_for_one_layer_is_said_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "model", "llama")
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=1_000_000))
    with pytest.raises(ModelError, match=r"layer by layer takes [\d.]+ GB of memory, and 0\.001 are free"):
        Streamed(folder)


def test_weights_that_lack_are_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"the weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
        list(Streamed(folder).logits([[3, 4]]))


def test_it_computes_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3")
    whole = load_folder(folder, {"dtype": "bfloat16"}).eval()
    ((_, found),) = Streamed(folder, dtype=torch.bfloat16).logits([[3, 7, 11, 20]])
    with torch.no_grad():
        right = whole(torch.tensor([[3, 7, 11, 20]])).logits[0].float()
    torch.testing.assert_close(found, right, rtol=0.02, atol=0.02)
    exact = dict(Streamed(folder).logits([[3, 7, 11, 20]]))[0]
    assert not torch.allclose(found, exact, rtol=1e-5, atol=1e-6)
