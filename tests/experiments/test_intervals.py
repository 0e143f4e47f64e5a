"""Intervals of exponents: scipy's regression beside them, and how often they hold the truth with few points."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from _experiment import t_interval
from _intervals import jackknife_half, pairs_interval, seeds_slope, slope_interval
from _sweep import local_slopes, neighbour_slopes
from scipy.stats import linregress
from scipy.stats import t as student


def test_the_interval_of_a_slope_is_that_of_scipys_regression() -> None:
    x, y = [0.0, 1.0, 2.0, 3.5], [0.1, 0.9, 2.3, 3.1]
    fit = linregress(x, y)
    found, interval = slope_interval(x, y)
    half = student.ppf(0.975, 2) * fit.stderr
    assert found == pytest.approx(fit.slope, abs=1e-12)
    assert interval == pytest.approx((fit.slope - half, fit.slope + half), abs=1e-12)
    assert slope_interval(x[:2], y[:2])[0] == pytest.approx(0.8)
    assert slope_interval(x[:2], y[:2])[1] is None


@pytest.mark.parametrize("points", [3, 5])
def test_an_interval_of_few_points_holds_the_truth_19_times_in_20(points: int) -> None:
    random, x = np.random.default_rng(0), list(range(points))
    drawn = [slope_interval(x, list(2.0 * np.array(x) + random.normal(size=points)))[1] for _ in range(2000)]
    held = np.mean([low <= 2.0 <= high for low, high in (one for one in drawn if one)])
    assert held == pytest.approx(0.95, abs=0.015)


def test_seeds_count_and_not_their_points() -> None:
    """A level and a slope of each seed's own: many points of a seed tell that seed's slope, not the mean one."""
    random, x = np.random.default_rng(0), np.linspace(0, 3, 20)

    def interval() -> tuple[float, float]:
        made = seeds_slope([(list(x), list(random.normal(1.0, 0.2) * x)) for _ in range(3)])[1]
        assert made is not None
        return made

    held = np.mean([low <= 1.0 <= high for low, high in (interval() for _ in range(1000))])
    assert held == pytest.approx(0.95, abs=0.02)


def test_one_seed_has_the_interval_of_its_line() -> None:
    line = [0.0, 1.0, 2.0], [0.0, 1.1, 1.9]
    assert seeds_slope([line]) == slope_interval(*line)


@pytest.mark.parametrize("seeds", [1, 3])
def test_points_on_a_grid_are_known_no_closer_than_its_step(seeds: int) -> None:
    x, truth = np.arange(5.0), 0.503
    rounded = list(np.round(truth * x, 1))  # 0.0, 0.5, 1.0, 1.5, 2.0: no scatter
    assert slope_interval(list(x), rounded)[1] == pytest.approx((0.5, 0.5))
    _, interval = seeds_slope([(list(x), rounded)] * seeds, reach=0.05)
    assert interval == pytest.approx((0.5 - 0.05 * 6 / 10, 0.5 + 0.05 * 6 / 10))
    assert interval is not None
    assert interval[0] < truth < interval[1]


def test_a_line_without_two_x_has_no_slope_and_does_not_count() -> None:
    line, point = ([0.0, 1.0, 2.0], [0.0, 1.1, 1.9]), ([1.0, 1.0], [3.0, 4.0])
    assert seeds_slope([line, point], 0.1) == seeds_slope([line], 0.1)
    for lines in ([], [point]):
        found, interval = seeds_slope(lines, 0.1)
        assert math.isnan(found)
        assert interval is None


def test_the_interval_of_a_mean_is_students() -> None:
    values = [0.1, 0.4, 0.2, 0.9, 0.3]
    half = 2.7764 * np.std(values, ddof=1) / 5**0.5  # t of four degrees of freedom
    assert t_interval(values) == pytest.approx((0.38 - half, 0.38 + half), abs=1e-4)
    assert t_interval([0.1]) is None


def test_the_jackknife_of_a_mean_is_students_interval_of_it() -> None:
    values = np.array([0.1, 0.4, 0.2, 0.9, 0.3])
    without = [float(np.delete(values, i).mean()) for i in range(5)]
    assert jackknife_half(without) == pytest.approx(2.7764 * values.std(ddof=1) / 5**0.5, rel=1e-4)


def test_pairs_of_seeds_are_no_independent_values() -> None:
    """Each pair has what both of its seeds bring and some of its own; the mean of all pairs is known as seeds are."""
    random, seeds = np.random.default_rng(0), 4
    pairs = list(itertools.combinations(range(seeds), 2))

    def held() -> bool:
        of = random.normal(size=seeds)
        made = pairs_interval([of[a] + of[b] + 0.3 * random.normal() for a, b in pairs], seeds)
        assert made is not None
        return bool(made[0] <= 0.0 <= made[1])

    assert np.mean([held() for _ in range(1500)]) == pytest.approx(0.955, abs=0.02)
    assert pairs_interval([0.5], 2) is None


def test_local_slopes_are_those_of_the_means() -> None:
    told = local_slopes([1, 1, 10, 10, 1000], [0.0, 0.2, 0.6, 0.8, 0.7])
    assert told == "no single power: local slopes 0.60, 0.00, from 0.00 to 0.60, steepest between γ = 1 and 10"
    assert neighbour_slopes([1.0, 10.0, 1000.0], [0.1, 0.7, 0.7]) == pytest.approx([0.6, 0.0])


def test_local_slopes_say_where_they_are_one_and_where_there_are_too_few() -> None:
    assert local_slopes([64, 128, 256], [0.0, -0.301, -0.602], "N") == (
        "one power from N = 64 to 256: local slopes -1.00, -1.00"
    )
    assert "steepest between N = 10 and 100" in local_slopes([1, 10, 100], [0.0, 0.5, -0.5], "N")
    assert local_slopes([1, 10, 100], [0.0, 0.5, math.nan]) == "local slopes 0.50, between γ = 1 and 10 alone"
    for at, logs in (([], []), ([1.0], [0.0]), ([1.0, 10.0], [0.0, math.nan])):
        assert local_slopes(at, logs) == "no two neighbours were measured"
