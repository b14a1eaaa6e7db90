"""How much arithmetic training is said to need."""

from __future__ import annotations

from typing import Any

import pytest
from luthier.modeling.text import IGNORED, Encoded
from luthier.training.encoding import EncodedRow
from luthier.training.flops import Arithmetic, most_of
from peft import LoraConfig, get_peft_model
from torch import device
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MixtralConfig

WIDTH, INNER, LAYERS, HEADS, VOCABULARY = 16, 32, 2, 4, 50
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY,
}  # fmt: skip
ATTENTION = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2
GATED = 3 * WIDTH * INNER
ROW = EncodedRow((Encoded([1] * 10, [IGNORED] * 6 + [1] * 4),))
PAIRS = 6 * LAYERS * WIDTH * 10**2


def test_all_weights() -> None:
    found = Arithmetic(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)))
    assert found.of([ROW]) == 10 * 6 * LAYERS * (ATTENTION + GATED) + PAIRS + 4 * 6 * WIDTH * VOCABULARY
    assert found.of([ROW, ROW]) == 2 * found.of([ROW])


def test_documents_that_do_not_see_each_other_have_fewer_pairs() -> None:
    found = Arithmetic(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)))
    packed = EncodedRow((Encoded([1] * 10, [IGNORED] * 6 + [1] * 4, (5, 5)),))
    assert found.of([ROW]) - found.of([packed]) == PAIRS / 2


def test_frozen_weights_have_no_gradients_of_their_own() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)), config)
    body = LAYERS * (4 * (ATTENTION + GATED) + 6 * 2 * (WIDTH + WIDTH))
    assert Arithmetic(model).of([ROW]) == 10 * body + PAIRS + 4 * 4 * WIDTH * VOCABULARY


def test_of_experts_those_count_that_a_token_goes_to() -> None:
    config = MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)
    found = Arithmetic(AutoModelForCausalLM.from_config(config)).of([ROW])
    right = 10 * 6 * LAYERS * (ATTENTION + 2 * GATED) + PAIRS + 4 * 6 * WIDTH * VOCABULARY
    # The router's part is small, and no linear layer.
    assert found == pytest.approx(right, rel=0.01)


def test_a_model_without_attention_has_no_pairs() -> None:
    model = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50))
    long = EncodedRow((Encoded([1] * 20, [IGNORED] * 16 + [1] * 4),))
    head = 4 * 6 * 16 * 50
    found = Arithmetic(model)
    assert found.of([long]) - head == 2 * (found.of([ROW]) - head) > 0


def test_a_cpu_has_no_figure_to_be_compared_with() -> None:
    assert most_of(device("cpu")) is None
