"""Answers and log-probabilities of a model: what metrics, checks and servers are made from."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from luthier.api.artifact import Artifact
from luthier.api.errors import DataError
from luthier.api.serving import Completion, Generator, Request, Sampling
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.loading import load_client, load_tokenizer, padding_of, positions_of_model

BATCH = 32
"""Prompts in one batch."""


def completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int],
    sampling: Sampling,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    special: bool = True,
) -> Iterator[tuple[Completion, ...]]:
    """The answers to each prompt, in order, without the stop token.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Token ids, each ending with the opening of an assistant turn; batches are made of like lengths.
        stop_ids: The tokens on which generation stops.
        sampling: How answers are drawn.
        progress: Called with the prompts answered and their number, batch by batch.
        special: Whether special tokens show; servers leave them out.
    """
    model.eval()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, tuple[Completion, ...]] = {}
    # Sampling draws from torch's own generator, which is left as it was.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        for chosen in _batches(order, prompts, sampling.max_new_tokens, positions_of_model(model)):
            progress(len(answers), len(order))
            written = _generate(model, tokenizer, [prompts[index] for index in chosen], stop_ids, sampling)
            for place, index in enumerate(chosen):
                rows = written[place * sampling.n : (place + 1) * sampling.n]
                answers[index] = tuple(_completion(tokenizer, row, set(stop_ids), special) for row in rows)
    for index in range(len(prompts)):
        yield answers[index]


def _batches(
    order: Sequence[int], prompts: Sequence[list[int]], limit: int, room: int | None
) -> Iterator[Sequence[int]]:
    """Places of prompts, together as long as each has room for the longest answer; one by one where it has not, so that
    none is cut short by another's length."""
    wide = [place for place in order if room is None or len(prompts[place]) + limit <= room]
    yield from (wide[start : start + BATCH] for start in range(0, len(wide), BATCH))
    yield from ([place] for place in order[len(wide) :])


def _generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], stop_ids: Sequence[int], sampling: Sampling
) -> list[list[int]]:
    """Token ids after each prompt, `sampling.n` rows per prompt, padded after their ends."""
    width = max(map(len, prompts))
    room = positions_of_model(model)
    if room is not None and width >= room:
        raise DataError(
            f"a prompt has {width} tokens, the model's context is {room}", hint="shorten the prompt, or leave it out"
        )
    padding = padding_of(tokenizer)
    ids = [[padding] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    drawn = sampling.temperature > 0
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=sampling.max_new_tokens if room is None else min(sampling.max_new_tokens, room - width),
            do_sample=drawn,
            # The model's own sampling settings are for chatting, not for measuring.
            temperature=sampling.temperature if drawn else None,
            top_p=sampling.top_p if drawn else None,
            top_k=0 if drawn else None,
            repetition_penalty=None,
            num_return_sequences=sampling.n,
            eos_token_id=list(stop_ids),
            pad_token_id=padding,
        )
    return output[:, width:].tolist()


def _completion(tokenizer: Any, row: list[int], stops: set[int], special: bool) -> Completion:
    end = next((place for place, token in enumerate(row) if token in stops), None)
    text = tokenizer.decode(row[:end], skip_special_tokens=not special)
    return Completion(text, len(row) if end is None else end + 1, "length" if end is None else "stop")


class ModelGenerator(Generator[Any]):
    """A loaded model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        stop_ids: The tokens on which generation stops.
        progress: Called with the requests answered and their number.
        special: Whether special tokens show; servers leave them out.
        date: The day that a chat template is told which asks for it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        stop_ids: Sequence[int],
        progress: Callable[[int, int], None] = lambda done, total: None,
        *,
        special: bool = True,
        date: datetime.date | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = ChatEncoder(tokenizer, stop_ids, date)
        self._stops = stop_ids
        self._progress = progress
        self._special = special

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Completion]]:
        ids = [self.encoder.prompt(messages) for messages in requests]
        yield from completions(
            self.model, self.tokenizer, ids, self._stops, sampling, self._progress, special=self._special
        )

    def close(self) -> None:
        self.model = None


class TransformersGenerator(ModelGenerator):
    """A model or an adapter, loaded in transformers; quantized folders are computed as servers compute them.

    Args:
        artifact: The model or adapter.
        scratch: A folder for weights in float32, where they are quantized.
        progress: See `ModelGenerator`.
        special: See `ModelGenerator`.
        date: See `ModelGenerator`.
    """

    def __init__(
        self,
        artifact: Artifact,
        scratch: Path,
        progress: Callable[[int, int], None] = lambda done, total: None,
        *,
        special: bool = True,
        date: datetime.date | None = None,
    ) -> None:
        model, tokenizer = load_client(artifact, scratch), load_tokenizer(artifact)
        super().__init__(model, tokenizer, artifact.facts["stop_token_ids"], progress, special=special, date=date)
