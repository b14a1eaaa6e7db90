"""Training beside TRL's on the same tokens: python tests/benchmarks/training.py --data FILE --tokenizer FOLDER

A Qwen2 of some size with random weights and the vocabulary of a real tokenizer is tuned by LoRA (or in full), by
Luthier and by TRL with its defaults and with its fastest settings, in turns in one process. What is timed is training
alone: models are loaded and rows are tokens already; Luthier's time has its proofs and, for preferences, the pass under
the reference in it. Losses step by step have to agree.

Rows are conversations (`messages`, or GSM8K's `question` and `answer`) for `sft`, and preferences (`prompt`, `chosen`,
`rejected`) for `dpo`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from luthier.api import Artifact
from luthier.artifacts.datasets import read_split
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import load_model, load_tokenizer
from luthier.modeling.text import IGNORED
from luthier.testing import run_stage
from luthier.training import run, tuning
from luthier.training.encoding import encode_row
from luthier.training.trainer import ObjectiveTrainer
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

TRL = {
    "TRL, its defaults": {},
    "TRL, no checkpointing": {"gradient_checkpointing": False},
    "TRL, no checkpointing, grouped by length": {
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
    },
}


def make_model(folder: Path, tokenizer: Path, arguments: argparse.Namespace) -> Artifact:
    """A random Qwen2 with a real vocabulary, in a store."""
    made: Any = AutoTokenizer.from_pretrained(tokenizer)
    config = Qwen2Config(
        vocab_size=arguments.vocabulary or len(made),
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        num_key_value_heads=max(1, arguments.hidden // 256),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=made.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = made.convert_tokens_to_ids(["<|im_end|>"])
    model.save_pretrained(folder / "model")
    made.save_pretrained(folder / "model")
    return run_stage(folder / "store", "base", {"source": str(folder / "model")})


def make_data(folder: Path, file: Path, count: int, skip_prompts: bool, name: str = "rows") -> Artifact:
    """The first rows of a file, as a dataset in a store."""
    with file.open(encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = [json.loads(line) for line in itertools.islice(lines, count)]
    for row in rows:
        if "question" in row:
            turns = [("user", row.pop("question")), ("assistant", row.pop("answer"))]
            row["messages"] = [{"role": role, "content": content} for role, content in turns]
        if skip_prompts and "messages" in row:
            row["messages"] = [{"role": "user", "content": "?"}, row["messages"][-1]]
    target = folder / f"{name}.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run_stage(folder / "store", "data", {"source": str(target)})


class Tokens(DPOTrainer):
    """TRL's trainer on ready tokens."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def trl_seconds(
    folder: Path, model: Artifact, data: Artifact, flags: dict[str, Any], arguments: argparse.Namespace
) -> tuple[float, list[float], list[float]]:
    """Seconds of TRL's training, losses and gradient norms by step."""
    tokenizer = load_tokenizer(model)
    chat = ChatEncoder(tokenizer, model.facts["stop_token_ids"])
    rows = [encode_row(chat, row).completions for row in read_split(data, "train")]
    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "use_cpu": not torch.cuda.is_available(), "max_length": None,
        "per_device_train_batch_size": arguments.batch, "num_train_epochs": 1, "learning_rate": arguments.rate,
        "lr_scheduler_type": "linear", "warmup_steps": 0, "logging_steps": 1, "seed": 0, "data_seed": 0,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", **flags,
    }  # fmt: skip
    adapter = None
    if not arguments.full:
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    loaded = load_model(model)
    if arguments.objective == "sft":
        columns = {"input_ids": [row[0].input_ids for row in rows], "labels": [row[0].labels for row in rows]}
        trainer: Any = SFTTrainer(
            model=loaded,
            args=SFTConfig(packing=False, dataset_kwargs={"skip_prepare_dataset": True}, **common),
            train_dataset=datasets.Dataset.from_dict(columns),
            processing_class=tokenizer,
            peft_config=adapter,
        )
    else:
        columns = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
        for chosen, rejected in rows:
            first = chosen.labels.count(IGNORED)
            columns["prompt_ids"].append(chosen.input_ids[:first])
            columns["chosen_ids"].append(chosen.input_ids[first:])
            columns["rejected_ids"].append(rejected.input_ids[first:])
        trainer = Tokens(
            model=loaded,
            args=DPOConfig(beta=0.1, **common),
            train_dataset=datasets.Dataset.from_dict(columns),
            processing_class=tokenizer,
            peft_config=adapter,
        )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return seconds, [entry["loss"] for entry in logs], [entry["grad_norm"] for entry in logs]


