"""A stage that was cut off goes on to the very bits that it would have made, whatever it trains and however."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from luthier.api import Artifact
from luthier.testing import run_stage, tiny_model
from luthier.worker import context as contexts

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say {n} " * (1 + n % 4)},
            {"role": "assistant", "content": f"{n}! " * (1 + n % 5)},
        ]
    }
    for n in range(20)
]
PAIRS = [
    {
        "prompt": row["messages"][:1],
        "chosen": row["messages"][1:],
        "rejected": [{"role": "assistant", "content": f"no {n}"}],
    }
    for n, row in enumerate(CHATS)
]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("sft", {}),
    "cut": ("sft", {"micro_batch_size": 2}),
    "dropout": ("sft", {"adapter": {"uses": "lora", "r": 2, "lora_dropout": 0.3}, "micro_batch_size": 3}),
    "noise": ("sft", {"neftune_noise_alpha": 5.0}),
    "pissa": ("sft", {"adapter": {"uses": "lora", "r": 2, "init": "pissa"}}),
    "qlora": ("sft", {"adapter": {"uses": "qlora", "r": 2}}),
    "8-bit": ("sft", {"optimizer": "adamw8bit"}),
    "muon": ("sft", {"optimizer": "muon", "schedule": "wsd", "warmup": 0.2}),
    "adafactor": ("sft", {"optimizer": "adafactor"}),
    "lion": ("sft", {"optimizer": "lion"}),
    "best": ("sft", {"keep_best": True, "eval_every": 2, "patience": 50}),
    "l2sp": ("sft", {"regularizers": [{"uses": "l2sp"}]}),
    "part": ("sft", {"train": ["*.mlp.*"], "gradient_checkpointing": True}),
    "pretrain": ("pretrain", {"max_length": 32}),
    "shared": ("dpo", {"learning_rate": 1e-3}),
    "shared, cut": ("dpo", {"micro_batch_size": 3, "adapter": {"uses": "lora", "r": 2}}),
    "odds": ("orpo", {"precision": "bf16"}),
}


class Cut(Exception):
    """The process ends here."""


@pytest.mark.parametrize("name", CASES)
def test_what_was_cut_off_goes_on_to_the_same_bits(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uses, more = CASES[name]
    source = tmp_path / "rows.jsonl"
    rows = CHATS if uses in ("sft", "pretrain") else PAIRS
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # 15 rows in steps of 4: epochs end with shorter steps, and it is cut off in the second epoch.
    config = {"steps": 9, "batch_size": 4, "learning_rate": 5e-3, "save_every": 2, "log_every": 1, **more}

    def made(store: Path) -> Artifact:
        model = tiny_model(store, hidden_size=64)
        data = run_stage(store, "data", {"source": str(source), "split": {"validation": 0.25}})
        return run_stage(store, uses, config, inputs={"model": model, "data": [data]})

    straight = made(tmp_path / "straight")
    inner = contexts.JobContext.metrics

    def cut(self: Any, values: Any, step: int) -> None:
        inner(self, values, step)
        if step == 7 and "learning_rate" in values:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(contexts.JobContext, "metrics", cut)
        with pytest.raises(Cut):
            made(tmp_path / "cut")
    resumed = made(tmp_path / "cut")
    weights = [
        {file: entry for file, entry in item.manifest["files"].items() if file.endswith(".safetensors")}
        for item in (straight, resumed)
    ]
    assert weights[0]
    assert weights[0] == weights[1]
    facts = [item.facts["training"] for item in (straight, resumed)]
    assert facts[0]["loss_last"] == facts[1]["loss_last"]
    assert facts[0]["trained"]["without_gradient"] == facts[1]["trained"]["without_gradient"]
