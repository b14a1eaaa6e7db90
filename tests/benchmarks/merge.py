"""Merging beside mergekit, in one run: time, memory, and both as multiples of reading and writing the files.

    python tests/benchmarks/merge.py [--layers 24] [--methods linear slerp] [--times] [--folder ...]

Three models of 374 M parameters in bfloat16 (24 layers). Columns: mergekit's command line; a whole `luthier run` in
which the models are in the store and the merge is not (start, plan, merge, transformers loading the result, hashing,
committing); a process that does nothing but merge; and the floor, reading the inputs and writing the output. Then the
same at twice the size, and with many small tensors; `--times` leaves these out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], int, bool]] = {
    # ours, mergekit's parameters, models, whether there is a base
    "linear": ({"uses": "linear"}, {"weight": 1.0}, 3, False),
    "slerp": ({"uses": "slerp", "t": 0.4}, {"t": 0.4}, 2, False),
    "dare_ties": ({"uses": "dare_ties", "density": 0.5}, {"weight": 1.0, "density": 0.5}, 3, True),
    "ties": ({"uses": "ties", "density": 0.5}, {"weight": 1.0, "density": 0.5}, 3, True),
}
NAMES = ["a", "b", "c"]
WORK = """
import json, sys
from pathlib import Path
import torch
from memory import Watched
from luthier.artifacts.store import Store
from luthier.registry import default_registry
from luthier.merging.config import MergeConfig
from luthier.merging.engine import Engine, Settings
from luthier.merging.layout import Inputs, lay_out
from luthier.merging.reader import Weights
from luthier.merging.writer import Output

store, out, values, models, base, workers = json.loads(sys.argv[1])
registry = default_registry()
config = MergeConfig.model_validate({"models": models, "method": values, **({"base": base} if base else {})},
                                    context={"components": registry})
method = registry.impl_class(config.method.component)(config.method.config, None)
made = {artifact.manifest["stage"]: artifact for artifact in Store(Path(store))}

with Watched() as watched:
    inputs = Inputs([Weights(made[name]) for name in models], Weights(made[base]) if base else None)
    layout = lay_out(config, inputs, 0, None)
    output = Output(Path(out), layout.tensors, 5_000_000_000)
    Engine(method, output, Settings(workers), lambda done, total: None).run(layout.jobs)
    output.close()
print(json.dumps({"seconds": watched.seconds, "memory": watched.memory}))
"""


def make_models(folder: Path, layers: int) -> None:
    """A base and three models near it."""
    from importlib.resources import files

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32000,
        max_position_embeddings=512,
    )
    model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nano = Path(str(files("luthier"))) / "models" / "nano-base"
    for place, name in enumerate(["base", *NAMES]):
        generator = torch.Generator().manual_seed(place)
        if place:
            model.load_state_dict(
                {
                    key: (tensor.float() + 0.002 * torch.randn(tensor.shape, generator=generator)).to(torch.bfloat16)
                    for key, tensor in base.items()
                }
            )
        model.save_pretrained(folder / name)
        for text in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(nano / text, folder / name / text)


def recipe_of(layers: int) -> str:
    """Every model as a stage, and every merge."""
    stages: dict[str, Any] = {name: {"uses": "base", "source": f"./{layers}/{name}"} for name in ["base", *NAMES]}
    for name, (ours, _, count, has_base) in METHODS.items():
        stages[f"by-{name}"] = {
            "uses": "merge",
            "models": NAMES[:count],
            "method": ours,
            **({"base": "base"} if has_base else {}),
        }
    return json.dumps({"luthier": 1, "name": f"bench{layers}", "stages": stages})


def timed(command: list[str], folder: Path) -> float:
    """The seconds that a whole process takes."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    took = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return took


def by_mergekit(folder: Path, layers: int, name: str) -> float:
    """mergekit's command line."""
    _, parameters, count, has_base = METHODS[name]
    models = [{"model": f"./{layers}/{model}", "parameters": parameters} for model in NAMES[:count]]
    content: dict[str, Any] = {"models": models, "merge_method": name, "dtype": "bfloat16"}
    if has_base:
        content["base_model"] = f"./{layers}/base"
    if name == "slerp":
        content |= {
            "base_model": f"./{layers}/a",
            "parameters": parameters,
            "models": [{"model": item["model"]} for item in models],
        }
    file = folder / f"{name}.yml"
    file.write_text(json.dumps(content))
    out = folder / "theirs"
    program = str(Path(sys.executable).parent / "mergekit-yaml")
    took = timed([program, file.name, str(out), "--no-copy-tokenizer", "--no-write-model-card"], folder)
    shutil.rmtree(out)
    return took


def by_luthier(folder: Path, layers: int, name: str) -> float:
    """A whole run whose merge is not in the store yet."""
    from luthier import plan
    from luthier.artifacts.store import Store

    store = Store.at(folder / "store")
    made = plan(folder / f"bench{layers}.yaml", store).nodes[f"by-{name}"]
    shutil.rmtree(store.folder(made.key), ignore_errors=True)
    program = str(Path(sys.executable).parent / "luthier")
    return timed([program, "run", f"bench{layers}.yaml", "--store", "store", "--only", f"by-{name}"], folder)


