"""What is merged, quantized and exported is the model: heads, templates, special tokens, stop tokens, experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from gguf_models import make_model
from luthier.api import Artifact, ModelError
from luthier.artifacts.texts import chat_templates, special_tokens
from luthier.testing import run_stage, tiny_model
from luthier_plugins.gguf.tokenizer import read_tokenizer
from safetensors.torch import load_file, save_file

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ENDS_WITH_EOS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as others write it."""
    place = tmp_path_factory.mktemp("model")
    made = tiny_model(place / "s")
    shutil.copytree(made.path, place / "llama", ignore=shutil.ignore_patterns("manifest.json"))
    return place / "llama"


def copied(folder: Path, out: Path, change: Callable[[Path], Any] = lambda place: None) -> Path:
    shutil.copytree(folder, out)
    change(out)
    return out


def edited(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def taken(folder: Path, tmp_path: Path) -> Artifact:
    return run_stage(tmp_path / "s", "base", {"source": str(folder)})


def exported(model: Artifact, tmp_path: Path, **form: Any) -> Artifact:
    return run_stage(tmp_path / "s", "export", {"format": {"uses": "gguf", **form}}, inputs={"model": model})


def said(export: Artifact, key: str) -> Any:
    field = gguf.GGUFReader(export.path / "model-F16.gguf").get_field(f"tokenizer.ggml.{key}")
    return None if field is None else field.contents()


def test_stray_weights_are_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    def add(place: Path) -> None:
        tensors = load_file(place / "model.safetensors")
        save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, place / "consolidated.safetensors")
        (place / "original").mkdir()
        shutil.copyfile(place / "model.safetensors", place / "original" / "model.safetensors")

    base = taken(copied(folder, tmp_path / "stray", add), tmp_path)
    assert any("consolidated.safetensors, original/model.safetensors" in text for text in base.manifest["warnings"])
    assert not list(base.path.rglob("consolidated.safetensors"))
    for form in ({"uses": "hf"}, {"uses": "hf", "quantize": "int8", "max_kl": 5.0}):
        made = run_stage(tmp_path / "s", "export", {"format": form}, inputs={"model": base})
        names = {name.removesuffix("_scale") for name in load_file(made.path / "model.safetensors")}
        assert names == set(load_file(folder / "model.safetensors"))


def test_a_model_beside_an_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    both = copied(folder, tmp_path / "both", lambda place: (place / "adapter_config.json").write_text("{}"))
    with pytest.raises(ModelError, match="the weights of a model and an adapter"):
        taken(both, tmp_path)


@pytest.mark.parametrize("own", [True, False])
def test_a_head_of_its_own_stays_wherever_the_model_goes(folder: Path, tmp_path: Path, own: bool) -> None:
    def add(place: Path) -> None:
        tensors = load_file(place / "model.safetensors")
        tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous() if own else tensors[EMBEDDING].clone()
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        edited(place / "config.json", tie_word_embeddings=True)

    base = taken(copied(folder, tmp_path / "head", add), tmp_path)
    hf = run_stage(tmp_path / "s", "export", {"format": "hf"}, inputs={"model": base})
    merged = run_stage(tmp_path / "s", "merge", {"weights": [1.0]}, inputs={"models": [base]})
    for made in (hf, merged):
        tensors = load_file(made.path / "model.safetensors")
        assert (HEAD in tensors) is own
        assert json.loads((made.path / "config.json").read_text())["tie_word_embeddings"] is not own
    assert any("tie_word_embeddings: false" in text for text in base.manifest["warnings"]) is own
    file = exported(base, tmp_path)
    names = {tensor.name for tensor in gguf.GGUFReader(file.path / "model-F16.gguf").tensors}
    assert ("output.weight" in names) is own


def test_a_merge_takes_template_special_tokens_and_stops_from_one_model(folder: Path, tmp_path: Path) -> None:
    eos = special_tokens(folder)["eos_token"]
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    other = next(token for token in tokens if token["content"] != eos)

    def raw(place: Path) -> None:
        (place / "chat_template.jinja").unlink()
        edited(place / "tokenizer_config.json", eos_token=other["content"])
        edited(place / "generation_config.json", eos_token_id=other["id"])
        edited(place / "config.json", eos_token_id=other["id"])

    def tuned(place: Path) -> None:
        (place / "chat_template.jinja").unlink()
        named = [{"name": "default", "template": ENDS_WITH_EOS}, {"name": "tool_use", "template": "tools"}]
        edited(place / "tokenizer_config.json", chat_template=named)

    base, chat = (taken(copied(folder, tmp_path / change.__name__, change), tmp_path) for change in (raw, tuned))
    inputs = {"models": [chat], "base": base}
    for more in ({}, {"chat_template": "auto"}, {"tokenizer": "union"}, {"pad_to_multiple_of": 64}):
        merged = run_stage(tmp_path / "s", "merge", {"method": "task_arithmetic", **more}, inputs=inputs)
        assert chat_templates(merged.path) == {"default": ENDS_WITH_EOS, "tool_use": "tools"}, more
        assert special_tokens(merged.path)["eos_token"] == eos, more
        assert merged.facts["stop_token_ids"] == chat.facts["stop_token_ids"], more
        config = json.loads((merged.path / "config.json").read_text())
        assert config["eos_token_id"] == json.loads((chat.path / "config.json").read_text())["eos_token_id"], more


