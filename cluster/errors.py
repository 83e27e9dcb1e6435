"""Errors that a user can act on. They are printed without a traceback and end the command with exit code 2."""

from dataclasses import dataclass
from typing import Self


class ExpectedError(Exception):
    """Base of every error that input, machine or cluster can cause; its text says what to do.

    Anything else that escapes is a defect of ours and keeps its traceback.
    """


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a document.

    Attributes:
        message: what is set, what it meets and what to set instead.
        where: dotted path of the field (``training.max_steps``), empty for the document as a whole.
        line: 1-based line in the file; ``None`` when the value did not come from the file (an override, a default).
    """

    message: str
    where: str = ""
    line: int | None = None

    def __str__(self) -> str:
        place = f"line {self.line}  " if self.line is not None else ""
        return f"{place}{self.where}: {self.message}" if self.where else f"{place}{self.message}"


class DocumentError(ExpectedError):
    """Everything that is wrong in one recipe, profile or DeepSpeed JSON, all of it at once."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.source = source
        self.problems = sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0))
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))

    @classmethod
    def single(cls, where: str, message: str, source: str = "recipe") -> Self:
        """Make the error for one field that is only found wrong when it is used."""
        return cls(source, [Problem(message, where)])

    def __reduce__(self) -> tuple[type["DocumentError"], tuple[str, list[Problem]]]:
        return type(self), (self.source, self.problems)


class BackendError(ExpectedError):
    """A scheduler, a host or a cluster refuses, cannot be reached, or does not know a job; with its own words."""


class JobLookupError(ExpectedError):
    """No job, or more than one, is meant by what was typed."""
