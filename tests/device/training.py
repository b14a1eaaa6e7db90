"""Training on a GPU beside TRL's: python tests/device/training.py --size tiny|1b|8b [--methods lora,qlora,full,dpo]

A random Llama of a real shape is made on the device and tuned on random text, by Luthier and by TRL with its Liger
kernels, one after the other. Printed are tokens per second without the first step, the share of the device's bf16
arithmetic (MFU), peak memory, and the losses, which have to be alike. TRL's packing wants flash-attn, a package of CUDA
code; where it is missing TRL pads, and rows of one length lose nothing by it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from luthier.api import Artifact
from luthier.artifacts.datasets import read_split
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import load_tokenizer
from luthier.modeling.text import IGNORED
from luthier.testing import run_stage, tiny_model
from luthier.training import run
from luthier.training.encoding import EncodedRow, encode_row
from luthier.training.flops import Arithmetic, most_of
from luthier.training.trainer import ObjectiveTrainer
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "vocab_size": 1024, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True, "head_dim": 64},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
"""The shapes of Llama 3.2 1B and Llama 3.1 8B."""
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def model_of(folder: Path, size: str) -> Artifact:
    """A random model, in a store, in bfloat16."""
    small = tiny_model(folder / "small")
    source = folder / f"model-{size}"
    config = LlamaConfig(**SHAPES[size], max_position_embeddings=8192, eos_token_id=small.facts["stop_token_ids"][0])
    with torch.device(DEVICE):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)
    for path in small.path.iterdir():
        if path.suffix in (".json", ".jinja") and path.name not in ("config.json", "manifest.json"):
            (source / path.name).write_text(path.read_text())
    free()
    return run_stage(folder / "store", "base", {"source": str(source)})


def words(draws: random.Random, characters: int) -> str:
    """Text that no two rows share."""
    return "".join(draws.choice("abcdefghijklmnopqrstuvwxyz     ") for _ in range(characters))


def rows_of(folder: Path, name: str, count: int, tokens: int, *, mixed: bool) -> Artifact:
    """Conversations of about so many tokens (or of any length up to it), or preferences."""
    draws = random.Random(0)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        size = int(tokens * (0.1 + 0.85 * draws.random() ** 2 if mixed else 0.95) / 1.2)
        prompt = [{"role": "user", "content": words(draws, size // 3)}]
        answers = [[{"role": "assistant", "content": words(draws, 2 * size // 3)}] for _ in range(2)]
        if name == "dpo":
            rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
        else:
            rows.append({"messages": [*prompt, *answers[0]]})
    file = folder / f"{name}-{mixed}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_stage(folder / "store", "data", {"source": str(file)})


def free() -> None:
    """Begin anew."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    """GB."""
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else float("nan")


def tell(who: str, tokens: int, seconds: float, operations: float, losses: list[float]) -> None:
    """Print a line."""
    most = most_of(DEVICE)
    share = f"{operations / seconds / most:.1%}" if most else "-"
    shown = " ".join(f"{loss:.3f}" for loss in losses[:4])
    print(f"  {who:24} {tokens / seconds:9.0f} tokens/s  MFU {share:>6}  {peak():6.1f} GB  losses {shown}", flush=True)


class Clock:
    """Seconds from the end of the first step, in which kernels are made, to the end of the last; and the share of these
    steps in what was computed before.

    Attributes:
        before: Seconds that the reference took, where it is computed before the first step.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.before = 0.0

    def tick(self) -> None:
        """A step has ended."""
        if CUDA:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """Of all steps but the first."""
        return self.ends[-1] - self.ends[0] + self.before * (1 - 1 / len(self.ends))


def by_luthier(folder: Path, model: Artifact, data: Artifact, method: str, batch: int) -> tuple[Clock, list[float]]:
    """Train with the recipe's defaults."""
    clock = Clock()
    losses: list[float] = []
    inner = ObjectiveTrainer.training_step

    def timed(self: Any, *values: Any, **named: Any) -> Any:
        found = inner(self, *values, **named)
        losses.append(float(found))
        clock.tick()
        return found

    config: dict[str, Any] = {
        "epochs": 1, "batch_size": batch, "learning_rate": 1e-4, "log_every": 1, "precision": "bf16",
        "max_length": 4096, "save_every": 10_000,
    }  # fmt: skip
    if method != "full":
        config["adapter"] = {"uses": "qlora" if method == "qlora" else "lora", "r": 16}
    else:
        config["learning_rate"] = 1e-5
    known = run.with_reference  # pyright: ignore[reportPrivateImportUsage]

    def referenced(*values: Any, **named: Any) -> Any:
        started = time.perf_counter()
        found = known(*values, **named)
        clock.before += time.perf_counter() - started
        return found

    ObjectiveTrainer.training_step = timed  # type: ignore[method-assign]
    setattr(run, "with_reference", referenced)  # noqa: B010
    try:
        made = run_stage(
            folder / "store", "dpo" if method == "dpo" else "sft", config, inputs={"model": model, "data": [data]}
        )
    finally:
        ObjectiveTrainer.training_step = inner  # type: ignore[method-assign]
        setattr(run, "with_reference", known)  # noqa: B010
    assert made.facts["training"]["steps"] == len(losses)
    return clock, losses


