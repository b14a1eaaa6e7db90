"""Our trainer against TRL's: first losses, gradients and ten steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from luthier.api import Artifact
from luthier.artifacts.datasets import read_split
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import load_model, load_tokenizer
from luthier.modeling.text import IGNORED
from luthier.testing import run_stage, tiny_dataset, tiny_model
from luthier.training.encoding import encode_row
from safetensors.torch import load_file
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

STEPS = {"steps": 10, "learning_rate": 1e-3, "warmup": 0.2, "weight_decay": 0.1, "log_every": 1}


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    """The settings of TRL's trainers that make them do what `STEPS` says."""
    return {
        "output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "max_steps": 10, "learning_rate": 1e-3, "warmup_steps": 0.2, "weight_decay": 0.1, "logging_steps": 1,
        "seed": 0, "data_seed": 0, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", **more,
    }  # fmt: skip


def assert_trained_alike(mine: Artifact, trainer: Any) -> None:
    """The same first and last loss, and the same weights after ten steps: so the gradients agree."""
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == 10
    assert mine.facts["training"]["loss_first"] == pytest.approx(theirs[0]["loss"], rel=1e-5)
    assert mine.facts["training"]["loss_last"] == pytest.approx(theirs[-1]["loss"], rel=1e-4, abs=1e-6)
    weights, state = load_file(mine.path / "model.safetensors"), trainer.model.state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("micro", [None, 2])
def test_supervised_fine_tuning_is_trl_s(tmp_path: Path, micro: int | None) -> None:
    model = tiny_model(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}" * (1 + n % 3)}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(12)
    ]
    data = tiny_dataset(tmp_path, rows)
    config = {**STEPS, "batch_size": 4, "micro_batch_size": micro}
    mine = run_stage(tmp_path, "sft", config, inputs={"model": model, "data": [data]})
    tokenizer = load_tokenizer(model)
    chat = ChatEncoder(tokenizer, model.facts["stop_token_ids"])
    encoded = [encode_row(chat, row).completions[0] for row in read_split(data, "train")]
    torch.manual_seed(0)
    batch = {"per_device_train_batch_size": micro or 4, "gradient_accumulation_steps": 4 // (micro or 4)}
    trainer = SFTTrainer(
        model=load_model(model),
        args=SFTConfig(
            max_length=None,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            **arguments(tmp_path, **batch),
        ),
        train_dataset=datasets.Dataset.from_dict(
            {"input_ids": [row.input_ids for row in encoded], "labels": [row.labels for row in encoded]}
        ),
        processing_class=tokenizer,
    )
    assert_trained_alike(mine, trainer)


class Tokens(DPOTrainer):
    """TRL's trainer on ready tokens."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def test_preference_optimization_is_trl_s(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {n}"}],
            "chosen": [{"role": "assistant", "content": f"{n}! " * (1 + n % 2)}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for n in range(12)
    ]
    data = tiny_dataset(tmp_path, rows)
    config = {**STEPS, "batch_size": 4, "beta": 0.3, "objective": "dpo"}
    mine = run_stage(tmp_path, "dpo", config, inputs={"model": model, "data": [data]})
    tokenizer = load_tokenizer(model)
    chat = ChatEncoder(tokenizer, model.facts["stop_token_ids"])
    columns: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for row in read_split(data, "train"):
        chosen, rejected = encode_row(chat, row).completions
        first = chosen.labels.count(IGNORED)
        for name, ids in (
            ("prompt_ids", chosen.input_ids[:first]),
            ("chosen_ids", chosen.input_ids[first:]),
            ("rejected_ids", rejected.input_ids[first:]),
        ):
            columns[name].append(ids)
    torch.manual_seed(0)
    trainer = Tokens(
        model=load_model(model),
        ref_model=load_model(model),
        args=DPOConfig(
            beta=0.3, max_length=None, loss_type="sigmoid",
            **arguments(tmp_path, per_device_train_batch_size=4),
        ),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
    )  # fmt: skip
    assert_trained_alike(mine, trainer)


def test_an_adapters_reference_is_the_adapter_it_was(tmp_path: Path) -> None:
    from luthier.training.batches import Reference

    model = tiny_model(tmp_path)
    rows = [{"messages": [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "1"}]}]
    data = tiny_dataset(tmp_path, rows)
    config = {"adapter": "lora", "steps": 3, "learning_rate": 1e-2}
    tuned = run_stage(tmp_path, "sft", config, inputs={"model": model, "data": [data]})
    loaded = load_model(tuned, trainable=True)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = loaded(ids).logits
        reference = Reference(loaded)
        for parameter in loaded.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
        moved = loaded(ids).logits
        with reference:
            assert torch.equal(loaded(ids).logits, before)
        assert torch.equal(loaded(ids).logits, moved)
        assert not torch.equal(moved, before)
