"""Intervals, tests and correlations of effects; everything random from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from interv.plan.statistics import fewest_for_interval

Values = np.ndarray
_BLOCK = 1024  # sign patterns held at once
_AT_ONCE = 4_000_000  # resampled means held at once
_ROUNDING = 1e-10  # a spread below this share of the largest value (or square) is rounding
INTERVAL = ["ci_low", "ci_high", "no_interval"]
"""Columns of an interval: its ends, or why there is none."""


def uncertainty(
    groups: Sequence[Values], seed: int, level: float = 0.95, resamples: int = 2000
) -> pd.DataFrame:
    """Return n, the standard error and an interval of each group's mean.

    The interval is the bootstrap-t (Efron and Tibshirani 1993, section 12.5): the quantiles of
    (resampled mean - mean) / (standard error of the resample), times the standard error. Where
    Student's t reaches farther, on either side, its end is taken: the bootstrap knows nothing of
    tails that a small sample does not show. `tests/coverage.py` measures how often the interval
    holds the mean. The resamples depend on the seed and n alone, so that groups are compared on
    the same ones.

    There is no interval, and `no_interval` says why, where the values are too few for the level
    (`fewest_for_interval`), where all are equal, or where so few carry the effect that a tail of
    the resamples has none of them: how large the effect is then depends on how frequent such
    values are, which this many cannot show.

    Args:
        groups: each `[value]`, of any length, without NaN.
        seed: of the resamples.
        level: that the interval is to cover, between 0 and 1.
        resamples: how many.

    Returns:
        A row for each group: `n`, `sem` (NaN where n < 2), `ci_low`, `ci_high`, `no_interval`
        (empty where there is one).
    """
    rows = [(len(v), sem(v), np.nan, np.nan, _why_none(v, level)) for v in groups]
    table = pd.DataFrame(rows, columns=["n", "sem", *INTERVAL])
    sound = table.index[table["no_interval"] == ""]
    for n in sorted(set(table.loc[sound, "n"])):
        weights = np.random.default_rng([seed, n]).multinomial(n, [1 / n] * n, resamples) / n
        where = [i for i in sound if len(groups[i]) == n]
        step = max(1, _AT_ONCE // resamples)
        for some in (where[i : i + step] for i in range(0, len(where), step)):
            values = np.stack([groups[i] for i in some], axis=1)
            table.loc[some, ["ci_low", "ci_high"]] = _studentised(values, weights, level).T
    bounded = np.isfinite(table.loc[sound, ["ci_low", "ci_high"]].to_numpy()).all(axis=1)
    few = sound[~bounded]
    table.loc[few, ["ci_low", "ci_high"]] = np.nan
    table.loc[few, "no_interval"] = "too few of the values carry the effect"
    return table


def _why_none(values: Values, level: float) -> str:
    """Why there can be no interval of these values; empty where there may be one."""
    n, fewest = len(values), fewest_for_interval(level)
    if n < fewest:
        return f"{n} values, {100 * level:g} % needs {fewest}"
    equal = np.ptp(values) <= _ROUNDING * np.abs(values).max()
    return "all values are equal" if equal else ""


def _studentised(values: Values, weights: Values, level: float) -> Values:
    """Return the ends `[2, group]` of the intervals of `values` `[n, group]`.

    Args:
        weights: `[resample, n]`, the share of each value in a resample.
    """
    n, mean = len(values), values.mean(axis=0)
    error = values.std(axis=0, ddof=1) / np.sqrt(n)
    centred = values - mean
    squares = centred**2
    shift = weights @ centred
    variance = weights @ squares - shift**2
    largest = squares.max(axis=0)
    variance[variance < _ROUNDING * largest] = 0.0
    shift[np.abs(shift) < _ROUNDING * np.sqrt(largest)] = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        # A resample of equal values is infinitely far off, unless it is the mean itself.
        t = shift / np.sqrt(variance / (n - 1))
    t[np.isnan(t)] = 0.0
    rank = int((1 - level) / 2 * (len(weights) + 1))
    t = np.partition(t, [rank - 1, len(weights) - rank], axis=0)
    student = stdtrit(n - 1, (1 + level) / 2)
    low = np.minimum(t[rank - 1], -student)
    high = np.maximum(t[len(weights) - rank], student)
    return np.stack([mean - high * error, mean - low * error])


def sem(values: Values) -> float:
    """Standard error of the mean of `values` `[n]`; NaN where n < 2."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def sign_flip_test(values: Values, seed: int, permutations: int = 10_000) -> float:
    """Two-sided paired permutation test that the mean of `values` `[n]` is zero.

    See `sign_flip_tests`, which gives the same number for each of its groups.
    """
    return float(sign_flip_tests([values], seed, permutations)[0])


