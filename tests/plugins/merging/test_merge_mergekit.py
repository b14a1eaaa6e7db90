"""Merge methods against mergekit's own, tensor by tensor, on real models of several architectures.

Tolerances are those of float32: mergekit adds up in float32, Luthier takes inner products in float64. Methods with
random masks are given the same masks, and are compared without rescaling: mergekit rescales so that the sum of
magnitudes stays, Luthier, as the papers say, so that the expectation stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import make_model
from luthier.api import ModelError
from luthier.merging.parts import Noise, merge_tensors
from luthier.registry import default_registry
from luthier.testing import run_stage, tiny_model
from luthier_plugins.merge_methods.config import MergekitConfig
from luthier_plugins.merge_methods.mergekit import Mergekit
from mergekit.merge_methods import merge_tensors as theirs
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def architectures() -> Iterator[tuple[str, Any]]:
    """Untied, tied, with biases, with experts."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    yield "llama", LlamaForCausalLM(LlamaConfig(**SIZES))
    yield "tied", LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    yield "biases", Qwen2ForCausalLM(Qwen2Config(**SIZES))
    yield "experts", MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


@pytest.fixture(scope="module", params=["llama", "tied", "biases", "experts"])
def family(request: pytest.FixtureRequest) -> dict[str, list[Tensor]]:
    """Each parameter of a base and of three models near it."""
    torch.manual_seed(0)
    model = dict(architectures())[request.param]
    generator = torch.Generator().manual_seed(1)
    found: dict[str, list[Tensor]] = {}
    for name, tensor in model.state_dict().items():
        base = tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        found[name] = [base, *(base + 0.01 * torch.randn(tensor.shape, generator=generator) for _ in range(3))]
    return found


def ours(name: str, tensors: list[Tensor], weights: list[float] | None, base: Tensor | None, values: dict) -> Tensor:
    """What Luthier's method makes of it."""
    registry = default_registry()
    component = registry.get("merge_method", name)
    config = registry.config_class(component).model_validate(values)
    return merge_tensors(registry.impl_class(component)(config, None), tensors, weights, base)


