"""What metrics are computed from: a model's answers to held-out rows, and its losses on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from luthier.api.protocols import Prediction, Row
from luthier.modeling.generate import greedy_answers, token_losses
from luthier.modeling.text import encode_conversation, encode_prompt

Items = dict[str, Sequence[Any]]


def predictions_of(rows: Sequence[Row], answers: Sequence[str]) -> list[Prediction]:
    """Each row's last question, the answer that was given, and the row's own."""
    return [
        Prediction(row["messages"][-2]["content"], answer, row["messages"][-1]["content"])
        for row, answer in zip(rows, answers, strict=True)
    ]


def items_of(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    needs: Collection[str],
    stop_ids: Sequence[int],
    limit: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Items:
    """What metrics need of a model, by name: ``predictions``, ``losses``.

    Args:
        rows: Conversations; the last assistant turn is the reference.
        needs: Which of the two.
        stop_ids: The tokens on which generation stops.
        limit: The most tokens of an answer.
        progress: Called with the answers made and their number.
    """
    items: Items = {}
    if "predictions" in needs:
        prompts = [encode_prompt(tokenizer, row["messages"][:-1]) for row in rows]
        answers = list(greedy_answers(model, tokenizer, prompts, stop_ids, limit, progress=progress))
        items["predictions"] = predictions_of(rows, answers)
    if "losses" in needs:
        items["losses"] = list(
            token_losses(model, [encode_conversation(tokenizer, row["messages"], stop_ids) for row in rows])
        )
    return items
