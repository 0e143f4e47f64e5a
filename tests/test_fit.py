"""The law fitted to records whose law is known."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from gammaopt import EtaLaw
from gammaopt._errors import UsageError
from gammaopt._fit import critical_rates
from gammaopt.online import Curve, RunRecord

GAMMAS = [10.0 ** (i / 2) for i in range(-6, 7)]


def record(gamma: float, lr: float, seed: int, final_loss: float | None) -> RunRecord:
    curve = Curve((1,), (1.0,), (0.0,))
    return RunRecord(gamma, lr, seed, 10, lr, 0.5, 0.5, 0.5, final_loss, None if final_loss else 3, curve)


def made(law: EtaLaw, base_lr: float, *, noise: float = 0.0, seeds: int = 2, gammas: list[float] = GAMMAS) -> Any:
    """Runs whose log loss is a parabola around the law's rate, and which diverge a factor 8 above it."""
    draw = random.Random(1)
    for gamma in gammas:
        for seed in range(seeds):
            best = math.log(law.lr(base_lr, gamma)) + noise * draw.gauss(0, 1)
            for decade in range(-10, 11):
                lr = math.exp(0.5 * decade) * law.lr(base_lr, gamma)
                distance = math.log(lr) - best
                final = None if distance > math.log(8) else 0.01 * math.exp(0.2 * distance**2)
                yield record(gamma, lr, seed, min(final, 0.99) if final else None)


def test_exact_runs_give_the_law_back() -> None:
    law = EtaLaw(3.0, knee=1.0)
    fit = EtaLaw.fit(made(law, 0.7))
    assert fit.law.depth == pytest.approx(3.0, rel=0.02)
    assert fit.law.lazy == pytest.approx(2.0, rel=0.02)
    assert fit.law.knee == pytest.approx(1.0, rel=0.1)
    assert fit.base_lr == pytest.approx(0.7, rel=0.05)
    for gamma in GAMMAS:
        assert fit.law.lr(fit.base_lr, gamma) == pytest.approx(law.lr(0.7, gamma), rel=0.1)


def test_noisy_runs_have_intervals_that_hold_the_truth() -> None:
    fit = EtaLaw.fit(made(EtaLaw(4.0, knee=3.0), 0.1, noise=0.3, seeds=5))
    slopes = fit.slopes
    assert slopes.rich_interval is not None
    assert slopes.lazy_interval is not None
    assert slopes.rich_interval[0] < 0.5 < slopes.rich_interval[1]
    assert slopes.lazy_interval[0] < 2.0 < slopes.lazy_interval[1]
    assert 0.02 < slopes.rich_interval[1] - slopes.rich_interval[0] < 0.3
    assert slopes.bend_interval is not None
    assert slopes.bend_interval[0] < 3.0 < slopes.bend_interval[1]


def test_the_edge_lies_between_the_last_stable_rate_and_the_next() -> None:
    law = EtaLaw(2.0, "adam")
    points = critical_rates(made(law, 0.1), "edge")
    assert len(points) == 2 * len(GAMMAS)
    for point in points:  # stable up to 8 × the law, rates 0.5 apart in log: between e^2 and e^2.5
        assert point.lr == pytest.approx(math.exp(2.25) * law.lr(0.1, point.gamma))
    fit = EtaLaw.fit(made(law, 0.1), optimizer="adam", of="edge")
    assert fit.law.rich == pytest.approx(0.5, rel=0.02)
    assert fit.law.lazy == pytest.approx(1.0, rel=0.02)


def test_a_rate_that_never_learns_below_f_0_is_unstable() -> None:
    runs = [record(1.0, lr, 0, loss) for lr, loss in [(0.1, 0.5), (0.2, 0.4), (0.4, 1.2), (0.8, 0.9), (1.6, 1.1)]]
    (point,) = critical_rates(runs, "edge")
    assert point.lr == pytest.approx((0.8 * 1.6) ** 0.5)


def test_an_optimum_at_the_end_of_the_rates_is_no_point() -> None:
    falling = [record(1.0, lr, 0, 1 / lr) for lr in (1.0, 2.0, 4.0)]
    rising = [record(1.0, lr, 0, lr / 10) for lr in (1.0, 2.0, 4.0)]
    assert critical_rates(falling, "best") == ()
    assert critical_rates(rising, "best") == ()
    assert critical_rates(rising, "edge") == ()


def test_uneven_rates_and_a_diverged_neighbour() -> None:
    logs = [-2.0, -0.4, 0.3]  # log loss (x + 0.1)²
    runs = [record(1.0, math.exp(x), 0, math.exp((x + 0.1) ** 2)) for x in logs]
    (point,) = critical_rates(runs, "best")
    assert math.log(point.lr) == pytest.approx(-0.1)
    (beside,) = critical_rates([*runs[:2], record(1.0, 9.0, 0, None)], "best")
    assert math.log(beside.lr) == pytest.approx(-0.4)


def test_a_diverged_rate_below_the_best_spoils_no_exponent() -> None:
    (point,) = critical_rates([record(1.0, lr, 0, loss) for lr, loss in [(1, None), (2, 0.1), (4, 0.4)]], "best")
    assert point.lr == pytest.approx(2.0)
    assert point.reach == pytest.approx(math.log(4) / 4)


@pytest.mark.parametrize("of", ["best", "edge"])
def test_records_of_two_budgets_are_refused(of: Any) -> None:
    """Each rate would stand twice in a cell, and the edge between the two, with certainty."""
    with pytest.raises(UsageError, match=r"γ=1, η=1, seed=0 twice; give those of one budget"):
        critical_rates([record(1.0, lr, 0, 0.1 * lr) for lr in (1.0, 2.0, 4.0) for _ in range(2)], of)


