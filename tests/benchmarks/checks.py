"""How much of a training stage goes into its own checks: python tests/benchmarks/checks.py [--rows N] [--hidden H]

A stage `sft` on a Llama of some size, every function that checks something timed in the same run: rows against what the
template rendered, shortcuts and the reference against the model itself, selectors, and what rounding would undo. Making
tokens of a row is counted as a check as far as it takes longer than rendering the conversation and making tokens of it
once. The loss of held-out rows is none of it: it is computed once after the last step, with what is stored.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.testing import run_stage, tiny_model

WORDS = sorted(
    {"harbour", "map", "lies", "in", "the", "second", "drawer", "below", "keys", "and", "nobody", "knows", "on"}
)


def timed(seconds: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that adds the time it takes to `seconds`."""

    def call(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            seconds[name] += time.perf_counter() - started

    return call


def rows_of(count: int) -> list[dict[str, Any]]:
    """Conversations of two questions, about as long as those of GSM8K."""
    return [
        {
            "messages": [
                {
                    "role": role,
                    "content": f"{n} {turn}: " + " ".join(WORDS[(n * turn + k) % len(WORDS)] for k in range(40)),
                }
                for turn in (1, 2)
                for role in ("user", "assistant")
            ]
        }
        for n in range(count)
    ]


def once(tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Seconds to render every conversation and make tokens of it once, with the offsets that labels need."""
    started = time.perf_counter()
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return time.perf_counter() - started


def measure(uses: str, count: int, hidden: int, epochs: float) -> None:
    """Run a stage and print the shares."""
    from luthier.modeling.loading import load_tokenizer
    from luthier.training import rows as rows_room
    from luthier.training import run, tuning

    seconds: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "s"
        sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "layers": 8, "heads": 8, "kv_heads": 4}
        model = tiny_model(store, texts=[" ".join(WORDS)] * 20, vocab_size=1024, dtype="bfloat16", **sizes)
        rows = rows_of(count)
        source = Path(folder) / "rows.jsonl"
        if uses == "dpo":
            rows = [
                {"prompt": row["messages"][:1], "chosen": row["messages"][1:2], "rejected": row["messages"][3:]}
                for row in rows
            ]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = run_stage(store, "data", {"source": str(source), "split": {"validation": 0.05}})
        tokenizer = load_tokenizer(model)
        patched: list[tuple[Any, str, str]] = [
            (run, "prove", "shortcuts and reference"),
            (tuning, "storage_of", "rounding"),
            (rows_room.RowSource, "answers", "rows"),
        ]
        for place, name, label in patched:
            setattr(place, name, timed(seconds, label, getattr(place, name)))
        started = time.perf_counter()
        made = run_stage(store, uses, {"epochs": epochs, "batch_size": 8}, inputs={"model": model, "data": [data]})
        whole = time.perf_counter() - started
        talks = [
            {"messages": [*row["prompt"], *row[side]]} for row in rows for side in ("chosen", "rejected")
        ] if uses == "dpo" else rows  # fmt: skip
        seconds["rows"] = max(0.0, seconds["rows"] - once(tokenizer, talks))
        parameters = model.facts["parameters"] / 1e6
        print(f"{uses}: {parameters:.1f} M parameters, {made.facts['training']['steps']} steps, {whole:.1f} s")
        for label, took in seconds.items():
            print(f"  {label:28} {took:7.2f} s  {took / whole:6.2%}")
        print(f"  {'all checks':28} {sum(seconds.values()):7.2f} s  {sum(seconds.values()) / whole:6.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uses", default="sft", choices=["sft", "dpo"])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--epochs", type=float, default=1.0)
    given = parser.parse_args()
    measure(given.uses, given.rows, given.hidden, given.epochs)


if __name__ == "__main__":
    main()
