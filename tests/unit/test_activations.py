"""Inputs of layers as servers with 8-bit activations round them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier.modeling.activations import Kind, activations_of, round_activations, rounded
from safetensors.torch import save_file
from torch import nn


@given(st.integers(0, 2**31), st.sampled_from(["int", "float"]), st.floats(1e-4, 1e4))
def test_rounding_is_off_by_half_a_step_and_each_token_has_its_own(seed: int, kind: Kind, size: float) -> None:
    inputs = size * torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(seed))
    found = rounded(inputs, kind)
    largest = inputs.abs().amax(dim=-1, keepdim=True)
    # Floats have 3 bits after the first: half of the last is a sixteenth of the number, or of the smallest step.
    step = largest / 127.5 if kind == "int" else inputs.abs() / 8 + largest / 448 * 2**-9
    assert bool(((found - inputs).abs() <= 0.51 * step + 1e-9).all())
    torch.testing.assert_close(rounded(inputs[:, :1], kind), found[:, :1])
    torch.testing.assert_close(rounded(4 * inputs, kind), 4 * found)


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"input_activations": {"type": "int"}}},
}
TORCHAO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig"}}}
WEIGHTS_ONLY = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}


@pytest.mark.parametrize(
    ("settings", "mark", "rounds"),
    [
        (COMPRESSED, "weight_scale", True),
        (TORCHAO, "_weight_scale", True),
        (WEIGHTS_ONLY, "_weight_scale", False),
        ({"quant_method": "awq"}, "scales", False),
        (None, "weight_scale", False),
    ],
)
def test_only_quantized_layers_get_rounded_inputs(settings: object, mark: str, rounds: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    save_file({f"0.{mark}": torch.ones(4, 1), "1.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    given_to: list[torch.Tensor] = []
    for layer in model:
        layer.register_forward_hook(lambda module, inputs, output: given_to.append(inputs[0]))
    inputs = torch.tensor([[0.001, 0.5, -0.3, 1.0]])
    round_activations(model, tmp_path)
    model(inputs)
    assert torch.equal(given_to[0], inputs) is not rounds
    assert (activations_of(tmp_path) is not None) is rounds
    # The second layer is not quantized: it is given what the first one gives.
    torch.testing.assert_close(given_to[1], model[0](inputs), rtol=0, atol=0)
