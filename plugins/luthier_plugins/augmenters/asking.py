"""What augmenters share that ask a generator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from luthier.api import Asks, Augmenter, Completion, Context, DataError, JudgeConfig, Message, Request, Row
from luthier.api.data import ID, WEIGHT
from luthier.artifacts.rows import MEANT, RESERVED, id_of
from luthier.serving.asking import Asker
from luthier.serving.judging import THINKING, Judge

C = TypeVar("C", bound=Asks)


class Asking(Augmenter[C]):
    """An augmenter that asks a generator, and counts the answers of which no row can be made."""

    def __init__(self, config: C, context: Context) -> None:
        super().__init__(config, context)
        self.problems: Counter[str] = Counter()
        self._asker: Asker | None = None

    @property
    def dropped(self) -> Mapping[str, int]:
        return self.problems

    def rows(self, rows: Sequence[Row]) -> Iterator[Row]:
        # One generator for all that is asked: it is loaded once, and has one budget.
        with self.context.build(self.config.generator) as generator:
            self._asker = Asker(generator, self.context)
            yield from self.made(rows)

    def made(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Yield new rows; `ask` can be used."""
        raise NotImplementedError

    @property
    def judge_asker(self) -> Asker | None:
        """Who asks the judge where that is the generator itself: it is loaded once, and has one budget."""
        judge: JudgeConfig | None = getattr(self.config, "judge", None)
        return self._asker if judge is not None and judge.generator == self.config.generator else None

    def ask(
        self, requests: Sequence[Request], n: int = 1, *, counted: bool = True, **options: Any
    ) -> Iterator[list[str]]:
        """The usable answers to each request, as texts without white space around them.

        Args:
            requests: What is asked.
            n: Answers to each.
            counted: Whether an answer that cannot be used is a row that could not be made.
            options: More of `luthier.api.Sampling`.
        """
        assert self._asker is not None, "rows are made in `made`"
        groups = self._asker.ask(requests, self.config.sampling(self.context.seed, n, **options))
        for request, group in zip(requests, groups, strict=True):
            texts: list[str] = []
            for answer in group:
                text = THINKING.sub("", answer.text).strip()
                problem = problem_of(answer, text, request)
                if problem is None:
                    texts.append(text)
                elif counted:
                    self.problems[problem] += 1
            yield texts


def problem_of(answer: Completion, text: str, request: Request) -> str | None:
    """Why nothing can be made of an answer; None where something can."""
    if answer.finish_reason == "refused":
        return f"the generator refused the request: {answer.problem}"
    if answer.finish_reason == "length":
        return "the answer was cut off at `max_new_tokens`"
    if not text:
        return "the answer was empty"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "the answer holds half a sign (a lone surrogate)"
    if same(text, request[-1]["content"]):
        return "the answer repeats the prompt"
    return None


def same(one: str, other: str) -> bool:
    """Whether two texts say the same, but for white space and upper case."""
    return one.split() == other.split() or one.casefold().split() == other.casefold().split()


def beside(row: Row) -> Row:
    """What a row has beside its schema: what the recipe keeps, and how much it weighs."""
    return {key: value for key, value in row.items() if key not in RESERVED | MEANT or key == WEIGHT}


def parent(row: Row) -> str:
    """The id by which a row is named as a parent."""
    return str(row.get(ID) or id_of(row))


def scores(
    context: Context,
    judge: JudgeConfig | None,
    reward: Any,
    talks: Sequence[Sequence[Message]],
    rows: Sequence[Row],
    asker: Asker | None = None,
) -> list[float | None]:
    """What a judge or a reward says of the last turn of each conversation; None: nothing.

    Raises:
        DataError: of none of several; a judge that never gives a mark is none.
    """
    if judge is not None:
        found = Judge(judge, context, asker).marks(talks)
    else:
        answers = [Completion(talk[-1]["content"], finish_reason="stop") for talk in talks]
        found = list(context.build(reward).score(answers, rows))
    if found and all(score is None for score in found):
        raise DataError(
            f"none of {len(found)} answers got a mark",
            hint="the judge has to answer with a number alone: is it able to, is `max_new_tokens` enough?",
        )
    return found
