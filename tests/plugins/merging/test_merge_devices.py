"""Merging on a GPU, with the CPU as a fallback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from luthier.api import Artifact
from luthier.merging import devices, engine, gpu_parts, parts
from luthier.merging.devices import best_device, with_cpu_fallback
from luthier.merging.files import Scratch
from luthier.registry import default_registry
from luthier.testing import run_stage, tiny_dataset, tiny_model
from safetensors.torch import load_file

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CHATS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}"}]} for n in range(4)
]
BY_MATRIX: list[dict[str, Any]] = [
    {"uses": "iso_c"},
    {"uses": "tsv_m"},
    {"uses": "regmean", "data": "d"},
    {"uses": "mergekit", "name": "ties"},
    {"uses": "mergekit", "name": "dare_ties", "parameters": {"density": 0.5}},
]
BY_ENTRY: list[dict[str, Any]] = [
    {"uses": "ties", "density": 0.3},
    {"uses": "breadcrumbs", "density": 0.3, "gamma": 0.05},
    {"uses": "breadcrumbs_ties", "density": 0.3, "gamma": 0.05},
    {"uses": "dare_ties", "density": 0.3},
    {"uses": "dare_linear", "density": 0.3, "normalize": True},
    {"uses": "della", "density": 0.3, "epsilon": 0.1},
    {"uses": "della_linear", "density": 0.3, "epsilon": 0.1},
]


def test_small_matrices_are_left_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device(devices.WORTH_IT) == "cuda"
    assert best_device(devices.WORTH_IT - 1) == "cpu"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
    ],
    ids=str,
)
def test_what_does_not_fit_on_the_gpu_is_done_on_the_cpu(error: RuntimeError) -> None:
    asked: list[str] = []

    def work(device: str) -> str:
        asked.append(device)
        if device == "cuda":
            raise error
        return "done"

    assert with_cpu_fallback(work, "cuda") == "done"
    assert asked == ["cuda", "cpu"]


def test_other_errors_are_not_hidden() -> None:
    def work(device: str) -> str:
        raise RuntimeError(f"wrong on {device}")

    with pytest.raises(RuntimeError, match="wrong on cuda"):
        with_cpu_fallback(work, "cuda")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store."""
    return tmp_path


@pytest.fixture
def models(store: Path) -> list[Artifact]:
    """A base and two models."""
    return [tiny_model(store, seed=seed, dtype="float32", tied=False) for seed in range(3)]


def whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a GPU be used for small parameters and models too."""
    monkeypatch.setattr(devices, "WORTH_IT", 0)
    monkeypatch.setattr(gpu_parts, "WORTH_IT", 1)


def made(store: Path, stage: str, config: dict[str, Any], inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that a stage makes."""
    artifact = run_stage(store, stage, config, inputs=inputs)
    (file,) = artifact.path.glob("*.safetensors")
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


class There(torch.Tensor):
    """A tensor that says it were on a GPU: what a machine without one can show of the way there and back."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


@pytest.fixture
def gpu_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the engine take the CPU's memory for a GPU's from now on; the list is of what it took."""
    taken: list[int] = []

    def floats(self: object, place: int, count: int) -> torch.Tensor:
        taken.append(count)
        return torch.empty(count).as_subclass(There)

    monkeypatch.setattr(gpu_parts, "WORTH_IT", 1)
    monkeypatch.setattr(gpu_parts, "room", lambda: 1 << 30)
    monkeypatch.setattr(gpu_parts.OnGpu, "__init__", Scratch.__init__)
    monkeypatch.setattr(gpu_parts.OnGpu, "floats", floats)
    monkeypatch.setattr(gpu_parts, "PARTS", 2)
    return taken


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether tensors are the same down to the sign of a zero."""
    return all(torch.equal(other[name].view(torch.int32), tensor.view(torch.int32)) for name, tensor in one.items())


@pytest.mark.parametrize("method", BY_ENTRY, ids=lambda values: str(values["uses"]))
def test_larger_parts_that_stay_in_memory_give_the_same_bits(
    store: Path,
    models: list[Artifact],
    method: dict[str, Any],
    gpu_of_the_cpu: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config: dict[str, Any] = {"method": method, "dtype": "float32"}
    inputs: dict[str, Any] = {"models": models[1:], "base": models[0]}
    monkeypatch.setattr(parts, "BLOCK", 1 << 12)
    streamed = made(store, "merge", config, inputs)
    assert not gpu_of_the_cpu
    monkeypatch.setattr(engine, "best_device", lambda entries: "cuda")
    assert same_bits(streamed, made(store, "merge", config, inputs))
    assert gpu_of_the_cpu


def with_adapter_and_new_vocabulary(store: Path, models: list[Artifact]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A merge of what is computed on the way."""
    adapter = run_stage(store, "extract_lora", {"r": 4}, inputs={"model": models[1], "base": models[0]})
    foreign = tiny_model(store, seed=5, dtype="float32", tied=False, vocab_size=310, texts=["Zwölf Boxkämpfer"] * 9)
    return (
        {"method": BY_ENTRY[0], "dtype": "float32", "tokenizer": "union"},
        {"models": [adapter, foreign], "base": models[0]},
    )


