"""Every error that `interv` raises on purpose.

    IntervError                 exit code 1
    ├── UsageError              exit code 2: the command line, or a file named on it
    │   └── SpecError           exit code 2: a list of Problems, each with its place
    ├── ModelError              a model that cannot be had, or is not what it says
    ├── EngineError             a site that did not fire, a shape that does not fit
    ├── ResumeError             a run folder that this process may not go on with
    └── StorageError            the disk is full, or the folder cannot be written

The command line prints the message of any of these, without a traceback, and exits
with its code. Everything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "EngineError",
    "IntervError",
    "Mark",
    "ModelError",
    "Problem",
    "ResumeError",
    "SpecError",
    "StorageError",
    "UsageError",
    "nearest",
]


class IntervError(Exception):
    """Base of all errors that are raised on purpose; the message is for the user."""

    exit_code = 1


class UsageError(IntervError):
    """The command line, or a file named on it, is wrong."""

    exit_code = 2


class ModelError(IntervError):
    """A model that cannot be had, or that is not what it says it is."""


class EngineError(IntervError):
    """An intervention that did not happen as asked: never a silent no-op."""


class ResumeError(IntervError):
    """A run folder that this process may not go on with."""


class StorageError(IntervError):
    """The disk is full, or a folder cannot be written."""


@dataclass(frozen=True)
class Mark:
    """A place in a text: `source` is a file's path or a description of an argument."""

    source: str
    line: int
    column: int
    text: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a spec, and what would be right."""

    message: str
    mark: Mark | None = None
    expected: str | None = None
    near: str | None = None

    def __str__(self) -> str:
        head = f"{self.mark}: {self.message}" if self.mark else self.message
        lines = [head]
        if self.mark and self.mark.text.strip():
            gutter = f"{self.mark.line:5d} | "
            # A caret under a tab must stand under the same tab.
            lead = "".join(c if c == "\t" else " " for c in self.mark.text[: self.mark.column - 1])
            lines += [gutter + self.mark.text, " " * (len(gutter) - 2) + "| " + lead + "^"]
        if self.expected:
            lines.append(f"      expected {self.expected}")
        if self.near:
            lines.append(f"      did you mean '{self.near}'?")
        return "\n".join(lines)


class SpecError(UsageError):
    """A spec that cannot be run; all its problems at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(str(p) for p in self.problems))


def nearest(word: object, choices: Sequence[str]) -> str | None:
    """The choice most like `word`, or None when none is near."""
    matches = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None
