"""How a merge is computed changes no bit of what it computes."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.api import Artifact
from luthier.merging import parts as merging_parts
from luthier.merging.api import MergePart
from luthier.merging.config import MergeConfig
from luthier.merging.engine import Engine, Settings
from luthier.merging.layout import Inputs, lay_out
from luthier.merging.reader import Weights
from luthier.merging.writer import Output
from luthier.registry import default_registry
from luthier_plugins.merge_methods import selection
from luthier_plugins.merge_methods.linear import Linear
from merged_models import NAME, merged_by, weights

WITHOUT_DATA = sorted(set(default_registry().names("merge_method")) - {"fisher", "regmean", "mergekit"})


OWN_SETTINGS = {
    "ties": {"density": 0.3},
    "sce": {"density": 0.4},
    "nuslerp": {"flatten": False},
    "model_stock": {"filter_wise": True},
    "ram": {"r": 0.5},
}


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_the_same_bits_for_any_number_of_workers_and_any_chunk(
    tmp_path: Path, models: list[Artifact], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging_parts, "BLOCK", 1000)
    registry = default_registry()
    asks: Any = registry.config_class(registry.get("merge_method", name))
    given_models = models[: 1 if asks.models == (1, 1) else 2]
    base = None if asks.base == "unused" else models[2]
    values = {"uses": name, **OWN_SETTINGS.get(name, {})}
    first = merged_by(tmp_path, given_models, base, values, workers=1, chunk=1 << 21)
    # Small chunks split most tensors among the workers, and what is split is not held in memory to select from.
    monkeypatch.setattr(selection, "IN_MEMORY", 0)

    @settings(max_examples=3, deadline=None)
    @given(st.sampled_from([1, 2, 4]), st.integers(1, 8000))
    def same(workers: int, chunk: int) -> None:
        other = merged_by(tmp_path, given_models, base, values, workers=workers, chunk=chunk)
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())

    same()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have their own priority on Linux only")
def test_workers_lower_their_own_priority_and_no_other_threads(
    tmp_path: Path, models: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    merge = Linear.merge

    def watched(self: Linear, part: MergePart) -> torch.Tensor:
        seen.add(os.getpriority(os.PRIO_PROCESS, 0))
        return merge(self, part)

    monkeypatch.setattr(Linear, "merge", watched)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    merged_by(tmp_path, models[:2], None, {"uses": "linear"}, workers=2, niceness=5)

    def from_further_back() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, before + 7))
        merged_by(tmp_path, models[:2], None, {"uses": "linear"}, workers=2, niceness=5)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(from_further_back).result()
    # No process can stand further back than 19.
    assert seen == {min(19, before + 5), min(19, before + 12)}
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_random_masks_follow_the_model_and_not_its_place(tmp_path: Path, models: list[Artifact]) -> None:
    values = {"uses": "dare_linear", "density": 0.5}
    there = merged_by(tmp_path, models[:2], models[2], values)
    back = merged_by(tmp_path, models[1::-1], models[2], values)
    for name, tensor in there.items():
        torch.testing.assert_close(tensor, back[name])
    again = merged_by(tmp_path, models[:2], models[2], values, seed=1)
    assert not torch.equal(again[NAME], there[NAME])


def test_random_masks_of_mergekit_are_the_same_for_any_number_of_workers(
    tmp_path: Path, models: list[Artifact]
) -> None:
    values = {"uses": "mergekit", "name": "dare_ties", "parameters": {"density": 0.5}}
    found = [merged_by(tmp_path, models[:2], models[2], values, workers=workers) for workers in (1, 4, 4)]
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())


def test_masks_are_those_of_the_model_and_of_the_parameter(models: list[Artifact], tmp_path: Path) -> None:
    dare = {"uses": "dare_linear", "density": 0.5}
    base = models[2]

    def kept(model: Artifact, name: str) -> torch.Tensor:
        return merged_by(tmp_path, [model], base, dare)[name] != weights(base)[name].float()

    query, key = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qo")
    masks = [kept(models[0], query), kept(models[0], key), kept(models[1], query)]
    assert torch.equal(masks[0], kept(models[0], query))
    for left, right in combinations(masks, 2):
        assert 0.4 < float((left == right).float().mean()) < 0.6, "independent of each other"


def test_whole_matrices_wait_for_each_other_where_memory_is_short(models: list[Artifact], tmp_path: Path) -> None:
    inputs = Inputs([Weights(model) for model in models[:2]], None)
    config = MergeConfig.model_validate({"models": ["a", "b"]}, context={"components": default_registry()})
    layout = lay_out(config, inputs, 0, "float32")
    lock, now, most = threading.Lock(), [0], [0]

    class Slow:
        granularity = "matrix"
        suits_gpu = None

        def merge(self, part: MergePart) -> torch.Tensor:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.01)
            with lock:
                now[0] -= 1
            return part.tensors[0]

    for memory, expected in ((1, 1), (1 << 30, 4)):
        most[0] = 0
        output = Output(Path(tempfile.mkdtemp(dir=tmp_path)), layout.tensors, 1 << 30)
        Engine(Slow(), output, Settings(4, memory=memory), lambda done, total: None).run(layout.jobs)
        output.close()
        assert most[0] == expected
