from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from interv.plan.statistics import fewest_for_interval, smallest_p, unreachable
from interv.report.statistics import (
    correlation,
    holm,
    rank_correlation,
    sem,
    sign_flip_test,
    sign_flip_tests,
    uncertainty,
)
from tests.coverage import coverage


def by_hand(values: np.ndarray, seed: int, level: float, resamples: int) -> tuple[float, float]:
    """The bootstrap-t as textbooks have it, one resample at a time, and Student's t."""
    n, mean = len(values), float(np.mean(values))
    error = float(np.std(values, ddof=1)) / n**0.5
    counts = np.random.default_rng([seed, n]).multinomial(n, [1 / n] * n, size=resamples)
    ts = []
    for times in counts:
        drawn = np.repeat(values, times)
        off, spread = float(np.mean(drawn)) - mean, float(np.std(drawn, ddof=1)) / n**0.5
        ts.append(off / spread if spread > 1e-9 else float(np.sign(round(off, 9))) * float("inf"))
    ts.sort()
    tail = int((1 - level) / 2 * (resamples + 1))
    student = float(stats.t.ppf((1 + level) / 2, n - 1))
    return (
        mean - max(ts[-tail], student) * error,
        mean - min(ts[tail - 1], -student) * error,
    )


@pytest.mark.parametrize("level", [0.95, 0.5])
@pytest.mark.parametrize(
    "values", [[1.0, 5.0, 2.0, 9.0, 4.0], [0.1, 0.2, 0.2, 0.4, 0.1, 7.0, 0.3, 0.2]], ids=len
)
def test_an_interval_is_studentised_and_no_narrower_than_t(
    values: list[float], level: float
) -> None:
    row = uncertainty([np.array(values)], 3, level, resamples=400).iloc[0]
    assert row["no_interval"] == ""
    assert (row["n"], row["sem"]) == (len(values), pytest.approx(stats.sem(values)))
    wanted = by_hand(np.array(values), 3, level, 400)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(wanted)


# What `python -m tests.coverage` prints: the share of samples that have an interval, the share of
# those intervals that hold the mean, and what a percentile bootstrap of all samples would.
COVERAGE = {
    ("normal", 5): (1.000, 0.970, 0.842),
    ("normal", 10): (1.000, 0.965, 0.904),
    ("normal", 30): (1.000, 0.956, 0.935),
    ("log-normal", 5): (1.000, 0.901, 0.722),
    ("log-normal", 10): (1.000, 0.915, 0.805),
    ("log-normal", 30): (1.000, 0.936, 0.874),
    ("sparse", 5): (0.008, 0.994, 0.395),
    ("sparse", 10): (0.024, 0.973, 0.642),
    ("sparse", 30): (0.350, 0.992, 0.874),
    # No sample of 5 or 10 in which the effect does not show can tell of it: 0.9^5 = 0.59 and
    # 0.9^10 = 0.35 of them.
    ("sparse, noisy", 5): (1.000, 0.429, 0.395),
    ("sparse, noisy", 10): (1.000, 0.654, 0.643),
    ("sparse, noisy", 30): (1.000, 0.950, 0.879),
}


@pytest.mark.parametrize(("kind", "n"), list(COVERAGE), ids=lambda v: str(v))
def test_how_often_an_interval_holds_the_mean(kind: str, n: int) -> None:
    given, covers, percentile = COVERAGE[kind, n]
    replicates = 2000
    found = coverage(kind, n, replicates)

    def spread(share: float, of: float) -> float:
        return float(4 * np.sqrt(max(share * (1 - share), 1 / of) / of))

    assert found["given"] == pytest.approx(given, abs=spread(given, replicates))
    of_given = max(1.0, given * replicates)
    assert found["covers"] == pytest.approx(covers, abs=spread(covers, of_given))
    assert found["percentile"] == pytest.approx(percentile, abs=spread(percentile, replicates))


