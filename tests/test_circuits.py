from __future__ import annotations

import numpy as np
import pytest

from interv.errors import IntervError
from interv.report.circuits import areas, faithfulness, incompleteness, log_weighted, minimality
from interv.spec.patch_parts import FRACTIONS


def test_faithfulness_by_hand() -> None:
    assert faithfulness(2.0, 1.0, 5.0) == 0.25
    assert faithfulness(1.0, 1.0, 5.0) == 0
    assert faithfulness(5.0, 1.0, 5.0) == 1
    assert faithfulness(7.0, 1.0, 5.0) == 1.5
    assert faithfulness(-1.0, 1.0, 5.0) == -0.5
    assert faithfulness(4.0, 5.0, 1.0) == 0.25
    assert isinstance(faithfulness(2.0, 1.0, 5.0), float)


def test_faithfulness_of_several() -> None:
    assert list(faithfulness(np.array([2.0, 5.0]), 1.0, 5.0)) == [0.25, 1]
    several = faithfulness(np.array([2.0, 2.0]), np.array([1.0, 0.0]), np.array([5.0, 4.0]))
    assert list(several) == [0.25, 0.5]


@pytest.mark.parametrize(
    ("empty", "full"), [(3.0, 3.0), (0.0, 0.0), (0.1 + 0.2, 0.3), (float("nan"), 1.0)]
)
def test_faithfulness_needs_a_difference(empty: float, full: float) -> None:
    with pytest.raises(IntervError, match="faithfulness is undefined"):
        faithfulness(1.0, empty, full)
    with pytest.raises(IntervError, match="faithfulness is undefined"):
        faithfulness(np.ones(2), np.array([empty, 0.0]), np.array([full, 1.0]))


def test_areas_by_hand() -> None:
    # Trapezoids 0.2 * (0 + 0.5) / 2 and 0.8 * (0.5 + 1) / 2.
    cpr, cmd = areas([0.0, 0.2, 1.0], [0.0, 0.5, 1.0])
    assert (cpr, cmd) == (pytest.approx(0.05 + 0.6), pytest.approx(0.15 + 0.2))
    # Above 1: the distance from 1 counts, not its sign.
    over = areas([0.0, 1.0], [0.5, 1.5])
    assert (over.cpr, over.cmd) == (pytest.approx(1.0), pytest.approx(0.5))
    assert areas([0.0, 1.0], [-1.0, 1.0]).cpr == pytest.approx(0)


def test_areas_on_the_fractions_of_mib() -> None:
    assert len(FRACTIONS) == 10
    perfect = areas(FRACTIONS, [1.0] * 10)
    assert (perfect.cpr, perfect.cmd) == (pytest.approx(0.999), 0)
    # f = x: the integral of x from 0.001 to 1.
    straight = areas(FRACTIONS, FRACTIONS)
    assert straight.cpr == pytest.approx((1 - 0.001**2) / 2)
    assert straight.cmd == pytest.approx(0.999 - (1 - 0.001**2) / 2)


@pytest.mark.parametrize(
    ("fractions", "f"),
    [([0.1], [1.0]), ([], []), ([0.1, 0.2], [1.0]), ([0.2, 0.1], [1.0, 1.0]), ([0.1, 0.1], [1, 1])],
)
def test_an_area_needs_rising_fractions(fractions: list[float], f: list[float]) -> None:
    with pytest.raises(IntervError, match="rising fractions"):
        areas(fractions, f)


def test_a_weighted_accuracy_by_hand() -> None:
    # Over log k, each decade counts alike: (0 + 0.5) / 2 and (0.5 + 1) / 2.
    assert log_weighted([0.01, 0.1, 1.0], [0.0, 0.5, 1.0]) == pytest.approx(0.5)
    assert log_weighted([0.01, 0.1, 1.0], [0.0, 1.0, 1.0]) == pytest.approx(0.75)
    assert log_weighted([0.0, 0.1, 1.0], [0.7, 1.0, 1.0]) == pytest.approx(1.0)
    with pytest.raises(IntervError, match="two sizes above 0"):
        log_weighted([0.0, 1.0], [1.0, 1.0])


def test_completeness_and_minimality_by_hand() -> None:
    assert incompleteness(1.5, 2.0) == 0.5
    assert incompleteness(2.0, 1.5) == 0.5
    assert minimality(0.25, 1.0) == 0.75
    assert minimality(1.0, 1.0) == 0
    assert list(incompleteness(np.array([1.0, 4.0]), np.array([3.0, 3.0]))) == [2, 1]
    assert list(minimality(np.array([1.0, 4.0]), np.array([3.0, 3.0]))) == [2, 1]