def luthier_seconds(
    folder: Path, model: Artifact, data: Artifact, arguments: argparse.Namespace, more: dict[str, Any]
) -> tuple[float, float, list[float], list[float]]:
    """Seconds of Luthier's training and of the whole stage, losses and gradient norms by step."""
    # The reference's log-probabilities are kept from run to run; a first run is what is timed.
    shutil.rmtree(folder / "store" / "cache" / "references", ignore_errors=True)
    spent: list[float] = []
    logs: list[dict[str, Any]] = []
    inner = run.train

    def timed(*values: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return inner(*values, **named)
        finally:
            spent.append(time.perf_counter() - started)

    def log(self: Any, values: dict[str, float], start_time: Any = None) -> None:
        shown(self, values, start_time)
        logs.append(dict(values))

    shown = ObjectiveTrainer.log
    ObjectiveTrainer.log = log  # type: ignore[method-assign]
    tuning.train = timed  # type: ignore[attr-defined]
    config: dict[str, Any] = {
        "epochs": 1, "batch_size": arguments.batch, "learning_rate": arguments.rate, "log_every": 1, **more,
    }  # fmt: skip
    if not arguments.full:
        config["adapter"] = {"uses": "lora", "r": 16, "lora_alpha": 32}
    started = time.perf_counter()
    try:
        run_stage(folder / "store", arguments.objective, config, inputs={"model": model, "data": [data]})
    finally:
        ObjectiveTrainer.log = shown  # type: ignore[method-assign]
        tuning.train = inner  # type: ignore[attr-defined]
    whole = time.perf_counter() - started
    logs = [entry for entry in logs if "grad_norm" in entry]
    return spent[0], whole, [entry["loss"] for entry in logs], [entry["grad_norm"] for entry in logs]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--objective", choices=["sft", "dpo"], default="sft")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, help="Entries of the embedding; by default the tokenizer's.")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="Train all weights.")
    parser.add_argument("--no-prompt", action="store_true", help="Replace prompts by a question mark.")
    parser.add_argument("--only", choices=["luthier", "trl"], help="One of the two.")
    parser.add_argument(
        "--float32", action="store_true", help="TRL in float32: many CPUs are slow in its default, bf16."
    )
    parser.add_argument("--set", default="{}", help="Further keys of the stage, as JSON.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = make_model(folder, arguments.tokenizer, arguments)
        data = make_data(folder, arguments.data, arguments.rows, arguments.no_prompt)
        times: dict[str, list[float]] = {}
        losses: dict[str, list[float]] = {}
        norms: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            if arguments.only != "trl":
                seconds, whole, losses["Luthier"], norms["Luthier"] = luthier_seconds(
                    folder, model, data, arguments, json.loads(arguments.set)
                )
                times.setdefault("Luthier", []).append(seconds)
                print(f"Luthier: {seconds:.1f} s (the whole stage {whole:.1f} s)", flush=True)
            for name, flags in TRL.items() if arguments.only != "luthier" else ():
                seconds, losses[name], norms[name] = trl_seconds(
                    folder, model, data, {**flags, **({"bf16": False} if arguments.float32 else {})}, arguments
                )
                times.setdefault(name, []).append(seconds)
                print(f"{name}: {seconds:.1f} s", flush=True)
    mine = statistics.median(times.get("Luthier", [float("nan")]))
    for name, values in times.items():
        print(f"{name}: {statistics.median(values):.1f} s, {statistics.median(values) / mine:.2f} times Luthier's")
        print("  losses " + " ".join(f"{value:.4f}" for value in losses[name][:12]))
        print("  norms  " + " ".join(f"{value:.4f}" for value in norms[name][:12]))


if __name__ == "__main__":
    main()
