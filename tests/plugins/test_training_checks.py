"""What is computed is what is said: reference, output head, packing, losses, and what is stored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from gguf_models import architecture, make_gpt2, make_model
from hypothesis import given
from hypothesis import strategies as st
from luthier.api import Artifact, DataError, Message, ModelError, StageError
from luthier.artifacts.datasets import read_split
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import load_model, load_tokenizer
from luthier.modeling.text import IGNORED, Encoded
from luthier.testing import TestContext, run_stage, tiny_dataset, tiny_model
from luthier.training.batches import log_probabilities
from luthier.training.encoding import EncodedRow, block_of, encode_row
from luthier.training.layout import Layout
from luthier.training.proof import Proof, sample_of
from luthier.training.rows import Blocks
from luthier.training.run import Material, train
from luthier.training.storing import Rounding, Survival, rounded, storage_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, MambaConfig, MambaForCausalLM

LN2 = math.log(2)
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say {n}" * (1 + n % 3)},
            {"role": "assistant", "content": f"{n}!" * (n + 1)},
        ]
    }
    for n in range(8)
]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"say {n}"}],
        "chosen": [{"role": "assistant", "content": f"{n}!"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for n in range(8)
]
STEP = {"steps": 1, "batch_size": 8, "learning_rate": 1e-9}


def encoder_of(model: Artifact) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(model), model.facts["stop_token_ids"])


def plain_loss(model: Any, sequences: Sequence[Encoded]) -> float:
    """-log p of each trained token, by the model's own logits, one sequence at a time."""
    losses: list[torch.Tensor] = []
    for item in sequences:
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([item.input_ids])).logits[0, :-1].float().log_softmax(-1)
        labels = torch.tensor(item.labels[1:])
        kept = labels != IGNORED
        losses.append(-logs[kept].gather(1, labels[kept][:, None])[:, 0])
    return float(torch.cat(losses).mean())


def chats_loss(artifact: Artifact, rows: Sequence[Any] = CHATS) -> float:
    encoder = encoder_of(artifact)
    sequences = [item for row in rows for item in encoder.conversation(row["messages"])]
    return plain_loss(load_model(artifact).eval(), sequences)


def store_of(tmp_path: Path) -> tuple[Path, Artifact, Artifact]:
    """A store, a model and conversations."""
    return tmp_path / "s", tiny_model(tmp_path / "s"), tiny_dataset(tmp_path / "s", CHATS)


# -- the reference ----------------------------------------------------------------------------------

ADAPTERS = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2, 40]}},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rslora": {"target_modules": ["v_proj"], "use_rslora": True, "bias": "lora_only"},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_reference_is_the_adapter_as_it_was_given_whatever_it_has(tmp_path: Path, name: str) -> None:
    store = tmp_path / "s"
    base = tiny_model(store, tied=False)
    network = peft.get_peft_model(load_model(base), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **ADAPTERS[name]))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    network.save_pretrained(tmp_path / "adapter")
    adapter = run_stage(store, "adapter", {"source": str(tmp_path / "adapter")}, inputs={"model": base})
    config = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3, "log_every": 1}
    made = run_stage(store, "dpo", config, inputs={"model": adapter, "data": [tiny_dataset(store, PAIRS)]})
    assert made.facts["training"]["loss_first"] == pytest.approx(LN2, abs=1e-5)
    assert made.facts["training"]["loss_last"] < LN2 - 1e-4
    before, after = (load_file(item.path / "adapter_model.safetensors") for item in (adapter, made))
    assert before.keys() == after.keys()
    # All that the adapter has is trained: a head that is passed by would stay as it is.
    still = [key for key in before if "base_layer" not in key and torch.equal(before[key], after[key])]
    assert not still


