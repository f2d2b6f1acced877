"""Values of causal models: arrays of them, their kinds, and the error that they do not fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Scalar = bool | int | float | str
Kind = Literal["entity", "text", "number", "any"]
"""What a variable's values are; `any`: a user's function gives them, and nothing is known."""


class CausalError(Exception):
    """What is wrong with a causal model, or why no pairs can be made of it.

    Attributes:
        expected: what would be right.
        near: the name that may have been meant.
        at: where in the section, as keys and indices.
    """

    def __init__(
        self,
        message: str,
        expected: str | None = None,
        near: str | None = None,
        at: tuple[str | int, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message, self.expected, self.near, self.at = message, expected, near, at

    def within(self, *at: str | int) -> CausalError:
        """The same, at a place of the section."""
        return CausalError(self.message, self.expected, self.near, (*at, *self.at))


def column(values: Iterable[Scalar]) -> Array:
    """Values as an array `[n]`: bool, int64, float64, or object where there is text."""
    listed = list(values)
    if any(isinstance(v, str) for v in listed):
        out = np.empty(len(listed), dtype=object)
        out[:] = listed
        return out
    if all(isinstance(v, bool) for v in listed):
        return np.array(listed, dtype=bool)
    whole = all(isinstance(v, int) for v in listed)
    return np.array(listed, dtype=np.int64 if whole else np.float64)


def kind_of(values: Iterable[Scalar]) -> Kind | None:
    """Text or number; None where there are both."""
    text = {isinstance(v, str) for v in values}
    return None if len(text) > 1 else "text" if True in text else "number"


def distinct(values: Iterable[Scalar]) -> tuple[Scalar, ...]:
    """Each value once, in the order of its first; True and 1 are one value."""
    return tuple(dict.fromkeys(values))
