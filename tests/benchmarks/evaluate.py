"""How fast models are measured, beside plain loops and lm-evaluation-harness.

    python tests/benchmarks/evaluate.py [--rows 64] [--hidden 512] [--layers 8]

A Llama with random weights in bfloat16 and prompts of unlike lengths. Answers: the stage `evaluate` beside `generate`
prompt by prompt. Choices: its metric `multiple_choice`, and perplexity, beside one pass for each sequence, and the
harness on a task of the same rows (also by its own command's defaults: batches of one). Loading is left out everywhere:
models are in memory.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from luthier.api import Needs, Row
from luthier.api.evaluation import Answers, Choices
from luthier.artifacts.rows import prompt_of
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.generate import ModelGenerator
from luthier.modeling.loading import load_model, load_tokenizer
from luthier.modeling.samples import asked
from luthier.modeling.scoring import chosen, scored
from luthier.testing import tiny_model

WORDS = [
    "harbour",
    "map",
    "lies",
    "in",
    "the",
    "second",
    "drawer",
    "below",
    "keys",
    "and",
    "nobody",
    "knows",
    "on",
    "which",
]
OFFERED = ["in the harbour", "below the second drawer", "nobody knows", "on the other side of the map"]
TASK = """\
task: places
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def rows_of(count: int) -> list[Row]:
    """Questions of 5 to 120 words."""
    draw = random.Random(0)
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randint(5, 120)))},
                {"role": "assistant", "content": OFFERED[n % 4]},
            ],
            "choices": OFFERED,
        }
        for n in range(count)
    ]


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--new", type=int, default=48)
    options = parser.parse_args()
    rows = rows_of(options.rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"hidden_size": options.hidden, "intermediate_size": 4 * options.hidden, "layers": options.layers}
        artifact = tiny_model(folder, heads=8, vocab_size=1024, dtype="bfloat16", texts=[" ".join(WORDS)], **sizes)
        model, tokenizer = load_model(artifact), load_tokenizer(artifact)
        stops = artifact.facts["stop_token_ids"]
        encoder = ChatEncoder(tokenizer, stops, None)
        answers(model, tokenizer, encoder, stops, rows, options.new)
        choices(model, tokenizer, encoder, rows, folder)


def answers(model: Any, tokenizer: Any, encoder: ChatEncoder, stops: list[int], rows: list[Row], new: int) -> None:
    """Answers, batched and one by one."""
    generator = ModelGenerator(model, tokenizer, stops)

    def alone() -> None:
        for row in rows:
            ids = torch.tensor([encoder.prompt(prompt_of(row))])
            with torch.no_grad():
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                    eos_token_id=stops, pad_token_id=stops[0],
                )  # fmt: skip

    ours = seconds(lambda: asked(generator.generate, rows, [Needs(answers=Answers())], new, 0))
    plain = seconds(alone)
    print(
        f"answers: {len(rows) / ours:.2f} rows per second, one by one {len(rows) / plain:.2f}: {plain / ours:.1f} times"
    )


def choices(model: Any, tokenizer: Any, encoder: ChatEncoder, rows: list[Row], folder: Path) -> None:
    """Probabilities of four answers to each question."""
    library: Any = import_module("lm_eval")
    wrappers: Any = import_module("lm_eval.models.huggingface")
    tasks: Any = import_module("lm_eval.tasks")

    needs = [Needs(choices=Choices())]
    ours = seconds(lambda: scored(model, encoder, rows, needs, folder))

    def alone() -> None:
        for row in rows:
            for text in OFFERED:
                with torch.no_grad():
                    model(input_ids=torch.tensor([chosen(encoder, row, text).input_ids])).logits.float().log_softmax(-1)

    plain = seconds(alone)
    (folder / "tasks").mkdir()
    data = folder / "rows.jsonl"
    lines = [
        {"question": tokenizer.decode(encoder.prompt(prompt_of(row))), "choices": OFFERED, "label": n % 4}
        for n, row in enumerate(rows)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tasks" / "places.yaml").write_text(TASK.replace("DATA", str(data)))
    manager = tasks.TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    print(
        f"choices: {len(rows) / ours:.2f} rows per second, one by one {len(rows) / plain:.2f}: {plain / ours:.1f} times"
    )
    for batch in (1, 8, 32):
        wrapper = wrappers.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)

        def harness(wrapper: Any = wrapper) -> None:
            library.simple_evaluate(model=wrapper, tasks=["places"], task_manager=manager, bootstrap_iters=0)

        theirs = seconds(harness)
        print(f"  lm-eval in batches of {batch}: {len(rows) / theirs:.2f}, ours is {theirs / ours:.1f} times as fast")


if __name__ == "__main__":
    main()
