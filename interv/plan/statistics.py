"""What so many prompts can show, known before anything runs."""

from __future__ import annotations

from math import inf

_FEWEST = 5  # below, no interval of a mean covers what it says unless the values are normal


def fewest_for_interval(level: float) -> int:
    """Return how many values an interval of this level needs.

    A resample of n values draws one of them n times with probability n^(1-n), and then has no
    spread: such resamples must be rarer than a tail, (1 - level) / 2.
    """
    n = _FEWEST
    while n ** (1 - n) >= (1 - level) / 2:
        n += 1
    return n


def smallest_p(n: int, permutations: int) -> float:
    """Return the smallest p that a two-sided sign-flip test over n values can give.

    Of 2^n sign patterns the one found and its opposite are as far from zero; where that many
    are not tried, the one found counts among those drawn.
    """
    if n < 2:
        return inf
    return 2.0 ** (1 - n) if 2**n <= permutations else 1 / (permutations + 1)


def unreachable(n: int, places: int, permutations: int, level: float) -> str:
    """Say why no place can be significant at 1 - level after Holm's correction; else empty."""
    alpha = 1 - level
    smallest = smallest_p(n, permutations) * places
    if smallest <= alpha:
        return ""
    need = 2
    while 2.0 ** (1 - need) * places > alpha:
        need += 1
    wanted = [f"{need} prompts"] if need > n else []
    drawn = int(places / alpha) + 1
    if 2 ** max(n, need) > permutations and drawn > permutations:
        wanted.append(f"permutations of at least {drawn:,}")
    told = min(1.0, smallest)
    return (
        f"statistics.test: over {n} prompts and {places:,} places p_holm is at least {told:.2g}, "
        f"so that no effect can be significant at {alpha:.2g}; it takes "
        f"{' and '.join(wanted)}, or fewer places"
    )
