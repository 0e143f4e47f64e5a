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


def test_only_large_gamma_leaves_the_lazy_exponent_as_predicted() -> None:
    fit = EtaLaw.fit(made(EtaLaw(3.0), 0.7, gammas=[1.0, 10.0, 100.0, 1000.0]))
    assert fit.slopes.lazy is None
    assert fit.slopes.bend is None
    assert fit.law.lazy == 2.0
    assert fit.law.rich == pytest.approx(2 / 3, rel=0.02)


def test_too_few_gammas_are_named() -> None:
    with pytest.raises(UsageError, match=r"2 γ have a rate inside their range, which is too few .* at least 3"):
        EtaLaw.fit(made(EtaLaw(3.0), 0.7, gammas=[1.0, 10.0]))
    with pytest.raises(UsageError, match="fewer than three γ lie above the bend"):
        EtaLaw.fit(made(EtaLaw(3.0), 0.7, gammas=[0.001, 0.01, 0.1]))
    with pytest.raises(UsageError, match="knee=-1"):
        EtaLaw.fit(made(EtaLaw(3.0), 0.7), knee=-1.0)