WEIGHTS = [1.0, 0.5, 2.0]
WEIGHT = {1: 1.0, 2: 0.5, 3: 2.0}
CASES = [
    # ours, its parameters, weights, models, theirs, its parameters, tolerance
    ("linear", {}, WEIGHTS, 3, "linear", {"weight": {0: 1.0, 1: 0.5, 2: 2.0}}, 1e-6),
    ("slerp", {"t": 0.3}, None, 2, "slerp", {"t": 0.3}, 1e-6),
    ("nuslerp", {}, [0.4, 0.6], 2, "nuslerp", {"weight": {1: 0.4, 2: 0.6}}, 1e-5),
    (
        "nuslerp",
        {"flatten": False},
        [0.4, 0.6],
        2,
        "nuslerp",
        {"weight": {1: 0.4, 2: 0.6}, "nuslerp_flatten": False},
        1e-5,
    ),
    ("multislerp", {}, WEIGHTS, 3, "multislerp", {"weight": WEIGHT}, 1e-5),
    ("karcher", {}, None, 3, "karcher", {}, 1e-5),
    ("task_arithmetic", {"scale": 0.7}, WEIGHTS, 3, "task_arithmetic", {"weight": WEIGHT, "lambda": 0.7}, 1e-6),
    (
        "task_arithmetic",
        {"normalize": True},
        WEIGHTS,
        3,
        "task_arithmetic",
        {"weight": WEIGHT, "normalize": True},
        1e-6,
    ),
    ("ties", {"density": 0.5}, WEIGHTS, 3, "ties", {"weight": WEIGHT, "density": 0.5}, 1e-6),
    (
        "breadcrumbs",
        {"density": 0.5, "gamma": 0.125},
        WEIGHTS,
        3,
        "breadcrumbs",
        {"weight": WEIGHT, "density": 0.5, "gamma": 0.125},
        1e-6,
    ),
    (
        "breadcrumbs_ties",
        {"density": 0.5, "gamma": 0.125},
        WEIGHTS,
        3,
        "breadcrumbs_ties",
        {"weight": WEIGHT, "density": 0.5, "gamma": 0.125},
        1e-6,
    ),
    ("model_stock", {}, None, 3, "model_stock", {}, 1e-5),
    ("model_stock", {"filter_wise": True}, None, 3, "model_stock", {"filter_wise": True}, 1e-4),
    ("sce", {}, None, 3, "sce", {}, 1e-5),
    ("sce", {"density": 0.5}, None, 3, "sce", {"select_topk": 0.5}, 1e-5),
    ("nearswap", {"t": 0.005}, None, 1, "nearswap", {"t": 0.005}, 1e-6),
    ("arcee_fusion", {}, None, 1, "arcee_fusion", {}, 1e-6),
    ("ram", {"threshold": 0.01}, None, 3, "ram", {"epsilon": 0.01}, 1e-6),
    (
        "ram",
        {"threshold": 0.01, "r": 0.1, "alpha": 0.2},
        None,
        3,
        "ramplus_tl",
        {"epsilon": 0.01, "r": 0.1, "alpha": 0.2},
        1e-6,
    ),
    ("passthrough", {"scale": 0.5}, None, 1, "passthrough", {"scale": 0.5}, 0.0),
]
WITHOUT_BASE = ("linear", "karcher", "passthrough", "slerp")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{len(case[1])}")
def test_every_parameter_equals_mergekit(family: dict[str, list[Tensor]], case: tuple) -> None:
    name, values, weights, count, their_name, parameters, tolerance = case
    for parameter, (base, *models) in family.items():
        given = [models[0], models[1], models[2]][:count]
        ancestor = None if name in WITHOUT_BASE else base
        merged = ours(name, given, weights, ancestor, values)
        inputs = [*([] if ancestor is None else [base]), *given]
        expected = theirs(
            inputs, their_name, parameters=parameters, base_index=0 if ancestor is not None or name == "slerp" else None
        )
        off = float((merged - expected).abs().max())
        assert torch.allclose(merged, expected, rtol=tolerance * 10, atol=tolerance), f"{parameter} is off by {off}"


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("normalize", [False, True])
def test_with_the_same_random_masks_every_parameter_equals_mergekit(
    monkeypatch: pytest.MonkeyPatch, family: dict[str, list[Tensor]], name: str, normalize: bool
) -> None:
    values = {"density": 0.6, "rescale": False, "normalize": normalize}
    registry = default_registry()
    component = registry.get("merge_method", name)
    method = registry.impl_class(component)(registry.config_class(component).model_validate(values), None)

    def expected(noise: Noise, tensors: list[Tensor], start: int = 0) -> Tensor:
        turn = iter(range(3))

        def bernoulli(chance: Tensor) -> Tensor:
            drawn = noise(next(turn), start, chance.numel()).view(chance.shape)
            return (drawn < chance).to(chance.dtype)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "bernoulli", bernoulli)
            return theirs(tensors, name, parameters={"weight": WEIGHT, **values}, base_index=0)

    for parameter, (base, *models) in family.items():
        noise = Noise(5, ["a", "b", "c"], parameter)
        if name.startswith("della") and base.dim() > 2:
            # mergekit ranks the entries of stacked experts along the second dimension, which are the columns of each
            # expert; of a matrix, as the paper says, those of a row. Luthier ranks rows in both.
            there = torch.stack(
                [
                    expected(noise, [tensor[place] for tensor in (base, *models)], place * base[0].numel())
                    for place in range(len(base))
                ]
            )
        else:
            there = expected(noise, [base, *models])
        merged = merge_tensors(method, models, WEIGHTS, base, noise=noise)
        off = float((merged - there).abs().max())
        assert torch.allclose(merged, there, rtol=1e-5, atol=1e-6), f"{parameter} is off by {off}"


def test_mergekit_as_a_back_end_gives_what_mergekit_gives() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(8, 6, generator=generator)
    models = [base + torch.randn(8, 6, generator=generator) for _ in range(3)]
    config = MergekitConfig(name="ties", parameters={"density": {"per_model": [0.3, 0.5, 0.9]}})
    before = [model.clone() for model in models]
    merged = merge_tensors(Mergekit(config, None), models, WEIGHTS, base)
    parameters = {"weight": WEIGHT, "density": {1: 0.3, 2: 0.5, 3: 0.9}}
    torch.testing.assert_close(merged, theirs([base, *models], "ties", parameters=parameters, base_index=0))
    assert all(torch.equal(old, new) for old, new in zip(before, models, strict=True))


