"""Curves with known catapults, plateaus, stairs and time scales are read as such."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gammaopt import UsageError
from gammaopt.diagnostics import collapse, dynamics
from gammaopt.online import Curve

T = np.geomspace(1, 1e4, 60)


def stairs(t: Any, at: tuple[float, ...], sizes: tuple[float, ...]) -> Any:
    return 1 - sum(size / (1 + (when / t) ** 6) for when, size in zip(at, sizes, strict=True))


def test_stairs_are_found_with_their_times_and_sizes_under_noise() -> None:
    at, sizes = (30.0, 300.0, 3000.0), (0.2, 0.5, 0.25)
    noise = 0.004 * np.random.default_rng(0).standard_normal(len(T))
    found = dynamics((T, stairs(T, at, sizes) + noise), start=1.0)
    assert [drop.step for drop in found.drops] == pytest.approx(at, rel=0.2)
    assert [drop.size for drop in found.drops] == pytest.approx(sizes, abs=0.04)
    assert found.catapult is None
    assert found.diverged_at is None
    assert found.plateau == pytest.approx(30, rel=0.1)  # where half of the first stair is done
    assert str(found).startswith("left its plateau at step")


def test_a_curve_without_a_move_has_no_stairs() -> None:
    flat = dynamics((T, 1 + 0.01 * np.sin(T)))
    assert flat.plateau is None
    assert flat.drops == ()
    assert str(flat).startswith("still on its plateau")


def test_a_catapult_rises_and_comes_back() -> None:
    bump = np.exp(-((np.log(T) - np.log(20)) ** 2) * 4)
    found = dynamics((T, 1 + 4 * bump - 0.95 / (1 + (200 / T) ** 4)))
    assert found.catapult is not None
    assert found.catapult.height == pytest.approx(5, rel=0.02)
    assert found.catapult.step == pytest.approx(20, rel=0.1)
    assert "catapult to 4.99 × the start at step 19.41" in str(found)
    assert dynamics((T, 1 + 4 / (1 + (20 / T) ** 4))).catapult is None  # never came back


def test_divergence_is_the_first_loss_that_is_no_number_or_beyond_the_limit() -> None:
    for bad in (math.nan, math.inf, 2e3):
        found = dynamics(([1, 2, 3, 4], [1.0, 1.2, bad, bad]))
        assert found.diverged_at == 3
        assert found.final == math.inf
    assert str(found) == "diverged at step 3"
    record: Any = type("Record", (), {"curve": Curve((1, 2), (1.0, 1.0), (0.0, 0.0)), "diverged_at": 3})()
    assert dynamics(record).diverged_at == 3


def test_a_run_that_diverged_at_once_has_dynamics_too() -> None:
    record: Any = type("Record", (), {"curve": Curve((), (), ()), "diverged_at": 1})()
    assert str(dynamics(record)) == "diverged at step 1"
    for bad in (math.inf, math.nan):
        found = dynamics(([1, 2], [bad, bad]))
        assert (found.diverged_at, found.final, found.plateau) == (1, math.inf, None)
        assert dynamics(([3, 4], [bad, bad]), start=1.0).diverged_at == 3


def test_curves_that_differ_in_time_only_collapse_and_others_do_not() -> None:
    units = (1.0, 4.0, 30.0)
    curves = [(unit * T, stairs(T, (30.0, 300.0), (0.4, 0.5))) for unit in units]
    exact = collapse(curves, units)
    assert exact.spread < 1e-12
    assert exact.before > 0.5
    assert collapse(curves).spread < 1e-6  # the plateaus tell the units
    wrong = collapse(curves, [1.0, 8.0, 30.0])
    assert 0.1 < wrong.spread < exact.before
    assert exact.curves.shape == (3, 60)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: dynamics(([], [])), "a curve of 0 steps"),
        (lambda: dynamics(([1, 2], [1.0])), "a curve of 2 steps and 1 losses"),
        (lambda: dynamics([1.0, 0.9, 0.5]), r"a curve is a list that is no pair; .*\(steps, losses\)"),
        (lambda: collapse(["run.jsonl"] * 2), "a curve is a str that is no pair"),
        (lambda: dynamics(([0, 1], [1.0, 1.0])), "must ascend from above 0"),
        (lambda: dynamics(([1], [0.0])), "start=0 is not allowed"),
        (lambda: dynamics(([1], [1.0]), moved=1.5), "moved=1.5 is no share"),
        (lambda: collapse([(T, T)]), "1 curves can't collapse"),
        (lambda: collapse([(T, np.ones(60))] * 2), "curve 0 is still on its plateau"),
        (lambda: collapse([([1, 2], [math.inf, math.inf])] * 2), "a curve has losses that are not finite"),
        (lambda: collapse([(T, T)] * 2, [1.0]), "1 times for 2 curves"),
        (lambda: collapse([(T, T)] * 2, [1.0, 1e6]), "no time in common"),
    ],
)
def test_mistakes_are_named(ask: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask()
