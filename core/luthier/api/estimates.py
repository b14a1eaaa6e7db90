"""What training a model needs, from what is known of the model before anything is loaded. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PIECES = re.compile(r"[^\W\d_]+|\d+|[^\w\s]+|_+|\n+")
"""Words, numbers, punctuation, ends of lines: what tokenizers do not join."""
WORD, NUMBER, SIGNS = 8, 2, 2
"""Letters, digits and signs of a token: as those of Qwen 2.5, Llama 3.1 and Phi 3.5 have it in English, within 15 %."""
WIDE = re.compile(r"[\u0e00-\u0eff\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
"""Letters of scripts that write words without spaces, or whose letters are syllables: of these most are tokens."""
PASS = 8192
"""Tokens of the largest pass."""
MOMENTS = {"adamw": 8, "adamw8bit": 2, "adafactor": 0, "lion": 4, "muon": 4}
"""Bytes of an optimizer's states for each trained weight; others are taken to have as many as AdamW."""
TILE = 1 << 26
"""Bytes of the logits that are held at a time."""
COMPARED = 512
"""Tokens that are computed together where models are compared, see `luthier.modeling.streamed`."""
MASTER, GRADIENT = 4, 4
STORED = {"fp32": 4.0, "bf16": 2.0, "8bit": 1.0, "4bit": 0.52}
"""Bytes of a weight of a frozen base; in 4 bits with the constants of its blocks, twice quantized."""


def tokens_in(text: str) -> int:
    """About how many tokens a text has, whatever the tokenizer."""
    found = 0
    for match in PIECES.finditer(text):
        piece = match[0]
        wide = 0 if piece.isascii() else len(WIDE.findall(piece))
        size = WORD if piece.isalpha() else NUMBER if piece.isdigit() else SIGNS
        found += 1 if piece[0] == "\n" else wide + -(-(len(piece) - wide) // size)
    return found


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's size, as its facts have it.

    Attributes:
        parameters: Its weights.
        width: Features of the hidden states.
        inner: Features inside a feed-forward layer.
        layers: Blocks.
        sides: Inputs and outputs of all matrices in the blocks, added up: an adapter of rank r has r times as many
            weights.
        outside: Weights outside of the blocks: embedding and output head, which stay as they are under an adapter.
    """

    parameters: int
    width: int
    inner: int
    layers: int
    sides: int
    outside: int

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Shape | None:
        """That of a model's facts; None where they do not say it."""
        known: Mapping[str, int] | None = facts.get("shape")
        if known is None or not facts.get("parameters"):
            return None
        return cls(parameters=facts["parameters"], **known)


@dataclass(frozen=True, slots=True)
class Training:
    """How a model is trained.

    Attributes:
        rank: That of a low-rank adapter; None: all weights are trained.
        base: What the weights of a frozen base are stored in.
        halves: Whether passes are computed in bfloat16.
        optimizer: Its name.
        pass_tokens: Tokens of a pass.
        kept: Whether activations are kept from forward to backward.
    """

    rank: int | None
    base: str
    halves: bool
    optimizer: str
    pass_tokens: int
    kept: bool


def comparing_memory(facts: Mapping[str, Any], models: int = 1) -> int | None:
    """Bytes that comparing models layer by layer holds at its peak, beside the libraries; None where the facts of the
    model do not say enough.

    Args:
        facts: The model's.
        models: How many are read side by side.
    """
    shape, rows = Shape.of(facts), facts.get("vocab_size")
    if shape is None or not rows:
        return None
    block = (shape.parameters - shape.outside) // shape.layers
    # Beside the largest matrix, logits of what is computed together and what is made of them.
    return 4 * models * max(block, rows * shape.width) + 4 * (models + 1) * COMPARED * rows


def memory_of(shape: Shape, training: Training) -> int:
    """Bytes that training holds at its peak, beside the libraries."""
    trained = shape.parameters if training.rank is None else training.rank * shape.sides
    states = MASTER + GRADIENT + MOMENTS.get(training.optimizer, 8)
    # An output head's gradient is added up beside the embedding's; logits and theirs are held tile by tile.
    frozen = 2.0 * GRADIENT * shape.outside if training.rank is None and training.pass_tokens else 0.0
    frozen += 3 * min(TILE, 4 * training.pass_tokens * shape.outside // shape.width)
    if training.rank is not None:
        outside = shape.outside * STORED["bf16" if training.base in ("4bit", "8bit") else training.base]
        frozen += (shape.parameters - shape.outside) * STORED[training.base] + outside
    return round(frozen + trained * states + activations(shape, training) * min(training.pass_tokens, PASS))


def activations(shape: Shape, training: Training) -> int:
    """Bytes of a token between its forward and its backward pass."""
    size = 2 if training.halves else 4
    if not training.kept:
        # The inputs of blocks, and one block in full.
        return size * (shape.layers * shape.width + 16 * shape.width + 5 * shape.inner)
    return size * shape.layers * (16 * shape.width + 5 * shape.inner)
