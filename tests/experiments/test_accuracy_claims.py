"""The sentence on accuracy against γ names the budgets that were run, and claims that miss have reasons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import accuracy_vs_gamma as accuracy
import numpy as np
import pytest
from _experiment import Place


def made(budgets: tuple[int, ...], better: float = 0.0) -> accuracy.Sweep:
    """Accuracies of γ = 0.1, 1 and 10 on ten seeds, the first better by so many standard deviations of a seed."""
    random = np.random.default_rng(0)
    shape = 3, len(budgets), 10
    runs = 0.5 + 0.01 * random.normal(size=shape) + 0.01 * better * np.array([1.0, 0.0, 0.0])[:, None, None]
    tuning = 0.5 + 0.01 * np.array([1.0, 0.0, 0.0])[:, None, None] + np.zeros(shape)
    return accuracy.Sweep(
        "mse", np.array([0.1, 1.0, 10.0]), budgets, np.ones(shape[:2]), dict.fromkeys(accuracy.METRICS, runs),
        tuning, 0,
    )  # fmt: skip


def test_the_sentence_names_the_budgets_that_were_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A data set that has samples for 50 steps cuts the budgets that were asked for."""
    monkeypatch.setattr(accuracy, "sweep", lambda *_: made((20, 50)))
    preset = replace(accuracy.PRESETS["smoke"], budgets=(20, 60, 200))
    found = accuracy.measure(preset, Place(tmp_path))
    assert found.meaning.startswith("The best γ over 20, 50 steps is ")


def test_a_gain_that_is_not_shown_has_a_reason() -> None:
    unshown, shown = (accuracy.claims_of(made((20, 50), better))[0] for better in (0.0, 5.0))
    assert (unshown.holds, unshown.why) == (False, "its interval contains the bound")
    assert (shown.holds, shown.why) == (True, "")
