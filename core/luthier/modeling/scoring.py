"""A model's probabilities of rows' own answers, and of answers among which it is to choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.api.data import Message, Row
from luthier.api.evaluation import Choice, Choices, Needs
from luthier.artifacts.disk_space import check_disk_space
from luthier.artifacts.rows import conversations, prompt_of
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import padding_of
from luthier.modeling.text import IGNORED, Encoded

TOKENS = 1024
"""Tokens of one pass, padding included: the logits of a large vocabulary are the most of what it holds."""


@dataclass(slots=True)
class Scored:
    """What a model makes of one row, see `luthier.api.Sample`."""

    logps: tuple[float, ...] = ()
    targets: tuple[int, ...] = ()
    likeliest: tuple[int, ...] = ()
    choices: dict[Choices, tuple[Choice, ...]] = field(default_factory=dict[Choices, tuple[Choice, ...]])
    distribution: Callable[[], Any] | None = None


def scored(
    model: Any,
    encoder: ChatEncoder,
    rows: Sequence[Row],
    needs: Sequence[Needs],
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scored]:
    """log p of the trained tokens of each row (the assistant's turns), and what else metrics need; empty where they
    need none of it.

    Args:
        model: The model.
        encoder: Makes its tokens.
        rows: Rows that have an answer.
        needs: What the metrics need.
        folder: Where distributions are kept, which may not fit into memory.
        progress: Called with the sequences that are done and their number.
    """
    if not any(need.probabilities for need in needs):
        return []
    found = [Scored() for _ in rows]
    own = any(need.token_logps or need.distributions for need in needs)
    kept = folder if any(need.distributions for need in needs) else None
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
    among = list(dict.fromkeys(need.choices for need in needs if need.choices is not None))
    sequences: list[Encoded] = []
    parts: list[list[int]] = []
    for row in rows:
        made = encoder.conversation(conversations(row)[0], "apart") if own else []
        parts.append(list(range(len(sequences), len(sequences) + len(made))))
        sequences += made
    offered: list[tuple[int, Choices, str]] = []
    for place, row in enumerate(rows):
        for choices in among:
            for text in choices.of(row):
                offered.append((place, choices, text))
                sequences.append(chosen(encoder, row, text))
    first_offered = len(sequences) - len(offered)
    tokens_kept = sum(label != IGNORED for item in sequences[:first_offered] for label in item.labels)
    space = 0
    made_of: dict[int, _Tokens] = {}
    for index, log_p, ids in _passes(model, padding_of(encoder.tokenizer), sequences, progress):
        made_of[index] = _Tokens.of(log_p, ids)
        if kept is not None and index < first_offered:
            if not space:
                space = tokens_kept * log_p.shape[1] * log_p.element_size()
                check_disk_space(kept, space, "the models' distributions")
            np.save(kept / f"{index}.npy", log_p.cpu().numpy())
    for row, indices in zip(found, parts, strict=True):
        tokens = [made_of[index] for index in indices]
        row.logps = tuple(value for item in tokens for value in item.logps)
        row.targets = tuple(value for item in tokens for value in item.targets)
        row.likeliest = tuple(value for item in tokens for value in item.likeliest)
        if kept is not None:
            row.distribution = partial(_read, [kept / f"{index}.npy" for index in indices])
    for index, (place, choices, text) in enumerate(offered, first_offered):
        known = found[place].choices.get(choices, ())
        found[place].choices[choices] = (*known, Choice(text, made_of[index].logps))
    return found


def chosen(encoder: ChatEncoder, row: Row, text: str) -> Encoded:
    """A row's prompt with another answer, which alone is trained."""
    talk = prompt_of(row).plus(Message(role="assistant", content=text))
    return encoder.conversation(talk, "last")[-1]


@dataclass(frozen=True, slots=True)
class _Tokens:
    logps: tuple[float, ...]
    targets: tuple[int, ...]
    likeliest: tuple[int, ...]

    @classmethod
    def of(cls, log_p: Tensor, ids: Tensor) -> _Tokens:
        own = log_p.gather(1, ids[:, None])[:, 0]
        return cls(tuple(own.tolist()), tuple(ids.tolist()), tuple(log_p.argmax(1).tolist()))


def _passes(
    model: Any, padding: int, sequences: Sequence[Encoded], progress: Callable[[int, int], None]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each sequence, in any order, its place, log p of the whole vocabulary at each trained token, float32 of shape
    (targets, vocabulary), and the ids of these tokens."""
    model.eval()
    order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place].input_ids))
    done = 0
    while done < len(order):
        width = len(sequences[order[done]].input_ids)
        taken = order[done : done + max(1, TOKENS // width)]
        ids = torch.full((len(taken), width), padding)
        mask = torch.zeros((len(taken), width), dtype=torch.long)
        for line, place in enumerate(taken):
            tokens = torch.tensor(sequences[place].input_ids)
            ids[line, : len(tokens)], mask[line, : len(tokens)] = tokens, 1
        with torch.no_grad():
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        for line, place in enumerate(taken):
            labels = torch.tensor(sequences[place].labels[1:], device=logits.device)
            trained = labels != IGNORED
            yield place, logits[line, : len(labels)][trained].float().log_softmax(-1), labels[trained]
        done += len(taken)
        progress(done, len(order))


def _read(paths: Sequence[Path]) -> np.ndarray[Any, Any]:
    """From the disk: of a large vocabulary a row alone takes gigabytes."""
    parts = [np.load(path, mmap_mode="r") for path in paths]
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
