"""How much a changed model differs from the one it came from: over the whole vocabulary, on texts of all kinds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch

from luthier.api.artifact import Artifact
from luthier.api.stages import Facts
from luthier.modeling.calibration import texts_of

CORPUS = (
    "The quick brown fox can't jump over 13 lazy dogs; it's 2026-11-24, 07:45 o'clock.",
    "  indented\n\n\nblank lines,\ttabs\t\tand trailing spaces   \n",
    'def f(x: int) -> str:\n    return {"a": [1, 22, 333, 4444], "b": None}["a"][x:]  # ÷ ≠ ≤\r\n',
    "Größe, naïve façade, Ελληνικά, русский язык, 日本語の文章、中文字符, العربية, हिन्दी, ไทย",
    "emoji 👩‍👩‍👧 🇩🇪 👍🏽 and symbols §±µ¶ — “quotes” … ½ ²",
    "I'LL SHE'S we'd They're 'tis rock'n'roll http://example.org/a_b?c=d&e=1#f e-mail@host.de 1,000,000.00",
    "ABCdefGHI123xyz 0x1F 3.14159e-10 ... !!! ??? ~~~ ```code``` <b>html</b> &amp; $$x^2$$ \\n",
)
"""Texts that come apart differently under a tokenizer that is not quite the same."""
OWN_TEXTS = 24
LONGEST = 256
"""Tokens of a text that are compared, at most."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same texts.

    Attributes:
        kl: Mean KL divergence of the next token's distribution, in nats.
        top1: The share of positions at which the best token is the same.
        perplexity: Of the changed model.
        reference_perplexity: Of the one it came from.
        positions: How many distributions were compared.
        texts: On how many texts.
    """

    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    positions: int
    texts: int

    def facts(self) -> Facts:
        """What a manifest says of it."""
        return {
            "kl": self.kl,
            "top1": self.top1,
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
            "positions": self.positions,
            "texts": self.texts,
        }


def sequences_of(tokenizer: Any, data: Sequence[Artifact]) -> list[list[int]]:
    """Token ids of the recipe's own texts, and of texts of all kinds."""
    own = list(islice(texts_of(data, tokenizer), OWN_TEXTS)) if data else []
    found = [tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST] for text in [*own, *CORPUS]]
    return [ids for ids in found if len(ids) > 1]


class Scores(Protocol):
    """A model that is asked for its logits, see `luthier.modeling.streamed.Streamed`."""

    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, torch.Tensor]]:
        """The logits of each text, with its place; float32 on the CPU, shape (tokens, vocabulary)."""
        ...


def compared(reference: Scores, changed: Scores, sequences: Sequence[Sequence[int]]) -> Comparison:
    """Compare two models with the same vocabulary.

    Args:
        reference: The one that the other came from.
        changed: The changed one.
        sequences: Token ids of texts, two or more each.
    """
    divergence, same, positions, losses = 0.0, 0, 0, [0.0, 0.0]
    pairs = zip(reference.logits(sequences), changed.logits(sequences), strict=True)
    for (place, right), (same_place, found) in pairs:
        assert place == same_place, "the order hangs on the lengths alone"
        ids = sequences[place]
        right, found = right.log_softmax(-1), found.log_softmax(-1)
        divergence += float((right.exp() * (right - found)).sum())
        same += int((right.argmax(-1) == found.argmax(-1)).sum())
        positions += len(ids)
        for place, logs in enumerate((found, right)):
            losses[place] -= float(logs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum())
    predicted = positions - len(sequences)
    own, reference_own = (math.exp(min(loss / max(1, predicted), 700.0)) for loss in losses)
    mean = divergence / positions
    # Rounding may take it below zero; NaN stays NaN, and is not a small number.
    kl = 0.0 if mean < 0 else mean
    return Comparison(kl, same / positions, own, reference_own, positions, len(sequences))
