"""Rows of the data that are not used, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LeftOut:
    """A row that is not used.

    Attributes:
        copy_of: the row that says the same already; None: it is left out for another reason.
    """

    index: int
    text: str
    reason: str
    copy_of: int | None = None


def copy_of(index: int, text: str, first: int) -> LeftOut:
    """Leave a row out because it says what row `first` says."""
    return LeftOut(index, text, f"a copy of prompt {first}", first)


def told_copies(left_out: Sequence[LeftOut], kept: int) -> list[str]:
    """Say how many rows are copies; empty where none is."""
    copies = [gone for gone in left_out if gone.copy_of is not None]
    if not copies:
        return []
    return [
        f"{len(copies):,} of {kept + len(copies):,} prompts are copies of others and are left out: "
        f"{kept:,} distinct"
    ]
