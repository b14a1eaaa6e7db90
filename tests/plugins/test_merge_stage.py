"""The merge stage: what it writes, what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier.api import Artifact, ModelError
from luthier.artifacts.models import TensorHeader
from luthier.testing import run_stage, tiny_model
from luthier_plugins.merge.writer import DTYPES, StreamedFile
from safetensors.torch import load_file, save_file

shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3)


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=6), st.tuples(st.sampled_from(sorted(DTYPES)), shapes)))
def test_a_streamed_file_is_what_safetensors_reads(tmp_path_factory, tensors: dict) -> None:
    headers = {name: TensorHeader(dtype, tuple(shape), "x") for name, (dtype, shape) in tensors.items()}
    path = tmp_path_factory.mktemp("f") / "x.safetensors"
    file = StreamedFile(path, headers)
    values = {name: torch.randn(headers[name].shape).to(DTYPES[headers[name].dtype]) for name in headers}
    file.write(values[name] for name in file.order)
    found = load_file(path)
    assert set(found) == set(values)
    assert all(torch.equal(found[name], values[name]) for name in values)
    assert all(found[name].dtype == values[name].dtype for name in values)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """Two models with other weights, stored in bfloat16."""
    store = tmp_path_factory.mktemp("store")
    first, second = (tiny_model(store, seed=seed, dtype="bfloat16") for seed in (0, 1))
    return first, second


def test_the_soup_is_the_mean_in_the_dtype_of_the_first(pair: tuple[Artifact, Artifact]) -> None:
    merged = run_stage(pair[0].path.parents[1], "merge", inputs={"models": pair})
    one, two, soup = (load_file(item.path / "model.safetensors") for item in (*pair, merged))
    assert merged.facts["dtype"] == "BF16"
    for name, tensor in soup.items():
        mean = ((one[name].float() + two[name].float()) / 2).to(torch.bfloat16)
        torch.testing.assert_close(tensor, mean)


def changed(pair: tuple[Artifact, Artifact], folder: Path, change) -> Artifact:
    """The second model with other tensors."""
    shutil.copytree(pair[1].path, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Artifact.load(folder)


NAME = "model.layers.0.mlp.up_proj.weight"


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME][0, 0] = float("nan")


def without_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NAME]


def with_other_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME] = tensors[NAME][:-1].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [(with_nan, "has NaN or infinite values"), (without_one, "do not have the same tensors"),
     (with_other_shape, "the shapes differ")],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name(
    pair: tuple[Artifact, Artifact], tmp_path: Path, change, message: str
) -> None:
    spoiled = changed(pair, tmp_path / pair[1].key, change)
    with pytest.raises(ModelError) as caught:
        run_stage(pair[0].path.parents[1], "merge", inputs={"models": [pair[0], spoiled]})
    assert message in str(caught.value)
    assert NAME in str(caught.value)
