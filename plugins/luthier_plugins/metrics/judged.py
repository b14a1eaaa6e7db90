"""The metrics that ask a generator: ``judge`` and ``win_rate``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from luthier.api import Answers, DataError, Message, Metric, Needs, Request, Sample, Score
from luthier.artifacts.rows import prompt_of
from luthier.serving.asking import Asker
from luthier.serving.judging import THINKING, Judge, told, written
from luthier_plugins.metrics.config import JudgeMarkConfig, WinRateConfig

_VERDICT = re.compile(r"\s*\W{0,3}([012])\b")
NO_VERDICT = "the judge has to answer with a number alone: is it able to, is `max_new_tokens` enough?"


class JudgeMark(Metric[JudgeMarkConfig]):
    """The mean mark of answers, from 1 to `best`; those of which the judge says nothing that can be read are counted,
    and have none."""

    higher_is_better: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(answers=Answers(max_new_tokens=self.config.answer_tokens))

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        talks = [[*prompt_of(item.row), Message(role="assistant", content=item.answer)] for item in samples]
        marks = Judge(self.config, self.context).marks(talks)
        known = [mark for mark in marks if mark is not None]
        if not known:
            raise DataError(f"none of {len(marks)} answers got a mark", hint=NO_VERDICT)
        return Score(sum(known) / len(known), marks, unread=marks.count(None))


class WinRate(Metric[WinRateConfig]):
    """The share of rows on which a judge prefers the model's answer to that of the first of `against`, from 0 to 1.

    Each pair is judged in both orders. A win is preferred in both; what is preferred in one order alone, as a tie,
    counts a half.
    """

    higher_is_better: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(answers=Answers(max_new_tokens=self.config.answer_tokens), baseline=True)

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        assert baseline is not None, "it was asked for"
        pairs = list(zip(samples, baseline, strict=True))
        # What is the same needs no judge, and is not preferred.
        unlike = [place for place, (mine, theirs) in enumerate(pairs) if mine.answer.strip() != theirs.answer.strip()]
        requests: list[Request] = []
        for place in unlike:
            mine, theirs = pairs[place]
            requests += [
                self._request(mine, mine.answer, theirs.answer),
                self._request(mine, theirs.answer, mine.answer),
            ]
        verdicts = self._verdicts(requests)
        rows: list[float | None] = [0.5] * len(pairs)
        counts = Counter({"pairs were alike": len(pairs) - len(unlike)})
        longer = 0
        for place, first, second in zip(unlike, verdicts[::2], verdicts[1::2], strict=True):
            if first is None or second is None:
                rows[place] = None
                continue
            # The model's answer stands first in the first order, and last in the second.
            rows[place] = value = (_points(first) + 1 - _points(second)) / 2
            counts["verdicts changed with the order"] += {first, second} == {1} or {first, second} == {2}
            counts["ties"] += first == second == 0
            if value in (0.0, 1.0):
                mine, theirs = pairs[place]
                counts["pairs were decided"] += 1
                longer += len(mine.answer if value else theirs.answer) > len(theirs.answer if value else mine.answer)
        counts["times the longer answer won"] = longer
        known = [value for value in rows if value is not None]
        if not known:
            raise DataError(f"none of {len(rows)} pairs got a verdict", hint=NO_VERDICT)
        told_of = {name: count for name, count in counts.items() if count}
        return Score(sum(known) / len(known), rows, neutral=0.5, unread=rows.count(None), counts=told_of)

    def _request(self, sample: Sample, first: str, second: str) -> Request:
        instruction = (
            f"You compare two answers to the same conversation. A good answer: {self.config.rubric}\nSay 1 if the "
            "first answer is better, 2 if the second one is, 0 if neither is. Answer with the number alone."
        )
        text = f"{written(prompt_of(sample.row))}\n\n[first answer]\n{first}\n\n[second answer]\n{second}"
        return told(instruction, text)

    def _verdicts(self, requests: Sequence[Request]) -> list[int | None]:
        if not requests:
            return []
        with self.context.build(self.config.generator) as generator:
            answers = Asker(generator, self.context).ask(requests, self.config.sampling(self.context.seed))
            found = [_VERDICT.match(THINKING.sub("", answer.text)) for (answer,) in answers]
        return [None if match is None else int(match[1]) for match in found]


def _points(verdict: int) -> float:
    """What the first answer gets of a verdict."""
    return {0: 0.5, 1: 1.0, 2: 0.0}[verdict]
