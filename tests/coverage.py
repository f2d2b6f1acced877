"""How often the intervals of `interv.report.statistics` hold the mean: `python -m tests.coverage`.

Samples of known mean are drawn, and the share of them whose interval holds it is counted. An
interval that is not given (`no_interval`) holds nothing, and is counted by itself: of those that
are given, the share that hold the mean is what the level says, or is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pandas as pd

from interv.report.statistics import uncertainty

Draw = Callable[[np.random.Generator, int, int], np.ndarray]
SIZES = (5, 10, 30)
SEED = 0
REPLICATES = 20_000


def _sparse(random: np.random.Generator, replicates: int, n: int) -> np.ndarray:
    hit = random.random((replicates, n)) < 0.1
    return hit * random.normal(1, 0.3, (replicates, n))


KINDS: dict[str, tuple[float, Draw]] = {
    "normal": (1.0, lambda random, r, n: random.normal(1, 1, (r, n))),
    "uniform": (0.5, lambda random, r, n: random.random((r, n))),
    "log-normal": (float(np.exp(0.5)), lambda random, r, n: random.lognormal(0, 1, (r, n))),
    # A tenth of the prompts have an effect; the others have none, or next to none.
    "sparse": (0.1, _sparse),
    "sparse, noisy": (
        0.1,
        lambda random, r, n: _sparse(random, r, n) + random.normal(0, 0.02, (r, n)),
    ),
}


def coverage(kind: str, n: int, replicates: int, level: float = 0.95) -> dict[str, float]:
    """Measure the interval of samples of `n` values.

    Returns:
        `given`, the share of samples that have an interval; `covers`, the share of those that
        hold the mean; `percentile`, the share that a percentile bootstrap of all samples would.
    """
    mean, draw = KINDS[kind]
    samples = draw(np.random.default_rng([SEED, n]), replicates, n)
    found = uncertainty(list(samples), SEED, level)
    given = found["no_interval"] == ""
    holds = (found["ci_low"] <= mean) & (mean <= found["ci_high"])
    return {
        "given": float(given.mean()),
        "covers": float(holds[given].mean()),
        "percentile": _percentile(samples, mean, level),
    }


def _percentile(samples: np.ndarray, mean: float, level: float) -> float:
    """Coverage of the percentile bootstrap, with 2,000 resamples."""
    n = samples.shape[1]
    weights = np.random.default_rng([SEED, n]).multinomial(n, [1 / n] * n, 2000) / n
    tails = [50 - 50 * level, 50 + 50 * level]
    held = 0
    for some in np.array_split(samples, max(1, len(samples) // 2000)):
        low, high = np.percentile(weights @ some.T, tails, axis=0)
        held += int(((low <= mean) & (mean <= high)).sum())
    return held / len(samples)


def table(replicates: int, level: float) -> pd.DataFrame:
    """A row for each kind of effect and each n."""
    rows = [
        {"effects": kind, "n": n, **coverage(kind, n, replicates, level)}
        for kind in KINDS
        for n in SIZES
    ]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=REPLICATES)
    parser.add_argument("--level", type=float, default=0.95)
    asked = parser.parse_args()
    print((table(asked.replicates, asked.level)).round(3).to_string(index=False))
