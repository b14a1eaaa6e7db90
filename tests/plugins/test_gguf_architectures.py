"""Every architecture, SentencePiece tokenizers, importances: proven in llama.cpp."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import MODELS, make_model
from luthier.api import Artifact, DataError, ModelError
from luthier.modeling.calibration import tuned_on
from luthier.modeling.compare import CORPUS
from luthier.modeling.loading import load_model, load_tokenizer
from luthier.modeling.streamed import Streamed
from luthier.registry import default_registry
from luthier.testing import resealed, run_stage, tiny_dataset, tiny_model
from luthier_plugins.gguf import check as checking
from luthier_plugins.gguf.architectures.gemma import Gemma2
from luthier_plugins.gguf.check import Expected, check
from luthier_plugins.gguf.config import GgufConfig
from luthier_plugins.gguf.imatrix import importances_of
from luthier_plugins.gguf.mixes import tensor_type
from luthier_plugins.gguf.modelfile import FORMATS, format_of, write_modelfile
from luthier_plugins.gguf.tokenizer import DEEPSEEK_SPLITS
from luthier_plugins.gguf.write import Source
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TEXT = ["Where is the letter?", "The letter is in the drawer.", "12 geese, 34 ducks", "a  b   c", "Größe naïve"] * 4


@pytest.mark.parametrize("name", list(MODELS))
def test_an_architecture_behaves_alike_in_llama_cpp(name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", name)
    base = run_stage(tmp_path / "s", "base", {"source": str(folder)})
    config = {"format": {"uses": "gguf", "types": ["F32", "Q8_0"], "max_kl": {"F32": 1e-5, "Q8_0": 0.05}}}
    export = run_stage(tmp_path / "s", "export", config, inputs={"model": base})
    files = export.facts["files"]
    assert files["F32"]["kl"] < 1e-5
    assert files["F32"]["top1"] == 1.0
    # Weights that say nothing would pass with any mistake in them.
    assert files["Q8_0"]["kl"] > files["F32"]["kl"]
    if name == "mistral":
        assert export.facts["context_length"] == 256


def test_what_old_checkpoints_keep_of_the_rotation_is_left_out(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = run_stage(tmp_path / "s", "base", {"source": str(folder)})
    assert run_stage(tmp_path / "s", "export", {"format": "gguf"}, inputs={"model": base}).facts["files"]["F16"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"types": ["F16", "IQ2_XS"], "imatrix": False}, "IQ2_XS needs importances"),
        ({"converter": "./x.py", "overrides": {"attn_v": "Q8_0"}}, "a converter script writes F16 only"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_the_plan(settings: dict[str, Any], message: str) -> None:
    registry = default_registry()
    with pytest.raises(ValueError, match=message):
        GgufConfig.model_validate(settings, context={"components": registry})


def test_what_llama_cpp_does_not_report_is_no_agreement() -> None:
    class Silent:
        file = Path("x.gguf")

        def next_log_probabilities(self, ids: list[int], size: int, stop: int) -> np.ndarray:
            return np.full(size, -np.inf)

    right = np.log(np.full(4, 0.25))
    expected = Expected({}, [], [], {}, [[1, 2]], [right], [])
    with pytest.raises(ModelError, match="does not behave like"):
        check(Silent(), expected, 1e9)  # type: ignore[arg-type]


@pytest.mark.parametrize("peaked", [True, False])
def test_likely_tokens_alone_are_asked_for_where_the_others_are_as_good_as_impossible(peaked: bool) -> None:
    scores = np.linspace(0.0, -60.0 if peaked else -0.1, 20_000)
    right = scores - np.log(np.exp(scores).sum())
    asked: list[int | None] = []

    class Half:
        """Knows the likely ones, and says no more than it is asked for."""

        file = Path("x.gguf")

        def next_log_probabilities(self, ids: list[int], size: int, stop: int, most: int | None = None) -> np.ndarray:
            asked.append(most)
            found = right.copy()
            if most is not None:
                found[most:] = -np.inf
            return found

    expected = Expected({}, [], [], {}, [[1, 2]], [right], [])
    facts = check(Half(), expected, 1e-9)  # type: ignore[arg-type]
    assert asked == [checking.LIKELY] if peaked else [None]
    assert facts["kl"] == pytest.approx(0.0, abs=1e-12)
    assert facts["top1"] == 1.0


def test_a_file_that_runs_on_is_refused() -> None:
    right = np.log(np.array([0.5, 0.25, 0.25]))

    class Endless:
        file = Path("x.gguf")
        ended = False

        def next_log_probabilities(self, ids: list[int], size: int, stop: int) -> np.ndarray:
            return right

        def ends(self, prompt: list[int]) -> bool:
            return self.ended

    server: Any = Endless()
    expected = Expected({}, [], [], {}, [[1, 2]], [right], [], [[1], [2]])
    with pytest.raises(ModelError, match="none of 2 answers that the model ends"):
        check(server, expected, 1e-9)
    server.ended = True
    assert check(server, expected, 1e-9)["endings"] == [2, 2]


def test_another_sliding_window_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = run_stage(tmp_path / "s", "base", {"source": str(make_model(tmp_path / "model", "gemma2"))})
    right = Gemma2.metadata
    monkeypatch.setattr(Gemma2, "metadata", lambda self: right(self) | {"attention.sliding_window": 24})
    with pytest.raises(ModelError, match="does not behave like the model"):
        run_stage(tmp_path / "s", "export", {"format": "gguf"}, inputs={"model": base})


def spoken(tmp_path: Path, kind: str) -> Artifact:
    """A Llama with the tokenizer of Llama 2, or of Gemma: SentencePiece's BPE with bytes for what is unknown."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(text for text, _ in learned)]
    vocabulary = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    # As in SentencePiece's own vocabularies: whatever two pieces make a piece may be merged, best piece first.
    merges = [
        (text[:cut], text[cut:])
        for text, _ in learned
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    elif kind == "llama 2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    folder = tmp_path / "model"
    whole.save_pretrained(folder)
    sizes = LlamaConfig(
        vocab_size=len(vocabulary) + 5,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(sizes).save_pretrained(folder)
    return run_stage(tmp_path / "s", "base", {"source": str(folder)})


@pytest.mark.parametrize("kind", ["llama 2", "metaspace", "gemma"])
def test_sentencepiece_tokenizers_read_alike(kind: str, tmp_path: Path) -> None:
    model = spoken(tmp_path, kind)
    export = run_stage(tmp_path / "s", "export", inputs={"model": model})
    reader = gguf.GGUFReader(export.path / "model-F16.gguf")
    assert reader.fields["tokenizer.ggml.model"].contents() == "llama"
    assert reader.fields["tokenizer.ggml.add_space_prefix"].contents() is (kind != "gemma")
    told = any("begins with one already" in warning for warning in export.manifest["warnings"])
    assert told is (kind == "metaspace")
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert types[0] == gguf.TokenType.UNKNOWN
    assert types[3] == gguf.TokenType.BYTE
    assert types[-1] == gguf.TokenType.UNUSED


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model that was tuned in its store."""
    store = tmp_path_factory.mktemp("store")
    model = tiny_model(store, texts=TEXT, hidden_size=256, intermediate_size=256, layers=3, kv_heads=2)
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in TEXT]
    data = tiny_dataset(store, [{"messages": messages} for messages in turns])
    return run_stage(store, "sft", {"steps": 3, "learning_rate": 1e-3}, inputs={"model": model, "data": [data]})


def test_importances_are_computed_on_what_the_model_was_tuned_on(tuned: Artifact) -> None:
    store = tuned.path.parents[1]
    (data,) = tuned_on(tuned)
    assert data.kind == "dataset"
    config = {"format": {"uses": "gguf", "types": ["Q2_K", "IQ2_XXS"], "imatrix": True, "max_kl": 5.0}}
    weighed = run_stage(store, "export", config, inputs={"model": tuned})
    about = weighed.facts["imatrix"]
    assert about["tensors"] > 10
    assert about["tokens"] > 100
    config["format"] |= {"types": ["Q2_K"], "imatrix": False}
    plain = run_stage(store, "export", config, inputs={"model": tuned})
    assert plain.facts["files"]["Q2_K"]["kl"] != weighed.facts["files"]["Q2_K"]["kl"]
    card = (weighed.path / "README.md").read_text()
    assert "model-IQ2_XXS.gguf" in card
    assert about["sha256"][:16] in card


def test_importances_are_the_mean_squares_of_the_inputs(tuned: Artifact) -> None:
    model, block = load_model(tuned), [5, 6, 7, 8]
    streamed = Streamed(tuned.path)
    with ExitStack() as stack:
        parts = Source(tuned.path, stack).parts
    found, idle = importances_of(streamed, parts, [block])
    seen: list[torch.Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([block]))
    handle.remove()
    np.testing.assert_allclose(found["blk.1.ffn_down.weight"], seen[0][0].square().mean(dim=0).numpy(), rtol=1e-5)
    assert idle == 0


def test_importances_of_experts_are_those_of_the_tokens_that_came_to_them(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3-moe")
    base = run_stage(tmp_path / "s", "base", {"source": str(folder)})
    model = Streamed(base.path)
    with ExitStack() as stack:
        parts = Source(folder, stack).parts
    inputs: list[tuple[Any, ...]] = []
    experts = model.model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, given: inputs.append(given))
    found, _ = importances_of(model, parts, [[5, 6, 7, 8, 9, 10]])
    handle.remove()
    hidden, chosen = inputs[0][0], inputs[0][1]
    for expert in range(4):
        mine = hidden[(chosen == expert).any(dim=1)]
        right = mine.square().mean(dim=0) if len(mine) else torch.ones(hidden.shape[1])
        np.testing.assert_allclose(found["blk.0.ffn_up_exps.weight"][expert], right.numpy(), rtol=1e-4)
    assert found["blk.0.ffn_down_exps.weight"].shape == (4, 256)


def test_coarse_types_without_data_are_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_model(tmp_path / "elsewhere", hidden_size=256, intermediate_size=256)
    model = run_stage(tmp_path, "base", {"source": str(made.path)})
    config: dict[str, Any] = {"format": {"uses": "gguf", "types": ["IQ2_XXS"]}}
    monkeypatch.setattr(Streamed, "walk", lambda *given: pytest.fail("the model was read"))
    with pytest.raises(ModelError, match="name a dataset as `calibration`"):
        run_stage(tmp_path, "export", config, inputs={"model": model})


def test_calibration_text_shorter_than_asked_is_refused(tuned: Artifact) -> None:
    config = {"format": {"uses": "gguf", "types": ["Q8_0"], "imatrix": True, "calibration_tokens": 1_000_000}}
    with pytest.raises(DataError, match="1000000 were asked for"):
        run_stage(tuned.path.parents[1], "export", config, inputs={"model": tuned})


def test_a_file_that_fails_its_check_is_not_left_where_it_would_be_taken_for_good(tuned: Artifact) -> None:
    config = {"format": {"uses": "gguf", "types": ["Q4_0"], "max_kl": 1e-9}}
    store = tuned.path.parents[1]
    with pytest.raises(ModelError, match=r"set `imatrix: true` .* `overrides`"):
        run_stage(store, "export", config, inputs={"model": tuned})
    left = [path for path in store.rglob("model-Q4_0.gguf") if "work" not in path.parts]
    assert left == []


def test_tensors_can_be_given_other_types(tuned: Artifact) -> None:
    store = tuned.path.parents[1]
    config = {"format": {"uses": "gguf", "types": ["Q4_K_M"], "overrides": {"attn_v": "Q8_0", r"blk\.0\.": "F16"}}}
    export = run_stage(store, "export", config, inputs={"model": tuned})
    found = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(export.path / "model-Q4_K_M.gguf").tensors
    }
    assert found["blk.0.attn_v.weight"] == found["blk.2.attn_v.weight"] == "Q8_0"
    assert found["blk.0.ffn_up.weight"] == "F16"
    assert found["blk.1.ffn_up.weight"] == "Q4_K"
    assert found["blk.0.attn_norm.weight"] == "F32"
    config["format"]["overrides"] = {"attn_w": "Q8_0"}
    with pytest.raises(ModelError, match=r"'attn_w', which matches no tensor"):
        run_stage(store, "export", config, inputs={"model": tuned})


def changed(model: Artifact, folder: Path, **config: Any) -> Artifact:
    """The model with another config."""
    place = folder / model.key
    shutil.copytree(model.path, place)
    values = json.loads((place / "config.json").read_text()) | config
    (place / "config.json").write_text(json.dumps(values))
    return resealed(place)


def test_what_llama_cpp_lacks_is_refused_early(tuned: Artifact, tmp_path: Path) -> None:
    cases = [
        ({"architectures": ["OddForCausalLM"]}, "cannot be exported to GGUF by Luthier itself"),
        ({"hidden_act": "gelu"}, "no llama with hidden_act = gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ({"quantization_config": {"quant_method": "awq"}}, "the model is quantized already"),
    ]
    for place, (config, message) in enumerate(cases):
        with pytest.raises(ModelError, match=message):
            run_stage(tmp_path / "s", "export", inputs={"model": changed(tuned, tmp_path / str(place), **config)})


def test_tokens_without_rows_are_refused(tuned: Artifact, tmp_path: Path) -> None:
    model = changed(tuned, tmp_path)
    tokenizer = json.loads((model.path / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 5000, "content": "<|late|>"})
    (model.path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"1 tokens without a row .*<\|late\|>"):
        run_stage(tmp_path / "s", "export", inputs={"model": resealed(model.path)})


def test_rows_that_no_block_divides_are_reported(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, hidden_size=96, intermediate_size=96)
    config = {"format": {"uses": "gguf", "types": ["Q4_K_M"], "max_kl": 1.0}}
    export = run_stage(tmp_path, "export", config, inputs={"model": model})
    assert "Q5_0" in export.facts["files"]["Q4_K_M"]["tensors"]
    assert any("not a multiple of 256" in warning for warning in export.manifest["warnings"])


def test_a_script_of_the_users_converts_what_luthier_does_not_know(tuned: Artifact, tmp_path: Path) -> None:
    store = tuned.path.parents[1]
    ready = run_stage(store, "export", inputs={"model": tuned})
    script = tmp_path / "convert.py"
    script.write_text(
        f"import shutil, sys\nassert sys.argv[4:] == ['--outtype', 'f16'], sys.argv\n"
        f"shutil.copy({str(ready.path / 'model-F16.gguf')!r}, sys.argv[3])\n"
    )
    config = {"format": {"uses": "gguf", "converter": str(script)}}
    export = run_stage(store, "export", config, inputs={"model": tuned})
    assert export.facts["files"]["F16"]["kl"] < 1e-4
    script.write_text("raise SystemExit('no such layer')")
    with pytest.raises(ModelError, match="exit code 1: no such layer"):
        run_stage(store, "export", config, inputs={"model": tuned})


def test_the_modelfile_has_the_template_of_the_model(tuned: Artifact) -> None:
    export = run_stage(tuned.path.parents[1], "export", inputs={"model": tuned})
    lines = (export.path / "Modelfile").read_text()
    assert "FROM ./model-F16.gguf" in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert FORMATS[0].go in lines
    tokenizer = load_tokenizer(tuned)
    assert format_of(tokenizer) is FORMATS[0]
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    # The file adds no first token, so that the template has to have it.
    write_modelfile(tuned.path.parent, {"F16": {"file": "x.gguf"}}, tokenizer, tuned.facts, 512)
    assert 'TEMPLATE """<|im_start|>{{-' in (tuned.path.parent / "Modelfile").read_text()
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert format_of(tokenizer) is None


def test_what_needs_importances_is_known_before_it_runs() -> None:
    from luthier_plugins.gguf.config import NEED_IMATRIX
    from luthier_plugins.gguf.mixes import MOSTLY, NEEDS_IMATRIX, Layout

    downs = [f"blk.{layer}.ffn_down.weight" for layer in range(32)]
    layout = Layout(layers=32, heads=32, kv_heads=32, tied=False, downs=downs)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down", "ffn_gate"]
    for file_type in MOSTLY:
        kinds = {
            tensor_type(file_type, f"blk.{layer}.{name}.weight", (256, 256), layout)
            for layer in range(32)
            for name in names
        }
        assert bool(kinds & set(NEEDS_IMATRIX)) == (file_type in NEED_IMATRIX), file_type


@pytest.mark.parametrize("alpha", [4, 32])
def test_an_adapter_alone_is_added_by_llama_cpp(alpha: int, tuned: Artifact) -> None:
    store = tuned.path.parents[1]
    (data,) = tuned_on(tuned)
    config = {"adapter": {"uses": "lora", "r": 4, "lora_alpha": alpha}, "steps": 6, "learning_rate": 1e-2}
    low_rank = run_stage(store, "sft", config, inputs={"model": tuned, "data": [data]})
    export = run_stage(store, "export", {"format": {"uses": "gguf", "adapter": True}}, inputs={"model": low_rank})
    about = export.facts["files"]["LoRA"]
    assert "--lora adapter.gguf" in (export.path / "README.md").read_text()
    assert about["kl"] < 1e-4
    assert about["bytes"] < 0.5 * tuned.path.joinpath("model.safetensors").stat().st_size
    assert sorted(path.name for path in export.path.glob("*.gguf")) == ["adapter.gguf"]
    with pytest.raises(ModelError, match="a full model"):
        run_stage(store, "export", {"format": {"uses": "gguf", "adapter": True}}, inputs={"model": tuned})


def test_an_adapter_that_llama_cpp_cannot_add_is_refused(tuned: Artifact) -> None:
    store = tuned.path.parents[1]
    (data,) = tuned_on(tuned)
    dora = run_stage(store, "sft", {"adapter": "dora", "steps": 2}, inputs={"model": tuned, "data": [data]})
    with pytest.raises(ModelError, match=r"takes no DoRA adapter[\s\S]*folded into its base"):
        run_stage(store, "export", {"format": {"uses": "gguf", "adapter": True}}, inputs={"model": dora})
    config = {"adapter": {"uses": "lora", "r": 2, "modules_to_save": ["norm"]}, "steps": 2}
    whole = run_stage(store, "sft", config, inputs={"model": tuned, "data": [data]})
    with pytest.raises(ModelError, match="no adapter that brings a weight whole"):
        run_stage(store, "export", {"format": {"uses": "gguf", "adapter": True}}, inputs={"model": whole})


SPLITTERS = {
    "deepseek-v3": [*(pre_tokenizers.Split(Regex(text), "isolated") for text in DEEPSEEK_SPLITS), BYTES],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}


@pytest.mark.parametrize("name", list(SPLITTERS))
def test_each_way_of_splitting_is_llama_cpps(name: str, tmp_path: Path) -> None:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(SPLITTERS[name])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Merges across what the splitting keeps apart: with another one, these texts would become other tokens.
    corpus = [*CORPUS * 3, *TEXT]
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    trained.train_from_iterator(corpus, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>")
    folder = tmp_path / "model"
    whole.save_pretrained(folder)
    sizes = LlamaConfig(
        vocab_size=len(trained.get_vocab()),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(sizes).save_pretrained(folder)
    base = run_stage(tmp_path / "s", "base", {"source": str(folder)})
    export = run_stage(tmp_path / "s", "export", inputs={"model": base})
    reader = gguf.GGUFReader(export.path / "model-F16.gguf")
    assert reader.fields["tokenizer.ggml.pre"].contents() == name


def test_importances_of_an_adapter_are_those_of_the_folded_model(tuned: Artifact) -> None:
    store = tuned.path.parents[1]
    (data,) = tuned_on(tuned)
    low_rank = run_stage(store, "sft", {"adapter": "lora", "steps": 2}, inputs={"model": tuned, "data": [data]})
    config = {"format": {"uses": "gguf", "types": ["Q4_K_M"], "imatrix": True}}
    export = run_stage(store, "export", config, inputs={"model": low_rank})
    assert export.facts["imatrix"]["tensors"] > 10


def test_a_first_token_that_only_the_tokenizer_adds_is_not_added_to_chat(tuned: Artifact, tmp_path: Path) -> None:
    model = changed(tuned, tmp_path)
    data = json.loads((model.path / "tokenizer.json").read_text())
    start = data["added_tokens"][0]
    name = start["content"]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            start["content"]: {"id": start["content"], "ids": [start["id"]], "tokens": [start["content"]]}
        },
    }
    (model.path / "tokenizer.json").write_text(json.dumps(data))
    export = run_stage(tmp_path / "s", "export", inputs={"model": resealed(model.path)})
    reader = gguf.GGUFReader(export.path / "model-F16.gguf")
    assert reader.fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_another_first_token_in_llama_cpp_is_caught(tuned: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier_plugins.gguf.tokenizer._adds_bos", lambda data: True)
    monkeypatch.setattr("luthier_plugins.gguf.tokenizer.bos_in", lambda template, folder: True)
    with pytest.raises(ModelError, match="puts another token in front of a conversation"):
        run_stage(tuned.path.parents[1], "export", inputs={"model": tuned})
