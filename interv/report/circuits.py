"""How good a circuit is: faithfulness and its areas (MIB), completeness, minimality (IOI).

MIB: Mueller et al. 2025, arXiv 2504.13151. IOI: Wang et al. 2022, arXiv 2211.00593, section 4.
Here m and F are a metric's mean over the prompts, on a model in which all that is not in the
circuit is ablated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar, overload

import numpy as np

from interv.errors import IntervError

Number = TypeVar("Number", float, np.ndarray)


class Areas(NamedTuple):
    """The area under a curve of faithfulness, and that between it and 1."""

    cpr: float
    cmd: float


@overload
def faithfulness(m_circuit: float, m_empty: float, m_full: float) -> float: ...
@overload
def faithfulness(
    m_circuit: np.ndarray, m_empty: float | np.ndarray, m_full: float | np.ndarray
) -> np.ndarray: ...
def faithfulness(
    m_circuit: float | np.ndarray, m_empty: float | np.ndarray, m_full: float | np.ndarray
) -> float | np.ndarray:
    """`(m(C) - m(empty)) / (m(M) - m(empty))`: 0 for the empty circuit, 1 for the whole model.

    Args:
        m_circuit: the metric of the circuit; arrays of any shapes that broadcast will do.
        m_empty: of the empty circuit, where everything is ablated.
        m_full: of the whole model.

    Raises:
        IntervError: the whole model and the empty circuit do not differ, to rounding.
    """
    gap = np.asarray(m_full) - np.asarray(m_empty)
    scale = np.maximum(np.abs(m_full), np.abs(m_empty))
    # Written so that NaN is an error too.
    if not np.all(np.abs(gap) > 1e-12 * scale):
        raise IntervError(
            "faithfulness is undefined: the metric is the same on the whole model and on the "
            f"empty circuit (m_full {m_full}, m_empty {m_empty})"
        )
    ratio = (m_circuit - np.asarray(m_empty)) / gap
    return ratio if isinstance(ratio, np.ndarray) else float(ratio)


def areas(fractions: Sequence[float], f: Sequence[float] | np.ndarray) -> Areas:
    """CPR and CMD of a curve of faithfulness, by the trapezoid rule.

    Over a linear axis from the first fraction to the last, and not divided by its length, as in
    MIB's code: a perfect circuit has CPR 0.999 and CMD 0 on its fractions. `|1 - f|` is taken at
    the points, so that a curve that crosses 1 between two of them has less CMD than this says.

    Args:
        fractions: shares of edges, rising, two or more.
        f: faithfulness at each.
    """
    x, y = _rising(fractions, f)
    return Areas(float(np.trapezoid(y, x)), float(np.trapezoid(np.abs(1 - y), x)))


def log_weighted(fractions: Sequence[float], accuracy: Sequence[float] | np.ndarray) -> float:
    """The mean of an accuracy over the logarithm of the size: acc-AUC.

    By the trapezoid rule over log k, divided by the range of log k, as `acc_auc` in Arora's fork
    of MIB's code (github.com/aryamanarora/MIB-circuit-track): small circuits count as much as
    large ones. A size of 0, which has no logarithm, is left out.

    Args:
        fractions: shares of edges, rising, two or more of them above 0.
        accuracy: at each: the share of prompts whose answer is above the wrong ones.
    """
    x, y = _rising(fractions, accuracy)
    x, y = np.log(x[x > 0]), y[x > 0]
    if len(x) < 2:
        raise IntervError(f"a weighted accuracy needs two sizes above 0, not {list(fractions)}")
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def _rising(
    fractions: Sequence[float], values: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(fractions, dtype=float), np.asarray(values, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2 or not (np.diff(x) > 0).all():
        raise IntervError(
            f"an area needs two or more rising fractions and a value for each, not {x} and {y}"
        )
    return x, y


def incompleteness(circuit_without: Number, model_without: Number) -> Number:
    """`|F(C \\ K) - F(M \\ K)|`: a complete circuit loses by K what the model loses by it.

    Args:
        circuit_without: F of the circuit without the nodes K; a float, or `[K]`.
        model_without: F of the whole model without them.
    """
    return abs(circuit_without - model_without)


def minimality(without_both: Number, without_set: Number) -> Number:
    """`|F(C \\ (K + v)) - F(C \\ K)|`: what a node v adds to the circuit where K is gone.

    A node belongs to the circuit where some K without it makes this large: the largest over the
    sets that were tried is the node's minimality score.

    Args:
        without_both: F of the circuit without K and v; a float, or `[K]`.
        without_set: F of the circuit without K.
    """
    return abs(without_both - without_set)