class Preferences(DPOTrainer):
    """TRL's trainer on ready tokens."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def by_trl(
    folder: Path, model: Artifact, rows: list[EncodedRow], method: str, batch: int, micro: int, *, checkpointing: bool
) -> tuple[Clock, list[float]]:
    """Train with TRL, its Liger kernels and its fastest settings."""
    clock = Clock()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model.path,
        dtype=torch.float32 if method == "full" else torch.bfloat16,
        attn_implementation="sdpa",
        device_map={"": 0} if CUDA else None,
        **({"quantization_config": quantization} if method == "qlora" else {}),
    )
    if method == "qlora":
        loaded = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=checkpointing)
    adapter = None
    if method != "full":
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "use_cpu": not CUDA, "bf16": True, "max_length": None,
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": batch // micro, "num_train_epochs": 1,
        "learning_rate": 1e-5 if method == "full" else 1e-4, "lr_scheduler_type": "linear", "warmup_steps": 0,
        "logging_steps": 1, "seed": 0, "data_seed": 0, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "gradient_checkpointing": checkpointing, "use_liger_kernel": CUDA,
    }  # fmt: skip
    tokenizer = load_tokenizer(model)
    if method == "dpo":
        columns: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
        for row in rows:
            chosen, rejected = row.completions
            first = chosen.labels.count(IGNORED)
            columns["prompt_ids"].append(chosen.input_ids[:first])
            columns["chosen_ids"].append(chosen.input_ids[first:])
            columns["rejected_ids"].append(rejected.input_ids[first:])
        base: Any = Preferences
        arguments: Any = DPOConfig(beta=0.1, **common)
    else:
        columns = {
            "input_ids": [row.completions[0].input_ids for row in rows],
            "labels": [row.completions[0].labels for row in rows],
        }
        base = SFTTrainer
        arguments = SFTConfig(packing=False, dataset_kwargs={"skip_prepare_dataset": True}, **common)
    passes = [0]

    class Timed(base):  # type: ignore[misc, valid-type]
        def training_step(self, *values: Any, **named: Any) -> Any:
            found = super().training_step(*values, **named)
            passes[0] += 1
            if passes[0] % (batch // micro) == 0:
                clock.tick()
            return found

    trainer = Timed(
        model=loaded,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()
    return clock, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SHAPES), default="tiny")
    parser.add_argument("--methods", default="lora,qlora,full,dpo")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--micro", type=int, default=2, help="TRL's rows in a pass.")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--mixed", action="store_true", help="Rows of any length, most of them short.")
    parser.add_argument("--only", choices=["luthier", "trl"])
    arguments = parser.parse_args()
    if CUDA:
        print(torch.cuda.get_device_name())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = model_of(folder, arguments.size)
        chat = ChatEncoder(load_tokenizer(model), model.facts["stop_token_ids"])
        for method in arguments.methods.split(","):
            data = rows_of(folder, method, arguments.rows, arguments.tokens, mixed=arguments.mixed)
            rows = [encode_row(chat, row) for row in read_split(data, "train")]
            later = rows[arguments.batch :]
            tokens = sum(len(item.input_ids) for row in later for item in row.completions)
            with torch.device("meta"):
                shape: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[arguments.size]))
            shape.requires_grad_(method == "full")
            operations = Arithmetic(shape).of(later)
            print(f"{arguments.size} {method}: {arguments.rows} rows of {arguments.tokens} tokens at most", flush=True)
            tries: dict[str, Any] = {}
            if arguments.only != "trl":
                tries["Luthier"] = partial(by_luthier, folder, model, data, method, arguments.batch)
            if arguments.only != "luthier":
                work = partial(by_trl, folder, model, rows, method, arguments.batch, arguments.micro)
                tries["TRL + Liger"] = partial(work, checkpointing=False)
                tries["TRL + Liger, checkpointing"] = partial(work, checkpointing=True)
            for who, work in tries.items():
                free()
                try:
                    clock, losses = work()
                    tell(who, tokens, clock.seconds(), operations, losses)
                # One that does not fit, or fails otherwise, is told; the others are measured all the same.
                except Exception as error:  # noqa: BLE001
                    print(f"  {who:24} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
                    if not isinstance(error, torch.OutOfMemoryError):
                        traceback.print_exc(limit=-3)


if __name__ == "__main__":
    main()
