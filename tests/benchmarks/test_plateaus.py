"""The measured plateaus, and that the tasks say what was measured."""

from __future__ import annotations

import math

import numpy as np
import plateaus
import pytest

from gammaopt.online import get_task


@pytest.mark.parametrize("name", plateaus.TABLES)
def test_a_task_has_the_plateau_that_was_measured(name: str) -> None:
    task, _, loss = name.partition("-")
    measured = plateaus.measure(name)
    assert get_task(task).plateau_steps[loss] == round(measured["plateau_steps"])  # type: ignore[index]
    assert measured["range"][0] < measured["plateau_steps"] < measured["range"][1]


def test_a_curve_leaves_where_it_rises_for_good() -> None:
    steps = (1, 10, 100, 1000)
    assert plateaus.leaves(steps, np.array([0.5, 0.5, 0.5, 0.6]), 0.55) == pytest.approx(10**2.5)
    assert plateaus.leaves(steps, np.array([0.6, 0.5, 0.6, 0.7]), 0.55) == pytest.approx(10**1.5)
    assert plateaus.leaves(steps, np.array([0.6, 0.6, 0.6, 0.7]), 0.55) == 1.0
    assert plateaus.leaves(steps, np.array([0.5, 0.5, 0.6, 0.5]), 0.55) == math.inf
