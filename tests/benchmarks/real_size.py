"""Models of real size, as a user meets them: time, memory of all processes, and disk.

    python tests/benchmarks/real_size.py --tokenizer FOLDER [--methods linear slerp ties dare_ties] [--layers 24]

Two or three Qwen2 of 2.06 B parameters (4.1 GB each in bfloat16, random) are made, and are used as they lie there: a
first `luthier run` into an empty store beside mergekit's command line, then an export to Q4_K_M, and `luthier diff`.
The floor is reading the inputs once and writing as much as the result, fsynced. Memory is that of all processes
together, without the pages of files that are mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import real_models

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    # ours, mergekit's parameters of each model
    "linear": ("linear", {"weight": 1.0}),
    "slerp": ({"uses": "slerp", "t": 0.4}, {}),
    "ties": ({"uses": "ties", "density": 0.5}, {"weight": 1.0, "density": 0.5}),
    "dare_ties": ({"uses": "dare_ties", "density": 0.5}, {"weight": 1.0, "density": 0.5}),
}
WITH_BASE = ("ties", "dare_ties")
PROGRAMS = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class Took:
    """What a command took.

    Attributes:
        seconds: From its start to its end.
        memory: Bytes of all its processes at their peak, without mapped files.
    """

    seconds: float
    memory: int

    def __str__(self) -> str:
        return f"{self.seconds:6.1f} s {self.memory / 1e9:5.2f} GB"


def measured(command: list[str], folder: Path) -> Took:
    """Run a command, and look at its memory five times a second."""
    started = time.perf_counter()
    log = folder / "log"
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
    return Took(time.perf_counter() - started, peak)


def _memory(pid: int) -> int:
    found = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            about = process.memory_info()
            found += about.rss - about.shared
        except psutil.Error:
            continue
    return found


def size_of(folder: Path) -> int:
    """Bytes that a folder takes on the disk beside those of the models, which have other names there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink == 1)


def warm(paths: list[Path]) -> float:
    """Read files, as both programs find them then; the seconds of the second time."""
    took = 0.0
    for _ in range(2):
        started = time.perf_counter()
        buffer = bytearray(1 << 22)
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        took = time.perf_counter() - started
    return took


def written(folder: Path, size: int) -> float:
    """Seconds to write so many bytes and see them onto the disk."""
    buffer = os.urandom(1 << 22)
    started = time.perf_counter()
    with (folder / "floor").open("wb", buffering=0) as file:
        for _ in range(size // len(buffer)):
            file.write(buffer)
        os.fsync(file.fileno())
    took = time.perf_counter() - started
    (folder / "floor").unlink()
    return took


def by_mergekit(folder: Path, name: str) -> Took:
    """mergekit's command line."""
    _, parameters = METHODS[name]
    models = [{"model": f"./{model}", **({"parameters": parameters} if parameters else {})} for model in "ab"]
    content: dict[str, Any] = {"models": models, "merge_method": name, "dtype": "bfloat16"}
    if name in WITH_BASE:
        content["base_model"] = "./base"
    if name == "slerp":
        content |= {"base_model": "./a", "parameters": {"t": 0.4}}
    (folder / "theirs.yml").write_text(json.dumps(content))
    program = str(PROGRAMS / "mergekit-yaml")
    took = measured([program, "theirs.yml", "theirs", "--no-copy-tokenizer", "--no-write-model-card"], folder)
    shutil.rmtree(folder / "theirs")
    return took


def by_luthier(folder: Path, stages: dict[str, Any]) -> tuple[Took, int]:
    """A first run into an empty store, and the disk that it takes."""
    shutil.rmtree(folder / "store", ignore_errors=True)
    (folder / "ours.yaml").write_text(json.dumps({"luthier": 1, "stages": stages}))
    took = measured([str(PROGRAMS / "luthier"), "run", "ours.yaml", "--store", "store"], folder)
    return took, size_of(folder / "store")


def main() -> None:
    """Make the models, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--no-export", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/luthier-real-size"))
    options = parser.parse_args()
    folder: Path = options.folder
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = ["a", "b", *(["base"] if set(options.methods) & set(WITH_BASE) else [])]
    started = time.perf_counter()
    count = 0
    for seed, name in enumerate(names):
        count = real_models.make_model(folder / name, options.tokenizer, real_models.config_of(options.layers), seed)
    print(
        f"{len(names)} models of {count / 1e9:.2f} B parameters made in {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    files = {name: folder / name / "model.safetensors" for name in names}
    size = files["a"].stat().st_size
    for name in options.methods:
        used = [*"ab", *(["base"] if name in WITH_BASE else [])]
        floor = warm([files[item] for item in used]) + written(folder, size)
        theirs = by_mergekit(folder, name)
        warm([files[item] for item in used])
        stage: dict[str, Any] = {"uses": "merge", "models": ["./a", "./b"], "method": METHODS[name][0]}
        ours, disk = by_luthier(folder, {"merged": {**stage, **({"base": "./base"} if name in WITH_BASE else {})}})
        print(f"{name:<10} mergekit {theirs}   luthier {ours}, {disk / 1e9:.2f} GB on disk", flush=True)
        over = ours.seconds / floor
        print(f"{'':<10} {theirs.seconds / ours.seconds:.1f} times as fast; {over:.1f} times the floor", flush=True)
    if not options.no_export:
        # Random weights lose more by rounding than those of a model that has learned something.
        form = {"uses": "gguf", "types": ["Q4_K_M"], "max_kl": 100.0}
        export, disk = by_luthier(folder, {"file": {"uses": "export", "model": "./a", "format": form}})
        print(f"export to Q4_K_M, proven: {export}, {disk / 1e9:.2f} GB on disk", flush=True)
    diff = measured([str(PROGRAMS / "luthier"), "diff", "./a", "./b", "--store", "store"], folder)
    print(f"diff: {diff}", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
