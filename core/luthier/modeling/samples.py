"""What metrics are computed from: a model's answers to rows, and its log-probabilities of their own answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.api.data import Row
from luthier.api.errors import DataError
from luthier.api.evaluation import Answers, Needs, Sample
from luthier.api.serving import Completion, Request, Sampling
from luthier.artifacts.disk_space import check_disk_space
from luthier.artifacts.rows import conversations, prompt_of, reference_of
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.generate import target_log_probabilities
from luthier.modeling.thinking import Thinking

Asked = dict[Answers, Sequence[Sequence[Completion]]]
"""The answers to all rows, by how they were asked for."""


def asked(
    ask: Callable[[Sequence[Request], Sampling], Iterable[Sequence[Completion]]],
    rows: Sequence[Row],
    needs: Iterable[Needs],
    max_new_tokens: int,
    seed: int,
) -> Asked:
    """Ask something for every kind of answer that metrics need, each once.

    Args:
        ask: Answers requests, such as `luthier.serving.asking.Asker.ask`.
        rows: Rows that have their own answer, which is left out.
        needs: What the metrics need.
        max_new_tokens: The most tokens of an answer, where a metric does not say.
        seed: The seed of what is drawn.
    """
    prompts = [prompt_of(row) for row in rows]
    kinds = dict.fromkeys(need.answers for need in needs if need.answers is not None)
    return {kind: list(ask(prompts, kind.sampling(max_new_tokens, seed))) for kind in kinds}


def measured(
    model: Any, encoder: ChatEncoder, rows: Sequence[Row], needs: Sequence[Needs], folder: Path
) -> tuple[list[tuple[float, ...]], list[Callable[[], Any]]]:
    """log p of the trained tokens of each row (the assistant's turns), and readers of the whole distributions; empty
    where none is needed.

    Args:
        model: The model.
        encoder: Makes its tokens.
        rows: Rows that have an answer.
        needs: What the metrics need.
        folder: Where distributions are kept, which may not fit into memory.
    """
    if not any(need.token_logps or need.distributions for need in needs):
        return [], []
    keep = any(need.distributions for need in needs)
    logps: list[tuple[float, ...]] = []
    readers: list[Callable[[], Any]] = []
    if keep:
        folder.mkdir(parents=True, exist_ok=True)
    for place, row in enumerate(rows):
        found = [target_log_probabilities(model, item) for item in encoder.conversation(conversations(row)[0], "apart")]
        log_p, ids = torch.cat([part for part, _ in found]), torch.cat([part for _, part in found])
        logps.append(tuple(log_p.gather(1, ids[:, None])[:, 0].tolist()))
        if keep and not readers:
            # Rows differ in length; the first says about how much all will take.
            check_disk_space(folder, log_p.numel() * log_p.element_size() * len(rows), "the models' distributions")
        if keep:
            path = folder / f"{place}.npy"
            np.save(path, log_p.cpu().numpy())
            readers.append(partial(np.load, path))
    return logps, readers


def samples_of(
    rows: Sequence[Row],
    need: Needs,
    answers: Asked,
    logps: Sequence[tuple[float, ...]] = (),
    readers: Sequence[Callable[[], Any]] = (),
    thinking: Thinking | None = None,
) -> list[Sample]:
    """What one metric sees.

    Args:
        rows: The rows.
        need: What it needs.
        answers: All answers.
        logps: See `measured`.
        readers: See `measured`.
        thinking: The marks at which thinking is split off answers and references; None: it stays in them.
    """
    given = answers[need.answers] if need.answers is not None else ()
    return [
        Sample(
            row,
            prompt_of(row)[-1]["content"],
            _answer_of(reference_of(row) or "", thinking),
            tuple(_split(item, thinking) for item in given[place]) if given else (),
            logps[place] if logps and (need.token_logps or need.distributions) else (),
            readers[place] if readers and need.distributions else None,
        )
        for place, row in enumerate(rows)
    ]


def _answer_of(text: str, thinking: Thinking | None) -> str:
    return text if thinking is None else thinking.split(text)[1]


def _split(completion: Completion, thinking: Thinking | None) -> Completion:
    if thinking is None:
        return completion
    thought, answer = thinking.split(completion.text, opened=thinking.opened)
    return replace(completion, text=answer, thinking=thought)


def problem_of(encoder: ChatEncoder, row: Row, room: int | None, *, scored: bool) -> str | None:
    """Why a model cannot be asked a row, or its answers cannot be scored; None where they can.

    Args:
        encoder: Makes tokens for the model.
        row: The row.
        room: The most tokens that the model can see; None: any number.
        scored: Whether log-probabilities of the row's own answers are wanted.
    """
    if any("tool_calls" in talk[-1] for talk in conversations(row)):
        return "its answer is a call of tools, which is not compared"
    try:
        lengths = [len(encoder.prompt(prompt_of(row))) + 1]
        if scored:
            lengths += [len(item.input_ids) for item in encoder.conversation(conversations(row)[0], "apart")]
    except DataError as error:
        return error.message
    longest = max(lengths)
    return None if room is None or longest <= room else f"it has {longest} tokens, the context is {room}"