def test_what_is_computed_on_the_way_has_the_same_bits_in_larger_parts(
    store: Path, models: list[Artifact], gpu_of_the_cpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, inputs = with_adapter_and_new_vocabulary(store, models)
    # Of 64 rows, 63 are a part: a product of one row has other bits than the same row among others.
    monkeypatch.setattr(parts, "BLOCK", 63 * 64)
    streamed = made(store, "merge", config, inputs)
    monkeypatch.setattr(engine, "best_device", lambda entries: "cuda")
    assert same_bits(streamed, made(store, "merge", config, inputs))
    assert gpu_of_the_cpu


def test_a_gpu_that_others_have_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> tuple[int, int]:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    assert gpu_parts.room() == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 20)
    assert gpu_parts.room() == int(gpu_parts.SHARE * 130)


@pytest.mark.parametrize(("name", "value"), [("room", lambda: 0), ("WORTH_IT", 1 << 40)])
def test_what_is_larger_than_the_gpu_or_not_worth_it_stays_on_the_cpu(
    store: Path,
    models: list[Artifact],
    gpu_of_the_cpu: list[int],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: Any,
) -> None:
    monkeypatch.setattr(engine, "best_device", lambda entries: "cuda")
    monkeypatch.setattr(gpu_parts, name, value)
    made(store, "merge", {"method": BY_ENTRY[0]}, {"models": models[1:], "base": models[0]})
    assert not gpu_of_the_cpu


@pytest.mark.parametrize(("name", "expected"), [("slerp", True), ("ties", True), ("dare_ties", False)])
def test_methods_of_mergekit_go_to_a_gpu_unless_they_draw_numbers(name: str, expected: bool) -> None:
    registry = default_registry()
    component = registry.get("merge_method", "mergekit")
    config = registry.config_class(component).model_validate({"name": name}, context={"components": registry})
    assert registry.impl_class(component)(config, None).suits_gpu is expected


@on_a_gpu
@pytest.mark.parametrize("method", BY_MATRIX, ids=lambda values: "-".join(map(str, list(values.values())[:2])))
def test_a_gpu_merges_as_the_cpu_does(
    store: Path, models: list[Artifact], method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config: dict[str, Any] = {"method": method, "dtype": "float32"}
    inputs: dict[str, Any] = {"models": models[1:]}
    if method["uses"] == "regmean":
        inputs["method.data"] = tiny_dataset(store, CHATS)
    else:
        inputs["base"] = models[0]
    on_cpu = made(store, "merge", config, inputs)
    whatever_the_size(monkeypatch)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    there = made(store, "merge", config, inputs)
    assert torch.cuda.max_memory_allocated() > before, "it was on the GPU"
    for name, tensor in on_cpu.items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-3, atol=2e-5)


@on_a_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", BY_ENTRY, ids=lambda values: str(values["uses"]))
def test_methods_by_entry_give_the_same_bits_on_a_gpu(
    store: Path, method: dict[str, Any], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In bfloat16 the differences to the base have few values: many are equal.
    models = [tiny_model(store, seed=seed, dtype=dtype, tied=False) for seed in range(4)]
    config: dict[str, Any] = {"method": method, "dtype": "float32", "weights": [0.7, 1.0, -0.4]}
    inputs: dict[str, Any] = {"models": models[1:], "base": models[0]}
    on_cpu = made(store, "merge", config, inputs)
    whatever_the_size(monkeypatch)
    # Several parts in a parameter, and several of the CPU's in one of the GPU's.
    monkeypatch.setattr(gpu_parts, "PARTS", 2)
    monkeypatch.setattr(parts, "BLOCK", 1 << 12)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    there = made(store, "merge", config, inputs)
    assert torch.cuda.max_memory_allocated() > before, "it was on the GPU"
    assert same_bits(on_cpu, there)


@on_a_gpu
def test_what_is_computed_on_the_way_is_the_same_on_a_gpu(
    store: Path, models: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters, and rows of a vocabulary that is new."""
    config, inputs = with_adapter_and_new_vocabulary(store, models)
    monkeypatch.setattr(parts, "BLOCK", 63 * 64)
    on_cpu = made(store, "merge", config, inputs)
    whatever_the_size(monkeypatch)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    assert same_bits(on_cpu, made(store, "merge", config, inputs))
    assert torch.cuda.max_memory_allocated() > before, "it was on the GPU"


@on_a_gpu
def test_an_adapter_comes_out_of_a_model_on_a_gpu_too(
    store: Path, models: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"model": models[1], "base": models[0]}
    on_cpu = made(store, "extract_lora", {"r": 8}, inputs)
    whatever_the_size(monkeypatch)
    there = made(store, "extract_lora", {"r": 8}, inputs)
    for name in (name for name in on_cpu if "lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(there[other] @ there[name], on_cpu[other] @ on_cpu[name], rtol=1e-3, atol=2e-5)


@on_a_gpu
@pytest.mark.parametrize(
    "method", [{"uses": "iso_c"}, {"uses": "ties", "density": 0.3}], ids=lambda values: values["uses"]
)
def test_a_gpu_without_room_leaves_the_merge_to_the_cpu(
    store: Path, models: list[Artifact], method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"method": method, "dtype": "float32"}
    inputs: dict[str, Any] = {"models": models[1:], "base": models[0]}
    on_cpu = made(store, "merge", config, inputs)
    whatever_the_size(monkeypatch)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        without_room = made(store, "merge", config, inputs)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(torch.equal(without_room[name], tensor) for name, tensor in on_cpu.items())