def sign_flip_tests(
    groups: Sequence[Values] | Values, seed: int, permutations: int = 10_000
) -> Values:
    """Two-sided paired permutation tests that each group's mean is zero, by flipping signs.

    The share of sign patterns whose mean is at least as far from zero as the one found. All
    patterns are tried where `2**n <= permutations`. Else that many are drawn, from the seed and
    n alone, and the pattern found is counted among them: `(count + 1) / (permutations + 1)`.

    Args:
        groups: each `[n]`, paired differences; those of one length are tested together.
        seed: of the patterns that are drawn.
        permutations: how many are drawn, or the most that are enumerated.

    Returns:
        p `[group]`; NaN where n < 2, or a value is not finite.
    """
    arrays = [np.asarray(group, dtype=float) for group in groups]
    p = np.full(len(arrays), np.nan)
    sound = [i for i, a in enumerate(arrays) if len(a) > 1 and np.isfinite(a).all()]
    for n in sorted({len(arrays[i]) for i in sound}):
        where = [i for i in sound if len(arrays[i]) == n]
        p[where] = _flipped(np.stack([arrays[i] for i in where], axis=1), seed, permutations)
    return p


def _flipped(values: Values, seed: int, permutations: int) -> Values:
    """p `[group]` of `values` `[n, group]`."""
    n = len(values)
    # Patterns that tie with the one found must count, however their sums are rounded.
    found = np.abs(values.sum(axis=0)) - 1e-12 * np.abs(values).sum(axis=0)
    exact = 2**n <= permutations
    counts = np.zeros(values.shape[1], dtype=int)
    for signs in _all_signs(n) if exact else _drawn_signs(n, seed, permutations):
        counts += (np.abs(signs @ values) >= found).sum(axis=0)
    p: Values = counts / 2**n if exact else (counts + 1) / (permutations + 1)
    return p


def _all_signs(n: int) -> Iterator[Values]:
    """Every pattern once, in blocks `[pattern, n]` of 1 and -1."""
    for start in range(0, 2**n, _BLOCK):
        patterns = np.arange(start, min(start + _BLOCK, 2**n))
        yield 1.0 - 2.0 * (patterns[:, None] >> np.arange(n) & 1)


def _drawn_signs(n: int, seed: int, permutations: int) -> Iterator[Values]:
    random = np.random.default_rng([seed, n])
    for start in range(0, permutations, _BLOCK):
        size = (min(_BLOCK, permutations - start), n)
        yield 1.0 - 2.0 * random.integers(0, 2, size=size, dtype=np.int8)


def holm(p: Values) -> Values:
    """p `[test]` adjusted for their number (Holm 1979); a NaN is no test, and stays NaN."""
    p = np.asarray(p, dtype=float)
    adjusted = np.full(p.shape, np.nan)
    tests = np.flatnonzero(~np.isnan(p))
    order = tests[np.argsort(p[tests], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order]))
    return adjusted


def rank_correlation(a: Values, b: Values) -> float:
    """Spearman's correlation of `a` and `b` `[n]`; ties share the mean of their ranks.

    Pairs with a NaN are left out. NaN where fewer than two pairs are left, or one side is constant.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    both = ~(np.isnan(a) | np.isnan(b))
    x, y = _centred_ranks(a[both]), _centred_ranks(b[both])
    scale = np.sqrt((x @ x) * (y @ y))
    return float((x @ y) / scale) if scale > 0 else float("nan")


def correlation(a: Values, b: Values) -> float:
    """Pearson's correlation of `a` and `b` `[n]`; NaN where one side does not vary."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _centred_ranks(values: Values) -> Values:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    centred: Values = ranks[which] - (len(values) + 1) / 2
    return centred
