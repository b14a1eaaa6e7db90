"""What can go wrong, as a user sees it: what is wrong, where, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


class LuthierError(Exception):
    """Base of all errors meant for a user.

    Args:
        message: What is wrong, in one sentence.
        where: The place: ``file:line``, a row, a tensor, a stage.
        hint: What to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  {self.hint}" if self.hint else text


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a recipe or on the command line."""

    message: str
    file: str | None = None
    line: int | None = None
    path: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else self.file
        head = ": ".join(part for part in (place, self.path, self.message) if part)
        return f"{head}\n  {self.hint}" if self.hint else head


class RecipeError(LuthierError):
    """The recipe or the command line is wrong. Carries every problem found, not only the first."""

    exit_code = 2

    def __init__(
        self,
        problems: list[Problem] | str,
        *,
        where: str | None = None,
        hint: str | None = None,
        partial: object | None = None,
        left_out: frozenset[str] = frozenset(),
    ) -> None:
        if isinstance(problems, str):
            problems = [Problem(problems, file=where, hint=hint)]
        self.problems = problems
        # What could be read all the same, so that a plan can report what else is wrong.
        self.partial = partial
        self.left_out = left_out
        super().__init__("\n".join(str(problem) for problem in problems))


class PluginError(LuthierError):
    """A plugin is missing, broken, or in conflict with another one."""

    exit_code = 2


class DataError(LuthierError):
    """A data row or file is not what its format says."""


class ModelError(LuthierError):
    """A model, adapter or tokenizer cannot be used as asked."""


class StoreError(LuthierError):
    """The store cannot be read or written."""


class StageError(LuthierError):
    """A stage failed for its own reasons, or its worker died."""


class GateError(LuthierError):
    """A quality gate did not hold."""

    exit_code = 3


class Interrupted(LuthierError):
    """The user asked to stop; checkpoints are written, nothing stored is lost."""

    exit_code = 130
