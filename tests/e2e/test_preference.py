"""DPO: the reference is the model that the stage was given, adapter included."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from inline_plugins import OnePlugin
from luthier import run
from luthier.api import Config, Regularizer
from luthier.artifacts.datasets import read_split
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import load_model, load_tokenizer
from luthier.modeling.text import IGNORED
from luthier.registry import Provider, Registry
from luthier.testing import run_stage, tiny_dataset, tiny_model
from luthier.training.encoding import encode_row

RECIPE = """\
luthier: 1
name: pairs
seed: 5
stages:
  chats: {uses: data, source: chats.jsonl}
  pairs: {uses: data, source: pairs.jsonl}
  base:
    uses: init
    data: [chats]
    vocab_size: 300
    hidden_size: 32
    intermediate_size: 64
    layers: 2
    heads: 2
    dtype: float32
  light: {uses: sft, model: base, data: chats, steps: 8, learning_rate: 2e-2, log_every: 1, adapter: {uses: lora, r: 2}}
  full: {uses: sft, model: base, data: chats, steps: 4, learning_rate: 1e-3, log_every: 1}
  light-dpo: {uses: dpo, model: light, data: pairs, steps: 5, learning_rate: 1e-2, log_every: 1, batch_size: 4}
  full-dpo: {uses: dpo, model: full, data: pairs, steps: 5, learning_rate: 1e-3, log_every: 1, batch_size: 4}
"""


@pytest.fixture
def pairs(tmp_path: Path, chats: Path) -> Path:
    """A recipe with DPO on an adapter and on a full model."""
    rows = [{"prompt": f"say {n}", "chosen": f"{n}!", "rejected": "no"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "pairs.yaml"
    path.write_text(RECIPE)
    return path


def test_the_reference_is_the_tuned_model_adapter_included(pairs: Path, tmp_path: Path) -> None:
    events: list[dict[str, object]] = []
    result = run(pairs, store=tmp_path / "s", listeners=[events.append])
    assert result.exit_code == 0, {name: str(stage.error) for name, stage in result.stages.items()}
    tuned = result.artifact("light")
    tokenizer, model = load_tokenizer(tuned), load_model(tuned)
    rows = read_split(result.artifact("pairs"), "train")
    encoder = ChatEncoder(tokenizer, tuned.facts["stop_token_ids"])
    by_hand = []
    for row in rows:
        chosen = encode_row(encoder, row).completions[0]
        answer = [label for label in chosen.labels if label != IGNORED]
        assert tokenizer.decode(answer) == row["chosen"][0]["content"] + "<|im_end|>"
        with torch.no_grad():
            logits = model(torch.tensor([chosen.input_ids])).logits[0, :-1].log_softmax(-1)
        targets = torch.tensor(chosen.input_ids[1:])
        by_hand.append(float(logits.gather(1, targets[:, None])[-len(answer) :].sum()))
    for name in ("light-dpo", "full-dpo"):
        first = next(item["values"] for item in events if item["event"] == "metrics" and item["stage"] == name)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
        if name == "light-dpo":
            assert first["logps/chosen"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)
    made = result.artifact("light-dpo")
    assert made.kind == "adapter"
    assert made.base.key == result.artifact("base").key
    assert not (made.path / "ref").exists()
    assert result.artifact("full-dpo").facts["training"]["loss_last"] < math.log(2)


class Pull(Regularizer[Config]):
    """A penalty that is easy to see: the squared distance from where training began, times a lot."""

    def start(self, model, batches) -> None:
        self.before = [parameter.detach().clone() for parameter in model.parameters()]
        self.rows = sum(batch.completions for batch in batches())

    def penalty(self, model, batch, outputs):
        assert len(outputs.lengths) == batch.completions
        pairs = zip(model.parameters(), self.before, strict=True)
        return 1e4 * sum((now - then).square().sum() for now, then in pairs)


def test_validation_and_regularizers_count_in_preference_training(tmp_path: Path) -> None:
    registry = Registry.installed()
    registry.add(OnePlugin("regularizer", "pull", Config, Pull), Provider("test", "test", "1"))
    model = tiny_model(tmp_path, dtype="float32")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {n}"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for n in range(4)
    ]
    data = tiny_dataset(tmp_path, rows, validation=rows)
    config = {"steps": 6, "learning_rate": 1e-3, "save_every": 3}
    inputs = {"model": model, "data": [data]}
    free = run_stage(tmp_path, "dpo", config, inputs=inputs, registry=registry)
    assert free.facts["training"]["eval_loss"] < math.log(2)
    held = run_stage(tmp_path, "dpo", {**config, "regularizers": ["pull"]}, inputs=inputs, registry=registry)
    moved = [_distance(artifact, model) for artifact in (free, held)]
    assert moved[1] < 0.5 * moved[0]


def _distance(one, other) -> float:
    from safetensors.torch import load_file

    a, b = (load_file(item.path / "model.safetensors") for item in (one, other))
    return float(sum((a[name] - b[name]).square().sum() for name in a))
