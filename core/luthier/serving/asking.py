"""How generators are asked: many requests at once where they can be, and every answer kept before anything else."""

from __future__ import annotations

import hashlib
from collections.abc import Generator as Yields
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from luthier.api.context import Context
from luthier.api.errors import LuthierError, ModelError
from luthier.api.serving import Completion, Generator, Request, Sampling
from luthier.artifacts.answers import ANSWERS, KeptAnswers, key_of
from luthier.artifacts.digest import digest_value

POLL = 0.5
"""Seconds after which it is seen that the user wants to stop, while nothing comes in."""
TOGETHER = 64
"""Requests that are handed together to what computes here."""
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
        who: Who answers, where the generator does not say it itself.
    """

    def __init__(self, generator: Generator[Any], context: Context, who: str | None = None) -> None:
        self._generator = generator
        self._context = context
        who = generator.answers_as or who
        if who is None:
            self._folder = context.scratch / ANSWERS
        else:
            self._folder = context.cache / ANSWERS / hashlib.sha256(who.encode()).hexdigest()[:32]

    def ask(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Completion]]:
        """Yield the `sampling.n` answers to each request, in the order of the requests.

        A request that the generator refuses has an answer with the finish reason ``refused``. Such are not kept: they
        cost nothing, and may go through another time.

        Raises:
            ModelError: the generator cannot answer, or its budget is spent. What was answered until then is kept.
            Interrupted: the user asked to stop. So it is then.
        """
        groups = self._groups(requests, sampling)
        wanted = {(item.place, item.number): item.key for group in groups for item in group}
        with KeptAnswers(self._folder) as kept:
            # By key: who asks the same twice pays once.
            found = {key: answer for key in wanted.values() if (answer := kept.get(key)) is not None}
            total = len(set(wanted.values()))
            if found:
                self._context.log(f"{len(found)} of {total} answers are there from before")
            refused = 0
            spent = ""
            try:
                for answer in found.values():
                    spent = self._generator.account(answer)
                way = self._in_order if self._generator.at_once is None else self._several
                # Closed while answers can still be kept: those that are under way are waited for.
                with closing(way(requests, sampling, groups, kept)) as coming:
                    for key, answer in coming:
                        found[key] = answer
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
            yield [found[wanted[place, number]] for number in range(sampling.n)]

    def _groups(self, requests: Sequence[Request], sampling: Sampling) -> list[list[_Wanted]]:
        """The answers that are asked for together.

        Over a network each is asked for alone. What computes here is given requests of like lengths, some at a time, so
        that what is answered can be kept before all is. Answers that are drawn depend on what else is in their group:
        they are kept as that group's, and come out the same however often the stage was stopped.
        """
        numbers = range(sampling.n)
        if self._generator.at_once is not None:
            return [
                [_Wanted(place, number, key_of(request, sampling, number))]
                for place, request in enumerate(requests)
                for number in numbers
            ]
        lengths = [sum(len(turn["content"]) for turn in request) for request in requests]
        firsts = [key_of(request, sampling, 0) for request in requests]
        # In whatever order they come, the same requests make the same groups.
        order = sorted(range(len(requests)), key=lambda place: (lengths[place], firsts[place]))
        groups: list[list[_Wanted]] = []
        for start in range(0, len(order), TOGETHER):
            places = order[start : start + TOGETHER]
            keys = [key_of(requests[place], sampling, number) for place in places for number in numbers]
            whole = f"-{digest_value(keys)[:16]}" if sampling.temperature else ""
            items = [(place, number) for place in places for number in numbers]
            groups.append([_Wanted(*item, f"{key}{whole}") for item, key in zip(items, keys, strict=True)])
        return groups

    def _in_order(
        self, requests: Sequence[Request], sampling: Sampling, groups: Sequence[Sequence[_Wanted]], kept: KeptAnswers
    ) -> Yields[tuple[str, Completion]]:
        """Ask what computes here, group by group."""
        for group in groups:
            missing = {(item.place, item.number): item for item in group if kept.get(item.key) is None}
            if not missing:
                continue
            self._generator.may_ask()
            drawn = sampling.temperature > 0
            places = list(dict.fromkeys(item.place for item in (group if drawn else missing.values())))
            # Else all groups would be drawn alike.
            seed = (sampling.seed + int(digest_value(group[0].key)[:8], 16)) % 2**32 if drawn else sampling.seed
            answers = self._generator.generate([requests[place] for place in places], replace(sampling, seed=seed))
            for place, several in zip(places, answers, strict=True):
                for number, answer in enumerate(several):
                    item = missing.get((place, number))
                    # The same request may be in a group twice: the first answer is that of both.
                    if item is not None and kept.get(item.key) is None:
                        if answer.finish_reason != "refused":
                            kept.keep(item.key, answer)
                        yield item.key, answer

    def _several(
        self, requests: Sequence[Request], sampling: Sampling, groups: Sequence[Sequence[_Wanted]], kept: KeptAnswers
    ) -> Yields[tuple[str, Completion]]:
        """Ask for each answer alone, many at once, and give them as they come."""

        def one(item: _Wanted) -> Completion:
            alone = replace(sampling, n=1, seed=sampling.seed + item.number)
            ((answer,),) = self._generator.generate([requests[item.place]], alone)
            if answer.finish_reason != "refused":
                kept.keep(item.key, answer)
            return answer

        most = self._generator.at_once or 1
        pool = ThreadPoolExecutor(most, thread_name_prefix="asking")
        waiting: dict[Future[Completion], _Wanted] = {}
        each = {item.key: item for group in groups for item in group}
        rest = (item for item in each.values() if kept.get(item.key) is None)
        try:
            while True:
                # Never more than are asked at once: what is only planned is never paid for.
                while len(waiting) < most and (item := next(rest, None)) is not None:
                    self._generator.may_ask()
                    waiting[pool.submit(one, item)] = item
                if not waiting:
                    return
                done, _ = wait(waiting, timeout=POLL, return_when=FIRST_COMPLETED)
                if not done and self._context.stopping():
                    self._context.progress(0, None, "")
                for future in done:
                    item = waiting.pop(future)
                    yield item.key, future.result()
        except BaseException:
            self._generator.give_up()
            raise
        finally:
            # What was sent is waited for: it is paid for, and kept when it comes.
            pool.shutdown(wait=True, cancel_futures=True)
