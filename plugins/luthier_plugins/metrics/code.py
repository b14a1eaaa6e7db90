"""The metric ``code_runs``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from os import sched_getaffinity
from textwrap import dedent

from luthier.api import DataError, Sample, Score
from luthier_plugins.metrics.answers import AnswerMetric
from luthier_plugins.metrics.config import CodeRunsConfig
from luthier_plugins.metrics.processes import Ended, run_python, slowness

FENCE = re.compile(r"^[ \t]*```[ \t]*(?P<language>\w*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
PYTHON = ("python", "py", "python3")


class CodeRuns(AnswerMetric[CodeRunsConfig]):
    """The share of answers whose code runs to its end and passes the row's tests, from 0 to 1."""

    @cached_property
    def _seconds(self) -> float:
        return self.config.seconds * slowness()

    def score(self, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Score:
        programs = [self._program(sample) for sample in samples]
        seconds = self._seconds
        with ThreadPoolExecutor(len(sched_getaffinity(0))) as pool:
            ended = list(pool.map(lambda code: self._run(code, seconds), programs))
        rows = [float(item is not None and item.how == "done") for item in ended]
        counts = Counter("programs were stopped" for item in ended if item is not None and item.how == "stopped")
        return Score(sum(rows) / len(rows), rows, unread=ended.count(None), counts=counts)

    def _run(self, code: str | None, seconds: float) -> Ended | None:
        return None if code is None else run_python(code, seconds, self.config.memory * 2**20)

    def _program(self, sample: Sample) -> str | None:
        """What is run: the answer's code and the tests; None where the answer has no code."""
        code = code_of(sample.answer)
        if not code.strip():
            return None
        if self.config.with_prompt:
            code = f"{code_of(sample.prompt)}\n{code}"
        if self.config.tests is not None:
            tests = sample.row.get(self.config.tests)
            if not isinstance(tests, str):
                raise DataError(
                    f"a row has no code in the column '{self.config.tests}'",
                    hint=f"have the data stage keep it: `keep: [{self.config.tests}]`; or `tests: null`",
                )
            code = f"{code}\n{tests}"
        return code


def code_of(text: str) -> str:
    """The Python code of an answer: all that stands in fences of Python; where no fence names a language, in all of
    them; the whole answer where it has none."""
    fences = [(match["language"].lower(), dedent(match["code"])) for match in FENCE.finditer(text)]
    named = [code for language, code in fences if language in PYTHON]
    if not fences:
        return text
    # What stands beside named code without a name is mostly what it prints.
    return "\n".join(named or [code for language, code in fences if not language])
