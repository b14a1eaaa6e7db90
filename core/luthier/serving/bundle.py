"""What each serving program needs beside the weights: the exact command, a compose file, a golden file to check it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.serving import golden


@dataclass(frozen=True, slots=True)
class Target:
    """A serving program.

    Attributes:
        port: Where it listens.
        command: How it is started on a machine that has it; ``{model}`` is the folder or file, ``{length}`` the
            context, ``{name}`` what clients call the model.
        image: Its container, without a version: which one is right is a matter of the machine's drivers.
        arguments: What the container is started with; the bundle's folder is mounted at ``/model``.
        script: What a shell in the container does instead, where one command is not enough.
        gpu: Whether the container's program wants a GPU.
    """

    port: int
    command: str
    image: str
    arguments: str = ""
    gpu: bool = True
    script: str = ""


NAME = "model"
"""What clients call the model, where a program lets us choose."""
TARGETS = {
    "llama.cpp": Target(
        8080,
        "llama-server -m {model} --jinja --reasoning-format none -c {length} -a {name} --host 127.0.0.1 --port 8080",
        "ghcr.io/ggml-org/llama.cpp:server",
        "-m /model/{model} --jinja --reasoning-format none -c {length} -a {name} --host 0.0.0.0 --port 8080",
        gpu=False,
    ),
    "ollama": Target(
        11434,
        "ollama create {name} -f Modelfile",
        "ollama/ollama",
        gpu=False,
        script="ollama serve & until ollama list > /dev/null 2>&1; do sleep 1; done; "
        "ollama create {name} -f /model/Modelfile && wait",
    ),
    "vllm": Target(
        8000,
        "vllm serve {model} --served-model-name {name} --max-model-len {length} --generation-config vllm "
        "--host 127.0.0.1 --port 8000",
        "vllm/vllm-openai",
        "--model /model --served-model-name {name} --max-model-len {length} --generation-config vllm",
    ),
    "tgi": Target(
        8080,
        "text-generation-launcher --model-id {model} --max-total-tokens {length} --hostname 127.0.0.1 --port 8080",
        "ghcr.io/huggingface/text-generation-inference",
        "--model-id /model --max-total-tokens {length} --port 8080",
    ),
    "sglang": Target(
        30000,
        "python -m sglang.launch_server --model-path {model} --served-model-name {name} --context-length {length} "
        "--host 127.0.0.1 --port 30000",
        "lmsysorg/sglang",
        "python -m sglang.launch_server --model-path /model --served-model-name {name} --context-length {length} "
        "--host 0.0.0.0 --port 30000",
    ),
    "tensorrt-llm": Target(
        8000,
        "trtllm-serve {model} --max_seq_len {length} --host 127.0.0.1 --port 8000",
        "nvcr.io/nvidia/tensorrt-llm/release",
        "trtllm-serve /model --max_seq_len {length} --host 0.0.0.0 --port 8000",
    ),
}  # fmt: skip
"""The serving programs by the names that recipes use."""


def write_bundle(
    folder: Path, targets: Sequence[str], model: str, length: int, entries: Sequence[Mapping[str, Any]], limit: int
) -> list[str]:
    """Write ``serve/`` into an export's folder.

    Args:
        targets: Which programs.
        model: The file that is served, or ``.`` for the folder.
        length: The context in tokens.
        entries: Golden entries: ``messages``, ``prompt``, ``prompt_ids``, ``answer``.
        limit: The most tokens of a golden answer.

    Returns:
        The names of the files.
    """
    if not targets:
        return []
    out = folder / "serve"
    out.mkdir()
    shutil.copyfile(golden.__file__, out / "check.py")
    content = {"golden": 1, "model": NAME, "max_tokens": limit, "least": golden.LEAST, "entries": list(entries)}
    (out / "golden.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in targets:
        target = TARGETS[name]
        values = {"model": model, "length": length, "name": NAME}
        command = target.command.format(**values)
        script = (
            f"#!/bin/sh\n# Starts {name}; then, in another shell: python serve/check.py http://127.0.0.1:{target.port} "
            f'serve/golden.json\nset -e\ncd "$(dirname "$0")/.."\n{command}\n'
        )
        path = out / f"{name}.sh"
        path.write_text(script, encoding="utf-8")
        path.chmod(0o755)
        (out / f"{name}.compose.yaml").write_text(_compose(target, values), encoding="utf-8")
    return sorted(path.name for path in out.iterdir())


def _compose(target: Target, values: Mapping[str, Any]) -> str:
    if target.script:
        start = f"    entrypoint: {json.dumps(['sh', '-c', target.script.format(**values)])}\n"
    else:
        start = f"    command: {json.dumps(target.arguments.format(**values).split())}\n"
    return (
        "# Set IMAGE to the version that you have tested.\n"
        f"services:\n  model:\n    image: ${{IMAGE:-{target.image}}}\n{start}"
        f'    ports: ["127.0.0.1:{target.port}:{target.port}"]\n    volumes: ["..:/model:ro"]\n'
        + ("    gpus: all\n    ipc: host\n" if target.gpu else "")
    )