def test_random_masks_come_from_the_recipe_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(8, 6, generator=generator)
    models = [base + torch.randn(8, 6, generator=generator) for _ in range(2)]
    config = MergekitConfig(name="dare_ties", parameters={"density": 0.5}, seed=4)
    torch.manual_seed(1)
    first = merge_tensors(Mergekit(config, None), models, base=base)
    torch.manual_seed(2)
    assert torch.equal(merge_tensors(Mergekit(config, None), models, base=base), first)
    other = Mergekit(config.model_copy(update={"seed": 9}), None)
    assert not torch.equal(merge_tensors(other, models, base=base), first)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "tiess"}, "did you mean 'ties'"),
        ({"name": "ties", "parameters": {"densty": 1}}, "density"),
        ({"name": "ties", "parameters": {"density": {"a": 1}}}, "a list of numbers"),
    ],
)
def test_what_mergekit_does_not_have_is_named(values: dict, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        Mergekit(MergekitConfig(**values), None)
    assert message in str(caught.value)


def test_whole_models_merge_through_mergekit(tmp_path: Path) -> None:
    base, one, two = (tiny_model(tmp_path, seed=seed) for seed in range(3))
    config = {"method": {"uses": "mergekit", "name": "della", "parameters": {"density": 0.7, "epsilon": 0.1}}}
    merged = run_stage(tmp_path, "merge", config, inputs={"models": [one, two], "base": base})
    assert merged.facts["tensors"] == base.facts["tensors"]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_mixture_has_mergekits_tensors_and_settings(name: str, tmp_path: Path) -> None:
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    folders = [make_model(tmp_path / str(spread), name, initializer_range=spread) for spread in (0.02, 0.03)]
    content = {
        "base_model": str(folders[0]),
        "experts": [{"source_model": str(folder)} for folder in folders],
        "gate_mode": "random",
        "experts_per_token": 1,
    }
    build(MoEMergeConfig.model_validate(content), str(tmp_path / "theirs"), MergeOptions(copy_tokenizer=False))
    dense = [run_stage(tmp_path / "s", "base", {"source": str(folder)}) for folder in folders]
    config = {"router": "random", "experts": [{}, {}], "experts_per_token": 1}
    inputs = {"base": dense[0], **{f"experts.{place}.model": model for place, model in enumerate(dense)}}
    mixture = run_stage(tmp_path / "s", "moe", config, inputs=inputs)
    # Experts are apart in our files, as in those of the models that people know; mergekit's are stacked.
    found, expected = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (mixture.path, tmp_path / "theirs")
    )
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert tensor.shape == found[key].shape
        assert key.endswith(".gate.weight") or torch.equal(tensor, found[key]), key
    mine, other = (AutoConfig.from_pretrained(folder).to_dict() for folder in (mixture.path, tmp_path / "theirs"))
    said = (
        "architectures",
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
        "head_dim",
        "rope_parameters",
        "sliding_window",
        "tie_word_embeddings",
    )
    assert {key: mine.get(key) for key in said} == {key: other.get(key) for key in said}


def test_masks_of_mergekits_methods_hang_on_every_model_and_on_the_parameter() -> None:
    generator = torch.Generator().manual_seed(0)
    base, *models = (torch.randn(16, 16, generator=generator) for _ in range(3))
    config = MergekitConfig.model_validate({"name": "dare_linear", "parameters": {"density": 0.5, "lambda": 1.0}})
    method = Mergekit(config, None)

    def mask(contents: list[str], name: str) -> Tensor:
        noise = Noise(0, contents, name)
        return merge_tensors(method, models, [1.0, 0.0], base, name=name, noise=noise) != base

    first = mask(["a", "b"], "w")
    assert torch.equal(first, mask(["a", "b"], "w"))
    for other in (mask(["a", "c"], "w"), mask(["c", "b"], "w"), mask(["a", "b"], "v")):
        assert 0.3 < float((first == other).float().mean()) < 0.7
