"""The paired t interval against scipy's, the degenerate cases, and the verdict it leads to."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from gammaopt import UsageError
from gammaopt.tuning import Confirmation, holm, paired_t


@pytest.mark.parametrize("n", [2, 3, 12, 50])
@pytest.mark.parametrize("shift", [-0.05, 0.0, 0.002, 0.3])
def test_interval_and_p_value_are_scipys_paired_t_test(n: int, shift: float) -> None:
    draw = np.random.default_rng(n)
    baseline = draw.uniform(0.3, 0.9, n)
    tuned = baseline + shift + 0.02 * draw.standard_normal(n)
    mine = paired_t("accuracy", range(n), tuned.tolist(), baseline.tolist())
    theirs = stats.ttest_rel(tuned, baseline)
    interval = theirs.confidence_interval(0.95)
    assert mine.mean_difference == pytest.approx(float((tuned - baseline).mean()), rel=1e-12)
    assert mine.p_value == pytest.approx(float(theirs.pvalue), rel=1e-9)
    assert mine.ci95 == pytest.approx((float(interval.low), float(interval.high)), rel=1e-9)
    assert mine.differences == tuple((tuned - baseline).tolist())
    assert mine.seeds == tuple(range(n))
    assert mine.metric == "accuracy"


def test_equal_differences_give_a_point_interval_and_no_division_by_zero() -> None:
    result = paired_t("accuracy", [1, 2, 3], [0.75, 0.5, 1.0], [0.5, 0.25, 0.75])
    assert (result.mean_difference, result.ci95, result.p_value) == (0.25, (0.25, 0.25), 0.0)
    assert result.verdict == "confirmed"


def test_equal_arms_are_not_confirmed_and_have_p_one() -> None:
    result = paired_t("accuracy", [1, 2], [0.5, 0.25], [0.5, 0.25])
    assert (result.mean_difference, result.ci95, result.p_value) == (0.0, (0.0, 0.0), 1.0)
    assert result.verdict == "not confirmed"


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.001, 0.02), "confirmed"),
        ((0.0, 0.02), "not confirmed"),
        ((-0.01, 0.02), "not confirmed"),
        ((-0.02, 0.0), "not confirmed"),
        ((-0.02, -0.001), "worse"),
    ],
)
def test_the_verdict_asks_for_the_whole_interval_on_one_side(interval: tuple[float, float], verdict: str) -> None:
    assert Confirmation("accuracy", (1, 2), 0.0, interval, 0.5, (0.0, 0.0), 0.5, 0.5).verdict == verdict


@pytest.mark.parametrize("n", [2, 5, 12])
def test_the_other_p_values_are_scipys_and_the_exact_permutation_of_signs(n: int) -> None:
    draw = np.random.default_rng(n)
    differences = 0.4 + draw.standard_normal(n)
    result = paired_t("accuracy", range(n), differences.tolist(), [0.0] * n)
    assert result.wilcoxon_p == pytest.approx(float(stats.wilcoxon(differences).pvalue))
    signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    means = np.abs((signs * differences).mean(1))
    assert result.permutation_p == pytest.approx((means >= abs(differences.mean()) - 1e-12).mean())


def test_seeds_without_a_difference_count_for_no_sign() -> None:
    result = paired_t("accuracy", range(5), [0.5, 0.6, 0.6, 0.6, 0.6], [0.5] * 5)
    assert (result.wilcoxon_p, result.permutation_p) == (0.125, 0.125)  # 2 of 2^4 signs
    assert paired_t("accuracy", range(3), [0.5] * 3, [0.5] * 3).permutation_p == 1.0
    assert paired_t("accuracy", range(2), [0.5, 0.6], [0.5] * 2).permutation_p == 1.0


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # Holm 1979, by hand: 4, 3, 2, 1 times, never falling
        ([0.5, 0.6], [1.0, 1.0]),
    ],
)
def test_holm_counts_the_smallest_p_most_often_and_never_reorders(p_values: list[float], adjusted: list[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_holm_refuses_what_is_no_probability(p: float) -> None:
    with pytest.raises(UsageError, match=f"p={p} is no probability"):
        holm([0.5, p])


def test_swapping_the_arms_mirrors_the_result() -> None:
    a, b = [0.8, 0.9, 0.85, 0.7], [0.7, 0.85, 0.8, 0.72]
    one, other = paired_t("m", range(4), a, b), paired_t("m", range(4), b, a)
    assert one.mean_difference == pytest.approx(-other.mean_difference)
    assert one.ci95 == pytest.approx((-other.ci95[1], -other.ci95[0]))
    assert one.p_value == pytest.approx(other.p_value)
    assert math.isfinite(one.p_value)


def test_one_seed_gives_no_interval() -> None:
    with pytest.raises(UsageError, match="1 seed can't give an interval; give at least 2"):
        paired_t("m", [1], [0.5], [0.4])


@pytest.mark.parametrize(("tuned", "baseline"), [([0.5], [0.4, 0.3]), ([0.5, 0.1], [0.4])])
def test_scores_that_cannot_be_paired_are_refused(tuned: list[float], baseline: list[float]) -> None:
    with pytest.raises(UsageError, match=rf"2 seeds, {len(tuned)} and {len(baseline)} scores; give one of each"):
        paired_t("m", [1, 2], tuned, baseline)
