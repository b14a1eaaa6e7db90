"""AWQ, GPTQ, INT8, FP8 and NF4: packed, read back, compared with the model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from gguf_models import make_model
from hypothesis import given
from hypothesis import strategies as st
from luthier import plan, run
from luthier.api import Artifact, DataError, ModelError, PluginError, StageError, ToolEnvironment
from luthier.artifacts.tensors import tensor_headers
from luthier.cli.doctor import doctor_command
from luthier.modeling.loading import load_client, load_model
from luthier.modeling.quantized import Grouped, from_awq, from_gptq, read_floats, to_awq, to_gptq
from luthier.modeling.streamed import Streamed
from luthier.serving.environments import install, is_ready, run_script
from luthier.testing import run_stage, tiny_dataset, tiny_model
from luthier_plugins.quantizers.rounding import Grid, round_on_data, to_nearest, with_feedback
from luthier_plugins.quantizers.tools import AUTO_ROUND, TORCHAO
from safetensors.torch import load_file, save_file

TEXT = ["Where is the letter?", "The letter is in the drawer.", "12 geese, 34 ducks", "Größe naïve"] * 8


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model that has learned something, so that its inputs are not noise."""
    store = tmp_path_factory.mktemp("store")
    model = tiny_model(store, texts=TEXT, hidden_size=128, intermediate_size=256, layers=3)
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in TEXT]
    data = tiny_dataset(store, [{"messages": messages} for messages in turns])
    config = {"steps": 60, "learning_rate": 3e-3}
    return run_stage(store, "sft", config, inputs={"model": model, "data": [data]})


def exported(model: Artifact, quantize: dict[str, Any] | str, **more: Any) -> Artifact:
    """The model as a quantized folder."""
    config = {"format": {"uses": "hf", "quantize": quantize, **more}}
    return run_stage(model.path.parents[1], "export", config, inputs={"model": model})


@given(st.sampled_from([4, 8]), st.integers(0, 2**31), st.booleans())
def test_packing_loses_nothing(bits: int, seed: int, gptq: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = bits if gptq else 4
    values = torch.randint(0, 1 << bits, (16, 64), generator=generator, dtype=torch.int32)
    scales = torch.rand(16, 2, generator=generator).half()
    zeros = torch.randint(0, 1 << bits, (16, 2), generator=generator, dtype=torch.int32)
    matrix = Grouped(values, scales, zeros, bits)
    found = from_gptq(to_gptq(matrix), bits) if gptq else from_awq(to_awq(matrix), bits)
    assert torch.equal(found.values, values)
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.zeros, zeros)


@given(st.integers(0, 2**31), st.booleans(), st.floats(1e-3, 10))
def test_rounding_to_nearest_is_off_by_half_a_step_at_most(seed: int, symmetric: bool, size: float) -> None:
    weight = size * torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    grid = Grid(4, 32, symmetric)
    found = to_nearest(weight, grid)
    step = found.scales.float().repeat_interleave(32, dim=1)
    # The largest weight of a symmetric group may lie half a step beyond the last whole number.
    assert bool(((found.floats() - weight).abs() <= step * (1.01 if symmetric else 0.51) + 1e-6).all())


def test_feedback_loses_less_of_the_outputs_than_rounding_to_nearest() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(512, 128) @ torch.randn(128, 128)
    weight = torch.randn(64, 128)
    grid = Grid(4, 32, symmetric=False)
    right = inputs @ weight.T
    by_feedback = with_feedback(weight, inputs.T @ inputs, grid).floats()
    by_nearest = to_nearest(weight, grid).floats()
    assert (inputs @ by_feedback.T - right).norm() < 0.7 * (inputs @ by_nearest.T - right).norm()


