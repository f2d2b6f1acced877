"""Whether a corruption corrupts: where the answer survives it, a trace has nothing to show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

WEAK = 0.1
"""Of the answer's clean probability: a corruption that takes less is weak.

The corruption of Meng et al. 2022 takes 69 % (section 2.2: 27.0 % to 8.47 %); noise at a tenth of
its level takes some 1 to 5 %. Whatever the metric, the probability is what is judged by: a share of
a rank of 0 or of a logit, which has no zero point, means nothing.
"""


@dataclass(frozen=True)
class Corruption:
    """What a corruption takes from the answer.

    Attributes:
        clean, corrupted: the answer's mean probability over the prompts that were traced.
        prompts: how many these are.
        weak_prompts: of how many it takes less than `WEAK`.
    """

    clean: float
    corrupted: float
    prompts: int
    weak_prompts: int

    @property
    def taken(self) -> float:
        """Share of the clean probability; negative where the answer gains."""
        return (self.clean - self.corrupted) / self.clean if self.clean > 0 else 0.0

    @property
    def is_weak(self) -> bool:
        return self.taken < WEAK

    def as_dict(self) -> dict[str, Any]:
        return {
            "p_clean": self.clean,
            "p_corrupted": self.corrupted,
            "share_taken": self.taken,
            "weak": self.is_weak,
            "weak_prompts": self.weak_prompts,
        }

    @property
    def short(self) -> str:
        """A line for a figure; empty where all is well."""
        if not self.is_weak:
            return ""
        return f"WEAK CORRUPTION: answer {self.clean:.3g} clean, {self.corrupted:.3g} corrupted"

    @property
    def warning(self) -> str:
        """A sentence for people; empty where all is well."""
        if self.is_weak:
            change = f"{abs(self.taken):.0%} {'less' if self.taken >= 0 else 'more'}"
            return (
                f"The corruption hardly corrupts: the answer's probability is {self.clean:.3g} "
                f"clean and {self.corrupted:.3g} corrupted, {change}. Below {WEAK:.0%} there is "
                "next to nothing to restore, and the trace shows little more than noise: raise "
                "corrupt.level, or corrupt what the answer depends on."
            )
        if self.weak_prompts:
            return (
                f"On {self.weak_prompts} of {self.prompts} prompts the corruption takes less than "
                f"{WEAK:.0%} of the answer's probability: see p_clean and p_corrupted in "
                "prompts.csv."
            )
        return ""


def corruption(probabilities: Iterable[Sequence[float]]) -> Corruption:
    """Judge a corruption by (clean, corrupted) probabilities of each prompt's answer.

    Raises:
        ValueError: there is no prompt.
    """
    each = [Corruption(clean, corrupted, 1, 0) for clean, corrupted in probabilities]
    if not each:
        raise ValueError("no prompt was traced")
    return Corruption(
        sum(one.clean for one in each) / len(each),
        sum(one.corrupted for one in each) / len(each),
        len(each),
        sum(one.is_weak for one in each),
    )
