"""The pruner benchmark: runs are reported as they were, what is stopped is counted, a missed bar is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pruners
import pytest


class Stops(optuna.pruners.BasePruner):
    """Stops every trial at its first report from ``step`` on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return (trial.last_step or 0) >= self.step


def test_without_a_pruner_every_run_goes_to_its_end_and_none_is_killed() -> None:
    found = pruners.study(("digits-mse", "online"), "none", 0, 30)
    assert found.killed == 0
    assert 0.7 < found.compute < 1.0  # diverged runs stop by themselves
    assert found.top > 0
    assert 0 <= found.regret < 0.1


def test_a_pruner_that_stops_everything_kills_the_whole_top_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruners, "pruner", lambda *_: Stops(49))
    found = pruners.study(("parity-mse", "online"), "median", 0, 30)
    assert found.killed == found.top
    assert found.compute <= 49 / 1000
    assert found.regret == pytest.approx(0.969, abs=0.001)  # nothing was found at all


def test_the_pruners_of_a_study_are_those_named() -> None:
    surrogate = pruners.table("digits-mse")
    kinds = [type(pruners.pruner(name, surrogate)).__name__ for name in pruners.PRUNERS]
    assert kinds == ["NopPruner", "MedianPruner", "SuccessiveHalvingPruner", "HyperbandPruner", "RescaledTimePruner"]


def test_a_cell_reports_its_curve_until_it_diverges_on_every_seed() -> None:
    surrogate = pruners.table("digits-mse")
    trial = optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner()).ask()
    curve = np.zeros(len(surrogate.curve_steps))
    curve[:3] = 0.1, 0.2, 0.3
    assert pruners.train(trial, surrogate, curve) == (surrogate.curve_steps[3], False)
    assert trial.study.trials[0].intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3}


def test_bars_that_are_missed_are_named() -> None:
    def row(pruner: str, killed: float, low: float = 0.0) -> dict[str, Any]:
        where = {"table": "t", "score": "online", "pruner": pruner, "killed": killed}
        return {**where, "regret_more_ci95": [low, 1.0], "regret_more_than_none": low}

    stock = [row("median", 0.8), row("successive halving", 0.9), row("hyperband", 0.4)]
    assert pruners.missed_bars([*stock, row("none", 0.0), row("rescaled time", 0.1)]) == []
    assert pruners.missed_bars([*stock, row("rescaled time", 0.11, 0.02)]) == [
        "t, online: 11.0 % of the top tenth killed, at most 10.0 %",
        "t, online: regret 2.00 points above that of no pruner",
    ]
