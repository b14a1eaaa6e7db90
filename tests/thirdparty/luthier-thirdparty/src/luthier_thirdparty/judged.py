"""A metric that asks a judge, and reads a column of the row."""

from collections.abc import Sequence
from typing import ClassVar

from luthier.api import Answers, Generator, Message, Metric, Needs, Sample, Sampling, Score

from luthier_thirdparty.config import JudgedConfig


class Judged(Metric[JudgedConfig]):
    """The share of answers of which the judge says anything at all, times what the row's column weighs."""

    higher_is_better: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(answers=Answers(max_new_tokens=4))

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        requests = [
            [Message(role="user", content=f"{item.row.get(self.config.column)}: {item.prompt} {item.answer}")]
            for item in samples
        ]
        judge: Generator
        with self.context.build(self.config.judge) as judge:
            verdicts = [answer.text for (answer,) in judge.generate(requests, Sampling(max_new_tokens=4))]
        by_row = [
            float(bool(text) and item.row.get(self.config.column) == "hard")
            for text, item in zip(verdicts, samples, strict=True)
        ]
        return Score(sum(by_row) / len(by_row), by_row)