def test_only_large_gamma_leaves_the_lazy_exponent_as_predicted() -> None:
    fit = EtaLaw.fit(made(EtaLaw(3.0), 0.7, gammas=[1.0, 10.0, 100.0, 1000.0]))
    assert fit.slopes.lazy is None
    assert fit.slopes.bend is None
    assert fit.law.lazy == 2.0
    assert fit.law.rich == pytest.approx(2 / 3, rel=0.02)


def gridded(law: EtaLaw, offset: float, gammas: list[float], step: float, seeds: int = 1) -> Any:
    """Runs at rates of a grid in units of the law for L = 3, stable up to ``offset`` × ``law`` and no further."""
    for gamma in gammas:
        for seed in range(seeds):
            for i in range(-9, 10):
                lr = EtaLaw(3.0).lr(math.exp(i * step), gamma)
                stable = lr <= law.lr(offset, gamma)
                yield record(gamma, lr, seed, 0.1 if stable else None)


def test_edges_in_one_column_of_the_grid_are_no_certainty() -> None:
    """The prediction, which the rates are relative to, comes back exactly; it may be off by the cells' width."""
    step = 0.4 * math.log(10)
    for seeds in (1, 4):
        slopes = EtaLaw.fit(gridded(EtaLaw(3.0), 1.2, [1, 10**0.5, 10, 10**1.5, 100], step, seeds), of="edge").slopes
        assert slopes.rich == pytest.approx(2 / 3)
        assert slopes.rich_interval is not None
        # The end points alone would give ± step/log 100 = 0.2, five points with uniform errors 1.96·σ = 0.14.
        low, high = slopes.rich_interval
        assert 0.1 < 2 / 3 - low < 0.25
        assert 0.1 < high - 2 / 3 < 0.25
        assert slopes.lr_interval[1] / slopes.lr_interval[0] > math.exp(step / 2)


def test_intervals_of_edges_on_a_grid_hold_the_truth() -> None:
    draw, held, widths = random.Random(0), 0, []
    for _ in range(60):
        law = EtaLaw(2 / draw.uniform(0.5, 0.8))
        gammas = [1, 10**0.5, 10, 10**1.5, 100]
        slopes = EtaLaw.fit(gridded(law, draw.uniform(0.5, 2), gammas, 0.8), of="edge").slopes
        assert slopes.rich_interval is not None
        held += slopes.rich_interval[0] <= law.rich <= slopes.rich_interval[1]
        widths.append(slopes.rich_interval[1] - slopes.rich_interval[0])
    assert held >= 56
    assert sum(widths) / len(widths) < 0.5


@pytest.mark.parametrize("count", [5, 7])
def test_a_range_without_the_bend_has_none(count: int) -> None:
    """The middle of the range is the only place for a bend between five γ; between seven any fits equally well."""
    gammas = [100 ** (i / (count - 1)) for i in range(count)]
    fit = EtaLaw.fit(made(EtaLaw(3.0), 0.7, gammas=gammas))
    assert fit.slopes.bend is None
    assert fit.slopes.bend_interval is None
    assert fit.slopes.lazy is None
    assert (fit.law.knee, fit.law.lazy) == (1.0, 2.0)
    assert fit.law.rich == pytest.approx(2 / 3, rel=0.02)


def test_a_bend_beyond_the_candidates_is_inside_its_interval() -> None:
    """Two γ lie below or at it, so the lowest place for a fitted bend is the third one, 10."""
    fit = EtaLaw.fit(made(EtaLaw(10.0), 0.7, gammas=[10.0**i for i in range(-1, 5)], seeds=4))
    assert fit.law.knee == pytest.approx(10.0)
    assert fit.slopes.bend_interval is not None
    low, high = fit.slopes.bend_interval
    assert low < 1.0 < high


def test_what_is_no_record_is_named() -> None:
    for what, message in (
        ([1, 2], r"records holds 1, which has no gamma; give run records"),
        (3, "records is one int"),
    ):
        with pytest.raises(UsageError, match=message) as told:
            EtaLaw.fit(what)  # type: ignore[arg-type]
        assert "\n" not in str(told.value)


def test_a_fit_prints_as_a_short_table() -> None:
    fit = EtaLaw.fit(made(EtaLaw(3.0), 0.7, gammas=[1.0, 10.0, 100.0, 1000.0]))
    head, rate, lazy, rich, bend = str(fit).splitlines()
    assert head == "law of 8 points at 4 γ, 95 % intervals"
    assert rate.split()[:6] == ["rate", "at", "γ", "=", "1", "0.7"]
    assert rich.split()[2:4] == ["0.667", f"{fit.slopes.rich_interval[0]:.3g}"]  # type: ignore[index]
    assert [line.split()[-2:] for line in (lazy, bend)] == [["not", "fitted"]] * 2
    assert max(map(len, [head, rate, lazy, rich, bend])) < 60
    assert len(repr(fit)) < 200
    assert "Point(" not in repr(fit.slopes)


def test_too_few_gammas_are_named() -> None:
    with pytest.raises(UsageError, match=r"2 γ have a rate inside their range, which is too few .* at least 3"):
        EtaLaw.fit(made(EtaLaw(3.0), 0.7, gammas=[1.0, 10.0]))
    with pytest.raises(UsageError, match="fewer than three γ lie above the bend"):
        EtaLaw.fit(made(EtaLaw(3.0), 0.7, gammas=[0.001, 0.01, 0.1]))
    with pytest.raises(UsageError, match="knee=-1"):
        EtaLaw.fit(made(EtaLaw(3.0), 0.7), knee=-1.0)