def by_engine(folder: Path, name: str) -> dict[str, float]:
    """Merging alone, and its anonymous memory above that of the imports, in MiB."""
    from luthier.running.slots import ALLOCATOR

    ours, _, count, has_base = METHODS[name]
    out = folder / "engine"
    out.mkdir(exist_ok=True)
    arguments = [
        str(folder / "store"),
        str(out),
        ours,
        NAMES[:count],
        "base" if has_base else None,
        len(os.sched_getaffinity(0)),
    ]
    done = subprocess.run(
        [sys.executable, "-c", WORK, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={**ALLOCATOR, **os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    shutil.rmtree(out)
    return json.loads(done.stdout)


def floor(folder: Path, layers: int, name: str) -> float:
    """Reading the inputs and writing as much as the output, and nothing else."""
    _, _, count, has_base = METHODS[name]
    buffer = bytearray(1 << 22)
    started = time.perf_counter()
    for model in [*NAMES[:count], *(["base"] if has_base else [])]:
        with (folder / str(layers) / model / "model.safetensors").open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    size = (folder / str(layers) / "a" / "model.safetensors").stat().st_size
    with (folder / "floor").open("wb", buffering=0) as file:
        for _ in range(size // len(buffer)):
            file.write(buffer)
    took = time.perf_counter() - started
    (folder / "floor").unlink()
    return took


def many_tensors(folder: Path) -> dict[int, float]:
    """Seconds to merge models of so many small tensors."""
    import torch
    from luthier.artifacts.tensors import safetensors_header
    from luthier.merging.api import MergedParameter
    from luthier.merging.engine import Engine, Settings
    from luthier.merging.files import Files
    from luthier.merging.jobs import Operand, TensorJob
    from luthier.merging.writer import Described, Output
    from luthier.registry import default_registry
    from safetensors.torch import save_file

    class Plain:
        """A file of tensors that belongs to no model."""

        def __init__(self, path: Path) -> None:
            self.headers = safetensors_header(path)
            self.files = Files(path.parent, self.headers)

        def read(self, name: str, start: int, out: Any, scratch: Any) -> None:
            self.files.floats(name, start, out.view(-1), scratch)

    registry = default_registry()
    component = registry.get("merge_method", "linear")
    method = registry.impl_class(component)(registry.config_class(component)(), None)
    found: dict[int, float] = {}
    for count in (9_000, 18_000, 36_000):
        place = folder / f"many-{count}"
        place.mkdir()
        save_file({f"t{number}": torch.ones(16, 16) for number in range(count)}, place / "x.safetensors")
        plain: Any = Plain(place / "x.safetensors")
        tensors = {name: Described("F32", header.shape) for name, header in plain.headers.items()}
        jobs = [
            TensorJob(MergedParameter(name, about.shape, 0.0, 2), [Operand(plain, name)] * 2, None, [1.0, 1.0])
            for name, about in tensors.items()
        ]
        started = time.perf_counter()
        output = Output(place, tensors, 1 << 40)
        Engine(method, output, Settings(2), lambda done, total: None).run(jobs)
        output.close()
        found[count] = time.perf_counter() - started
        shutil.rmtree(place)
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/luthier-merge-benchmark"))
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # mergekit's modules came with their bytecode; ours keep theirs from the first run on.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    double = 2 * options.layers + 4
    program = str(Path(sys.executable).parent / "luthier")
    for layers in (options.layers,) if options.times else (options.layers, double):
        make_models(options.folder / str(layers), layers)
        (options.folder / f"bench{layers}.yaml").write_text(recipe_of(layers))
    only = [word for name in ["base", *NAMES] for word in ("--only", name)]
    timed([program, "run", f"bench{options.layers}.yaml", "--store", "store", *only], options.folder)
    print(
        f"{'method':<10} {'mergekit':>9} {'luthier run':>12} {'merge alone':>12} {'floor':>7} "
        f"{'run: times as fast':>19} {'alone':>6} {'over the floor: mergekit':>25} {'run':>5} {'alone':>6} "
        f"{'MiB':>5}"
    )
    for name in options.methods:
        rounds: list[Any] = [
            (
                floor(options.folder, options.layers, name),
                by_mergekit(options.folder, options.layers, name),
                by_luthier(options.folder, options.layers, name),
                by_engine(options.folder, name),
            )
            for _ in range(options.repeats)
        ]
        least, theirs, run_ = (statistics.median(found[place] for found in rounds) for place in range(3))
        alone = statistics.median(found[3]["seconds"] for found in rounds)
        memory = max(found[3]["memory"] for found in rounds)
        print(
            f"{name:<10} {theirs:8.1f}s {run_:11.1f}s {alone:11.1f}s {least:6.1f}s {theirs / run_:19.1f} "
            f"{theirs / alone:6.1f} {theirs / least:25.1f} {run_ / least:5.1f} {alone / least:6.1f} {memory:5.0f}",
            flush=True,
        )
    if not options.times:
        shutil.rmtree(options.folder / "store")
        timed([program, "run", f"bench{double}.yaml", "--store", "store", *only], options.folder)
        for name in options.methods:
            found = by_engine(options.folder, name)
            print(f"{name:<10} at {double} layers: {found['seconds']:.1f} s, {found['memory']:.0f} MiB", flush=True)
        for count, seconds in many_tensors(options.folder).items():
            print(f"{count:>6} tensors: {seconds:.2f} s, {seconds / count * 1e6:.0f} us each", flush=True)
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