@pytest.mark.parametrize("where", ["attention", "config"])
def test_dropout_of_any_kind_is_off_beside_a_reference(tmp_path: Path, where: str) -> None:
    store = tmp_path / "s"
    base = tiny_model(store)
    if where == "attention":
        source = tmp_path / "copy"
        load_model(base).save_pretrained(source)
        load_tokenizer(base).save_pretrained(source)
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": base.facts["stop_token_ids"]}))
        base = run_stage(store, "base", {"source": str(source)})
    else:
        base = run_stage(store, "base", {"source": str(make_gpt2(tmp_path / "gpt2"))})
    made = run_stage(store, "dpo", STEP, inputs={"model": base, "data": [tiny_dataset(store, PAIRS)]})
    assert made.facts["training"]["loss_first"] == pytest.approx(LN2, abs=1e-6)
    assert any("dropout is off" in text for text in made.manifest["warnings"])


class Shaken(nn.Module):
    """A model that is another one while it is trained."""

    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside = inside
        self.config = inside.config

    def get_output_embeddings(self) -> nn.Module:
        return self.inside.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        output = self.inside(**inputs)
        output.logits = output.logits * (1.5 if self.training else 1.0)
        return output


def proof_of(model: Any, artifact: Artifact, rows: Sequence[Any]) -> Proof:
    encoder = encoder_of(artifact)
    return Proof(model, [encode_row(encoder, row) for row in rows], 0, "fp32", nullcontext)


def test_a_reference_that_is_another_model_is_refused(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "s")
    model = Shaken(load_model(base))
    proof = proof_of(model, base, PAIRS)
    with pytest.raises(ModelError, match="not the model that training begins with"):
        proof.check_steady(fused=False)


# -- the output head --------------------------------------------------------------------------------

HEADS = ["llama", "gemma2", "gemma3", "qwen2-moe", "mixtral", "phi3", "deepseek-v3"]


@pytest.mark.parametrize("name", HEADS)
def test_the_reported_loss_is_that_of_the_model_s_own_logits(tmp_path: Path, name: str) -> None:
    store = tmp_path / "s"
    more = {"final_logit_softcapping": 2.0} if name == "gemma2" else {}
    base = run_stage(store, "base", {"source": str(make_model(tmp_path / "m", name, **more))})
    made = run_stage(store, "sft", STEP, inputs={"model": base, "data": [tiny_dataset(store, CHATS)]})
    assert made.facts["training"]["loss_first"] == pytest.approx(chats_loss(base), rel=1e-5)
    assert not [text for text in made.manifest["warnings"] if "logits" in text]
    before, after = (json.loads((item.path / "config.json").read_text()) for item in (base, made))
    assert after == before


@pytest.mark.parametrize("how", [{"dtype": "bf16"}, {"precision": "bf16"}, {"micro_batch_size": 2}])
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("uses", ["sft", "dpo"])
def test_rounding_is_no_difference(tmp_path: Path, uses: str, adapter: str, how: dict[str, Any]) -> None:
    store = tmp_path / "s"
    base = tiny_model(store, hidden_size=128, heads=2)
    data = [tiny_dataset(store, CHATS if uses == "sft" else PAIRS)]
    config = {"steps": 1, "batch_size": 8, "learning_rate": 1e-9, "adapter": adapter, **how}
    made = run_stage(store, uses, config, inputs={"model": base, "data": data})
    assert not [text for text in made.manifest["warnings"] if "differ" in text]
    if uses == "dpo":
        assert made.facts["training"]["loss_first"] == pytest.approx(LN2, abs=2e-3)


