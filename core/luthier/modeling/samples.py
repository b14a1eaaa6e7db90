"""What metrics are computed from: a model's answers to rows, and its probabilities of answers that are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from luthier.api.data import Row
from luthier.api.errors import DataError
from luthier.api.evaluation import Answers, Choices, Needs, Sample
from luthier.api.serving import Completion, Request, Sampling
from luthier.artifacts.rows import conversations, prompt_of, reference_of
from luthier.modeling.chat import ChatEncoder
from luthier.modeling.scoring import Scored, chosen
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


def samples_of(
    rows: Sequence[Row],
    need: Needs,
    answers: Asked,
    found: Sequence[Scored] = (),
    thinking: Thinking | None = None,
) -> list[Sample]:
    """What one metric sees.

    Args:
        rows: The rows.
        need: What it needs.
        answers: All answers.
        found: What the model makes of the rows, see `luthier.modeling.scoring`; empty: metrics need none of it.
        thinking: The marks at which thinking is split off answers and references; None: it stays in them.
    """
    given = answers[need.answers] if need.answers is not None else ()
    return [
        Sample(
            row,
            prompt_of(row)[-1]["content"],
            _answer_of(reference_of(row) or "", thinking),
            tuple(_split(item, thinking) for item in given[place]) if given else (),
            **(_probabilities(need, found[place]) if found else {}),
        )
        for place, row in enumerate(rows)
    ]


def _probabilities(need: Needs, found: Scored) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if need.token_logps or need.distributions:
        made |= {"logps": found.logps, "targets": found.targets, "likeliest": found.likeliest}
    if need.distributions:
        made["distribution"] = found.distribution
    if need.choices is not None:
        made["choices"] = found.choices[need.choices]
    return made


def _answer_of(text: str, thinking: Thinking | None) -> str:
    return text if thinking is None else thinking.split(text)[1]


def _split(completion: Completion, thinking: Thinking | None) -> Completion:
    if thinking is None:
        return completion
    thought, answer = thinking.split(completion.text, opened=thinking.opened)
    return replace(completion, text=answer, thinking=thought)


def problem_of(
    encoder: ChatEncoder, row: Row, room: int | None, *, scored: bool, choices: Sequence[Choices] = ()
) -> str | None:
    """Why a model cannot be asked a row, or its answers cannot be scored; None where they can.

    Args:
        encoder: Makes tokens for the model.
        row: The row.
        room: The most tokens that the model can see; None: any number.
        scored: Whether log-probabilities of the row's own answers are wanted.
        choices: Among which answers it is to choose as well.
    """
    if any("tool_calls" in talk[-1] for talk in conversations(row)):
        return "its answer is a call of tools, which is not compared"
    try:
        lengths = [len(encoder.prompt(prompt_of(row))) + 1]
        if scored:
            lengths += [len(item.input_ids) for item in encoder.conversation(conversations(row)[0], "apart")]
        lengths += [len(chosen(encoder, row, text).input_ids) for some in choices for text in some.of(row)]
    except DataError as error:
        return error.message
    longest = max(lengths)
    return None if room is None or longest <= room else f"it has {longest} tokens, the context is {room}"