@pytest.mark.parametrize("method", ["awq", "gptq", "int8", "fp8", "nf4"])
def test_a_quantized_folder_behaves_like_the_model(method: str, tuned: Artifact) -> None:
    export = exported(tuned, {"uses": method, "largest_kl": 0.5})
    facts = export.facts
    assert facts["layers"] == 21
    assert 0 < facts["kl"] < (0.5 if method in ("awq", "gptq", "nf4") else 0.02)
    assert facts["parameters"] == tuned.facts["parameters"]
    assert facts["perplexity"] == pytest.approx(facts["reference_perplexity"], rel=0.6)
    config = json.loads((export.path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == {
        "int8": "compressed-tensors",
        "fp8": "compressed-tensors",
        "nf4": "bitsandbytes",
    }.get(method, method)
    if method in ("awq", "gptq"):
        assert facts["calibration"]["tokens"] > 100
        assert len(facts["calibration"]["sha256"]) == 64
        assert config["torch_dtype"] == "float16"


def test_calibrated_rounding_is_nearer_to_the_model(tuned: Artifact) -> None:
    options = {"uses": "awq", "group_size": 64, "largest_kl": 5.0}
    with_data = exported(tuned, options).facts["kl"]
    without = exported(tuned, {**options, "rounding": "nearest"}).facts["kl"]
    assert with_data < without


def test_layers_are_rounded_one_by_one_on_what_the_rounded_ones_before_them_make(tuned: Artifact) -> None:
    blocks = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], list(range(30, 60))]
    grid = Grid(4, 32, symmetric=False)
    names = [name for name in tensor_headers(tuned.path) if ".layers." in name and name.endswith("_proj.weight")]
    found: dict[str, Grouped] = {}
    told: list[tuple[int, int]] = []
    streamed = Streamed(tuned.path)
    round_on_data(streamed, names, blocks, grid, found.__setitem__, lambda done, total: told.append((done, total)))
    assert told == [(done, len(names)) for done in range(1, len(names) + 1)]
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    # The same by hand, with the whole model in memory.
    whole = load_model(tuned).eval()
    for layer in range(3):
        mine = [name for name in names if f".layers.{layer}." in name]
        sums: dict[str, torch.Tensor] = {}

        def add(name: str, sums: dict[str, torch.Tensor] = sums) -> Callable[..., None]:
            def hook(module: object, inputs: tuple[torch.Tensor, ...]) -> None:
                seen = inputs[0].reshape(-1, inputs[0].shape[-1])
                sums[name] = sums.get(name, torch.zeros(seen.shape[-1], seen.shape[-1])) + seen.T @ seen

            return hook

        modules = {name: whole.get_submodule(name.removesuffix(".weight")) for name in mine}
        handles = [module.register_forward_pre_hook(add(name)) for name, module in modules.items()]
        with torch.no_grad():
            for block in blocks:
                whole(torch.tensor([block]))
        for handle in handles:
            handle.remove()
        for name in mine:
            right = with_feedback(modules[name].weight.detach(), sums[name], grid)
            modules[name].weight.data.copy_(right.floats())
            # Sums of other order round a few weights otherwise.
            assert float((found[name].values == right.values).float().mean()) > 0.99
            torch.testing.assert_close(found[name].scales, right.scales)