class Capped(LlamaForCausalLM):
    """A head with a soft cap of a name that nobody knows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 0.3 * torch.tanh(output.logits * 20)
        return output


def test_a_head_that_does_more_than_its_weight_is_computed_by_the_model_itself(tmp_path: Path) -> None:
    from luthier.api.tuning import TuningConfig
    from luthier.registry import default_registry

    base = tiny_model(tmp_path / "s")
    encoder = encoder_of(base)
    rows = [encode_row(encoder, row) for row in CHATS]
    model = load_model(base)
    model.__class__ = Capped
    right = plain_loss(model.eval(), [item for row in rows for item in row.completions])
    use = default_registry().use("stage", {"uses": "sft", "model": "m", "data": "d", **STEP})
    config = use.config
    assert isinstance(config, TuningConfig)
    context = Recorder(tmp_path / "scratch")
    result = train(model, Material(rows, [], 0, "k"), config, context)
    assert result.facts["loss_first"] == pytest.approx(right, rel=1e-5)
    assert any("differ from the model's own" in text for text in context.warnings)


class Recorder(TestContext):
    """Keeps metrics."""

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.logged: list[dict[str, float]] = []

    def metrics(self, values: Any, step: int) -> None:
        self.logged.append(dict(values))


def test_what_a_model_adds_to_the_loss_itself_is_reported_apart(tmp_path: Path) -> None:
    store = tmp_path / "s"
    source = make_model(tmp_path / "m", "mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    base = run_stage(store, "base", {"source": str(source)})
    data = tiny_dataset(store, CHATS)
    made = run_stage(store, "sft", STEP, inputs={"model": base, "data": [data]})
    assert made.facts["training"]["loss_first"] == pytest.approx(chats_loss(base), rel=1e-5)
    encoder = encoder_of(base)
    encoded = [encode_row(encoder, row) for row in CHATS]
    model = load_model(base)
    padded = Layout(0, packed=False).batch(encoded)
    whole = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask, labels=padded.input_ids)
    for batch in (padded, Layout(0).batch(encoded)):
        for fused in (False, True):
            auxiliary = log_probabilities(model, batch, fused=fused).auxiliary
            assert auxiliary is not None
            # Without a mask, the model's own would count padding too.
            if fused or batch is padded:
                assert float(auxiliary) == pytest.approx(0.5 * float(whole.aux_loss), rel=1e-5)
    # It is trained: with a larger share, the gates move further.
    quick = {**STEP, "steps": 5, "learning_rate": 1e-3}
    gates = []
    for share in (0.0, 50.0):
        config = json.loads((base.path / "config.json").read_text()) | {"router_aux_loss_coef": share}
        (source / "config.json").write_text(json.dumps(config))
        other = run_stage(store, "base", {"source": str(source)})
        tuned = run_stage(store, "sft", quick, inputs={"model": other, "data": [data]})
        gates.append(load_file(tuned.path / "model.safetensors"))
    assert any(not torch.equal(gates[0][name], gates[1][name]) for name in gates[0] if "gate" in name)


# -- numbers that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, {"uses": "lora", "r": 4}])
@pytest.mark.parametrize("uses", ["sft", "dpo", "orpo"])
def test_training_that_diverges_fails_and_stores_nothing(tmp_path: Path, uses: str, adapter: Any) -> None:
    store, base, _ = store_of(tmp_path)
    data = tiny_dataset(store, CHATS if uses == "sft" else PAIRS)
    config = {"steps": 5, "batch_size": 4, "learning_rate": 1e18, **({"adapter": adapter} if adapter else {})}
    with pytest.raises((ModelError, StageError), match=r"is nan|is inf|not finite"):
        run_stage(store, uses, config, inputs={"model": base, "data": [data]})


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("adapter", [None, {"uses": "lora", "r": 4}])
def test_a_weight_that_is_not_finite_is_named_before_the_first_step(tmp_path: Path, value: float, adapter: Any) -> None:
    store, base, data = store_of(tmp_path)
    source = tmp_path / "broken"
    load_model(base).save_pretrained(source)
    load_tokenizer(base).save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": base.facts["stop_token_ids"]}))
    broken = run_stage(store, "base", {"source": str(source)})
    config = {**STEP, **({"adapter": adapter} if adapter else {})}
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj"):
        run_stage(store, "sft", config, inputs={"model": broken, "data": [data]})


# -- packed documents -------------------------------------------------------------------------------

DOCUMENTS = [{"text": f"The {n}th text says that {n} plus {n} is {2 * n}. " * (1 + n % 3)} for n in range(9)]


def blocks_by_hand(base: Artifact, length: int, seed: int = 0) -> list[Encoded]:
    """Documents cut where blocks end, each piece alone."""
    import random

    documents = [encoder_of(base).document(row) for row in DOCUMENTS]
    random.Random(seed).shuffle(documents)
    pieces: list[Encoded] = []
    room = length
    for document in documents:
        rest = document
        while rest:
            piece, rest = rest[:room], rest[room:]
            pieces.append(Encoded(piece, [IGNORED, *piece[1:]]))
            room = room - len(piece) or length
    return [piece for piece in pieces if len(piece.input_ids) > 1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral"])
def test_packed_documents_do_not_see_each_other(tmp_path: Path, name: str) -> None:
    store = tmp_path / "s"
    source = make_gpt2(tmp_path / "m") if name == "gpt2" else make_model(tmp_path / "m", name)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {name: 0.0 for name in config if name.endswith("pdrop")}))
    base = run_stage(store, "base", {"source": str(source)})
    data = tiny_dataset(store, DOCUMENTS)
    config = {"steps": 1, "batch_size": 99, "learning_rate": 1e-9, "max_length": 48}
    made = run_stage(store, "pretrain", config, inputs={"model": base, "data": [data]})
    right = plain_loss(load_model(base).eval(), blocks_by_hand(base, 48))
    assert made.facts["training"]["loss_first"] == pytest.approx(right, rel=1e-4)
    assert not [text for text in made.manifest["warnings"] if "packed" in text]
    across = run_stage(store, "pretrain", {**config, "across_documents": True}, inputs={"model": base, "data": [data]})
    assert across.facts["training"]["loss_first"] != pytest.approx(right, rel=1e-4)
    assert across.facts["training"]["tokens"] > made.facts["training"]["tokens"]


def test_blocks_lose_no_token() -> None:
    documents = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    lengths = np.array([len(item) for item in documents])
    rows = list(Blocks([block_of(item) for item in documents], lengths, 4, None, across=False))
    blocks = [row.completions[0] for row in rows]
    assert [block.input_ids for block in blocks] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert [block.labels for block in blocks] == [[IGNORED, 2, 3, IGNORED], [IGNORED, 6, 7, 8]]
    assert [block.lengths for block in blocks] == [(3, 1), (4,)]


def test_a_model_whose_documents_see_each_other_gets_them_one_by_one(tmp_path: Path) -> None:
    store = tmp_path / "s"
    base = tiny_model(store)
    config = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=8)
    torch.manual_seed(0)
    model = MambaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(tmp_path / "m")
    load_tokenizer(base).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": base.facts["stop_token_ids"]}))
    recurrent = run_stage(store, "base", {"source": str(tmp_path / "m")})
    settings = {"steps": 1, "batch_size": 99, "learning_rate": 1e-9, "max_length": 48}
    made = run_stage(store, "pretrain", settings, inputs={"model": recurrent, "data": [tiny_dataset(store, DOCUMENTS)]})
    right = plain_loss(load_model(recurrent).eval(), blocks_by_hand(recurrent, 48))
    assert any("packed documents see each other" in text for text in made.manifest["warnings"])
    assert made.facts["training"]["loss_first"] == pytest.approx(right, rel=1e-4)


def test_packing_is_proven_on_blocks_that_are_packed(tmp_path: Path) -> None:
    long = EncodedRow((Encoded(list(range(1, 49)), [IGNORED, *range(2, 49)], (48,)),))
    packed = EncodedRow((Encoded(list(range(1, 49)), [IGNORED, *range(2, 49)], (20, 28)),))
    sample = sample_of([long, long, long, packed])
    assert any(len(row.completions[0].lengths) == 2 for row in sample)
    short = [EncodedRow((Encoded([1, 2, 3, 4][:n], [IGNORED, 2, 3, 4][:n]),)) for n in (4, 4, 3)]
    assert {len(row) for row in sample_of(short)} == {3, 4}
    prompt = EncodedRow((Encoded([7] * 5000, [IGNORED] * 4990 + [7] * 10),))
    assert max(len(row) for row in sample_of([prompt])) < 500


def test_a_tokenizer_without_padding_and_end_is_padded_all_the_same(tmp_path: Path) -> None:
    store = tmp_path / "s"
    base = tiny_model(store)
    source = tmp_path / "bare"
    load_model(base).save_pretrained(source)
    load_tokenizer(base).save_pretrained(source)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists():
            content = json.loads((source / name).read_text())
            bare = {key: value for key, value in content.items() if key not in ("pad_token", "eos_token")}
            (source / name).write_text(json.dumps(bare))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": base.facts["stop_token_ids"]}))
    bare = run_stage(store, "base", {"source": str(source)})
    assert load_tokenizer(bare).pad_token is None
    made = run_stage(store, "sft", STEP, inputs={"model": bare, "data": [tiny_dataset(store, CHATS)]})
    assert made.facts["training"]["loss_first"] == pytest.approx(chats_loss(base), rel=1e-5)


# -- rows that cannot be trained on -----------------------------------------------------------------


def test_rows_longer_than_the_model_s_context_are_left_out_and_named(tmp_path: Path) -> None:
    store = tmp_path / "s"
    base = tiny_model(store, context_length=64)
    rows = [
        *CHATS[:3],
        {"messages": [Message(role="user", content="x"), Message(role="assistant", content="long " * 60)]},
    ]
    made = run_stage(store, "sft", STEP, inputs={"model": base, "data": [tiny_dataset(store, rows)]})
    (warning,) = [text for text in made.manifest["warnings"] if "longer" in text]
    assert "the model's context of 64 tokens" in warning
    assert 'row 4 ("x")' in warning
    assert made.facts["training"]["rows"] == 3
    assert sum(made.facts["training"]["left_out"].values()) == 1
    with pytest.raises(DataError, match="row 4"):
        run_stage(
            store, "sft", {**STEP, "on_long": "fail"}, inputs={"model": base, "data": [tiny_dataset(store, rows)]}
        )
    with pytest.raises(DataError, match="context of 64"):
        run_stage(store, "pretrain", {**STEP, "max_length": 65}, inputs={"model": base, "data": [tiny_dataset(store)]})


def test_bad_rows_are_refused_above_a_budget_and_named(tmp_path: Path) -> None:
    store = tmp_path / "s"
    base = tiny_model(store)
    rows = [*PAIRS, {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}]
    data = tiny_dataset(store, rows)
    with pytest.raises(DataError, match=r'row 9 \("say 0"\).*same tokens') as caught:
        run_stage(store, "dpo", STEP, inputs={"model": base, "data": [data]})
    assert "drop_up_to" in str(caught.value)
    made = run_stage(store, "dpo", {**STEP, "bad_rows": {"drop_up_to": 0.12}}, inputs={"model": base, "data": [data]})
    assert made.facts["training"]["rows"] == 8
    assert sum(made.facts["training"]["left_out"].values()) == 1
    assert any("left out, the first is row 9" in text for text in made.manifest["warnings"])
    assert read_split(data, "train")[8]["rejected"] == PAIRS[0]["chosen"]


# -- what is stored ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(values=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=8))
def test_stochastic_rounding_goes_to_a_neighbour_and_is_right_in_the_mean(
    dtype: torch.dtype, values: list[float]
) -> None:
    exact = torch.tensor(values)
    many = exact.repeat(400, 1)
    found = rounded(many, dtype, torch.Generator().manual_seed(0)).float()
    down, up = found.min(0).values, found.max(0).values
    near = exact.to(dtype).float()
    gap = (near.abs() * 2.0 ** (-7 if dtype == torch.bfloat16 else -10)).clamp(min=2.0**-24)
    assert bool((found - exact).abs().le(gap * 1.001 + 1e-30).all())
    assert bool(((down <= exact) & (exact <= up) | (near == exact) | (up - down == 0)).all())
    assert bool(((found.mean(0) - exact).abs() <= 0.2 * gap + 1e-30).all())


def test_survival_is_the_share_of_a_change_that_rounding_keeps() -> None:
    before = torch.ones(1000)
    small, large = before + 1e-4, before + 0.25
    for after, share in ((small, 0.0), (large, 1.0)):
        survival = Survival()
        survival.add(before, after, after.to(torch.bfloat16))
        assert survival.share == pytest.approx(share, abs=1e-6)
    assert Survival().share == 1.0
    drawn = Survival()
    drawn.add(before, small, rounded(small, torch.bfloat16, torch.Generator().manual_seed(0)))
    assert drawn.share == pytest.approx(1.0, abs=0.35)


def half_of(store: Path, dtype: str = "bfloat16") -> Artifact:
    return tiny_model(store, dtype=dtype)


def test_weights_stay_in_float32_where_rounding_would_undo_training(tmp_path: Path) -> None:
    store = tmp_path / "s"
    base = half_of(store)
    data = [tiny_dataset(store, CHATS)]
    slow = {"steps": 4, "batch_size": 8, "learning_rate": 2e-6}
    kept = run_stage(store, "sft", slow, inputs={"model": base, "data": data})
    assert kept.facts["dtype"] == "F32"
    assert kept.facts["training"]["stored"]["instead_of"]["survived"] < 0.5
    assert json.loads((kept.path / "config.json").read_text())["dtype"] == "float32"
    forced = run_stage(store, "sft", {**slow, "save_dtype": "bf16"}, inputs={"model": base, "data": data})
    assert forced.facts["dtype"] == "BF16"
    assert any("rounded away in bfloat16" in text for text in forced.manifest["warnings"])
    drawn = run_stage(
        store, "sft", {**slow, "save_dtype": "bf16", "rounding": "stochastic"}, inputs={"model": base, "data": data}
    )
    assert drawn.facts["training"]["stored"]["survived"] == pytest.approx(1.0, abs=0.2)
    fast = run_stage(store, "sft", {**slow, "learning_rate": 1e-2}, inputs={"model": base, "data": data})
    assert fast.facts["dtype"] == "BF16"
    assert fast.facts["training"]["stored"]["survived"] > 0.95
    # Told of the loss, each is as good as its file.
    gains = [chats_loss(base) - chats_loss(made) for made in (kept, forced, drawn)]
    assert gains[0] > 0
    assert gains[1] < 0.7 * gains[0]
    assert gains[2] == pytest.approx(gains[0], rel=0.3)


def test_the_loss_of_held_out_rows_is_that_of_the_stored_weights(tmp_path: Path) -> None:
    store = tmp_path / "s"
    base = half_of(store)
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    split = run_stage(store, "data", {"source": str(source), "split": {"validation": 0.4}})
    held_out = read_split(split, "validation")
    for config in (
        {"save_dtype": "bf16"},
        {"save_dtype": "fp16"},
        {},
        {"adapter": {"uses": "lora"}, "save_dtype": "bf16"},
    ):
        quick = {"steps": 3, "batch_size": 4, "learning_rate": 3e-4, **config}
        made = run_stage(store, "sft", quick, inputs={"model": base, "data": [split]})
        assert made.facts["training"]["eval_loss"] == pytest.approx(chats_loss(made, held_out), rel=2e-6)


def test_each_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    store = tmp_path / "s"
    base = half_of(store)
    source = tmp_path / "mixed"
    load_model(base, options={"dtype": "bfloat16"}).save_pretrained(source)
    load_tokenizer(base).save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    weights = {name: value.float() + 1e-4 if "norm" in name else value for name, value in weights.items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": base.facts["stop_token_ids"]}))
    mixed = run_stage(store, "base", {"source": str(source)})
    quick = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2}
    made = run_stage(store, "sft", quick, inputs={"model": mixed, "data": [tiny_dataset(store, CHATS)]})
    stored = load_file(made.path / "model.safetensors")
    assert {name: value.dtype for name, value in stored.items()} == {
        name: torch.float32 if "norm" in name else torch.bfloat16 for name in weights
    }


def test_whole_weights_of_a_base_in_bfloat16_are_not_trained(tmp_path: Path) -> None:
    store = tmp_path / "s"
    base = tiny_model(store, tied=False)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(load_model(base), config).save_pretrained(tmp_path / "adapter")
    adapter = run_stage(store, "adapter", {"source": str(tmp_path / "adapter")}, inputs={"model": base})
    given = {"model": adapter, "data": [tiny_dataset(store, CHATS)]}
    with pytest.raises(ModelError, match=r"trains whole weights of its base \(.*lm_head"):
        run_stage(store, "sft", {**STEP, "dtype": "bf16"}, inputs=given)
    assert run_stage(store, "sft", STEP, inputs=given).kind == "adapter"


def test_a_value_beyond_the_range_of_float16_is_kept_in_float32_or_refused() -> None:
    model = nn.Linear(4, 2, bias=False)
    before = [("weight", model.weight.detach().clone())]
    with torch.no_grad():
        model.weight[1, 2] = 70000.0
    rounding = Rounding("nearest", 0)
    kept = storage_of(model, before, {}, torch.float16, "auto", rounding)
    assert kept.dtype == torch.float32
    assert kept.receipt["instead_of"] == {"dtype": "float16", "survived": 0.0, "rounding": "nearest"}
    with pytest.raises(ModelError, match=r"1 of 8 values of weight are not finite in float16"):
        storage_of(model, before, {}, torch.float16, "fp16", rounding)


def test_validation_loss_is_a_mean_over_tokens_for_any_batch_size(tmp_path: Path) -> None:
    store = tmp_path / "s"
    base = tiny_model(store)
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    split = run_stage(store, "data", {"source": str(source), "split": {"validation": 0.5}})
    right = chats_loss(base, read_split(split, "validation"))
    for size in (1, 3, 16):
        made = run_stage(store, "sft", {**STEP, "batch_size": size}, inputs={"model": base, "data": [split]})
        assert made.facts["training"]["eval_loss"] == pytest.approx(right, rel=1e-6)


# -- selectors --------------------------------------------------------------------------------------


def test_every_selector_has_to_match(tmp_path: Path) -> None:
    store, base, data = store_of(tmp_path)
    adapter = {"uses": "lora", "r": 4, "target_modules": ["q_proj", "v_prj", "w1"]}
    with pytest.raises(ModelError, match=r"what the model does not have: v_prj, w1") as caught:
        run_stage(store, "sft", {**STEP, "adapter": adapter}, inputs={"model": base, "data": [data]})
    assert "v_proj" in str(caught.value)
    exact = {"uses": "lora", "r": 4, "target_modules": ["model.layers.0.self_attn.q_proj", "down_proj"]}
    made = run_stage(store, "sft", {**STEP, "adapter": exact}, inputs={"model": base, "data": [data]})
    assert len(load_file(made.path / "adapter_model.safetensors")) == 2 * 3


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norms"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.7.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
    ],
)
def test_selectors_of_other_kinds_have_to_match_as_well(tmp_path: Path, config: dict[str, Any]) -> None:
    from luthier.modeling.adapter_targets import check_selectors

    base = tiny_model(tmp_path / "s", tied=False)
    model = peft.get_peft_model(load_model(base), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **config))
    with pytest.raises(ModelError, match="what the model does not have"):
        check_selectors(model)


def test_experts_that_get_no_adapter_are_reported(tmp_path: Path) -> None:
    store = tmp_path / "s"
    tokenizer = make_model(tmp_path / "tokenizer", "llama")
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=320, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / "m" / name).write_text((tokenizer / name).read_text())
    base = run_stage(store, "base", {"source": str(tmp_path / "m")})
    data = [tiny_dataset(store, CHATS)]

    def experts_in(adapter: dict[str, Any], model: Artifact) -> tuple[list[str], bool]:
        made = run_stage(
            store, "sft", {**STEP, "adapter": {"uses": "lora", **adapter}}, inputs={"model": model, "data": data}
        )
        weights = load_file(made.path / "adapter_model.safetensors")
        return [text for text in made.manifest["warnings"] if "experts" in text], any(
            "experts" in key for key in weights
        )

    assert experts_in({"r": 2}, base) == ([], True)
    # PEFT has no DoRA for parameters.
    (warning,), has = experts_in({"uses": "dora", "r": 2}, base)
    assert "% of the weights in the model's layers get no adapter" in warning
    assert not has
    assert experts_in({"r": 2, "target_modules": ["q_proj"]}, base) == ([], False)
    # Those of other architectures PEFT knows.
    mixtral = run_stage(store, "base", {"source": str(make_model(tmp_path / "mixtral", "mixtral"))})
    assert experts_in({"r": 2}, mixtral) == ([], True)


def test_a_row_of_several_sequences_is_one_row() -> None:
    rows = [
        EncodedRow((Encoded([1, 2], [IGNORED, 2]), Encoded([3, 4, 5], [IGNORED, 4, 5]))),
        EncodedRow((Encoded([6], [6]),)),
    ]
    batch = Layout(0, packed=False).batch(rows)
    assert batch.input_ids.tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]
    assert batch.owner.tolist() == [0, 1, 1]
    assert batch.completions == 3
    assert batch.pairs is None


# -- adapters and architectures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (["W_pack"], "does not have: W_pack"),
        (["layers\\..*q_proj"], "does not have"),
        (["all-linear"], "does not have: all-linear"),
        (["q_proj", "input_layernorm"], "input_layernorm, a LlamaRMSNorm, which no low-rank adapter goes on"),
        (["self_attn"], "a LlamaAttention"),
    ],
)
def test_targets_that_are_no_layers_are_refused_by_name(tmp_path: Path, targets: list[str], told: str) -> None:
    store, base, data = store_of(tmp_path)
    adapter = {"uses": "lora", "r": 2, "target_modules": targets}
    with pytest.raises(ModelError, match=re.escape(told)):
        run_stage(store, "sft", {**STEP, "adapter": adapter}, inputs={"model": base, "data": [data]})


MIXTURES: dict[str, dict[str, Any]] = {
    "phimoe": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    },
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1,
              "expert_layer_offset": 0, "use_mamba_kernels": False, "mamba_d_state": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_says_what_it_leaves_out_of_a_mixture(tmp_path: Path, name: str) -> None:
    store = tmp_path / "s"
    base = run_stage(store, "base", {"source": str(architecture(tmp_path / "m", name, **MIXTURES[name]))})
    data = [tiny_dataset(store, CHATS)]
    made = run_stage(store, "sft", {**STEP, "adapter": {"uses": "lora", "r": 2}}, inputs={"model": base, "data": data})
    trained = {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in
               load_file(made.path / "adapter_model.safetensors")}  # fmt: skip
    model = load_model(base)
    head = model.get_output_embeddings()
    missed = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name not in trained
    }
    missed |= {
        key for key, value in model.named_parameters()
        if value.ndim == 3 and "conv" not in key and not any(key.startswith(f"{part}.") for part in trained)
    }  # fmt: skip
    told = " ".join(text for text in made.manifest["warnings"] if "get no adapter" in text)
    for missing in missed:
        assert re.sub(r"\.\d+(?=\.|$)", ".*", missing) in told


def test_a_base_that_is_broken_is_told_so_before_training(tmp_path: Path) -> None:
    store, base, data = store_of(tmp_path)
    source = tmp_path / "broken"
    load_model(base).save_pretrained(source)
    load_tokenizer(base).save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    # A token that no row has.
    weights["model.embed_tokens.weight"][319, 3] = math.nan
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": base.facts["stop_token_ids"]}))
    broken = run_stage(store, "base", {"source": str(source)})
    for config in (STEP, {**STEP, "adapter": "lora"}):
        with pytest.raises(ModelError, match=r"NaN or infinite values in .*embed_tokens") as told:
            run_stage(store, "sft", config, inputs={"model": broken, "data": [data]})
        assert "learning_rate" not in str(told.value)


def test_an_adapter_from_outside_that_is_broken_is_refused(tmp_path: Path) -> None:
    store, base, _ = store_of(tmp_path)
    peft.get_peft_model(load_model(base), peft.LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = next(key for key in weights if "lora_B" in key)
    weights[name][0, 0] = math.nan
    save_file(weights, tmp_path / "a" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"NaN or infinite values in .*lora_B"):
        run_stage(store, "adapter", {"source": str(tmp_path / "a")}, inputs={"model": base})


@pytest.mark.parametrize("every", [1, 3, 10])
def test_the_last_loss_is_that_of_the_last_step(tmp_path: Path, every: int) -> None:
    store, base, data = store_of(tmp_path)
    config = {"steps": 5, "batch_size": 4, "learning_rate": 1e-3}
    exact = run_stage(store, "sft", {**config, "log_every": 1}, inputs={"model": base, "data": [data]})
    other = run_stage(
        store, "sft", {**config, "log_every": every, "micro_batch_size": 2}, inputs={"model": base, "data": [data]}
    )
    assert other.facts["training"]["loss_last"] == pytest.approx(exact.facts["training"]["loss_last"], rel=1e-5)
