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
from luthier.training.mismatched import Mismatched
from luthier.training.mixing import Mix
from safetensors.torch import load_file
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
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


def assert_trained_alike(mine: Artifact, trainer: Any, steps: int = 10) -> None:
    """The same first and last loss, and the same weights after all steps: so the gradients agree."""
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == steps
    assert mine.facts["training"]["loss_first"] == pytest.approx(theirs[0]["loss"], rel=1e-5)
    assert mine.facts["training"]["loss_last"] == pytest.approx(theirs[-1]["loss"], rel=1e-4, abs=1e-6)
    weights, state = load_file(mine.path / "model.safetensors"), trainer.model.state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro", ["auto", 2])
def test_supervised_fine_tuning_is_trl_s(tmp_path: Path, micro: Any) -> None:
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
    size = 4 if micro == "auto" else micro
    batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
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


PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"say {n}"}],
        "chosen": [{"role": "assistant", "content": f"{n}! " * (1 + n % 2)}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for n in range(12)
]


def columns_of(model: Artifact, data: Artifact) -> dict[str, list[list[int]]]:
    """Preferences as TRL's trainers take their tokens."""
    chat = ChatEncoder(load_tokenizer(model), model.facts["stop_token_ids"])
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
    return columns


LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {"loss_type": "sigmoid"}),
    "hinge": ({"loss": "hinge"}, {"loss_type": "hinge"}),
    "ipo": ({"loss": "ipo"}, {"loss_type": "ipo"}),
    "robust": ({"loss": "robust", "label_smoothing": 0.1}, {"loss_type": "robust", "label_smoothing": 0.1}),
    "exo": ({"loss": "exo", "label_smoothing": 0.1}, {"loss_type": "exo_pair", "label_smoothing": 0.1}),
    "nca": ({"loss": "nca"}, {"loss_type": "nca_pair"}),
    "sppo": ({"loss": "sppo"}, {"loss_type": "sppo_hard"}),
    "apo_zero": ({"loss": "apo_zero"}, {"loss_type": "apo_zero"}),
    "apo_down": ({"loss": "apo_down"}, {"loss_type": "apo_down"}),
    "discopop": ({"loss": "discopop"}, {"loss_type": "discopop"}),
    "by token": ({"length_normalized": True}, {"loss_type": "sigmoid_norm"}),
    "sum": (
        {"loss": {"sigmoid": 0.8, "ipo": 0.1, "apo_zero": 0.3}},
        {"loss_type": ["sigmoid", "ipo", "apo_zero"], "loss_weights": [0.8, 0.1, 0.3]},
    ),
    "forward kl": ({"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "js": ({"divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    "alpha": (
        {"divergence": "alpha", "divergence_alpha": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
}
"""What an objective is told here, and TRL there."""


@pytest.mark.parametrize("name", LOSSES)
def test_preference_optimization_is_trl_s(tmp_path: Path, name: str) -> None:
    mine_is, theirs_is = LOSSES[name]
    model = tiny_model(tmp_path)
    data = tiny_dataset(tmp_path, PAIRS)
    config = {**STEPS, "batch_size": 4, "objective": {"uses": "dpo", "beta": 0.3, **mine_is}}
    mine = run_stage(tmp_path, "dpo", config, inputs={"model": model, "data": [data]})
    torch.manual_seed(0)
    trainer = Tokens(
        model=load_model(model),
        ref_model=load_model(model),
        args=DPOConfig(
            beta=0.3, max_length=None,
            **arguments(tmp_path, per_device_train_batch_size=4), **theirs_is,
        ),
        train_dataset=datasets.Dataset.from_dict(columns_of(model, data)),
        processing_class=load_tokenizer(model),
    )  # fmt: skip
    assert_trained_alike(mine, trainer)


LABELLED = [
    {
        "prompt": [{"role": "user", "content": f"say {n // 2}"}],
        "completion": [{"role": "assistant", "content": f"{n}! " * (1 + n % 3)}],
        "label": n % 3 != 0,
    }
    for n in range(12)
]


class LabelledTokens(KTOTrainer):
    """TRL's trainer on ready tokens."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


@pytest.mark.parametrize("loss", ["kto", "apo_zero"])
@pytest.mark.parametrize("micro", ["auto", 1])
def test_tuning_on_labelled_answers_is_trl_s(tmp_path: Path, loss: str, micro: Any) -> None:
    model = tiny_model(tmp_path)
    data = tiny_dataset(tmp_path, LABELLED)
    config = {
        **STEPS, "steps": 6, "batch_size": 6, "micro_batch_size": micro,
        "objective": {"uses": "kto", "beta": 0.3, "loss": loss, "desirable_weight": 0.7, "undesirable_weight": 1.3},
    }  # fmt: skip
    mine = run_stage(tmp_path, "kto", config, inputs={"model": model, "data": [data]})
    chat = ChatEncoder(load_tokenizer(model), model.facts["stop_token_ids"])
    rows = [encode_row(chat, row) for row in read_split(data, "train")]
    others = Mismatched(rows, 1024)
    columns: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "KL_completion_ids": [], "label": []}
    # TRL takes rows in their order here.
    for place in [place for epoch in range(3) for place in Mix.of([len(rows)], None).order(0, epoch).tolist()]:
        own, other = rows[place].completions[0], others[place].completions[0]
        first = own.labels.count(IGNORED)
        assert other.input_ids[:first] == own.input_ids[:first]
        assert other.input_ids != own.input_ids
        for name, value in zip(
            columns, (own.input_ids[:first], own.input_ids[first:], other.input_ids[first:], rows[place].desirable),
            strict=True,
        ):  # fmt: skip
            columns[name].append(value)
    torch.manual_seed(0)
    trainer = LabelledTokens(
        model=load_model(model),
        ref_model=load_model(model),
        args=KTOConfig(
            beta=0.3, max_length=None, loss_type="kto" if loss == "kto" else "apo_zero_unpaired", desirable_weight=0.7,
            undesirable_weight=1.3,
            **(
                arguments(tmp_path, per_device_train_batch_size=6)
                | {"train_sampling_strategy": "sequential", "max_steps": 6}
            ),
        ),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=load_tokenizer(model),
    )  # fmt: skip
    assert_trained_alike(mine, trainer, 6)
