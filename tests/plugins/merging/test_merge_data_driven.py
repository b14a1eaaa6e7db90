"""Merge methods that use data, on real models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_models import make_gpt2, make_model
from luthier.api import Artifact
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import load_model, load_tokenizer
from luthier.testing import run_stage, tiny_dataset
from safetensors.torch import load_file

CHATS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(4)
]


def batches(model: Artifact) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of every row."""
    encoder = ChatEncoder(load_tokenizer(model), model.facts["stop_token_ids"])
    encoded = [item for row in CHATS for item in encoder.conversation(row["messages"])]
    return [(torch.tensor([row.input_ids]), torch.tensor([row.labels])) for row in encoded]


def test_fisher_merging_weighs_the_weights_of_experts_too(tmp_path: Path) -> None:
    store = tmp_path / "s"
    models = [
        run_stage(
            store,
            "base",
            {
                "source": str(
                    make_model(tmp_path / str(spread), "mixtral", num_hidden_layers=1, initializer_range=spread)
                )
            },
        )
        for spread in (0.02, 0.03)
    ]
    data = tiny_dataset(store, CHATS)
    config = {"method": {"uses": "fisher", "data": "d", "floor": 1e-4}, "weights": [1.0, 2.0], "dtype": "float32"}
    merged = run_stage(store, "merge", config, inputs={"models": models, "method.data": data})
    found = load_file(merged.path / "model.safetensors")
    stored = [load_file(model.path / "model.safetensors") for model in models]
    (experts,) = {name.partition("experts.")[0] for name in found if "experts." in name}
    top, bottom = torch.zeros(()), torch.zeros(())
    for model, tensors, weight in zip(models, stored, (1.0, 2.0), strict=True):
        network = load_model(model).eval()
        total = torch.zeros(())
        for ids, labels in batches(model):
            network.zero_grad()
            network(input_ids=ids, labels=labels).loss.backward()
            # The experts of a layer are one parameter there: gate and up, one above the other.
            total = total + network.model.layers[0].mlp.experts.gate_up_proj.grad.square()
        share = weight * (total[2].chunk(2)[0] / len(CHATS) + 1e-4)
        top, bottom = top + share * tensors[f"{experts}experts.2.w1.weight"].float(), bottom + share
    torch.testing.assert_close(found[f"{experts}experts.2.w1.weight"], top / bottom, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layer", ["attn.c_attn", "attn.c_proj", "mlp.c_proj"])
def test_regmean_solves_layers_that_keep_their_weights_transposed(tmp_path: Path, layer: str) -> None:
    store = tmp_path / "s"
    model = run_stage(store, "base", {"source": str(make_gpt2(tmp_path / "gpt2"))})
    data = tiny_dataset(store, CHATS)
    tuned = run_stage(store, "sft", {"steps": 3, "learning_rate": 1e-2}, inputs={"model": model, "data": [data]})
    config = {"method": {"uses": "regmean", "data": "d", "alpha": 1.0}, "dtype": "float32"}
    merged = run_stage(store, "merge", config, inputs={"models": [model, tuned], "method.data": data})
    name = f"transformer.h.1.{layer}"
    seen: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    for item in (model, tuned):
        network = load_model(item).eval()
        module = network.get_submodule(name)
        inputs: list[torch.Tensor] = []
        module.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0][0].detach()))
        with torch.no_grad():
            for ids, _ in batches(item):
                network(input_ids=ids)
        seen.append(torch.cat(inputs).double())
        weights.append(module.weight.detach().double())
    found = load_file(merged.path / "model.safetensors")[f"{name}.weight"].double()
    assert not torch.allclose(found, (weights[0] + weights[1]) / 2, atol=1e-4), "it is not an average"

    def miss(weight: torch.Tensor) -> float:
        return sum(float((rows @ weight - rows @ own).square().sum()) for rows, own in zip(seen, weights, strict=True))

    # The least squares solution, but for the little pull to the mean that settles inputs that never occur.
    least = torch.linalg.lstsq(torch.cat(seen), torch.cat([x @ w for x, w in zip(seen, weights, strict=True)])).solution
    mean = (weights[0] + weights[1]) / 2
    assert miss(found) - miss(least) < 1e-3 * (miss(mean) - miss(least))
