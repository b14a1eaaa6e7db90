"""Greedy answers and token losses of a model: what metrics are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from luthier.api.protocols import TokenLoss
from luthier.modeling.text import IGNORED, Encoded


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int],
    limit: int,
    batch_size: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    special: bool = True,
) -> Iterator[str]:
    """The greedy answer to each prompt, in order, without the stop token.

    Args:
        prompts: Token ids, each ending with the opening of an assistant turn.
        stop_ids: The tokens on which generation stops.
        limit: The most tokens of an answer.
        batch_size: Prompts in one batch; batches are made of prompts of like length.
        progress: Called with the answers made and their number, batch by batch.
        special: Whether special tokens show; servers leave them out.
    """
    model.eval()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        progress(start, len(order))
        chosen = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in chosen)
        padding = [width - len(prompts[index]) for index in chosen]
        ids = [[tokenizer.pad_token_id] * pad + prompts[index] for pad, index in zip(padding, chosen, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        with torch.no_grad():
            output = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=limit,
                do_sample=False,
                # The model's own sampling settings are for chatting, not for measuring.
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=None,
                eos_token_id=list(stop_ids),
                pad_token_id=tokenizer.pad_token_id,
            )
        for index, row in zip(chosen, output[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in set(stop_ids)), len(row))
            answers[index] = tokenizer.decode(row[:end], skip_special_tokens=not special)
    for index in range(len(prompts)):
        yield answers[index]


def token_losses(model: Any, rows: Sequence[Encoded]) -> Iterator[TokenLoss]:
    """The summed -log p of each row's trained tokens, in nats."""
    model.eval()
    for row in rows:
        ids = torch.tensor([row.input_ids], device=model.device)
        labels = torch.tensor(row.labels[1:], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        yield TokenLoss(float(losses), int((labels != IGNORED).sum()))