def test_named_templates_reach_every_program(folder: Path, tmp_path: Path) -> None:
    def add(place: Path) -> None:
        (place / "additional_chat_templates").mkdir()
        (place / "additional_chat_templates" / "tool_use.jinja").write_text("tools")

    base = taken(copied(folder, tmp_path / "named", add), tmp_path)
    hf = run_stage(tmp_path / "s", "export", {"format": "hf"}, inputs={"model": base})
    found: Any = transformers.AutoTokenizer.from_pretrained(hf.path).chat_template
    assert set(found) == {"default", "tool_use"}
    # Version 4 reads the list inside.
    inside = json.loads((hf.path / "tokenizer_config.json").read_text())["chat_template"]
    assert [entry["name"] for entry in inside] == ["default", "tool_use"]
    reader = gguf.GGUFReader(exported(base, tmp_path).path / "model-F16.gguf")
    assert reader.get_field("tokenizer.chat_template").contents() == found["default"]


# -- GGUF ------------------------------------------------------------------------------------------


def test_the_end_of_a_text_is_the_tokenizers_and_all_stops_stop(folder: Path, tmp_path: Path) -> None:
    tokens = {
        token["content"]: token["id"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    eos = tokens[special_tokens(folder)["eos_token"]]
    others = [token for token in tokens.values() if token != eos]
    # Letters: llama.cpp knows them by no name.
    stops = [*others[:1], eos, 40, 41, 42, 43]

    def several(place: Path) -> None:
        (place / "chat_template.jinja").write_text(ENDS_WITH_EOS)
        edited(place / "generation_config.json", eos_token_id=stops)

    export = exported(taken(copied(folder, tmp_path / "several", several), tmp_path), tmp_path)
    assert said(export, "eos_token_id") == eos
    assert export.facts["files"]["F16"]["kl"] < 1e-4

    def too_many(place: Path) -> None:
        edited(place / "generation_config.json", eos_token_id=[eos, *range(40, 47)])

    with pytest.raises(ModelError, match="stops on 8 tokens, a GGUF file has places for 6"):
        exported(taken(copied(folder, tmp_path / "many", too_many), tmp_path), tmp_path)


def tokenizer_of(folder: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    def edit(place: Path) -> None:
        values = json.loads((place / "tokenizer.json").read_text())
        change(values)
        (place / "tokenizer.json").write_text(json.dumps(values))

    return copied(folder, out, edit)


def test_spaces_behind_special_tokens_go_by_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]

    def strips(*names: str) -> Callable[[dict[str, Any]], None]:
        def change(values: dict[str, Any]) -> None:
            free = len(values["model"]["vocab"])
            known = {token["content"] for token in values["added_tokens"]}
            for place, name in enumerate(name for name in ("<unk>", "<s>", "</s>") if name not in known):
                values["added_tokens"].append({**values["added_tokens"][0], "id": free + place + 10, "content": name})
            for token in values["added_tokens"]:
                token["rstrip"] = token["content"] in names or not names

        return change

    plain = read_tokenizer(folder, rows)
    assert (plain.strips, plain.remarks) == (False, ())
    all_but = tokenizer_of(folder, tmp_path / "few", strips("</s>"))
    few = read_tokenizer(all_but, rows + 100)
    assert not few.strips
    assert any("spaces behind </s>" in text for text in few.remarks)
    names = {token["content"] for token in json.loads((all_but / "tokenizer.json").read_text())["added_tokens"]}
    most = tokenizer_of(folder, tmp_path / "most", strips(*(names - {"<unk>", "<s>", "<|endoftext|>"})))
    assert read_tokenizer(most, rows + 100).strips
    used = tokenizer_of(folder, tmp_path / "used", strips("<|im_end|>"))
    with pytest.raises(ModelError, match=r"<\|im_end\|> take the spaces behind it"):
        read_tokenizer(used, rows + 100)


def test_normal_forms_are_named_and_other_normalizers_refused(folder: Path, tmp_path: Path) -> None:
    form = tokenizer_of(folder, tmp_path / "nfc", lambda values: values.update(normalizer={"type": "NFC"}))
    export = exported(taken(form, tmp_path), tmp_path)
    assert any("brings texts into the form NFC" in text for text in export.manifest["warnings"])
    lower = tokenizer_of(folder, tmp_path / "lower", lambda values: values.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(ModelError, match=r"does not normalize texts as this tokenizer does: .*Lowercase"):
        exported(taken(lower, tmp_path), tmp_path)


def test_a_finer_type_is_advised_only_where_rounding_is_the_cause(tmp_path: Path) -> None:
    base = taken(make_model(tmp_path / "model", "llama"), tmp_path)
    with pytest.raises(ModelError, match="does not behave like the model") as rounded:
        exported(base, tmp_path, types=["Q2_K"], max_kl=1e-9)
    assert "finer type" in str(rounded.value)
    # Positions that llama.cpp is told wrong: nothing finer helps.
    patch = pytest.MonkeyPatch()
    with patch.context() as inside:
        inside.setattr(
            "luthier_plugins.gguf.architectures.decoder.Decoder.rope_settings", lambda self: {"rope_theta": 100.0}
        )
        for types in (["Q8_0"], ["F32"]):
            with pytest.raises(ModelError, match=r"nothing is rounded .* is no better") as otherwise:
                exported(base, tmp_path, types=types)
            assert "finer type" not in str(otherwise.value)


# -- fewer bits ------------------------------------------------------------------------------------


def granite(out: Path, folder: Path) -> Path:
    """A mixture whose experts lie in one tensor for each layer."""
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = transformers.GraniteMoeConfig(
        vocab_size=rows, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
    )  # fmt: skip
    transformers.GraniteMoeForCausalLM(config).bfloat16().save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(folder / name, out / name)
    return out


@pytest.mark.parametrize("method", ["fp8", "int8", {"uses": "awq", "group_size": 32, "rounding": "nearest"}])
def test_experts_in_one_tensor_are_named_and_routers_stay(folder: Path, tmp_path: Path, method: Any) -> None:
    base = taken(granite(tmp_path / "granite", folder), tmp_path)
    with pytest.raises(ModelError, match=r"experts of a layer lie in one tensor .*input_linear.*% of the weights"):
        run_stage(tmp_path / "s", "quantize", {"method": method}, inputs={"model": base})
    chosen = {"uses": method} if isinstance(method, str) else method
    config = {
        "format": {"uses": "hf", "quantize": {**chosen, "skip": ["input_linear", "output_linear"]}, "max_kl": 1.0}
    }
    made = run_stage(tmp_path / "s", "export", config, inputs={"model": base})
    assert made.facts["quantized_parameters"] < made.facts["parameters"] / 2
    assert any("have fewer bits: the others stay" in text for text in made.manifest["warnings"])
    tensors = load_file(made.path / "model.safetensors")
    routers = [name for name in tensors if "router" in name]
    assert routers
    assert all(tensors[name].dtype in (torch.bfloat16, torch.float16) for name in routers)
    card = (made.path / "README.md").read_text()
    left = made.facts["parameters"] - made.facts["quantized_parameters"]
    assert f"{left:,} as " in card


def test_what_overflows_in_float16_is_refused_though_its_weights_fit(folder: Path, tmp_path: Path) -> None:
    def large(place: Path) -> None:
        tensors = load_file(place / "model.safetensors")
        for name, tensor in tensors.items():
            # Products that float32 holds, and that the next norm takes back.
            if "up_proj" in name or "gate_proj" in name:
                tensors[name] = tensor * 3000
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})

    base = taken(copied(folder, tmp_path / "large", large), tmp_path)
    config = {"format": {"uses": "hf", "dtype": "float16"}}
    with pytest.raises(ModelError, match="computed in float16, as servers do"):
        run_stage(tmp_path / "s", "export", config, inputs={"model": base})
    assert run_stage(tmp_path / "s", "export", {"format": "hf"}, inputs={"model": base}).facts["kl"] < 0.01


def test_what_a_server_refuses_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    base = taken(make_model(tmp_path / "gemma", "gemma2", num_hidden_layers=1), tmp_path)
    for form in ({"dtype": "float16"}, {"quantize": "awq"}):
        config = {"format": {"uses": "hf", "serve": ["vllm"], **form}}
        with pytest.raises(ModelError, match="vLLM does not serve a gemma2 in float16"):
            run_stage(tmp_path / "s", "export", config, inputs={"model": base})
    warned = run_stage(tmp_path / "s", "export", {"format": {"uses": "hf", "dtype": "float16"}}, inputs={"model": base})
    assert any("vLLM does not serve a gemma2" in text for text in warned.manifest["warnings"])