def test_an_interval_needs_as_many_values_as_its_tails() -> None:
    assert [fewest_for_interval(level) for level in (0.5, 0.95, 0.99, 0.999)] == [5, 5, 5, 6]
    table = uncertainty([np.arange(float(n)) for n in (5, 4, 2, 1, 0)], seed=0)
    assert list(table["n"]) == [5, 4, 2, 1, 0]
    assert list(table["no_interval"]) == [
        "", *(f"{n} values, 95 % needs 5" for n in (4, 2, 1, 0))
    ]  # fmt: skip
    assert list(table["ci_low"].isna()) == [False, True, True, True, True]
    assert list(table["sem"].isna()) == [False, False, False, True, True]
    [row] = uncertainty([np.arange(5.0)], 0, 0.999, resamples=20_000).to_dict("records")
    assert row["no_interval"] == "5 values, 99.9 % needs 6"


def test_values_that_do_not_vary_have_no_interval_of_width_zero() -> None:
    sparse = np.array([0.0] * 11 + [1.0])
    table = uncertainty([np.full(12, 0.3), np.zeros(40), sparse], seed=0)
    assert table[["ci_low", "ci_high"]].isna().all(axis=None)
    assert list(table["no_interval"]) == [
        "all values are equal",
        "all values are equal",
        "too few of the values carry the effect",
    ]


def test_the_smallest_p_is_what_the_test_gives() -> None:
    for n, permutations in ((3, 1000), (6, 1000), (12, 1000), (30, 5000)):
        found = sign_flip_test(np.linspace(1, 2, n), seed=0, permutations=permutations)
        assert smallest_p(n, permutations) == pytest.approx(found)


def test_a_test_that_cannot_be_significant_is_said_to_be() -> None:
    # 2 x 2^-8 x 270 > 1; 2 x 2^-14 x 270 = 0.033.
    told = unreachable(8, 270, 100_000, 0.95)
    assert "over 8 prompts and 270 places p_holm is at least 1" in told
    assert "it takes 14 prompts, or fewer places" in told
    assert unreachable(14, 270, 100_000, 0.95) == ""
    assert unreachable(6, 1, 10_000, 0.95) == ""
    assert unreachable(5, 1, 10_000, 0.95) != ""
    # As many drawn patterns as there are places show nothing, whatever n is.
    told = unreachable(64, 900, 10_000, 0.95)
    assert "it takes permutations of at least 18,000, or fewer places" in told
    assert unreachable(64, 900, 18_000, 0.95) == ""


def test_a_group_has_the_same_interval_in_any_company() -> None:
    random = np.random.default_rng(0)
    one, other, longer = random.normal(size=8), random.normal(size=8), random.normal(size=9)
    alone = uncertainty([one], seed=1).iloc[0]
    among = uncertainty([longer, other, one], seed=1).iloc[2]
    columns = ["n", "sem", "ci_low", "ci_high"]
    np.testing.assert_allclose(
        alone[columns].astype(float), among[columns].astype(float), rtol=1e-12
    )


def test_standard_error() -> None:
    assert sem(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 / np.sqrt(3))
    assert np.isnan(sem(np.array([1.0])))


def test_few_signs_are_all_tried() -> None:
    values = np.array([0.3, 1.2, -0.4, 2.0, 0.9, 0.1])
    means = [abs(np.dot(signs, values)) for signs in product((1, -1), repeat=6)]
    wanted = np.mean([m >= abs(values.sum()) - 1e-9 for m in means])
    assert sign_flip_test(values, seed=0) == pytest.approx(wanted)
    assert sign_flip_test(values, seed=0) == sign_flip_test(-values, seed=9)


def test_by_hand() -> None:
    # Of 8 patterns of three equal values, +++ and --- are as far from zero.
    assert sign_flip_test(np.ones(3), seed=0) == 0.25
    assert sign_flip_test(np.array([1.0, -1.0]), seed=0) == 1.0
    assert sign_flip_test(np.zeros(4), seed=0) == 1.0
    assert sign_flip_test(np.zeros(40), seed=0) == 1.0
    assert np.isnan(sign_flip_test(np.array([2.0]), seed=0))
    assert np.isnan(sign_flip_test(np.array([]), seed=0))