def test_the_layout_is_autoawqs(tuned: Artifact) -> None:
    export = exported(tuned, {"uses": "awq", "rounding": "nearest", "largest_kl": 5.0})
    tensors = load_file(export.path / "model.safetensors")
    stem = "model.layers.1.mlp.down_proj"
    right = load_file(tuned.path / "model.safetensors")[f"{stem}.weight"].float()
    assert tensors[f"{stem}.qweight"].shape == (256, 128 // 8)
    assert tensors[f"{stem}.qzeros"].shape == (256 // 128, 128 // 8)
    assert tensors[f"{stem}.scales"].dtype == torch.float16
    # Taken apart by hand: row 5 of the outputs is in nibble 6 of the first integer of each input.
    place = [0, 4, 1, 5, 2, 6, 3, 7][5]
    whole = (tensors[f"{stem}.qweight"][:, 0] >> (4 * place)) & 15
    zero = (tensors[f"{stem}.qzeros"][:, 0] >> (4 * place)) & 15
    scale = tensors[f"{stem}.scales"][:, 5].float()
    row = (whole.view(2, 128) - zero[:, None]).float() * scale[:, None]
    torch.testing.assert_close(row.flatten(), right[5], atol=float(scale.max()) * 0.51, rtol=0)


def test_layers_can_be_skipped(tuned: Artifact) -> None:
    export = exported(tuned, {"uses": "gptq", "skip": [r"layers\.0\.", "down_proj"], "largest_kl": 1.0})
    headers = tensor_headers(export.path)
    assert "model.layers.0.mlp.up_proj.weight" in headers
    assert "model.layers.1.mlp.down_proj.weight" in headers
    assert "model.layers.1.mlp.up_proj.qweight" in headers
    assert export.facts["layers"] == 12
    named = export.facts["quantization_config"]["dynamic"]
    assert "-:^model.layers.2.mlp.down_proj$" in named
    with pytest.raises(ModelError, match="skip all of them, or none"):
        exported(tuned, {"uses": "gptq", "skip": ["k_proj"]})
    with pytest.raises(ModelError, match="'nowhere', which matches no linear layer"):
        exported(tuned, {"uses": "gptq", "skip": ["nowhere"]})


def test_experts_are_quantized_and_routers_are_not(tmp_path: Path) -> None:
    base = run_stage(tmp_path / "s", "base", {"source": str(make_model(tmp_path / "model", "mixtral"))})
    export = exported(base, {"uses": "awq", "rounding": "nearest"}, max_kl=5.0)
    headers = tensor_headers(export.path)
    assert "model.layers.0.block_sparse_moe.experts.7.w2.qweight" in headers
    assert "model.layers.0.block_sparse_moe.gate.weight" in headers
    assert export.facts["layers"] == 3 * (4 + 8 * 3)
    assert "model.layers.2.block_sparse_moe.gate" in export.facts["quantization_config"]["modules_to_not_convert"]
    # bitsandbytes leaves stacked experts alone.
    with pytest.raises(ModelError, match="72 layers were not quantized"):
        exported(base, "nf4")


def test_sizes_that_groups_do_not_divide_are_refused_early(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, hidden_size=96, intermediate_size=96)
    with pytest.raises(ModelError, match=r"14 layers cannot be quantized: their inputs are not a multiple of 128"):
        exported(model, "awq")


def test_a_layer_that_was_left_out_is_an_error(tuned: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "luthier_plugins.quantizers.grouped.Awq.layout",
        staticmethod(lambda matrix: {"weight": matrix.floats().half()}),
    )
    with pytest.raises(ModelError, match="21 layers were not quantized"):
        exported(tuned, {"uses": "awq", "rounding": "nearest"})


def test_what_is_far_off_is_refused_with_what_to_try(tuned: Artifact) -> None:
    with pytest.raises(ModelError, match="choose more bits or smaller groups"):
        exported(tuned, {"uses": "awq", "largest_kl": 1e-9})


def test_rounding_on_data_without_data_is_refused(tmp_path: Path) -> None:
    made = tiny_model(tmp_path / "elsewhere", hidden_size=128)
    model = run_stage(tmp_path, "base", {"source": str(made.path)})
    with pytest.raises(DataError, match=r"set `rounding: nearest`"):
        exported(model, "awq")


def test_quantized_sources_are_refused(tuned: Artifact, tmp_path: Path) -> None:
    export = exported(tuned, "int8")
    model = run_stage(tmp_path / "s", "base", {"source": str(export.path)})
    for form in ("gguf", {"uses": "hf", "quantize": "int8"}, {"uses": "hf", "dtype": "bfloat16"}):
        with pytest.raises(ModelError, match="quantized already"):
            run_stage(tmp_path / "s", "export", {"format": form}, inputs={"model": model})


READERS = {
    "compressed": ("torch==2.13.0", "transformers==5.23.0", "compressed-tensors==0.20.0", "accelerate"),
    "gptqmodel": ("torch==2.13.0", "transformers==5.23.0", "accelerate", "optimum", "gptqmodel==7.6.0"),
}
"""Environments in which transformers loads a layout, and what they have."""
TOOLS = {tool.name: tool for tool in (AUTO_ROUND, TORCHAO)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("compressed", {"uses": "int8"}),
        ("compressed", {"uses": "fp8"}),
        ("gptqmodel", {"uses": "awq"}),
        ("gptqmodel", {"uses": "gptq"}),
        ("gptqmodel", {"uses": "gptq", "bits": 8, "symmetric": False}),
        ("torchao", {"uses": "torchao"}),
        ("torchao", {"uses": "torchao", "type": "int8-dynamic"}),
        ("torchao", {"uses": "torchao", "type": "float8"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_transformers_reads_the_layouts_as_we_do(
    where: str,
    options: dict[str, Any],
    tuned: Artifact,
    environment: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    python = environment(where, *(READERS.get(where) or TOOLS[where].packages))
    monkeypatch.setattr("luthier.serving.environments.folder_of", lambda tool: python.parents[1])
    export = exported(tuned, {**options, "skip": ["layers.0.mlp.down_proj"]})
    assert export.facts["layers"] == 20
    script = (
        "import sys, json, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map='cpu')\n"
        "print(json.dumps(model(torch.tensor([[5, 6, 7, 8]])).logits[0].float().tolist()))\n"
    )
    done = subprocess.run([str(python), "-c", script, str(export.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = load_client(Artifact(export.key, "model", export.path, export.facts, {}), export.path.parent / "f")
    with torch.no_grad():
        right = ours(torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)
    found = torch.tensor(json.loads(done.stdout.strip().rpartition("\n")[2])).log_softmax(-1)
    assert float((right.exp() * (right - found)).sum(-1).mean()) < 2e-4


def test_torchaos_tensors_are_read(tmp_path: Path) -> None:
    whole = torch.tensor([[-128, 0, 127], [3, 4, 5]], dtype=torch.int8)
    scale, zero = torch.tensor([[0.5], [2.0]]), torch.tensor([[0], [4]], dtype=torch.int8)
    stem = "model.layers.0.mlp.up_proj"
    tensors = {
        f"{stem}._weight_qdata": whole,
        f"{stem}._weight_scale": scale,
        f"{stem}._weight_zero_point": zero,
        "model.norm.weight": torch.ones(3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
    found = dict(read_floats(tmp_path))
    assert set(found) == {f"{stem}.weight", "model.norm.weight"}
    assert found[f"{stem}.weight"].tolist() == [[-64.0, 0.0, 63.5], [-2.0, 0.0, 2.0]]
    save_file(tensors | {f"{stem}._weight_scale": scale.expand(2, 3).contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="scales for groups of inputs"):
        dict(read_floats(tmp_path))


def test_weights_are_read_back_whole(tuned: Artifact) -> None:
    export = exported(tuned, "int8")
    right = load_file(tuned.path / "model.safetensors")
    found = dict(read_floats(export.path))
    assert set(found) == set(right)
    for name, tensor in right.items():
        assert float((found[name] - tensor.float()).abs().max()) < 0.02 * float(tensor.float().abs().max())


def test_a_tool_that_is_not_installed_is_named_with_the_command_that_does(
    tuned: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LUTHIER_ENVIRONMENTS", str(tmp_path))
    with pytest.raises(PluginError, match="luthier doctor --install auto-round"):
        exported(tuned, {"uses": "awq", "rounding": "auto-round"})
    shown = CliRunner().invoke(doctor_command, ["--json"])
    assert json.loads(shown.output)["tools"] == {"auto-round": None, "torchao": None}
    refused = CliRunner().invoke(doctor_command, ["--install", "auto-round"], input="n\n")
    assert "auto-round==0.16.1" in refused.output
    assert list(tmp_path.iterdir()) == []


def test_an_environment_is_made_and_runs_scripts_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUTHIER_ENVIRONMENTS", str(tmp_path))
    package = tmp_path / "package"
    package.mkdir()
    (package / "odd_tool.py").write_text("NAME = 'odd'\n")
    project = "[project]\nname = 'odd-tool'\nversion = '1'\n[tool.setuptools]\npy-modules = ['odd_tool']\n"
    (package / "pyproject.toml").write_text(project)
    tool = ToolEnvironment("odd", "tests", (str(package),))
    assert not is_ready(tool)
    said: list[str] = []
    install(tool, said.append)
    assert said == [f"installing {package}"]
    script = tmp_path / "script.py"
    script.write_text("import odd_tool, sys\nprint(odd_tool.NAME, sys.argv[1])\nsys.exit(int(sys.argv[2]))\n")
    assert list(run_script(tool, script, ["a", "0"], tmp_path / "log")) == ["odd a\n"]
    with pytest.raises(StageError, match="odd ended with exit code 3: odd a"):
        list(run_script(tool, script, ["a", "3"], tmp_path / "log"))
    broken = ToolEnvironment("none", "tests", (str(tmp_path / "nothing"),))
    with pytest.raises(StageError, match="cannot be installed"):
        install(broken, said.append)
    assert not is_ready(broken)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_auto_round_is_nearer_than_rounding_to_nearest(
    method: str, tuned: Artifact, environment: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = AUTO_ROUND
    folder = environment("auto-round", *tool.packages).parents[1]
    monkeypatch.setattr("luthier.serving.environments.folder_of", lambda tool: folder)
    options = {"uses": method, "group_size": 64, "largest_kl": 5.0}
    learned = exported(tuned, {**options, "rounding": "auto-round", "iterations": 100})
    nearest = exported(tuned, {**options, "rounding": "nearest"})
    assert learned.facts["layers"] == 21
    assert learned.facts["kl"] < nearest.facts["kl"], (learned.facts["kl"], nearest.facts["kl"])


RECIPE = """
luthier: 1
name: small
stages:
  base: {uses: base}
  folder: {uses: export, model: base, format: {uses: hf, quantize: QUANTIZE}}
"""


@pytest.mark.parametrize(
    ("quantize", "tool"), [("torchao", "torchao"), ("{uses: gptq, rounding: auto-round}", "auto-round")]
)
def test_a_missing_tool_is_reported_before_the_first_stage(
    quantize: str, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_ENVIRONMENTS", str(tmp_path / "none"))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("QUANTIZE", quantize))
    made = plan(tmp_path / "recipe.yaml", tmp_path / "store")
    assert [environment.name for environment in made.missing_tools()] == [tool]
    assert not made.missing_tools(["base"])
    with pytest.raises(PluginError, match=f"luthier doctor --install {tool}"):
        run(made)
    assert not list(made.store)
    # Without it, as with any other.
    assert run(made, only="base").exit_code == 0
