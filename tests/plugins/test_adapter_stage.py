"""Adapters from outside: as PEFT leaves them, on the model they belong to, and on no other."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
from gguf_models import make_gpt2, make_model
from luthier import Recipe, plan, run
from luthier.api import Artifact, ModelError, Needs, RecipeError
from luthier.artifacts.texts import chat_template
from luthier.merging.mergekit_yaml import as_config
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import fold, load_model, load_tokenizer
from luthier.modeling.scoring import scored
from luthier.testing import run_stage, tiny_dataset, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def outside(folder: Path, model: Path, **settings: object) -> Path:
    """An adapter as PEFT writes it, with updates that are not zero."""
    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **settings}
    kind = values.pop("peft_type", "LORA")
    if kind == "IA3":
        values = {key: value for key, value in values.items() if key in ("target_modules", "feedforward_modules")}
    config = {"LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig, "IA3": peft.IA3Config}[kind](**values)
    wrapped = peft.get_peft_model(plain, config)
    if values.get("init_lora_weights") is not False:
        with torch.no_grad():
            # As if it had been trained.
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model's folder, and an adapter's."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny_model(folder / "other", dtype="float32", tied=False)
    shutil.copytree(model.path, folder / "model", ignore=shutil.ignore_patterns("manifest.json"))
    outside(folder / "light", folder / "model", use_rslora=True, alpha_pattern={"q_proj": 2})
    return folder


def by_peft(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The weights of a model with an adapter folded in, by PEFT alone."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()


def merged(recipe: dict, place: Path, store: Path) -> dict[str, torch.Tensor]:
    """The weights of the stage `soup`."""
    result = run(Recipe.from_mapping({"luthier": 1, "stages": recipe}, folder=place), store=store)
    return load_file(result.artifact("soup").path / "model.safetensors")


@pytest.mark.parametrize("written", ["stage", "folder", "plus", "stage+folder"])
def test_an_adapter_from_outside_is_merged_like_any_model(place: Path, tmp_path: Path, written: str) -> None:
    soup = {"uses": "merge", "dtype": "float32"}
    stages = {
        "stage": {
            "base": {"uses": "base", "source": "./model"},
            "light": {"uses": "adapter", "source": "./light", "model": "base"},
            "soup": {**soup, "models": ["base", "light"]},
        },
        "folder": {"soup": {**soup, "models": ["./model", "./light"]}},
        "plus": {"soup": {**soup, "models": ["./model", "./model+./light"]}},
        "stage+folder": {
            "base": {"uses": "base", "source": "./model"},
            "soup": {**soup, "models": ["base", "base+./light"]},
        },
    }[written]
    found = merged(stages, place, tmp_path / "s")
    plain, tuned = load_file(place / "model" / "model.safetensors"), by_peft(place / "model", place / "light")
    assert any(not torch.equal(plain[name], tuned[name]) for name in plain)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (plain[name] + tuned[name]) / 2, rtol=1e-5, atol=1e-6)


def test_an_adapter_from_outside_brings_its_own_text_files(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "light", tmp_path / "own")
    base = run_stage(tmp_path / "s", "base", {"source": str(place / "model")})
    without = run_stage(tmp_path / "s", "adapter", {"source": str(tmp_path / "own")}, inputs={"model": base})
    for name in ("tokenizer", "chat_template", "stop_tokens", "stop_token_ids", "architecture"):
        assert without.facts[name] == base.facts[name], name
    assert without.facts["base"] == base.key
    (tmp_path / "own" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    tokenizer = json.loads((place / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "own" / "tokenizer.json").write_text((place / "model" / "tokenizer.json").read_text())
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": "{{ 1 }}"}))
    (tmp_path / "own" / "LICENSE").write_text("mine")
    own = run_stage(tmp_path / "s", "adapter", {"source": str(tmp_path / "own")}, inputs={"model": base})
    assert own.facts["stop_token_ids"] == [1, 2]
    assert own.facts["chat_template"] not in (None, base.facts["chat_template"])
    assert chat_template(own.path) == "{{ 1 }}", "the base's template would win over the adapter's"
    assert (own.path / "LICENSE").read_text() == "mine"
    torch.testing.assert_close(
        dict(fold(load_model(own)).state_dict()), dict(by_peft(place / "model", tmp_path / "own"))
    )


def test_an_adapter_is_refused_on_another_model(place: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    wide = run_stage(store, "base", {"source": str(make_model(tmp_path / "wide", "llama"))})
    with pytest.raises(
        ModelError, match=r"not belong .*q_proj\.lora_A\.weight is \[4, 256\] there, and \[4, 64\]"
    ) as told:
        run_stage(store, "adapter", {"source": str(place / "light")}, inputs={"model": wide})
    assert str(place / "model") in str(told.value.hint)
    other = run_stage(store, "base", {"source": str(make_model(tmp_path / "gpt", "phi3"))})
    with pytest.raises(ModelError, match=r"q_proj.* not found in the base model"):
        run_stage(store, "adapter", {"source": str(place / "light")}, inputs={"model": other})
    shallow = run_stage(store, "base", {"source": str(make_model(tmp_path / "few", "llama", num_hidden_layers=2))})
    deep = outside(tmp_path / "deep", make_model(tmp_path / "three", "llama"))
    with pytest.raises(ModelError, match=r"no place for .*layers\.2\.mlp\.up_proj\.lora_A"):
        run_stage(store, "adapter", {"source": str(deep)}, inputs={"model": shallow})
    tensors = load_file(deep / "adapter_model.safetensors")
    lost = next(key for key in tensors if "layers.1." in key and "lora_B" in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, deep / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"the adapter has no .*layers\.1\."):
        run_stage(store, "adapter", {"source": str(deep)}, inputs={"model": wide})
    with pytest.raises(ModelError, match="is an adapter, not a model"):
        run_stage(store, "base", {"source": str(place / "light")})
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        run_stage(store, "adapter", {"source": str(place / "model")}, inputs={"model": wide})


def test_an_adapter_that_is_not_whole_is_refused(place: Path, tmp_path: Path) -> None:
    base = run_stage(tmp_path / "s", "base", {"source": str(place / "model")})

    def told(folder: Path) -> str:
        with pytest.raises(ModelError) as error:
            run_stage(tmp_path / "s", "adapter", {"source": str(folder)}, inputs={"model": base})
        return str(error.value)

    for name in ("pickle", "none", "short", "tokens"):
        shutil.copytree(place / "light", tmp_path / name)
        weights = tmp_path / name / "adapter_model.safetensors"
        if name == "short":
            weights.write_bytes(weights.read_bytes()[:-4])
        elif name == "tokens":
            tokenizer = json.loads((place / "model" / "tokenizer.json").read_text())
            tokenizer["added_tokens"].append({"id": 5000, "content": "<new>", "special": True})
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        else:
            weights.unlink()
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"x")
    assert "pickle files only" in told(tmp_path / "pickle")
    assert "adapter_model.safetensors is missing" in told(tmp_path / "none")
    assert "its header says" in told(tmp_path / "short")
    assert "5001 tokens" in told(tmp_path / "tokens")


def test_a_folder_that_does_not_know_its_model_is_reported_when_planning(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "light", tmp_path / "lost")
    path = tmp_path / "lost" / "adapter_config.json"
    config = json.loads(path.read_text())

    def told(name: str | None) -> str:
        path.write_text(json.dumps({**config, "base_model_name_or_path": name}))
        stages = {"soup": {"uses": "merge", "models": ["./lost", "./lost"]}}
        with pytest.raises(RecipeError) as error:
            plan(Recipe.from_mapping({"luthier": 1, "stages": stages}, folder=tmp_path), tmp_path / "s")
        return str(error.value)

    assert "does not say which model it sits on" in told(None)
    assert "the adapter sits on '/gone/model', which is not here" in told("/gone/model")
    assert "the adapter sits on './lost', which is not here" in told("./lost")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0)
    try:
        assert "which is not here" in told(f"{locked}/inside/model")
    finally:
        locked.chmod(0o700)
    assert "'gpt2' is at" in told("gpt2"), "a hub id without an owner"


def test_adapters_in_mergekit_files(place: Path, tmp_path: Path, cli) -> None:
    file = tmp_path / "plus.yml"
    file.write_text(
        f"models:\n  - {{model: {place}/model+{place}/light, parameters: {{weight: 1}}}}\n"
        "  - {model: org/name+org/lora, parameters: {weight: 1}}\nmerge_method: linear\n"
    )
    assert as_config({"config": str(file)}, None)["models"] == [
        f"{place}/model+{place}/light",
        "hf:org/name+hf:org/lora",
    ]
    file.write_text(
        f"models:\n  - {{model: {place}/model+{place}/light, parameters: {{weight: 1}}}}\n"
        "merge_method: linear\ndtype: float32\n"
    )
    done = cli("do", "merge", f"config={file}", "--out", "made")
    assert done.returncode == 0, done.stderr
    tuned = by_peft(place / "model", place / "light")
    for name, tensor in load_file(tmp_path / "made" / "model.safetensors").items():
        torch.testing.assert_close(tensor, tuned[name], rtol=1e-5, atol=1e-6)
    done = cli("do", "merge", f"models={place}/model+{place}/light", "dtype=float32", "--out", "again")
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tuned.keys()


ODD: dict[str, tuple[str, dict[str, object], bool]] = {
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, False),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}, False),
    "whole tensors": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}, False),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all", "tied": False}, False),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}, False),
    "dora transposed": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}, True),
    "pissa": ("llama", {"init_lora_weights": "pissa"}, True),
    "olora": ("llama", {"init_lora_weights": "olora"}, True),
    "tokens": ("qwen2", {"trainable_token_indices": [3, 5]}, True),
    "some layers": ("llama", {"layers_to_transform": [1], "rank_pattern": {"up_proj": 2}}, False),
    "without its prefix": ("gpt2-short", {"target_modules": ["c_attn", "c_proj"]}, False),
    "without its prefix, folded": ("gpt2-short", {"target_modules": ["c_attn"], "use_dora": True}, True),
    "adalora": ("llama", {"peft_type": "ADALORA", "target_r": 4, "init_r": 4, "total_step": 10}, True),
    "ia3": ("llama", {"peft_type": "IA3", "feedforward_modules": ["up_proj"]}, True),
    "experts": ("mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}, True),
}


def odd_model(folder: Path, name: str, tied: bool) -> Path:
    """A model stored in bfloat16."""
    if name.startswith("gpt2"):
        return make_gpt2(folder, short=name == "gpt2-short")
    make_model(folder, name, **({} if tied else {"tie_word_embeddings": False}))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("what", ODD)
def test_whatever_an_adapter_changes_is_merged_as_peft_folds_it(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, settings, folded = ODD[what]
    settings = dict(settings)
    model = odd_model(tmp_path / "model", name, bool(settings.pop("tied", name == "qwen2")))
    light = outside(tmp_path / "light", model, **settings)
    weights = load_file(light / "adapter_model.safetensors")
    # What is brought whole is another than the base's.
    save_file(
        {key: tensor * 1.25 for key, tensor in weights.items()},
        light / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    expected = by_peft(model, light)
    if not folded:
        monkeypatch.setattr(
            "luthier.modeling.loading.folded_by_peft", lambda *_: pytest.fail("the model was loaded whole")
        )
    base = run_stage(tmp_path / "s", "base", {"source": str(model)})
    adapter = run_stage(tmp_path / "s", "adapter", {"source": str(light)}, inputs={"model": base})
    config = {"dtype": "float32", "method": "passthrough"}
    merged = run_stage(tmp_path / "s", "merge", config, inputs={"models": [adapter]})
    found = {key: tensor.clone() for key, tensor in load_model(merged).state_dict().items()}
    assert found.keys() == expected.keys()
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    assert any(not torch.allclose(plain[key], expected[key]) for key in plain)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5)
    stored = run_stage(tmp_path / "s", "merge", {"method": "passthrough"}, inputs={"models": [adapter]})
    assert stored.facts["dtype"] == "BF16", "what the base is stored in, folded or not"


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gpt2", (["c_attn", "c_proj"], ["c_fc"])),
        ("gpt2-short", (["c_attn"], ["c_attn", "c_proj"])),
        ("llama", (["lm_head", "q_proj"], ["lm_head"])),
    ],
)
def test_adapters_on_transposed_layers_and_heads_merge_and_come_out_of_models_again(
    tmp_path: Path, name: str, targets: tuple[list[str], list[str]]
) -> None:
    model = odd_model(tmp_path / "model", name, tied=False)
    base = run_stage(tmp_path / "s", "base", {"source": str(model)})
    folders = [
        outside(tmp_path / f"light-{place}", model, target_modules=several, r=2 + place)
        for place, several in enumerate(targets)
    ]
    if name == "llama":
        stored = [key for key in load_file(folders[0] / "adapter_model.safetensors") if "lora" not in key]
        assert stored, "PEFT stores a copy of the head along with its update"
    adapters = [
        run_stage(tmp_path / "s", "adapter", {"source": str(folder)}, inputs={"model": base}) for folder in folders
    ]
    plain, one, two = (
        {key: tensor.clone() for key, tensor in fold(load_model(item)).state_dict().items()}
        for item in (base, *adapters)
    )
    expected = {key: tensor + 0.25 * (one[key] - tensor) + 0.75 * (two[key] - tensor) for key, tensor in plain.items()}
    merged = run_stage(tmp_path / "s", "merge_adapters", {"weights": [1, 3]}, inputs={"models": adapters})
    dense = run_stage(tmp_path / "s", "merge", {"weights": [1, 3], "dtype": "float32"}, inputs={"models": adapters})
    # The ranks of both together hold the difference whole.
    extracted = run_stage(tmp_path / "s", "extract_lora", {"r": 5, "head": True}, inputs={"model": dense, "base": base})
    assert extracted.facts["left_out"] == []
    for adapter in (merged, extracted):
        found = fold(load_model(adapter)).state_dict()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"Say {n}."}],
        "chosen": [{"role": "assistant", "content": f"{n}"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for n in range(4)
]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_an_adapter_on_the_output_head_is_not_trained_past(place: Path, tmp_path: Path, stage: str) -> None:
    base = run_stage(tmp_path / "s", "base", {"source": str(place / "model")})
    light = outside(tmp_path / "light", place / "model", target_modules=["lm_head", "q_proj"])
    adapter = run_stage(tmp_path / "s", "adapter", {"source": str(light)}, inputs={"model": base})
    chats = [{"messages": [*row["prompt"], *row["chosen"]]} for row in PAIRS]
    data = tiny_dataset(tmp_path / "s", chats if stage == "sft" else PAIRS)
    config = {"steps": 2, "learning_rate": 1e-2, "log_every": 1}
    made = run_stage(tmp_path / "s", stage, config, inputs={"model": adapter, "data": [data]})
    before, after = (load_file(item.path / "adapter_model.safetensors") for item in (adapter, made))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if "lm_head.lora" in name} <= moved
    assert made.facts["training"]["loss_last"] < made.facts["training"]["loss_first"]
    if stage == "sft":
        model, encoder = (
            load_model(adapter).eval(),
            ChatEncoder(load_tokenizer(adapter), adapter.facts["stop_token_ids"]),
        )
        logps = [
            value for row in scored(model, encoder, chats, [Needs(token_logps=True)], tmp_path) for value in row.logps
        ]
        assert made.facts["training"]["loss_first"] == pytest.approx(-sum(logps) / len(logps), rel=1e-5)
    else:
        assert made.facts["training"]["loss_first"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_recipe_may_put_an_adapter_on_the_output_head(place: Path, tmp_path: Path) -> None:
    base = run_stage(tmp_path / "s", "base", {"source": str(place / "model")})
    chats = [{"messages": [*row["prompt"], *row["chosen"]]} for row in PAIRS]
    config = {"steps": 2, "learning_rate": 1e-2, "adapter": {"uses": "lora", "target_modules": ["q_proj", "lm_head"]}}
    made = run_stage(
        tmp_path / "s", "sft", config, inputs={"model": base, "data": [tiny_dataset(tmp_path / "s", chats)]}
    )
    weights = load_file(made.path / "adapter_model.safetensors")
    assert any("lm_head.lora_B" in name and bool(tensor.any()) for name, tensor in weights.items())


def test_a_whole_tensor_that_an_adapter_changes_is_not_merged_with_others(tmp_path: Path) -> None:
    model = odd_model(tmp_path / "model", "llama", tied=False)
    light = outside(tmp_path / "light", model, modules_to_save=["lm_head"])
    base = run_stage(tmp_path / "s", "base", {"source": str(model)})
    weights = load_file(light / "adapter_model.safetensors")
    save_file(
        {key: tensor * 1.25 for key, tensor in weights.items()},
        light / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    adapter = run_stage(tmp_path / "s", "adapter", {"source": str(light)}, inputs={"model": base})
    with pytest.raises(ModelError, match=r"what this stage does not merge: lm_head\.weight"):
        run_stage(tmp_path / "s", "merge_adapters", inputs={"models": [adapter, adapter]})


def test_entries_that_are_no_numbers_are_found_where_they_are(place: Path, tmp_path: Path) -> None:
    base = run_stage(tmp_path / "s", "base", {"source": str(place / "model")})
    adapter = run_stage(tmp_path / "s", "adapter", {"source": str(place / "light")}, inputs={"model": base})
    # The stage refuses one that is spoiled before.
    weights = load_file(adapter.path / "adapter_model.safetensors")
    spoiled = next(key for key in weights if "q_proj.lora_B" in key)
    weights[spoiled][1, 1] = float("nan")
    save_file(weights, adapter.path / "adapter_model.safetensors", metadata={"format": "pt"})
    for stage in ("merge", "merge_adapters"):
        with pytest.raises(ModelError, match="NaN or infinite") as told:
            run_stage(tmp_path / "s", stage, inputs={"models": [adapter, adapter]})
        assert "adapter_model.safetensors (adapter): model.layers.0.self_attn.q_proj.weight" in str(told.value.where)


def test_an_adapter_that_only_works_beside_its_model_is_not_folded(place: Path, tmp_path: Path) -> None:
    light = outside(tmp_path / "light", place / "model", alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    base = run_stage(tmp_path / "s", "base", {"source": str(place / "model")})
    adapter = run_stage(tmp_path / "s", "adapter", {"source": str(light)}, inputs={"model": base})
    with pytest.raises(ModelError, match="PEFT cannot fold this adapter"):
        run_stage(tmp_path / "s", "merge", inputs={"models": [adapter]})
    with pytest.raises(ModelError, match="the setting alora_invocation_tokens"):
        run_stage(tmp_path / "s", "merge_adapters", inputs={"models": [adapter, adapter]})


def test_an_adapter_of_prompts_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(place / "model")
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    peft.get_peft_model(plain, config).save_pretrained(tmp_path / "prompts")
    base = run_stage(tmp_path / "s", "base", {"source": str(place / "model")})
    with pytest.raises(ModelError, match="a PROMPT_TUNING adapter changes prompts and no weights"):
        run_stage(tmp_path / "s", "adapter", {"source": str(tmp_path / "prompts")}, inputs={"model": base})


def test_modules_without_an_update_are_reported_and_halves_refused(place: Path, tmp_path: Path) -> None:
    base = run_stage(tmp_path / "s", "base", {"source": str(place / "model")})
    weights = load_file(place / "light" / "adapter_model.safetensors")

    def taken(name: str, lost: str, begun: bool = True) -> Artifact:
        shutil.copytree(place / "light", tmp_path / name)
        kept = {key: tensor for key, tensor in weights.items() if lost not in key}
        save_file(kept, tmp_path / name / "adapter_model.safetensors", metadata={"format": "pt"})
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": begun}))
        return run_stage(tmp_path / "s", "adapter", {"source": str(tmp_path / name)}, inputs={"model": base})

    partly = taken("partly", "layers.1.mlp")
    assert "brings nothing for 1 modules" in partly.manifest["warnings"][0]
    merged = run_stage(tmp_path / "s", "merge", {"dtype": "float32"}, inputs={"models": [partly]})
    expected = by_peft(place / "model", tmp_path / "partly")
    for name, tensor in load_file(merged.path / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match=r"the adapter has no .*layers\.1\.mlp\.up_proj\.lora_B"):
        taken("half", "layers.1.mlp.up_proj.lora_B")
    # PEFT would begin what is missing with numbers at random, and compute with them.
    with pytest.raises(ModelError, match=r"the adapter has no .*layers\.1\.mlp"):
        taken("random", "layers.1.mlp", begun=False)


def test_templates_are_kept_wherever_they_stand(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    template = (tmp_path / "model" / "chat_template.jinja").read_text()
    (tmp_path / "model" / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    base = run_stage(tmp_path / "s", "base", {"source": str(tmp_path / "model")})
    shutil.copytree(place / "light", tmp_path / "own")
    shutil.copyfile(place / "model" / "tokenizer.json", tmp_path / "own" / "tokenizer.json")
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(config))
    kept = run_stage(tmp_path / "s", "adapter", {"source": str(tmp_path / "own")}, inputs={"model": base})
    assert kept.facts["chat_template"] == base.facts["chat_template"]
    shutil.copytree(place / "light", tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").write_text("{{ 2 }}")
    own = run_stage(tmp_path / "s", "adapter", {"source": str(tmp_path / "bare")}, inputs={"model": base})
    assert (own.path / "chat_template.jinja").read_text() == "{{ 2 }}"
    assert own.facts["chat_template"] != base.facts["chat_template"]


def test_an_adapter_on_quantized_weights_says_how_to_go_on(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    base = run_stage(tmp_path / "s", "base", {"source": str(tmp_path / "model")})
    light = outside(tmp_path / "light", place / "model", init_lora_weights="pissa")
    for folder in (place / "light", light):
        adapter = run_stage(tmp_path / "s", "adapter", {"source": str(folder)}, inputs={"model": base})
        with pytest.raises(ModelError, match="quantized") as told:
            run_stage(tmp_path / "s", "merge", inputs={"models": [adapter]})
        assert "full-precision model" in f"{told.value.message} {told.value.hint}"


def test_a_folded_adapter_on_another_model_than_the_base_is_reported(place: Path, tmp_path: Path) -> None:
    base = run_stage(tmp_path / "s", "base", {"source": str(place / "model")})
    other = tiny_model(tmp_path / "s", seed=8, dtype="float32", tied=False)
    light = outside(tmp_path / "light", place / "model", init_lora_weights="pissa")
    adapter = run_stage(tmp_path / "s", "adapter", {"source": str(light)}, inputs={"model": base})
    inputs = {"models": [adapter], "base": other}
    merged = run_stage(tmp_path / "s", "merge", {"method": "task_arithmetic"}, inputs=inputs)
    assert "not on the base" in merged.manifest["warnings"][0]


@pytest.mark.parametrize("stage", ["merge", "export"])
def test_a_fold_that_is_another_model_is_refused(tmp_path: Path, stage: str) -> None:
    model = odd_model(tmp_path / "model", "qwen2", True)
    light = outside(tmp_path / "light", model, target_modules=["embed_tokens", "q_proj"])
    base = run_stage(tmp_path / "s", "base", {"source": str(model)})
    adapter = run_stage(tmp_path / "s", "adapter", {"source": str(light)}, inputs={"model": base})
    inputs = {"models": [adapter]} if stage == "merge" else {"model": adapter}
    # Folding changes the output head as well, which the adapter beside its model does not.
    with pytest.raises(ModelError, match="folded into its model, the adapter behaves differently"):
        run_stage(tmp_path / "s", stage, {} if stage == "merge" else {"format": "hf"}, inputs=inputs)


def test_an_old_file_and_its_own_fine_tune_are_one_architecture(tmp_path: Path) -> None:
    store = tmp_path / "s"
    base = run_stage(store, "base", {"source": str(odd_model(tmp_path / "model", "gpt2-short", True))})
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
    data = tiny_dataset(store, rows)
    tuned = run_stage(store, "sft", {"steps": 2, "learning_rate": 1e-3}, inputs={"model": base, "data": [data]})
    merged = run_stage(store, "merge", {"method": "ties", "dtype": "float32"}, inputs={"models": [tuned], "base": base})
    found, plain = load_model(merged).state_dict(), load_model(base).state_dict()
    name = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.equal(found[name], plain[name])
    report = run_stage(store, "diff", inputs={"models": [base, tuned]})
    assert name in (report.path / "report.json").read_text()
