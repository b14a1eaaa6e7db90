"""How generators are asked: many requests at once where they can be, and every answer kept before anything else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

from luthier.api.context import Context
from luthier.api.errors import LuthierError, ModelError
from luthier.api.serving import Completion, Generator, Request, Sampling
from luthier.artifacts.answers import KeptAnswers, key_of

POLL = 0.5
"""Seconds after which it is seen that the user wants to stop, while nothing comes in."""
HOPELESS = 20
"""Requests that are refused one after the other, with no answer before, after which the others are not tried."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An answer that is asked for: a request's place, and which of its answers it is."""

    place: int
    number: int
    key: str


class Asker:
    """Asks a generator for a stage.

    What was answered is kept: under who answers, for all stages of the store, where the generator says who that is; in
    the stage's own scratch folder otherwise.

    Args:
        generator: What answers.
        context: The stage's.
    """

    def __init__(self, generator: Generator[Any], context: Context) -> None:
        self._generator = generator
        self._context = context
        who = generator.answers_as
        if who is None:
            self._folder = context.scratch / "answers"
        else:
            self._folder = context.cache / "answers" / hashlib.sha256(who.encode()).hexdigest()[:32]

    def ask(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Completion]]:
        """Yield the `sampling.n` answers to each request, in the order of the requests.

        A request that the generator refuses has an answer with the finish reason ``refused``. Such are not kept: they
        cost nothing, and may go through another time.

        Raises:
            ModelError: the generator cannot answer, or its budget is spent. What was answered until then is kept.
            Interrupted: the user asked to stop. So it is then.
        """
        wanted = [
            _Wanted(place, number, key_of(request, sampling, number))
            for place, request in enumerate(requests)
            for number in range(sampling.n)
        ]
        with KeptAnswers(self._folder) as kept:
            found = {item: answer for item in wanted if (answer := kept.get(item.key)) is not None}
            if found:
                self._context.log(f"{len(found)} of {len(wanted)} answers are there from before")
            total = len(wanted)
            refused = 0
            spent = ""
            try:
                for answer in found.values():
                    spent = self._generator.account(answer)
                left = [item for item in wanted if item not in found]
                new = self._several(requests, sampling, left, kept) if self._generator.at_once > 1 else None
                for item, answer in new or self._in_order(requests, sampling, left, kept):
                    found[item] = answer
                    if answer.finish_reason == "refused":
                        refused += 1
                        if refused == len(found) == HOPELESS:
                            raise ModelError(f"the first {refused} requests are refused: {answer.problem}")
                    else:
                        spent = self._generator.account(answer)
                    self._context.progress(len(found), total, f"answers{', ' if spent else ''}{spent}")
            except LuthierError as error:
                if len(kept):
                    error.hint = f"{error.hint + '; ' if error.hint else ''}{len(kept)} answers are kept: run again"
                raise
            if spent:
                self._context.log(f"{total} answers: {spent}")
        for place in range(len(requests)):
            yield [found[wanted[place * sampling.n + number]] for number in range(sampling.n)]

    def _in_order(
        self, requests: Sequence[Request], sampling: Sampling, wanted: Sequence[_Wanted], kept: KeptAnswers
    ) -> Iterator[tuple[_Wanted, Completion]]:
        """Ask what computes here: whole requests, which it puts into batches as it likes."""
        places = sorted({item.place for item in wanted})
        groups = self._generator.generate([requests[place] for place in places], sampling) if places else ()
        missing = {(item.place, item.number): item for item in wanted}
        for place, group in zip(places, groups, strict=True):
            for number, answer in enumerate(group):
                if (item := missing.get((place, number))) is not None:
                    if answer.finish_reason != "refused":
                        kept.keep(item.key, answer)
                    yield item, answer

    def _several(
        self, requests: Sequence[Request], sampling: Sampling, wanted: Sequence[_Wanted], kept: KeptAnswers
    ) -> Iterator[tuple[_Wanted, Completion]]:
        """Ask for each answer alone, many at once, and give them as they come."""

        def one(item: _Wanted) -> Completion:
            alone = replace(sampling, n=1, seed=sampling.seed + item.number)
            ((answer,),) = self._generator.generate([requests[item.place]], alone)
            if answer.finish_reason != "refused":
                kept.keep(item.key, answer)
            return answer

        pool = ThreadPoolExecutor(self._generator.at_once, thread_name_prefix="asking")
        waiting: dict[Future[Completion], _Wanted] = {}
        rest = iter(wanted)
        try:
            while True:
                # Never more than are asked at once: what is only planned is never paid for.
                while len(waiting) < self._generator.at_once and (item := next(rest, None)) is not None:
                    waiting[pool.submit(one, item)] = item
                if not waiting:
                    return
                done, _ = wait(waiting, timeout=POLL, return_when=FIRST_COMPLETED)
                if not done and self._context.stopping():
                    self._context.progress(0, None, "")
                for future in done:
                    item = waiting.pop(future)
                    yield item, future.result()
        finally:
            self._generator.give_up()
            # What was sent is waited for: it is paid for, and kept when it comes.
            pool.shutdown(wait=True, cancel_futures=True)