def test_sums_that_tie_count_however_they_are_rounded() -> None:
    # Only ++++ and ---- reach 0.9; the order of the sum decides its last bit.
    assert sign_flip_test(np.array([0.1, 0.1, 0.1, 0.6]), seed=0) == 2 / 16
    # With +0.7, five of the eight patterns of the others (sums 0.6, 0.4, 0.2, 0 and 0) do not
    # fall below 0.7; with -0.7 the same.
    assert sign_flip_test(np.array([0.1, 0.2, -0.3, 0.7]), seed=0) == 10 / 16


def test_many_signs_are_drawn_and_the_one_found_is_counted() -> None:
    strong = np.linspace(1, 2, 30)
    assert sign_flip_test(strong, seed=0, permutations=999) == 1 / 1000
    drawn = sign_flip_test(np.linspace(-0.8, 1.2, 13), seed=0, permutations=8000)
    exact = sign_flip_test(np.linspace(-0.8, 1.2, 13), seed=0, permutations=8192)
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=0.02)


def test_a_group_has_the_same_p_in_any_company() -> None:
    groups = np.random.default_rng(2).normal(0.3, size=(5, 20))
    alone = [sign_flip_test(group, 4, 2000) for group in groups]
    assert list(sign_flip_tests(groups, 4, 2000)) == alone
    mixed = sign_flip_tests([groups[0], groups[1][:6], np.ones(1), groups[2]], 4, 2000)
    assert list(mixed[[0, 1, 3]]) == [alone[0], sign_flip_test(groups[1][:6], 4, 2000), alone[2]]
    assert np.isnan(mixed[2])


def test_under_the_null_p_is_uniform_enough() -> None:
    groups = np.random.default_rng(5).normal(size=(800, 12))
    p = sign_flip_tests(groups, seed=0)
    for level in (0.05, 0.2, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=3 * np.sqrt(level / 800))


def test_what_is_not_a_number_has_no_p() -> None:
    p = sign_flip_tests([np.array([1.0, np.nan, 2.0]), np.array([np.inf, 1.0]), np.ones(3)], 0)
    assert list(np.isnan(p)) == [True, True, False]
    assert len(sign_flip_tests([], 0)) == 0


def test_holm_by_hand() -> None:
    # 0.01 x 4, 0.02 x 3, 0.03 x 2 and at least the one before, 0.04 x 1 likewise.
    adjusted = holm(np.array([0.04, 0.01, 0.03, 0.02]))
    assert list(adjusted) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert list(holm(np.array([0.9, 0.6]))) == [1.0, 1.0]


def test_holm_leaves_out_what_is_no_test() -> None:
    adjusted = holm(np.array([np.nan, 0.01, np.nan, 0.5]))
    assert list(np.isnan(adjusted)) == [True, False, True, False]
    assert list(adjusted[[1, 3]]) == pytest.approx([0.02, 0.5])
    assert len(holm(np.array([]))) == 0


def test_rank_correlation_by_hand() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    # 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    assert rank_correlation(a, np.array([10.0, 30.0, 20.0, 40.0])) == pytest.approx(0.8)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    tied = np.array([1.0, 2.0, 2.0, 3.0])
    assert rank_correlation(tied, a) == pytest.approx(4.5 / np.sqrt(22.5))


def test_rank_correlation_of_pairs_that_are_there() -> None:
    a = np.array([1.0, np.nan, 2.0, 3.0, 9.0])
    b = np.array([5.0, 1.0, 6.0, 7.0, np.nan])
    assert rank_correlation(a, b) == pytest.approx(1)
    assert np.isnan(rank_correlation(a[:1], b[:1]))
    assert np.isnan(rank_correlation(np.ones(3), np.arange(3.0)))


def test_what_does_not_vary_has_no_correlation() -> None:
    a = np.array([1.0, 2.0, 4.0])
    assert correlation(a, 2 * a + 1) == pytest.approx(1)
    assert correlation(a, np.array([1.0, 0.0, 5.0])) == pytest.approx(
        stats.pearsonr(a, [1.0, 0.0, 5.0]).statistic
    )
    assert np.isnan(correlation(a, np.full(3, 0.1)))
    assert np.isnan(correlation(a[:1], a[:1]))
