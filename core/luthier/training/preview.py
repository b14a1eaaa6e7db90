"""What a stage would train on, to be looked at before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from luthier.api.stages import Facts
from luthier.api.tuning import TrainingConfig
from luthier.artifacts.datasets import Split
from luthier.modeling.text import Encoded
from luthier.training.encoding import EncodedRow
from luthier.training.mixing import Mix
from luthier.training.receipt import parts_of, text_of
from luthier.training.rows import RowSource


def looked_at(
    config: TrainingConfig,
    source: RowSource,
    splits: Mapping[Split, Sequence[EncodedRow]],
    tokenizer: Any,
    count: int,
) -> Facts:
    """What a preview shows: counts of each split, and the first rows as the trainer sees them.

    Args:
        config: The stage's config.
        source: Has read the rows.
        splits: The rows.
        tokenizer: The model's.
        count: How many rows are shown.

    Returns:
        ``splits``: by name the rows (of `pretrain` blocks), how many of their tokens are trained, the median and the
        longest row, the datasets that they come from. ``rows``: for each row its completions, each with its parts: the
        text, the ids, whether they are trained, and whether it is a stop token; and ``documents``, the tokens of each,
        where several are in one block. ``steps``: optimizer steps of an epoch. ``left_out`` and ``notes``: see
        `RowSource`.
    """
    rows = splits["train"]
    mix = None if config.weights is None else Mix.of(rows.parts, config.weights)  # type: ignore[attr-defined]
    return {
        "splits": {
            name: {**_lengths(found), "sources": source.sources[name]} for name, found in splits.items() if len(found)
        },
        "rows": [[_shown(item, tokenizer, source.stops) for item in row.completions] for row in rows[:count]],
        "steps": -(-(len(rows) if mix is None else len(mix)) // config.batch_size),
        "batch_size": config.batch_size,
        "left_out": dict(source.left_out),
        "notes": dict(source.notes),
    }


def _lengths(rows: Any) -> Facts:
    lengths: np.ndarray = rows.lengths
    return {
        "rows": len(rows),
        "trained": int(rows.targets.sum(dtype=np.int64)),
        "median": int(np.median(lengths)),
        "longest": int(lengths.max()),
    }


def _shown(item: Encoded, tokenizer: Any, stops: Sequence[int]) -> Facts:
    """A sequence as parts; the stop token behind what is trained is one of its own."""
    parts: list[Facts] = []
    for ids, trained in parts_of(item):
        ends = trained and ids[-1] in stops
        for some, stop in ((ids[:-1], False), (ids[-1:], True)) if ends else ((ids, False),):
            if some:
                parts.append({"text": text_of(tokenizer, some), "ids": some, "trained": trained, "stop": stop})
    return {"parts": parts, "documents": list(item.lengths) if len(item.lengths) > 1 else []}
