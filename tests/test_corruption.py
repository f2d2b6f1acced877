"""When a corruption is told to be weak."""

from __future__ import annotations

import pytest

from interv.report.corruption import corruption


@pytest.mark.parametrize(
    ("probabilities", "words"),
    [
        ([(0.79, 0.75)], ["0.79 clean and 0.75 corrupted, 5% less", "Below 10%"]),
        ([(0.5, 0.6)], ["20% more"]),
        ([(0.0, 0.0)], ["0% less"]),
        ([(0.79, 0.006), (0.7, 0.69)], ["On 1 of 2 prompts", "less than 10%"]),
        ([(0.27, 0.0847)], []),  # section 2.2 of Meng et al. 2022
        ([(0.5, 0.44)], []),
    ],
)
def test_what_is_said(probabilities: list[tuple[float, float]], words: list[str]) -> None:
    found = corruption(probabilities)
    for word in words:
        assert word in found.warning
    assert bool(found.warning) == bool(words)
    assert bool(found.short) == found.is_weak


def test_prompts_are_averaged_before_they_are_judged() -> None:
    found = corruption([(0.9, 0.1), (0.1, 0.1)])
    assert (found.clean, found.corrupted, found.taken) == pytest.approx((0.5, 0.1, 0.8))
    assert (found.is_weak, found.weak_prompts, found.prompts) == (False, 1, 2)
